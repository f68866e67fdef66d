"""Count what one rank hands to collectives in a step, in bytes.

Payload is the size of the one whole tensor that a call is about, as this rank hands it over or
receives it:

    all_reduce, broadcast   the tensor
    all_gather              the gathered tensor, padding included: n times what each rank gives
    reduce_scatter          the whole input, padding included: n times what each rank gets
    all_to_all              the input, the rank's own part included
    send                    the tensor; receiving is the other rank's send, and does not count
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from dtrain.parallel.footprint import Weight


@dataclass(frozen=True)
class Message:
    """One rank's calls of one collective over one axis in one optimizer step.

    Args:
        bytes: the payload of all these calls.
        largest: the payload of the largest one: a buffer of this size is needed at once. Where
            buckets are filled it is predicted to a gradient.
    """

    axis: str
    operation: str
    calls: int
    bytes: int
    largest: int = 0

    def wire_bytes(self, ranks: int, backend: str = "ring") -> float:
        """Return the bytes that leave the rank in a ring of ranks; of a broadcast, their mean.

        gloo uses rings as well, except that its reduce-scatter sums whole tensors, as an
        all-reduce does (torch 2.13).
        Source: Patarasu & Yuan 2009, "Bandwidth optimal all-reduce algorithms".
        """
        share = (ranks - 1) / ranks
        passes = {"all_reduce": 2 * share, "send": float(ranks > 1)}
        if backend == "gloo":
            passes["reduce_scatter"] = 2 * share
        return self.bytes * passes.get(self.operation, share)


def message(
    axis: str, operation: str, elements: Iterable[int], itemsize: int, times: int = 1
) -> Message:
    """Return one call for each number of elements, `times` over."""
    sizes = list(elements)
    largest = max(sizes, default=0) * itemsize if times else 0
    return Message(axis, operation, times * len(sizes), times * sum(sizes) * itemsize, largest)


def all_reduce_each(axis: str, weights: Iterable[Weight], itemsize: int) -> Message:
    """Return an all-reduce for each gradient that this rank has some of: see `all_reduce_sum`."""
    return message(
        axis, "all_reduce", [size for weight in weights if (size := prod(weight.held))], itemsize
    )
