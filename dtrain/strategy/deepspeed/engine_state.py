"""Where an engine of DeepSpeed's ZeRO keeps weights and states, as a checkpoint wants them.

Every weight that trains lies, in fp32, in a flat tensor for each group of the optimizer's (a
sub-group, at stage 3), cut into one slice for each rank. Stages 1 and 2 cut across weights, stage 3
cuts each weight by itself. While a checkpoint is written or read, each weight is whole on one rank,
its owner, and nowhere else.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.parallel.optimizer import OPTIMIZER_STATE
from dtrain.strategy.zero1 import equal_shares

T = TypeVar("T")
REMEDY = "resume with strategy=ddp, zero1 or fsdp"


@torch.no_grad()
def whole_tensors(engine: Any) -> dict[str, Tensor]:
    """Return weights, states and buffers by their full names; a weight and its states on its owner.

    Collective: every rank calls it.
    """
    states, owners, group = _states(engine), _owners(engine), engine.optimizer.dp_process_group
    kept = engine.module.state_dict().keys()
    tensors = {name: buffer for name, buffer in engine.module.named_buffers() if name in kept}
    for name, parameter in engine.module.named_parameters():
        owned = owners[name] == dist.get_rank(group)
        for key in _keys(parameter, states):
            whole = torch.zeros(full_size(parameter), device=engine.device)
            start, part = _slice(engine, parameter, key)
            whole[start : start + part.numel()] = part
            dist.reduce(whole, group_dst=owners[name], group=group)  # others add zeros: it is exact
            if owned:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                tensors[_full_name(name, key)] = whole.view(shape)
        if owned and parameter.requires_grad:
            for key in _step_counts(states[0]):
                tensors[_full_name(name, key)] = torch.tensor(float(states[0][key]))
    return tensors


@torch.no_grad()
def distribute_states(engine: Any, tensors: dict[str, Tensor]) -> None:
    """Give every rank its slices of the owners' tensors, one tensor at a time.

    Collective: every rank calls it.

    Raises:
        ValueError: some weights have no states, or were stepped less often than others: the engine
            keeps one count for all.
    """
    owners, group = _owners(engine), engine.optimizer.dp_process_group
    if not _has_states(engine, owners, tensors):
        for flat in flat_slices(engine):
            engine.optimizer.optimizer.state.pop(flat, None)
    states = _states(engine)
    for name, parameter in engine.module.named_parameters():
        for key in _keys(parameter, states):
            whole = torch.empty(full_size(parameter), device=engine.device)
            if owners[name] == dist.get_rank(group):
                whole.copy_(tensors[_full_name(name, key)].flatten())
            dist.broadcast(whole, group_src=owners[name], group=group)
            if not hasattr(parameter, "ds_tensor") and not parameter.requires_grad:
                parameter.copy_(whole.view_as(parameter))
                continue
            start, part = _slice(engine, parameter, key)
            part.copy_(whole[start : start + part.numel()])
            _write_back(parameter, key, part)
    for key in _step_counts(states[0]):
        names = [_full_name(name, key) for name in owners]
        own = [float(tensors[name]) for name in names if name in tensors]
        counts = sorted({count for each in _gather(own, group) for count in each})
        if len(counts) > 1:
            raise ValueError(
                f"weights in the checkpoint have been stepped {counts[0]:g} to {counts[-1]:g} "
                f"times, and DeepSpeed keeps one count for all: {REMEDY}"
            )
        for state in states:
            _set_count(state, key, counts[0])
    _update_weights(engine.optimizer)


@torch.no_grad()
def materialize_states(engine: Any) -> None:
    """Make the optimizer's states, to be filled, where no step has made them.

    A step of zeros at rate zero makes them, and counts no step.
    """
    zero = engine.optimizer
    groups = zero.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for index, flat in enumerate(flat_slices(engine)):
        if not zero.optimizer.state.get(flat):
            for group in groups:
                group["lr"] = 0.0
            gradient, flat.grad = flat.grad, torch.zeros_like(flat)
            zero._optimizer_step(index)
            flat.grad = gradient  # offloading keeps its buffer there
            state = zero.optimizer.state[flat]
            for key in _step_counts(state):
                _set_count(state, key, 0)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def tensors_by_kind(engine: Any) -> dict[str, list[Tensor]]:
    """Return what this rank keeps, by its kind; the fp32 weights count as the optimizer's."""
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    states = [
        value
        for state in zero.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    parts = [part for parts in zero.averaged_gradients.values() for part in parts or []]
    return {
        "parameters": [getattr(p, "ds_tensor", p) for p in parameters],
        "optimizer": [*flat_slices(engine), *states],
        "gradients": [*parts, *(p.grad for p in parameters if p.grad is not None)],
    }


def flat_slices(engine: Any) -> list[Tensor]:
    """Return this rank's slices of the fp32 weights: what the optimizer steps."""
    zero = engine.optimizer
    flat = getattr(zero, "fp32_partitioned_groups_flat", None)  # of stage 3
    return cast(list[Tensor], flat or zero.single_partition_of_fp32_groups)


def full_size(parameter: nn.Parameter) -> int:
    """Return the elements of the whole parameter, of which this rank may hold a slice."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _owners(engine: Any) -> dict[str, int]:
    """Return each weight's owner, a rank among those that share the states."""
    sharing = dist.get_world_size(engine.optimizer.dp_process_group)
    shares = equal_shares(list(engine.module.parameters()), sharing, full_size)
    ranks = {id(parameter): rank for rank, share in enumerate(shares) for parameter in share}
    return {name: ranks[id(parameter)] for name, parameter in engine.module.named_parameters()}


def _states(engine: Any) -> list[dict[str, Any]]:
    """Return the optimizer's states of each flat tensor; empty before the first step."""
    return [engine.optimizer.optimizer.state.get(flat, {}) for flat in flat_slices(engine)] or [{}]


def _keys(parameter: nn.Parameter, states: list[dict[str, Any]]) -> tuple[str | None, ...]:
    """Return the keys of a parameter's tensors: None for itself, then its moments if it trains."""
    return (None, *(_moments(states[0]) if parameter.requires_grad else ()))


def _moments(state: dict[str, Any]) -> list[str]:
    """Return the keys of states that are as large as the weights."""
    return [key for key, value in state.items() if isinstance(value, Tensor) and value.ndim]


def _step_counts(state: dict[str, Any]) -> list[str]:
    """Return the keys of the other states: they count steps."""
    return [key for key in state if key not in _moments(state)]


def _full_name(name: str, key: str | None) -> str:
    return f"{OPTIMIZER_STATE}{name}.{key}" if key else name


def _slice(engine: Any, parameter: Any, key: str | None) -> tuple[int, Tensor]:
    """Return where this rank's slice begins in the flattened parameter or state, and its values.

    What does not train is in no optimizer; at stages 0 to 2 every rank has it whole, and the first
    one gives it.
    """
    zero, trains = engine.optimizer, parameter.requires_grad
    rank = dist.get_rank(zero.dp_process_group)
    if hasattr(parameter, "ds_tensor"):
        value = zero.get_local_fp32_param(parameter, key) if trains else parameter.ds_tensor
        start = value.numel() * rank  # the last slices have padding
        return start, value[: max(0, parameter.ds_numel - start)]
    if not trains and rank == 0:
        return 0, parameter.data.flatten()
    if not trains or parameter._hp_mapping is None:
        return 0, torch.empty(0, device=engine.device)
    mapping, where = parameter._hp_mapping, parameter._hp_mapping.hp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    flat = zero.optimizer.state[flat][key] if key else flat
    return mapping.lp_fragment_address.start, flat.narrow(0, where.start, where.numel)


def _write_back(parameter: Any, key: str | None, part: Tensor) -> None:
    """Write a slice of stage 3, which may be a copy, into the engine, and into what is gathered."""
    if hasattr(parameter, "ds_tensor") and parameter.requires_grad:
        padded = nn.functional.pad(part, (0, parameter.ds_tensor.numel() - part.numel()))
        parameter._z3_optimizer.set_local_hp_param(padded, parameter, key)
        if key is None:
            parameter.ds_tensor.copy_(padded)


def _set_count(state: dict[str, Any], key: str, steps: float) -> None:
    if isinstance(state[key], Tensor):
        state[key].fill_(steps)
    else:
        state[key] = type(state[key])(steps)


def _update_weights(zero: Any) -> None:
    """Bring the weights that the passes use up to date with the slices.

    Collective: every rank calls it.
    """
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()  # also those that stay whole
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _has_states(engine: Any, owners: dict[str, int], tensors: dict[str, Tensor]) -> bool:
    """Return whether the checkpoint has the states that were made to be filled.

    Collective: every rank calls it.

    Raises:
        ValueError: it has those of some weights only.
    """
    group, keys = engine.optimizer.dp_process_group, list(_states(engine)[0])
    wanted = [
        _full_name(name, key)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad and owners[name] == dist.get_rank(group)
        for key in keys
    ]
    absent = [name for name in wanted if name not in tensors]
    every = _gather((len(wanted) - len(absent), absent), group)
    names = [name for _, each in every for name in each]
    if names and sum(present for present, _ in every):
        raise ValueError(
            f"{names[0]} is absent from the checkpoint, whose run had not stepped that weight, and "
            f"DeepSpeed keeps states of all or none: {REMEDY}"
        )
    return not names


def _gather(own: T, group: dist.ProcessGroup) -> list[T]:
    """Return what each rank of the group gives. Collective: every rank of it calls it."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group)
    return every
