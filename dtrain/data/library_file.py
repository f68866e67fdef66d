"""Tokenizer files of the `tokenizers` library: open them, and find out what they lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtrain.files import json_files

AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
# Normalizers that change each character without regard to its neighbours.
ONE_BY_ONE = (
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer",
    "Prepend", "ByteLevel",
)  # fmt: skip


def open_tokenizer(library: Any, file: Path, key: str) -> Any:
    """Open the tokenizer in a file.

    Raises:
        ValueError: there is none; the message begins with `key`.
    """
    try:
        if file.exists():
            json_files.check_regular(file)
        return library.Tokenizer.from_file(str(file))
    except BaseException as error:  # noqa: BLE001  the library raises nothing narrower
        raise ValueError(f"{key}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of the library's error; raise on others, such as KeyboardInterrupt."""
    # the library's PanicException is no Exception
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return next(iter(str(error).splitlines()), type(error).__name__)


def loses_one_by_one(definition: dict[str, Any]) -> bool:
    """Return whether each character is lost by itself, so that losses can be counted.

    Args:
        definition: the tokenizer as the library writes it.
    """
    model = definition["model"]
    if model.get("type", "BPE") == "BPE" and any(model.get(affix) for affix in AFFIXES):
        return False  # a character may be known in one place of a word and not in another
    return all(
        len(part["pattern"].get("String", "")) == 1
        if part["type"] == "Replace"
        else part["type"] in ONE_BY_ONE
        for part in _flat(definition.get("normalizer") or {"type": "NFC"})
    )


def _flat(normalizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the normalizers in a sequence, and in those within it."""
    if normalizer["type"] != "Sequence":
        return [normalizer]
    return [part for each in normalizer["normalizers"] for part in _flat(each)]
