"""Initial weights that depend on the seed and the parameter's name alone.

A model that can fill one parameter at a time (`initial(name, values, generator)`) is built and
sharded on the meta device. Then each parameter is drawn whole on the host and cut to this rank's
shard. So the model never exists whole on a rank, and every strategy and world size starts from the
same weights (a sharded random generator would not: pytorch#168058). Any other model is built whole.
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
from dtrain.model.adapt import adapt
from dtrain.model.layout import ModelFactory, attributes_set, offers, set_attributes

_WITH_VALUES: WeakSet[ModelFactory] = WeakSet()  # factories that fail on the meta device


def on_meta(factory: ModelFactory) -> nn.Module | None:
    """Build the model on the meta device, without memory; None if its constructor needs values.

    Raises:
        ValueError: it cannot be built at all.
    """
    try:
        with torch.device("meta"):
            return adapt(factory()).to("meta")  # buffers may have been made with their values
    except Exception:  # of a user's model: it may fail in any way
        if factory not in _WITH_VALUES:
            with torch.random.fork_rng(devices=[]):
                factory()  # a mistake that has to do with no device is raised here
            _WITH_VALUES.add(factory)
        return None


def build(factory: ModelFactory, seed: int) -> nn.Module:
    """Build the model: on the meta device if it has `initial`, else whole, drawn from `seed`."""
    if offers(on_meta(factory), "initial"):
        with torch.device("meta"):
            return _contiguous(adapt(factory()))
    seed_everything(seed)
    return _contiguous(adapt(factory()))


def _contiguous(model: nn.Module) -> nn.Module:
    """Lay out the parameters row by row: fully_shard and checkpoints take no transposed views.

    Give each number of an expanded buffer its own memory: otherwise it could not be restored.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    for buffer in model.buffers():
        if 0 in buffer.stride():
            buffer.data = buffer.data.contiguous()
    return model


def build_with_values(factory: ModelFactory, seed: int, dtype: torch.dtype) -> nn.Module:
    """Build the model with all its values, on the host."""
    model, host = build(factory, seed), torch.device("cpu")
    materialize(model, seed, host, host, dtype)
    return model


def cast(model: nn.Module, dtype: torch.dtype, storage: torch.device, device: torch.device) -> None:
    """Move parameters to `storage` as `dtype`, in place, and buffers to `device`.

    Buffers are only widened: so tables of angles keep their digits, and complex numbers stay
    complex.
    """
    moved: dict[int, Tensor] = {}

    def fit(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            return tensor.to(storage, dtype)
        place = storage if isinstance(tensor, nn.Parameter) else device
        inexact = tensor.is_floating_point() or tensor.is_complex()
        wide = torch.promote_types(tensor.dtype, dtype) if inexact else tensor.dtype
        # a tensor that two modules share stays one
        return moved.setdefault(id(tensor), tensor.to(place, wide))

    model._apply(fit)  # type: ignore[no-untyped-call]


def materialize(
    model: nn.Module,
    seed: int,
    storage: torch.device,
    device: torch.device,
    dtype: torch.dtype,
    on_values: Callable[[str, Tensor], object] | None = None,
) -> None:
    """Give the parameters their initial values on `storage`, in place; move buffers to `device`.

    There is no communication.

    Args:
        on_values: called with each parameter's name and whole values, where they are drawn here.

    Raises:
        ValueError: a buffer is on the meta device, so its values are unknown.
    """
    attributes = attributes_set(model)
    if not offers(model, "initial") or not any(p.is_meta for p in model.parameters()):
        cast(model, dtype, storage, device)
    else:
        _draw(model, seed, storage, device, dtype, on_values)
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
    on_values: Callable[[str, Tensor], object] | None,
) -> None:
    """Do what `materialize` says, for a model that fills one parameter at a time."""
    initial: Any = model.initial
    # without second names of tied parameters
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    drawn: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names[id(parameter)]
            if id(parameter) not in drawn:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                initial(name, values, generator(seed, name))
                if on_values:
                    on_values(name, values)
                drawn[id(parameter)] = _place(values.to(dtype), parameter, storage)
            setattr(module, key, drawn[id(parameter)])
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                raise ValueError(
                    f"{type(model).__name__}: buffer {key} of {type(module).__name__} has no "
                    f"values; give it some (device='cpu'), compute it in forward, or leave out "
                    f"`initial`"
                )
            setattr(module, key, buffer.to(device))


def _place(values: Tensor, like: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return the whole `values`, or this rank's shard of them, which is cut on the host."""
    if not isinstance(like, DTensor):
        return nn.Parameter(values.to(device), requires_grad=like.requires_grad)
    sharded = torch.empty_like(like.detach(), device=device, dtype=values.dtype)
    assert isinstance(sharded, DTensor)
    shape, offset = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    local = values[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    sharded.to_local().copy_(local)
    return nn.Parameter(sharded, requires_grad=like.requires_grad)
