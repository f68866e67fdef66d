"""Does a user's model compute the same when it is divided? Tried on a few rows, before training.

    rows alone, and together      batch norm and other statistics of rows, in outputs and gradients
    twice, and once               counts, averages and weights that a forward pass moves; what no
                                  checkpoint holds
    as another rank               what reads which rank it is on
    stage after stage, and whole  what stands in `forward` between the modules of the Layout
    tokens apart, and together    what mixes tokens outside attention
    layers split, and whole       layers that are not cut where the Layout says
    an original, and its layout   what a model of `transformers` computes between its modules

In training and in evaluation. It needs no other process. Weights are those of the seed, each moved
a little, so that nothing that begins at zero hides; dropout makes numbers smaller, always alike.
Classes of dtrain itself are not tried: its tests do. docs/own-model.md says what it can find.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dtrain.config.user_code import error_in_words
from dtrain.data.seeded import Again, generator, seed_everything
from dtrain.model.initialize import build_with_values, cast, on_meta
from dtrain.model.layout import StepAware, is_ours, offers, refuse_gradient_hooks
from dtrain.parallel.checks.rehearsal import Forward, Rehearsal, shared_copy
from dtrain.parallel.checks.trial import (
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
from dtrain.parallel.checks.unsaved import try_again
from dtrain.parallel.strategy import Strategy
from dtrain.task.batch import Batch, Models, evaluating

if TYPE_CHECKING:
    from dtrain.parallel.plan import Plan
    from dtrain.task.base import Task

MOVED = 0.02  # standard deviation of what is added to each weight
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative; what is wrong is wrong by more
LARGEST = 1_000_000_000  # parameters of a model that is otherwise never whole on a rank
DROPS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
}  # fmt: skip


def probe(task: Task, plan: Plan, *, micro_batches: int, seed: int) -> tuple[str, ...]:
    """Try the task's models that are not ours; the same on every rank, without any message.

    Returns lines for a person: how long it took, and what could not be tried.

    Raises:
        ValueError: a model does not run, or would compute something else under the plan.
    """
    with _quiet():
        return _tried(task, plan, micro_batches, seed)


def _tried(task: Task, plan: Plan, micro_batches: int, seed: int) -> tuple[str, ...]:
    begun = time.perf_counter()
    outlines = {name: on_meta(factory) for name, factory in task.models.items()}
    tried = [name for name, model in outlines.items() if model is None or not is_proven(model)]
    if not tried:
        return ()
    too_large = [
        n for n in tried if offers(outlines[n], "initial") and _size(outlines[n]) > LARGEST
    ]
    if too_large:
        return (
            f"probe: {too_large[0]} is too large to be tried whole: nothing says that it "
            f"computes the "
            f"same when divided",
        )
    batch = {name: tensor[:ROWS].clone() for name, tensor in task.batch(0).items()}
    notes = tuple(_try(task, plan, batch, tried, micro_batches, seed))
    return (
        (
            f"probe: the model was tried on {len(next(iter(batch.values())))} rows in "
            f"{time.perf_counter() - begun:.2f} s"
        ),
        *notes,
    )


def is_proven(model: nn.Module) -> bool:
    """Has dtrain's own suite tried all of it?

    A model of somebody else's within a class of ours is not ours.
    """
    return is_ours(model) and not offers(model, "original")


def _size(model: nn.Module | None) -> int:
    return sum(p.numel() for p in model.parameters()) if model is not None else 0


def _try(
    task: Task, plan: Plan, batch: Batch, tried: list[str], micro_batches: int, seed: int
) -> Iterator[str]:
    try:
        models, dtype = _running(task, batch, seed, (torch.float64, torch.float32))
    except ValueError:
        if plan.device.type == "cpu":
            raise
        yield (
            f"probe: the model does not run on the host, so nothing was tried ({plan.device.type} "
            f"is asked for)"
        )
        return
    tolerance = TOLERANCES[dtype]
    for name in tried:
        if offers(models[name], "original"):
            _try_original(task, name, models[name], batch, seed, tolerance)
    for model in models.values():
        _move(model)
    rehearsed = [
        each for each in plan.strategies if type(each).rehearsals is not Strategy.rehearsals
    ]
    # A forward pass may leave things in attributes.
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
        drawn = _draws(run, tolerance)
        if drawn:
            yield (
                "probe: the model draws numbers of its own in training, so it was tried in "
                "evaluation alone"
            )
        else:
            try_as_another_rank(run, tolerance)
        for training in (True, False)[drawn:]:
            with nullcontext() if training else evaluating(models):
                try_rows(run, tolerance, again and training)
                try_large_weights(run)
                if training and hasattr(update, "outputs"):
                    try_gradients_of_rows(run, tolerance)
                for strategy in rehearsed if hasattr(update, "inputs") else ():
                    made = shared_copy(untouched[update.trains])
                    if not training:  # else as its author left it
                        made.eval()
                    for rehearsal in strategy.rehearsals(made, run.inputs, plan):
                        _compare(rehearsal, run, tolerance)


def _running(
    task: Task, batch: Batch, seed: int, dtypes: tuple[torch.dtype, ...]
) -> tuple[Models, torch.dtype]:
    """The models, whole, in the first format in which the updates run."""
    for dtype in dtypes:
        models = {
            name: build_with_values(factory, seed, dtype) for name, factory in task.models.items()
        }
        try:
            there = {name: set(dict(model.named_parameters())) for name, model in models.items()}
            for update in task.updates:
                for module in models[update.trains].modules():
                    if isinstance(module, StepAware):
                        module.before_step(torch.ones((), dtype=torch.float64))
                with torch.enable_grad():
                    loss = update.loss(models, batch)
                    if loss.requires_grad:
                        loss.sum().backward()
            _refuse_made(models, there)
            # Made again: buffers may have moved.
            return {
                n: build_with_values(factory, seed, dtype) for n, factory in task.models.items()
            }, dtype
        except Late:
            raise
        except Exception as error:  # of a user's model: it may fail in any way
            if dtype == dtypes[-1]:
                names = ", ".join(getattr(task.updates[0], "inputs", ()))
                parts = any(m.original() for m in models.values() if offers(m, "original"))  # type: ignore[operator]
                hint = ": use model.layout=null, with a strategy on dp or fsdp" if parts else ""
                raise ValueError(
                    f"the model cannot be trained: called with ({names}) of "
                    f"{len(batch[next(iter(batch))])} rows it ends in {error_in_words(error)}{hint}"
                ) from error
    raise AssertionError


class Late(ValueError):
    """A parameter that the first forward pass makes."""


def _refuse_made(models: Models, there: dict[str, set[str]]) -> None:
    for name, model in models.items():
        if made := sorted(set(dict(model.named_parameters())) - there[name]):
            raise Late(
                f"{made[0]} of {type(model).__name__} is made by its first forward pass: no "
                f"optimizer would "
                f"train it, and ranks would draw others: make it in the constructor"
            )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return shared_copy(model)
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied, to be tried in parts "
            f"({error_in_words(error)}): a tensor among its attributes is computed, as by the "
            f"old torch.nn.utils.weight_norm (that of parametrizations is not); or use a "
            f"strategy on dp"
        ) from error


def _try_original(
    task: Task, name: str, model: Any, batch: Batch, seed: int, tolerance: float
) -> None:
    """Compare a model that was made of another one with that."""
    torch.manual_seed(seed)
    (update,) = (u for u in task.updates if u.trains == name)
    inputs = [batch[each] for each in update.inputs]  # type: ignore[attr-defined]
    theirs, host = model.original(), torch.device("cpu")
    if theirs is None:
        return
    cast(theirs, next(model.parameters()).dtype, host, host)
    with torch.no_grad(), evaluating({"ours": model, "theirs": theirs}):
        expected = theirs(*inputs)
        try:
            found = model(*inputs)
        except Exception as error:
            raise ValueError(
                f"model.layout: {model.kind} does not run in parts ({error_in_words(error)}): use "
                f"model.layout=null, "
                f"with a strategy on dp or fsdp"
            ) from error
    if (far := difference(found, expected)) > tolerance:
        raise ValueError(
            f"model.layout: in parts {model.kind} gives other logits than the original, by "
            f"{far:.2g} of the "
            f"largest: it computes something between its modules (a window, a multiplier); use "
            f"model.layout=null, with a strategy on dp or fsdp"
        )


def _draws(run: Run, tolerance: float) -> bool:
    """Do its outputs depend on random numbers, dropout left out?"""
    return difference(*run.under(*map(_seeded, (0, 1)))) > tolerance


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    seed_everything(seed)
    yield


def _compare(rehearsal: Rehearsal, run: Run, tolerance: float) -> None:
    name = type(run.model).__name__
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    before = buffers(run.model)

    def forward_and_backward(way: Forward) -> tuple[Any, Tensor | None]:
        with torch.enable_grad():
            output = way(*run.inputs)
        graded = parameters and isinstance(output, Tensor) and output.requires_grad
        slopes = torch.cat([g.flatten() for g in gradients(output, parameters)]) if graded else None
        restore_values(run.model, before)  # after the backward pass, which may read them
        return output.detach() if isinstance(output, Tensor) else output, slopes

    try:
        # First: what the whole leaves in attributes is not for its parts.
        found, found_slopes = forward_and_backward(rehearsal.divided)
    except Exception as error:
        raise ValueError(
            f"{name} does not run {rehearsal.what} ({error_in_words(error)}): {rehearsal.hint}"
        ) from error
    expected, expected_slopes = forward_and_backward(rehearsal.whole)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{name} {rehearsal.what} gives {shape}, whole {tuple(expected.shape)}: "
            f"{rehearsal.hint}"
        )
    if (far := difference(found, expected)) > tolerance:
        raise ValueError(
            f"{name} {rehearsal.what} computes something else than whole: outputs differ by "
            f"{far:.2g} of the "
            f"largest. {rehearsal.hint}"
        )
    if found_slopes is None or expected_slopes is None:
        return
    if (far := difference(found_slopes, expected_slopes)) > tolerance * LOOSER:
        raise ValueError(
            f"{name} {rehearsal.what} has other gradients than whole, by {far:.2g} of the "
            f"largest: what its "
            f"forward does between its modules to them alone (detach) is lost. {rehearsal.hint}"
        )


@torch.no_grad()
def _move(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            noise = torch.empty(parameter.shape).normal_(
                0, MOVED, generator=generator(0, "probe", name)
            )
            parameter.add_(noise.to(parameter.dtype))


class _NoDropout(TorchFunctionMode):
    """Dropout makes numbers smaller: the same each time, and seen where it is done once too
    often.
    """

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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without dropout, and leaving the random numbers of the process as they were."""
    with Again(), torch.random.fork_rng(devices=[]), _NoDropout():
        yield
