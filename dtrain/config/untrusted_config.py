"""Configuration files from outside the project: what Hydra would run by them is refused, unless it
is asked for.

Classes that a configuration names are checked where they are built. Hydra's own keys name some that
it calls earlier: so each configuration that it composes, of a run, a sweep or a job of one, is
looked at before Hydra acts by it.
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
RUN = (
    "callbacks",
    "job_logging",
    "hydra_logging",
    "launcher",
    "sweeper",
    "job.env_set",
    "job.env_copy",
)
FOLDERS = "hydra.searchpath"
GIVEN = ("main", "command-line", FOLDERS)  # how Hydra calls folders that are not a package's own
LEFT = ".hydra"
LOAD, READ = ConfigLoaderImpl.load_configuration, ConfigRepository.load_config


@contextmanager
def refuse_foreign_settings(script: str) -> Iterator[None]:
    """While it lasts, refuse what files of other folders than ours set of Hydra's that runs code,
    or could.

    `allow_hydra_code=true` on the command line allows it, and is taken away from there. What Hydra
    writes of a configuration by itself is left out, or masked.

    Args:
        script: the name of its configuration, by which what is typed is told from what a file sets.

    Raises:
        ValueError: where Hydra composes a configuration; names the first such key.
    """
    if allowed := ALLOWED in sys.argv:
        sys.argv.remove(ALLOWED)
    sweeps: list[DictConfig] = []

    def looked_at(
        loader: ConfigLoaderImpl, config_name: str, overrides: list[str], **more: Any
    ) -> DictConfig:
        if more["run_mode"] is RunMode.RUN and sweeps and sweeps[0].hydra.mode is RunMode.MULTIRUN:
            # The sweeper has written it, and now asks for its first job.
            _mask(Path(sweeps[0].hydra.sweep.dir) / "multirun.yaml")
        if not allowed:
            _refuse_folders(loader, config_name)
        found = LOAD(loader, config_name, overrides, **more)
        if not allowed:
            _refuse_code(found, script, overrides)
        if (folder := found.hydra.output_subdir) not in (None, LEFT):
            raise ValueError(
                f"hydra.output_subdir={folder}: what a run was asked for is left in {LEFT}: "
                f"leave it out"
            )
        found.hydra.output_subdir = None  # the run does it, masked
        if more["run_mode"] is RunMode.MULTIRUN:
            sweeps[:] = [found]
        return found

    theirs = JobReturn.return_value
    ConfigLoaderImpl.load_configuration = looked_at  # type: ignore[assignment, method-assign]
    ConfigRepository.load_config = _named  # type: ignore[method-assign]
    JobReturn.return_value = property(_came_of, theirs.fset)  # type: ignore[assignment, method-assign, attr-defined]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = LOAD  # type: ignore[method-assign]
        ConfigRepository.load_config = READ  # type: ignore[method-assign]
        JobReturn.return_value = theirs  # type: ignore[method-assign]


def _named(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    """A file that Hydra reads as a configuration; what it cannot read is named."""
    try:
        found = READ(self, config_path)
        if found and not isinstance(found.config, DictConfig):
            raise ValueError("it is a list")
        return found
    except (YAMLError, ValueError, RecursionError, OSError, OmegaConfBaseException) as error:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        file = Path(source.path if source else "", config_path)
        said = (
            " ".join(str(error).split())[:200]
            if not isinstance(error, RecursionError)
            else "it has no end"
        )
        raise ValueError(f"{file} is no configuration: {said}") from None


def _came_of(job: JobReturn) -> Any:
    """What a job has returned.

    Hydra's own prints all words of the command line, where it was an error.
    """
    if job.status is JobStatus.FAILED:
        raise job._return_value
    return job._return_value


def _refuse_folders(loader: ConfigLoaderImpl, config_name: str | None) -> None:
    """Refuse a search path before Hydra looks whether its folders are there: it imports the
    packages among them.
    """
    first = loader.repository.load_config(config_name) if config_name else None
    if (
        first
        and _is_outside(first.provider, first.path)
        and OmegaConf.select(first.config, FOLDERS) is not None
    ):
        _refuse(FOLDERS, [first.path])


def _refuse_code(found: DictConfig, script: str, overrides: list[str]) -> None:
    """Refuse what is set neither by our files, nor by Hydra's alone, nor by what is typed."""
    places = [
        each.path
        for each in found.hydra.runtime.config_sources
        if _is_outside(each.provider, each.path)
    ]
    if not places:
        return
    loader = ConfigLoaderImpl(create_config_search_path(str(CONFIGS)))
    typed = [
        word
        for word in overrides
        if word.lstrip("+~").startswith("hydra") and not word.startswith(FOLDERS)
    ]
    try:
        known = [LOAD(loader, name, typed, RunMode.RUN).hydra for name in (script, None)]
    except (HydraException, OmegaConfBaseException, ValueError):
        # by words that need what is outside
        known = [LOAD(loader, name, [], RunMode.RUN).hydra for name in (script, None)]
    for key in RUN:
        value = OmegaConf.select(found.hydra, key)
        if all(value != OmegaConf.select(each, key) for each in known):
            _refuse(f"hydra.{key}", places)


def _is_outside(provider: str, path: str) -> bool:
    return provider.startswith(GIVEN) and Path(path.removeprefix("file://")).resolve() != CONFIGS


def _refuse(key: str, places: list[str]) -> NoReturn:
    named = (
        os.path.relpath(path) if os.path.exists(path) else path
        for path in (p.split("://")[-1] for p in places)
    )
    raise ValueError(
        f"{key} is set by a file outside dtrain ({', '.join(named)}), and runs code, or can: read "
        f"it, and "
        f"add {ALLOWED} if you trust it"
    )


def _mask(file: Path) -> None:
    if file.is_file():
        config = OmegaConf.load(file)
        assert isinstance(config, DictConfig)
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(replayable(config))))
