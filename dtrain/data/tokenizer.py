"""Text to token ids and back.

Ids below 9 are free for marks: cleaned text holds no control characters but tab and newline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

END = 0  # the id after each document


class Tokenizer(ABC):
    """What prepares a corpus: trained on it if need be, kept beside it."""

    vocab_size: int

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that decides the ids: part of the cache's fingerprint."""

    def fit(self, texts: Iterable[str], folder: Path) -> None:  # noqa: B027  learning is optional
        """Learn from the training documents and save in `folder`."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Take up what `fit` has saved."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of a document, without its end mark."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; marks and broken characters are shown as U+FFFD or left out."""


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
        return bytes(i for i in ids if i != END).decode(errors="replace")


class BPE(Tokenizer):
    """Byte-level byte-pair encoding, trained on the corpus by the `tokenizers` library.

    Args:
        vocab_size: number of ids, the end mark and 256 bytes included.

    Raises:
        ValueError: fewer ids than 257, or `tokenizers` is not installed.
    """

    FILE = "tokenizer.json"

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 257:
            raise ValueError(f"data.tokenizer.vocab_size={vocab_size}: byte-pair encoding needs at least 257")
        try:
            import tokenizers
        except ImportError:
            raise ValueError("byte-pair encoding needs `tokenizers`: pip install 'dtrain[bpe]'") from None
        self._library, self.vocab_size = tokenizers, vocab_size
        self._tokenizer: Any = None

    def describe(self) -> dict[str, Any]:
        return {"kind": "bpe", "vocab_size": self.vocab_size, "library": self._library.__version__}

    def fit(self, texts: Iterable[str], folder: Path) -> None:
        lib = self._library
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=self.vocab_size, special_tokens=["\0"], show_progress=False,
            initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(folder / self.FILE))
        self._tokenizer = tokenizer

    def load(self, folder: Path) -> None:
        self._tokenizer = self._library.Tokenizer.from_file(str(folder / self.FILE))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i != END])
