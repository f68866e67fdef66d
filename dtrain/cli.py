"""The command line: Hydra's, with one clear line for a user's mistake.

Under torchrun every rank composes the configuration; rank 0 alone gets a run's folder and speaks.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dtrain import capabilities
from dtrain.compare import compare as run_all
from dtrain.config import CONFIGS, Comparison, Config, check_axes, checked, register
from dtrain.info import info as count
from dtrain.job import assemble, model_factories
from dtrain.launch import RanksFailed, World, spawn
from dtrain.mistakes import BROKEN_OFF, MISTAKES, explain
from dtrain.precision import Precision
from dtrain.report.console import show
from dtrain.run import run

# What a script does at a word, before there is a configuration: `python scripts/info.py capabilities`.
WORDS: dict[str, dict[str, Callable[[], None]]] = {
    "info": {"capabilities": capabilities.show, "readme": capabilities.write}
}
USAGE = 2  # exit status for a mistake of the user's
FAILED = 1  # and for a run that broke off
INTERRUPTED = 130
GRACE_S = 3.0  # how long other ranks leave to rank 0 to say what is wrong, before torchrun stops it for their exit


def main(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run `task` with the configuration that the command line composes; exit with a line for each mistake."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on; they are said in one line here
    register()
    if word := WORDS.get(config_name, {}).get(" ".join(sys.argv[1:])):
        with _explaining(config_name):
            return word()
    world = _world()
    if world and world.rank:
        _be_silent()
    if world and any(arg in ("-m", "--multirun") for arg in sys.argv[1:]):
        _exit(
            "--multirun starts its own ranks: call it with `python` and launch.nproc, not under torchrun",
            USAGE,
        )

    def guarded(config: DictConfig) -> Any:
        with _explaining(config_name):
            return task(config)

    with _explaining(config_name):
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(guarded)()


def train(config: DictConfig) -> float:
    """The job of `scripts/train.py`: returns the validation loss (or else the loss) for a sweeper."""
    settings = checked(config)
    folder, name = Path(HydraConfig.get().runtime.output_dir), strategy_name()
    check_axes(name.split("+"))
    world = World.of_environment()
    if world is None and settings.launch.nproc > 1:
        summary = start(config, folder, name)
    else:
        summary = run(settings, world or World(), folder, name)
    return summary["loss"] if summary["val_loss"] is None else summary["val_loss"]


def compare(config: DictConfig) -> None:
    """The job of `scripts/compare.py`: one run for each strategy, in ranks of its own."""
    if World.of_environment():
        raise ValueError("compare starts its own ranks: call it with `python` and launch.nproc, not under torchrun")
    settings = checked(config)
    assert isinstance(settings, Comparison)
    runtime = HydraConfig.get().overrides
    own = [o for o in runtime.task if o.split("=")[0] not in ("strategies", "baseline", "strategy")]

    def configure(name: str) -> DictConfig:
        choice = f"[{name.replace('+', ',')}]" if "+" in name else name
        composed = compose("compare", overrides=[*own, f"strategy={choice}"])
        check_axes(name.split("+"))
        composed.logger = {"files": {"_target_": "dtrain.report.files.Files"}}  # the table is the console here
        if not composed.strategy:
            composed.launch.nproc = 1
        return composed

    configs = {name: configure(name) for name in [settings.baseline, *settings.strategies]}
    folder = Path(HydraConfig.get().runtime.output_dir)
    rows = run_all(list(configs), settings.steps, folder, lambda name, place: start(configs[name], place, name))
    if any(row.failed for row in rows):
        sys.exit(FAILED)


def start(config: DictConfig, folder: Path, name: str) -> dict[str, Any]:
    """Start `launch.nproc` ranks for a configuration; returns the summary.

    Raises:
        ValueError: a mistake that can be known before any rank is started.
        RanksFailed: a rank ended with an error.
    """
    settings = checked(config)
    nproc = settings.launch.nproc
    assemble(settings, World(0, nproc, 0, nproc))
    plain = OmegaConf.to_yaml(config, resolve=True)
    return spawn(_rank, type(settings), plain, folder, name, nproc=nproc, port=settings.launch.port)


def _rank(schema: type[Config], plain: str, folder: Path, name: str) -> dict[str, Any]:
    """What a rank that `start` has started does."""
    world = World.of_environment()
    assert world is not None
    with _explaining("train"):
        config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(plain))
        assert isinstance(config, DictConfig)
        try:
            return run(checked(config), world, folder, name)
        except MISTAKES:
            raise
        except Exception:  # ours: the launcher would keep the traceback to itself
            traceback.print_exc()
            sys.exit(FAILED)


def info(config: DictConfig) -> None:
    """The job of `scripts/info.py`."""
    settings = checked(config)
    precision = Precision(compute=settings.dtype, **settings.precision)
    for name, factory in model_factories(settings).items():
        show(name, count(factory, precision, settings.seq_len))


def strategy_name() -> str:
    """The strategy as it was asked for: `[replicate,fsdp]` is said `replicate+fsdp`."""
    hydra_config = HydraConfig.get()
    asked = [o.removeprefix("strategy=") for o in hydra_config.overrides.task if o.startswith("strategy=")]
    choice = asked[-1] if asked else str(hydra_config.runtime.choices["strategy"])
    return "+".join(part.strip() for part in choice.strip("[]").split(","))


@contextmanager
def _explaining(config_name: str) -> Iterator[None]:
    """End the process with one line for a mistake. Inside the job too: Hydra says more of an error than that."""
    try:
        yield
    except MISTAKES as error:
        _exit(explain(error, config_name), FAILED if isinstance(error, BROKEN_OFF) else USAGE)
    except RanksFailed as error:
        if error.status > 0:  # the rank that failed has said why
            sys.exit(error.status)
        _exit(str(error), FAILED)
    except KeyboardInterrupt:
        _exit("interrupted", INTERRUPTED)


def _world() -> World | None:
    try:
        return World.of_environment()
    except ValueError as error:
        _exit(str(error), USAGE)


def _be_silent() -> None:
    """On ranks but 0: Hydra makes no folder and writes no log, and what it prints is rank 0's to print."""
    kept = [argument for argument in sys.argv[1:] if not argument.startswith("hydra.run.dir=")]
    sys.argv[1:] = ["hydra.run.dir=.", "hydra.output_subdir=null", *kept]
    if any(a in ("-h", "--help", "--hydra-help", "--version", "--info", "-i", "-c", "--cfg") for a in sys.argv[1:]):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def _exit(line: str, status: int) -> NoReturn:
    """Say the line once, and end: on rank 0, or on another that rank 0 does not end before."""
    rank = int(os.environ.get("RANK", 0))
    if os.environ.get("DTRAIN_TRACEBACK"):
        traceback.print_exc()
    if rank:
        time.sleep(GRACE_S)
    print(f"dtrain: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)
    sys.exit(status)
