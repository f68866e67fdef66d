"""The optimizer's parameter groups and the learning rate of each step."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZER_STATE = "optimizer."  # begins the names of its tensors in a checkpoint


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups in which matrices decay, and gains, biases and other vectors do not.

    Plain parameters and those of each mesh are apart: a fused optimizer takes one kind at a time.
    Where nothing trains, as in a stage of a pipeline, there is one empty group.
    """
    groups: dict[tuple[bool, str], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays, mesh = parameter.ndim >= 2, str(getattr(parameter, "device_mesh", ""))
            group: dict[str, Any] = {"params": []} | ({} if decays else {"weight_decay": 0.0})
            groups.setdefault((decays, mesh), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)] or [{"params": []}]


def lr_factor(step: int, steps: int, *, warmup_steps: int, min_lr_ratio: float) -> float:
    """Return the factor on the learning rate: linear warm-up, then half a cosine to `min_lr_ratio`.

    Steps count from 0.
    Source: Loshchilov & Hutter 2016 (1608.03983).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def materialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Make every parameter's optimizer state, by a step of gradients of one at rate zero.

    Weights stay as they are, and states do not (a count of steps is 1): a checkpoint must replace
    them.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)  # zeros would make some divide by zero
    hooks, optimizer._optimizer_step_post_hooks = (
        optimizer._optimizer_step_post_hooks,
        OrderedDict(),
    )
    optimizer.step()  # without hooks: nothing is exchanged
    optimizer._optimizer_step_post_hooks = hooks
    optimizer.zero_grad()
    for group, saved in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = saved


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return weights and saved buffers by name, optimizer states by `optimizer.<name>.<key>`.

    A state that is a Python number becomes a tensor of fp64, exact up to 2^53: see `restore_state`.

    Raises:
        ValueError: a state is neither a tensor nor a number.
    """
    saved = model.state_dict().keys()
    tensors = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items() if optimizer else ():
            if value is None:  # SGD without momentum
                continue
            if not isinstance(value, Tensor | int | float):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of "
                    f"{name}, and a checkpoint takes tensors and numbers: use another optimizer"
                )
            full = f"{OPTIMIZER_STATE}{name}.{key}"
            tensors[full] = (
                value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            )
    return tensors


def restore_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Make the states equal to the tensors of `named_tensors`, which a checkpoint has filled.

    Numbers are put back, states that are gone are deleted, and those that a first step does not
    make are added.
    """
    late: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        if full.startswith(OPTIMIZER_STATE):
            owner, _, key = full.removeprefix(OPTIMIZER_STATE).rpartition(".")
            late.setdefault(owner, {})[key] = tensor
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for key, value in list(state.items()):
            full = f"{OPTIMIZER_STATE}{name}.{key}"
            if value is not None and full not in tensors:
                del state[key]
            elif isinstance(value, int | float):
                state[key] = type(value)(tensors[full].item())
        for key, tensor in late.get(name, {}).items() if state else ():
            if state.get(key) is None:
                state[key] = tensor
        if not any(value is not None for value in state.values()):
            optimizer.state.pop(parameter, None)
