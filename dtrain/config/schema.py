"""The schema of a run's scalars, with their types and ranges; their values and meanings stand in
YAML.

Everything pluggable is a node with a `_target_`; the constructor of that class is its schema.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from uuid import uuid4

from hydra import compose
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from dtrain.config.aliases import RENAMED
from dtrain.config.constructor import arguments as given_by
from dtrain.config.constructor import imported, misfit, named
from dtrain.config.secret import masked_setting

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
T = TypeVar("T")
LARGEST = 10**12  # a whole number of a class's


def at_least(least: float) -> Any:
    """A required number of at least `least`."""
    return field(default=MISSING, metadata={"least": least})


def above(bound: float) -> Any:
    """A required number of more than `bound`."""
    return field(default=MISSING, metadata={"above": bound})


def between(least: float, most: float) -> Any:
    """A required number from `least` to `most`."""
    return field(default=MISSING, metadata={"least": least, "most": most})


def one_of(*names: str) -> Any:
    """A required name out of a few."""
    return field(default=MISSING, metadata={"names": names})


@dataclass
class Launch:
    nproc: int = at_least(1)
    threads: int | None = at_least(1)
    timeout_s: float = at_least(1)


@dataclass
class Eval:
    every: int = at_least(0)
    batches: int = at_least(1)


@dataclass
class Checkpoint:
    every: int = at_least(0)
    last: bool = MISSING
    keep_last: int = at_least(1)
    asynchronous: bool = MISSING
    fallback: bool = MISSING


@dataclass
class LRSchedule:
    warmup_steps: int = at_least(0)
    min_lr_ratio: float = between(0, 1)


@dataclass
class Measure:
    skip_steps: int = at_least(0)
    peak_flops: float | None = at_least(1)


@dataclass
class MissedCollective:
    rank: int | None = at_least(0)
    step: int = at_least(1)


@dataclass
class Straggler:
    rank: int | None = at_least(0)
    factor: float = at_least(1)


@dataclass
class Inject:
    missed_collective: MissedCollective = field(default_factory=MissedCollective)
    straggler: Straggler = field(default_factory=Straggler)


@dataclass
class Config:
    """A run. Groups are free-form; `configs/train.yaml` says what each scalar does."""

    strategy: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    launch: Launch = field(default_factory=Launch)

    steps: int = at_least(1)
    seed: int = at_least(0)
    device: str = one_of("auto", "cpu", "cuda")
    dtype: str = one_of("fp32", "bf16", "fp64")
    global_batch_size: int = at_least(1)
    micro_batch_size: int | None = at_least(1)
    seq_len: int | None = at_least(1)
    clip_norm: float | None = above(0)
    activation_checkpointing: bool = MISSING
    compile: bool = MISSING
    profile: bool = MISSING
    probe: bool = MISSING
    resume: str | None = MISSING
    init_from: str | None = MISSING
    overwrite: bool = MISSING

    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    lr_schedule: LRSchedule = field(default_factory=LRSchedule)
    measure: Measure = field(default_factory=Measure)
    inject: Inject = field(default_factory=Inject)


@dataclass
class Comparison(Config):
    """Several runs that differ in their strategy alone."""

    strategies: list[str] = MISSING
    baseline: str = MISSING
    world_sizes: list[int] | None = MISSING
    scaling: str = one_of("strong", "weak")
    repeats: int = at_least(1)


def register() -> None:
    """Make the schemas known to Hydra: the base of `configs/train.yaml`, and what `compare.yaml`
    adds.

    And `${token:}`, by which the default folders of two runs differ.
    """
    store = ConfigStore.instance()
    store.store("schema", Config)
    store.store("compare_schema", Comparison)
    OmegaConf.register_new_resolver("token", lambda: uuid4().hex[:6], use_cache=True, replace=True)


def options(group: str) -> list[str]:
    """The names that a group has to choose from."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def check_axes(names: list[str]) -> None:
    """Refuse strategies of one axis in a list, which Hydra would merge into one that nobody has
    asked for.
    """
    holders: dict[str, str] = {}
    for name in names if len(names) > 1 else ():
        for axis in compose(f"strategy/{name}").get("strategy", {}):
            if axis in holders:
                raise ValueError(
                    f"{holders[axis]} and {name} both want the axis {axis}: choose one of them"
                )
            holders[axis] = name


def validated(config: DictConfig) -> Config:
    """The composed configuration, resolved, with every range checked.

    One that was composed before, a run's own `.hydra/config.yaml`, has lost its schema: it is given
    it again.

    Raises:
        ValueError: a key that nothing reads, no value, or one out of its range.
    """
    if OmegaConf.get_type(config) is dict:
        schema = Comparison if "strategies" in config else Config
        config = OmegaConf.merge(OmegaConf.structured(schema), config)  # type: ignore[assignment]
    refuse_unknown(config)
    run = OmegaConf.to_object(config)
    assert isinstance(run, Config)
    _check_ranges(run, "")
    return run


def refuse_unknown(node: DictConfig, prefix: str = "") -> None:
    """Refuse keys that a schema has not: Hydra's + adds them all the same. A group is its
    constructor's to check.

    Raises:
        ValueError: names the key in full, and those that there are beside it.
    """
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return
    known = [item.name for item in fields(schema)]
    for key in map(str, node):
        if prefix + key == "hydra.env":  # Hydra's own, of no schema
            continue
        if key not in known:
            raise ValueError(f"unknown key {prefix + key!r}: beside it are {', '.join(known)}")
        if OmegaConf.is_dict(child := node._get_node(key)):
            assert isinstance(child, DictConfig)
            refuse_unknown(child, f"{prefix}{key}.")


def _check_ranges(node: Any, prefix: str) -> None:
    for item in fields(node):
        name, value, rule = prefix + item.name, getattr(node, item.name), item.metadata
        if is_dataclass(value):
            _check_ranges(value, f"{name}.")
        elif isinstance(value, str) and value == MISSING:  # taken away by ~
            raise ValueError(f"{name} has no value: set {name}=…")
        elif value is None:
            continue
        elif isinstance(value, float) and not math.isfinite(value) and "above" not in rule:
            raise ValueError(f"{name}={value} must be a finite number")
        elif "names" in rule and value not in rule["names"]:
            raise ValueError(f"{name}={value} is unknown: use {', '.join(rule['names'])}")
        elif "least" in rule and not value >= rule["least"]:
            raise ValueError(f"{name}={value} must be at least {rule['least']}")
        elif "above" in rule and not value > rule["above"]:
            raise ValueError(f"{name}={value} must be more than {rule['above']}, or null: none")
        elif "most" in rule and not value <= rule["most"]:
            raise ValueError(f"{name}={value} must be at most {rule['most']}")


def build(
    node: Mapping[str, Any],
    kind: type[T],
    where: str,
    *,
    parts: tuple[type, ...] = (),
    **arguments: Any,
) -> T:
    """An instance of the node's `_target_`, which must be a subclass of `kind`.

    So that a configuration can name classes of the right kind and nothing else; nodes within it
    must name subclasses of one of `parts`.

    Raises:
        ValueError: no such class, one of another kind, or arguments that it refuses: its own words,
            and the key.
    """
    target = _check_target(node, (kind,), where)
    _check_nested(node, parts, where)
    _check_arguments(target, given_by(node), arguments, where)
    made: T = _built({**node, "_partial_": False}, where, **arguments)
    return made


def _built(node: Any, where: str, **more: Any) -> Any:
    """What was checked, as it stands: nothing is resolved again, so that no text becomes an
    interpolation.
    """
    if isinstance(node, list):
        return [_built(each, f"{where}.{number}") for number, each in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    within = {name: _built(child, f"{where}.{name}") for name, child in node.items()}
    if "_target_" not in node:
        return within
    target, positional = imported(node["_target_"], f"{where}._target_"), within.get("_args_", [])
    if node.get("_recursive_") is False:
        within = dict(node)
    try:
        made = partial(target, *positional, **given_by(within), **more)
        return made if node.get("_partial_") else made()
    except (MemoryError, OSError):  # of the machine's
        raise
    except Exception as error:  # of a user's class: it may fail in any way
        raise named(error, node, where, [item.name for item in fields(Config)]) from error


def _check_nested(node: Any, parts: tuple[type, ...], where: str) -> None:
    children = node.items() if isinstance(node, Mapping) else enumerate(node)
    for name, child in children:
        if isinstance(child, Mapping) and "_target_" in child:
            found = _check_target(child, parts, f"{where}.{name}")
            _check_arguments(found, given_by(child), {}, f"{where}.{name}")
        if isinstance(child, Mapping | list):
            _check_nested(child, parts, f"{where}.{name}")


def _check_arguments(target: type, given: dict[str, Any], more: dict[str, Any], where: str) -> None:
    """Names and plain types of what a constructor is given, as far as its signature tells them."""
    try:
        signature(target).bind(**given, **more)
    except TypeError as error:
        name = next((name for name in given if f"{error}".endswith(f"argument '{name}'")), "")
        now = RENAMED.get(f"{where}.{name}", "")
        raise ValueError(f"{where}: {error}{f': here it is {now}' if now else ''}") from None
    hints: dict[str, Any] = {}
    with suppress(NameError):  # of what is imported for types alone
        hints = get_type_hints(getattr(target, "__init__"))  # noqa: B009  mypy forbids the plain form
    for name, value in more.items():
        kind = hints.get(name)
        if isinstance(kind, type) and kind is not Any and not isinstance(value, kind):
            called = getattr(value, "name", value)
            raise ValueError(
                f"{where} {target.__name__} takes {kind.__name__}, and {name}={called} are "
                f"{type(value).__name__}: choose other {name} (docs/tasks.md)"
            )
    for name, value in given.items():
        _check_number(value, f"{where}.{name}", target)
        if wanted := misfit(value, hints.get(name, object)):
            said = "" if isinstance(value, list) else f", not {type(value).__name__}"
            raise ValueError(f"{masked_setting(f'{where}.{name}', value)} must be {wanted}{said}")


def _check_number(value: Any, name: str, target: type) -> None:
    """Refuse what no class of ours or torch's has a use for: an author's own may."""
    if target.__module__.partition(".")[0] in ("dtrain", "torch") and type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number")
        if abs(value) > LARGEST and type(value) is int:
            raise ValueError(f"{name}={value} is larger than {LARGEST:,}")


def _check_target(node: Any, kinds: tuple[type, ...], where: str) -> type:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        raise ValueError(f"{where} has no _target_: nothing says what to build")
    wanted = " or ".join(kind.__name__ for kind in kinds) or "part of it"
    found = imported(target, f"{where}._target_={target}", wanted)
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise ValueError(f"{where}._target_={target} is not a {wanted}")
    return found
