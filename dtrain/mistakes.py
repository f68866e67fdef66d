"""A user's mistake in one line: what is wrong, the value, and what would work."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dtrain.config import CONFIGS, options
from dtrain.hang import Hang
from dtrain.train import NonFinite

BROKEN_OFF = (NonFinite, Hang)  # no mistakes: a run that cannot go on
MISTAKES = (ValueError, OSError, *BROKEN_OFF, HydraException, OmegaConfBaseException)


def no_home(error: BaseException) -> bool:
    """Is it what pathlib says of a `~` that leads nowhere?"""
    return isinstance(error, RuntimeError) and "home directory" in str(error)


def explain(error: BaseException, config_name: str) -> str:
    """One line: what is wrong, the value, and what would work."""
    if no_home(error):
        return "a path begins with ~, and there is no such home folder: write it out, or set DTRAIN_CACHE (data.cache)"
    text = str(error)
    if match := re.search(r"Could not (?:find|load) '(\w+)/([^']*)'", text):
        group, name = match.groups()
        return f"unknown {group} {name!r}: {_nearest(name, options(group))}"
    if match := re.match(r"Could not override '([^']+)'", text):
        key = match.group(1)
        if key in _groups():
            return f"group {key!r} has no default to override: append to it with +{key}=…, of {', '.join(options(key))}"
        return f"unknown key {key!r}: {_nearest(key, _keys(config_name, key))}"
    if match := re.match(r"Error merging override (.*)", text):
        cause = str(error.__cause__).splitlines()[0] if error.__cause__ else ""
        return f"{match.group(1)}: {cause}"
    if match := re.match(r"Interpolation key '([^']+)' not found", text):
        key = getattr(error, "full_key", None) or "the configuration"
        return f"{key} is to be {match.group(1)}, which these data have not: choose another model, or other data"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {text.splitlines()[0]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, (ValueError, *BROKEN_OFF)):
        return "; ".join(lines)
    return lines[0] if lines else type(error).__name__


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close and "." in name:  # the right leaf in another place
        leaf = name.rsplit(".", 1)[-1]
        close = [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    listing = ", ".join(known) if len(known) <= 40 else "see --cfg job"
    return f"did you mean {close[0]!r}? ({listing})" if close else f"use one of {listing}"


def _groups() -> list[str]:
    return [folder.name for folder in CONFIGS.iterdir() if folder.is_dir()]


def _keys(config_name: str, unknown: str) -> list[str]:
    """The keys of the configuration as the command line composes it without the unknown one."""
    GlobalHydra.instance().clear()
    kept = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-") and a.split("=")[0].strip("+~") != unknown]
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose(config_name, overrides=[a for a in kept if not a.startswith("hydra")])
    except HydraException:
        return []
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(config), "")
    return keys
