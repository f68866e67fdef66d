"""A user's files are read whole, or refused with the place of the fault; what is left out is
counted.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import json
import lzma
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.formats import CHUNK, open_utf8
from dtrain.data.paths import CACHE, SIGNATURE, find_files, left_out_in_words
from dtrain.data.prepare import normalize, normalize_and_count, prepare
from dtrain.data.rows import Rows
from dtrain.data.sources import Files, HuggingFace, Squad
from dtrain.data.tokenizer import Bytes, FromFile

KEY = "data.source.path"


def put(folder: Path, **files: str | bytes) -> Path:
    """A folder of these files; `__` in a name stands for a slash, `_` before its ending for the
    dot.
    """
    for name, content in files.items():
        path, _, ending = name.replace("__", "/").rpartition("_")
        file = folder / f"{path}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def texts(path: Any, **options: Any) -> list[str]:
    return [
        text
        for _, text in Files(path if isinstance(path, list) else str(path), **options).documents()
    ]


def named(path: Any) -> tuple[list[str], dict[str, int]]:
    """The names of the files there, and what is left out."""
    source = Files(path if isinstance(path, list) else str(path))
    names = [Path(where).name for where, _ in source.documents()]
    return names, {kind: number for kind, number in source.left_out.items() if number}


# Which files


def test_links_are_followed_and_what_is_no_text_of_the_user_is_counted(tmp_path: Path) -> None:
    """A folder by a link is a part of the data; runs, caches and hidden folders are not."""
    folder = put(
        tmp_path / "in",
        a_txt="a",
        sub__b_txt="b",
        **{".git__c_txt": "c", ".ipynb_checkpoints__d_txt": "d"},
    )
    put(tmp_path / "far", e_txt="e")
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / "f.txt").symlink_to(folder / "a.txt")
    (folder / "sub" / "up").symlink_to(folder)
    put(folder / "outputs" / "mine", metrics_jsonl="{}", **{".hydra__config_yaml": "x: 1"})
    put(folder / "multirun" / "today", multirun_yaml="x: 1")
    put(folder / "cache", train_bin=b"\0").joinpath(CACHE).write_text(SIGNATURE)
    put(folder / "__pycache__", x_pyc=b"\0")
    (folder / "_SUCCESS").touch()
    (folder / "empty.txt").touch()
    (folder / ".DS_Store").write_bytes(b"\0")
    expected = {
        "hidden files or folders": 3, "links to a folder that they are in": 1, "folders of runs": 2,
        "folders of caches": 2, "markers of other programs": 1, "empty files": 1,
    }  # fmt: skip
    assert named(folder) == (["a.txt", "f.txt", "e.txt", "b.txt"], expected)
    names, left_out = named(f"{folder}/**/*.*")
    assert sorted(names) == ["a.txt", "b.txt", "e.txt", "f.txt"]
    assert left_out["folders of runs"] == 2 and left_out["folders of caches"] == 2
    assert left_out_in_words(left_out).count("folders of") == 2


def test_a_run_in_the_folder_of_its_data_is_refused(tmp_path: Path) -> None:
    put(tmp_path, a_txt="a", metrics_jsonl="{}", **{".hydra__config_yaml": "x: 1"})
    for path in (str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(
            ValueError, match="is the folder of a run, and its files are the run's own"
        ):
            find_files(path, KEY)
    assert texts(tmp_path / "a.txt") == ["a"]


@pytest.mark.parametrize("path", ["", "  ", [""], ["a.txt", ""]])
def test_an_empty_path_is_not_the_current_folder(
    path: str | list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(put(tmp_path, a_txt="a"))
    for source in (Files(path), Squad(path)):
        with pytest.raises(
            ValueError, match=r"data.source.path is empty \(is a variable not set\?\)"
        ):
            source.describe()
    if isinstance(path, str):
        with pytest.raises(ValueError, match=r"data.cache \(DTRAIN_CACHE\) is empty"):
            prepare("x", Files("a.txt"), Bytes(), path)
        with pytest.raises(ValueError, match="data.source.name is empty"):
            HuggingFace(path)
        with pytest.raises(ValueError, match="data.tokenizer.path is empty"):
            FromFile(path, 300)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


def test_no_home_folder_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", none)
    with pytest.raises(ValueError, match="data.source.path=~/x: there is no such home folder"):
        find_files("~/x", KEY)


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path, a_txt="a")
    (folder / "b.txt").symlink_to("gone.txt")
    for path in (folder, folder / "*.txt", folder / "b.txt"):
        with pytest.raises(ValueError, match=r"b.txt is a link to gone.txt, which is not there"):
            find_files(str(path), KEY)


@pytest.mark.parametrize(
    "name",
    ["a[1].txt", "[v2].txt", "a*.txt", "what?.txt", ".hidden.txt", "a b (1).txt", "日本語.txt"],
)
def test_a_file_that_is_named_is_read_whatever_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "a1.txt").write_text("other")
    assert texts(tmp_path / name) == ["mine"]
    assert texts([str(tmp_path / name), str(tmp_path / "a1.txt"), str(tmp_path / name)]) == [
        "mine",
        "other",
    ]


def test_a_list_needs_each_of_its_paths(tmp_path: Path) -> None:
    put(tmp_path, a_txt="a", b_txt="b", sub__c_txt="c")
    assert texts([f"{tmp_path}/b.txt", f"{tmp_path}/sub", f"{tmp_path}/*.txt"]) == ["b", "c", "a"]
    with pytest.raises(ValueError, match="no.txt: no such file"):
        texts([f"{tmp_path}/a.txt", f"{tmp_path}/no.txt"])
    for path in ([], [3], {"a": 1}):
        with pytest.raises(ValueError, match="must be a path, or a list of paths"):
            find_files(path, KEY)  # type: ignore[arg-type]


def test_folders_that_a_pattern_matches_are_counted_unless_it_goes_into_them(
    tmp_path: Path,
) -> None:
    put(tmp_path, a_txt="a", sub__b_txt="b", sub__deep__c_txt="c")
    assert named(f"{tmp_path}/*") == (
        ["a.txt"],
        {"folders that the pattern matches, with what is in them": 1},
    )
    assert named(f"{tmp_path}/**") == (["a.txt", "b.txt", "c.txt"], {})


@pytest.mark.parametrize(
    "pattern", ["**/*.txt", "**", "**/*", "**/**/a.txt", "*/**/*.txt", "**/x/**/*.txt", "x/*/**"]
)
def test_links_back_do_not_keep_a_pattern_from_its_end(pattern: str, tmp_path: Path) -> None:
    """Two links to where they are: 2^40 paths, for whoever follows them until the system
    refuses.
    """
    put(tmp_path, a_txt="a", sub__b_txt="b", sub__x__c_txt="c")
    (tmp_path / "x").symlink_to(".")
    (tmp_path / "y").symlink_to(".")
    assert all(
        len(file.relative_to(tmp_path).parts) < 6 for file in _tried(f"{tmp_path}/{pattern}")
    )


def _tried(pattern: str) -> list[Path]:
    try:
        return find_files(pattern, KEY)
    except ValueError as error:
        assert "links to a folder that they are in" in str(error)
        return []


@pytest.mark.parametrize("end", ["", "/**/*.txt"])
def test_folders_whose_links_cross_are_refused(end: str, tmp_path: Path) -> None:
    """None leads back, and there are 2^40 ways."""
    for number in range(40):
        put(tmp_path, **{f"{number}__a_txt": "a"})
        if number < 39:
            for name in "xy":
                (tmp_path / f"{number}" / name).symlink_to(tmp_path / f"{number + 1}")
    with pytest.raises(ValueError, match="links lead to .*/.* by more than 1,000 ways"):
        find_files(f"{tmp_path}/0{end}", KEY)


@given(
    st.lists(
        st.sampled_from(["*", "**", "a", "b", "?", ".*", "[ab]", "*.txt", "a.txt"]),
        min_size=1,
        max_size=4,
    )
)
def test_a_pattern_matches_what_glob_says(parts: list[str]) -> None:
    """Without links; hidden files only where it names them."""
    with TemporaryDirectory() as folder:
        put(
            Path(folder),
            a_txt="",
            a__a_txt="",
            a__b__a_txt="",
            b__b__b__x_txt="",
            **{".h_txt": "", "b__.a__a_txt": ""},
        )
        pattern = f"{folder}/{'/'.join(parts)}"
        expected = {Path(path) for path in glob.glob(pattern, recursive=True)} - {Path(folder)}
        try:
            found = find_files(pattern, KEY) if glob.has_magic("".join(parts)) else []
        except ValueError:
            found = []
        assert not glob.has_magic("".join(parts)) or found == sorted(
            path for path in expected if path.is_file()
        )


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="is a pipe or a device, and would be read several times"):
        find_files(str(tmp_path / "pipe.txt"), KEY)
    put(tmp_path, a_txt="a")
    assert named(tmp_path) == (["a.txt"], {"pipes or devices": 1})
    with pytest.raises(
        ValueError, match=r"no file in it or matching it, where \[\[\] stands for \["
    ):
        find_files(f"{tmp_path}/[v2]/*.txt", KEY)


# Encodings


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\x1b"), max_size=60),
    st.integers(0, 2**20 + 9),
)
def test_utf8_is_read_whole_at_any_place(text: str, before: int) -> None:
    """Also where a character lies across two reads; a mark at the begin is no text."""
    for mark in (b"", b"\xef\xbb\xbf"):
        file = Path(os.environ["DTRAIN_CACHE"]).parent / "one.txt"
        file.write_bytes(mark + b"x" * before + text.encode())
        with open_utf8(file) as stream:
            assert stream.read() == "x" * before + text.replace("\r\n", "\n").replace("\r", "\n")


@given(
    st.text(
        st.characters(min_codepoint=97, max_codepoint=0x3000, exclude_categories=["Cs"]),
        max_size=20,
    ),
    st.sampled_from([0, 3, CHUNK - 1, CHUNK, CHUNK + 1]),
    st.sampled_from([b"\xff", b"\xe4x", b"\xc3", b"\xf0\x9f\x99", b"\xed\xa0\x80", b"\x80"]),
)
def test_what_is_no_utf8_is_refused_at_its_byte(text: str, before: int, fault: bytes) -> None:
    file = Path(os.environ["DTRAIN_CACHE"]).parent / "fault.txt"
    start = b"x" * before + text.encode()
    for after in (b"", b" and more"):
        file.write_bytes(start + fault + after)
        with pytest.raises(ValueError, match=rf"fault.txt is not UTF-8 text \(byte {len(start)}\)"):
            open_utf8(file)


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "json", "tsv"])
def test_utf16_is_refused_with_and_without_its_mark(
    encoding: str, mark: bool, ending: str, tmp_path: Path
) -> None:
    text = "\ufeff" * mark + '{"text": "a text"}\n'
    file = tmp_path / f"a.{ending}"
    file.write_bytes(text.encode(encoding))
    at = 0 if mark or encoding.endswith("be") else 1
    with pytest.raises(
        ValueError,
        match=rf"is not UTF-8 text \(byte {at}\): (it begins with the mark of UTF|a NUL)",
    ):
        texts(file)


@pytest.mark.parametrize(("encoding", "text"), [
    ("iso2022_jp", "日本語"), ("iso2022_kr", "한국어"), ("utf-16-le", "日本語、これは本当です。"),
    ("shift_jis", "日本語"),
    ("gbk", "中文"), ("latin-1", "café"), ("cp1252", "“quoted”"), ("cp037", "ebcdic text"),
])  # fmt: skip
def test_other_encodings_are_refused(encoding: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte \d+\)"):
        texts(tmp_path / "a.txt")


def test_escapes_of_a_terminal_are_text(tmp_path: Path) -> None:
    assert texts(put(tmp_path, a_txt="\x1b[1mbold\x1b(B", b_txt="é \x1b$B")) == [
        "\x1b[1mbold\x1b(B",
        "é \x1b$B",
    ]


@pytest.mark.parametrize(("ending", "content"), [
    ("jsonl", '{"text": "a"}\n{"text": "b"}\n'), ("csv", "text,n\na,1\nb,2\n"),
    ("json", '[{"text": "a"}, "b"]'),
    ("tsv", "text\tn\na\t1\nb\t2\n"),
])  # fmt: skip
def test_a_mark_at_the_begin_is_no_text_in_any_format(
    ending: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / f"a.{ending}").write_text(content, encoding="utf-8-sig")
    assert texts(tmp_path) == ["a", "b"]
    for suffix, library in (("gz", gzip), ("bz2", bz2), ("xz", lzma)):
        file = tmp_path / f"a.{ending}.{suffix}"
        file.write_bytes(library.compress(content.encode("utf-8-sig")))
        assert texts(file) == ["a", "b"]
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match="is damaged, or is not what its ending says"):
            texts(file)
        file.write_bytes(b"plain text")
        with pytest.raises(ValueError, match="is damaged, or is not what its ending says"):
            texts(file)


# What separates words and lines


@given(
    st.lists(
        st.sampled_from("ab \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u0301\x07\x1b\x7f"), max_size=12
    ).map("".join)
)
def test_what_separates_words_goes_on_to_separate_them(text: str) -> None:
    """Words are those of Python's own `split`, without characters that mean nothing; all that
    is lost is counted.
    """
    lost = Counter[str]()
    made = normalize_and_count(text, lost)
    silent = str.maketrans(dict.fromkeys("\x07\x1b\x7f"))
    assert len(made.split()) == len(text.translate(silent).split())
    assert made == normalize(made) and lost["control characters"] == sum(
        c in "\x07\x1b\x7f" for c in text
    )


def test_composed_characters_stay_composed() -> None:
    assert normalize("e\x07\u0301") == "é\n" == normalize(normalize("e\x07\u0301"))


# Formats


def test_endings_tell_the_format(tmp_path: Path) -> None:
    rows = [{"text": "one\ttab", "n": 1}, {"text": 'two "quoted"\nlines', "n": 2}]
    wanted = [row["text"] for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("a.jsonl", "a.ndjson", "a.JSONL", "a.jsonlines", "a.json"):
        (tmp_path / name).write_text(lines)
        assert texts(tmp_path / name) == wanted
    for content in (json.dumps(rows), json.dumps(rows, indent=2), "\n\n" + json.dumps(rows)):
        (tmp_path / "a.json").write_text(content)
        assert texts(tmp_path / "a.json") == wanted
    (tmp_path / "a.json").write_text(json.dumps(rows[1], indent=2))
    assert texts(tmp_path / "a.json") == wanted[1:]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t"), ("a.tab", "\t")):
        with (tmp_path / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["text", "n"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        assert texts(tmp_path / name) == wanted
    (tmp_path / "b.json").write_text('{"a": 1}')
    assert texts(tmp_path / "b.json", format="text") == ['{"a": 1}']


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '"x"\n[1]\n',
     r"a.jsonl, line 2 is list: a row is an object with fields, or a text"),
    ("a.json", '[{"text": "x"},\n{]', r"a.json, line 2: not JSON"),
    ("a.json", '[{"text": "x"}, 3]', r"a.json, row 1 is int: a row is an object"),
    ("a.json", "\n\n[\n{]", r"a.json, line 4: not JSON"),
    ("a.jsonl", '"x"\n{"text": "a", "text": "b"}\n',
     r"a.jsonl, line 2: the key 'text' stands twice in an object"),
    ("a.json", '{"text": "a", "of": {"n": 1, "n": 1}}',
     r"a.json, line 1: the key 'n' stands twice in an object"),
    ("a.json", '[{"text": "}\\"}"},\n{"text": "a", "n": {},\n "text": "b"}]',
     r"a.json, line 3: the key 'text' stands"),
    ("a.json", '{"data": []}', r"has no field 'text', only data: set data.source.field"),
    ("a.jsonl", "1" * 5000, r"a.jsonl, line 1: not JSON that can be read"),
    ("a.jsonl", "[" * 99_999, r"a.jsonl, line 1: not JSON that can be read"),
    ("a.csv", "text,text\na,b\n", r"line 1: 2 columns are named 'text'"),
    ("a.csv", 'text,n\n"a,1\n', r"a.csv, line \d: not CSV"),
    ("a.parquet", "PAR1", r"a.parquet is not a Parquet file, or is damaged"),
])  # fmt: skip
def test_what_is_broken_is_refused_with_its_place(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(tmp_path)
    assert "\n" not in str(caught.value)


def test_bare_texts_and_nulls_in_json_lines(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl='"one"\n\n{"text": null}\n{"text": "two"}\nnull\n')
    source = Files(str(tmp_path))
    assert [text for _, text in source.documents()] == ["one", "two"]
    assert source.left_out["rows without a text (null)"] == 2


@pytest.mark.parametrize("size", [131_073, 3_000_000])
def test_a_field_of_csv_may_be_long(size: int, tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text"], ["x" * size]])
    assert list(map(len, texts(tmp_path))) == [size]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_lines_are_read_one_at_a_time(ending: str, tmp_path: Path) -> None:
    """In less memory than the file has bytes."""
    line = {"jsonl": json.dumps({"text": "word " * 400}) + "\n", "csv": "word " * 400 + "\n"}[
        ending
    ]
    file = tmp_path / f"a.{ending}"
    file.write_text(("text\n" if ending == "csv" else "") + line * 8000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in Files(str(file)).documents()) == 8000
        assert tracemalloc.get_traced_memory()[1] < file.stat().st_size / 2
    finally:
        tracemalloc.stop()


def test_columns_of_parquet_that_nobody_needs_are_not_read(tmp_path: Path) -> None:
    """One of them cannot be turned into a Python value: as rows it is left out, and counted."""
    import pyarrow
    from pyarrow import parquet

    stamps = pyarrow.array([2**62, 1], pyarrow.duration("s"))
    broken = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
    )
    table = pyarrow.table({"text": ["a", None], "when": stamps, "broken": broken, "label": [0, 1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = Files(str(tmp_path))
    assert [text for _, text in source.documents()] == ["a"] and source.left_out[
        "rows without a text (null)"
    ] == 1
    rows = Files(str(tmp_path))
    assert [row for _, row in rows.rows()] == [
        {"text": "a", "label": 0},
        {"text": None, "label": 1},
    ]
    assert rows.left_out["columns of a Parquet file that have no value in Python"] == 2
    with pytest.raises(
        ValueError,
        match="has no field 'body', only text, when, broken, label: set data.source.field",
    ):
        texts(tmp_path, field="body")
    with pytest.raises(ValueError, match="column 'broken' is string, not text"):
        texts(tmp_path, field="broken")


@pytest.mark.parametrize("read", [Files.rows, Files.documents])
def test_columns_of_parquet_of_one_name_are_refused(read: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table([pyarrow.array([name]) for name in "abc"], names=["text", "n", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: 2 columns are named 'text': name them apart"):
        list(read(Files(str(tmp_path))))


@pytest.mark.parametrize(("content", "message"), [
    ('{"data": [{"title": "a",\n"title": "b"}]}', "a.json, line 2: the key 'title' stands twice"),
    ("[" * 99_999, "a.json: not JSON that can be read"),
    ('{"data": [{"paragraphs": [{"context": "a", "qas": ["b"]}]}]}',
     "a.json is not in SQuAD's form"),
    ('{"data": [{"paragraphs": [{"context": "a", "qas": [["b"]]}]}]}',
     "a.json is not in SQuAD's form"),
])  # fmt: skip
def test_what_is_broken_in_squads_form_is_refused(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(Squad(str(tmp_path / "a.json")).rows())
    assert "\n" not in str(caught.value)


def test_nan_is_null_as_pandas_has_it(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [float("nan"), 1.5]}), tmp_path / "a.parquet")
    source = Files(str(tmp_path))
    with pytest.raises(ValueError, match="row 1: field 'text' is float, not text"):
        list(source.documents())
    assert source.left_out["rows without a text (null)"] == 1


@pytest.mark.parametrize(
    "deep", [[900 * "[" + 900 * "]"], ['{"a":' * 900 + "1" + "}" * 900]], ids=["lists", "objects"]
)
@pytest.mark.parametrize("cache", [None, "cache"])
def test_rows_that_are_nested_deep_are_refused(
    deep: list[str], cache: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(f'{{"text": "{i}", "of": {deep[0] if i == 2 else 0}}}\n' for i in range(40))
    )
    rows = Rows("x", Files(str(file)), Bytes(), cache=cache and str(tmp_path / cache))
    with pytest.raises(
        ValueError, match="a.jsonl, line 3: nested deeper than 64 levels: leave such fields out"
    ):
        rows.prepare(lambda what, done: None)


def test_a_saved_data_set_of_several_splits(tmp_path: Path) -> None:
    import datasets

    splits = {
        name: datasets.Dataset.from_dict({"text": [name, None]}) for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    source = HuggingFace(str(tmp_path / "saved"), split="test")
    assert [text for _, text in source.documents()] == ["test"]
    assert source.left_out["rows without a text (null)"] == 1
    with pytest.raises(ValueError, match="data.source.split=dev: .* has train, test"):
        HuggingFace(str(tmp_path / "saved"), split="dev").describe()


def test_files_of_one_name_in_two_places_are_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though their sizes and times agree, as those of unpacked archives do."""
    found = []
    for name in ("one", "two"):
        monkeypatch.chdir(put(tmp_path / name, a_txt=f"text {name}\n" * 9))
        os.utime("a.txt", (1e9, 1e9))
        corpus = prepare("x", Files("a.txt"), Bytes(), tmp_path / "cache")
        found.append(bytes(corpus.tokens("train"))[:8])
    assert found == [b"text one", b"text two"]
