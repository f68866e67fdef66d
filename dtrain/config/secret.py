"""Mask a configuration's secrets before it is written or shown.

A run's figures, checkpoints and pages are passed on to others. So values that come from the
environment, and values whose names look like a secret's, are not written into them.
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
    r"(?:api|app|access|private|secret|account|license|encryption)[_-]?key|token)s?(?=\.|$)",
    re.IGNORECASE,
)
# Names of tokens that are a text's or a model's, not a service's.
OF_TEXT = re.compile(
    r"(?:^|[._-])(?:(?:bos|eos|eot|pad|unk|mask|sep|cls|end|start|stop|image|special|document)_tokens?|layout\.token)"
    r"(?=\.|$)",
    re.IGNORECASE,
)
COUNTED = re.compile("tokens?$", re.IGNORECASE)
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # https://name:password@host
# An interpolation that has no default text.
INTERPOLATION = re.compile(r"\$\{[^${},]*(?:,\s*(?:null|''|\"\")?\s*)?\}")
# In Hydra's grammar: a list or mapping within a mapping; a value of one, or of a setting in a text.
NESTED = re.compile(r"(?P<name>[\w.-]+):\s*[\[{]")
WITHIN = re.compile(
    r"""(?P<name>[\w.-]+)(?P<is>[:=]\s*)(?P<value>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|"""
    r"""(?:\$\{[^{}]*\}|\\.|[^,{}\[\]'"\\])+)"""
)


@dataclass(frozen=True)
class Asked:
    """What a run was asked for, as it may be written down.

    Args:
        config: resolved, except for what comes from the environment.
        files: texts of the folder `.hydra`, by name. A secret's value is missing in them, so that
            a repeated run asks for it.
    """

    config: dict[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)


def is_secret(name: str) -> bool:
    """Return whether a dotted name, or a mapping's name in it, looks like a secret's."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return bool(NAMED.search(OF_TEXT.sub("", words))) and not name.endswith("._target_")


def masked(value: Any, name: str = "", *, by: str = HIDDEN) -> Any:
    """Return a value without secrets: by their names, and names and passwords in addresses.

    An interpolation (`${…}`) says where a secret is, and stays. So does a number that may count
    tokens.

    Args:
        by: replaces a secret.
    """
    if isinstance(value, Mapping):
        return {key: masked(each, f"{name}.{key}", by=by) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked(each, name, by=by) for each in value]
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value == MISSING:
        return value
    if is_secret(name):
        shown = not _own_text(value) if isinstance(value, str) else COUNTED.search(name)
        return value if shown else by
    if not isinstance(value, str):
        return value
    return IN_ADDRESS.sub(
        lambda address: HIDDEN if _own_text(address[0]).strip(":") else address[0], value
    )


def _own_text(text: str) -> str:
    """Return a text without its interpolations."""
    while (rest := INTERPOLATION.sub("", text)) != text:
        text = rest
    return text.strip()


def masked_override(word: str) -> str:
    """Return a word of the command line without secrets, also in nested values and texts."""
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")

    def hidden(part: re.Match[str]) -> str:
        secret = _own_text(part["value"]) and is_secret(f"{name}.{part['name']}")
        return f"{part['name']}{part['is']}{HIDDEN}" if secret else part[0]

    if is_secret(name):
        return f"{key}{equals}{masked(value, name)}"
    text = masked(value, name)
    nested = (
        part.end("name") for part in NESTED.finditer(text) if is_secret(f"{name}.{part['name']}")
    )
    if (end := next(nested, None)) is not None:  # the rest is hidden, wherever the value ends
        text = f"{text[:end]}: {HIDDEN}"
    return f"{key}{equals}{WITHIN.sub(hidden, text)}"


def masked_setting(name: str, value: Any) -> str:
    """Return `name=value` without secrets, for a person."""
    return f"{name}={masked(value, name)}"


def text_without(text: str, value: Any, name: str) -> str:
    """Return a text without the secrets that a value of this name has."""
    if isinstance(value, Mapping | list):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            text = text_without(text, each, f"{name}.{key}")
    elif masked(value, name) != value:
        for each in IN_ADDRESS.findall(str(value)) or [str(value)]:
            text = text.replace(each, HIDDEN)
    return text


def replayable(config: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as Hydra writes it, with secrets missing.

    A run from it asks for them.
    """
    values: dict[str, Any] = masked(OmegaConf.to_container(config), by=MISSING)
    if hydra := values.get("hydra"):
        words = hydra["overrides"]
        hydra["overrides"] = {kind: [*map(masked_override, each)] for kind, each in words.items()}
        if hydra["overrides"] != words:
            hydra["job"]["override_dirname"] = HIDDEN
    return values


def printable(config: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as it may be written: resolved and masked.

    A text, list or mapping from the environment stays the interpolation that it is.
    """
    with _watched() as reads:
        values: dict[str, Any] = masked(_resolved(config, OmegaConf.to_container(config), reads))
    return values


def _resolved(node: Any, raw: Any, reads: list[str]) -> Any:
    """Return a node's values; `raw` are those before, `reads` grows by what the node reads."""
    keys: Sequence[Any] = list(node) if isinstance(node, DictConfig) else range(len(node))
    values = {}
    for key in keys:
        before = len(reads)
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if len(reads) > before and not isinstance(value, int | float | None):
            values[key] = raw[key]
        elif isinstance(value, DictConfig | ListConfig):  # of an interpolation too
            values[key] = _resolved(value, OmegaConf.to_container(value), reads)
        else:
            values[key] = value
    return values if isinstance(node, DictConfig) else [values[key] for key in keys]


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Give a list that grows by the name of each variable that a configuration reads."""
    reads: list[str] = []

    def env(key: str, default: Any = None) -> Any:
        reads.append(key)
        return oc.env(key, default)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield reads
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
