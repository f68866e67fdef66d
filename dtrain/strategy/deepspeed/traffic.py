"""What a step of DeepSpeed's ZeRO sends, and what a rank keeps, in bytes, predicted from shapes.

Buckets of stages 1 to 3 have at most `reduce_bucket_size` elements. Stages 1 and 2 have a flat
tensor for each of the optimizer's groups: first all matrices, then all vectors.

    stage 0   all-reduce of all gradients, after the last micro-batch
    stage 1   all-reduce of buckets, after the last micro-batch; all-gather of the flat tensors
    stage 2   the same, but the buckets of every micro-batch
    stage 3   reduce-scatter of buckets, all-gather of a module's weights for each of its passes

Besides: a byte for each weight and micro-batch (see `refuse_unused`), and a few numbers for the
norm. Source: DeepSpeed 0.19's runtime/zero/stage_1_and_2.py and stage3.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dtrain.parallel.footprint import Footprint, ModelPart, Weight
from dtrain.parallel.messages import Message, message

ALL_REDUCED = 500_000_000  # stage 0 begins a new message when it has more elements than this
ALIGNED = 2  # a flat tensor of stages 1 and 2 is padded to a multiple of this times the ranks
# messages are predicted only if these settings have these values; all other settings are free
NORMAL: dict[str, object] = {
    "reduce_scatter": True, "contiguous_gradients": True, "use_multi_rank_bucket_allreduce": True,
    "round_robin_gradients": False, "offload_optimizer": None, "offload_param": None,
    "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
    "zero_quantized_gradients": False, "mics_shard_size": -1, "overlap_comm": False,
}  # fmt: skip
NORMAL_OF_STAGE_3: dict[str, object] = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}


def messages(footprint: Footprint, axis: str, ranks: int, zero: dict[str, Any]) -> list[Message]:
    """Return what a rank hands to collectives in a step, by the settings of `zero_optimization`.

    Raises:
        ValueError: the messages are not known with these settings.
    """
    _refuse_unknown(zero, footprint)
    stage, bucket, (piece,) = zero.get("stage", 0), _bucket(zero), footprint.pieces
    itemsize, micro_batches = footprint.compute_bytes, footprint.micro_batches
    trained, groups = _trained(piece), _groups(piece)
    ready = sorted(trained, key=lambda w: w.ready or 0)
    used = message(axis, "all_reduce", [len(ready)], 1, micro_batches)  # see `refuse_unused`
    if stage == 0:
        sums = map(_elements, _buckets(trained, ALL_REDUCED, after=True))
        return [used, message(axis, "all_reduce", sums, itemsize)]
    if stage == 3:
        reduced = [ranks * _share(weights, ranks) for weights in _buckets(ready, bucket)]
        return [
            used,
            message(axis, "reduce_scatter", reduced, itemsize, micro_batches),
            message(axis, "all_gather", _gathers(piece, ranks), itemsize, micro_batches),
            message(axis, "all_reduce", [1] * len(groups), 8),
        ]
    in_groups = [weight for group in groups for weight in group]
    order, times = (ready, micro_batches) if stage == 2 else (in_groups, 1)
    return [
        used,
        message(axis, "all_reduce", map(_elements, _buckets(order, bucket)), itemsize, times),
        message(axis, "all_reduce", [1] * len(groups), 4),  # norms
        message(axis, "all_reduce", [1] * (itemsize < 4), 1),  # is a gradient not finite?
        message(axis, "all_gather", [_flat(group, ranks) for group in groups], itemsize),
    ]


def bytes_held(footprint: Footprint, ranks: int, stage: int) -> tuple[int, int, int]:
    """Return what a rank keeps at stages 1 to 3, in bytes.

    Returns:
        weights; gradients before the step; fp32 weights with their states.
    """
    (piece,) = footprint.pieces
    if stage == 3:
        weights = _share(piece.weights, ranks)
        slices = [_share(group, ranks) for group in _groups(piece)]
    else:
        weights = _elements(piece.weights)
        slices = [_flat(group, ranks) // ranks for group in _groups(piece)]
    each, once = footprint.state_bytes
    states = sum(slices) * (4 + each) + len(slices) * once
    return weights * footprint.compute_bytes, sum(slices) * footprint.compute_bytes, states


def _refuse_unknown(zero: dict[str, Any], footprint: Footprint) -> None:
    """Raise ValueError for settings and models with which the messages are not known."""
    stage = zero.get("stage", 0)
    normal = NORMAL if stage else {}
    if stage == 3:  # its own defaults are others
        normal = normal | NORMAL_OF_STAGE_3
        zero = dict.fromkeys(NORMAL_OF_STAGE_3) | zero
    for key, value in zero.items():
        if key in normal and value != normal[key]:
            raise ValueError(
                f"DeepSpeed's messages are known with {key}={normal[key]}, and it is {value}"
            )
    if len(footprint.pieces) > 1:
        raise ValueError("DeepSpeed's messages are known of a task of one model")
    if any(weight.elements > _bucket(zero) for weight in footprint.pieces[0].weights):
        raise ValueError(
            "DeepSpeed cuts a gradient that is larger than reduce_bucket_size, and its parts are "
            "not known"
        )


def _bucket(zero: dict[str, Any]) -> int:
    """Return the most elements of a bucket."""
    return int(zero.get("reduce_bucket_size", 5e8))


def _trained(piece: ModelPart) -> list[Weight]:
    return [weight for weight in piece.weights if weight.ready is not None]


def _groups(piece: ModelPart) -> list[list[Weight]]:
    """Return the optimizer's groups of `parameter_groups`: matrices, then vectors."""
    matrices = [weight for weight in _trained(piece) if len(weight.used) >= 2]
    vectors = [weight for weight in _trained(piece) if len(weight.used) < 2]
    return [group for group in (matrices, vectors) if group]


def _elements(weights: Iterable[Weight]) -> int:
    return sum(weight.elements for weight in weights)


def _share(weights: Iterable[Weight], ranks: int) -> int:
    """Return the elements of a rank's slices, where each weight is padded by itself."""
    return sum(-(-weight.elements // ranks) for weight in weights)


def _flat(group: list[Weight], ranks: int) -> int:
    """Return the elements of a group's flat tensor, with its padding."""
    multiple = ALIGNED * ranks
    return -(-_elements(group) // multiple) * multiple


def _buckets(weights: list[Weight], limit: int, *, after: bool = False) -> Iterator[list[Weight]]:
    """Divide weights into buckets; each ends before, or with `after` just above, the limit."""
    bucket: list[Weight] = []
    for weight in weights:
        size = _elements(bucket) + (0 if after else weight.elements)
        if bucket and size > limit:
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def _gathers(piece: ModelPart, ranks: int) -> list[int]:
    """Return the elements of each all-gather of stage 3 in a micro-batch.

    A module's weights are gathered for each of its passes, and let go after it.
    """
    by_id = {id(p): name for name, p in piece.outline.named_parameters()}
    weights = {weight.name: weight for weight in piece.weights}
    sizes = []
    for path, module in piece.outline.named_modules():
        own = [weights[by_id[id(p)]] for p in module.parameters(recurse=False)]
        for call in (call for call in piece.calls if own and call.path == path):
            sizes += [ranks * _share(own, ranks)] * (1 + call.graded)
    return sizes
