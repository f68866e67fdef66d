"""What an optimizer can be asked for: found out by a few steps of it on two small weights.

    all of W at once                       ->  W'         one process
    parts of W, each by an optimizer alone ->  P1', P2'   a strategy whose ranks step parts
    some steps, a checkpoint, one more     ->  W'         a run that is resumed

Most optimizers treat each element by itself. Some do not: they compare the rows and columns of a matrix (Adafactor,
Muon, Shampoo), norms of whole weights (LARS, LAMB), or all weights with each other. Those are refused where the parts
that a strategy gives them would be stepped to other values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.optimizer import fill_state, named_tensors, put_back

APART, ROWS, COLUMNS, FLAT = (
    "apart",
    "rows",
    "columns",
    "flat",
)  # what a strategy's optimizers have of the weights
TOLD = {
    APART: "some of the weights and not all",
    ROWS: "some rows of each weight",
    COLUMNS: "some columns of each weight",
    FLAT: "a flat slice of all weights",
}
# Some optimizers treat small weights in another way than large ones, and count what they deem small by a rank's part.
SHAPES = ((160, 144), (66, 66), (45, 50), (96,))
STEPS, FEW, RESUMED_AFTER, PARTS = 12, 4, 5, 2  # some do something else every few steps, or from some step on
TOLERANCE = 1e-9  # relative, in fp64
Make = Callable[[nn.Module], Optimizer]


class Weights(nn.Module):
    """Parameters by their places."""

    def __init__(self, values: Iterable[Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(value.clone()) for value in values)


def check_optimizer(make: Make, stepped: Mapping[str, str], several: bool) -> None:
    """Refuse an optimizer that would not do what it does on one process, or could not be resumed.

    Args:
        make: makes it of a model's parameters.
        stepped: what its parameters are parts of, and the strategy that makes them so.
        several: are there other ranks, which must come to the same?

    Raises:
        ValueError: names the optimizer, the reason and what would do.
    """
    with torch.random.fork_rng(devices=[]):
        name, (start, *gradients) = _drawn(make)
        expected = _whole(make, start, gradients, name, seed=0)
        if not all(weight.isfinite().all() for weight in expected):  # it diverges, of which the run will tell
            gradients = gradients[:FEW]
            expected = _whole(make, start, gradients, name, seed=0)
        _compare(
            expected,
            _resumed(make, start, gradients, name),
            f"optimizer {name} cannot go on from a checkpoint, "
            "which has what it keeps of each weight: it keeps more, or in other ways; use another, such as AdamW",
        )
        if several:
            _compare(
                expected,
                _whole(make, start, gradients, name, seed=1),
                f"optimizer {name} draws random numbers, "
                "and each rank would draw its own: use another, such as AdamW, or one process",
            )
        for part, strategy in stepped.items():
            _compare(
                expected,
                _in_parts(make, start, gradients, part),
                f"optimizer {name} is not for strategy "
                f"{strategy}, which gives it {TOLD[part]}: it would come to other weights than on one process. "
                f"Use strategy=ddp or allreduce, or an optimizer that takes each element by itself, such as "
                f"AdamW",
            )


def _drawn(make: Make) -> tuple[str, list[list[Tensor]]]:
    """The optimizer's name; weights, and gradients for each step."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in range(STEPS + 1)
    ]
    try:
        return type(make(Weights(drawn[0]))).__name__, drawn
    except ValueError:  # Muon takes matrices alone
        drawn = [[t for t in each if t.ndim == 2] for each in drawn]
        return type(make(Weights(drawn[0]))).__name__, drawn


def _whole(make: Make, start: list[Tensor], gradients: list[list[Tensor]], name: str, *, seed: int) -> list[Tensor]:
    model = Weights(start)
    optimizer = make(model)
    try:
        for place, each in enumerate(gradients):
            _step(optimizer, model.all, each, seed=place + seed)
    except (
        TypeError,
        RuntimeError,
        NotImplementedError,
    ) as error:  # it wants a closure, or sparse gradients
        raise ValueError(f"optimizer {name} cannot step here: {str(error).splitlines()[0]}") from None
    return [p.detach() for p in model.all]


def _resumed(make: Make, start: list[Tensor], gradients: list[list[Tensor]], name: str) -> list[Tensor]:
    """The same, with a checkpoint in between."""
    model = Weights(start)
    optimizer = make(model)
    before = _besides(optimizer)
    after = min(RESUMED_AFTER, len(gradients) - 1)
    for place, each in enumerate(gradients[:after]):
        _step(optimizer, model.all, each, seed=place)
    told = {key: n - before.get(key, 0) for key, n in _besides(optimizer).items()}
    if counts := [key for key, more in told.items() if more > 0 and more % after == 0]:
        raise ValueError(f"optimizer {name} cannot go on from a checkpoint, which has what it keeps of each weight: it "
                         f"counts steps in {counts[0]} too; use another, such as AdamW")  # fmt: skip
    kept = {key: tensor.clone() for key, tensor in named_tensors(model, optimizer).items()}
    resumed = Weights(start)
    optimizer = make(resumed)
    fill_state(optimizer)
    tensors = named_tensors(resumed, optimizer)
    if {key: t.shape for key, t in tensors.items()} != {key: t.shape for key, t in kept.items()}:
        return []
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(kept[key])
    put_back(resumed, optimizer, tensors)
    for place, each in enumerate(gradients[after:], after):
        _step(optimizer, resumed.all, each, seed=place)
    return [p.detach() for p in resumed.all]


def _besides(optimizer: Optimizer) -> dict[str, float]:
    """The numbers that an optimizer keeps in its groups and in itself."""
    found: dict[str, Any] = {f"its {key}": value for key, value in vars(optimizer).items()}
    for number, group in enumerate(optimizer.param_groups):
        found |= {f"{key!r} of group {number}": value for key, value in group.items() if key != "params"}
    return {
        k: float(v)
        for k, v in found.items()
        if isinstance(v, int | float) or (isinstance(v, Tensor) and v.numel() == 1)
    }


def _in_parts(make: Make, start: list[Tensor], gradients: list[list[Tensor]], kind: str) -> list[Tensor]:
    """The same, each part by an optimizer of its own; nothing, if one cannot step its part."""
    cut = [_cut(each, kind) for each in (start, *gradients)]
    found = []
    try:
        for index, (values, *own) in enumerate(zip(*cut, strict=True)):
            model = Weights(values if kind in (ROWS, COLUMNS) else start)
            optimizer, parts = make(model), list(model.all)
            if kind in (
                APART,
                FLAT,
            ):  # made of whole weights, and then given one, or a slice of one
                whole = parts[index if kind == APART else index // PARTS]
                parts = [whole if kind == APART else nn.Parameter(values[0].clone())]
                for group in optimizer.param_groups:
                    group["params"] = parts if any(p is whole for p in group["params"]) else []
            for place, each in enumerate(own):
                _step(optimizer, parts, each, seed=place)
            found.append([p.detach() for p in parts])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return []  # such as states that it has made of whole weights, or sums over dims that are not there
    return _joined(found, start, kind)


def _cut(tensors: list[Tensor], kind: str) -> list[list[Tensor]]:
    if kind == APART:
        return [[tensor] for tensor in tensors]
    if kind == FLAT:
        return [[part] for tensor in tensors for part in tensor.flatten().chunk(PARTS)]
    pieces = [t.chunk(PARTS, 1 if kind == COLUMNS and t.ndim > 1 else 0) for t in tensors]
    return [list(each) for each in zip(*pieces, strict=True)]


def _joined(found: list[list[Tensor]], start: list[Tensor], kind: str) -> list[Tensor]:
    if kind == APART:
        return [tensor for (tensor,) in found]
    if kind == FLAT:
        flat = [tensor for (tensor,) in found]
        halves = [flat[i : i + PARTS] for i in range(0, len(flat), PARTS)]
        return [torch.cat(each).view_as(whole) for each, whole in zip(halves, start, strict=True)]
    return [torch.cat(parts, 1 if kind == COLUMNS and parts[0].ndim > 1 else 0) for parts in zip(*found, strict=True)]


def _step(optimizer: Optimizer, parameters: Iterable[nn.Parameter], gradients: list[Tensor], *, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def _compare(expected: list[Tensor], found: list[Tensor], otherwise: str) -> None:
    """Raise ValueError, with the difference, unless both are the same."""
    if not found:
        raise ValueError(f"{otherwise} (it fails in a trial)")
    pairs = zip(expected, found, strict=True)
    worst = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    if not worst <= TOLERANCE:
        raise ValueError(f"{otherwise} (in a trial weights differ by {worst:.0e})")
