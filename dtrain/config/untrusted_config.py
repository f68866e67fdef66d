"""Refuse code that files from outside the project would have Hydra run, unless it is asked for.

`build` checks the classes that a configuration names. Hydra's own keys name others, which it calls
earlier. So three of Hydra's internals are replaced while it composes and runs:

    ConfigLoaderImpl.load_configuration  composes each configuration, of a run, a sweep or a job:
                                         what it has composed is checked before Hydra acts by it
    ConfigRepository.load_config         reads a file: names the one that it cannot read
    JobReturn.return_value               a job's result: raises its error without printing all
                                         words of the command line, secrets among them
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.object_type import ObjectType
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dtrain.config.groups import CONFIGS
from dtrain.config.secret import replayable

ALLOWED = "allow_hydra_code=true"
# Keys of hydra's that run code, or can.
RUN_CODE = (
    "callbacks",
    "job_logging",
    "hydra_logging",
    "launcher",
    "sweeper",
    "job.env_set",
    "job.env_copy",
)
FOLDERS = "hydra.searchpath"
PROVIDERS = ("main", "command-line", FOLDERS)  # Hydra's names for folders outside packages
OUTPUT = ".hydra"  # where the run writes its configuration, masked
COMPOSE, READ = ConfigLoaderImpl.load_configuration, ConfigRepository.load_config


@contextmanager
def refuse_foreign_settings(script: str) -> Iterator[None]:
    """Refuse Hydra's keys that run code, if a file outside `configs/` sets them.

    `allow_hydra_code=true` on the command line allows them, and is removed from it. What Hydra
    itself writes of a configuration is left out, or masked.

    Args:
        script: the name of its configuration: composed alone, it shows what is typed.

    Raises:
        ValueError: where Hydra composes a configuration; names the first such key.
    """
    if allowed := ALLOWED in sys.argv:
        sys.argv.remove(ALLOWED)
    sweeps: list[DictConfig] = []

    def composed(
        loader: ConfigLoaderImpl, config_name: str, overrides: list[str], **more: Any
    ) -> DictConfig:
        if more["run_mode"] is RunMode.RUN and sweeps and sweeps[0].hydra.mode is RunMode.MULTIRUN:
            # The sweeper has written the file, and now asks for its first job.
            _mask(Path(sweeps[0].hydra.sweep.dir) / "multirun.yaml")
        if not allowed:
            _refuse_folders(loader, config_name)
        config = COMPOSE(loader, config_name, overrides, **more)
        if not allowed:
            _refuse_code(config, script, overrides)
        if (folder := config.hydra.output_subdir) not in (None, OUTPUT):
            raise ValueError(
                f"hydra.output_subdir={folder}: what a run was asked for is left in {OUTPUT}: "
                f"leave it out"
            )
        config.hydra.output_subdir = None  # the run writes it, masked
        if more["run_mode"] is RunMode.MULTIRUN:
            sweeps[:] = [config]
        return config

    result = JobReturn.return_value
    ConfigLoaderImpl.load_configuration = composed  # type: ignore[assignment, method-assign]
    ConfigRepository.load_config = _read  # type: ignore[method-assign]
    JobReturn.return_value = property(_result_or_error, result.fset)  # type: ignore[assignment, method-assign, attr-defined]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = COMPOSE  # type: ignore[method-assign]
        ConfigRepository.load_config = READ  # type: ignore[method-assign]
        JobReturn.return_value = result  # type: ignore[method-assign]


def _read(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    """Read a configuration's file; raise a ValueError that names one that cannot be read."""
    try:
        result = READ(self, config_path)
        if result and not isinstance(result.config, DictConfig):
            raise ValueError("it is a list")
        return result
    except (YAMLError, ValueError, RecursionError, OSError, OmegaConfBaseException) as error:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        file = Path(source.path if source else "", config_path)
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, RecursionError):
            reason = "it has no end"
        raise ValueError(f"{file} is no configuration: {reason}") from None


def _result_or_error(job: JobReturn) -> Any:
    """Return what a job has returned, or raise its error."""
    if job.status is JobStatus.FAILED:
        raise job._return_value
    return job._return_value


def _refuse_folders(loader: ConfigLoaderImpl, config_name: str | None) -> None:
    """Refuse a search path before Hydra looks for its folders: it imports packages among them."""
    first = loader.repository.load_config(config_name) if config_name else None
    if first is None or not _is_outside(first.provider, first.path):
        return
    if OmegaConf.select(first.config, FOLDERS) is not None:
        _refuse(FOLDERS, [first.path])


def _refuse_code(config: DictConfig, script: str, overrides: list[str]) -> None:
    """Refuse what is set neither by our files, nor by Hydra's own, nor by what is typed."""
    sources = config.hydra.runtime.config_sources
    outside = [each.path for each in sources if _is_outside(each.provider, each.path)]
    if not outside:
        return
    loader = ConfigLoaderImpl(create_config_search_path(str(CONFIGS)))
    typed = [
        word
        for word in overrides
        if word.lstrip("+~").startswith("hydra") and not word.startswith(FOLDERS)
    ]

    def trusted(words: list[str]) -> list[DictConfig]:
        return [COMPOSE(loader, name, words, RunMode.RUN).hydra for name in (script, None)]

    try:
        without = trusted(typed)
    except (HydraException, OmegaConfBaseException, ValueError):
        without = trusted([])  # what is typed needs what is outside
    for key in RUN_CODE:
        value = OmegaConf.select(config.hydra, key)
        if all(value != OmegaConf.select(each, key) for each in without):
            _refuse(f"hydra.{key}", outside)


def _is_outside(provider: str, path: str) -> bool:
    folder = Path(path.removeprefix("file://")).resolve()
    return provider.startswith(PROVIDERS) and folder != CONFIGS


def _refuse(key: str, folders: list[str]) -> NoReturn:
    paths = (folder.split("://")[-1] for folder in folders)
    names = ", ".join(os.path.relpath(path) if os.path.exists(path) else path for path in paths)
    raise ValueError(
        f"{key} is set by a file outside dtrain ({names}), and runs code, or can: read it, and "
        f"add {ALLOWED} if you trust it"
    )


def _mask(file: Path) -> None:
    """Write a configuration's file anew without its secrets, if it is there."""
    if file.is_file():
        config = OmegaConf.load(file)
        assert isinstance(config, DictConfig)
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(replayable(config))))
