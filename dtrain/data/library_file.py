"""A file of the `tokenizers` library's: opened, and what can be known of its losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtrain.files import json_files

PLACES = ("continuing_subword_prefix", "end_of_word_suffix")
# Normalizers that do with a character what they do with it alone.
ONE_BY_ONE = (
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "Strip",
    "StripAccents",
    "Nmt",
    "BertNormalizer",
    "Prepend",
    "ByteLevel",
)


def opened(library: Any, file: Path, said: str) -> Any:
    """The tokenizer in a file.

    Raises:
        ValueError: there is none; begins with `said`.
    """
    try:
        if file.exists():
            json_files.check_regular(file)
        return library.Tokenizer.from_file(str(file))
    except BaseException as error:  # noqa: BLE001  the library raises nothing narrower
        raise ValueError(f"{said}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """What the library says of its failure; what is none of its, such as Ctrl-C, goes on."""
    # which is no Exception
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return next(iter(str(error).splitlines()), type(error).__name__)


def one_by_one(told: dict[str, Any]) -> bool:
    """Is a character lost for itself alone, so that it can be counted?

    `told`: what the library writes.
    """
    model = told["model"]
    if model.get("type", "BPE") == "BPE" and any(model.get(part) for part in PLACES):
        return False  # a character may be known in one place of a word and not in another
    parts = [told.get("normalizer") or {"type": "NFC"}]
    while any(part["type"] == "Sequence" for part in parts):
        parts = [
            each
            for part in parts
            for each in (part["normalizers"] if part["type"] == "Sequence" else [part])
        ]
    texts = [part["pattern"].get("String", "") for part in parts if part["type"] == "Replace"]
    return all(part["type"] in (*ONE_BY_ONE, "Replace") for part in parts) and all(
        len(text) == 1 for text in texts
    )
