"""Change the words of the command line before Hydra reads them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dtrain.config.groups import CONFIGS

MULTIRUN = ("-m", "--multirun")
# Hydra's options that take a word after them, and those that print instead of running.
VALUED = (
    "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p",
    "--cfg", "-c",
)  # fmt: skip
PRINTING = ("-h", "--help", "--hydra-help", "--version", "--info", "-i", "-c", "--cfg")


def is_multirun() -> bool:
    """Return whether a sweep is asked for."""
    return any(word in MULTIRUN for word in sys.argv[1:])


def add_plain_file_settings() -> None:
    """Add Hydra's settings of ours for a configuration that has no defaults.

    Such a one is a run's own `.hydra/config.yaml`.
    """
    words = " ".join(sys.argv[1:])
    given = {
        key: re.search(rf"(?:^|\s)(?:--config-{key}|-c{key[0]})[= ](\S+)", words)
        for key in ("dir", "name")
    }
    if not (given["dir"] and given["name"]):
        return
    file = Path(given["dir"][1]) / f"{given['name'][1].removesuffix('.yaml')}.yaml"
    if not file.is_file() or re.search(b"^defaults:", file.read_bytes(), re.M):
        return
    train: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"))
    _add(
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.output_subdir=null",
        *(f"hydra.{key}.dir={train['hydra'][key]['dir']}" for key in ("run", "sweep")),
    )


def silence() -> None:
    """On ranks but 0, keep Hydra from making a folder, and from printing."""
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("hydra.run.dir=")]
    _add("hydra.run.dir=.")
    if any(word in PRINTING for word in sys.argv[1:]):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def _add(*settings: str) -> None:
    """Put settings before the first one of the command line: Hydra takes them in one place."""
    words = sys.argv[1:]
    settings_at = (
        place
        for place, word in enumerate(words)
        if word[0:1] != "-" and (place == 0 or words[place - 1] not in VALUED)
    )
    first = next(settings_at, len(words))
    sys.argv[1:] = [*words[:first], *settings, *words[first:]]
