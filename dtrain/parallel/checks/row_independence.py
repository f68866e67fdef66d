"""Check that a user's model computes each row of a batch alike, whatever rows are beside it.

And that a forward pass leaves weights as they are, and moves buffers once for a step.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dtrain.data.seeded import generator
from dtrain.model.layout import StepAware
from dtrain.task.batch import Batch, Models

ROWS = 4
LOOSER = 10  # for gradients
LARGE = (1e3, -1e3)  # factors on weights
EVERYTHING = slice(None)


class Run:
    """An update's forward pass: the outputs of a supervised one, the loss of any other."""

    def __init__(self, update: Any, models: Models, batch: Batch) -> None:
        self.update, self.models, self.batch = update, models, batch
        # as they are before any call
        self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.batch[name] for name in getattr(self.update, "inputs", ()))

    @property
    def model(self) -> nn.Module:
        return self.models[self.update.trains]

    def __call__(self, rows: slice) -> Tensor:
        batch = {name: tensor[rows] for name, tensor in self.batch.items()}
        with torch.enable_grad() if self.update.second_order else torch.no_grad():
            if hasattr(self.update, "outputs"):
                outputs: Tensor = self.update.outputs(self.models, batch)
                return outputs
            loss: Tensor = self.update.loss(self.models, batch)
            return loss.detach()[None]

    @property
    def rows(self) -> list[slice]:
        return [slice(row, row + 1) for row in range(len(next(iter(self.batch.values()))))]

    def alone(self) -> Tensor:
        """Run row by row, each with the buffers as they were; join outputs, or sum losses."""
        before, results = buffers(self.model), []
        for row in self.rows:
            results.append(self(row))
            restore_values(self.model, before)
        joined = hasattr(self.update, "outputs")
        return torch.cat(results) if joined else torch.stack(results).sum(0)

    def under(self, *contexts: AbstractContextManager[Any]) -> list[Tensor]:
        """Run all rows in each of these contexts, each time with the buffers as they were."""
        before, results = buffers(self.model), []
        for context in contexts:
            with context:
                results.append(self(EVERYTHING))
            restore_values(self.model, before)
        return results


def try_rows(run: Run, tolerance: float, again: bool) -> None:
    """Compare rows alone and together, and what a forward pass leaves behind.

    Args:
        again: a step runs the rows several times: micro-batches, or recomputation.
    """
    model, name = run.model, type(run.model).__name__
    before = buffers(model)
    together = run(EVERYTHING)
    moved = buffers(model)
    restore_values(model, before)
    far = difference(run.alone(), together)
    if far > tolerance:
        raise ValueError(
            f"the rows of a batch are not computed apart in {name}: alone and together they differ "
            f"by {far:.2g} of the largest output. Statistics of rows, as batch norm's, would be "
            "those of a part: use GroupNorm or LayerNorm, or one process without micro-batches"
        )
    run(EVERYTHING if again else slice(0, 1))
    if again:
        run(EVERYTHING)
    other = buffers(model)
    restore_values(model, before)
    _refuse_changed(run, run.weights)
    for key, value in moved.items():
        if difference(other[key], value) > tolerance:
            why = "twice in a step" if again else "by a part of the rows"
            raise ValueError(
                f"{key} of {name} changes with each forward pass, and would change {why}: use one "
                "process without micro-batches and recomputation, or leave it as it is"
            )


@torch.no_grad()
def try_large_weights(run: Run) -> None:
    """Try much larger weights of either sign, where some bounds of the model begin to act."""
    before = buffers(run.model)
    try:
        for factor in LARGE:
            scaled = {name: weight * factor for name, weight in run.weights.items()}
            set_weights(run.model, scaled)
            with suppress(Exception):  # user's code may fail on them
                run(slice(0, 1))
            _refuse_changed(run, scaled)
    finally:
        set_weights(run.model, run.weights)
        restore_values(run.model, before)


def set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])


def _refuse_changed(run: Run, weights: dict[str, Tensor]) -> None:
    for key, weight in run.model.named_parameters():
        if difference(weight.detach(), weights[key]) > 0:
            raise ValueError(
                f"{key} of {type(run.model).__name__} is changed by its forward pass (max_norm, "
                "clamp_): ranks that hold a part, or a copy, would train another: change it in "
                "the optimizer's step, or use one process"
            )


def try_gradients_of_rows(run: Run, tolerance: float) -> None:
    """Check that the gradients of all rows are the sum of each row's."""
    before, parameters = buffers(run.model), [p for p in run.model.parameters() if p.requires_grad]
    name, results = type(run.model).__name__, []
    for parts in ([EVERYTHING], run.rows):
        sums = [torch.zeros_like(p) for p in parameters]
        for rows in parts:
            with torch.enable_grad():
                output = run.update.outputs(
                    run.models, {key: tensor[rows] for key, tensor in run.batch.items()}
                )
            for total, gradient in zip(sums, gradients(output, parameters, rows), strict=True):
                total += gradient
            restore_values(run.model, before)
        results.append(torch.cat([each.flatten() for each in sums]) if sums else torch.zeros(0))
    if (far := difference(*results)) > tolerance * LOOSER:
        raise ValueError(
            f"the gradients of a batch are not those of its rows in {name}: together and alone "
            f"they differ by {far:.2g} of the largest. A hook or a backward of one's own that "
            "looks at the whole batch would look at a part: let the loss hold it, or use one "
            "process without micro-batches"
        )


def gradients(
    output: Tensor, parameters: list[nn.Parameter], rows: slice = EVERYTHING
) -> list[Tensor]:
    """Return the gradients of a sum of outputs, each with a factor of its own; zeros for none.

    Args:
        rows: the rows of the batch to which these outputs belong.
    """
    if not (output.requires_grad and parameters):
        return [torch.zeros_like(p) for p in parameters]
    shape = (
        max(ROWS, len(output)),
        *output.shape[1:],
    )  # a row's factors do not depend on how many rows there are
    factors = torch.empty(shape, dtype=torch.float64).normal_(
        generator=generator(0, "probe", "factors")
    )
    factors = factors[rows][: len(output)]
    real = torch.view_as_real(output).sum(-1) if output.is_complex() else output
    total = (real * factors.to(real.dtype)).sum()
    with torch.enable_grad():
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def try_as_another_rank(run: Run, tolerance: float) -> None:
    """Check that the model computes the same whatever rank the environment names."""
    ranks = (
        mock.patch.dict(
            os.environ, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
        )
        for rank in "01"
    )
    if difference(*run.under(*ranks)) > tolerance:
        raise ValueError(
            f"{type(run.model).__name__} computes something else where RANK or LOCAL_RANK is "
            "another: ranks would train different models"
        )


def difference(output: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value.

    Infinite where shapes differ, or one alone is not finite in a place.
    """
    if output.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    output, expected = output.to(wide), expected.to(wide)
    if not torch.equal(output.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    far = torch.where(finite, output - expected, 0).abs().max()
    largest = torch.where(finite, expected, 0).abs().max().clamp(min=1e-30)
    return (far / largest).item() if far else 0.0


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the model's buffers, except those that each step sets."""
    aware = {
        id(b) for m in model.modules() if isinstance(m, StepAware) for b in m.buffers(recurse=False)
    }
    return {name: b.clone() for name, b in model.named_buffers() if id(b) not in aware}


@torch.no_grad()
def restore_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Put buffers back to `values`."""
    for name, buffer in model.named_buffers():
        if name in values:
            buffer.copy_(values[name])
