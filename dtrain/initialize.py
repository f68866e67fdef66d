"""Initial weights that depend on the seed and the parameter's name alone.

A model that can fill one parameter at a time (`initial(name, values, generator)`) is built on the meta
device, sharded there, and given its values one parameter at a time: drawn whole on the host, cut to this
rank's shard. So it never exists whole on a rank, and every strategy and world size starts from the same
weights (a sharded random generator would not: pytorch#168058). Any other model is built whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dtrain.batch import ModelFactory
from dtrain.draw import generator


def on_meta(factory: ModelFactory) -> nn.Module | None:
    """The model's shapes, without memory; None if it cannot be built so (it computes with values)."""
    try:
        with torch.device("meta"):
            return factory().to("meta")  # buffers may have been made with their values
    except (NotImplementedError, RuntimeError):
        return None


def build(factory: ModelFactory, seed: int) -> nn.Module:
    """The model: on the meta device if it has `initial`, else whole, drawn from `seed`."""
    if hasattr(on_meta(factory), "initial"):
        with torch.device("meta"):
            return _contiguous(factory())
    torch.manual_seed(seed)
    return _contiguous(factory())


def _contiguous(model: nn.Module) -> nn.Module:
    """The model, its parameters laid out row by row: neither fully_shard nor a checkpoint takes a transposed view."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    return model


def materialize(model: nn.Module, seed: int, storage: torch.device, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter of `model` its initial values on `storage`, in place, and move its buffers to `device`.

    Needs no communication.

    Raises:
        ValueError: a buffer on the meta device: nothing tells its values.
    """
    initial = getattr(model, "initial", None)
    if initial is None or not any(p.is_meta for p in model.parameters()):
        model.to(device=storage, dtype=dtype)
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(device))
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied one counts once
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                initial(names[id(parameter)], values, generator(seed, names[id(parameter)]))
                made[id(parameter)] = _place(values.to(dtype), parameter, storage)
            setattr(module, key, made[id(parameter)])
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                raise ValueError(f"{type(model).__name__}: buffer {key} of {type(module).__name__} has no values; give "
                                 f"it some (device='cpu'), compute it in forward, or leave out `initial`")  # fmt: skip
            setattr(module, key, buffer.to(device))


def _place(values: Tensor, like: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The whole `values`, or this rank's shard of them, placed as `like` is; cut on the host."""
    if isinstance(like, DTensor):
        made = torch.empty_like(like.detach(), device=device, dtype=values.dtype)
        shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
        assert isinstance(made, DTensor)
        made.to_local().copy_(values[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))])
        return nn.Parameter(made, requires_grad=like.requires_grad)
    return nn.Parameter(values.to(device), requires_grad=like.requires_grad)
