"""The command line: Hydra's, with one clear line for a user's mistake.

    main        has Hydra compose a configuration, and runs a command with it
    arguments   the words of the command line, changed before Hydra reads them
    commands    train, compare, info
    sweep       the jobs of a --multirun
    ranks       starts `launch.nproc` ranks for a configuration, if no launcher has
    exits       a line and an exit status for each error

Under torchrun every rank composes the configuration; rank 0 alone gets a run's folder and speaks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dtrain.cli.arguments import add_plain_file_settings, is_multirun, silence
from dtrain.cli.commands import compare, info, train
from dtrain.cli.exits import explained
from dtrain.cli.ranks import start
from dtrain.cli.sweep import JobFailed, recorded
from dtrain.compare import difference
from dtrain.config.errors import check_overrides
from dtrain.config.groups import CONFIGS
from dtrain.config.schema import refuse_unknown, register
from dtrain.config.untrusted_config import refuse_foreign_settings
from dtrain.launch import interrupts
from dtrain.launch.launcher_variables import script_arguments
from dtrain.launch.rank_processes import STOP_REQUESTS, exit_with_parent
from dtrain.launch.world import World
from dtrain.report.sweep import Told, show_sweep
from dtrain.report.terminal import keep_open

__all__ = ["compare", "info", "main", "start", "train"]

# What a command does at a word, without a configuration: `dtrain info capabilities`.
WORDS = {"info": {"capabilities": ("dtrain.compare.capabilities", "show")}}


def main(config_name: str, command: Callable[[DictConfig], Any]) -> None:
    """Run `command` with the configuration that the command line composes.

    Exit with a line for each mistake.

    Args:
        config_name: the script's configuration: train, compare or info.
    """
    interrupts.restore_interrupt()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on; here each becomes one line
    keep_open()
    register()
    with explained(config_name):
        sys.argv[1:] = script_arguments(sys.argv[1:])
        if word := WORDS.get(config_name, {}).get(" ".join(sys.argv[1:])):
            module, function = word
            getattr(import_module(module), function)()
            return
        if config_name == "compare":
            difference.refuse_misplaced(sys.argv[1:])
            if sys.argv[1:2] == ["--from"]:
                difference.show_difference(sys.argv[2:])
                return
        add_plain_file_settings()
        _take_place_among_ranks()
    _compose_and_run(config_name, command)


def _take_place_among_ranks() -> None:
    """Tie a rank of torchrun to it, and leave speaking to rank 0."""
    world = World.of_environment()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        exit_with_parent(os.getppid())  # a kill -9 of torchrun would leave its ranks
    STOP_REQUESTS.clear()
    if world and world.rank:
        silence()
    if world and is_multirun():
        raise ValueError(
            "--multirun starts its own ranks: call it with `python` and launch.nproc, not under "
            "torchrun"
        )


def _compose_and_run(config_name: str, command: Callable[[DictConfig], Any]) -> None:
    jobs: list[Told] = []  # of a sweep

    def run_job(config: DictConfig) -> Any:
        with recorded(jobs), explained(config_name):
            _check_hydra()
            return command(config)

    run_hydra = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    try:
        with explained(config_name), refuse_foreign_settings(config_name):
            check_overrides(sys.argv[1:], WORDS.get(config_name, {}))
            run_hydra(run_job)()
    except JobFailed as job:  # it has said why, and the sweep's other jobs have run
        sys.exit(job.status)
    finally:
        with explained(config_name):
            show_sweep(jobs)


def _check_hydra() -> None:
    """Refuse settings of Hydra itself that would do nothing."""
    refuse_unknown(HydraConfig.instance().cfg.hydra, "hydra.")  # type: ignore[union-attr]
    if HydraConfig.get().job.chdir:
        raise ValueError(
            "hydra.job.chdir=true: the paths of a configuration begin where you are, and all "
            "that a run writes goes into its own folder: leave it out"
        )
