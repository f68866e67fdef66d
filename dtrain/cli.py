"""The command line: Hydra's, with one clear line for a user's mistake.

Under torchrun every rank composes the configuration; rank 0 alone gets a run's folder and speaks.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dtrain.compare import command as comparison
from dtrain.compare import difference
from dtrain.config.errors import USER_ERRORS, check_overrides, explain, system_error
from dtrain.config.outside import refuse_foreign_settings
from dtrain.config.schema import (
    CONFIGS,
    Comparison,
    Config,
    check_axes,
    refuse_unknown,
    register,
    validated,
)
from dtrain.config.secret import Asked, masked_override, printable, replayable
from dtrain.cost.model_size import model_size as count
from dtrain.files.lock import Lock
from dtrain.launch import quiet
from dtrain.launch.hang_detector import Hang
from dtrain.launch.launchers import script_arguments
from dtrain.launch.rank_processes import (
    TOLD,
    RanksFailed,
    exit_with_parent,
    spawn,
    write_error_file,
)
from dtrain.launch.world import World
from dtrain.model import own
from dtrain.parallel.precision import Precision
from dtrain.report.console import show_model_size
from dtrain.report.sweep import Told, show_job, show_sweep
from dtrain.report.terminal import keep_open, on_one_line, without_control_characters
from dtrain.run.assemble import assemble, model_factories, strategies_of
from dtrain.run.checkpoint import clear
from dtrain.run.checkpoint_files import CHECKPOINTS
from dtrain.run.claim import RESUMABLE
from dtrain.run.run import run
from dtrain.train import NonFinite

# What a script does at a word, before there is a configuration: `python scripts/info.py
# capabilities`.
RUN_ERRORS = (NonFinite, Hang)  # no mistakes: a run that cannot go on
WORDS = {
    "info": {
        "capabilities": ("dtrain.compare.capabilities", "show"),
        "readme": ("dtrain.compare.capabilities", "write"),
    }
}
VALUED = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--cfg",
    "-c",
)
USAGE = 2  # exit status for a mistake of the user's
FAILED = 1  # and for a run that broke off
INTERRUPTED = 130
# how long other ranks leave to rank 0 to say what is wrong, before torchrun stops it for their exit
GRACE_S = 3.0


class Ended(SystemExit):
    """The process ends with a status, and has said the line."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(status)
        self.line, self.status = line, status


class JobFailed(Exception):
    """A job of a sweep ended with a status."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line, status)
        self.status = status


def main(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run `task` with the configuration that the command line composes; exit with a line for
    each mistake.
    """
    quiet.restore_interrupt()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on; they are said in one line here
    keep_open()
    register()
    with _explaining(config_name):
        sys.argv[1:] = script_arguments(sys.argv[1:])
    if word := WORDS.get(config_name, {}).get(" ".join(sys.argv[1:])):
        with _explaining(config_name):
            module, name = word
            return getattr(import_module(module), name)()
    if config_name == "compare":
        with _explaining(config_name):
            difference.refuse_misplaced(sys.argv[1:])
            if sys.argv[1:2] == ["--from"]:
                return difference.show_difference(sys.argv[2:])
    with _explaining(config_name):
        _add_settings(_settings_of_a_plain_file())
    world = _world()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        exit_with_parent(os.getppid())  # a kill -9 of torchrun would leave its ranks
    TOLD.clear()
    if world and world.rank:
        _be_silent()
    if world and any(arg in ("-m", "--multirun") for arg in sys.argv[1:]):
        _exit(
            "--multirun starts its own ranks: call it with `python` and launch.nproc, not under "
            "torchrun",
            USAGE,
        )

    jobs: list[Told] = []

    def guarded(config: DictConfig) -> Any:
        with _told(jobs), _explaining(config_name):
            _check_hydra()
            return task(config)

    try:
        with _explaining(config_name), refuse_foreign_settings(config_name):
            check_overrides(sys.argv[1:], WORDS.get(config_name, {}))
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(
                guarded
            )()
    except JobFailed as job:  # of a sweep, whose other jobs have run; it has said why
        sys.exit(job.status)
    finally:
        with _explaining(config_name):
            show_sweep(jobs)


def _check_hydra() -> None:
    """Refuse what is asked of Hydra itself, and nothing would come of."""
    refuse_unknown(HydraConfig.instance().cfg.hydra, "hydra.")  # type: ignore[union-attr]
    if HydraConfig.get().job.chdir:
        raise ValueError(
            "hydra.job.chdir=true: the paths of a configuration begin where you are, and all "
            "that a run "
            "writes goes into its own folder: leave it out"
        )


def train(config: DictConfig) -> float:
    """The job of `scripts/train.py`: returns the validation loss (or else the loss) for a
    sweeper.
    """
    settings = validated(config)
    own.check_asked(settings.model, _words())
    folder, name = Path(HydraConfig.get().runtime.output_dir), strategy_name()
    if name:
        check_axes(name.split("+"))
    else:  # a configuration without groups: by the files of its strategies
        name = (
            "+".join(each.name or type(each).__name__ for each in strategies_of(settings))
            or "single"
        )
    world = World.of_environment()
    if world is None and settings.launch.nproc > 1:
        summary = start(config, folder, name, _asked(config))
    else:
        summary = run(settings, world or World(), folder, name, _asked(config))
    if RESUMABLE in summary:
        # the others are not to begin
        if summary["interrupted"] or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise KeyboardInterrupt
        return math.nan
    return summary["loss"] if summary["val_loss"] is None else summary["val_loss"]


def compare(config: DictConfig) -> None:
    """The job of `scripts/compare.py`: one run for each strategy, in ranks of its own."""
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
    asked = _words()
    own.check_asked(settings.model, asked)
    kept = [
        o
        for o in asked
        if o.split("=")[0] not in ("strategies", "strategy", "launch.nproc", "global_batch_size")
    ]

    def configure(overrides: list[str]) -> DictConfig:
        composed = compose("compare", overrides=[*kept, *overrides])
        check_axes(overrides[0].removeprefix("strategy=").strip("[]").split(","))
        composed.profile = composed.overwrite = True  # of the folder as a whole it is decided once
        composed.checkpoint.last = False
        # the page has them
        composed.logger = {"files": {"_target_": "dtrain.report.files.Files", "pictures": False}}
        return composed

    def run_one(config: DictConfig, place: Path, name: str) -> dict[str, Any]:
        if TOLD:
            raise KeyboardInterrupt
        summary = start(config, place, name, output=place / "printed")
        if RESUMABLE in summary:  # somebody wants all of it to end
            raise KeyboardInterrupt
        return summary

    folder = Path(hydra_config.runtime.output_dir)
    comparison.compare(
        settings, asked, dict(hydra_config.runtime.choices), folder, configure, run_one
    )


def _words() -> list[str]:
    """The command line's settings of a job, as they were typed: what comes out of the
    environment is not put in.
    """
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    return list(words)


def _asked(config: DictConfig) -> Asked:
    """What may be written down.

    What Hydra leaves of a job in its folder the run does, once the folder is its own.
    """
    hydras: Any = HydraConfig.instance().cfg
    words = [*map(masked_override, _words())]
    parts = {"config": replayable(config), "hydra": replayable(hydras), "overrides": words}
    return Asked(
        printable(config), {f"{name}.yaml": OmegaConf.to_yaml(part) for name, part in parts.items()}
    )


def start(
    config: DictConfig,
    folder: Path,
    name: str,
    asked: Asked | None = None,
    *,
    output: Path | None = None,
) -> dict[str, Any]:
    """Start `launch.nproc` ranks for a configuration; returns the summary.

    Args:
        asked: None: this configuration.
        output: where the ranks' words go; None: here.

    Raises:
        ValueError: a mistake that can be known before any rank is started.
        RanksFailed: a rank ended with an error.
    """
    settings = validated(config)
    nproc = settings.launch.nproc
    assemble(settings, World(0, nproc, 0, nproc))
    arguments = (settings, folder, name, asked or Asked(printable(config)))
    try:
        return spawn(_rank, *arguments, nproc=nproc, output=output)
    except KeyboardInterrupt:
        # ranks that were told twice have been killed, perhaps while they saved
        place = folder / CHECKPOINTS
        with suppress(ValueError, OSError):  # it is another run's folder
            if place.is_dir() and not place.is_symlink():
                with closing(Lock(folder)):
                    clear(place)
        raise


def _rank(settings: Config, folder: Path, name: str, asked: Asked) -> dict[str, Any]:
    """What a rank that `start` has started does, with what was checked there."""
    keep_open()
    world = World.of_environment()
    assert world is not None
    with _explaining("train"):
        try:
            return run(settings, world, folder, name, asked)
        except (*USER_ERRORS, *RUN_ERRORS):
            raise
        except (RuntimeError, MemoryError) as error:
            if system_error(error):
                raise
            return _crashed(error)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)  # the launcher says so
        except Exception as error:  # ours: the launcher would keep the traceback to itself
            _crashed(error)


def _crashed(error: Exception) -> NoReturn:
    _show_traceback()
    write_error_file(_in_a_line(error))
    sys.exit(FAILED)


def _show_traceback() -> None:
    print(without_control_characters(traceback.format_exc()), end="", file=sys.stderr, flush=True)


def _in_a_line(error: Exception) -> str:
    return on_one_line(f"{type(error).__name__}: {error}".splitlines()[0])


def info(config: DictConfig) -> None:
    """The job of `scripts/info.py`."""
    settings = validated(config)
    own.check_asked(settings.model, _words())
    precision = Precision.of(settings.dtype, settings.precision)
    for name, factory in model_factories(settings).items():
        show_model_size(name, count(factory, precision, settings.seq_len))


def strategy_name() -> str:
    """The strategy as it was asked for: `[replicate,fsdp]` is said `replicate+fsdp`; empty: by
    no name.
    """
    hydra_config = HydraConfig.get()
    asked = [o.removeprefix("strategy=") for o in _words() if o.startswith("strategy=")]
    choice = asked[-1] if asked else str(hydra_config.runtime.choices.get("strategy", ""))
    return "+".join(part.strip() for part in choice.strip("[]").split(","))


@contextmanager
def _told(jobs: list[Told]) -> Iterator[None]:
    """In a sweep: say which of its jobs begins, and keep what came of it.

    One that fails ends no other.
    """
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        yield
        return
    if TOLD:  # by a signal that came when the job before had done all its steps
        _exit("interrupted", INTERRUPTED)
    words = tuple(map(masked_override, _words()))
    job = Told(str(hydra_config.job.num), words, Path(hydra_config.runtime.output_dir))
    show_job(job)
    jobs.append(job)
    try:
        yield
    except Ended as ended:
        if ended.status == INTERRUPTED:
            raise
        job.reason = ended.line
        # which Hydra keeps until the other jobs have run
        raise JobFailed(ended.line, ended.status) from None
    except Exception as error:  # as it keeps any other
        job.reason = _in_a_line(error)
        raise


def _settings_of_a_plain_file() -> list[str]:
    """Hydra's settings of ours, for a configuration that brings no defaults: a run's own
    `.hydra/config.yaml`.
    """
    words = " ".join(sys.argv[1:])
    found = {
        key: re.search(rf"(?:^|\s)(?:--config-{key}|-c{key[0]})[= ](\S+)", words)
        for key in ("dir", "name")
    }
    if not (found["dir"] and found["name"]):
        return []
    file = Path(found["dir"][1]) / f"{found['name'][1].removesuffix('.yaml')}.yaml"
    if not file.is_file() or re.search(b"^defaults:", file.read_bytes(), re.M):
        return []
    ours: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"))
    return [
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.output_subdir=null",
        *(f"hydra.{key}.dir={ours['hydra'][key]['dir']}" for key in ("run", "sweep")),
    ]


@contextmanager
def _explaining(config_name: str) -> Iterator[None]:
    """End the process with one line for a mistake.

    Inside the job too: Hydra says more of an error than that.
    """
    try:
        yield
    except (*USER_ERRORS, *RUN_ERRORS) as error:
        _exit(explain(error, config_name), FAILED if isinstance(error, RUN_ERRORS) else USAGE)
    except RanksFailed as error:
        if error.status > 0 and error.said:
            raise Ended(str(error), error.status) from None
        _exit(str(error), FAILED)
    except comparison.Failed as error:
        _exit(str(error), FAILED)
    except KeyboardInterrupt:
        _exit("interrupted", INTERRUPTED)
    except (RuntimeError, MemoryError) as error:
        if not system_error(error):
            raise
        _exit(explain(error, config_name), USAGE)


def _world() -> World | None:
    try:
        return World.of_environment()
    except ValueError as error:
        _exit(str(error), USAGE)


def _add_settings(settings: list[str]) -> None:
    """Put them before the command line's own, behind options that stand first: Hydra takes
    settings in one place.
    """
    words = sys.argv[1:]
    own = (
        i
        for i, word in enumerate(words)
        if word[0:1] != "-" and (i == 0 or words[i - 1] not in VALUED)
    )
    at = next(own, len(words))
    sys.argv[1:] = [*words[:at], *settings, *words[at:]]


def _be_silent() -> None:
    """On ranks but 0: Hydra makes no folder and writes no log, and what it prints is rank 0's
    to print.
    """
    kept = [argument for argument in sys.argv[1:] if not argument.startswith("hydra.run.dir=")]
    sys.argv[1:] = kept
    _add_settings(["hydra.run.dir=."])
    if any(
        a in ("-h", "--help", "--hydra-help", "--version", "--info", "-i", "-c", "--cfg")
        for a in sys.argv[1:]
    ):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def _exit(line: str, status: int) -> NoReturn:
    """Say the line once, and end: on rank 0, or on another that rank 0 does not end before."""
    rank = int(told) if (told := os.environ.get("RANK", "")).isdecimal() else 0
    if os.environ.get("DTRAIN_TRACEBACK"):
        _show_traceback()
    write_error_file(line := on_one_line(line))
    if rank:
        time.sleep(GRACE_S)
    print(f"dtrain: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)
    raise Ended(line, status) from None
