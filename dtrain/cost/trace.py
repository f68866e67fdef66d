"""One micro-batch of a step on the meta device: which modules are called, with what shapes, and
what backward does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from dtrain.config.user_code import error_in_words
from dtrain.cost.memory import MemoryTracker
from dtrain.model.initialize import cast, on_meta
from dtrain.model.layout import blocks_of, layout_of
from dtrain.parallel.footprint import Activation, Footprint, ModelPart, ModuleCall, Weight
from dtrain.task.batch import Batch, Models

if TYPE_CHECKING:
    from dtrain.parallel.plan import Plan
    from dtrain.task.base import Task

META = torch.device("meta")


def trace(
    task: Task,
    plan: Plan,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    *,
    global_batch_size: int,
    micro_batch_size: int | None = None,
) -> Footprint:
    """All of a step's models and calls, for the rows and tokens of one rank; no strategy has cut a
    model yet.

    Needs no process group, and memory for no weight. Without an optimizer its states do not count.

    Raises:
        ValueError: a model cannot be built on the meta device, or does not run there.
    """
    micro_batches = plan.micro_batches(global_batch_size, micro_batch_size)
    dtype = plan.precision.weights_dtype
    activations = plan.precision.compute_dtype if plan.casts else dtype
    models = {name: _outline(name, on_meta(factory), plan) for name, factory in task.models.items()}
    batch = _shapes(
        task.batch(0), plan.row_parts * micro_batches, plan.batch_parts // plan.row_parts
    )
    recorder = _Recorder(models)
    try:
        with recorder.ledger, _flash_attention():
            for index, update in enumerate(task.updates):
                recorder.run(index, partial(update.loss, models, batch))
    except Exception as error:  # of a user's model: it may fail in any way
        raise ValueError(
            f"a model does not run on meta tensors: {error_in_words(error)}"
        ) from error
    finally:
        recorder.close()
    trained = Counter(update.trains for update in task.updates)
    narrow = activations.itemsize / dtype.itemsize
    pieces = (recorder.piece(name, trained[name], narrow) for name in models)
    return Footprint(
        tuple(pieces),
        micro_batches,
        weight_bytes=dtype.itemsize,
        compute_bytes=plan.precision.compute_dtype.itemsize,
        reduce_bytes=plan.precision.reduce_dtype.itemsize,
        activation_bytes=activations.itemsize,
        state_bytes=_states(optimizer, dtype) if optimizer else (0, 0),
    )


def _outline(name: str, model: nn.Module | None, plan: Plan) -> nn.Module:
    if model is None:
        raise ValueError(
            f"the cost of {name!r} cannot be told from shapes: it computes with values when it "
            f"is built"
        )
    cast(model, plan.precision.weights_dtype, META, META)
    for block in blocks_of(model) if plan.recompute else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def _shapes(batch: Batch, row_parts: int, token_parts: int) -> Batch:
    """A micro-batch of one rank, without its values."""
    parts = {name: tensor[: len(tensor) // row_parts] for name, tensor in batch.items()}
    if token_parts > 1:
        parts = {
            name: t[:, : t.shape[1] // token_parts] if t.ndim > 1 else t
            for name, t in parts.items()
        }
    return {name: tensor.to("meta") for name, tensor in parts.items()}


@contextmanager
def _flash_attention() -> Iterator[None]:
    """On the meta device torch would take the attention that keeps all scores; devices have one
    that does not.
    """
    original = F.scaled_dot_product_attention

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[
            0
        ]

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]  # a function mode is off during backward, and recomputation needs it
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Recorder:
    """Hooks on the models' modules and parameters while updates run."""

    def __init__(self, models: Models) -> None:
        self.models, self.update, self.again = models, 0, False
        self.within: list[tuple[str, str | None]] = []  # which modules compute: the last one
        self.ledger = MemoryTracker(lambda: self.within[-1])
        for model in models.values():
            self.ledger.hold("parameters", model.parameters())
        self.calls: dict[str, list[ModuleCall]] = {name: [] for name in models}
        self.ready: dict[str, list[str]] = {name: [] for name in models}
        self.hooks: list[Any] = []
        for name, model in models.items():
            for path, module in model.named_modules():
                begin, end = partial(self._begin, name, path), partial(self._end, name, path)
                self.hooks += [
                    module.register_forward_pre_hook(begin, with_kwargs=True),
                    module.register_forward_hook(end, always_call=True),
                ]
            for key, parameter in model.named_parameters():
                if parameter.requires_grad:
                    self.hooks += [
                        parameter.register_post_accumulate_grad_hook(
                            partial(self._complete, name, key)
                        )
                    ]

    def run(self, index: int, loss: Callable[[], Tensor]) -> None:
        self.update, self.again, self.within = index, False, [("", None)]
        total = loss()
        # checkpoint calls blocks' forward by itself
        self.again, self.within = True, [(next(iter(self.models)), "")]
        total.backward()

    def piece(self, name: str, trained: int, narrow: float) -> ModelPart:
        """What was seen of a model; `narrow` is a byte's share that is left of it where
        activations are narrow.
        """
        model = self.models[name]
        ready = self.ready[name]
        blocks = layout_of(self.models[name]).blocks
        units = (
            {
                f"{blocks}.{key}": block
                for key, block in model.get_submodule(blocks).named_children()
            }
            if blocks
            else {}
        )
        unused = [
            key
            for key, p in model.named_parameters()
            if p.requires_grad and key not in ready and trained
        ]
        places = {key: place for place, key in enumerate([*ready, *unused])}
        owner = {id(p): unit for unit, block in units.items() for p in block.parameters()}
        weights = (
            Weight(
                key,
                owner.get(id(p), ""),
                p.numel(),
                tuple(p.shape),
                tuple(p.shape),
                places.get(key),
                reached=key in ready,
            )
            for key, p in model.named_parameters()
        )
        return ModelPart(
            name,
            model,
            tuple(weights),
            tuple(self.calls[name]),
            tuple(self._kept(name, narrow)),
            trained,
        )

    def _kept(self, name: str, narrow: float) -> Iterator[Activation]:
        """What is kept of a model's activations; those of the loss are the first model's."""
        for entry in self.ledger.entries:
            if entry.what != "activations":
                continue
            model, path = entry.where
            if (model or next(iter(self.models))) == name:
                yield Activation(
                    path,
                    entry.shape,
                    round(entry.bytes * narrow),
                    entry.born,
                    entry.died or 0,
                    frozenset(entry.feeds),
                )

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(
        self, name: str, path: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        inputs = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
        for x in inputs:
            self.ledger.entry(x).feeds.add(path)
        self.within.append((name, path))
        returns = any(x.requires_grad for x in inputs) and not self.again
        self.calls[name].append(
            ModuleCall(
                path, self.update, tuple(tuple(x.shape) for x in inputs), None, False, returns
            )
        )

    def _end(
        self, name: str, path: str, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        calls = self.calls[name]
        self.within.pop()
        index = next(
            i
            for i in reversed(range(len(calls)))
            if calls[i].path == path and calls[i].output is None
        )
        if isinstance(output, Tensor):
            graded = output.requires_grad and not self.again
            calls[index] = replace(calls[index], output=tuple(output.shape), graded=graded)

    def _complete(self, name: str, key: str, parameter: Tensor) -> None:
        if key not in self.ready[name]:
            self.ready[name].append(key)


def _states(optimizer: Callable[[nn.Module], Optimizer], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the optimizer keeps for an element and for a parameter: seen after a step of a
    parameter of two.
    """
    model = nn.Linear(2, 1, bias=False, dtype=dtype)
    model.weight.grad = torch.zeros_like(model.weight)
    made = optimizer(model)
    made.step()
    kept = [value for value in made.state[model.weight].values() if isinstance(value, Tensor)]
    moments = [value for value in kept if value.shape == model.weight.shape]
    return sum(m.element_size() for m in moments), sum(v.nbytes for v in kept) - sum(
        m.nbytes for m in moments
    )
