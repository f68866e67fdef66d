"""Text to token ids and back.

Our own tokenizers use ids below 9 for marks: of control characters, cleaned text holds only tab and
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

from dtrain.data.library_file import first_line, loses_one_by_one, open_tokenizer
from dtrain.data.paths import expand_path
from dtrain.files import json_files

MARK_IDS = 9  # ids below this stand for marks
DROPPED = "characters that the tokenizer drops"
BROKEN = "characters that the tokenizer drops a part of"
UNSURE = "characters or so that the tokenizer drops or replaces (it does not tell exactly)"


@dataclass(frozen=True)
class Marks:
    """Ids that stand for no text.

    Args:
        end: after each document, and to fill up rows.
        hidden: in the place of a token that the model has to find.
        first: before a row.
        between: between the two parts of a row.
        yes: the two parts belong together.
        no: they do not.
    """

    end: int = 0
    hidden: int = 1
    first: int = 2
    between: int = 3
    yes: int = 4
    no: int = 5


class Tokenizer(ABC):
    """Text to ids and back; it may learn from the training documents, and is saved beside them."""

    vocab_size: int
    marks = Marks()
    left_out: Counter[str] = Counter()  # number of things that `encode` loses, by kind
    missing: frozenset[str] = frozenset()  # marks without an id of their own, which use `end`'s

    def require_marks(self, *marks: str, reason: str) -> None:
        """Raise ValueError if one of these marks is missing; `reason` needs them."""
        if missing := sorted(self.missing & set(marks)):
            raise ValueError(
                f"the tokenizer has no mark for {', '.join(missing)}, which {reason} needs: use "
                f"another, such as data/tokenizer=bpe"
            )

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return everything that decides the ids: part of the cache's fingerprint."""

    def fit(self, texts: Iterable[str], folder: Path) -> None:  # noqa: B027  learning is optional
        """Learn from the training documents and save in `folder`."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Save what has been learned in `folder`."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Load what `save` has written."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a document, without its end mark."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids without marks; broken characters become U+FFFD."""

    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """Return whether each id's text begins within a word, and ends within one: 2 x (V,)."""
        texts = [self.decode([i]) or " " for i in range(self.vocab_size)]
        inside = [[c.isalnum() or c in "_\ufffd" for c in (text[0], text[-1])] for text in texts]
        begins, ends = np.array(inside).T
        return begins, ends


class Bytes(Tokenizer):
    """One token for each byte of UTF-8: 256 ids, nothing to learn."""

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
        return bytes(i for i in ids if i >= MARK_IDS).decode(errors="replace")


class FromFile(Tokenizer):
    """A learned tokenizer: `tokenizer.json` of a prepared corpus or of a model of `transformers`.

    Args:
        path: the file, or a folder that has one.
        vocab_size: number of ids (the highest plus one), which the file must have.
        end: the token after each document; None: the first of the names below that it has.

    Raises:
        ValueError: there is no such file, it is no tokenizer, or its size or end does not fit.
    """

    NAMES = {  # of the marks in other tokenizers, the likeliest first
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
        self._tokenizer = disable_saved_options(tokenizer)
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = _count_ids(vocabulary)
        if vocab_size != self.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size={vocab_size}: {self._file} has {self.vocab_size} ids"
            )
        self.left_out = Counter[str]()
        self._library = version("tokenizers")
        definition = json.loads(self._tokenizer.to_str())
        self._model = model = definition["model"]
        self._byte_pairs = model.get("type", "BPE") == "BPE"
        self._lost_kind = DROPPED if loses_one_by_one(definition) else UNSURE
        unknown = vocabulary.get(model.get("unk_token") or "")
        self._unknown: int | None = model.get("unk_id", unknown)  # Unigram has an id
        self._losses: dict[str, str] = {}  # by character
        self._added = list(self._tokenizer.get_added_tokens_decoder().values())
        self._set_marks(path, vocabulary, end)

    def _set_marks(self, path: str, vocabulary: dict[str, int], end: str | None) -> None:
        """Set the ids of the marks, which are found by their names.

        Raises:
            ValueError: no token is known to end a document.
        """
        if end is not None and end not in vocabulary:
            raise ValueError(f"data.tokenizer.end={end}: {self._file} has no such token")
        ends = (*self.NAMES["end"], *self._configured_end()) if end is None else (end,)
        ids = {
            mark: next((vocabulary[name] for name in names if name in vocabulary), None)
            for mark, names in (self.NAMES | {"end": ends}).items()
        }
        if ids["end"] is None:
            special = [token.content for token in self._added if token.special]
            raise ValueError(
                f"data.tokenizer.path={path}: which token ends a document? None has a name known "
                f"for it: set data.tokenizer.end to one of "
                f"{', '.join(special[:12]) or 'its tokens'}"
            )
        self.missing = frozenset(mark for mark, number in ids.items() if number is None)
        own_ids = {mark: number for mark, number in ids.items() if number is not None}
        self.marks = Marks(**(dict.fromkeys(ids, ids["end"]) | own_ids))
        self._mark_ids = np.array(sorted(set(own_ids.values())))
        self._tokenizer.add_special_tokens(
            [self._tokenizer.id_to_token(int(i)) for i in self._mark_ids]
        )

    def _configured_end(self) -> list[str]:
        """Return the end token in the configuration that `transformers` saves beside the file."""
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
        """As every tokenizer; but WordPiece marks what is inside words, others their beginnings."""
        begins, ends = super().words()
        raw = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        if any(token.startswith("##") for token in raw):
            begins = np.array([token.startswith("##") for token in raw])
            return begins, np.ones(self.vocab_size, dtype=bool)
        begins &= np.array([not token.startswith(("\u2581", "\u0120")) for token in raw])
        return begins, ends

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids; count in `left_out` what no token stands for.

        Raises:
            ValueError: the tokenizer fails, or reads one of its marks in the text.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:  # noqa: BLE001  the library raises nothing narrower
            reason = first_line(error)
            raise ValueError(f"{self._file}: {self._cause(text) or reason}") from None
        ids = np.asarray(encoding.ids, dtype=np.uint32)
        if (marks := np.flatnonzero(np.isin(ids, self._mark_ids))).size:
            token = self._tokenizer.id_to_token(int(ids[marks[0]]))
            raise ValueError(
                f"the text holds {token!r}, which {self._file} reads as its mark: take it out "
                f"of the text, or make it a special token of the tokenizer's"
            )
        self._count_losses(text, ids, encoding.offsets)
        return ids

    def _count_losses(self, text: str, ids: np.ndarray, offsets: list[tuple[int, int]]) -> None:
        """Count characters in no token, blanks aside, and tokens for unknown characters."""
        if self._unknown is not None:
            self.left_out["tokens for what the tokenizer does not know"] += int(
                (ids == self._unknown).sum()
            )
        characters = set(text) if self._lost_kind == DROPPED else ()
        lost = {character: kind for character in characters if (kind := self._loss(character))}
        for character, kind in lost.items():
            self.left_out[kind] += text.count(character)
        # the library's offsets of what comes after a dropped character are wrong
        if lost and self._byte_pairs:
            text = text.translate(dict.fromkeys(map(ord, lost)))
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        # tokens that begin at each character, minus those that end there
        changes = np.zeros(len(text) + 1, dtype=np.int64)
        places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        np.add.at(changes, places[:, 0], 1)
        np.add.at(changes, places[:, 1], -1)
        outside = np.flatnonzero(changes.cumsum()[:-1] == 0)
        self.left_out[self._lost_kind] += sum(
            not text[i].isspace() and text[i] not in lost for i in outside
        )

    def _loss(self, character: str) -> str:
        """Return what a character loses anywhere: DROPPED, BROKEN, or an empty string: nothing."""
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
        vocabulary, model = self._tokenizer.get_vocab(), self._model
        added = any(token.content == character for token in self._added)
        if not self._byte_pairs or self._unknown is not None or added:
            return ""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        normal = normalizer.normalize_str(character) if normalizer else character
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(normal)] if splitter else [normal]
        if model.get("ignore_merges"):
            pieces = [piece for piece in pieces if piece not in vocabulary]
        missing = {symbol for piece in pieces for symbol in piece if symbol not in vocabulary}
        if model.get("byte_fallback"):
            missing = {
                symbol
                for symbol in missing
                if any(f"<0x{byte:02X}>" not in vocabulary for byte in symbol.encode())
            }
        return BROKEN if missing else ""

    def _cause(self, text: str) -> str:
        """Return a message that names the character on which the tokenizer fails, if it is one."""
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
        return str(self._tokenizer.decode(list(ids)))


def _read(path: str) -> tuple[Path, Any]:
    """Return the file that `data.tokenizer.path` or its folder names, and the tokenizer in it.

    Raises:
        ValueError: there is no such file, or it is no tokenizer.
    """
    tokenizers = _library("tokenizer files need")
    file = expand_path(path, "data.tokenizer.path")
    file = file / BPE.FILE if file.is_dir() else file
    return file, open_tokenizer(tokenizers, file, f"data.tokenizer.path={path}")


def _library(needed: str) -> Any:
    """Import the optional package `tokenizers`."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{needed} `tokenizers`: pip install 'dtrain[bpe]'") from None
    return tokenizers


def _count_ids(vocabulary: dict[str, int]) -> int:
    """Return the highest id plus one: ids may have gaps."""
    return max(vocabulary.values(), default=-1) + 1


def count_ids(path: str) -> int:
    """Return the number of ids of a tokenizer's file; 0 if `FromFile` will refuse it."""
    try:
        file = expand_path(path, "data.tokenizer.path")
        return _count_ids_of_file(path, file.stat().st_mtime_ns)
    except (OSError, ValueError, RuntimeError):
        return 0


def _ids_in(key: str, *, _parent_: DictConfig) -> int:
    """Resolve `${ids_in:KEY}`: the number of ids of the tokenizer whose path is the key's value."""
    return 0 if OmegaConf.is_missing(_parent_, key) else count_ids(str(_parent_[key]))


OmegaConf.register_new_resolver("ids_in", _ids_in, replace=True)


@lru_cache
def _count_ids_of_file(path: str, _: int) -> int:
    # cached: a configuration is read more than once, and a file may have some MB
    return _count_ids(_read(path)[1].get_vocab())


def disable_saved_options(tokenizer: Any) -> Any:
    """Let a tokenizer of the library turn a whole text into tokens, always the same ones.

    Turn off what its file may have saved besides: truncation, padding, BPE's dropout, and that the
    names of special tokens in a text are read as these tokens.
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
        vocab_size: number of ids, with 9 marks and 256 bytes.

    Raises:
        ValueError: there are fewer ids than 265, or `tokenizers` is not installed.
    """

    FILE = "tokenizer.json"

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < MARK_IDS + 256:
            raise ValueError(
                f"data.tokenizer.vocab_size={vocab_size}: byte-pair encoding needs at least "
                f"{MARK_IDS + 256}"
            )
        self._library = _library("byte-pair encoding needs")
        self.vocab_size = vocab_size
        self._tokenizer: Any = None

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "bpe",
            "vocab_size": self.vocab_size,
            "marks": MARK_IDS,
            "library": self._library.__version__,
        }

    def fit(self, texts: Iterable[str], folder: Path) -> None:
        lib = self._library
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(map(chr, range(MARK_IDS))),
            show_progress=False,
            initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(texts, trainer)
        self._tokenizer = disable_saved_options(tokenizer)
        self.save(folder)

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def load(self, folder: Path) -> None:
        self._tokenizer = disable_saved_options(
            open_tokenizer(self._library, folder / self.FILE, str(folder / self.FILE))
        )

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i >= MARK_IDS]))
