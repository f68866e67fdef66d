"""What the ranks along an axis compute together, computed in one process: what the probe compares
with the whole model.

    split    n copies of the rows; a copy has its slice of what `column` layers give, a
             `row` layer reads them all
    experts  each part of the experts by itself; what they give is joined

B rows, T tokens, n ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dtrain.config.user_code import error_in_words
from dtrain.model.layout import Layout, blocks_of, experts_of, holders, layout_of, modules_at

Forward = Callable[..., Tensor]
SPLIT = (
    "a `column` layer of its Layout must give each rank heads, or hidden units, of its own (two "
    "layers in one matrix do not: make them two), a `row` layer must read them, and what lies "
    "between must not look across them; or use a strategy on dp or fsdp"
)


@dataclass(frozen=True)
class Rehearsal:
    """Two ways to one result.

    Args:
        what: the second of them, for a person.
        whole, divided: take the model's inputs; their outputs must be equal.
        hint: what most often makes them differ, and what to do.
    """

    what: str
    whole: Forward
    divided: Forward
    hint: str


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules, with the same parameters and buffers: they take no memory again."""
    kept = (*model.parameters(), *model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in kept})


def refuse_foreign(piece: nn.Module, given: Tensor, output: Tensor, model: nn.Module) -> None:
    """Raise ValueError if a piece of a model has used a weight that is not its own: one that
    stands in a list, say.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {id(parameter) for parameter in piece.parameters()}
    if foreign := [
        names[i] for i in _leaves([output.grad_fn], {given.grad_fn}) if i in names and i not in own
    ]:
        raise ValueError(
            f"one of them uses {foreign[0]}, which another has: let them share it as a "
            f"parameter of both"
        )


def unit_by_unit(model: nn.Module) -> Forward:
    """The model whose blocks have their weights while they are called, and at no other time."""
    made = shared_copy(model)
    for block in blocks_of(made):
        present = dict(block.named_parameters(remove_duplicate=False))
        absent = {
            name: nn.Parameter(weight.to("meta"), requires_grad=False)
            for name, weight in present.items()
        }
        block.register_forward_pre_hook(
            lambda block, inputs, present=present: _give(block, present)
        )
        block.register_forward_hook(
            lambda block, inputs, output, absent=absent: _give(block, absent)
        )
        _give(block, absent)
    return made


def _give(block: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    for name, weight in weights.items():
        owner, _, key = name.rpartition(".")
        block.get_submodule(owner)._parameters[key] = weight


def split_on_ranks(model: nn.Module, n: int, sequence_parallel: bool) -> Rehearsal:
    """The model with its `column` and `row` layers on n ranks: their outputs stand below each
    other.
    """
    layout, made = layout_of(model), shared_copy(model)

    def copies(x: Tensor) -> list[Tensor]:
        return list(x.chunk(n))

    def own_features(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([x.chunk(n, -1)[rank] for rank, x in enumerate(copies(output))])

    def all_features(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.cat(copies(inputs[0]), -1).repeat(n, *[1] * (inputs[0].ndim - 1)), *inputs[1:]

    def own_tokens(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([x.chunk(n, 1)[rank] for rank, x in enumerate(copies(output))])

    def all_tokens(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict]:
        first = next(iter(named)) if not inputs else None
        x = inputs[0] if first is None else named[first]
        x = torch.cat(copies(x), 1).repeat(n, *[1] * (x.ndim - 1))
        return ((x, *inputs[1:]), named) if first is None else ((), {**named, first: x})

    for _, layer in modules_at(made, layout.column):
        layer.register_forward_hook(own_features)
    for _, layer in modules_at(made, layout.row):
        layer.register_forward_pre_hook(all_features)
    for _, experts in experts_of(made):
        experts.forward = _by_hidden(experts, dict(layout.hidden), n)
    if sequence_parallel:
        routers = holders(path for path, _ in experts_of(made))
        heads = [
            path
            for path, layer in modules_at(made, layout.vocabulary)
            if isinstance(layer, nn.Linear)
        ]
        columns = holders(path for path, _ in modules_at(made, layout.column))
        for path in {*columns, *routers, *heads}:
            made.get_submodule(path).register_forward_pre_hook(all_tokens, with_kwargs=True)
        for _, layer in modules_at(made, (layout.first, *layout.row, *routers)):
            layer.register_forward_hook(own_tokens)

    def whole(*inputs: Tensor) -> Tensor:
        return torch.cat([model(*inputs)] * n)

    def divided(*inputs: Tensor) -> Tensor:
        return made(*(x.repeat(n, *[1] * (x.ndim - 1)) for x in inputs))

    return Rehearsal(f"split over tp={n}", whole, divided, SPLIT)


def experts_on_ranks(model: nn.Module, n: int) -> Forward:
    """The model with its experts on n ranks, each with its own rows."""
    made = shared_copy(model)
    for _, experts in experts_of(made):
        experts.forward = _by_expert(experts, n)
    return made


def _by_hidden(experts: nn.Module, dims: dict[str, int], n: int) -> Forward:
    """The sum of what n ranks' hidden units give."""
    plain = shared_copy(experts)

    def forward(x: Tensor, counts: Tensor) -> Tensor:
        parts = (
            {
                name: getattr(plain, name).chunk(n, dim)[rank]
                for name, dim in dims.items()
                if getattr(plain, name, None) is not None
            }
            for rank in range(n)
        )
        return torch.stack([functional_call(plain, part, (x, counts)) for part in parts]).sum(0)

    return forward


def _by_expert(experts: nn.Module, n: int) -> Forward:
    """What n ranks' experts give for their own rows."""
    plain = shared_copy(experts)

    def forward(x: Tensor, counts: Tensor) -> Tensor:
        rows = x.split([int(part.sum()) for part in counts.chunk(n)])
        weights = dict(plain.named_parameters())
        parts = (
            {name: weight.chunk(n)[rank] for name, weight in weights.items()} for rank in range(n)
        )
        return torch.cat(
            [
                functional_call(plain, part, (mine, own))
                for part, mine, own in zip(parts, rows, counts.chunk(n), strict=True)
            ]
        )

    return forward


class Unmixed(nn.Module):
    """In the place of attention: what it gives for a token depends on that token's query, key
    and value alone.
    """

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.causal, self.dropout = core.causal, core.dropout

    # (B, H, T, D), 2 x (B, G, T, D) -> (B, H, T, D)
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return v + q.cos().sum(-1, keepdim=True) + k.sin().sum(-1, keepdim=True)


def parameters_between(model: nn.Module, run: Callable[[], Tensor]) -> set[str]:
    """Parameters that act on what `column` layers give before `row` layers read it: each rank uses
    them on a slice.

    Raises:
        DoesNotRun: the model fails.
        ValueError: one of them acts elsewhere too, so that its gradient is neither whole nor a sum
            of the ranks'; or the module that holds `column` layers gives its input to something
            else, or has weights before them: what they get there is a distributed tensor.
    """
    layout, seen = layout_of(model), _Seen()
    hooks = seen.hooks(model, layout)
    try:
        with torch.enable_grad():
            output = run()
    except Exception as error:  # of a user's model: it may fail in any way
        raise DoesNotRun(error_in_words(error)) from error
    finally:
        for hook in hooks:
            hook.remove()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reached = [names[i] for i in _leaves(seen.inside, seen.ends) if i in names]
    also = {
        names[i]
        for i in _leaves([*seen.outside, output.grad_fn], {*seen.inside, *seen.ends})
        if i in names
    }
    layers = [
        p
        for _, layer in modules_at(model, (*layout.column, *layout.row))
        for p in layer.parameters()
    ]
    found = set(reached) - {names[id(p)] for p in layers if id(p) in names}
    early = sorted(names[i] for i in _leaves(seen.outside, seen.begun) if i in names)
    _refuse_mixed(type(model).__name__, seen, early, sorted(found & also))
    return found


class DoesNotRun(Exception):
    """A user's model that fails; its text is that of the error."""


@dataclass
class _Seen:
    """Nodes of the graph of a forward pass: `inside` go into row layers, `outside` into column
    layers, whose results are the `ends`; `begun` are the inputs of the modules that hold column
    layers, `given` a mark on each such input and what the module gives.
    """

    inside: list[Any] = field(default_factory=list)
    outside: list[Any] = field(default_factory=list)
    ends: set[Any] = field(default_factory=set)
    begun: set[Any] = field(default_factory=set)
    given: dict[str, tuple[Tensor, list[Any]]] = field(default_factory=dict)

    def hooks(self, model: nn.Module, layout: Layout) -> list[Any]:
        """What looks at them as they come."""
        found: list[Any] = [
            layer.register_forward_hook(self._begins)
            for _, layer in modules_at(model, layout.column)
        ]
        found += [
            layer.register_forward_pre_hook(
                lambda module, inputs: self.inside.extend(x.grad_fn for x in inputs)
            )
            for _, layer in modules_at(model, layout.row)
        ]
        for path in holders(path for path, _ in modules_at(model, layout.column)):
            holder = model.get_submodule(path)
            found += [
                holder.register_forward_pre_hook(partial(self._marked, path), with_kwargs=True),
                holder.register_forward_hook(partial(self._gives, path)),
            ]
        return found

    def _begins(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.ends.add(output.grad_fn)
        self.outside.extend(x.grad_fn for x in inputs)

    def _marked(
        self, path: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        first = next(iter(named)) if not inputs else None
        x, mark = inputs[0] if first is None else named[first], torch.zeros((), requires_grad=True)
        self.given[path] = mark, []
        x = x + mark.to(x)
        self.begun.add(x.grad_fn)
        return ((x, *inputs[1:]), named) if first is None else ((), {**named, first: x})

    def _gives(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        self.given[path][1].extend(x.grad_fn for x in tensors if isinstance(x, Tensor))


def _refuse_mixed(name: str, seen: _Seen, early: list[str], both: list[str]) -> None:
    for path, (mark, outputs) in seen.given.items():
        if id(mark) in set(_leaves(outputs, seen.ends)):
            raise ValueError(
                f"{path or 'the whole'} of {name} holds `column` layers, and gives its input to "
                f"something else "
                f"besides (a residual, a gate): put them into a module of their own"
            )
    if early:
        raise ValueError(
            f"{early[0]} of {name} acts within the module that holds `column` layers, before "
            f"them: let it act "
            f"before that module"
        )
    if both:
        raise ValueError(
            f"{both[0]} of {name} acts on what tp divides, between `column` and `row` layers, "
            f"and on what it does not: give it two parameters, or use a strategy on dp or fsdp"
        )


def _leaves(starts: list[Any], ends: set[Any]) -> Iterator[int]:
    """The parameters, by their ids, that one comes to from some nodes of a graph without
    passing its ends.
    """
    seen, left = set(ends), [node for node in starts if node is not None and node not in ends]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield id(node.variable)
        left += [each for each, _ in node.next_functions if each is not None]
