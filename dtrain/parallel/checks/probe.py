"""Try a user's model on a few rows before training: divided, it must compute the same as whole.

    compared                      finds
    rows alone, and together      batch norm and other statistics of rows, in outputs and gradients
    twice, and once               counts, averages and weights that a forward pass moves; what no
                                  checkpoint holds
    as another rank               code that reads on which rank it is
    stage after stage, and whole  code of `forward` between the modules of the Layout
    tokens apart, and together    a mix of tokens outside attention
    layers split, and whole       layers that cannot be cut where the Layout says
    an original, and its layout   code of a `transformers` model between its modules

In training and in evaluation; it needs no other process. Weights are those of the seed, each moved
a little, so that nothing hides behind zeros; dropout scales by a constant. Classes of dtrain itself
are not tried: its tests do that. docs/own-model.md lists what the probe can find.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dtrain.config.user_code import error_in_words
from dtrain.data.seeded import Again, generator, seed_everything
from dtrain.model.initialize import build_with_values, cast, on_meta
from dtrain.model.layout import StepAware, is_ours, offers, refuse_gradient_hooks
from dtrain.parallel.checks.rehearsal import Forward, Rehearsal, shared_copy
from dtrain.parallel.checks.row_independence import (
    LOOSER,
    ROWS,
    Run,
    buffers,
    difference,
    gradients,
    restore_values,
    try_as_another_rank,
    try_gradients_of_rows,
    try_large_weights,
    try_rows,
)
from dtrain.parallel.checks.unsaved_state import try_again
from dtrain.parallel.plan import Plan
from dtrain.parallel.strategy import Strategy
from dtrain.task.base import Task
from dtrain.task.batch import Batch, Models, evaluating

NOISE = 0.02  # standard deviation of what is added to each weight
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative; faults are larger
LARGEST = 1_000_000_000  # parameters: larger models are never whole on a rank
DROPS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
}  # fmt: skip


def probe(task: Task, plan: Plan, *, micro_batches: int, seed: int) -> tuple[str, ...]:
    """Try the task's models that are not dtrain's own, on every rank alike, without messages.

    Returns lines for a person: how long it took, and what could not be tried.

    Raises:
        ValueError: a model does not run, or would compute something else under the plan.
    """
    begun = time.perf_counter()
    with Again(), torch.random.fork_rng(devices=[]), _NoDropout():
        outlines = {name: on_meta(factory) for name, factory in task.models.items()}
        tried = [name for name, model in outlines.items() if model is None or not is_proven(model)]
        if not tried:
            return ()
        for name in tried:
            if offers(outlines[name], "initial") and _size(outlines[name]) > LARGEST:
                return (
                    f"probe: {name} is too large to be tried whole: nothing says that it computes "
                    "the same when divided",
                )
        batch = {name: tensor[:ROWS].clone() for name, tensor in task.batch(0).items()}
        notes = tuple(_try_models(task, plan, batch, tried, micro_batches, seed))
    rows, seconds = len(next(iter(batch.values()))), time.perf_counter() - begun
    return f"probe: the model was tried on {rows} rows in {seconds:.2f} s", *notes


def is_proven(model: nn.Module) -> bool:
    """Return whether dtrain's tests cover it: not a user's model in a class of dtrain."""
    return is_ours(model) and not offers(model, "original")


def _size(model: nn.Module | None) -> int:
    return sum(p.numel() for p in model.parameters()) if model is not None else 0


def _try_models(
    task: Task, plan: Plan, batch: Batch, tried: list[str], micro_batches: int, seed: int
) -> Iterator[str]:
    try:
        models, dtype = _build_running(task, batch, seed)
    except ValueError:
        if plan.device.type == "cpu":
            raise
        yield (
            f"probe: the model does not run on the host, so nothing was tried ({plan.device.type} "
            "is asked for)"
        )
        return
    tolerance = TOLERANCES[dtype]
    for name in tried:
        if offers(models[name], "original"):
            _try_original(task, name, models[name], batch, seed, tolerance)
    for model in models.values():
        _add_noise(model)
    rehearsed = [
        each for each in plan.strategies if type(each).rehearsals is not Strategy.rehearsals
    ]
    # copies, since a forward pass may leave things in attributes
    untouched = {name: _copy(models[name]) for name in tried if rehearsed}
    for update in task.updates:
        run = Run(update, models, batch)
        if update.trains not in tried:
            continue
        yield from try_again(run, tolerance)
        again = micro_batches > 1 or plan.recompute or plan.strategy_on("pp") is not None
        if not (again or plan.strategies):
            continue
        if micro_batches > 1:
            refuse_gradient_hooks(run.model)
        draws = _draws(run, tolerance)
        if draws:
            yield (
                "probe: the model draws numbers of its own in training, so it was tried in "
                "evaluation alone"
            )
        else:
            try_as_another_rank(run, tolerance)
        for training in (True, False)[draws:]:
            with nullcontext() if training else evaluating(models):
                try_rows(run, tolerance, again and training)
                try_large_weights(run)
                if training and hasattr(update, "outputs"):
                    try_gradients_of_rows(run, tolerance)
                for strategy in rehearsed if hasattr(update, "inputs") else ():
                    model = shared_copy(untouched[update.trains])
                    if not training:  # in training as its author left it
                        model.eval()
                    for rehearsal in strategy.rehearsals(model, run.inputs, plan):
                        _compare(rehearsal, run, tolerance)


def _build_running(task: Task, batch: Batch, seed: int) -> tuple[Models, torch.dtype]:
    """Build whole models in the first format in which the updates run."""

    def build(dtype: torch.dtype) -> Models:
        return {n: build_with_values(factory, seed, dtype) for n, factory in task.models.items()}

    for dtype in TOLERANCES:
        models = build(dtype)
        try:
            names = {name: set(dict(model.named_parameters())) for name, model in models.items()}
            for update in task.updates:
                for module in models[update.trains].modules():
                    if isinstance(module, StepAware):
                        module.before_step(torch.ones((), dtype=torch.float64))
                with torch.enable_grad():
                    loss = update.loss(models, batch)
                    if loss.requires_grad:
                        loss.sum().backward()  # type: ignore[no-untyped-call]
            _refuse_late_parameters(models, names)
            return build(dtype), dtype  # anew: buffers may have changed
        except LateParameter:
            raise
        except Exception as error:  # user's code may raise anything
            if dtype == [*TOLERANCES][-1]:
                inputs = ", ".join(getattr(task.updates[0], "inputs", ()))
                in_parts = any(m.original() for m in models.values() if offers(m, "original"))  # type: ignore[operator]
                hint = ": use model.layout=null, with a strategy on dp or fsdp" if in_parts else ""
                raise ValueError(
                    f"the model cannot be trained: called with ({inputs}) of "
                    f"{len(batch[next(iter(batch))])} rows it ends in {error_in_words(error)}{hint}"
                ) from error
    raise AssertionError


class LateParameter(ValueError):
    """The first forward pass makes a parameter."""


def _refuse_late_parameters(models: Models, before: dict[str, set[str]]) -> None:
    for name, model in models.items():
        if late := sorted(set(dict(model.named_parameters())) - before[name]):
            raise LateParameter(
                f"{late[0]} of {type(model).__name__} is made by its first forward pass: no "
                "optimizer would train it, and ranks would draw others: make it in the constructor"
            )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return shared_copy(model)
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied, to be tried in parts "
            f"({error_in_words(error)}): a tensor among its attributes is computed, as by the old "
            "torch.nn.utils.weight_norm (that of parametrizations is not); or use a strategy on dp"
        ) from error


def _try_original(
    task: Task, name: str, model: Any, batch: Batch, seed: int, tolerance: float
) -> None:
    """Compare a model that was made of another one with the original."""
    torch.manual_seed(seed)
    (update,) = (u for u in task.updates if u.trains == name)
    inputs = [batch[each] for each in update.inputs]  # type: ignore[attr-defined]
    original, host = model.original(), torch.device("cpu")
    if original is None:
        return
    cast(original, next(model.parameters()).dtype, host, host)
    with torch.no_grad(), evaluating({"in parts": model, "original": original}):
        expected = original(*inputs)
        try:
            output = model(*inputs)
        except Exception as error:
            raise ValueError(
                f"model.layout: {model.kind} does not run in parts ({error_in_words(error)}): use "
                "model.layout=null, with a strategy on dp or fsdp"
            ) from error
    if (far := difference(output, expected)) > tolerance:
        raise ValueError(
            f"model.layout: in parts {model.kind} gives other logits than the original, by "
            f"{far:.2g} of the largest: it computes something between its modules (a window, a "
            "multiplier); use model.layout=null, with a strategy on dp or fsdp"
        )


def _draws(run: Run, tolerance: float) -> bool:
    """Return whether its outputs depend on random numbers other than dropout's."""
    return difference(*run.under(*map(_seeded, (0, 1)))) > tolerance


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    seed_everything(seed)
    yield


def _compare(rehearsal: Rehearsal, run: Run, tolerance: float) -> None:
    name = type(run.model).__name__
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    before = buffers(run.model)

    def forward_and_backward(forward: Forward) -> tuple[Any, Tensor | None]:
        with torch.enable_grad():
            output = forward(*run.inputs)
        graded = parameters and isinstance(output, Tensor) and output.requires_grad
        flat = torch.cat([g.flatten() for g in gradients(output, parameters)]) if graded else None
        restore_values(run.model, before)  # after the backward pass, which may read them
        return output.detach() if isinstance(output, Tensor) else output, flat

    try:
        # divided first: it must not find what the whole leaves in attributes
        divided, divided_gradients = forward_and_backward(rehearsal.divided)
    except Exception as error:
        raise ValueError(
            f"{name} does not run {rehearsal.what} ({error_in_words(error)}): {rehearsal.hint}"
        ) from error
    whole, whole_gradients = forward_and_backward(rehearsal.whole)
    if not isinstance(divided, Tensor) or divided.shape != whole.shape:
        shape = tuple(divided.shape) if isinstance(divided, Tensor) else type(divided).__name__
        raise ValueError(
            f"{name} {rehearsal.what} gives {shape}, whole {tuple(whole.shape)}: {rehearsal.hint}"
        )
    if (far := difference(divided, whole)) > tolerance:
        raise ValueError(
            f"{name} {rehearsal.what} computes something else than whole: outputs differ by "
            f"{far:.2g} of the largest. {rehearsal.hint}"
        )
    if divided_gradients is None or whole_gradients is None:
        return
    if (far := difference(divided_gradients, whole_gradients)) > tolerance * LOOSER:
        raise ValueError(
            f"{name} {rehearsal.what} has other gradients than whole, by {far:.2g} of the largest: "
            "what its forward does between its modules to them alone (detach) is lost. "
            f"{rehearsal.hint}"
        )


@torch.no_grad()
def _add_noise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            noise = torch.empty(parameter.shape).normal_(
                0, NOISE, generator=generator(0, "probe", name)
            )
            parameter.add_(noise.to(parameter.dtype))


class _NoDropout(TorchFunctionMode):
    """Make dropout scale by a constant: alike each time, and yet seen where it is done twice."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in DROPS:
            x, p, training = (
                *args,
                *(kwargs[name] for name in ("input", "p", "training", "train") if name in kwargs),
            )[:3]
            return x * (1 - p / 2) if training else x
        if function is F.scaled_dot_product_attention:
            args, kwargs = (
                args[:4] + ((0.0,) if len(args) > 4 else ()) + args[5:],
                kwargs | ({"dropout_p": 0.0} if len(args) < 5 else {}),
            )
        return function(*args, **kwargs)
