"""What tensor parallelism sends at the edges of split layers, and what a rank keeps within them.

    rank 0: x0 -> gather -> column, row -> sum -> y0     sequence parallel: x0 has rank 0's tokens;
    rank 1: x1 -> gather -> column, row -> sum -> y1     else x0 = x1, and nothing is gathered

A backward pass goes the other way: it gathers where forward sums, and sums where forward gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import nn

from dtrain.model.layout import experts_of, holders, layout_of, modules_at
from dtrain.parallel.footprint import Activation, ModelPart, Shape

GATHER, SUM, ALL_REDUCE, NOTHING = "gather", "sum", "all_reduce", ""
WHOLE_TOKENS = {GATHER: NOTHING, SUM: ALL_REDUCE}
SEQUENCE_PARALLEL = {GATHER: "all_gather", SUM: "reduce_scatter"}
# The modules (see `_modules`), which of their tensors, what is done with it in a forward and in a
# backward pass, and whether it comes straight from products: in mixed precision those are narrow,
# though what lies between layers may not be.
EDGES = (
    ("holders",   "input",  GATHER,     SUM,        False),
    ("head",      "input",  GATHER,     SUM,        False),
    ("row",       "output", SUM,        GATHER,     True),
    ("embedding", "output", ALL_REDUCE, NOTHING,    False),
    ("first",     "output", NOTHING,    GATHER,     False),
    ("routers",   "input",  GATHER,     NOTHING,    False),
    ("routers",   "output", NOTHING,    GATHER,     False),
    ("experts",   "input",  NOTHING,    ALL_REDUCE, False),
    ("experts",   "output", ALL_REDUCE, NOTHING,    True),
)  # fmt: skip


def edge_messages(piece: ModelPart, sequence_parallel: bool) -> Iterator[tuple[str, int, bool]]:
    """Yield what travels at a piece's edges for one micro-batch, by EDGES.

    Each item is a collective, its elements, and whether they come straight from products.
    """
    modules = _modules(piece)
    collectives = SEQUENCE_PARALLEL if sequence_parallel else WHOLE_TOKENS
    for name, tensor, forward, backward, products in EDGES:
        for call in piece.calls_at(modules[name]):
            shape = call.inputs[0] if tensor == "input" else call.output
            goes_back = call.returns if tensor == "input" else call.graded
            for edge in (forward, backward if goes_back else NOTHING):
                operation = collectives.get(edge, edge)
                if operation and shape:
                    yield operation, prod(shape), products


def kept_by_rank(
    piece: ModelPart, parts: int, sequence_parallel: bool, loss_parallel: bool
) -> Iterator[Activation]:
    """Yield a piece's activations on one rank: cut within split layers, whole where they enter."""
    modules, layout = _modules(piece), layout_of(piece.outline)
    parameters = (
        (getattr(experts, name, None), dim)
        for _, experts in experts_of(piece.outline)
        for name, dim in layout.hidden
    )
    hidden = {parameter.shape[dim] for parameter, dim in parameters if parameter is not None}
    whole = {*modules["holders"], *modules["routers"], *modules["head"]}
    for kept in piece.kept:
        if kept.within(modules["experts"]):
            divided = kept.shape[-1:] and kept.shape[-1] in hidden
        elif kept.path is None or kept.path in modules["head"]:
            divided = loss_parallel
        elif kept.within(modules["holders"]) and kept.path not in modules["row"]:
            divided = True
        else:
            routed = kept.within(modules["routers"])
            divided = sequence_parallel and not routed and not kept.feeds & whole
        yield kept.divide(parts) if divided else kept


def logits_shapes(piece: ModelPart) -> list[Shape]:
    """Return the shapes of the logits that a piece computes of one micro-batch."""
    return [call.output for call in piece.calls_at(_modules(piece)["head"]) if call.output]


def _modules(piece: ModelPart) -> dict[str, tuple[str, ...]]:
    """Return the paths of the modules that EDGES names."""
    model, layout = piece.outline, layout_of(piece.outline)

    def paths(patterns: tuple[str, ...], kind: type[nn.Module] = nn.Module) -> tuple[str, ...]:
        return tuple(path for path, layer in modules_at(model, patterns) if isinstance(layer, kind))

    experts = tuple(path for path, _ in experts_of(model))
    return {
        "holders": holders(paths(layout.column)),  # of column layers, which share their input
        "head": paths(layout.vocabulary, nn.Linear),
        "row": paths(layout.row),
        "embedding": paths(layout.vocabulary, nn.Embedding),
        "first": paths((layout.first,)),
        "routers": holders(experts),
        "experts": experts,
    }
