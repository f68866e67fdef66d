"""Rows with several fields, such as a text and its label: read whole, and split by group."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.data.base import Data, Progress
from dtrain.data.cache import cached_folder, refuse_altered_content, refuse_changed
from dtrain.data.sources import Source, is_missing
from dtrain.data.tokenizer import BPE, KEPT, Tokenizer
from dtrain.files import json_files

Row = tuple[str, dict[str, Any]]  # where it stands, for messages; its fields
VERSION = 2  # of how rows are read and kept: part of the fingerprint
FILE = "rows.jsonl"
# for control characters whose ids serve as marks; no character moves
BLANKS = dict.fromkeys(range(KEPT), " ")


class Rows(Data):
    """A source's rows, held in memory. Which fields count is for the task to say.

    Args:
        name: for people.
        source, tokenizer: where the rows come from; how their texts become ids.
        validation_fraction: share of the rows (or groups) held out: by content, so that it does not
            change.
        group: a field; rows that agree in it are on one side. None, and a row that has none: each
            by itself.
        cache: folder where the rows are kept for the next run, if JSON can hold them; None:
            nowhere.

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
        cache: str | None = None,
    ) -> None:
        if isinstance(tokenizer, BPE):
            raise ValueError(
                "rows need a tokenizer that is known: data/tokenizer=bytes, or "
                "data/tokenizer=file with "
                "the one that the weights have learned with"
            )
        if not 0 < validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={validation_fraction} must be more than 0 and "
                f"less than 1"
            )
        self.name, self.source, self.tokenizer = name, source, tokenizer
        self.validation_fraction, self.group, self.cache = validation_fraction, group, cache
        self.left_out = Counter()
        self.split: dict[str, list[Row]] = {}

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def prepare(self, progress: Progress) -> None:
        self.split = {"train": [], "validation": []}
        for where, raw in self._rows(progress):
            row = {name: _without_controls(value, self.left_out) for name, value in raw.items()}
            if self.group and self.group not in row:
                raise ValueError(
                    f"{where} has no field {self.group!r}, only {', '.join(row)}: set data.group"
                )
            group = row[self.group] if self.group else None
            if self.group and (is_missing(group) or group == ""):
                self.left_out[f"rows without {self.group}, each a group of its own"] += 1
                group = None
            digest = hashlib.blake2b(
                repr(row if group is None else group).encode(), digest_size=8
            ).digest()
            held_out = int.from_bytes(digest, "big") < self.validation_fraction * 2**64
            self.split["validation" if held_out else "train"].append((where, row))
        for side, rows in self.split.items():
            if not rows:
                raise ValueError(
                    f"data {self.name}: no row is on the {side} side: use more rows, or another "
                    f"data.validation_fraction"
                )

    def _rows(self, progress: Progress) -> list[Row]:
        """The source's rows, from the cache if it has them."""
        read: list[Row] = []

        def make(folder: Path | None) -> None:
            for number, row in enumerate(self.source.rows(), start=1):
                if json_files.too_deep(row[1]):
                    raise ValueError(
                        f"{row[0]}: nested deeper than {json_files.DEEPEST} levels: leave such "
                        f"fields out"
                    )
                if folder and number == 1:
                    # other ranks wait for this one: in vain, if rows like these cannot be kept
                    _line(row)
                read.append(row)
                progress("reading", number)
            if folder:
                lines = [json.dumps(self.source.left_out), *map(_line, read)]
                (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")

        def settings() -> dict[str, Any]:
            return {"version": VERSION, "source": self.source.describe()}

        if self.cache is not None:
            try:
                self.kept = cached_folder(self.cache, self.name, settings, make)
            except _NoJSON:
                pass  # they are read each time
            else:
                with (
                    refuse_altered_content(file := self.kept / FILE),
                    file.open(encoding="utf-8") as lines,
                ):
                    self.left_out = Counter(dict(json_files.parse(next(lines, ""))))
                    return [(str(where), dict(row)) for where, row in map(json_files.parse, lines)]
        if not read:
            before = settings()
            make(None)
            refuse_changed(self.name, before, settings)
        self.left_out = Counter(self.source.left_out)
        return read

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for _, row in self.all():
            digest.update(repr(row).encode())
        sizes = {f"{side}_rows": len(rows) for side, rows in self.split.items()}
        return {"name": self.name, **sizes, "digest": digest.hexdigest()[:16]}

    def all(self) -> Iterator[Row]:
        for rows in self.split.values():
            yield from rows


class _NoJSON(Exception):
    """Rows hold something that JSON does not give back as it was."""


def _line(row: Row) -> str:
    try:
        line = json.dumps(row)
        same = json.loads(line) == list(row)
    except (TypeError, ValueError):
        raise _NoJSON from None
    if not same:
        raise _NoJSON
    return line


def _without_controls(value: Any, left_out: Counter[str]) -> Any:
    """A value whose texts have blanks where control characters were that would be read as marks."""
    if isinstance(value, str):
        made = value.translate(BLANKS)
        if made != value:
            left_out["control characters, now blanks"] += sum(
                a != b for a, b in zip(value, made, strict=True)
            )
        return made
    if isinstance(value, list):
        return [_without_controls(each, left_out) for each in value]
    return value
