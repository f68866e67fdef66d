"""DeepSpeed's ZeRO from without: its tensors as a checkpoint wants them, and what it sends.

Every weight that trains lies, in fp32, in a flat tensor for each group of the optimizer's (a
sub-group, at stage 3), cut into one slice for each rank. Stages 1 and 2 cut across weights, stage 3
cuts each weight by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.parallel.footprint import Footprint, ModelPart, Weight
from dtrain.parallel.messages import Message, message
from dtrain.parallel.optimizer import OPTIMIZER_STATE

ALL_REDUCED = 500_000_000  # elements of a message of stage 0
ALIGNED = 2  # a flat tensor of stages 1 and 2 is filled up to so many times the ranks
TOLD = {  # settings with which the messages are known, by name; others may be anything
    "reduce_scatter": True, "contiguous_gradients": True, "use_multi_rank_bucket_allreduce": True,
    "round_robin_gradients": False, "offload_optimizer": None, "offload_param": None,
    "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
    "zero_quantized_gradients": False, "mics_shard_size": -1, "overlap_comm": False,
}  # fmt: skip
TOLD_OF_STAGE_3 = dict.fromkeys(
    (
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_max_reuse_distance",
    ),
    0,
)


def flat_slices(engine: Any) -> list[Tensor]:
    """This rank's slices of the fp32 weights: what the optimizer steps."""
    zero = engine.optimizer
    return (
        getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    )


def full_size(parameter: nn.Parameter) -> int:
    """Of the whole parameter, though this rank may hold a slice."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@torch.no_grad()
def whole_tensors(engine: Any, owners: dict[str, int]) -> dict[str, Tensor]:
    """Weights, states and buffers by their full names, each whole on the rank that owns it.

    A collective.
    """
    states = _states(engine)
    kept = engine.module.state_dict().keys()
    group = engine.optimizer.dp_process_group
    found = {name: buffer for name, buffer in engine.module.named_buffers() if name in kept}
    for name, parameter in engine.module.named_parameters():
        for key in _keys(parameter, states):
            whole = torch.zeros(full_size(parameter), device=engine.device)
            start, part = _slice(engine, parameter, key)
            whole[start : start + part.numel()] = part
            dist.reduce(whole, group_dst=owners[name], group=group)  # to all others zeros, so exact
            if owners[name] == dist.get_rank(group):
                found[_named(name, key)] = whole.view(
                    getattr(parameter, "ds_shape", parameter.shape)
                )
        if owners[name] == dist.get_rank(group) and parameter.requires_grad:
            once = {
                key: value for key, value in states[0].items() if key not in _moments(states[0])
            }
            found |= {_named(name, key): torch.tensor(float(value)) for key, value in once.items()}
    return found


@torch.no_grad()
def distribute_states(engine: Any, owners: dict[str, int], tensors: dict[str, Tensor]) -> None:
    """Hand every rank its slices of the owners' tensors, one at a time. A collective.

    Raises:
        ValueError: states of some weights alone, or of different steps: the engine keeps one count
            for all.
    """
    if not _has_states(engine, owners, tensors):
        for flat in flat_slices(engine):
            engine.optimizer.optimizer.state.pop(flat, None)
    states, group = _states(engine), engine.optimizer.dp_process_group
    for name, parameter in engine.module.named_parameters():
        for key in _keys(parameter, states):
            whole = torch.empty(full_size(parameter), device=engine.device)
            if owners[name] == dist.get_rank(group):
                whole.copy_(tensors[_named(name, key)].flatten())
            dist.broadcast(whole, group_src=owners[name], group=group)
            if not hasattr(parameter, "ds_tensor") and not parameter.requires_grad:
                parameter.copy_(whole.view_as(parameter))
                continue
            start, part = _slice(engine, parameter, key)
            part.copy_(whole[start : start + part.numel()])
            _keep(parameter, key, part)
    for key in states[0].keys() - set(_moments(states[0])):
        mine = [float(tensors[full]) for name in owners if (full := _named(name, key)) in tensors]
        every: list[list[float]] = [[]] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group)  # a rank that owns no weight has none
        counts = sorted({count for each in every for count in each})
        if len(counts) > 1:
            raise ValueError(
                f"weights in the checkpoint have been stepped {counts[0]:g} to {counts[-1]:g} "
                f"times, and "
                f"DeepSpeed keeps one count for all: resume with strategy=ddp, zero1 or "
                f"fsdp"
            )
        for state in states:
            _count(state, key, counts[0])
    _publish(engine.optimizer)


def _keys(parameter: nn.Parameter, states: list[dict[str, Any]]) -> tuple[str | None, ...]:
    """What there is of a parameter: itself (None), and its moments if it trains."""
    return (None, *(_moments(states[0]) if parameter.requires_grad else ()))


def _slice(engine: Any, parameter: Any, key: str | None) -> tuple[int, Tensor]:
    """Where this rank's slice begins in the flattened parameter, and its values: of the weight, or
    of a state.

    What does not train is in no optimizer; at stages 0 to 2 every rank has it whole, and the first
    one gives it.
    """
    zero, trains = engine.optimizer, parameter.requires_grad
    rank = dist.get_rank(zero.dp_process_group)
    if hasattr(parameter, "ds_tensor"):
        value = zero.get_local_fp32_param(parameter, key) if trains else parameter.ds_tensor
        start = value.numel() * rank  # the last ones are filled up
        return start, value[: max(0, parameter.ds_numel - start)]
    if not trains and rank == 0:
        return 0, parameter.data.flatten()
    if not trains or parameter._hp_mapping is None:
        return 0, torch.empty(0, device=engine.device)
    mapping, where = parameter._hp_mapping, parameter._hp_mapping.hp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    flat = zero.optimizer.state[flat][key] if key else flat
    return mapping.lp_fragment_address.start, flat.narrow(0, where.start, where.numel)


def _keep(parameter: Any, key: str | None, part: Tensor) -> None:
    """At stage 3 a slice may have been a copy, from elsewhere; and there is another of the
    weights, that travels.
    """
    if hasattr(parameter, "ds_tensor") and parameter.requires_grad:
        padded = nn.functional.pad(part, (0, parameter.ds_tensor.numel() - part.numel()))
        parameter._z3_optimizer.set_local_hp_param(padded, parameter, key)
        if key is None:
            parameter.ds_tensor.copy_(padded)


def _publish(zero: Any) -> None:
    """Bring the weights that the passes use up to date with the slices. A collective."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()  # those that stay whole, too
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def tensors_by_kind(engine: Any) -> dict[str, list[Tensor]]:
    """What this rank keeps, by its kind; the fp32 weights that are stepped are the optimizer's."""
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


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _has_states(engine: Any, owners: dict[str, int], tensors: dict[str, Tensor]) -> bool:
    """Do the owners have the states that were made to be filled?

    All of them, or none. A collective.
    """
    group = engine.optimizer.dp_process_group
    keys = list(_states(engine)[0])
    mine = [name for name, _ in _trained(engine) if owners[name] == dist.get_rank(group)]
    lacking = [
        _named(name, key) for name in mine for key in keys if _named(name, key) not in tensors
    ]
    every: list[tuple[int, list[str]]] = [(0, [])] * dist.get_world_size(group)
    dist.all_gather_object(every, (len(mine) * len(keys) - len(lacking), lacking), group=group)
    names = [name for _, each in every for name in each]
    if names and sum(number for number, _ in every):
        raise ValueError(
            f"{names[0]} is absent from the checkpoint, whose run had not stepped that weight, and "
            f"DeepSpeed keeps states of all or none: resume with strategy=ddp, zero1 or "
            f"fsdp"
        )
    return not names


def _states(engine: Any) -> list[dict[str, Any]]:
    """The optimizer's states of each flat tensor; empty before the first step."""
    return [engine.optimizer.optimizer.state.get(flat, {}) for flat in flat_slices(engine)] or [{}]


@torch.no_grad()
def materialize_states(engine: Any) -> None:
    """The same, to be filled: made, where no step has been yet, by one of zeros at rate zero."""
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
            for key in zero.optimizer.state[flat].keys() - set(
                _moments(zero.optimizer.state[flat])
            ):
                _count(zero.optimizer.state[flat], key, 0)
    for group, saved in zip(groups, rates, strict=True):
        group["lr"] = saved


def _moments(state: dict[str, Any]) -> list[str]:
    """The keys of states that are as large as the weights; others are steps."""
    return [key for key, value in state.items() if isinstance(value, Tensor) and value.ndim]


def _count(state: dict[str, Any], key: str, steps: float) -> None:
    if isinstance(state[key], Tensor):
        state[key].fill_(steps)
    else:
        state[key] = type(state[key])(steps)


def _named(name: str, key: str | None) -> str:
    return f"{OPTIMIZER_STATE}{name}.{key}" if key else name


def messages(footprint: Footprint, axis: str, ranks: int, zero: dict[str, Any]) -> list[Message]:
    """What a rank hands to collectives in a step, by the stage and the settings of
    `zero_optimization`.

    Raises:
        ValueError: it is not known with these settings.
    """
    stage = zero.get("stage", 0)
    _refuse_untold(zero, footprint)
    (piece,) = footprint.pieces
    ready = sorted((w for w in piece.weights if w.ready is not None), key=lambda w: w.ready or 0)
    groups, sent = _groups(piece), footprint.compute_bytes
    overflow = message(axis, "all_reduce", [1] * (sent < 4), 1)
    # see `refuse_unused`
    used = message(axis, "all_reduce", [len(ready)], 1, footprint.micro_batches)
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    if stage == 0:
        sums = list(
            _cut([w for w in piece.weights if w.ready is not None], ALL_REDUCED, after=True)
        )
        return [
            used,
            message(axis, "all_reduce", [sum(map(Weight.numel, each)) for each in sums], sent),
        ]
    if stage == 3:
        filled = lambda weights: sum(-(-w.elements // ranks) * ranks for w in weights)  # noqa: E731
        reduced, gathered = [filled(each) for each in _cut(ready, bucket)], _gathers(piece, filled)
        return [
            used,
            message(axis, "reduce_scatter", reduced, sent, footprint.micro_batches),
            message(axis, "all_gather", gathered, footprint.compute_bytes, footprint.micro_batches),
            message(axis, "all_reduce", [1] * len(groups), 8),
        ]
    order, times = (
        (ready, footprint.micro_batches)
        if stage == 2
        else ([w for group in groups for w in group], 1)
    )
    reduced = [sum(map(Weight.numel, each)) for each in _cut(order, bucket)]
    flat = [_flat(group, ranks) for group in groups]
    return [
        used,
        message(axis, "all_reduce", reduced, sent, times),
        message(axis, "all_reduce", [1] * len(groups), 4),
        overflow,
        message(axis, "all_gather", flat, footprint.compute_bytes),
    ]


def _refuse_untold(zero: dict[str, Any], footprint: Footprint) -> None:
    stage = zero.get("stage", 0)
    told = (TOLD if stage else {}) | (TOLD_OF_STAGE_3 if stage == 3 else {})
    missing = {key: None for key in TOLD_OF_STAGE_3} if stage == 3 else {}
    for key, value in (missing | zero).items():
        if key in told and value != told[key]:
            raise ValueError(
                f"DeepSpeed's messages are known with {key}={told[key]}, and it is {value}"
            )
    if len(footprint.pieces) > 1:
        raise ValueError("DeepSpeed's messages are known of a task of one model")
    if any(
        weight.elements > zero.get("reduce_bucket_size", 5e8)
        for weight in footprint.pieces[0].weights
    ):
        raise ValueError(
            "DeepSpeed cuts a gradient that is larger than reduce_bucket_size, and where is "
            "not told"
        )


def _groups(piece: ModelPart) -> list[list[Weight]]:
    """The optimizer's groups of `parameter_groups`: matrices, then vectors."""
    trained = [weight for weight in piece.weights if weight.ready is not None]
    halves = [w for w in trained if len(w.used) >= 2], [w for w in trained if len(w.used) < 2]
    return [half for half in halves if half]


def _flat(group: list[Weight], ranks: int) -> int:
    """Elements of a group's flat tensor, filled up."""
    parts = ALIGNED * ranks
    return -(-sum(map(Weight.numel, group)) // parts) * parts


def _cut(weights: list[Weight], limit: int, *, after: bool = False) -> Iterator[list[Weight]]:
    """Buckets of at most `limit` elements; with `after`, of as few as are more."""
    bucket: list[Weight] = []
    for weight in weights:
        held = sum(map(Weight.numel, bucket))
        if bucket and (held > limit if after else held + weight.elements > limit):
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def _gathers(piece: ModelPart, filled: Callable[[list[Weight]], int]) -> list[int]:
    """Elements gathered for each module's passes in a micro-batch: it has no weights but in a
    pass.
    """
    by_id = {id(p): name for name, p in piece.outline.named_parameters()}
    weights = {weight.name: weight for weight in piece.weights}
    found = []
    for path, module in piece.outline.named_modules():
        own = [weights[by_id[id(p)]] for p in module.parameters(recurse=False)]
        for call in (call for call in piece.calls if own and call.path == path):
            found += [filled(own)] * (1 + call.graded)
    return found


def bytes_held(footprint: Footprint, ranks: int, rank: int, stage: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients (before the step) and of fp32 weights with their states, on
    one rank.
    """
    (piece,) = footprint.pieces
    groups, every = _groups(piece), sum(map(Weight.numel, piece.weights))
    part = [
        sum(-(-w.elements // ranks) for w in g) if stage == 3 else _flat(g, ranks) // ranks
        for g in groups
    ]
    weights = sum(-(-w.elements // ranks) for w in piece.weights) if stage == 3 else every
    each, once = footprint.state_bytes
    states = sum(part) * (4 + each) + len(part) * once
    return weights * footprint.compute_bytes, sum(part) * footprint.compute_bytes, states
