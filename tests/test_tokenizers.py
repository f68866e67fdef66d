"""A tokenizer file gives its tokens and nothing else: no truncation, no chance, no marks in the
text, no lost characters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf.errors import MissingMandatoryValue
from test_configs import composed
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dtrain.config.build import build
from dtrain.config.schema import validated
from dtrain.data.base import Data
from dtrain.data.prepare import normalize, prepare
from dtrain.data.rows import Rows
from dtrain.data.sources import Files, Source
from dtrain.data.tokenizer import BPE, MARK_IDS, Bytes, FromFile, Tokenizer, count_ids

TEXT = "some words of a text, and some more of them\n" * 40


def letters(
    *special: str, step: int = 1, model: Callable[..., Any] = models.BPE, **options: Any
) -> Library:
    """A tokenizer of letters and a few others, whose ids are `step` apart; the special ones
    come last.
    """
    known = {c: step * i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ,\n")}
    made = Library(
        model({**known, **{s: step * (len(known) + i) for i, s in enumerate(special)}}, **options)
    )
    made.decoder = decoders.Fuse()
    made.add_special_tokens(list(special))
    return made


def characters(*special: str, **options: Any) -> Library:
    return letters(*special, merges=[], **options)


def saved(made: Library, folder: Path, **options: Any) -> FromFile:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return FromFile(str(folder), max(made.get_vocab().values()) + 1, **options)


def corpus(text: str, tokenizer: Tokenizer, folder: Path) -> Any:
    (folder / "a.txt").write_text(text)
    return prepare("x", Files(str(folder / "a.txt")), tokenizer, folder / "cache")


def whole(made: Any) -> list[int]:
    return [*made.tokens("train").tolist(), *made.tokens("validation").tolist()]


@given(st.integers(1, 9), st.integers(10, 90), st.sampled_from([0.0, 0.5, 0.99]))
def test_what_a_file_has_saved_beside_its_tokens_is_not_obeyed(
    cut: int, filled: int, chance: float
) -> None:
    """Truncation, padding, and merges that are left out by chance."""
    made = Library(
        models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")], dropout=chance or None)
    )
    made.add_special_tokens(["</s>"])
    made.enable_truncation(cut)
    made.enable_padding(length=filled, pad_id=1, pad_token="b")
    with TemporaryDirectory() as folder:
        tokenizer = saved(made, Path(folder))
    for _ in range(2):
        assert tokenizer.encode("ab" * 30).tolist() == [2] * 30


@pytest.mark.parametrize(
    "name", ["<eos>", "[EOS]", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "</s>", "[PAD]"]
)
def test_the_end_is_the_token_that_is_called_so(name: str, tmp_path: Path) -> None:
    tokenizer = saved(characters("<other>", name), tmp_path)
    made = corpus(TEXT, tokenizer, tmp_path)
    assert tokenizer.marks.end == tokenizer.vocab_size - 1 and "end" not in tokenizer.missing
    assert whole(made).count(tokenizer.marks.end) == 1 and whole(made)[-1] == tokenizer.marks.end
    assert tokenizer.decode(whole(made)) == normalize(TEXT)


def test_an_end_of_any_other_name_is_asked_for(tmp_path: Path) -> None:
    made = characters("<fin>", "<x>")
    with pytest.raises(
        ValueError, match="which token ends a document.*set data.tokenizer.end to one of <fin>, <x>"
    ):
        saved(made, tmp_path)
    assert saved(made, tmp_path, end="<fin>").marks.end == 29
    with pytest.raises(ValueError, match="data.tokenizer.end=<no>: .* has no such token"):
        saved(made, tmp_path, end="<no>")
    for token in ("<fin>", {"content": "<fin>"}):  # what `transformers` saves beside it
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert saved(made, tmp_path).marks.end == 29
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="which token ends a document"):
        saved(made, tmp_path)


@pytest.mark.parametrize("step", [1, 7, 300, 3000])
def test_ids_may_have_gaps(step: int, tmp_path: Path) -> None:
    """The highest one decides the size of the vocabulary, and the bytes of an id."""
    tokenizer = saved(characters("</s>", step=step), tmp_path)
    made = corpus(TEXT, tokenizer, tmp_path)
    assert tokenizer.vocab_size == 29 * step + 1 and max(whole(made)) == 29 * step
    assert tokenizer.decode(whole(made)) == normalize(TEXT)
    refused = pytest.raises(
        ValueError, match=f"data.tokenizer.vocab_size=30: .* has {29 * step + 1} ids"
    )
    with refused if step > 1 else nullcontext():
        FromFile(str(tmp_path), 30)


def test_a_configuration_takes_the_size_of_the_vocabulary_from_the_file(tmp_path: Path) -> None:
    """The model's too; and where there is no such file, it is the file that is missed."""
    (tmp_path / "my tokenizer").mkdir()
    characters("</s>", step=7).save(str(tmp_path / "my tokenizer" / "tokenizer.json"))
    for place in ("my tokenizer", "my tokenizer/tokenizer.json"):
        config = validated(
            composed("data/tokenizer=file", f"data.tokenizer.path='{tmp_path}/{place}'")
        )
        made = build(config.data, Data, "data", parts=(Source, Tokenizer))
        assert made.vocab_size == config.model["vocab_size"] == 7 * 29 + 1
    for word, said in (
        (f"data.tokenizer.path={tmp_path}/none", "none: No such file"),
        ("seed=1", "path"),
    ):
        with pytest.raises((ValueError, MissingMandatoryValue), match=said) as found:
            build(
                validated(composed("data/tokenizer=file", word)).data,
                Data,
                "data",
                parts=(Source, Tokenizer),
            )
        assert word == "seed=1" or str(found.value).startswith("data.tokenizer.path=")


def test_ids_beyond_what_a_tokenizer_says_are_refused(tmp_path: Path) -> None:
    """Of any kind: they would be cut to the bytes of an id."""

    class Wrong(Bytes):
        def encode(self, text: str) -> np.ndarray:
            return super().encode(text).astype("int64") + 250

    with pytest.raises(
        ValueError,
        match=r"a.txt: the tokenizer makes ids from 2\d\d to 3\d\d, and says that it has 256",
    ):
        corpus(TEXT, Wrong(), tmp_path)


@pytest.mark.parametrize("special", [True, False])
def test_the_name_of_a_mark_in_a_text_is_text(special: bool, tmp_path: Path) -> None:
    """It does not end a document, whether the file calls it special or not."""
    made = letters("</s>", model=models.BPE, merges=[]) if special else characters()
    if not special:
        made.add_tokens(["</s>"])
    tokenizer = saved(made, tmp_path)
    read = corpus("a </s> b\n" * 30, tokenizer, tmp_path)
    assert whole(read).count(tokenizer.marks.end) == 1
    # '<', '/', '>'; s has a token
    assert tokenizer.left_out["characters that the tokenizer drops"] == 30 * 3


def test_a_text_that_a_tokenizer_reads_as_its_mark_is_refused(tmp_path: Path) -> None:
    made = Library(models.WordLevel({"<unk>": 0, "</s>": 1, "hi": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(
        ValueError, match="a.txt: the text holds '</s>', which .* reads as its mark"
    ):
        corpus("hi\nhi </s>\n" * 9, saved(made, tmp_path), tmp_path)


@pytest.mark.parametrize("mark", ["\0", "<|endoftext|>"])
def test_marks_of_our_own_in_a_text_are_text(mark: str, tmp_path: Path) -> None:
    """Of a tokenizer that was learned here, and of rows, whose texts are not cleaned."""
    tokenizer = BPE(300)
    corpus(TEXT, tokenizer, tmp_path)
    assert tokenizer.marks.end not in tokenizer.encode(f"a{mark}b")
    tokenizer.save(tmp_path)
    again = FromFile(
        str(tmp_path),
        max(json.loads((tmp_path / BPE.FILE).read_text())["model"]["vocab"].values()) + 1,
    )
    assert again.encode(f"a{mark}b").tolist() == tokenizer.encode(f"a{mark}b").tolist()


class Controls(Source):
    """Rows whose texts hold what serves as marks."""

    def describe(self) -> dict[str, Any]:
        return {}

    def rows(self) -> Any:
        for number in range(40):
            yield (
                f"row {number}",
                {"text": f"a\0b\x01{number}", "words": ["\x02", "b"], "n": number},
            )


def test_rows_hold_no_marks(tmp_path: Path) -> None:
    """A character stands for each, so that a place in a text stays what it was."""
    for _ in range(2):  # the second time from the cache
        data = Rows("x", Controls(), Bytes(), cache=str(tmp_path))
        data.prepare(lambda what, done: None)
        assert all(
            row["text"] == f"a b {row['n']}" and row["words"] == [" ", "b"] for _, row in data.all()
        )
        assert data.left_out == {"control characters, now blanks": 3 * 40}
        assert all(Bytes().encode(row["text"]).min() >= MARK_IDS for _, row in data.all())


@given(st.text("abc xyzäß日🙂\n", max_size=40))
def test_characters_that_are_in_no_token_are_counted(text: str) -> None:
    """Of byte-pair encoding without an unknown token those it has no token for; blanks aside,
    of any other too.
    """
    made = characters("</s>")
    with TemporaryDirectory() as folder:
        tokenizer = saved(made, Path(folder))
        tokenizer.encode(text)
        assert tokenizer.left_out["characters that the tokenizer drops"] == sum(
            c in "äß日🙂" for c in text
        )
        made.normalizer = normalizers.Replace("x", "")
        tokenizer = saved(made, Path(folder))
        tokenizer.encode(text)
        assert tokenizer.left_out["characters that the tokenizer drops"] == sum(
            c in "xäß日🙂" for c in text
        )


def _byte_pairs(**options: Any) -> Library:
    known = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ,\n")} | {"</s>": 40}
    made = Library(models.BPE(known, [], **options))
    made.add_special_tokens(["</s>"])
    return made


def _half() -> Library:
    """Of bytes, without the second one of é."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet()) - {"©"}
    made = Library(models.BPE({c: i for i, c in enumerate(sorted(alphabet))} | {"</s>": 300}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def _replacing(text: str, by: str) -> Library:
    made = _byte_pairs()
    made.normalizer = normalizers.Replace(text, by)
    return made


SURE, PART = "characters that the tokenizer drops", "characters that the tokenizer drops a part of"
ABOUT = "characters or so that the tokenizer drops or replaces (it does not tell exactly)"


@pytest.mark.parametrize(("made", "text", "said"), [
    (_byte_pairs, "foxéé", {SURE: 2}),
    (_half, "ab é é ñ", {PART: 2}),
    (lambda: _replacing("x", ""), "fox éx", {SURE: 3}),
    (lambda: _replacing("fox ", ""), "a fox jumps", {ABOUT: 3}),
    (lambda: _replacing("fox", "foxfoxfox"), "a fox jumps", {ABOUT: 2}),
    (lambda: _byte_pairs(end_of_word_suffix="</w>"), "ab", {ABOUT: 1}),
],
ids=["no token", "half a character", "one replaced", "word dropped", "word replaced",
     "places in a word"])  # fmt: skip
def test_what_is_said_of_lost_characters_is_true(
    made: Callable[[], Library], text: str, said: dict[str, int], tmp_path: Path
) -> None:
    """A number that the library cannot tell is said to be none to rely on."""
    tokenizer = saved(made(), tmp_path)
    tokenizer.encode(text)
    assert {kind: number for kind, number in tokenizer.left_out.items() if number} == said


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_beside_or_for_a_tokenizer_is_not_waited_for(name: str, tmp_path: Path) -> None:
    made = characters("stop")
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    said = "is no regular file" if name == "tokenizer.json" else "which token ends a document"
    with pytest.raises(ValueError, match=said):
        FromFile(str(tmp_path), 30)
    assert count_ids(str(tmp_path)) == (0 if name == "tokenizer.json" else 30)


def test_unknown_tokens_are_counted_and_told(tmp_path: Path) -> None:
    made = characters("</s>", "<unk>", unk_token="<unk>")
    tokenizer = saved(made, tmp_path)
    read = corpus("añb ß\n" * 30, tokenizer, tmp_path)
    assert read.left_out == {"tokens for what the tokenizer does not know": 60}
    # from the cache
    assert corpus("añb ß\n" * 30, saved(made, tmp_path), tmp_path).left_out == read.left_out


@pytest.mark.parametrize("model", [
    lambda: models.Unigram([("a", -1.0), ("b", -2.0), ("</s>", -3.0)]),
    lambda: models.WordLevel({"a": 0, "</s>": 1}, "[UNK]"),
    lambda: models.WordPiece({"a": 0, "</s>": 1}, unk_token="[UNK]"),
], ids=["unigram", "word level", "word piece"])  # fmt: skip
def test_a_tokenizer_without_an_unknown_token_refuses_what_it_does_not_know(
    model: Callable[[], Any], tmp_path: Path
) -> None:
    made = Library(model())
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(
        ValueError,
        match="a.txt: .*tokenizer.json: no token stands for 'ß', and none for what is unknown",
    ):
        corpus("a ß a\n" * 9, saved(made, tmp_path), tmp_path)


# Few documents


@given(st.integers(1, 4), st.floats(0.02, 0.98), st.integers(1, 400))
def test_nothing_is_learned_from_what_is_held_out(number: int, fraction: float, size: int) -> None:
    """Of few documents their end is: each side has some text or an end, and learning sees the
    training side alone.
    """

    class Learning(Bytes):
        seen: list[str]

        def fit(self, texts: Any, folder: Path) -> None:
            self.seen = list(texts)

    class Some(Source):
        def describe(self) -> dict[str, Any]:
            return {}

        def rows(self) -> Any:
            for i in range(number):
                yield str(i), {"text": f"{i}" + "é" * size + "\n"}

    with TemporaryDirectory() as folder:
        learning = Learning()
        made = prepare("x", Some(), learning, folder, validation_fraction=fraction)
        train, held_out = (bytes(made.tokens(side)) for side in ("train", "validation"))
    assert train and held_out and (train + held_out).count(b"\0") == number
    assert "".join(learning.seen).encode() == train.replace(b"\0", b"") != b""
    assert sorted((train + held_out).decode().split("\0")[:-1]) == sorted(
        f"{i}" + "é" * size + "\n" for i in range(number)
    )


@pytest.mark.parametrize("fraction", [0.3, 0.95])
def test_a_word_of_the_held_out_end_is_not_learned(fraction: float, tmp_path: Path) -> None:
    """Of one document: the beginning's word has a token, the end's has none."""
    (tmp_path / "a.txt").write_text(
        "begins " * 100 + "finishes " * round(100 * 7 / 9 * fraction / (1 - fraction))
    )
    tokenizer = BPE(400)
    prepare(
        "x",
        Files(str(tmp_path / "a.txt")),
        tokenizer,
        tmp_path / "cache",
        validation_fraction=fraction,
    )
    assert len(tokenizer.encode(" begins")) == 1 and len(tokenizer.encode(" finishes")) > 3
