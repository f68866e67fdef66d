"""What may be written down of a configuration: nothing that came out of the environment, nothing
named like a secret.

A run's figures, checkpoints and pages are passed round, and what it was given to reach a service is
not.
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
# Tokens that are a text's, or a model's.
OF_TEXT = re.compile(
    r"(?:^|[._-])(?:(?:bos|eos|eot|pad|unk|mask|sep|cls|end|start|stop|image|special|document)_tokens?|layout\.token)"
    r"(?=\.|$)",
    re.IGNORECASE,
)
COUNTED = re.compile("tokens?$", re.IGNORECASE)
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # https://name:password@host
# without a text of its own
INTERPOLATION = re.compile(r"\$\{[^${},]*(?:,\s*(?:null|''|\"\")?\s*)?\}")
# In Hydra's grammar, a list or mapping in a mapping; and a value of one, or of a setting in a text.
NESTED = re.compile(r"(?P<name>[\w.-]+):\s*[\[{]")
WITHIN = re.compile(
    r"""(?P<name>[\w.-]+)(?P<is>[:=]\s*)(?P<value>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|"""
    r"""(?:\$\{[^{}]*\}|\\.|[^,{}\[\]'"\\])+)"""
)


@dataclass(frozen=True)
class Asked:
    """What a run was asked for, as it may be written down.

    Args:
        config: resolved, but for what comes out of the environment.
        files: for the folder `.hydra`, by name; where a secret stood none does, so that it is asked
            for again.
    """

    config: dict[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)


def is_secret(name: str) -> bool:
    """Is what has this dotted name, or stands in a mapping that has it, likely to be such that
    nobody is to see it?
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return bool(NAMED.search(OF_TEXT.sub("", words))) and not name.endswith("._target_")


def masked(value: Any, name: str = "", *, by: str = HIDDEN) -> Any:
    """The same, without texts and numbers that are named like secrets, and without names and
    passwords in addresses.

    An interpolation (`${…}`) says where a secret is, and stays; so does what may be a number of
    tokens.

    Args:
        by: what stands in place of a secret.
    """
    if isinstance(value, Mapping):
        return {key: masked(each, f"{name}.{key}", by=by) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked(each, name, by=by) for each in value]
    if isinstance(value, int | float):
        return (
            value if isinstance(value, bool) or COUNTED.search(name) or not is_secret(name) else by
        )
    if not isinstance(value, str) or value == MISSING:
        return value
    if is_secret(name):
        return by if _said(value) else value
    return IN_ADDRESS.sub(lambda found: HIDDEN if _said(found[0]).strip(":") else found[0], value)


def _said(text: str) -> str:
    """What a text says besides its interpolations."""
    while (rest := INTERPOLATION.sub("", text)) != text:
        text = rest
    return text.strip()


def masked_override(word: str) -> str:
    """A word of the command line, likewise, also where it gives several values at once, or
    settings in a text.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")

    def hidden(found: re.Match[str]) -> str:
        secret = _said(found["value"]) and is_secret(f"{name}.{found['name']}")
        return f"{found['name']}{found['is']}{HIDDEN}" if secret else found[0]

    if is_secret(name):
        return f"{key}{equals}{masked(value, name)}"
    text = masked(value, name)
    nested = (
        found.end("name") for found in NESTED.finditer(text) if is_secret(f"{name}.{found['name']}")
    )
    if (end := next(nested, None)) is not None:  # where it ends nobody needs to know
        text = f"{text[:end]}: {HIDDEN}"
    return f"{key}{equals}{WITHIN.sub(hidden, text)}"


def masked_setting(name: str, value: Any) -> str:
    """A setting for a person: `name=value`, likewise."""
    return f"{name}={masked(value, name)}"


def text_without(text: str, value: Any, name: str) -> str:
    """A text without what is hidden of a value."""
    if isinstance(value, Mapping | list):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            text = text_without(text, each, f"{name}.{key}")
    elif masked(value, name) != value:
        for each in IN_ADDRESS.findall(str(value)) or [str(value)]:
            text = text.replace(each, HIDDEN)
    return text


def replayable(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as Hydra keeps it, masked: where a secret stood nothing does,
    and it is asked for.
    """
    found: dict[str, Any] = masked(OmegaConf.to_container(config), by=MISSING)
    if hydras := found.get("hydra"):
        words = hydras["overrides"]
        hydras["overrides"] = {kind: [*map(masked_override, each)] for kind, each in words.items()}
        if hydras["overrides"] != words:
            hydras["job"]["override_dirname"] = HIDDEN
    return found


def printable(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as it may be written down: resolved, and masked.

    A text, list or mapping that comes out of the environment stands there as the interpolation that
    it is.
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
        if len(reads) > before and not isinstance(value, int | float | None):
            found[key] = raw[key]
        elif isinstance(value, DictConfig | ListConfig):  # of an interpolation too
            found[key] = _resolved(value, OmegaConf.to_container(value), reads)
        else:
            found[key] = value
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
