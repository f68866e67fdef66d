"""What an optimizer can be asked for: found out by a few steps of it on two small weights.

    all of W at once                       ->  W'         one process
    parts of W, each by an optimizer alone ->  P1', P2'   a strategy whose ranks step parts
    some steps, a checkpoint, the others   ->  W'         a run that is resumed
    W in groups that are cut otherwise     ->  W'         weights on meshes, or on other ranks

Most optimizers treat each element by itself. Some do not: they compare the rows and columns of a
matrix (Adafactor, Muon, Shampoo), norms of whole weights (LARS, LAMB), or all weights with each
other. Those are refused where the parts that a strategy gives them would be stepped to other
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.config.user_code import error_in_words
from dtrain.data.seeded import Again, seed_everything
from dtrain.model.layout import has_gradient_hook
from dtrain.parallel.optimizer import materialize_state, named_tensors, restore_state
from dtrain.parallel.optimizer_extras import Kept, extra_state

# What a strategy's optimizers have of the weights.
APART, ROWS, COLUMNS, FLAT, REGROUPED = "apart", "rows", "columns", "flat", "regrouped"
TOLD = {
    APART: "some of the weights and not all",
    ROWS: "some rows of each weight",
    COLUMNS: "some columns of each weight",
    FLAT: "a flat slice of all weights",
    REGROUPED: "other parameter groups",
}
# Some optimizers treat small weights in another way than large ones, and count what they deem small
# by a rank's part.
SHAPES = ((160, 144), (66, 66), (45, 50), (96,))
STEPS, FEW, PARTS = 12, 4, 2  # some do something else every few steps, or from some step on
RESUMED_AFTER = (3, 4, 5, 7)  # no period that is longer than one step divides them all
TOLERANCE = 1e-9  # relative, in fp64
Make = Callable[[nn.Module], Optimizer]


class Weights(nn.Module):
    """Parameters by their places."""

    def __init__(self, values: Iterable[Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(value.clone()) for value in values)


def check_optimizer(
    make: Make, stepped: Mapping[str, str], several: bool, *, alone: bool = False, late: str = ""
) -> None:
    """Refuse an optimizer that would not do what it does on one process, or could not be resumed.

    Args:
        make: makes it of a model's parameters.
        stepped: what its parameters are parts of, and the strategy that makes them so.
        several: are there other ranks, which must come to the same?
        alone: does one process train, by one backward pass a step?
        late: the strategy that resumes no state which begins after the first step, if there is one.

    Raises:
        ValueError: names the optimizer, the reason and what would do.
    """
    with torch.random.fork_rng(devices=[]), Again():
        name, (start, *gradients) = _drawn(make)
        if not alone:
            _refuse_hooks(make, start, gradients[0], name)
        expected = _whole(make, start, gradients, name, seed=0)
        # it diverges, of which the run will tell
        if not all(weight.isfinite().all() for weight in expected):
            gradients = gradients[:FEW]
            expected = _whole(make, start, gradients, name, seed=0)
        _check_resume(make, start, gradients, name, expected, late)
        if several:
            _compare(
                expected,
                _whole(make, start, gradients, name, seed=1),
                f"optimizer {name} draws random numbers, "
                "and each rank would draw its own: use another, such as AdamW, or one process",
            )
        for part, strategy in stepped.items():
            if part == REGROUPED:
                wanted, found = _regrouped(make, start, gradients, name)
            else:
                wanted, found = expected, _in_parts(make, start, gradients, part)
            _compare(
                wanted,
                found,
                f"optimizer {name} is not for strategy "
                f"{strategy}, which gives it {TOLD[part]}: it would come to other weights than on "
                f"one process. "
                f"Use strategy=ddp or allreduce, or an optimizer that takes each element by "
                f"itself, such as "
                f"AdamW",
            )


def _drawn(make: Make) -> tuple[str, list[list[Tensor]]]:
    """The optimizer's name; weights, and gradients for each step."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for _ in range(STEPS + 1)
    ]
    try:
        optimizer = make(Weights(drawn[0]))
    except ValueError:  # Muon takes matrices alone
        drawn = [[t for t in each if t.ndim == 2] for each in drawn]
        optimizer = make(Weights(drawn[0]))
    name = type(optimizer).__name__
    for number, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            has = ", ".join(repr(key) for key in group if key != "params") or "nothing"
            raise ValueError(
                f"optimizer {name} has no 'lr' in its group {number}, where schedule sets "
                f"each step's "
                f"rate: it has {has}; call the rate lr there"
            )
    return name, drawn


def _refuse_hooks(make: Make, start: list[Tensor], gradients: list[Tensor], name: str) -> None:
    """Refuse what steps, or changes gradients, in the backward pass: before ranks and
    micro-batches have met.
    """
    model = Weights(start)
    _kept = make(model)  # for as long as its hooks are looked for
    found = any(map(has_gradient_hook, model.all))
    torch.autograd.backward(list(model.all), [gradient.clone() for gradient in gradients])
    moved = any(not torch.equal(p, before) for p, before in zip(model.all, start, strict=True))
    left = all(
        p.grad is not None and torch.equal(p.grad, given)
        for p, given in zip(model.all, gradients, strict=True)
    )
    if found or moved or not left:
        raise ValueError(
            f"optimizer {name} acts in the backward pass, by hooks on its parameters, where a "
            f"gradient is "
            f"one rank's or one micro-batch's: use another, such as AdamW, or one process without "
            f"micro-batches"
        )


def _whole(
    make: Make, start: list[Tensor], gradients: list[list[Tensor]], name: str, *, seed: int
) -> list[Tensor]:
    model = Weights(start)
    optimizer = make(model)
    try:
        for place, each in enumerate(gradients):
            _step(optimizer, model.all, each, seed=place + seed)
    except Exception as error:
        # an author's step may raise anything: it wants a closure, or sparse gradients
        raise ValueError(f"optimizer {name} cannot step here: {error_in_words(error)}") from None
    return [p.detach() for p in model.all]


def _check_resume(
    make: Make,
    start: list[Tensor],
    gradients: list[list[Tensor]],
    name: str,
    expected: list[Tensor],
    late: str,
) -> None:
    """Refuse what does not go on, from checkpoints after several steps, as if there had been
    none.
    """
    why = (
        f"optimizer {name} cannot go on from a checkpoint, which has what it keeps of each "
        f"weight: it keeps"
    )
    model = Weights(start)
    optimizer = make(model)
    kept: list[dict[str, Tensor]] = []
    others: list[dict[str, Kept]] = []
    for place, each in enumerate(gradients):
        _step(optimizer, model.all, each, seed=place)
        kept.append(
            {key: tensor.clone() for key, tensor in named_tensors(model, optimizer).items()}
        )
        others.append(extra_state(optimizer, TOLERANCE))
    for after, names in enumerate(map(set, kept if late else ()), start=1):
        if began := sorted({key.rpartition(".")[2] for key in names - kept[0].keys()}):
            raise ValueError(
                f"optimizer {name} begins to keep {began[0]} in step {after}, and {late} resumes "
                f"what it "
                f"keeps from the first step on: use another, such as AdamW, or strategy=ddp"
            )
    for after in (n for n in RESUMED_AFTER if n < len(gradients)):
        try:
            found, after_a_step = _resumed(make, start, gradients, after, kept[after - 1])
        except Exception:  # of a user's optimizer: it may fail in any way
            found, after_a_step = [], others[after]  # such as a list that is not there
        lost = [
            key
            for key in after_a_step | others[after]
            if after_a_step.get(key) != others[after].get(key)
        ]
        if lost:
            raise ValueError(f"{why} {lost[0]} too; use another, such as AdamW")
        _compare(expected, found, f"{why} more, or in other ways; use another, such as AdamW")


def _resumed(
    make: Make,
    start: list[Tensor],
    gradients: list[list[Tensor]],
    after: int,
    kept: dict[str, Tensor],
) -> tuple[list[Tensor], dict[str, Kept]]:
    """The weights in the end, from a checkpoint after so many steps; what else it keeps one step
    after that one.

    After one step, since what is made anew in every step, such as a norm, is no loss.
    """
    model = Weights(start)
    optimizer = make(model)
    materialize_state(optimizer)
    tensors = {
        key: tensor for key, tensor in named_tensors(model, optimizer).items() if key in kept
    }
    with torch.no_grad():
        for key, tensor in tensors.items():
            if tensor.shape != kept[key].shape:
                return [], {}
            tensor.copy_(kept[key])
    restore_state(model, optimizer, {key: tensor.clone() for key, tensor in kept.items()} | tensors)
    told: dict[str, Kept] = {}
    for place, each in enumerate(gradients[after:], after):
        _step(optimizer, model.all, each, seed=place)
        told = told or extra_state(optimizer, TOLERANCE)
    return [p.detach() for p in model.all], told


def _regrouped(
    make: Make, start: list[Tensor], gradients: list[list[Tensor]], name: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Small weights by groups as one process makes them; and by those of two meshes, and of
    some weights alone.
    """
    small = [[t[(slice(9),) * t.ndim] for t in (*each, *each)] for each in (start, *gradients)]
    expected = _whole(make, small[0], small[1:], name, seed=0)
    half, wanted, found = len(start), [], []
    for chosen in (list(range(2 * half)), *([place] for place in range(half))):
        model = Weights(small[0][place] for place in chosen)
        for parameter in list(model.all)[half:]:
            parameter.device_mesh = "a mesh"  # by which `parameter_groups` sets it apart
        try:
            optimizer = make(model)
        except ValueError:  # as Muon takes no vectors, of which a rank with nothing else would tell
            continue
        try:
            for place, each in enumerate(small[1:]):
                _step(optimizer, model.all, [each[i] for i in chosen], seed=place)
        except Exception:  # an author's step may raise anything: of groups that are not there
            return expected, []
        wanted += [expected[place] for place in chosen]
        found += [p.detach() for p in model.all]
    return wanted, found


def _in_parts(
    make: Make, start: list[Tensor], gradients: list[list[Tensor]], kind: str
) -> list[Tensor]:
    """The same, each part by an optimizer of its own; nothing, if one cannot step its part."""
    cut = [_cut(each, kind) for each in (start, *gradients)]
    found = []
    try:
        for index, (values, *own) in enumerate(zip(*cut, strict=True)):
            model = Weights(values if kind in (ROWS, COLUMNS) else start)
            optimizer, parts = make(model), list(model.all)
            # made of whole weights, and then given one, or a slice of one
            if kind in (APART, FLAT):
                whole = parts[index if kind == APART else index // PARTS]
                parts = [whole if kind == APART else nn.Parameter(values[0].clone())]
                for group in optimizer.param_groups:
                    group["params"] = parts if any(p is whole for p in group["params"]) else []
            for place, each in enumerate(own):
                _step(optimizer, parts, each, seed=place)
            found.append([p.detach() for p in parts])
    except Exception:  # an author's step may raise anything
        # such as states that it has made of whole weights, or sums over dims that are not there
        return []
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
    return [
        torch.cat(parts, 1 if kind == COLUMNS and parts[0].ndim > 1 else 0)
        for parts in zip(*found, strict=True)
    ]


def _step(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], gradients: list[Tensor], *, seed: int
) -> None:
    seed_everything(seed)
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
