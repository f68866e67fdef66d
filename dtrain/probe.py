"""Does a user's model compute the same when it is divided? Tried on a few rows, before training.

    rows alone, and together       batch norm and other statistics of rows
    twice, and once                counts and averages that a forward pass moves
    stage after stage, and whole   what stands in `forward` between the modules of the Layout
    tokens apart, and together     what mixes tokens outside attention
    layers split, and whole        layers that are not cut where the Layout says
    an original, and its layout    what a model of `transformers` computes between its modules

It needs no other process. Weights are those of the seed, each moved a little, so that nothing that
begins at zero hides; dropout makes numbers smaller, always alike.
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

from dtrain.batch import Batch, Models, evaluating
from dtrain.draw import Again, generator, seed_everything
from dtrain.initialize import cast, on_meta, whole
from dtrain.layout import StepAware, is_ours, offers, refuse_gradient_hooks
from dtrain.rehearsal import Rehearsal, twin

if TYPE_CHECKING:
    from dtrain.plan import Plan
    from dtrain.task.base import Task

ROWS = 4
MOVED = 0.02  # standard deviation of what is added to each weight
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative; what is wrong is wrong by more
EVERYTHING = slice(None)
LARGEST = 1_000_000_000  # parameters of a model that is otherwise never whole on a rank
DROPS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
}


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
    tried = [name for name, model in outlines.items() if model is None or not proven(model)]
    if not tried:
        return ()
    too_large = [n for n in tried if offers(outlines[n], "initial") and _size(outlines[n]) > LARGEST]
    if too_large:
        return (
            f"probe: {too_large[0]} is too large to be tried whole: nothing says that it computes the "
            f"same when divided",
        )
    notes = tuple(_try(task, plan, tried, micro_batches, seed))
    return (
        f"probe: the model was tried on {ROWS} rows in {time.perf_counter() - begun:.2f} s",
        *notes,
    )


def proven(model: nn.Module) -> bool:
    """Has dtrain's own suite tried all of it? A model of somebody else's within a class of ours is not ours."""
    return is_ours(model) and not offers(model, "original")


def _size(model: nn.Module | None) -> int:
    return sum(p.numel() for p in model.parameters()) if model is not None else 0


def _try(task: Task, plan: Plan, tried: list[str], micro_batches: int, seed: int) -> Iterator[str]:
    batch = {name: tensor[:ROWS].clone() for name, tensor in task.batch(0).items()}
    try:
        models, dtype = _running(task, batch, seed, (torch.float64, torch.float32))
    except ValueError:
        if plan.device.type == "cpu":
            raise
        yield f"probe: the model does not run on the host, so nothing was tried ({plan.device.type} is asked for)"
        return
    tolerance = TOLERANCES[dtype]
    for name in tried:
        if offers(models[name], "original"):
            _try_original(task, name, models[name], batch, seed, tolerance)
    for model in models.values():
        _move(model)
    untouched = {name: twin(model) for name, model in models.items()}  # a forward pass may leave things in attributes
    for update in task.updates:
        run = Run(update, models, batch)
        if update.trains not in tried:
            continue
        again = micro_batches > 1 or plan.recompute or plan.on("pp") is not None
        if not (again or plan.strategies):
            continue
        if micro_batches > 1:
            refuse_gradient_hooks(run.model)
        drawn = _draws(run, tolerance)
        if drawn:
            yield "probe: the model draws numbers of its own in training, so it was tried in evaluation alone"
        with evaluating(models) if drawn else nullcontext():
            _try_rows(run, tolerance, again)
            before = _buffers(run.model)
            for strategy in plan.strategies if hasattr(update, "inputs") else ():
                for rehearsal in strategy.rehearsals(twin(untouched[update.trains]), run.inputs, plan):
                    _compare(rehearsal, run, tolerance)
                    _put(run.model, before)


class Run:
    """An update's forward pass: outputs of a supervised one, the loss of another."""

    def __init__(self, update: Any, models: Models, batch: Batch) -> None:
        self.update, self.models, self.batch = update, models, batch

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
                return self.update.outputs(self.models, batch)
            return self.update.loss(self.models, batch).detach()[None]

    def alone(self) -> Tensor:
        """Row by row; losses are sums."""
        each = [self(slice(row, row + 1)) for row in range(len(next(iter(self.batch.values()))))]
        return torch.cat(each) if hasattr(self.update, "outputs") else torch.stack(each).sum(0)


def _running(task: Task, batch: Batch, seed: int, dtypes: tuple[torch.dtype, ...]) -> tuple[Models, torch.dtype]:
    """The models, whole, in the first format in which the updates run."""
    for dtype in dtypes:
        models = {name: whole(factory, seed, dtype) for name, factory in task.models.items()}
        try:
            for update in task.updates:
                for module in models[update.trains].modules():
                    if isinstance(module, StepAware):
                        module.before_step(torch.ones((), dtype=torch.float64))
                with torch.enable_grad() if update.second_order else torch.no_grad():
                    update.loss(models, batch)
            # Made again: buffers may have moved.
            return {n: whole(factory, seed, dtype) for n, factory in task.models.items()}, dtype
        except Exception as error:  # of a user's model: it may fail in any way
            if dtype == dtypes[-1]:
                names = ", ".join(getattr(task.updates[0], "inputs", ()))
                parts = any(m.original() for m in models.values() if offers(m, "original"))  # type: ignore[operator]
                hint = ": use model.layout=null, with a strategy on dp or fsdp" if parts else ""
                raise ValueError(
                    f"the model cannot be trained: called with ({names}) of "
                    f"{len(batch[next(iter(batch))])} rows it ends in {_said(error)}{hint}"
                ) from error
    raise AssertionError


def _try_original(task: Task, name: str, model: Any, batch: Batch, seed: int, tolerance: float) -> None:
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
                f"model.layout: {model.kind} does not run in parts ({_said(error)}): use model.layout=null, "
                f"with a strategy on dp or fsdp"
            ) from error
    if (far := _difference(found, expected)) > tolerance:
        raise ValueError(
            f"model.layout: in parts {model.kind} gives other logits than the original, by {far:.2g} of the "
            f"largest: it computes something between its modules (a window, a multiplier); use "
            f"model.layout=null, with a strategy on dp or fsdp"
        )


def _draws(run: Run, tolerance: float) -> bool:
    """Do its outputs depend on random numbers, dropout left out?"""
    before, found = _buffers(run.model), []
    for seed in (0, 1):
        seed_everything(seed)
        found.append(run(EVERYTHING))
        _put(run.model, before)
    return _difference(*found) > tolerance


def _try_rows(run: Run, tolerance: float, again: bool) -> None:
    """Rows alone and together; and what a forward pass moves."""
    model = run.model
    before = _buffers(model)
    if len(run.batch[next(iter(run.batch))]) > 1:
        together = run(EVERYTHING)
        moved = _buffers(model)
        _put(model, before)
        far = _difference(run.alone(), together)
        _put(model, before)
        name = type(model).__name__
        if far > tolerance:
            raise ValueError(
                f"the rows of a batch are not computed apart in {name}: alone and together they differ by "
                f"{far:.2g} of the largest output. Statistics of rows, as batch norm's, would be those of a "
                f"part: use GroupNorm or LayerNorm, or one process without micro-batches"
            )
        run(EVERYTHING if again else slice(0, 1))
        if again:
            run(EVERYTHING)
        other = _buffers(model)
        _put(model, before)
    for key, value in moved.items():
        if _difference(other[key], value) > tolerance:
            why = "twice for a step" if again else "of a part of the rows"
            raise ValueError(
                f"{key} of {name} is moved by each forward pass, and would be moved {why}: use one process "
                f"without micro-batches and recomputation, or keep it still"
            )


def _compare(rehearsal: Rehearsal, run: Run, tolerance: float) -> None:
    name = type(run.model).__name__
    with torch.no_grad():
        try:
            found = rehearsal.divided(*run.inputs)  # first: what the whole leaves in attributes is not for its parts
        except Exception as error:
            raise ValueError(f"{name} does not run {rehearsal.what} ({_said(error)}): {rehearsal.hint}") from error
        expected = rehearsal.whole(*run.inputs)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name} {rehearsal.what} gives {shape}, whole {tuple(expected.shape)}: {rehearsal.hint}")
    if (far := _difference(found, expected)) > tolerance:
        raise ValueError(
            f"{name} {rehearsal.what} computes something else than whole: outputs differ by {far:.2g} of the "
            f"largest. {rehearsal.hint}"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest of both; not finite in one place alone: infinite."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    found, expected = found.to(wide), expected.to(wide)
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    there = expected.isfinite()
    far = torch.where(there, found - expected, 0).abs().max()
    return (far / torch.where(there, expected, 0).abs().max().clamp(min=1e-30)).item() if far else 0.0


@torch.no_grad()
def _move(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            noise = torch.empty(parameter.shape).normal_(0, MOVED, generator=generator(0, "probe", name))
            parameter.add_(noise.to(parameter.dtype))


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    aware = {id(b) for m in model.modules() if isinstance(m, StepAware) for b in m.buffers(recurse=False)}
    return {name: b.clone() for name, b in model.named_buffers() if id(b) not in aware}


@torch.no_grad()
def _put(model: nn.Module, kept: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.copy_(kept[name])


def _said(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]


class _NoDropout(TorchFunctionMode):
    """Dropout makes numbers smaller: the same each time, and seen where it is done once too often."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
