"""Configuration files from outside the project: what Hydra would run by them is refused, unless it is asked for.

Classes that a configuration names are checked where they are built. Hydra's own keys name some that it calls earlier:
so each configuration that it composes, of a run, a sweep or a job of one, is looked at before Hydra acts by it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dtrain.config import CONFIGS

ALLOWED = "allow_hydra_code=true"
RUN = ("callbacks", "job_logging", "hydra_logging", "launcher", "sweeper", "job.env_set", "job.env_copy")
FOLDERS = "hydra.searchpath"
GIVEN = ("main", "command-line", FOLDERS)  # how Hydra calls folders that are not a package's own


@contextmanager
def refusing_code(script: str) -> Iterator[None]:
    """While it lasts, refuse what files of other folders than ours set of Hydra's that runs code, or could.

    `allow_hydra_code=true` on the command line allows it, and is taken away from there.

    Args:
        script: the name of its configuration, by which what is typed is told from what a file sets.

    Raises:
        ValueError: where Hydra composes a configuration; names the first such key.
    """
    if ALLOWED in sys.argv:
        sys.argv.remove(ALLOWED)
        yield
        return
    load = ConfigLoaderImpl.load_configuration

    def looked_at(loader: ConfigLoaderImpl, config_name: str, overrides: list[str], **more: Any) -> Any:
        first = loader.repository.load_config(config_name) if config_name else None
        if first and _is_outside(first.provider, first.path) and OmegaConf.select(first.config, FOLDERS) is not None:
            _refuse(FOLDERS, [first.path])  # packages among them would be imported
        found = load(loader, config_name, overrides, **more)
        sources = found.hydra.runtime.config_sources
        if places := [each.path for each in sources if _is_outside(each.provider, each.path)]:
            known = known_by(overrides)
            for key in RUN:
                value = OmegaConf.select(found.hydra, key)
                if all(value != OmegaConf.select(each.hydra, key) for each in known):
                    _refuse(f"hydra.{key}", places)
        return found

    def known_by(overrides: list[str]) -> list[Any]:
        """What Hydra's settings are by our files, or without any, and by what is typed."""
        loader = ConfigLoaderImpl(create_config_search_path(str(CONFIGS)))
        typed = [word for word in overrides if word.lstrip("+~").startswith("hydra") and not word.startswith(FOLDERS)]
        try:
            return [load(loader, name, typed, run_mode=RunMode.RUN) for name in (script, None)]
        except (HydraException, OmegaConfBaseException, ValueError):  # by words that need what is outside
            return [load(loader, name, [], run_mode=RunMode.RUN) for name in (script, None)]

    ConfigLoaderImpl.load_configuration = looked_at  # type: ignore[assignment]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]


def _is_outside(provider: str, path: str) -> bool:
    return provider.startswith(GIVEN) and Path(path.removeprefix("file://")).resolve() != CONFIGS


def _refuse(key: str, places: list[str]) -> NoReturn:
    named = (os.path.relpath(path) if os.path.exists(path) else path for path in (p.split("://")[-1] for p in places))
    raise ValueError(f"{key} is set by a file outside dtrain ({', '.join(named)}), and runs code, or can: read it, and "
                     f"add {ALLOWED} if you trust it")  # fmt: skip
