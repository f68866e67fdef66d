"""Text as windows of token ids."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dtrain.data.base import Data, Progress
from dtrain.data.prepare import Corpus, prepare
from dtrain.data.sources import Source, check_source
from dtrain.data.tokenizer import Tokenizer
from dtrain.data.windows import Windows


class Text(Data):
    """A source of documents and a tokenizer, prepared in a cache.

    Args:
        name: of the prepared folder; for people.
        source: where the documents come from.
        tokenizer: how they become ids.
        cache: folder of prepared corpora.
        validation_fraction: share of the documents held out.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        tokenizer: Tokenizer,
        cache: str,
        validation_fraction: float = 0.05,
    ) -> None:
        check_source(source)
        self.name, self.source, self.tokenizer = name, source, tokenizer
        self.cache, self.validation_fraction = cache, validation_fraction
        self._corpus: Corpus | None = None

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def corpus(self) -> Corpus:
        assert self._corpus is not None, "the data are not prepared"
        return self._corpus

    def prepare(self, progress: Progress) -> None:
        self._corpus = prepare(
            self.name,
            self.source,
            self.tokenizer,
            self.cache,
            validation_fraction=self.validation_fraction,
            progress=progress,
        )
        self.left_out, self.cache_folder = Counter(self.corpus.left_out), Path(self.corpus.folder)

    def save_for_inference(self, folder: Path) -> None:
        self.tokenizer.save(folder)

    def describe(self) -> dict[str, Any]:
        return self.corpus.describe()

    def windows(self, split: str, *, seq_len: int, seed: int) -> Windows:
        """Return the windows of `train` or `validation`.

        Raises:
            ValueError: the split has fewer tokens than one window.
        """
        try:
            return Windows(self.corpus.tokens(split), seq_len=seq_len, seed=seed)
        except ValueError as error:
            remedy = "" if split == "train" else " or a larger data.validation_fraction"
            raise ValueError(
                f"data {self.name}, {split} split: {error}: use more text, a smaller "
                f"seq_len{remedy}"
            ) from None
