"""The optimizer's parameter groups and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZER_STATE = "optimizer."  # begins the names of its tensors in a checkpoint


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; gains, biases and other vectors do not (weight_decay 0).

    Plain parameters and those of each mesh stand apart: a fused optimizer takes one kind at a time.
    """
    groups: dict[tuple[bool, str], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays, mesh = parameter.ndim >= 2, str(getattr(parameter, "device_mesh", ""))
            settings: dict[str, Any] = {"params": []} if decays else {"params": [], "weight_decay": 0.0}
            groups.setdefault((decays, mesh), settings)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def rate(step: int, steps: int, *, warmup_steps: int, final_ratio: float) -> float:
    """The factor on the learning rate at a step from 0: linear warm-up, then half a cosine to `final_ratio`.

    Source: Loshchilov & Hutter 2016 (1608.03983).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its optimizer state, without moving it: a step of zero gradients at rate zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, saved in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = saved


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Weights and kept buffers by their names in the model, the optimizer's states by `optimizer.<name>.<key>`."""
    kept = model.state_dict().keys()
    tensors = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items() if optimizer else ():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER_STATE}{name}.{key}"] = value
    return tensors
