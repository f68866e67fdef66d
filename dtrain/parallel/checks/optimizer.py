"""Check by a few steps on small weights what a user's optimizer can do.

    all weights W at once                   ->  W'         one process
    parts of W, by an optimizer each        ->  P1', P2'   a strategy whose ranks step parts
    some steps, a checkpoint, other steps   ->  W'         a run that is resumed
    W in other parameter groups             ->  W'         weights on meshes, or on other ranks

Most optimizers treat each element by itself. Some compare the rows and columns of a matrix
(Adafactor, Muon, Shampoo), norms of whole weights (LARS, LAMB), or all weights with each other.
They are refused where they would step the parts that a strategy gives them to other values.
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

# The parts of the weights that a strategy's optimizers step.
APART, ROWS, COLUMNS, FLAT, REGROUPED = "apart", "rows", "columns", "flat", "regrouped"
IN_WORDS = {
    APART: "some of the weights and not all",
    ROWS: "some rows of each weight",
    COLUMNS: "some columns of each weight",
    FLAT: "a flat slice of all weights",
    REGROUPED: "other parameter groups",
}
# Some optimizers treat small weights differently, and call small what is small on a rank.
SHAPES = ((160, 144), (66, 66), (45, 50), (96,))
STEPS, FEW, PARTS = 12, 4, 2  # some change what they do every few steps, or from some step on
RESUMED_AFTER = (3, 4, 5, 7)  # no period longer than one step divides them all
TOLERANCE = 1e-9  # relative, in fp64
Make = Callable[[nn.Module], Optimizer]
Tensors = list[Tensor]


class Weights(nn.Module):
    """A model of parameters alone, in order."""

    def __init__(self, values: Iterable[Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(value.clone()) for value in values)


def check_optimizer(
    make: Make, stepped: Mapping[str, str], several: bool, *, alone: bool = False, late: str = ""
) -> None:
    """Refuse an optimizer that would differ from one process, or could not be resumed.

    Args:
        make: makes it of a model's parameters.
        stepped: the kinds of parts that it steps, each with the strategy that makes them.
        several: there are other ranks, which must come to the same weights.
        alone: one process trains, with one backward pass a step.
        late: the strategy, if any, that resumes no state which begins after the first step.

    Raises:
        ValueError: names the optimizer, the reason and the remedy.
    """
    with torch.random.fork_rng(devices=[]), Again():
        name, (start, *gradients) = _drawn(make)
        if not alone:
            _refuse_hooks(make, start, gradients[0])
        expected = _whole(make, start, gradients)
        # one that diverges: the run itself will report that
        if not all(weight.isfinite().all() for weight in expected):
            gradients = gradients[:FEW]
            expected = _whole(make, start, gradients)
        _check_resume(make, start, gradients, expected, late)
        if several:
            _compare(
                expected,
                _whole(make, start, gradients, seed=1),
                f"optimizer {name} draws random numbers, and each rank would draw its own: use "
                "another, such as AdamW, or one process",
            )
        for part, strategy in stepped.items():
            if part == REGROUPED:
                wanted, weights = _regrouped(make, start, gradients)
            else:
                wanted, weights = expected, _in_parts(make, start, gradients, part)
            _compare(
                wanted,
                weights,
                f"optimizer {name} is not for strategy {strategy}, which gives it "
                f"{IN_WORDS[part]}: it would come to other weights than on one process. Use "
                "strategy=ddp or allreduce, or an optimizer that takes each element by itself, "
                "such as AdamW",
            )


def _drawn(make: Make) -> tuple[str, list[Tensors]]:
    """Draw weights, and gradients for each step; return the optimizer's name with them."""
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
                f"optimizer {name} has no 'lr' in its group {number}, where schedule sets each "
                f"step's rate: it has {has}; call the rate lr there"
            )
    return name, drawn


def _refuse_hooks(make: Make, start: Tensors, gradients: Tensors) -> None:
    """Refuse steps, and changes of gradients, in the backward pass: it is one rank's alone."""
    model = Weights(start)
    optimizer = make(model)  # lives as long as its hooks are looked for
    hooked = any(map(has_gradient_hook, model.all))
    torch.autograd.backward(list(model.all), [gradient.clone() for gradient in gradients])
    moved = any(not torch.equal(p, before) for p, before in zip(model.all, start, strict=True))
    untouched = all(
        p.grad is not None and torch.equal(p.grad, given)
        for p, given in zip(model.all, gradients, strict=True)
    )
    if hooked or moved or not untouched:
        raise ValueError(
            f"optimizer {type(optimizer).__name__} acts in the backward pass, by hooks on its "
            "parameters, where a gradient is one rank's or one micro-batch's: use another, such as "
            "AdamW, or one process without micro-batches"
        )


def _whole(make: Make, start: Tensors, gradients: list[Tensors], *, seed: int = 0) -> Tensors:
    model = Weights(start)
    optimizer = make(model)
    try:
        return _run(optimizer, model.all, gradients, seed)
    except Exception as error:
        # user's code may raise anything: it wants a closure, or sparse gradients
        name = type(optimizer).__name__
        raise ValueError(f"optimizer {name} cannot step here: {error_in_words(error)}") from None


def _check_resume(
    make: Make, start: Tensors, gradients: list[Tensors], expected: Tensors, late: str
) -> None:
    """Refuse an optimizer that goes on from a checkpoint otherwise than without one."""
    model = Weights(start)
    optimizer = make(model)
    name = type(optimizer).__name__
    why = (
        f"optimizer {name} cannot go on from a checkpoint, which has what it keeps of each weight: "
        "it keeps"
    )
    checkpoints: list[dict[str, Tensor]] = []
    extras: list[dict[str, Kept]] = []
    for place, each in enumerate(gradients):
        _step(optimizer, model.all, each, seed=place)
        tensors = named_tensors(model, optimizer)
        checkpoints.append({key: tensor.clone() for key, tensor in tensors.items()})
        extras.append(extra_state(optimizer, TOLERANCE))
    for after, names in enumerate(map(set, checkpoints if late else ()), start=1):
        if began := sorted({key.rpartition(".")[2] for key in names - checkpoints[0].keys()}):
            raise ValueError(
                f"optimizer {name} begins to keep {began[0]} in step {after}, and {late} resumes "
                "what it keeps from the first step on: use another, such as AdamW, or strategy=ddp"
            )
    for after in (n for n in RESUMED_AFTER if n < len(gradients)):
        try:
            weights, after_a_step = _resumed(make, start, gradients, after, checkpoints[after - 1])
        except Exception:  # user's code may raise anything
            weights, after_a_step = [], extras[after]  # such as a list that is not there
        for key in after_a_step | extras[after]:
            if after_a_step.get(key) != extras[after].get(key):
                raise ValueError(f"{why} {key} too; use another, such as AdamW")
        _compare(expected, weights, f"{why} more, or in other ways; use another, such as AdamW")


def _resumed(
    make: Make, start: Tensors, gradients: list[Tensors], after: int, saved: dict[str, Tensor]
) -> tuple[Tensors, dict[str, Kept]]:
    """Resume from a checkpoint; return the last weights, and the extra state one step later.

    One step later, since what each step makes anew, such as a norm, is no loss.

    Args:
        after: steps before the checkpoint.
        saved: its tensors.
    """
    model = Weights(start)
    optimizer = make(model)
    materialize_state(optimizer)
    tensors = {
        key: tensor for key, tensor in named_tensors(model, optimizer).items() if key in saved
    }
    with torch.no_grad():
        for key, tensor in tensors.items():
            if tensor.shape != saved[key].shape:
                return [], {}
            tensor.copy_(saved[key])
    copies = {key: tensor.clone() for key, tensor in saved.items()}
    restore_state(model, optimizer, copies | tensors)
    extras: dict[str, Kept] = {}
    for place, each in enumerate(gradients[after:], after):
        _step(optimizer, model.all, each, seed=place)
        extras = extras or extra_state(optimizer, TOLERANCE)
    return [p.detach() for p in model.all], extras


def _regrouped(make: Make, start: Tensors, gradients: list[Tensors]) -> tuple[Tensors, Tensors]:
    """Step small weights in the groups of one process, then of two meshes and of single weights.

    Returns the former's weights and the latter's, in the same order.
    """
    small = [[t[(slice(9),) * t.ndim] for t in (*each, *each)] for each in (start, *gradients)]
    expected = _whole(make, small[0], small[1:])
    half, wanted, weights = len(start), [], []
    for chosen in (list(range(2 * half)), *([place] for place in range(half))):
        model = Weights(small[0][place] for place in chosen)
        for parameter in list(model.all)[half:]:
            parameter.device_mesh = "a mesh"  # by which `parameter_groups` sets it apart
        try:
            optimizer = make(model)
        except ValueError:  # Muon takes no vectors: a rank with vectors alone would report that
            continue
        try:
            weights += _run(optimizer, model.all, [[each[i] for i in chosen] for each in small[1:]])
        except Exception:  # user's code may raise anything: of groups that are not there
            return expected, []
        wanted += [expected[place] for place in chosen]
    return wanted, weights


def _in_parts(make: Make, start: Tensors, gradients: list[Tensors], kind: str) -> Tensors:
    """Step each part by an optimizer of its own; return nothing if one cannot step its part."""
    cut = [_cut(each, kind) for each in (start, *gradients)]
    stepped = []
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
            stepped.append(_run(optimizer, parts, own))
    except Exception:  # user's code may raise anything
        # it has made states of whole weights, say, or sums over dims that are not there
        return []
    return _joined(stepped, start, kind)


def _cut(tensors: Tensors, kind: str) -> list[Tensors]:
    if kind == APART:
        return [[tensor] for tensor in tensors]
    if kind == FLAT:
        return [[part] for tensor in tensors for part in tensor.flatten().chunk(PARTS)]
    pieces = [t.chunk(PARTS, 1 if kind == COLUMNS and t.ndim > 1 else 0) for t in tensors]
    return [list(each) for each in zip(*pieces, strict=True)]


def _joined(stepped: list[Tensors], start: Tensors, kind: str) -> Tensors:
    if kind == APART:
        return [tensor for (tensor,) in stepped]
    if kind == FLAT:
        flat = [tensor for (tensor,) in stepped]
        halves = [flat[i : i + PARTS] for i in range(0, len(flat), PARTS)]
        return [torch.cat(each).view_as(whole) for each, whole in zip(halves, start, strict=True)]
    return [
        torch.cat(parts, 1 if kind == COLUMNS and parts[0].ndim > 1 else 0)
        for parts in zip(*stepped, strict=True)
    ]


def _run(
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    gradients: Iterable[Tensors],
    seed: int = 0,
) -> Tensors:
    """Step by each of the gradients; return the weights."""
    for place, each in enumerate(gradients, seed):
        _step(optimizer, parameters, each, seed=place)
    return [p.detach() for p in parameters]


def _step(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], gradients: Tensors, *, seed: int
) -> None:
    seed_everything(seed)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def _compare(expected: Tensors, weights: Tensors, problem: str) -> None:
    """Raise ValueError, with the problem and the difference, unless both are the same."""
    if not weights:
        raise ValueError(f"{problem} (it fails in a trial)")
    pairs = zip(expected, weights, strict=True)
    worst = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    if not worst <= TOLERANCE:
        raise ValueError(f"{problem} (in a trial weights differ by {worst:.0e})")
