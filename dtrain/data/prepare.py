"""Prepare a corpus once: clean, normalise, deduplicate, split by document, tokenise, write.

    documents -> clean text, on two sides -> train.bin, validation.bin (token ids, memory-mapped),
                                             corpus.json

The source is read once. Its clean text waits on the disk until it is known which side each document
is on; only then a tokenizer learns.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.base import Progress, check_validation_fraction
from dtrain.data.cache import cached_folder, refuse_altered_content
from dtrain.data.paths import left_out_in_words
from dtrain.data.sources import Source
from dtrain.data.tokenizer import Tokenizer
from dtrain.files import json_files

VERSION = 3  # of reading, cleaning and of the files' form: part of the fingerprint
SPLITS = ("train", "validation")
# Control characters mean nothing in text, and their ids serve as marks. Some separate lines or
# words.
CONTROLS = {code: None for code in range(32) if chr(code) not in "\t\n"} | {127: None}
BLANKS = "blanks at the ends of lines, or empty lines at those of documents"
SEPARATORS = str.maketrans(dict.fromkeys("\v\f\x1c\x1d\x1e", "\n") | {"\x1f": " "})


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: what `corpus.json` says, and where its files are.

    Args:
        left_out: number of things in the source and its texts that are in no token, by kind.
    """

    name: str
    documents: int
    duplicates: int
    text_bytes: int
    train_tokens: int
    validation_tokens: int
    token_bytes: int
    digest: str
    left_out: dict[str, int] = field(default_factory=dict)
    folder: str = ""

    def tokens(self, split: str) -> np.ndarray:
        """Map the token ids of `train` or `validation` into memory, read-only."""
        if not getattr(self, f"{split}_tokens"):
            return np.empty(0, dtype=f"u{self.token_bytes}")
        return np.memmap(Path(self.folder) / f"{split}.bin", dtype=f"u{self.token_bytes}", mode="r")

    def describe(self) -> dict[str, Any]:
        """Return everything but its folder on this machine and what was left out."""
        return {
            key: value for key, value in asdict(self).items() if key not in ("folder", "left_out")
        }


def normalize(text: str) -> str:
    """Return the text in NFC, its newlines as \\n, no control characters, no trailing blanks."""
    return normalize_and_count(text, Counter())


def normalize_and_count(text: str, left_out: Counter[str]) -> str:
    """Return the normalized text, and count the characters that it lacks in `left_out`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(SEPARATORS)
    printable = text.translate(CONTROLS)
    left_out["control characters"] += len(text) - len(printable)
    text = unicodedata.normalize("NFC", printable)
    stripped = "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")
    left_out[BLANKS] += len(text.removesuffix("\n")) - len(stripped)
    return stripped + "\n"


def prepare(
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    validation_fraction: float = 0.05,
    progress: Progress = lambda what, done: None,
) -> Corpus:
    """Return the prepared corpus, from the cache or made now; many processes may call it at once.

    Raises:
        ValueError: there is nothing to read, or something cannot be read; the cache is left alone.
    """
    check_validation_fraction(validation_fraction)
    form = {"version": VERSION, "form": [each.name for each in fields(Corpus)]}
    choices = {"tokenizer": tokenizer.describe(), "validation_fraction": validation_fraction}

    def make(folder: Path) -> None:
        texts = _Texts(source, validation_fraction, progress, folder)
        tokenizer.fit(
            (text for split, _, text, _ in texts.read("learning tokens") if split == "train"),
            folder,
        )
        corpus = _write(name, folder, texts, tokenizer)
        (folder / "corpus.json").write_text(
            json.dumps(asdict(corpus), indent=2) + "\n", encoding="utf-8"
        )
        texts.file.unlink()

    folder = cached_folder(
        cache, name, lambda: form | {"source": source.describe()} | choices, make
    )
    tokenizer.load(folder)
    with refuse_altered_content(folder / "corpus.json"):
        return _load(folder)


def _load(folder: Path) -> Corpus:
    record = json_files.read(folder / "corpus.json") | {"folder": str(folder)}
    kinds = {"str": str, "int": int, "dict[str, int]": dict}  # by their annotations in `Corpus`
    for each in fields(Corpus):
        if type(record.get(each.name)) is not kinds[str(each.type)]:
            raise ValueError(f"it has {each.name}={str(record.get(each.name))[:40]}")
    corpus = Corpus(**record)
    for split in SPLITS:
        size, tokens = (folder / f"{split}.bin").stat().st_size, record[f"{split}_tokens"]
        if corpus.token_bytes not in (1, 2, 4) or size != tokens * corpus.token_bytes:
            raise ValueError(f"{split}.bin has {size:,} bytes")
    if any(type(number) is not int for number in corpus.left_out.values()):
        raise ValueError("left_out has what is no number")
    return corpus


class _Texts:
    """The cleaned, distinct documents of a source in a file, each with its split.

    If all documents are on one side, the end of the text is held out: a document may be cut.
    """

    def __init__(self, source: Source, fraction: float, progress: Progress, folder: Path) -> None:
        self._progress, self.file = progress, folder / "texts"
        self.duplicates = self.text_bytes = characters = 0
        # of each document: bytes of its name and text; is it held out?
        self._places: list[tuple[int, int, bool]] = []
        self.left_out = Counter[str]()
        seen: set[bytes] = set()
        with self.file.open("wb") as stream:
            for name, raw in source.documents():
                lost = Counter[str]()
                text = normalize_and_count(raw, lost)
                try:
                    encoded, name_of_it = text.encode(), name.encode(errors="replace")
                except UnicodeEncodeError:
                    raise ValueError(
                        f"{name} holds half a surrogate pair, which is no UTF-8 text"
                    ) from None
                digest = hashlib.blake2b(encoded, digest_size=16).digest()
                if not text.strip():
                    self.left_out["empty documents"] += 1
                elif digest in seen:
                    self.duplicates += 1
                else:
                    seen.add(digest)
                    self.left_out += lost
                    self.text_bytes += len(encoded)
                    characters += len(text) + 1
                    stream.write(name_of_it + encoded)
                    # by content, so that a document keeps its side when others come or go.
                    held_out = int.from_bytes(digest[:8], "big") < fraction * 2**64
                    self._places.append((len(name_of_it), len(encoded), held_out))
                    progress("reading", len(self._places))
        self.left_out += source.left_out
        if not self._places:
            losses = f" ({left_out_in_words(self.left_out)})" if self.left_out else ""
            raise ValueError(f"the data hold no text: every document is empty{losses}")
        one_side = len({held_out for *_, held_out in self._places}) == 1
        # where the validation text begins, in characters and ends of documents
        self._cut = characters - max(1, int(characters * fraction)) if one_side else None

    @property
    def documents(self) -> int:
        return len(self._places)

    def read(self, what: str) -> Iterator[tuple[str, str, str, bool]]:
        """Yield split, name and text of each part, and whether the document ends with it."""
        before = 0
        with self.file.open("rb") as stream:
            for number, (named, size, held_out) in enumerate(self._places, start=1):
                name, text = stream.read(named).decode(), stream.read(size).decode()
                self._progress(what, number)
                if self._cut is None:
                    yield SPLITS[held_out], name, text, True
                    continue
                at, before = self._cut - before, before + len(text) + 1
                if at > 0:
                    yield "train", name, text[:at], at > len(text)
                if at <= len(text):
                    yield "validation", name, text[max(0, at) :], True


def _write(name: str, folder: Path, texts: _Texts, tokenizer: Tokenizer) -> Corpus:
    """Write both token files, and return what `corpus.json` says of them."""
    width, counts = _width(tokenizer), dict.fromkeys(SPLITS, 0)
    digests = {split: hashlib.sha256() for split in SPLITS}
    tokenizer.left_out.clear()
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "validation.bin").open("wb") as validation,
    ):
        files = {"train": train, "validation": validation}
        for split, where, text, ended in texts.read("tokenising"):
            try:
                ids = np.append(
                    tokenizer.encode(text).astype(np.int64),
                    np.full(int(ended), tokenizer.marks.end),
                )
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
                raise ValueError(
                    f"{where}: the tokenizer makes ids from {ids.min()} to {ids.max()}, and says "
                    f"that it has {tokenizer.vocab_size}"
                )
            written = ids.astype(f"u{width}").tobytes()
            files[split].write(written)
            digests[split].update(written)
            counts[split] += len(ids)
    digest = hashlib.sha256(
        "".join(digests[split].hexdigest() for split in SPLITS).encode()
    ).hexdigest()
    lost = {
        kind: number for kind, number in (texts.left_out + tokenizer.left_out).items() if number
    }
    return Corpus(
        name,
        texts.documents,
        texts.duplicates,
        texts.text_bytes,
        counts["train"],
        counts["validation"],
        width,
        digest[:16],
        lost,
    )


def _width(tokenizer: Tokenizer) -> int:
    """Return the bytes of a token id in the files."""
    return next(width for width in (1, 2, 4) if tokenizer.vocab_size <= 256**width)
