"""The contract between models and strategies: what a model says of itself.

A model declares one `Layout`; a strategy reads it. Neither imports the other, so a new model works
with every strategy and a new strategy with every model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ModelFactory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Layout:
    """Module paths of a model by their role; `*` stands for any block.

    Args:
        first: the module that turns the batch into activations (a pipeline's entry).
        blocks: the container of repeated blocks: units of sharding, recomputation and pipeline
            stages. Each takes and returns activations of one shape.
        last: the module that turns activations into outputs (a pipeline's exit).
        column: linear layers that may be split by output features (heads, hidden units). The module
            that holds them passes its input to nothing else.
        row: linear layers that may be split by input features; each follows a `column` layer.
        vocabulary: embeddings that may be split by rows, and linear layers whose outputs are the
            logits.
        attention: within a block, the module that mixes positions, (q, k, v) -> y, each (B, H, T,
            D). It has the attributes `causal` and `dropout`.
        experts: within a block, the module whose parameters stack its experts on dim 0: (x, counts)
            -> y, where x (N, C) is sorted by expert and counts (E,) has each expert's rows.
        hidden: names of the experts' parameters, with the dim of their hidden units.
        sizes: attributes of the model that the number of ranks of `column` and `row` must divide.
    """

    first: str = ""
    blocks: str = ""
    last: str = ""
    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    attention: str = ""
    experts: str = ""
    hidden: tuple[tuple[str, int], ...] = ()
    sizes: tuple[str, ...] = ()


class StepAware:
    """A base of modules that act before and after a step, such as to balance experts."""

    def before_step(self, scale: Tensor) -> None:
        """Act before the step's first forward; `scale` is the factor on each of its losses."""

    def after_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """Act after the optimizer's step.

        Args:
            total: sums over the ranks that saw different data. Collective: every rank calls it.
        """


def layout_of(model: nn.Module) -> Layout:
    """Return the model's `layout`, or an empty one: then strategies take the model as one piece."""
    layout = getattr(model, "layout", None)
    return layout if isinstance(layout, Layout) else Layout()


def offers(model: nn.Module | None, method: str) -> bool:
    """Return whether the model's class has a method; weights and modules of that name are none."""
    return callable(getattr(type(model), method, None))


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def check_layout(model: nn.Module) -> None:
    """Raise ValueError for a layout that is no `Layout`, or that names a missing module."""
    name, layout = type(model).__name__, getattr(model, "layout", None)
    if isinstance(layout, Mapping):
        raise ValueError(
            f"the layout of {name} is a {type(layout).__name__}: write Layout(…), of "
            f"dtrain.model.layout"
        )
    layout = layout_of(model)
    singles = {
        key: (path,) for key in ("first", "blocks", "last") if (path := getattr(layout, key))
    }
    several = {key: getattr(layout, key) for key in ("column", "row", "vocabulary")}
    for key, paths in (several | singles).items():
        if not (isinstance(paths, tuple | list) and all(isinstance(path, str) for path in paths)):
            raise ValueError(
                f"layout.{key} of {name} is {paths!r}: write names in a tuple, such as "
                f"('blocks.*.up',)"
            )
        # some modules of our layouts exist in some settings only
        for path in () if is_ours(model) else paths:
            if next(modules_at(model, (path,)), None) is None:
                raise ValueError(
                    f"layout.{key} of {name} names {path!r}, and there is no such module: it "
                    f"has {_children(model)}"
                )
    if is_ours(model):
        return
    if layout.blocks and not isinstance(blocks := model.get_submodule(layout.blocks), CONTAINERS):
        raise ValueError(
            f"layout.blocks of {name} names {layout.blocks!r}, which is a "
            f"{type(blocks).__name__}: name a ModuleList, ModuleDict or Sequential of blocks"
        )
    for key in ("attention", "experts"):
        path = getattr(layout, key)
        if path and next(modules_at(model, (f"{layout.blocks}.*.{path}",)), None) is None:
            raise ValueError(
                f"layout.{key} of {name} names {path!r}, and no block has such a module: it "
                f"has {_children(*blocks_of(model)[:1])}"
            )


def _children(*modules: nn.Module) -> str:
    return ", ".join(name for module in modules for name, _ in module.named_children())


def is_ours(model: nn.Module) -> bool:
    """Return whether dtrain defines the class, or the one `fully_shard` has derived it from."""
    modules = (kind.__module__ for kind in type(model).__mro__)
    own = next(module for module in modules if not module.startswith("torch.distributed."))
    return own.split(".")[0] == "dtrain"


def is_foreign(model: nn.Module) -> bool:
    """Return whether a user's code or `transformers` computes the model."""
    return not is_ours(model) or hasattr(model, "original")


class Absent(nn.Module):
    """A stand-in for a module that another rank has: returns its first argument."""

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return x


def modules_at(model: nn.Module, patterns: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the full names and modules at these paths that are present on this rank."""
    wanted = [re.compile(re.escape(pattern).replace(r"\*", r"[^.]+")) for pattern in patterns]
    for name, module in model.named_modules():
        if not isinstance(module, Absent) and any(pattern.fullmatch(name) for pattern in wanted):
            yield name, module


def holders(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of the modules that directly hold these, in order, each once."""
    return tuple(dict.fromkeys(path.rpartition(".")[0] for path in paths))


def experts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the full names and modules of the blocks' experts."""
    layout = layout_of(model)
    if not layout.experts:
        return []
    return list(modules_at(model, (f"{layout.blocks}.*.{layout.experts}",)))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks on this rank, in order; none if the layout names none."""
    path = layout_of(model).blocks
    return list(model.get_submodule(path).children()) if path else []


def shared_names(model: nn.Module) -> dict[str, str]:
    """Return the further names of parameters with several names, with their first names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in names if name != first[id(parameter)]}


def attributes_set(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return attributes that a user has set on parameters, by their names; optimizers read them."""
    every = model.named_parameters(remove_duplicate=False)
    return {name: dict(vars(parameter)) for name, parameter in every if vars(parameter)}


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set such attributes on the parameters that now have the names; they may be new objects."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for key, value in attributes.get(name, {}).items():
            setattr(parameter, key, value)


def refuse_written_tensors(model: nn.Module, where: str) -> None:
    """Raise ValueError for tensors on parameters, which would not be cut with the parameters."""
    for name, attributes in attributes_set(model).items():
        for key, value in attributes.items():
            if isinstance(value, Tensor) and value.numel() > 1:
                raise ValueError(
                    f"{name}.{key} of {type(model).__name__} is a tensor on a parameter, of which "
                    f"{where} gives a rank a part: use strategy=ddp or allreduce, or write a number"
                )


def refuse_complex(model: nn.Module, where: str) -> None:
    """Raise ValueError for complex weights, where weights are sent together in one format."""
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"{name} of {type(model).__name__} is complex, and {where} joins weights in one "
                f"format: use strategy=ddp, or a real parameter and torch.view_as_complex"
            )


def has_gradient_hook(parameter: nn.Parameter) -> bool:
    """Return whether a hook acts on the gradient as soon as there is one."""
    return bool(
        parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    )


def refuse_gradient_hooks(model: nn.Module) -> None:
    """Raise ValueError for hooks on gradients: they would see a part of them, or be lost."""
    for name, parameter in model.named_parameters():
        if has_gradient_hook(parameter):
            raise ValueError(
                f"{name} of {type(model).__name__} has a hook on its gradient, which would get a "
                f"part of it: change what flows back in `forward` instead "
                f"(torch.autograd.Function), or use one process without micro-batches"
            )


def refuse_unsaved(model: nn.Module) -> None:
    """Raise ValueError for what checkpoints cannot hold: a run would fail, or resume without it."""
    name = type(model).__name__
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{path or 'the whole'} of {name} keeps an extra state (get_extra_state), and "
                f"checkpoints have weights and buffers alone: keep it in a buffer"
            )
        kept = {
            n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set
        }
        for key, tensor in (module._parameters | kept).items():
            if tensor is not None and (
                tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized
            ):
                place = f"{path}.{key}".strip(".")
                kind = str(tensor.dtype if tensor.is_quantized else tensor.layout)
                kind = "nested" if tensor.is_nested and not tensor.is_quantized else kind
                raise ValueError(
                    f"{place} of {name} is {kind.removeprefix('torch.')}, and checkpoints have "
                    f"plain tensors alone: make it a dense one, or persistent=False"
                )


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise ValueError for norms whose statistics would be wrong where rows are divided.

    They would be those of a part of the rows, or count some rows twice.
    """
    for module in model.modules():
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        instance = (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        )
        # which a user keeps in evaluation
        frozen = not module.training and getattr(module, "running_mean", None) is not None
        if (batch or instance) and not frozen:
            kind = "batch norm" if batch else "instance norm with running statistics"
            raise ValueError(
                f"{type(model).__name__} has {kind}, whose statistics would be those of one "
                f"rank's part of the batch, or of a micro-batch: use GroupNorm or LayerNorm, or "
                f"one process without micro-batches and recomputation"
            )


def sequence_length(model: nn.Module | None, seq_len: int | None) -> int:
    """Return `seq_len`, or if it is None the longest sequence that the model takes (`context`).

    Raises:
        ValueError: it is longer than the model's context, or both are unknown.
    """
    context = getattr(model, "context", None)
    # a user's module may have this name
    context = context if isinstance(context, int) else None
    if seq_len is None and context is None:
        raise ValueError("the model does not say its context: set seq_len")
    if seq_len and context and seq_len > context:
        raise ValueError(
            f"seq_len={seq_len} is longer than the model's context={context}: use at most "
            f"{context}, or set model.context"
        )
    return int(seq_len or context or 0)


def multiples(number: int, parts: int) -> str:
    """Return the nearest multiples of `parts` below and above `number`, for an error's remedy."""
    below = number // parts * parts
    return " or ".join(str(each) for each in (below, below + parts) if each)


def divisors(number: int) -> str:
    """Return the divisors of `number`, for an error's remedy."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
