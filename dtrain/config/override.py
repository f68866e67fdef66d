"""A setting as a word of the command line: key=value in Hydra's grammar, and in the quotes that
a shell needs.
"""

from __future__ import annotations

import shlex
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException


def parsed(word: str) -> Override | None:
    """What Hydra reads in a word; None: its grammar has no such word."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def value_of(found: Override) -> Any:
    """As the configuration gets it: text without its quotes. A sweep is an object of Hydra's."""
    value = found.value()
    return value.text if isinstance(value, QuotedString) else value


def setting(key: str, text: str) -> str:
    """The word that gives a key this text, in Hydra's quotes if its grammar would read it
    otherwise, or not at all.
    """
    plain = f"{key}={text}"
    found = parsed(plain)
    if found is not None and not found.is_sweep_override() and value_of(found) == text:
        return plain
    return f"{key}={QuotedString(text=text, quote=Quote.single).with_quotes()}"


def for_a_shell(key: str, text: str) -> str:
    """The same for a person to type: in a shell's quotes, if that needs them."""
    word = setting(key, text)
    if shlex.quote(word) == word:
        return word
    return shlex.quote(word) if set(word) & set('"$`\\!') else f'"{word}"'
