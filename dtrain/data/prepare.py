"""Prepare a corpus once: clean, normalise, deduplicate, split by document, tokenise, write.

    documents -> clean text -> train.bin, validation.bin (token ids, memory-mapped) + corpus.json

The folder's name is a fingerprint of the source and the settings. It is made under another name and
renamed when whole, under a lock: a broken preparation leaves nothing, and of several ranks one works.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.base import Progress
from dtrain.data.sources import Source
from dtrain.data.tokenizer import Tokenizer

VERSION = 1  # of cleaning and of the files' form: part of the fingerprint
SPLITS = ("train", "validation")
# Control characters but tab and newline: none means anything in text, and their ids serve as marks.
CONTROLS = {code: None for code in range(32) if chr(code) not in "\t\n"} | {127: None}


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: what `corpus.json` says, and where its files are."""

    name: str
    documents: int
    duplicates: int
    text_bytes: int
    train_tokens: int
    validation_tokens: int
    token_bytes: int
    digest: str
    folder: str = ""

    def tokens(self, split: str) -> np.ndarray:
        """The token ids of `train` or `validation`, memory-mapped and read-only."""
        if not getattr(self, f"{split}_tokens"):
            return np.empty(0, dtype=f"u{self.token_bytes}")
        return np.memmap(Path(self.folder) / f"{split}.bin", dtype=f"u{self.token_bytes}", mode="r")

    def describe(self) -> dict[str, Any]:
        """Everything but its place on this machine."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def clean(text: str) -> str:
    """Unicode NFC, newlines as \\n, no control characters, no blanks at the ends of lines."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).translate(CONTROLS)
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n") + "\n"


def prepare(
    name: str, source: Source, tokenizer: Tokenizer, cache: str | Path, *,
    validation_fraction: float = 0.05, progress: Progress = lambda what, done: None,
) -> Corpus:  # fmt: skip
    """The prepared corpus, from the cache or made now; every process may call it at once.

    Raises:
        ValueError: nothing to read, or something that cannot be read; the cache is left as it was.
    """
    if "/" in name:
        raise ValueError(f"data.name={name} is a folder's name: it cannot hold a slash")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"data.validation_fraction={validation_fraction} must be more than 0 and less than 1")
    settings = {"version": VERSION, "source": source.describe(), "tokenizer": tokenizer.describe(),
                "validation_fraction": validation_fraction}  # fmt: skip
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(cache).expanduser()
    folder = cache / f"{name}-{fingerprint}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
        if not (folder / "corpus.json").exists():
            _make(name, folder, source, tokenizer, validation_fraction, progress)
    tokenizer.load(folder)
    return Corpus(**json.loads((folder / "corpus.json").read_text()), folder=str(folder))


def _make(name: str, folder: Path, source: Source, tokenizer: Tokenizer, fraction: float, progress: Progress) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        texts = _Texts(source, fraction, progress)
        tokenizer.fit((text for split, text in texts.read("learning tokens") if split == "train"), partial)
        counts = _write(partial, texts, tokenizer)
        digest = hashlib.sha256("".join(_digest(partial / f"{split}.bin") for split in SPLITS).encode()).hexdigest()
        corpus = Corpus(name, texts.documents, texts.duplicates, texts.text_bytes, *counts,
                        _width(tokenizer), digest[:16])  # fmt: skip
        (partial / "corpus.json").write_text(json.dumps(corpus.describe(), indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class _Texts:
    """The cleaned, different documents of a source, each with its split; counts them on the way."""

    def __init__(self, source: Source, fraction: float, progress: Progress) -> None:
        self._source, self._progress, self.fraction = source, progress, fraction
        self.documents = self.duplicates = self.text_bytes = 0

    def read(self, what: str) -> Iterator[tuple[str, str]]:
        self.documents = self.duplicates = self.text_bytes = 0
        seen: set[bytes] = set()
        for name, raw in self._source.documents():
            text = clean(raw)
            try:
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            except UnicodeEncodeError:
                raise ValueError(f"{name} holds half a surrogate pair, which is no UTF-8 text") from None
            if digest in seen or not text.strip():
                self.duplicates += 1
                continue
            seen.add(digest)
            self.documents += 1
            self.text_bytes += len(text.encode())
            self._progress(what, self.documents)
            # By content, so that a document keeps its side when others come or go.
            yield (
                ("validation" if int.from_bytes(digest[:8], "big") < self.fraction * 2**64 else "train"),
                text,
            )


def _write(folder: Path, texts: _Texts, tokenizer: Tokenizer) -> tuple[int, int]:
    """Write both token files; returns their sizes in tokens."""
    width = _width(tokenizer)
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        files = {"train": train, "validation": validation}
        for split, text in texts.read("tokenising"):
            ids = np.append(tokenizer.encode(text), tokenizer.marks.end).astype(f"u{width}")
            ids.tofile(files[split])
    if not texts.documents:
        raise ValueError("the data hold no text: every document is empty")
    if not all((folder / f"{split}.bin").stat().st_size for split in SPLITS):
        _cut(folder, width, texts)
    train_size, validation_size = ((folder / f"{split}.bin").stat().st_size // width for split in SPLITS)
    return train_size, validation_size


def _cut(folder: Path, width: int, texts: _Texts) -> None:
    """With too few documents to split by document, the end of the text becomes the validation split."""
    whole = np.concatenate([np.fromfile(folder / f"{split}.bin", dtype=f"u{width}") for split in SPLITS])
    at = len(whole) - max(1, int(len(whole) * texts.fraction))
    whole[:at].tofile(folder / "train.bin")
    whole[at:].tofile(folder / "validation.bin")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _width(tokenizer: Tokenizer) -> int:
    """Bytes of a token id in the files."""
    return next(width for width in (1, 2, 4) if tokenizer.vocab_size <= 256**width)
