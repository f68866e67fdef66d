"""Configuration files from outside the project: what Hydra would run by them is refused, unless it is asked for.

Classes that a configuration names are checked where they are built. Hydra's own keys name some that it calls earlier.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dtrain.config import CONFIGS

ALLOWED = "allow_hydra_code=true"
RUN = ("callbacks", "job_logging", "hydra_logging", "launcher", "sweeper", "job.env_set", "job.env_copy", "searchpath")


def refuse_code(config_name: str) -> None:
    """Refuse what files of a folder given by `--config-dir` or `--config-path` set of Hydra's that runs code, or could.

    `allow_hydra_code=true` on the command line allows it, and is taken away from there.

    Raises:
        ValueError: names the first such key.
    """
    if ALLOWED in sys.argv:
        sys.argv.remove(ALLOWED)
        return
    asked = get_args_parser().parse_args(sys.argv[1:])
    path = Path(asked.config_path or CONFIGS)
    outside = [Path(asked.config_dir)] if asked.config_dir else []
    if not outside and path.resolve() == CONFIGS:
        return
    theirs = [*asked.overrides]
    typed = [word for word in theirs if word.lstrip("+~").startswith("hydra")]
    try:
        found = _of_hydra(asked.config_name or config_name, theirs, [path, *outside])
    except (HydraException, OmegaConfBaseException, ValueError, OSError):  # said when it is composed in earnest
        return
    try:
        known = _of_hydra(config_name, typed, [CONFIGS])
    except (HydraException, OmegaConfBaseException, ValueError):  # by words that need what is outside
        known = _of_hydra(config_name, [], [CONFIGS])
    for key in RUN:
        value = OmegaConf.select(found, key)
        if value != OmegaConf.select(known, key):
            raise ValueError(
                f"hydra.{key} is set by a file outside dtrain ({outside[0] if outside else path}), and runs code, or "
                f"can: read it, and add {ALLOWED} if you trust it"
            )


def _of_hydra(config_name: str, words: list[str], folders: list[Path]) -> Any:
    """The node of Hydra's own settings, composed and nothing else: no callback is called."""
    search = create_config_search_path(str(folders[0].resolve()))
    for folder in folders[1:]:
        search.prepend("command-line", f"file://{folder.resolve()}", SearchPathQuery("schema", None))
    loader = ConfigLoaderImpl(config_search_path=search)
    return loader.load_configuration(config_name, overrides=words, run_mode=RunMode.RUN).hydra
