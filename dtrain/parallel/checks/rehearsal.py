"""Compute in one process what the ranks along an axis would: the probe compares it with the whole.

    split    n copies of the rows; each copy keeps its slice of a `column` layer's output, and a
             `row` layer reads all slices
    experts  each rank's experts by themselves, and their outputs joined

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
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional, and named
SPLIT = (
    "a `column` layer of its Layout must give each rank heads, or hidden units, of its own (two "
    "layers in one matrix do not: make them two), a `row` layer must read them, and what lies "
    "between must not look across them; or use a strategy on dp or fsdp"
)


@dataclass(frozen=True)
class Rehearsal:
    """Two computations that must give the same.

    Args:
        what: names the divided one, in messages.
        whole, divided: take the model's inputs; their outputs must be equal.
        hint: what most often makes them differ, and the remedy.
    """

    what: str
    whole: Forward
    divided: Forward
    hint: str


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy the modules; parameters and buffers stay the same, and take no memory again."""
    shared = (*model.parameters(), *model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in shared})


def refuse_foreign(piece: nn.Module, given: Tensor, output: Tensor, model: nn.Module) -> None:
    """Raise ValueError if a piece of a model used another's weight, as from a list."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {id(parameter) for parameter in piece.parameters()}
    if foreign := [
        names[i] for i in _leaves([output.grad_fn], {given.grad_fn}) if i in names and i not in own
    ]:
        raise ValueError(
            f"one of them uses {foreign[0]}, which another has: let them share it as a parameter "
            "of both"
        )


def unit_by_unit(model: nn.Module) -> Forward:
    """Return the model; its blocks have their weights only while they are called."""
    copy = shared_copy(model)
    for block in blocks_of(copy):
        present = dict(block.named_parameters(remove_duplicate=False))
        absent = {
            name: nn.Parameter(weight.to("meta"), requires_grad=False)
            for name, weight in present.items()
        }
        block.register_forward_pre_hook(
            lambda block, inputs, present=present: _set_weights(block, present)
        )
        block.register_forward_hook(
            lambda block, inputs, output, absent=absent: _set_weights(block, absent)
        )
        _set_weights(block, absent)
    return copy


def _set_weights(block: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    for name, weight in weights.items():
        owner, _, key = name.rpartition(".")
        block.get_submodule(owner)._parameters[key] = weight


def split_on_ranks(model: nn.Module, n: int, sequence_parallel: bool) -> Rehearsal:
    """Rehearse `column` and `row` layers on n ranks, whose outputs are joined along the rows."""
    layout, copy = layout_of(model), shared_copy(model)

    def own_slice(dim: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([x.chunk(n, dim)[rank] for rank, x in enumerate(output.chunk(n))])

    def joined(dim: int, x: Tensor) -> Tensor:
        return torch.cat(x.chunk(n), dim).repeat(n, *[1] * (x.ndim - 1))

    def all_features(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return joined(-1, inputs[0]), *inputs[1:]

    def all_tokens(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
        return _change_first(partial(joined, 1), inputs, named)

    for _, layer in modules_at(copy, layout.column):
        layer.register_forward_hook(partial(own_slice, -1))
    for _, layer in modules_at(copy, layout.row):
        layer.register_forward_pre_hook(all_features)
    for _, experts in experts_of(copy):
        experts.forward = _by_hidden(experts, dict(layout.hidden), n)
    if sequence_parallel:
        routers = holders(path for path, _ in experts_of(copy))
        vocabulary = modules_at(copy, layout.vocabulary)
        heads = [path for path, layer in vocabulary if isinstance(layer, nn.Linear)]
        columns = holders(path for path, _ in modules_at(copy, layout.column))
        for path in {*columns, *routers, *heads}:
            copy.get_submodule(path).register_forward_pre_hook(all_tokens, with_kwargs=True)
        for _, layer in modules_at(copy, (layout.first, *layout.row, *routers)):
            layer.register_forward_hook(partial(own_slice, 1))

    def whole(*inputs: Tensor) -> Tensor:
        return torch.cat([model(*inputs)] * n)

    def divided(*inputs: Tensor) -> Tensor:
        outputs: Tensor = copy(*(x.repeat(n, *[1] * (x.ndim - 1)) for x in inputs))
        return outputs

    return Rehearsal(f"split over tp={n}", whole, divided, SPLIT)


def _change_first(
    change: Callable[[Tensor], Tensor], inputs: tuple[Any, ...], named: dict[str, Any]
) -> Arguments:
    """Change a module's first argument, which may be a named one."""
    if inputs:
        return (change(inputs[0]), *inputs[1:]), named
    first = next(iter(named))
    return (), {**named, first: change(named[first])}


def experts_on_ranks(model: nn.Module, n: int) -> Forward:
    """Return the model with its experts on n ranks, each with its own rows."""
    copy = shared_copy(model)
    for _, experts in experts_of(copy):
        experts.forward = _by_expert(experts, n)
    return copy


def _by_hidden(experts: nn.Module, dims: dict[str, int], n: int) -> Forward:
    """Return a forward that sums the outputs of n ranks' hidden units."""
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
    """Return a forward that joins the outputs of n ranks' experts for their own rows."""
    plain = shared_copy(experts)

    def forward(x: Tensor, counts: Tensor) -> Tensor:
        rows = x.split([int(part.sum()) for part in counts.chunk(n)])  # type: ignore[no-untyped-call]
        weights = dict(plain.named_parameters())
        parts = (
            {name: weight.chunk(n)[rank] for name, weight in weights.items()} for rank in range(n)
        )
        return torch.cat(
            [
                functional_call(plain, part, (part_rows, part_counts))
                for part, part_rows, part_counts in zip(parts, rows, counts.chunk(n), strict=True)
            ]
        )

    return forward


class Unmixed(nn.Module):
    """Stand in for attention: a token's output depends on its own query, key and value alone."""

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.causal, self.dropout = core.causal, core.dropout

    # (B, H, T, D), 2 x (B, G, T, D) -> (B, H, T, D)
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return v + q.cos().sum(-1, keepdim=True) + k.sin().sum(-1, keepdim=True)


def parameters_between(model: nn.Module, run: Callable[[], Tensor]) -> set[str]:
    """Return the names of parameters between `column` and `row` layers: ranks use them on slices.

    Raises:
        DoesNotRun: the model fails.
        ValueError: one of them acts elsewhere too, so that its gradient is neither whole nor a sum
            of the ranks'; or the module that holds `column` layers gives its input to something
            else, or has weights before them: they would get a distributed tensor there.
    """
    layout, graph = layout_of(model), _Graph()
    hooks = graph.hooks(model, layout)
    try:
        with torch.enable_grad():
            output = run()
    except Exception as error:  # user's code may raise anything
        raise DoesNotRun(error_in_words(error)) from error
    finally:
        for hook in hooks:
            hook.remove()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def reached_from(starts: list[Any], ends: set[Any]) -> set[str]:
        return {names[i] for i in _leaves(starts, ends) if i in names}

    inside = reached_from(graph.inside, graph.ends)
    elsewhere = reached_from([*graph.outside, output.grad_fn], {*graph.inside, *graph.ends})
    layers = modules_at(model, (*layout.column, *layout.row))
    between = inside - {names.get(id(p)) for _, layer in layers for p in layer.parameters()}
    early = reached_from(graph.outside, graph.begun)
    _refuse_mixed(type(model).__name__, graph, sorted(early), sorted(between & elsewhere))
    return between


class DoesNotRun(Exception):
    """A user's model fails; the text is that of its error."""


@dataclass
class _Graph:
    """Nodes of the autograd graph of a forward pass.

    Attributes:
        inside, outside: inputs of `row` layers; of `column` layers.
        ends: outputs of `column` layers.
        begun: inputs of the modules that hold `column` layers.
        given: by the path of such a module, a mark on its input, and its outputs.
    """

    inside: list[Any] = field(default_factory=list)
    outside: list[Any] = field(default_factory=list)
    ends: set[Any] = field(default_factory=set)
    begun: set[Any] = field(default_factory=set)
    given: dict[str, tuple[Tensor, list[Any]]] = field(default_factory=dict)

    def hooks(self, model: nn.Module, layout: Layout) -> list[Any]:
        """Set hooks that note them, and return the hooks."""
        hooks: list[Any] = [
            layer.register_forward_hook(self._note_column)
            for _, layer in modules_at(model, layout.column)
        ]
        hooks += [
            layer.register_forward_pre_hook(
                lambda module, inputs: self.inside.extend(x.grad_fn for x in inputs)
            )
            for _, layer in modules_at(model, layout.row)
        ]
        for path in holders(path for path, _ in modules_at(model, layout.column)):
            holder = model.get_submodule(path)
            hooks += [
                holder.register_forward_pre_hook(partial(self._mark_input, path), with_kwargs=True),
                holder.register_forward_hook(partial(self._note_outputs, path)),
            ]
        return hooks

    def _note_column(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.ends.add(output.grad_fn)
        self.outside.extend(x.grad_fn for x in inputs)

    def _mark_input(
        self, path: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> Arguments:
        mark = torch.zeros((), requires_grad=True)
        self.given[path] = mark, []

        def marked(x: Tensor) -> Tensor:
            x = x + mark.to(x)
            self.begun.add(x.grad_fn)
            return x

        return _change_first(marked, inputs, named)

    def _note_outputs(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        self.given[path][1].extend(x.grad_fn for x in tensors if isinstance(x, Tensor))


def _refuse_mixed(name: str, graph: _Graph, early: list[str], both: list[str]) -> None:
    for path, (mark, outputs) in graph.given.items():
        if id(mark) in set(_leaves(outputs, graph.ends)):
            raise ValueError(
                f"{path or 'the whole'} of {name} holds `column` layers, and gives its input to "
                "something else besides (a residual, a gate): put them into a module of their own"
            )
    if early:
        raise ValueError(
            f"{early[0]} of {name} acts within the module that holds `column` layers, before them: "
            "let it act before that module"
        )
    if both:
        raise ValueError(
            f"{both[0]} of {name} acts on what tp divides, between `column` and `row` layers, and "
            "on what it does not: give it two parameters, or use a strategy on dp or fsdp"
        )


def _leaves(starts: list[Any], ends: set[Any]) -> Iterator[int]:
    """Yield the ids of the parameters behind some nodes of a graph, not passing its `ends`."""
    seen, ahead = set(ends), [node for node in starts if node is not None and node not in ends]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield id(node.variable)
        ahead += [each for each, _ in node.next_functions if each is not None]
