"""Figures as files have them: JSON that every reader reads, also after a kill."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from unittest import mock

import pytest
from omegaconf import OmegaConf

from dtrain.compare.results import Results, Row, read
from dtrain.files import json_files
from dtrain.report.base import Run
from dtrain.report.files import Files
from dtrain.report.sweep import Told, show_sweep
from dtrain.report.terminal import without_control_characters
from hydra_plugins.dtrain_torchrun import _outcome

VALUES = {
    "nan": math.nan,
    "inf": math.inf,
    "less": -math.inf,
    "finite": 1.5,
    "all": [1, (math.inf, "NaN?")],
    "no": None,
}


def _strict(text: str) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_written_as_json_and_read_again() -> None:
    found = _strict(json_files.dumps(VALUES))
    assert found == {
        "nan": "NaN",
        "inf": "Infinity",
        "less": "-Infinity",
        "finite": 1.5,
        "all": [1, ["Infinity", "NaN?"]],
        "no": None,
    }
    again = json_files.loads(json_files.dumps(VALUES))
    assert math.isnan(again.pop("nan")) and again == {
        **{k: v for k, v in VALUES.items() if k != "nan"},
        "all": [1, [math.inf, "NaN?"]],
    }


def _run(folder: Path, first_step: int) -> Run:
    return Run("single", {}, 1, first_step, 9, folder, (), {})


def test_a_run_writes_json_alone(tmp_path: Path) -> None:
    files = Files(pictures=False)
    files.start(_run(tmp_path, 0))
    files.step({"step": 1, "grad_norm": math.inf})
    files.finish({"val_loss": math.nan})
    files.close()
    assert _strict((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "grad_norm": "Infinity"}
    assert _strict((tmp_path / "summary.json").read_text()) == {"val_loss": "NaN"}
    results = Results(
        "", "", "single", "strong", 1, 9, 1, {}, {}, [Row("single", 1, loss=math.inf)]
    )
    results.write(tmp_path)
    _strict((tmp_path / "results.json").read_text())
    assert read(tmp_path).rows[0].loss == math.inf


TORN = {
    "half": b'{"step": 4, "lo',
    "half that ends with a brace": b'{"losses": {"step": 4}',
    "zeros": bytes(40),
    "no text": b"\xff\xfe\n",
    "no object": b"4\n[4]\nnull\n",
    "in the middle": b'{"step": 2\n{"step": 3, "loss": 0.3}\n',
}


@pytest.mark.parametrize("case", TORN)
def test_a_torn_line_does_not_keep_a_run_from_going_on(case: str, tmp_path: Path) -> None:
    """Each step that was done has its line once; what came after the checkpoint is done again."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(
        b"".join(b'{"step": %d, "loss": 0.%d}\n' % (n, n) for n in (1, 2, 3, 4, 3)) + TORN[case]
    )
    files = Files(pictures=False)
    files.start(_run(tmp_path, 3))
    files.step({"step": 4, "loss": 0.5})
    files.close()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in found] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.5),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


HOSTILE = "a\x1b]0;owned\x07b\x9bc\u202ed\u200be\x7f\r"


def test_what_would_steer_a_terminal_is_written_out() -> None:
    """And nothing else: letters of all the world, blanks and line ends stay."""
    assert without_control_characters(HOSTILE) == r"a\x1b]0;owned\x07b\x9bc\u202ed\u200be\x7f\r"
    plain = "größer 日本語 नमस्ते 😀\u3000\u00a0\ttab\nline \\x1b"
    assert without_control_characters(plain) == plain


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 100 + "1" + "}" * 100, "{", '"' + "\\ud800" + '"x', "9" * 5000, ""],
)
def test_no_file_ends_in_anything_but_a_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json (is not readable|holds no)") as found:
        json_files.read(tmp_path / "a.json")
    assert "\n" not in str(found.value)


def test_only_files_are_read_and_none_that_is_larger_than_any_of_ours(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, said in (
        (tmp_path, "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (Path("/dev/zero"), "no regular"),
    ):
        with pytest.raises(ValueError, match=said):
            json_files.read(place)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(json_files.LARGEST + 1)
    with pytest.raises(ValueError, match="67,108,865 bytes: more than any such file"):
        json_files.read(tmp_path / "large")


def test_a_job_that_failed_has_no_figures_of_the_run_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text(
        json.dumps({"loss": 1.25, "val_loss": 2.5, "tokens_per_second": 77})
    )
    show_sweep([Told("0", (), tmp_path), Told("1", (), tmp_path, "it holds a run")])
    said = capsys.readouterr().out
    assert (
        said.count("1.25") == said.count("2.5000") == 1 and "job 1 failed: it holds a run" in said
    )


def test_a_pipe_for_figures_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metrics.jsonl is no regular file"):
        list(json_files.lines(tmp_path / "metrics.jsonl"))
    os.mkfifo(tmp_path / "summary.json")
    with pytest.raises(ValueError, match="summary.json is no regular file"):
        show_sweep([Told("0", (), tmp_path)])


@pytest.mark.parametrize(
    "told",
    [{}, {"loss": "low"}, {"loss": 1, "val_loss": [2]}, {"loss": 1, "tokens_per_second": {}}],
)
def test_figures_that_a_job_has_left_are_numbers(told: dict[str, object], tmp_path: Path) -> None:
    """For the table of a sweep, and for a sweeper under torchrun."""
    (tmp_path / "summary.json").write_text(json.dumps(told))
    for reader in (
        lambda: show_sweep([Told("0", (), tmp_path)]),
        lambda: _outcome(tmp_path, 0, [], OmegaConf.create()),
    ):
        with pytest.raises(ValueError, match=r"summary\.json has \w+=.*: no run has left that"):
            reader()
    (tmp_path / "summary.json").write_text("[" * 99_999)
    with pytest.raises(ValueError, match="nested too deep"):
        _outcome(tmp_path, 0, [], OmegaConf.create())


def test_steps_that_are_no_numbers_are_no_steps(tmp_path: Path) -> None:
    """Nor are those that the checkpoint has not done, of which a file may have as many as it
    likes.
    """
    steps = [1, [1], {"a": 1}, None, "2", True, 2.0, -1, 0, 3, 10**400, 2]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in steps)
    )
    files = Files(pictures=False)
    files.start(_run(tmp_path, 2))
    files.close()
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2]


def test_lines_are_read_one_by_one_and_none_that_is_larger_than_any_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a file's size: no more of it is held than a line."""
    monkeypatch.setattr(json_files, "LINE", 100)
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1}\n'
        + "[" * 1000
        + "\n"
        + " " * 95
        + '{"step": 2}\n'
        + '{"step": 3}\n{"step": 4}'
    )
    with mock.patch.object(Path, "read_bytes", side_effect=AssertionError("all of it at once")):
        assert list(json_files.lines(file)) == [{"step": 1}, {"step": 3}]
