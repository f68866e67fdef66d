"""What the scripts do with a composed configuration: train, compare, info."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dtrain.cli.ranks import start
from dtrain.compare import command as comparison
from dtrain.config.groups import check_axes
from dtrain.config.schema import Comparison, Planned, validated
from dtrain.config.secret import Asked, masked_override, printable, replayable
from dtrain.cost.model_size import model_size
from dtrain.launch.rank_processes import STOP_REQUESTS
from dtrain.launch.world import World
from dtrain.model import own
from dtrain.parallel.precision import Precision
from dtrain.report.console import show_model_size, show_plan_cost
from dtrain.run.assemble import model_factories, strategies_of
from dtrain.run.claim import RESUMABLE
from dtrain.run.planned import predicted_cost
from dtrain.run.run import run

# Settings of a comparison that its runs do not take over.
OF_A_COMPARISON = ("strategies", "strategy", "launch.nproc", "global_batch_size")


def train(config: DictConfig) -> float:
    """Train one model; return the validation loss, or else the loss, for a sweeper."""
    settings = validated(config)
    own.check_asked(settings.model, typed_settings())
    folder, name = Path(HydraConfig.get().runtime.output_dir), strategy_name()
    if name:
        check_axes(name.split("+"))
    else:  # a configuration without groups: by the files of its strategies
        names = [each.name or type(each).__name__ for each in strategies_of(settings)]
        name = "+".join(names) or "single"
    world = World.of_environment()
    if world is None and settings.launch.nproc > 1:
        summary = start(config, folder, name, _asked(config))
    else:
        summary = run(settings, world or World(), folder, name, _asked(config))
    if RESUMABLE in summary:
        # A sweep's other jobs are not to begin.
        if summary["interrupted"] or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise KeyboardInterrupt
        return math.nan
    loss: float = summary["loss"] if summary["val_loss"] is None else summary["val_loss"]
    return loss


def compare(config: DictConfig) -> None:
    """Run each strategy in ranks of its own, and write a report of them side by side."""
    if World.of_environment():
        raise ValueError(
            "compare starts its own ranks: call it with `python` and launch.nproc, not under "
            "torchrun"
        )
    hydra_config = HydraConfig.get()
    if hydra_config.job.config_name != "compare":  # each run is composed anew, of compare.yaml
        raise ValueError(
            f"compare takes no other configuration than its own, and --config-name is "
            f"{hydra_config.job.config_name}: give its settings as key=value"
        )
    settings = validated(config)
    assert isinstance(settings, Comparison)
    typed = typed_settings()
    own.check_asked(settings.model, typed)
    shared = [word for word in typed if word.split("=")[0] not in OF_A_COMPARISON]

    def configure(overrides: list[str]) -> DictConfig:
        composed = compose("compare", overrides=[*shared, *overrides])
        check_axes(overrides[0].removeprefix("strategy=").strip("[]").split(","))
        # Whether to overwrite is decided once, for the comparison's folder.
        composed.overwrite, composed.profile = True, comparison.is_profiled(settings)
        if not composed.profile and not any(w.startswith("measure.skip_steps=") for w in typed):
            composed.measure.skip_steps = min(composed.measure.skip_steps, composed.steps - 1)
        composed.checkpoint.last = False
        # The page has the pictures.
        composed.logger = {"files": {"_target_": "dtrain.report.files.Files", "pictures": False}}
        return composed

    def run_one(config: DictConfig, folder: Path, name: str) -> dict[str, Any]:
        if STOP_REQUESTS:
            raise KeyboardInterrupt
        summary = start(config, folder, name, output=folder / "printed")
        if RESUMABLE in summary:  # a signal has asked for the end of all runs
            raise KeyboardInterrupt
        return summary

    folder = Path(hydra_config.runtime.output_dir)
    choices = dict(hydra_config.runtime.choices)
    comparison.compare(settings, typed, choices, folder, configure, run_one)


def info(config: DictConfig) -> None:
    """Print each model's size; with `world_size`, what the plan costs its ranks."""
    settings = validated(config)
    assert isinstance(settings, Planned)
    own.check_asked(settings.model, typed_settings())
    if settings.world_size:
        show_plan_cost(predicted_cost(settings, settings.world_size))
        return
    if strategies := [word for word in typed_settings() if word.startswith("strategy=")]:
        raise ValueError(
            f"{strategies[-1]} is a plan for several ranks: say for how many, world_size=8"
        )
    precision = Precision.of(settings.dtype, settings.precision)
    for name, factory in model_factories(settings).items():
        show_model_size(name, model_size(factory, precision, settings.seq_len))


def typed_settings() -> list[str]:
    """Return the job's settings as they were typed, with interpolations left in."""
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    return list(words)


def strategy_name() -> str:
    """Return the strategy's name as typed, `[replicate,fsdp]` as `replicate+fsdp`; empty: none."""
    asked = [o.removeprefix("strategy=") for o in typed_settings() if o.startswith("strategy=")]
    choice = asked[-1] if asked else str(HydraConfig.get().runtime.choices.get("strategy", ""))
    return "+".join(part.strip() for part in choice.strip("[]").split(","))


def _asked(config: DictConfig) -> Asked:
    """Return what may be written down of a job: the run writes it, once the folder is its own."""
    hydra_config: Any = HydraConfig.instance().cfg
    overrides = [*map(masked_override, typed_settings())]
    parts = {
        "config.yaml": replayable(config),
        "hydra.yaml": replayable(hydra_config),
        "overrides.yaml": overrides,
    }
    files = {name: OmegaConf.to_yaml(part) for name, part in parts.items()}
    return Asked(printable(config), files)
