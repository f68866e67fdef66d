"""Text to token ids and back.

Our own tokenizers keep ids below 9 for marks: cleaned text holds no control characters but tab and newline.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KEPT = 9  # ids for marks


@dataclass(frozen=True)
class Marks:
    """Ids that stand for no text.

    Args:
        end: after each document, and to fill up rows.
        hidden: in the place of a token to be found.
        first, between: before a row; between its two parts.
        yes, no: answers to whether two parts belong together.
    """

    end: int = 0
    hidden: int = 1
    first: int = 2
    between: int = 3
    yes: int = 4
    no: int = 5


class Tokenizer(ABC):
    """What prepares a corpus: trained on it if need be, kept beside it."""

    vocab_size: int
    marks = Marks()
    missing: frozenset[str] = frozenset()  # marks that it has no id for: `end` stands for them

    def need(self, *marks: str, why: str) -> None:
        """Raise ValueError if one of these marks is missing."""
        if lacking := sorted(self.missing & set(marks)):
            raise ValueError(f"the tokenizer has no mark for {', '.join(lacking)}, which {why} needs: use "
                             f"another, such as data/tokenizer=bpe")  # fmt: skip

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that decides the ids: part of the cache's fingerprint."""

    def fit(self, texts: Iterable[str], folder: Path) -> None:  # noqa: B027  learning is optional
        """Learn from the training documents and save in `folder`."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Keep what has been learned in `folder`."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Take up what `save` has kept."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of a document, without its end mark."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; marks are left out, broken characters shown as U+FFFD."""

    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """For each id: does its text begin within a word, and does it end within one? (V,), (V,)"""
        texts = [self.decode([i]) or " " for i in range(self.vocab_size)]
        inside = [[c.isalnum() or c in "_\ufffd" for c in (text[0], text[-1])] for text in texts]
        begins, ends = np.array(inside).T
        return begins, ends


class Bytes(Tokenizer):
    """One token per byte of UTF-8; 256 ids, nothing to learn."""

    def __init__(self, vocab_size: int = 256) -> None:
        if vocab_size != 256:
            raise ValueError(
                f"data.tokenizer.vocab_size={vocab_size}: bytes have 256 ids; for more use data/tokenizer=bpe"
            )
        self.vocab_size = vocab_size

    def describe(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i >= KEPT).decode(errors="replace")


class FromFile(Tokenizer):
    """A tokenizer that has been learned: `tokenizer.json` of a prepared corpus or of a model of `transformers`.

    Args:
        path: the file, or a folder that has one.
        vocab_size: number of ids, which the file must have.

    Raises:
        ValueError: no such file, one that is no tokenizer, or of another size.
    """

    NAMES = {  # what marks are called, the likeliest first
        "end": ("\0", "[PAD]", "<pad>", "</s>", "<|endoftext|>"), "hidden": ("\1", "[MASK]", "<mask>"),
        "first": ("\2", "[CLS]", "<s>", "<|begin_of_text|>"), "between": ("\3", "[SEP]", "</s>"),
        "yes": ("\4",), "no": ("\5",),
    }  # fmt: skip

    def __init__(self, path: str, vocab_size: int) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError("tokenizer files need `tokenizers`: pip install 'dtrain[bpe]'") from None
        file = Path(path).expanduser()
        self._file = file / BPE.FILE if file.is_dir() else file
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(self._file))
        except Exception as error:  # noqa: BLE001  the library raises nothing narrower
            raise ValueError(f"data.tokenizer.path={path}: {str(error).splitlines()[0]}") from None
        self.vocab_size = self._tokenizer.get_vocab_size()
        if vocab_size != self.vocab_size:
            raise ValueError(f"data.tokenizer.vocab_size={vocab_size}: {self._file} has {self.vocab_size} ids")
        known = {mark: [i for n in names if (i := self._tokenizer.token_to_id(n)) is not None]
                 for mark, names in self.NAMES.items()}  # fmt: skip
        end = known["end"][0] if known["end"] else 0
        self.missing = frozenset(mark for mark, ids in known.items() if not ids)
        self.marks = Marks(**{mark: ids[0] if ids else end for mark, ids in known.items()})

    def describe(self) -> dict[str, Any]:
        return {"kind": "file", "digest": hashlib.sha256(self._file.read_bytes()).hexdigest()[:16]}

    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """As of every tokenizer, but WordPiece marks what goes on (`##`), and others what begins."""
        begins, ends = super().words()
        raw = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        if any(token.startswith("##") for token in raw):
            return np.array([token.startswith("##") for token in raw]), np.ones(self.vocab_size, dtype=bool)
        begins &= np.array([not token.startswith(("\u2581", "\u0120")) for token in raw])
        return begins, ends

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))


class BPE(Tokenizer):
    """Byte-level byte-pair encoding, trained on the corpus by the `tokenizers` library.

    Args:
        vocab_size: number of ids, 9 marks and 256 bytes included.

    Raises:
        ValueError: fewer ids than 265, or `tokenizers` is not installed.
    """

    FILE = "tokenizer.json"

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < KEPT + 256:
            raise ValueError(f"data.tokenizer.vocab_size={vocab_size}: byte-pair encoding needs at least {KEPT + 256}")
        try:
            import tokenizers
        except ImportError:
            raise ValueError("byte-pair encoding needs `tokenizers`: pip install 'dtrain[bpe]'") from None
        self._library, self.vocab_size = tokenizers, vocab_size
        self._tokenizer: Any = None

    def describe(self) -> dict[str, Any]:
        return {"kind": "bpe", "vocab_size": self.vocab_size, "marks": KEPT, "library": self._library.__version__}

    def fit(self, texts: Iterable[str], folder: Path) -> None:
        lib = self._library
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=self.vocab_size, special_tokens=list(map(chr, range(KEPT))), show_progress=False,
            initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        self._tokenizer = tokenizer
        self.save(folder)

    def save(self, folder: Path) -> None:
        self._tokenizer.save(str(folder / self.FILE))

    def load(self, folder: Path) -> None:
        self._tokenizer = self._library.Tokenizer.from_file(str(folder / self.FILE))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i >= KEPT])
