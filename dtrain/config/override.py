"""Read and write settings as words of the command line: key=value in Hydra's grammar."""

from __future__ import annotations

import shlex
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException


def parsed(word: str) -> Override | None:
    """Return what Hydra reads in a word; None: its grammar has no such word."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def value_of(override: Override) -> Any:
    """Return the value that the configuration gets; of a sweep, an object of Hydra's."""
    value = override.value()
    return value.text if isinstance(value, QuotedString) else value


def setting(key: str, text: str) -> str:
    """Return the word that gives a key this text, in Hydra's quotes if its grammar needs them."""
    plain = f"{key}={text}"
    override = parsed(plain)
    if override and not override.is_sweep_override() and value_of(override) == text:
        return plain
    return f"{key}={QuotedString(text=text, quote=Quote.single).with_quotes()}"


def for_a_shell(key: str, text: str) -> str:
    """Return the same word for a person to type: in a shell's quotes, if it needs them."""
    word = setting(key, text)
    if shlex.quote(word) == word:
        return word
    return shlex.quote(word) if set(word) & set('"$`\\!') else f'"{word}"'
