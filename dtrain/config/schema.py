"""The schema of a run's settings: types and ranges of its scalars. YAML has values and meanings.

A pluggable part is a node with a `_target_`; the constructor of that class is the node's schema.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any
from uuid import uuid4

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

# A range of a field's metadata: whether a value is within an end, and the refusal of one beyond.
RANGES: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "names": (lambda value, names: value in names, "is unknown: use {}"),
    "least": (operator.ge, "must be at least {}"),
    "above": (operator.gt, "must be more than {}, or null: none"),
    "most": (operator.le, "must be at most {}"),
}


def at_least(least: float) -> Any:
    """Declare a required number of at least `least`."""
    return field(default=MISSING, metadata={"least": least})


def above(bound: float) -> Any:
    """Declare a required number of more than `bound`."""
    return field(default=MISSING, metadata={"above": bound})


def between(least: float, most: float) -> Any:
    """Declare a required number from `least` to `most`."""
    return field(default=MISSING, metadata={"least": least, "most": most})


def one_of(*names: str) -> Any:
    """Declare a required name out of a few."""
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


@dataclass
class Planned(Config):
    """A run that is only planned: what it would cost on so many ranks."""

    world_size: int | None = at_least(1)
    global_batch_size: int = at_least(0)


def register() -> None:
    """Make the schemas known to Hydra: for `train.yaml`, and for what other commands add to it.

    Register `${token:}` too, by which the default folders of two runs differ.
    """
    store = ConfigStore.instance()
    store.store("schema", Config)
    store.store("compare_schema", Comparison)
    store.store("info_schema", Planned)
    OmegaConf.register_new_resolver("token", lambda: uuid4().hex[:6], use_cache=True, replace=True)


def validated(config: DictConfig) -> Config:
    """Return the composed configuration, resolved, with every range checked.

    One that was composed before (a run's own `.hydra/config.yaml`) has lost its schema and gets it
    again.

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
    """Refuse keys that a schema does not have: Hydra's + adds them all the same.

    The keys of a group are its constructor's to check.

    Raises:
        ValueError: names the key in full, and those beside it.
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
        name, value = prefix + item.name, getattr(node, item.name)
        if is_dataclass(value):
            _check_ranges(value, f"{name}.")
        elif value == MISSING:  # taken away by ~
            raise ValueError(f"{name} has no value: set {name}=…")
        elif value is not None and (fault := _beyond_range(value, item.metadata)):
            raise ValueError(f"{name}={value} {fault}")


def _beyond_range(value: Any, ends: Mapping[str, Any]) -> str:
    """Return what is wrong with a value by its field's range; empty: nothing."""
    if isinstance(value, float) and not math.isfinite(value) and "above" not in ends:
        return "must be a finite number"
    for name, end in ends.items():
        within, refusal = RANGES[name]
        if not within(value, end):
            return refusal.format(", ".join(end) if name == "names" else end)
    return ""
