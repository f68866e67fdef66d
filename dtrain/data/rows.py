"""Rows with several fields, such as a text and its label: read whole, and split by group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from dtrain.data.base import Data, Progress
from dtrain.data.sources import Source
from dtrain.data.tokenizer import BPE, Tokenizer

Row = tuple[str, dict[str, Any]]  # where it stands, for messages; its fields


class Rows(Data):
    """A source's rows, held in memory. Which fields count is for the task to say.

    Args:
        name: for people.
        source, tokenizer: where the rows come from; how their texts become ids.
        validation_fraction: share of the rows (or groups) held out: by content, so that it does not change.
        group: a field; rows that agree in it are on one side. None: each row by itself.

    Raises:
        ValueError: a tokenizer that would be learned from these few rows.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        tokenizer: Tokenizer,
        validation_fraction: float = 0.2,
        group: str | None = None,
    ) -> None:
        if isinstance(tokenizer, BPE):
            raise ValueError("rows need a tokenizer that is known: data/tokenizer=bytes, or data/tokenizer=file with "
                             "the one that the weights have learned with")  # fmt: skip
        if not 0 < validation_fraction < 1:
            raise ValueError(f"data.validation_fraction={validation_fraction} must be more than 0 and less than 1")
        self.name, self.source, self.tokenizer = name, source, tokenizer
        self.validation_fraction, self.group = validation_fraction, group
        self.split: dict[str, list[Row]] = {}

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def prepare(self, progress: Progress) -> None:
        self.split = {"train": [], "validation": []}
        for number, (where, row) in enumerate(self.source.rows(), start=1):
            if self.group and self.group not in row:
                raise ValueError(f"{where} has no field {self.group!r}, only {', '.join(row)}: set data.group")
            digest = hashlib.blake2b(repr(row[self.group] if self.group else row).encode(), digest_size=8).digest()
            held_out = int.from_bytes(digest, "big") < self.validation_fraction * 2**64
            self.split["validation" if held_out else "train"].append((where, row))
            progress("reading", number)
        for side, rows in self.split.items():
            if not rows:
                raise ValueError(f"data {self.name}: no row is on the {side} side: use more rows, or another "
                                 f"data.validation_fraction")  # fmt: skip

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for _, row in self.all():
            digest.update(repr(row).encode())
        sizes = {f"{side}_rows": len(rows) for side, rows in self.split.items()}
        return {"name": self.name, **sizes, "digest": digest.hexdigest()[:16]}

    def all(self) -> Iterator[Row]:
        for rows in self.split.values():
            yield from rows
