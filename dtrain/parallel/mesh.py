"""The axes of the mesh: their two orders, the ranks along each, and a rank's rows of a batch."""

from __future__ import annotations

from math import prod

from dtrain.model.layout import divisors, multiples

MESH_ORDER = ("pp", "dp", "fsdp", "cp", "ep", "tp")
BEFORE_VALUES = ("pp", "tp", "ep", "fsdp")
AFTER_VALUES = ("cp", "dp")
APPLICATION_ORDER = BEFORE_VALUES + AFTER_VALUES
REST = -1  # a degree: all the ranks that the other axes leave


def fill_degrees(degrees: dict[str, int], world_size: int) -> dict[str, int]:
    """Replace each -1 by its share of the ranks that the other axes leave.

    Inner axes get the larger shares.

    Raises:
        ValueError: the degrees cannot fill the world exactly.
    """
    for axis, degree in degrees.items():
        if degree != REST and degree < 1:
            raise ValueError(
                f"strategy.{axis}.degree={degree} must be at least 1, or -1 for the rest of the "
                "world"
            )
    asked = (
        " x ".join(f"{axis}={'rest' if d == REST else d}" for axis, d in degrees.items())
        or "single"
    )
    fixed = prod(d for d in degrees.values() if d != REST)
    rest, free = world_size // fixed, [axis for axis, d in degrees.items() if d == REST]
    if fixed * rest != world_size or (rest > 1 and not free):
        hint = " (choose a strategy: ddp, fsdp, ...)" if not degrees else ""
        raise ValueError(
            f"strategy {asked} uses {'a multiple of ' if free else ''}{fixed} "
            f"{'rank' if fixed == 1 else 'ranks'}, the job has {world_size}{hint}"
        )
    filled = dict(degrees)
    for left, axis in zip(range(len(free), 0, -1), reversed(free), strict=True):
        filled[axis] = next(d for d in range(1, rest + 1) if rest % d == 0 and d**left >= rest)
        rest //= filled[axis]
    if len(free) > 1 and any(filled[axis] == 1 for axis in free):
        least = fixed * 2 ** len(free)
        raise ValueError(
            f"strategy {asked} needs at least 2 ranks on each of {' and '.join(free)}: {least} or "
            f"more in all, the job has {world_size}; or set strategy.{free[0]}.degree"
        )
    return filled


def rows_of_a_rank(global_batch_size: int, ranks: int, micro_batch_size: int | None) -> int:
    """Return how many rows each of `ranks` data-parallel ranks reads.

    Raises:
        ValueError: the rows do not divide evenly into ranks and micro-batches.
    """
    unit = ranks * (micro_batch_size or 1)
    if global_batch_size % unit:
        micro = f" x micro_batch_size={micro_batch_size}" if micro_batch_size else ""
        rows, rest = divmod(global_batch_size, ranks)
        other = (
            f", or micro_batch_size={divisors(rows).replace(', ', ' or ')}"
            if micro and not rest
            else ""
        )
        raise ValueError(
            f"global_batch_size={global_batch_size} is not divisible by {ranks} data-parallel "
            f"ranks{micro}: use global_batch_size={multiples(global_batch_size, unit)}{other}"
        )
    return global_batch_size // ranks
