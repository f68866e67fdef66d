"""Distributed data parallel: every rank holds the whole model and reads its own rows of the batch.

    rank 0: W, rows 0-3 -> g0 \\
    rank 1: W, rows 4-7 -> g1 /  all-reduce: g = (g0 + g1) / 2 -> the same step on every rank

Gradients travel in buckets while backward still computes earlier layers.
Cost a step, per rank: one all-reduce of all gradients, 2 (n-1)/n times their bytes on a ring.
Source: Li et al. 2020, "PyTorch Distributed" (2006.15704).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.parallel.footprint import Footprint, ModelPart
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message, message
from dtrain.parallel.strategy import ParallelContext, Strategy


class DDP(Strategy):
    """PyTorch's DistributedDataParallel over `dp`. It stands alone; `replicate` composes.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
        bucket_mb: gradients are sent together in buckets of this size, in MiB.
    """

    name = "ddp"
    axis = "dp"
    stands_alone = ": beside {others} it would train wrong weights; use replicate in its place"

    def __init__(self, degree: int = REST, bucket_mb: float = 25.0) -> None:
        super().__init__(degree)
        if bucket_mb <= 0:
            raise ValueError(f"strategy.dp.bucket_mb={bucket_mb} must be more than 0")
        self.bucket_mb = self.first_bucket_mb = bucket_mb
        # ids of the parameters that backward has reached: in this update, in its last micro-batch
        self._used: set[int] = set()
        self._passed: set[int] = set()

    def check(self, plan: ParallelContext) -> None:
        if plan.precision.reduce_dtype != plan.precision.weights_dtype:
            raise ValueError(
                f"strategy ddp sums gradients in the weights' format, not in "
                f"precision.reduce={plan.precision.reduce}: use replicate or fsdp"
            )

    def parallelize(self, model: nn.Module, plan: ParallelContext) -> nn.Module:
        self.watch(model)
        return DistributedDataParallel(
            model,
            process_group=plan.mesh[self.axis].get_group(),
            bucket_cap_mb=self.bucket_mb,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,  # or gradients would be there twice
        )

    def watch(self, model: nn.Module) -> None:
        """Note which parameters backward passes reach, from now on."""

        def reached(parameter: Tensor) -> None:
            self._used.add(id(parameter))
            self._passed.add(id(parameter))

        for parameter in _trained(model):
            parameter.register_post_accumulate_grad_hook(reached)  # type: ignore[no-untyped-call]

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    def verify(self, model: nn.Module, plan: ParallelContext) -> None:
        assert isinstance(model, DistributedDataParallel), (
            f"ddp was asked for, the model is a {type(model).__name__}"
        )

    def begin_update(self, model: nn.Module) -> None:
        self._used.clear()

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        assert isinstance(model, DistributedDataParallel)
        model.require_backward_grad_sync = enabled
        self._passed.clear()  # the loop calls this for every model, before each micro-batch

    def finish_backward(self, model: nn.Module) -> None:
        """Fill in zeros for gradients that this rank's rows do not have.

        DDP sends a bucket when it is full, and would wait for them.
        """
        trained = _trained(model)
        missing = [parameter for parameter in trained if id(parameter) not in self._passed]
        if isinstance(model, DistributedDataParallel) and 0 < len(missing) < len(trained):
            used = self._used.copy()
            torch.autograd.backward(missing, [torch.zeros_like(p) for p in missing])
            self._used = used

    def unused(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.grad is not None and id(p) not in self._used]

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        itemsize = footprint.weight_bytes
        sizes = [size for piece in footprint.pieces for size in self._buckets(piece, itemsize)]
        return [message(self.axis, "all_reduce", sizes, itemsize)]

    def _buckets(self, piece: ModelPart, itemsize: int) -> list[int]:
        """Return the elements of each bucket, in every update that reaches the piece.

        Buckets are filled in the order in which backward completes gradients.
        """
        sizes = [0]
        trained = [(w.ready, w.elements) for w in piece.weights if w.ready is not None]
        for _, elements in sorted(trained, key=lambda weight: weight[0]):
            sizes[-1] += elements
            limit = self.first_bucket_mb if len(sizes) == 1 else self.bucket_mb
            if sizes[-1] * itemsize >= int(limit * 2**20):
                sizes.append(0)
        return [size for size in sizes if size] * len(piece.reached)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
