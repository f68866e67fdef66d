"""What one rank of a plan holds and computes in a step, in shapes alone.

    Footprint: parts (models, or stages of one), micro-batches, bytes of an element
    ModelPart: weights, the calls of its modules and the activations they keep, for one micro-batch
    unit:      the weights that fsdp and replicate send together: those of a block, or all the rest

Each strategy's `footprint` takes what those before it have left, and returns what it leaves: the
plan's `parallelize`, done to numbers. Shapes are in elements.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from torch import nn

from dtrain.model.layout import Layout, layout_of, modules_at

Shape = tuple[int, ...]
# what happens to a unit's weights
FORWARD, BACKWARD, GATHER, FREE = "forward", "backward", "gather", "free"
WEIGHTS = "weights"  # the part of a backward pass that nobody waits for


@dataclass(frozen=True)
class Weight:
    """A parameter on one rank.

    Args:
        name, unit: in full; the block that holds it, or "" for all the rest.
        elements: of the whole parameter.
        used, held: shapes that layers compute with here, and that stay here between steps.
        axes: those whose strategy has made it a distributed one, cut or not.
        ready: its place in the order in which backward completes gradients; None: it does not
            train.
        stepped: does this rank's optimizer hold its states?
        reached: does backward complete it? If not it is sent as zeros, and not stepped.
    """

    name: str
    unit: str
    elements: int
    used: Shape
    held: Shape
    ready: int | None
    axes: frozenset[str] = frozenset()
    stepped: bool = True
    reached: bool = True

    def numel(self) -> int:
        return self.elements

    def split(self, axis: str, dim: int | None, parts: int, index: int) -> Weight:
        """Cut where it is used; `dim=None`: known to the axis, and whole."""
        shape = self.used if dim is None else chunk_shape(self.used, dim, parts, index)
        return replace(self, used=shape, held=shape, axes=self.axes | {axis})

    def shard(self, axis: str, parts: int, index: int) -> Weight:
        """Cut where it is held."""
        return replace(self, held=chunk_shape(self.used, 0, parts, index), axes=self.axes | {axis})

    def padded(self, parts: int) -> int:
        """Elements of a shard, filled up to the size of the largest."""
        return -(-self.used[0] // parts) * prod(self.used[1:])


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, for one micro-batch of a rank's rows and tokens; shapes are those of
    whole layers.

    Args:
        path, update: the module; the index of the update that calls it.
        inputs, output: shapes; no output where recomputation stops within the module.
        graded: does a backward pass through this call follow? Not if it computes activations again.
        returns: does that pass hand a gradient to the input?
    """

    path: str
    update: int
    inputs: tuple[Shape, ...]
    output: Shape | None
    graded: bool
    returns: bool

    def cut(self, dim: int, parts: int, index: int) -> ModuleCall:
        """With this dim of what comes in and goes out cut."""
        inputs = tuple(chunk_shape(shape, dim, parts, index) for shape in self.inputs)
        return replace(
            self, inputs=inputs, output=self.output and chunk_shape(self.output, dim, parts, index)
        )


@dataclass(frozen=True)
class Activation:
    """What the forward pass of a micro-batch leaves for its backward pass: an activation.

    Args:
        path: the module that computes it; None: outside of all, in the loss.
        shape, bytes: in whole layers, and here.
        born, died: when, in operations of the micro-batch.
        feeds: the modules that are given it.
    """

    path: str | None
    shape: Shape
    bytes: int
    born: int
    died: int
    feeds: frozenset[str]

    def within(self, modules: Iterable[str]) -> bool:
        """Is it computed in one of these modules?"""
        return self.path is not None and any(
            f"{self.path}.".startswith(f"{module}.") for module in modules
        )

    def divide(self, parts: int) -> Activation:
        """With one of as many equal parts here."""
        return replace(self, bytes=-(-self.bytes // parts))


@dataclass(frozen=True)
class ModelPart:
    """A model, or one stage of it.

    Args:
        model: its name.
        outline: all of the model on the meta device.
        weights, calls, kept: of this piece.
        trained: how many updates train it.
        passes: FORWARD, BACKWARD ... over a step, if micro-batches do not simply follow each other.
        flights: after each thing that the rank does, how many micro-batches wait here for their
            backward pass, and how many have had it.
        sent: bytes of an output on its way to another rank: kept to the end of the step.
    """

    model: str
    outline: nn.Module
    weights: tuple[Weight, ...]
    calls: tuple[ModuleCall, ...]
    kept: tuple[Activation, ...]
    trained: int
    passes: tuple[str, ...] = ()
    flights: tuple[tuple[int, int], ...] = ()
    sent: int = 0

    def map(self, change: Callable[[Weight], Weight]) -> ModelPart:
        """With every weight changed."""
        return replace(self, weights=tuple(map(change, self.weights)))

    def keep(
        self, part: nn.Module, passes: tuple[str, ...], flights: tuple[tuple[int, int], ...]
    ) -> ModelPart:
        """What is present in a part of the model, a stage of a pipeline."""
        names, whole = dict(part.named_parameters()), dict(self.outline.named_modules())
        paths = {
            path for path, module in part.named_modules() if type(module) is type(whole.get(path))
        }
        weights = tuple(replace(weight) for weight in self.weights if weight.name in names)
        calls = tuple(call for call in self.calls if call.path in paths)
        last = layout_of(self.outline).last in paths
        kept = tuple(
            kept for kept in self.kept if (last if kept.path is None else kept.path in paths)
        )
        return replace(
            self, weights=weights, calls=calls, kept=kept, passes=passes, flights=flights
        )

    def calls_at(self, patterns: tuple[str, ...]) -> list[ModuleCall]:
        """Calls of the modules at these paths of the model's layout, in one micro-batch of each
        update.
        """
        paths = {path for path, _ in modules_at(self.outline, patterns)}
        return [call for call in self.calls if call.path in paths]

    @property
    def gradients(self) -> list[Weight]:
        """Weights whose gradients are finished after an update's backward pass, as often as
        they are.
        """
        return [weight for weight in self.weights * self.trained if weight.ready is not None]

    @property
    def units(self) -> dict[str, list[Weight]]:
        """Weights by their unit."""
        found: dict[str, list[Weight]] = defaultdict(list)
        for weight in self.weights:
            found[weight.unit].append(weight)
        return found

    @property
    def reached(self) -> set[int]:
        """The updates whose backward pass gives this piece gradients."""
        return {call.update for call in self.calls if call.graded}

    def backwards(self, path: str) -> dict[int, int]:
        """How often backward ends in a module, by update: for each call, or once where no
        gradient goes further.
        """
        calls = [call for call in self.calls if call.path == path and call.graded]
        return {
            u: max(1, sum(c.returns for c in calls if c.update == u))
            for u in sorted({c.update for c in calls})
        }

    def passes_of(self, unit: str, micro_batches: int) -> tuple[str, ...]:
        """What happens to a unit's weights in a step, in order."""
        if self.passes:
            return self.passes
        forwards = Counter(c.update for c in self.calls if c.path == unit)
        backwards = self.backwards(unit)
        steps = (
            (FORWARD,) * n + (BACKWARD, FREE) * backwards.get(u, 0)
            for u, n in sorted(forwards.items())
        )
        return tuple(each for step in steps for each in step * micro_batches)


@dataclass(frozen=True)
class Footprint:
    """What one rank holds and computes in a step.

    Args:
        pieces: of all models.
        micro_batches: of each update.
        weight_bytes: of an element of a weight or gradient at rest.
        compute_bytes: of an element where products are computed: of weights that fsdp gathers,
            queries and keys.
        reduce_bytes: of an element of a gradient that is summed over ranks.
        activation_bytes: of an element between layers.
        state_bytes: of the optimizer, for each element and for each parameter.
        place: the rank's coordinate on each axis.
        held: bytes of parameters, gradients and optimizer states, where an engine lays them out;
            None: as pieces tell.
    """

    pieces: tuple[ModelPart, ...]
    micro_batches: int
    weight_bytes: int
    compute_bytes: int
    reduce_bytes: int
    activation_bytes: int
    state_bytes: tuple[int, int] = (0, 0)
    place: Mapping[str, int] = field(default_factory=dict)
    held: tuple[int, int, int] | None = None

    def calls_at(self, role: Callable[[Layout], tuple[str, ...]]) -> list[ModuleCall]:
        """Calls of the modules at the paths that `role` picks from each model's layout."""
        return [
            call for piece in self.pieces for call in piece.calls_at(role(layout_of(piece.outline)))
        ]

    def map(self, change: Callable[[ModelPart], ModelPart]) -> Footprint:
        """With every piece changed."""
        return replace(self, pieces=tuple(map(change, self.pieces)))

    @property
    def gradients(self) -> list[Weight]:
        """Those of all pieces."""
        return [weight for piece in self.pieces for weight in piece.gradients]

    def unit_gradients(self, parts: int, *, each: bool = False) -> list[int]:
        """Elements of a padded shard of a unit's gradients, each time that they are reduced.

        That is in the backward pass of a step's last micro-batch, or with `each` of every
        micro-batch.
        """
        sizes = []
        for piece in self.pieces:
            for unit, weights in piece.units.items():
                size = sum(weight.padded(parts) for weight in weights if weight.ready is not None)
                times = sum(piece.backwards(unit).values()) * (self.micro_batches if each else 1)
                sizes += [size] * times if size else []
        return sizes


def chunk_shape(shape: Shape, dim: int, parts: int, index: int) -> Shape:
    """The shape of a part where a dim is cut as `torch.chunk` cuts it: the last parts may be
    smaller, or empty.
    """
    chunk = -(-shape[dim] // parts)
    return *shape[:dim], max(0, min(chunk, shape[dim] - index * chunk)), *shape[dim + 1 :]
