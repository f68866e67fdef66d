"""What may be written down of a configuration: nothing that came out of the environment, nothing named like a secret.

A run's figures, checkpoints and pages are passed round, and what it was given to reach a service is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

HIDDEN = "(hidden)"
NAMED = re.compile(
    r"(?:^|[._-])(?:password|passwd|passphrase|passcode|pwd|secret|credential|auth|authorization|bearer|cookie|dsn|"
    r"(?:api|app|access|private|secret|account|license|encryption)[_-]?key|token)s?$",
    re.IGNORECASE,
)
# Tokens that are a text's.
OF_TEXT = re.compile(
    r"(?:^|[._-])(?:bos|eos|eot|pad|unk|mask|sep|cls|end|start|stop|image|special|document)_tokens?$", re.IGNORECASE
)
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # https://name:password@host
# A value of a mapping in Hydra's grammar.
WITHIN = re.compile(r"""(?P<name>[\w.-]+):(?P<space>\s*)(?:'[^']*'|"[^"]*"|[^\s,{}\[\]'"]+)""")


@dataclass(frozen=True)
class Asked:
    """What a run was asked for, as it may be written down.

    Args:
        config: resolved, but for what comes out of the environment.
        files: for the folder `.hydra`, by name; where a secret stood none does, so that it is asked for again.
    """

    config: dict[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)


def is_secret(name: str) -> bool:
    """Is a value of this name, the last of a dotted one, likely to be one that nobody is to see?"""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return bool(NAMED.search(words)) and not OF_TEXT.search(words)


def masked(value: Any, name: str = "", *, by: str = HIDDEN) -> Any:
    """The same, without texts that are named like secrets, and without names and passwords in addresses.

    An interpolation (`${…}`) says where a secret is, and stays.

    Args:
        by: what stands in place of a secret.
    """
    if isinstance(value, Mapping):
        return {key: masked(each, f"{name}.{key}", by=by) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked(each, name, by=by) for each in value]
    if not isinstance(value, str) or "${" in value or value == MISSING:
        return value
    return by if value and is_secret(name) else IN_ADDRESS.sub(HIDDEN, value)


def masked_override(word: str) -> str:
    """A word of the command line, likewise, also where it gives several values at once."""
    key, equals, value = word.partition("=")
    found = masked(value, key.lstrip("+~"))
    return f"{key}{equals}{WITHIN.sub(_hidden, found)}"


def _hidden(found: re.Match[str]) -> str:
    return found[0] if "${" in found[0] or not is_secret(found["name"]) else f"{found['name']}:{found['space']}{HIDDEN}"


def written(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as it may be written down: resolved, and masked.

    A text that comes out of the environment stands there as the interpolation that it is.
    """
    with _watched() as reads:
        found: dict[str, Any] = masked(_resolved(config, OmegaConf.to_container(config), reads))
    return found


def _resolved(node: Any, raw: Any, reads: list[str]) -> Any:
    keys: Sequence[Any] = list(node) if isinstance(node, DictConfig) else range(len(node))
    found = {}
    for key in keys:
        before = len(reads)
        value = None if OmegaConf.is_missing(node, key) else node[key]
        own = raw[key]
        if isinstance(value, DictConfig | ListConfig):  # of an interpolation too
            found[key] = _resolved(value, OmegaConf.to_container(value), reads)
        else:
            found[key] = own if isinstance(value, str) and len(reads) > before else value
    return found if isinstance(node, DictConfig) else [found[key] for key in keys]


@contextmanager
def _watched() -> Iterator[list[str]]:
    """The names of what a configuration reads in the environment, as long as the context lasts."""
    reads: list[str] = []

    def env(key: str, default: Any = None) -> Any:
        reads.append(key)
        return oc.env(key, default)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield reads
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
