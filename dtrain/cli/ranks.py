"""Start the ranks of a run, where no launcher such as torchrun has."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dtrain.cli.exits import INTERRUPTED, RUN_ERRORS, crash, explained
from dtrain.config.errors import USER_ERRORS, system_error
from dtrain.config.schema import Config, validated
from dtrain.config.secret import Asked, printable
from dtrain.files.lock import Lock
from dtrain.launch.rank_processes import spawn
from dtrain.launch.world import World
from dtrain.report.terminal import keep_open
from dtrain.run.assemble import assemble
from dtrain.run.checkpoint import clear
from dtrain.run.checkpoint_files import CHECKPOINTS
from dtrain.run.run import run


def start(
    config: DictConfig,
    folder: Path,
    name: str,
    asked: Asked | None = None,
    *,
    output: Path | None = None,
) -> dict[str, Any]:
    """Start `launch.nproc` ranks for a configuration, and return the run's summary.

    Args:
        folder: the run's.
        name: the strategy's.
        asked: what may be written down; None: of this configuration.
        output: where the ranks' output goes; None: to this process's.

    Raises:
        ValueError: a mistake that can be known before any rank is started.
        RanksFailed: a rank ended with an error.
    """
    settings = validated(config)
    nproc = settings.launch.nproc
    assemble(settings, World(0, nproc, 0, nproc))
    arguments = (settings, folder, name, asked or Asked(printable(config)))
    try:
        summary: dict[str, Any] = spawn(_run_rank, *arguments, nproc=nproc, output=output)
        return summary
    except KeyboardInterrupt:
        # A second signal has killed the ranks, perhaps while they saved.
        checkpoints = folder / CHECKPOINTS
        with suppress(ValueError, OSError):  # it is another run's folder
            if checkpoints.is_dir() and not checkpoints.is_symlink():
                with closing(Lock(folder)):
                    clear(checkpoints)
        raise


def _run_rank(settings: Config, folder: Path, name: str, asked: Asked) -> dict[str, Any]:
    """Run a rank that `start` has started, with the settings that were checked there."""
    keep_open()
    world = World.of_environment()
    assert world is not None
    with explained("train"):
        try:
            return run(settings, world, folder, name, asked)
        except (*USER_ERRORS, *RUN_ERRORS):
            raise
        except (RuntimeError, MemoryError) as error:
            if system_error(error):
                raise
            crash(error)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)  # the launcher says so
        except Exception as error:  # the launcher would not show the traceback
            crash(error)
