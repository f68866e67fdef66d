"""Record one micro-batch of a step on the meta device: module calls, shapes, the backward pass."""

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
from dtrain.cost.memory_tracker import MemoryTracker
from dtrain.model.initialize import cast, on_meta
from dtrain.model.layout import blocks_of, layout_of
from dtrain.parallel.footprint import Activation, Footprint, ModelPart, ModuleCall, Weight
from dtrain.task.batch import Batch, Models

if TYPE_CHECKING:
    from dtrain.parallel.plan import Plan
    from dtrain.task.base import Task

META = torch.device("meta")


def record_footprint(
    task: Task,
    plan: Plan,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    *,
    global_batch_size: int,
    micro_batch_size: int | None = None,
) -> Footprint:
    """Return a step's models and calls, for the rows and tokens of one rank and whole models.

    It needs no process group, and allocates no weight. Without an optimizer no states count.

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
        with recorder.tracker, _flash_attention():
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
    return Footprint(
        tuple(recorder.model_part(name, trained[name], narrow) for name in models),
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
    """Return a micro-batch of one rank, without its values."""
    parts = {name: tensor[: len(tensor) // row_parts] for name, tensor in batch.items()}
    if token_parts > 1:
        parts = {
            name: t[:, : t.shape[1] // token_parts] if t.ndim > 1 else t
            for name, t in parts.items()
        }
    return {name: tensor.to("meta") for name, tensor in parts.items()}


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Use flash attention on the meta device too, where torch would keep all scores."""
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
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = flash(q, k, v, 0.0, is_causal)[0]
        return output

    # not by a function mode: that is off during backward, where recomputation needs it
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Recorder:
    """Hooks on the models' modules and parameters while updates run."""

    def __init__(self, models: Models) -> None:
        self.models, self.update, self.in_backward = models, 0, False
        self.running: list[tuple[str, str | None]] = []  # (model, module); the last one computes
        self.tracker = MemoryTracker(lambda: self.running[-1])
        for model in models.values():
            self.tracker.label("parameters", model.parameters())
        self.calls: dict[str, list[ModuleCall]] = {name: [] for name in models}
        self.reached: dict[str, list[str]] = {name: [] for name in models}  # in backward's order
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
                    complete = partial(self._complete, name, key)
                    self.hooks.append(parameter.register_post_accumulate_grad_hook(complete))  # type: ignore[no-untyped-call]

    def run(self, index: int, loss: Callable[[], Tensor]) -> None:
        self.update, self.in_backward, self.running = index, False, [("", None)]
        total = loss()
        # checkpoint calls blocks' forward by itself
        self.in_backward, self.running = True, [(next(iter(self.models)), "")]
        total.backward()  # type: ignore[no-untyped-call]

    def model_part(self, name: str, trained: int, narrow: float) -> ModelPart:
        """Return what was seen of a model.

        Args:
            trained: how many updates train it.
            narrow: an activation's bytes where activations are narrow, over those recorded.
        """
        model, reached = self.models[name], self.reached[name]
        blocks = layout_of(model).blocks
        children = model.get_submodule(blocks).named_children() if blocks else ()
        owner = {id(p): f"{blocks}.{key}" for key, block in children for p in block.parameters()}
        named = dict(model.named_parameters())
        unused = [k for k, p in named.items() if p.requires_grad and k not in reached and trained]
        order = {key: index for index, key in enumerate([*reached, *unused])}
        weights = tuple(
            Weight(
                key,
                owner.get(id(p), ""),
                p.numel(),
                tuple(p.shape),
                tuple(p.shape),
                order.get(key),
                reached=key in reached,
            )
            for key, p in named.items()
        )
        calls, activations = tuple(self.calls[name]), tuple(self._activations(name, narrow))
        return ModelPart(name, model, weights, calls, activations, trained)

    def _activations(self, name: str, narrow: float) -> Iterator[Activation]:
        """Yield a model's activations; those of the loss are the first model's."""
        for storage in self.tracker.storages:
            if storage.kind != "activations":
                continue
            model, path = storage.where
            if (model or next(iter(self.models))) == name:
                yield Activation(
                    path,
                    storage.shape,
                    round(storage.bytes * narrow),
                    storage.born,
                    storage.died or 0,
                    frozenset(storage.feeds),
                )

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(
        self, name: str, path: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        inputs = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
        for x in inputs:
            self.tracker.storage_of(x).feeds.add(path)
        self.running.append((name, path))
        returns = any(x.requires_grad for x in inputs) and not self.in_backward
        shapes = tuple(tuple(x.shape) for x in inputs)
        self.calls[name].append(ModuleCall(path, self.update, shapes, None, False, returns))

    def _end(
        self, name: str, path: str, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        calls = self.calls[name]
        self.running.pop()
        indexes = reversed(range(len(calls)))
        index = next(i for i in indexes if calls[i].path == path and calls[i].output is None)
        if isinstance(output, Tensor):
            graded = output.requires_grad and not self.in_backward
            calls[index] = replace(calls[index], output=tuple(output.shape), graded=graded)

    def _complete(self, name: str, key: str, parameter: Tensor) -> None:
        if key not in self.reached[name]:
            self.reached[name].append(key)


def _states(optimizer: Callable[[nn.Module], Optimizer], dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of optimizer states for each element and for each parameter.

    They are seen after a step of one parameter with two elements.
    """
    model = nn.Linear(2, 1, bias=False, dtype=dtype)
    model.weight.grad = torch.zeros_like(model.weight)
    stepped = optimizer(model)
    stepped.step()
    states = [s for s in stepped.state[model.weight].values() if isinstance(s, Tensor)]
    like_weight = [state.shape == model.weight.shape for state in states]
    return (
        sum(s.element_size() for s, like in zip(states, like_weight, strict=True) if like),
        sum(s.nbytes for s, like in zip(states, like_weight, strict=True) if not like),
    )
