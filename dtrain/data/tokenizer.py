"""Text to token ids and back.

Our own tokenizers keep ids below 9 for marks: cleaned text holds no control characters but tab and
newline.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from dtrain.data.library_file import first_line, one_by_one, opened
from dtrain.data.paths import expanded
from dtrain.files import json_files

KEPT = 9  # ids for marks
DROPPED = "characters that the tokenizer drops"
BROKEN = "characters that the tokenizer drops a part of"
UNSURE = "characters or so that the tokenizer drops or replaces (it does not tell exactly)"


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
    left_out: Counter[str] = Counter()  # of what texts lose in `encode`, by kind
    missing: frozenset[str] = frozenset()  # marks that it has no id for: `end` stands for them

    def need(self, *marks: str, why: str) -> None:
        """Raise ValueError if one of these marks is missing."""
        if lacking := sorted(self.missing & set(marks)):
            raise ValueError(
                f"the tokenizer has no mark for {', '.join(lacking)}, which {why} needs: use "
                f"another, such as data/tokenizer=bpe"
            )

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
                f"data.tokenizer.vocab_size={vocab_size}: bytes have 256 ids; for more use "
                f"data/tokenizer=bpe"
            )
        self.vocab_size = vocab_size

    def describe(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i >= KEPT).decode(errors="replace")


class FromFile(Tokenizer):
    """A tokenizer that has been learned: `tokenizer.json` of a prepared corpus or of a model of
    `transformers`.

    Args:
        path: the file, or a folder that has one.
        vocab_size: number of ids, the highest and one, which the file must have.
        end: the token after each document; None: the first of the names below that it has.

    Raises:
        ValueError: no such file, one that is no tokenizer, of another size, or without an end.
    """

    NAMES = {  # what marks are called, the likeliest first
        "end": ("\0", "[PAD]", "<pad>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>",
                "[EOS]", "<EOS>",
                "<|eos|>", "<|im_end|>", "<|end▁of▁sentence|>", "<end_of_text>", "<endoftext>",
                "[END]", "<end>"),
        "hidden": ("\1", "[MASK]", "<mask>"),
        "first": ("\2", "[CLS]", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<BOS>", "<|bos|>"),
        "between": ("\3", "[SEP]", "</s>"),
        "yes": ("\4",), "no": ("\5",),
    }  # fmt: skip

    def __init__(self, path: str, vocab_size: int, end: str | None = None) -> None:
        self._file, tokenizer = _read(path)
        self._tokenizer = plain(tokenizer)
        known = self._tokenizer.get_vocab()
        self.vocab_size = _ids(known)
        if vocab_size != self.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size={vocab_size}: {self._file} has {self.vocab_size} ids"
            )
        self.left_out = Counter[str]()
        self._library = version("tokenizers")
        told = json.loads(self._tokenizer.to_str())
        self._model = model = told["model"]
        self._byte_pairs = model.get("type", "BPE") == "BPE"
        self._outside = DROPPED if one_by_one(told) else UNSURE
        # Unigram has an id
        self._unknown: int | None = model.get("unk_id", known.get(model.get("unk_token") or ""))
        self._losses: dict[str, str] = {}  # by character
        self._added = {
            token.content for token in self._tokenizer.get_added_tokens_decoder().values()
        }
        self._set_marks(path, known, end)

    def _set_marks(self, path: str, known: dict[str, int], end: str | None) -> None:
        """The ids of the marks, by their names.

        Raises:
            ValueError: no token is known to end a document.
        """
        if end is not None and end not in known:
            raise ValueError(f"data.tokenizer.end={end}: {self._file} has no such token")
        names = self.NAMES | {
            "end": (end,) if end is not None else (*self.NAMES["end"], *self._ends_beside())
        }
        found = {mark: [known[name] for name in names[mark] if name in known] for mark in names}
        if not found["end"]:
            special = [
                t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special
            ]
            raise ValueError(
                f"data.tokenizer.path={path}: which token ends a document? None has a name known "
                f"for it: "
                f"set data.tokenizer.end to one of {', '.join(special[:12]) or 'its tokens'}"
            )
        self.missing = frozenset(mark for mark, ids in found.items() if not ids)
        self.marks = Marks(
            **{mark: ids[0] if ids else found["end"][0] for mark, ids in found.items()}
        )
        self._marked = np.array(sorted({ids[0] for ids in found.values() if ids}))
        self._tokenizer.add_special_tokens(
            [self._tokenizer.id_to_token(int(i)) for i in self._marked]
        )

    def _ends_beside(self) -> list[str]:
        """What the configuration beside the file calls its end, as `transformers` saves it."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            try:
                token = json_files.read(self._file.parent / name).get("eos_token")
            except (OSError, ValueError):
                continue
            if isinstance(token := token.get("content") if isinstance(token, dict) else token, str):
                return [token]
        return []

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._file.read_bytes()).hexdigest()[:16]
        return {"kind": "file", "digest": digest, "end": self.marks.end, "library": self._library}

    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """As of every tokenizer, but WordPiece marks what goes on (`##`), and others what
        begins.
        """
        begins, ends = super().words()
        raw = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        if any(token.startswith("##") for token in raw):
            return np.array([token.startswith("##") for token in raw]), np.ones(
                self.vocab_size, dtype=bool
            )
        begins &= np.array([not token.startswith(("\u2581", "\u0120")) for token in raw])
        return begins, ends

    def encode(self, text: str) -> np.ndarray:
        """Token ids; what no token stands for is counted in `left_out`.

        Raises:
            ValueError: the tokenizer fails, or reads one of its marks in the text.
        """
        try:
            made = self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:  # noqa: BLE001  the library raises nothing narrower
            said = first_line(error)
            raise ValueError(f"{self._file}: {self._cause(text) or said}") from None
        ids = np.asarray(made.ids, dtype=np.uint32)
        if (marked := np.flatnonzero(np.isin(ids, self._marked))).size:
            token = self._tokenizer.id_to_token(int(ids[marked[0]]))
            raise ValueError(
                f"the text holds {token!r}, which {self._file} reads as its mark: take it out "
                f"of the "
                f"text, or make it a special token of the tokenizer's"
            )
        self._count(text, ids, made.offsets)
        return ids

    def _count(self, text: str, ids: np.ndarray, offsets: list[tuple[int, int]]) -> None:
        """Count the characters that are in no token, blanks aside, and the tokens for what is
        unknown.
        """
        if self._unknown is not None:
            self.left_out["tokens for what the tokenizer does not know"] += int(
                (ids == self._unknown).sum()
            )
        alone = set(text) if self._outside == DROPPED else ()
        lost = {character: kind for character in alone if (kind := self._loss(character))}
        for character, kind in lost.items():
            self.left_out[kind] += text.count(character)
        # the library's offsets of what comes after a dropped character are wrong
        if lost and self._byte_pairs:
            text = text.translate(dict.fromkeys(map(ord, lost)))
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        inside = np.zeros(len(text) + 1, dtype=np.int64)
        places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        np.add.at(inside, places[:, 0], 1)
        np.add.at(inside, places[:, 1], -1)
        outside = np.flatnonzero(inside.cumsum()[:-1] == 0)
        self.left_out[self._outside] += sum(
            not text[i].isspace() and text[i] not in lost for i in outside
        )

    def _loss(self, character: str) -> str:
        """What it loses wherever it stands: all of it, a part, or (an empty string) nothing."""
        if character not in self._losses:
            self._losses[character] = "" if character.isspace() else self._loss_alone(character)
        return self._losses[character]

    def _loss_alone(self, character: str) -> str:
        try:
            ids = self._tokenizer.encode(character, add_special_tokens=False).ids
        except Exception:  # noqa: BLE001  not known alone; but in a word it is
            return ""
        if not ids or (
            self._byte_pairs and self._unknown not in ids and not self.decode(ids).strip()
        ):
            return DROPPED
        known, model = self._tokenizer.get_vocab(), self._model
        if not self._byte_pairs or self._unknown is not None or character in self._added:
            return ""
        normalizer, cut = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        made = normalizer.normalize_str(character) if normalizer else character
        pieces = [piece for piece, _ in cut.pre_tokenize_str(made)] if cut else [made]
        if model.get("ignore_merges"):
            pieces = [piece for piece in pieces if piece not in known]
        lacking = {symbol for piece in pieces for symbol in piece if symbol not in known}
        if model.get("byte_fallback"):
            lacking = {
                s for s in lacking if any(f"<0x{byte:02X}>" not in known for byte in s.encode())
            }
        return BROKEN if lacking else ""

    def _cause(self, text: str) -> str:
        """Which character is the cause, if one is."""
        for character in sorted(set(text)):
            try:
                self._tokenizer.encode(character, add_special_tokens=False)
            except Exception:  # noqa: BLE001
                return (
                    f"no token stands for {character!r}, and none for what is unknown: use "
                    f"another tokenizer"
                )
        return ""

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))


def _read(path: str) -> tuple[Path, Any]:
    """The file that `data.tokenizer.path` names, itself or by its folder, and the library's
    tokenizer in it.

    Raises:
        ValueError: no such file, or one that is no tokenizer.
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError("tokenizer files need `tokenizers`: pip install 'dtrain[bpe]'") from None
    file = expanded(path, "data.tokenizer.path")
    file = file / BPE.FILE if file.is_dir() else file
    return file, opened(tokenizers, file, f"data.tokenizer.path={path}")


def _ids(known: dict[str, int]) -> int:
    """Of a vocabulary, whose ids may have gaps."""
    return max(known.values(), default=-1) + 1


def count_ids(path: str) -> int:
    """The ids of a tokenizer's file, the highest and one; 0 if there is none: `FromFile` says
    why.
    """
    try:
        file = expanded(path, "data.tokenizer.path")
        return _count_ids(path, file.stat().st_mtime_ns)
    except (OSError, ValueError, RuntimeError):
        return 0


def _ids_in(key: str, *, _parent_: DictConfig) -> int:
    """`${ids_in:KEY}`: how many ids the tokenizer has whose path that key tells; 0 if its class
    will refuse it.
    """
    return 0 if OmegaConf.is_missing(_parent_, key) else count_ids(str(_parent_[key]))


OmegaConf.register_new_resolver("ids_in", _ids_in, replace=True)


@lru_cache
def _count_ids(path: str, _: int) -> int:
    """A configuration is read more than once, and a file may have some MB."""
    return _ids(_read(path)[1].get_vocab())


def plain(tokenizer: Any) -> Any:
    """A tokenizer of the library's that turns a whole text into tokens, always the same ones.

    What a file may have saved beside its tokens is put away: truncation, padding, chance (BPE's
    dropout), and that the names of special tokens, where a text has them, are read as these tokens.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True
    return tokenizer


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
            raise ValueError(
                f"data.tokenizer.vocab_size={vocab_size}: byte-pair encoding needs at least "
                f"{KEPT + 256}"
            )
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                "byte-pair encoding needs `tokenizers`: pip install 'dtrain[bpe]'"
            ) from None
        self._library, self.vocab_size = tokenizers, vocab_size
        self._tokenizer: Any = None

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "bpe",
            "vocab_size": self.vocab_size,
            "marks": KEPT,
            "library": self._library.__version__,
        }

    def fit(self, texts: Iterable[str], folder: Path) -> None:
        lib = self._library
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(map(chr, range(KEPT))),
            show_progress=False,
            initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(texts, trainer)
        self._tokenizer = plain(tokenizer)
        self.save(folder)

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def load(self, folder: Path) -> None:
        self._tokenizer = plain(opened(self._library, folder / self.FILE, str(folder / self.FILE)))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i >= KEPT])
