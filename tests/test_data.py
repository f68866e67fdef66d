from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_configs import NEEDED, composed

from dtrain.config.build import build
from dtrain.data.features import Features
from dtrain.data.prepare import normalize, prepare
from dtrain.data.rows import Rows
from dtrain.data.seeded import generator
from dtrain.data.sources import Files, HuggingFace, Source, Squad, StandardLibrary
from dtrain.data.tokenizer import BPE, Bytes, FromFile, Tokenizer
from dtrain.data.windows import Windows


def corpus(tmp_path: Path, path: Path | str, tokenizer=None, cache: str = "cache", **options):
    return prepare("test", Files(str(path), **options), tokenizer or Bytes(), tmp_path / cache)


def write(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder


TEXTS = [f"document {i}: " + "words and words " * i for i in range(1, 61)]


def test_the_standard_library_is_there_and_large() -> None:
    documents = dict(StandardLibrary().documents())
    assert sum(len(text.encode()) for text in documents.values()) > 5e6
    assert "argparse.py" in documents and "asyncio/tasks.py" in documents
    assert not any("/test/" in name or name.startswith("test") for name in documents)


def test_tokens_are_the_documents_each_ended_and_on_one_side(tmp_path: Path) -> None:
    made = corpus(tmp_path, write(tmp_path / "texts", TEXTS))
    sides = [bytes(made.tokens(split)).split(b"\0")[:-1] for split in ("train", "validation")]
    assert sorted(sides[0] + sides[1]) == sorted(normalize(text).encode() for text in TEXTS)
    assert not set(sides[0]) & set(sides[1])
    assert (
        made.documents == 60 and made.train_tokens + made.validation_tokens == made.text_bytes + 60
    )


def test_a_document_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    few = corpus(tmp_path, write(tmp_path / "few", TEXTS[:40]))
    all_of_them = corpus(tmp_path, write(tmp_path / "all", TEXTS))
    assert set(bytes(few.tokens("validation")).split(b"\0")) <= set(
        bytes(all_of_them.tokens("validation")).split(b"\0")
    )


def test_duplicates_are_dropped_after_cleaning(tmp_path: Path) -> None:
    made = corpus(
        tmp_path,
        write(tmp_path / "texts", [*TEXTS, TEXTS[3] + "  \r\n", TEXTS[5].replace(" ", " ")]),
    )
    assert (made.documents, made.duplicates) == (60, 2)


def test_cleaning_normalises_and_is_idempotent() -> None:
    assert normalize("e\u0301 \r\nb\x00\x1b[1m\t\rc  \n\n") == "\u00e9\nb[1m\nc\n"


@given(st.text(max_size=200))
def test_cleaning_twice_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)
    assert not any(ord(c) < 9 for c in normalize(text))


def test_a_second_preparation_reads_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "texts", TEXTS)

    class Once(Files):
        reads = 0

        def documents(self):
            Once.reads += 1
            return super().documents()

    first, second = (
        prepare("test", Once(str(folder)), Bytes(), tmp_path / "cache") for _ in range(2)
    )
    assert first == second and Once.reads == 1
    (folder / "000.txt").write_text("changed")
    assert prepare("test", Once(str(folder)), Bytes(), tmp_path / "cache").digest != first.digest


def _prepare(folder: str, cache: str, counter) -> None:
    class Counted(Files):
        def documents(self):
            with counter.get_lock():
                counter.value += 1
            return super().documents()

    prepare("test", Counted(folder), Bytes(), cache)


def test_of_several_processes_one_prepares(tmp_path: Path) -> None:
    folder, context = write(tmp_path / "texts", TEXTS), multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    processes = [
        context.Process(target=_prepare, args=(str(folder), str(tmp_path / "cache"), counter))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 4 and counter.value == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.txt": b""}, "a.txt is empty"),
        ({"a.txt": b"ok", "b.txt": b"\xff\xfe broken"}, r"b.txt is not UTF-8 text \(byte 0\)"),
        (
            {"a.jsonl": b'{"text": "x"}\n{"body": "y"}\n'},
            "a.jsonl, line 2 has no field 'text', only body",
        ),
        ({"a.jsonl": b'{"text": 3}\n'}, "field 'text' is int, not text"),
        ({"a.jsonl": b"{"}, "a.jsonl, line 1: not JSON"),
        ({"a.parquet": b"nonsense"}, "a.parquet is not a Parquet file"),
        ({}, "no such file"),
    ],
)
def test_bad_input_is_one_line_and_no_cache(
    tmp_path: Path, content: dict[str, bytes], message: str
) -> None:
    (tmp_path / "in").mkdir()
    for name, data in content.items():
        (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        corpus(tmp_path, tmp_path / "in")
    assert "\n" not in str(caught.value)
    assert not [p for p in (tmp_path / "cache").glob("*") if p.is_dir()]


def test_jsonl_parquet_and_datasets_give_the_same_tokens(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    digests = {
        corpus(tmp_path, tmp_path / f"a.{kind}", field="body").digest
        for kind in ("jsonl", "parquet")
    }
    digests.add(
        prepare(
            "hub", HuggingFace(str(tmp_path / "saved"), field="body"), Bytes(), tmp_path / "cache"
        ).digest
    )
    assert len(digests) == 1


def test_a_single_file_still_has_two_splits(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a line of text\n" * 1000)
    made = corpus(tmp_path, tmp_path / "one.txt")
    assert (
        made.validation_tokens == pytest.approx(0.05 * 15000, rel=0.01)
        and made.train_tokens > 14000
    )


def test_bpe_round_trips_and_is_shorter(tmp_path: Path) -> None:
    folder = write(tmp_path / "texts", [*TEXTS, "naïve café – 你好 🙂"])
    tokenizer = BPE(vocab_size=300)
    made = corpus(tmp_path, folder, tokenizer)
    ids = np.concatenate([made.tokens(split) for split in ("train", "validation")])
    assert ids.max() < 300 and len(ids) < made.text_bytes / 2
    fresh = BPE(vocab_size=300)
    fresh.load(Path(made.folder))
    for text in ("words and words", "naïve café – 你好 🙂", "a <end> b"):
        assert fresh.decode(fresh.encode(text)) == text
    assert (ids == tokenizer.marks.end).sum() == made.documents


@given(st.text(max_size=50))
def test_bytes_round_trip(text: str) -> None:
    """Of cleaned text, which has none of the bytes that mark things."""
    text = normalize(text)
    assert Bytes().decode(Bytes().encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(20, 400),
    seq_len=st.integers(1, 9),
    rows=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_an_epoch_reads_every_window_once(tokens: int, seq_len: int, rows: int, seed: int) -> None:
    windows = Windows(np.arange(tokens, dtype=np.uint16), seq_len=seq_len, seed=seed)
    read = [windows.batch(step, 1)[0] for step in range(windows.per_epoch)]
    starts = sorted(int(row[0]) for row in read)
    # no gap, no overlap
    assert all(b - a == seq_len for a, b in zip(starts, starts[1:], strict=False))
    assert all(row.tolist() == list(range(int(row[0]), int(row[0]) + seq_len + 1)) for row in read)
    again = Windows(np.arange(tokens, dtype=np.uint16), seq_len=seq_len, seed=seed)
    assert (again.batch(7, rows) == windows.batch(7, rows)).all()  # no history
    whole, halves = windows.batch(3, 2 * rows), [windows.batch(6, rows), windows.batch(7, rows)]
    # at any batch size
    assert (whole[:rows] == halves[0]).all() and (whole[rows:] == halves[1]).all()


def test_a_sweep_covers_the_data_evenly() -> None:
    windows = Windows(np.arange(101, dtype=np.uint16), seq_len=10, seed=0)
    rows = [int(row[0]) for batch in windows.sweep(2, 3) for row in batch]
    assert rows == [0, 10, 30, 50, 70, 90]
    assert sum(len(batch) for batch in windows.sweep(9, 4)) == 10
    with pytest.raises(ValueError, match="9 tokens are fewer than one sequence of seq_len=9 needs"):
        Windows(np.arange(9, dtype=np.uint16), seq_len=9, seed=0)


class FilesOfRows(Source):
    """Forty files of ten rows each, as all kinds of labelled data have them."""

    def describe(self) -> dict[str, Any]:
        return {"kind": "made up"}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number in range(400):
            yield (
                f"row {number}",
                {"file": f"{number // 10}.py", "text": f"text {number}", "label": str(number % 3)},
            )


@pytest.mark.parametrize("none", ["", None, float("nan")])
def test_rows_without_a_group_are_each_by_itself(none: object, tmp_path: Path) -> None:
    """Not one group, which would be on one side."""
    lines = [
        {"text": f"row {number}", "author": none if number % 2 else f"a{number % 8}"}
        for number in range(80)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = Rows(
        "x", Files(str(tmp_path / "a.jsonl")), Bytes(), group="author", validation_fraction=0.5
    )
    data.prepare(lambda what, done: None)
    nobodys = {
        side: [row["text"] for _, row in rows if not str(row["author"]).startswith("a")]
        for side, rows in data.split.items()
    }
    authors = [
        {row["author"] for _, row in rows if str(row["author"]).startswith("a")}
        for rows in data.split.values()
    ]
    assert all(nobodys.values()) and not authors[0] & authors[1]
    assert data.left_out["rows without author, each a group of its own"] == 40


@pytest.mark.parametrize(
    ("name", "grouped"),
    [
        ("functions", True),
        ("docstrings", True),
        ("questions", True),
        ("squad", True),
        ("rows", False),
        ("hub_rows", False),
    ],
)
def test_what_is_held_out_is_of_other_files_than_what_is_trained_on(
    name: str, grouped: bool
) -> None:
    """Where rows of one file are alike; one's own rows stand by themselves unless `data.group`
    says more.
    """
    held_out, node = [], composed(f"data={name}", *NEEDED.get(name, [])).data
    for group in (node.group, "file"):
        data = build({**node, "group": group}, Rows, "data", parts=(Source, Tokenizer))
        data.source = FilesOfRows()
        data.prepare(lambda what, done: None)
        sides = [{row["file"] for _, row in data.split[side]} for side in ("train", "validation")]
        assert bool(sides[0] & sides[1]) == (not grouped and not held_out)
        assert len(list(data.all())) == 400 and 0.1 < len(data.split["validation"]) / 400 < 0.3
        held_out.append([where for where, _ in data.split["validation"]])
    assert (held_out[0] == held_out[1]) == grouped


def test_features_are_the_hidden_layer_from_which_the_classifier_tells_the_classes() -> None:
    """What scikit-learn's own last layer makes of them are its own probabilities; the same each
    time.
    """
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(240) % 3
    values = torch.randn(240, 1, 2, 3, generator=generator, dtype=torch.float64)
    values[torch.arange(240), 0, 0, labels] += 5
    found = Features(values, labels)
    hidden = found(values)
    assert hidden.shape == (240, Features.WIDTH) and hidden.dtype == torch.float64
    weight, bias = (
        torch.as_tensor(part[1]) for part in (found.model.coefs_, found.model.intercepts_)
    )
    logits = hidden @ weight + bias
    expected = torch.as_tensor(found.model.predict_proba(values.flatten(1).numpy()))
    assert torch.allclose(logits.softmax(1), expected, rtol=1e-9, atol=1e-12)
    assert (expected.argmax(1) == labels).double().mean() > 0.9
    assert torch.equal(Features(values, labels)(values), hidden)
    with pytest.raises(ValueError, match="without two classes"):
        Features(values, torch.zeros(240))


# What a cache may answer


SETTINGS = {
    "one": {},
    "another share held out": {"validation_fraction": 0.3},
    "another tokenizer": {"tokenizer": lambda: BPE(300)},
    "a larger tokenizer": {"tokenizer": lambda: BPE(310)},
    "another field": {"field": "other"},
    "another file": {"file": "second"},
}


def test_a_cache_answers_as_if_it_were_new(tmp_path: Path) -> None:
    """Whatever else is in it: each setting that decides the tokens tells corpora apart."""
    texts, others = TEXTS[:30], [text.upper() for text in TEXTS[:30]]
    for name, chosen in (("first", texts), ("second", texts[5:])):
        rows = [{"text": t, "other": o} for t, o in zip(chosen, others, strict=False)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def found(cache: str, tokenizer=Bytes, file="first", field="text", **options) -> list[bytes]:
        source = Files(str(tmp_path / f"{file}.jsonl"), field=field)
        made = prepare("test", source, tokenizer(), tmp_path / cache, **options)
        return [made.tokens(split).tobytes() for split in ("train", "validation")]

    alone = {name: found(f"cache of {name}", **options) for name, options in SETTINGS.items()}
    for _ in range(2):  # the second time all of them are there
        assert {name: found("shared", **options) for name, options in SETTINGS.items()} == alone
    assert len({b"|".join(sides) for sides in alone.values()}) == len(SETTINGS)


@pytest.mark.parametrize("kind", ["text", "squad"])
def test_a_file_that_was_edited_is_read_again(kind: str, tmp_path: Path) -> None:
    """Also where a correction has left its length as it was."""
    file = tmp_path / ("one.txt" if kind == "text" else "one.json")
    source = Files(str(file)) if kind == "text" else Squad(str(file))
    source.field = "text" if kind == "text" else "context"
    found = []
    for second, word in enumerate(("teh", "the", "thy")):
        text = f"{word} same length\n" * 50
        asked = [{"question": "?", "answers": [{"text": word, "answer_start": 0}]}]
        article = {"paragraphs": [{"context": text, "qas": asked}]}
        file.write_text(text if kind == "text" else json.dumps({"data": [article]}))
        os.utime(file, (1e9 + second, 1e9 + second))
        made = prepare("test", source, Bytes(), tmp_path / "cache")
        found.append(b"".join(bytes(made.tokens(split)) for split in ("train", "validation")))
        assert found[-1] == text.encode() + b"\0"


# Tokens and chances


def test_a_tokenizer_of_transformers_adds_no_marks_of_its_own(tmp_path: Path) -> None:
    """Those are the task's to set: a text is its tokens, and two texts' are those of each."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "play", "."]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    assert made.encode("the play.").ids == [2, 5, 6, 7, 3]  # as BERT's own pipeline wants it
    found = FromFile(str(tmp_path), len(words))
    assert found.encode("the play.").tolist() == [5, 6, 7] and found.encode("").tolist() == []
    apart = [*found.encode("the").tolist(), *found.encode(" play.").tolist()]
    assert found.encode("the play.").tolist() == apart


def test_no_two_purposes_draw_alike() -> None:
    """Each seed, word, step and sample has a stream of its own, and the same at every call."""
    seeds = (0, 1, 11)
    purposes = [*product(seeds, ("augment", "mixup"), range(25), range(25))]
    purposes += [*product(seeds, ("augment", "1"), range(125))]
    streams = {purpose: generator(*purpose).initial_seed() for purpose in purposes}
    assert len(set(streams.values())) == len(streams) == len(purposes)
    first, again = (torch.rand(9, generator=generator(1, "augment", 1, 11)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(9, generator=generator(1, "augment", 11, 1)))
