"""Whatever bytes a file of a user's or of a cache holds: it is read, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers

from dtrain.data.images import HubImages
from dtrain.data.prepare import prepare
from dtrain.data.rows import Rows
from dtrain.data.sources import Files, HuggingFace, Squad
from dtrain.data.tokenizer import BPE, Bytes, FromFile, count_ids

LINES = "".join(
    json.dumps({"text": f"some words {n} " * 4, "label": n % 2}) + "\n" for n in range(40)
)
SQUAD = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "a b",
                    "qas": [
                        {"id": "1", "question": "?", "answers": [{"text": "b", "answer_start": 2}]}
                    ],
                }
            ],
        }
    ]
}


def _corpus(folder: Path, tokenizer: Any = None) -> None:
    made = prepare("c", Files(str(folder / "a.jsonl")), tokenizer or Bytes(), folder / "cache")
    assert len(made.tokens("train")) == made.train_tokens


def _rows(folder: Path) -> None:
    Rows("r", Files(str(folder / "a.jsonl")), Bytes(), cache=str(folder / "cache")).prepare(
        lambda *_: None
    )


def _tokenizer(folder: Path) -> None:
    FromFile(str(folder), count_ids(str(folder))).encode("some words é")


READ: dict[str, Callable[[Path], None]] = {
    "a.jsonl": _rows,
    "squad.json": lambda folder: list(Squad(str(folder / "squad.json")).rows()) and None,
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _tokenizer,
    "cache/c-*/kept.json": _corpus,
    "cache/c-*/corpus.json": _corpus,
    "cache/b-*/tokenizer.json": lambda folder: BPE(265).load(next((folder / "cache").glob("b-*"))),
    "cache/r-*/kept.json": _rows,
    "cache/r-*/rows.jsonl": _rows,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "a.jsonl").write_text(LINES)
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "stop"}}))
    made = Library(
        models.BPE({c: n for n, c in enumerate("abcdefghijklmnopqrstuvwxyz ")} | {"stop": 27}, [])
    )
    made.normalizer = normalizers.Lowercase()
    made.save(str(folder / "tokenizer.json"))
    _corpus(folder)
    _rows(folder)
    prepare("b", Files(str(folder / "a.jsonl")), BPE(265), folder / "cache")
    return folder


Change = Callable[[bytes], bytes]
DEEP = (
    b"[" * 9999,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b"{}",
    b"[]",
    b"null",
    b"",
    b"\xff\xfe",
    b'{"a.bin": [0, "x"]}',
)


def _changed(at: float, put: bytes, cut: int) -> Change:
    def change(content: bytes) -> bytes:
        place = int(at * len(content))
        return content[:place] + put + content[place + cut :]

    return change


changes = st.one_of(
    st.sampled_from(DEEP).map(lambda new: lambda _: new),
    st.floats(0, 1).map(lambda share: lambda content: content[: int(share * len(content))]),
    st.builds(
        _changed,
        st.floats(0, 1),
        st.sampled_from([b"", b"0", b'"', b"{", b"-", b"\0", b"9" * 20]),
        st.integers(0, 9),
    ),
)


@pytest.mark.parametrize("name", READ)
@settings(max_examples=12)
@given(change=changes)
def test_damage_is_mended_or_refused_in_a_line(name: str, whole: Path, change: Change) -> None:
    """Also where somebody has set its time back, so that its manifest seems to vouch for it."""
    with TemporaryDirectory() as at:
        kept = shutil.copytree(whole, Path(at) / "copy")
        file = next(whole.glob(name))
        before = file.stat()
        file.write_bytes(change(file.read_bytes()))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        try:
            READ[name](whole)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)
        finally:
            shutil.rmtree(whole)  # a cache is of one place
            shutil.copytree(kept, whole)


@pytest.mark.parametrize("left", [b"{}", b"[" * 9999, b'{"../a.jsonl": [0, "x"]}'])
def test_a_manifest_that_vouches_for_nothing_is_made_anew(
    left: bytes, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    _corpus(folder)  # in another place, anew
    file = max((folder / "cache").glob("c-*/kept.json"), key=lambda file: file.stat().st_mtime_ns)
    before = json.loads(file.read_text())
    file.write_bytes(left)
    _corpus(folder)
    assert json.loads(file.read_text()).keys() == before.keys()


DAMAGE = {
    "state.json": DEEP,
    "dataset_info.json": (
        b"[" * 9999,
        b"[]",
        b"null",
        b"",
        b"\xff\xfe",
        b'{"features": 3}',
        b'{"features": {"text": {"_type": "Odd"}}}',
    ),
    "data-00000-of-00001.arrow": (b"", b"ARROW1", b"\xff\xfe" * 99),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_saved_data_set_that_is_damaged_is_told_by_its_name(name: str, tmp_path: Path) -> None:
    """In a line, whatever its library makes of it; or its rows are there as they were."""
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "saved"))
    refused = 0
    for left in DAMAGE[name]:
        (tmp_path / "saved" / name).write_bytes(left)
        try:
            assert [text for _, text in HuggingFace(str(tmp_path / "saved")).documents()] == [
                "one",
                "two",
            ]
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and f"data.source.name={tmp_path}/saved cannot be" in str(
                error
            )
    assert refused >= len(DAMAGE[name]) - 1


def test_rows_of_a_saved_data_set_that_cannot_be_read_are_told_likewise(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["some words"] * 999}).save_to_disk(str(tmp_path / "saved"))
    source = HuggingFace(str(tmp_path / "saved"))
    known = source._load()
    broken = mock.patch.object(type(known), "__iter__", side_effect=KeyError("a\nb"))
    for read in (source.rows, source.documents):
        with broken, pytest.raises(ValueError, match="saved cannot be read: KeyError") as found:
            list(read())
        assert "\n" not in str(found.value)


def test_an_image_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """A data set says where its images are."""
    os.mkfifo(tmp_path / "pipe")
    row = {"image": {"bytes": None, "path": str(tmp_path / "pipe")}}
    with (
        mock.patch.object(HuggingFace, "rows", lambda *_, **__: [("row 0", row)]),
        mock.patch("PIL.Image.open", side_effect=AssertionError("it is opened, which waits")),
        pytest.raises(
            ValueError, match=r"row 0: 'image' is no readable image: .*pipe is no regular file"
        ),
    ):
        HubImages(HuggingFace("theirs"), label=None, size=8).read(lambda *_: None)
