"""The command line: Hydra's, with one clear line for a user's mistake.

Under torchrun every rank composes the configuration; rank 0 alone gets a run's folder and speaks.
"""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dtrain.compare import command as comparison
from dtrain.config import CONFIGS, Comparison, Config, check_axes, checked, register
from dtrain.info import info as count
from dtrain.job import assemble, model_factories
from dtrain.launch import RanksFailed, World, leave_words, spawn, tie
from dtrain.mistakes import BROKEN_OFF, MISTAKES, explain
from dtrain.precision import Precision
from dtrain.report.console import show
from dtrain.resume import RESUMABLE
from dtrain.run import run

# What a script does at a word, before there is a configuration: `python scripts/info.py capabilities`.
WORDS = {"info": {"capabilities": ("dtrain.capabilities", "show"), "readme": ("dtrain.capabilities", "write")}}
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
            module, name = word
            return getattr(import_module(module), name)()
    if config_name == "compare" and sys.argv[1:2] == ["--from"]:
        with _explaining(config_name):
            return comparison.show_difference(sys.argv[2:])
    sys.argv[1:] = [_quoted(argument) for argument in sys.argv[1:]]
    world = _world()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        tie(os.getppid())  # a kill -9 of torchrun would leave its ranks
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
    if RESUMABLE in summary:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # the others are not to begin
            raise KeyboardInterrupt
        return math.nan
    return summary["loss"] if summary["val_loss"] is None else summary["val_loss"]


def compare(config: DictConfig) -> None:
    """The job of `scripts/compare.py`: one run for each strategy, in ranks of its own."""
    if World.of_environment():
        raise ValueError("compare starts its own ranks: call it with `python` and launch.nproc, not under torchrun")
    settings = checked(config)
    assert isinstance(settings, Comparison)
    hydra_config = HydraConfig.get()
    own = list(hydra_config.overrides.task)
    kept = [o for o in own if o.split("=")[0] not in ("strategies", "strategy", "launch.nproc", "global_batch_size")]

    def configure(overrides: list[str]) -> DictConfig:
        composed = compose("compare", overrides=[*kept, *overrides])
        check_axes(overrides[0].removeprefix("strategy=").strip("[]").split(","))
        composed.profile = True
        composed.logger = {"files": {"_target_": "dtrain.report.files.Files", "pictures": False}}  # the page has them
        return composed

    def run_one(config: DictConfig, place: Path, name: str) -> dict[str, Any]:
        summary = start(config, place, name, output=place / "printed")
        if RESUMABLE in summary:  # somebody wants all of it to end
            raise KeyboardInterrupt
        return summary

    folder = Path(hydra_config.runtime.output_dir)
    comparison.compare(settings, own, dict(hydra_config.runtime.choices), folder, configure, run_one)


def start(config: DictConfig, folder: Path, name: str, *, output: Path | None = None) -> dict[str, Any]:
    """Start `launch.nproc` ranks for a configuration; returns the summary.

    Args:
        output: where the ranks' words go; None: here.

    Raises:
        ValueError: a mistake that can be known before any rank is started.
        RanksFailed: a rank ended with an error.
    """
    settings = checked(config)
    nproc = settings.launch.nproc
    assemble(settings, World(0, nproc, 0, nproc))
    plain = OmegaConf.to_yaml(config, resolve=True)
    return spawn(_rank, type(settings), plain, folder, name, nproc=nproc, port=settings.launch.port, output=output)


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
        except Exception as error:  # ours: the launcher would keep the traceback to itself
            traceback.print_exc()
            leave_words(f"{type(error).__name__}: {error}".splitlines()[0])
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
    except comparison.Failed as error:
        _exit(str(error), FAILED)
    except KeyboardInterrupt:
        _exit("interrupted", INTERRUPTED)


def _quoted(argument: str) -> str:
    """A condition is no word of Hydra's grammar, and a shell takes the quotes away that a person puts around it."""
    key, _, value = argument.partition("=")
    if key != "fail_if" or value in ("", "null") or value[0] == value[-1] in ("'", '"'):
        return argument
    return f"fail_if='{value}'" if "'" not in value else f'fail_if="{value}"'


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
    leave_words(line)
    if rank:
        time.sleep(GRACE_S)
    print(f"dtrain: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)
    sys.exit(status)
