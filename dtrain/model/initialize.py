"""Initial weights that depend on the seed and the parameter's name alone.

A model that can fill one parameter at a time (`initial(name, values, generator)`) is built on the
meta device, sharded there, and given its values one parameter at a time: drawn whole on the host,
cut to this rank's shard. So it never exists whole on a rank, and every strategy and world size
starts from the same weights (a sharded random generator would not: pytorch#168058). Any other model
is built whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dtrain.data.seeded import generator, seed_everything
from dtrain.model.adapt import adapted
from dtrain.model.layout import ModelFactory, attributes_set, offers, set_attributes

_WITH_VALUES: WeakSet[ModelFactory] = WeakSet()  # those that make no model without


def on_meta(factory: ModelFactory) -> nn.Module | None:
    """The model's shapes, without memory; None if it cannot be built so (it computes with values).

    Raises:
        ValueError: it cannot be built at all.
    """
    try:
        with torch.device("meta"):
            return adapted(factory()).to("meta")  # buffers may have been made with their values
    except Exception:  # of a user's model: it may fail in any way
        if factory not in _WITH_VALUES:
            with torch.random.fork_rng(devices=[]):
                factory()  # what is wrong anywhere says so
            _WITH_VALUES.add(factory)
        return None


def build(factory: ModelFactory, seed: int) -> nn.Module:
    """The model: on the meta device if it has `initial`, else whole, drawn from `seed`."""
    if offers(on_meta(factory), "initial"):
        with torch.device("meta"):
            return _contiguous(adapted(factory()))
    seed_everything(seed)
    return _contiguous(adapted(factory()))


def _contiguous(model: nn.Module) -> nn.Module:
    """The model, its parameters laid out row by row: neither fully_shard nor a checkpoint takes a
    transposed view.

    And each of a buffer's numbers in a place of its own: one that was expanded could not be
    restored.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    for buffer in model.buffers():
        if 0 in buffer.stride():
            buffer.data = buffer.data.contiguous()
    return model


def build_with_values(factory: ModelFactory, seed: int, dtype: torch.dtype) -> nn.Module:
    """The model with all its values, on the host."""
    model, host = build(factory, seed), torch.device("cpu")
    materialize(model, seed, host, host, dtype)
    return model


def cast(model: nn.Module, dtype: torch.dtype, storage: torch.device, device: torch.device) -> None:
    """Give the parameters the format `dtype` on `storage`, in place, and move the buffers to
    `device`.

    Buffers are only widened: tables of angles keep the digits that their author gave them, and
    complex numbers stay complex.
    """
    made: dict[int, Tensor] = {}

    def fit(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            return tensor.to(storage, dtype)
        place = storage if isinstance(tensor, nn.Parameter) else device
        inexact = tensor.is_floating_point() or tensor.is_complex()
        wide = torch.promote_types(tensor.dtype, dtype) if inexact else tensor.dtype
        # one that two modules share stays one
        return made.setdefault(id(tensor), tensor.to(place, wide))

    model._apply(fit)


def materialize(
    model: nn.Module,
    seed: int,
    storage: torch.device,
    device: torch.device,
    dtype: torch.dtype,
    told: Callable[[str, Tensor], object] | None = None,
) -> None:
    """Give every parameter of `model` its initial values on `storage`, in place, and move its
    buffers to `device`.

    Needs no communication. `told` is given each parameter's name and whole values, where they are
    drawn here.

    Raises:
        ValueError: a buffer on the meta device: nothing tells its values.
    """
    attributes = attributes_set(model)
    if not offers(model, "initial") or not any(p.is_meta for p in model.parameters()):
        cast(model, dtype, storage, device)
    else:
        _draw(model, seed, storage, device, dtype, told)
    set_attributes(
        model,
        {name: {k: v for k, v in own.items() if k[0] != "_"} for name, own in attributes.items()},
    )


def _draw(
    model: nn.Module,
    seed: int,
    storage: torch.device,
    device: torch.device,
    dtype: torch.dtype,
    told: Callable[[str, Tensor], object] | None,
) -> None:
    """As `materialize`, of a model that fills one parameter at a time."""
    initial: Any = model.initial
    # a tied one counts once
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                initial(names[id(parameter)], values, generator(seed, names[id(parameter)]))
                if told:
                    told(names[id(parameter)], values)
                made[id(parameter)] = _place(values.to(dtype), parameter, storage)
            setattr(module, key, made[id(parameter)])
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                raise ValueError(
                    f"{type(model).__name__}: buffer {key} of {type(module).__name__} has no "
                    f"values; give "
                    f"it some (device='cpu'), compute it in forward, or leave out `initial`"
                )
            setattr(module, key, buffer.to(device))


def _place(values: Tensor, like: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The whole `values`, or this rank's shard of them, placed as `like` is; cut on the host."""
    if isinstance(like, DTensor):
        made = torch.empty_like(like.detach(), device=device, dtype=values.dtype)
        shape, offset = compute_local_shape_and_global_offset(
            like.shape, like.device_mesh, like.placements
        )
        assert isinstance(made, DTensor)
        made.to_local().copy_(
            values[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        )
        return nn.Parameter(made, requires_grad=like.requires_grad)
    return nn.Parameter(values.to(device), requires_grad=like.requires_grad)
