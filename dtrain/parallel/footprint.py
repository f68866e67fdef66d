"""Predict what one rank of a plan holds and computes in a step, from shapes alone.

    Footprint: parts (models, or stages of one), micro-batches, bytes of an element
    ModelPart: weights, the calls of its modules and the activations they keep, for one micro-batch
    unit:      the weights that fsdp and replicate send together: those of a block, or all the rest

A plan's strategies are folded over a footprint as they are over a model: each strategy's
`footprint` takes what the earlier ones left on the rank, and returns what it leaves. Shapes are in
elements. A block of one 6 x 8 matrix, first whole, then on the second of four ranks of fsdp:

    >>> whole = Weight("blocks.0.fc", "blocks.0", 48, used=(6, 8), held=(6, 8), ready=0)
    >>> call = ModuleCall("blocks.0", 0, ((2, 16, 8),), (2, 16, 6), graded=True, returns=True)
    >>> part = ModelPart("model", nn.Module(), (whole,), calls=(call,), kept=(), trained=1)
    >>> part = part.map(lambda weight: weight.shard("fsdp", 4, 1))
    >>> part.weights[0].used, part.weights[0].held  # computes with all, keeps two rows of six
    ((6, 8), (2, 8))
    >>> part.weights[0].padded(4)  # elements of a shard on the wire: as on the rank with most rows
    16
    >>> part.passes_of("blocks.0", micro_batches=2)
    ('forward', 'backward', 'free', 'forward', 'backward', 'free')
    >>> Footprint((part,), 2, 4, 4, 4, 4).unit_gradients(4, each=True)  # in both micro-batches
    [16, 16]
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from torch import nn

from dtrain.model.layout import Layout, layout_of, modules_at

Shape = tuple[int, ...]
FORWARD, BACKWARD, GATHER, FREE = "forward", "backward", "gather", "free"  # passes over a unit
WEIGHTS = "weights"  # the part of a backward pass for which no rank waits


@dataclass(frozen=True)
class Weight:
    """A parameter on one rank.

    Args:
        name: in full.
        unit: the block that holds it; "" for all the rest.
        elements: of the whole parameter.
        used: the shape with which layers compute here.
        held: the shape that stays here between steps.
        ready: its place in the order in which backward completes gradients; None: it does not
            train.
        axes: those whose strategy has made it distributed, cut or not.
        stepped: this rank's optimizer holds its states.
        reached: backward completes it; otherwise it is sent as zeros, and not stepped.
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
        """Cut what layers compute with; `dim=None`: the axis knows it, and leaves it whole."""
        shape = self.used if dim is None else chunk_shape(self.used, dim, parts, index)
        return replace(self, used=shape, held=shape, axes=self.axes | {axis})

    def shard(self, axis: str, parts: int, index: int) -> Weight:
        """Cut what stays between steps, along rows."""
        return replace(self, held=chunk_shape(self.used, 0, parts, index), axes=self.axes | {axis})

    def padded(self, parts: int) -> int:
        """Return the elements of a shard, filled up to the size of the largest."""
        return -(-self.used[0] // parts) * prod(self.used[1:])


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module for one micro-batch of a rank's rows and tokens.

    Args:
        path: of the module.
        update: the index of the update that calls it.
        inputs, output: shapes of whole layers; no output where recomputation stops within it.
        graded: a backward pass through this call follows; not if it computes activations again.
        returns: that pass hands a gradient to the input.
    """

    path: str
    update: int
    inputs: tuple[Shape, ...]
    output: Shape | None
    graded: bool
    returns: bool

    def cut(self, dim: int, parts: int, index: int) -> ModuleCall:
        """Cut this dim of inputs and output."""
        inputs = tuple(chunk_shape(shape, dim, parts, index) for shape in self.inputs)
        return replace(
            self, inputs=inputs, output=self.output and chunk_shape(self.output, dim, parts, index)
        )


@dataclass(frozen=True)
class Activation:
    """A tensor that the forward pass of a micro-batch keeps for its backward pass.

    Args:
        path: the module that computes it; None: the loss does, outside of all modules.
        shape: in whole layers.
        bytes: on this rank.
        born, died: the first and the last operation of the micro-batch at which it is there.
        feeds: the modules that read it.
    """

    path: str | None
    shape: Shape
    bytes: int
    born: int
    died: int
    feeds: frozenset[str]

    def within(self, modules: Iterable[str]) -> bool:
        """Return whether one of these modules computes it."""
        return self.path is not None and any(
            f"{self.path}.".startswith(f"{module}.") for module in modules
        )

    def divide(self, parts: int) -> Activation:
        """Return it with one of `parts` equal parts here."""
        return replace(self, bytes=-(-self.bytes // parts))


@dataclass(frozen=True)
class ModelPart:
    """A model, or one stage of it.

    Args:
        model: its name.
        outline: all of the model on the meta device.
        weights, calls: of this part.
        kept: its activations.
        trained: how many updates train it.
        passes: FORWARD, BACKWARD ... over a step, if micro-batches do not simply follow each other.
        flights: after each pass, how many micro-batches wait here for their backward pass, and how
            many have had it.
        sent: bytes of an output on its way to another rank, kept to the end of the step.
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
        """Change every weight."""
        return replace(self, weights=tuple(map(change, self.weights)))

    def keep(
        self, part: nn.Module, passes: tuple[str, ...], flights: tuple[tuple[int, int], ...]
    ) -> ModelPart:
        """Keep what is present in a part of the model: a stage of a pipeline."""
        names, whole = dict(part.named_parameters()), dict(self.outline.named_modules())
        paths = {
            path for path, module in part.named_modules() if type(module) is type(whole.get(path))
        }
        weights = tuple(  # copies: two parts on a rank are told apart by `id`
            replace(weight) for weight in self.weights if weight.name in names
        )
        calls = tuple(call for call in self.calls if call.path in paths)
        last = layout_of(self.outline).last in paths
        kept = tuple(a for a in self.kept if (last if a.path is None else a.path in paths))
        return replace(
            self, weights=weights, calls=calls, kept=kept, passes=passes, flights=flights
        )

    def calls_at(self, patterns: tuple[str, ...]) -> list[ModuleCall]:
        """Return the calls, in one micro-batch of each update, of modules at these layout paths."""
        paths = {path for path, _ in modules_at(self.outline, patterns)}
        return [call for call in self.calls if call.path in paths]

    @property
    def gradients(self) -> list[Weight]:
        """Return the weights that train, once for each update that finishes their gradients."""
        return [weight for weight in self.weights * self.trained if weight.ready is not None]

    @property
    def units(self) -> dict[str, list[Weight]]:
        """Return the weights by unit."""
        units: dict[str, list[Weight]] = defaultdict(list)
        for weight in self.weights:
            units[weight.unit].append(weight)
        return units

    @property
    def reached(self) -> set[int]:
        """Return the updates whose backward pass gives this part gradients."""
        return {call.update for call in self.calls if call.graded}

    def backwards(self, path: str) -> dict[int, int]:
        """Return how often backward ends in a module, by update.

        For each call, or once where no gradient goes further.
        """
        calls = [call for call in self.calls if call.path == path and call.graded]
        return {
            u: max(1, sum(c.returns for c in calls if c.update == u))
            for u in sorted({c.update for c in calls})
        }

    def passes_of(self, unit: str, micro_batches: int) -> tuple[str, ...]:
        """Return the passes over a unit's weights in a step, in order."""
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
        compute_bytes: of an element in products: of weights that fsdp gathers, queries and keys.
        reduce_bytes: of an element of a gradient that is summed over ranks.
        activation_bytes: of an element between layers.
        state_bytes: of the optimizer, for each element and for each parameter.
        place: the rank's coordinate on each axis.
        held: bytes of parameters, gradients and optimizer states, where an engine lays them out;
            None: the pieces have them.
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
        """Return the calls of modules at the paths that `role` picks from each model's layout."""
        return [
            call for piece in self.pieces for call in piece.calls_at(role(layout_of(piece.outline)))
        ]

    def map(self, change: Callable[[ModelPart], ModelPart]) -> Footprint:
        """Change every piece."""
        return replace(self, pieces=tuple(map(change, self.pieces)))

    @property
    def gradients(self) -> list[Weight]:
        """Return the gradients of all pieces."""
        return [weight for piece in self.pieces for weight in piece.gradients]

    def unit_gradients(self, parts: int, *, each: bool = False) -> list[int]:
        """Return the elements of a padded shard of each unit's gradients, each time it is reduced.

        That is in the backward pass of a step's last micro-batch, or with `each` of every one.
        """
        sizes = []
        for piece in self.pieces:
            for unit, weights in piece.units.items():
                size = sum(weight.padded(parts) for weight in weights if weight.ready is not None)
                times = sum(piece.backwards(unit).values()) * (self.micro_batches if each else 1)
                sizes += [size] * times if size else []
        return sizes


def chunk_shape(shape: Shape, dim: int, parts: int, index: int) -> Shape:
    """Return the shape of a part that `torch.chunk` cuts: the last may be smaller, or empty."""
    chunk = -(-shape[dim] // parts)
    return *shape[:dim], max(0, min(chunk, shape[dim] - index * chunk)), *shape[dim + 1 :]
