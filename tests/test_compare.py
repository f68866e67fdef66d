"""The comparison: what is asked for, what the figures say, and the whole thing as a person runs
it, interrupts it and reads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import warm
from hypothesis import given
from hypothesis import strategies as st
from test_cli import call  # noqa: F401

from dtrain.compare import command as comparison
from dtrain.compare import markdown, runner
from dtrain.compare.command import Failed, _locked
from dtrain.compare.difference import differences, show_difference
from dtrain.compare.entries import Case, Entry, cases_of
from dtrain.compare.figures import COLUMNS, in_words
from dtrain.compare.page import charts, costs, page, step
from dtrain.compare.page.style import FAMILIES, KINDS, Chart, family
from dtrain.compare.results import FIGURES, Results, Row, read
from dtrain.compare.verdict import (
    efficiency,
    equal_time,
    loss_at,
    memory_of,
    pareto_front,
    verdicts,
)
from dtrain.report.amounts import MIB, in_bytes

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, str(ROOT / "scripts/compare.py")]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def row(
    name: str,
    speeds: tuple[float, ...] = (100.0,),
    memory: int = 10,
    sent: float = 5.0,
    ranks: int = 2,
) -> Row:
    found = Row(
        name,
        ranks,
        reference="single",
        tokens_per_second=sorted(speeds)[len(speeds) // 2],
        step_seconds=0.1,
        loss=2.0,
        memory_bytes=memory,
        peak_memory_bytes=1000,
        wire_bytes=sent,
        exposed_share=0.1,
        loss_difference=1e-7,
    )
    found.seconds, found.losses = [1.0, 2.0], [3.0, 2.0]
    found.repeats = [
        {"tokens_per_second": speed, "step_seconds": [0.1], "seconds": 1.0} for speed in speeds
    ]
    return found


def results(*rows: Row) -> Results:
    return Results(
        "dtrain compare",
        "2026-01-01T00:00:00+00:00",
        "single",
        "strong",
        2,
        12,
        1,
        {"model": "tiny"},
        {"commit": "a", "cpu": "c", "cores": 2},
        list(rows),
    )


# What is asked for


@pytest.mark.parametrize(("text", "label", "overrides", "trained", "ranks"), [
    ("ddp", "ddp", ["strategy=ddp"], (), None),
    ("replicate+fsdp launch.nproc=4", "replicate+fsdp",
     ["strategy=[replicate,fsdp]", "launch.nproc=4"], (), 4),
    ("pipeline strategy.pp.schedule=zbv", "pipeline schedule=zbv",
     ["strategy=pipeline", "strategy.pp.schedule=zbv"], (), None),
    ("expert model.n_experts=8", "expert n_experts=8", ["strategy=expert", "model.n_experts=8"],
     ("model.n_experts=8",), None),
    ("fsdp +strategy.fsdp.x=1 launch.threads=1", "fsdp x=1 threads=1",
     ["strategy=fsdp", "+strategy.fsdp.x=1", "launch.threads=1"], (), None),
])  # fmt: skip
def test_an_entry_is_a_strategy_and_its_settings(
    text: str, label: str, overrides: list[str], trained: tuple, ranks: int
) -> None:
    entry = Entry.of(text)
    assert (entry.label, entry.overrides, entry.trained, entry.number("launch.nproc")) == (
        label,
        overrides,
        trained,
        ranks,
    )


@pytest.mark.parametrize("text", ["", "model=tiny", "ddp fsdp"])
def test_what_is_no_entry_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="strategies: "):
        Entry.of(text)


def test_each_kind_of_training_has_its_own_baseline() -> None:
    cases = cases_of(
        ["ddp", "expert model.n_experts=8", "single", "3d launch.nproc=8"],
        "single",
        [2],
        16,
        "strong",
    )
    assert [(c.label, c.ranks) for c in cases] == [
        ("single", 1),
        ("ddp", 2),
        ("3d", 8),
        ("single n_experts=8", 1),
        ("expert n_experts=8", 2),
    ]
    first = {c.label: next(o.label for o in cases if c.trains_the_same(o)) for c in cases}
    assert first["3d"] == "single" and first["expert n_experts=8"] == "single n_experts=8"


def test_world_sizes_and_weak_scaling() -> None:
    cases = cases_of(["ddp", "fsdp"], "single", [1, 2, 4], 16, "weak")
    assert [c.label for c in cases][:4] == ["single", "ddp @1", "ddp @2", "ddp @4"]
    assert {c.label: c.rows for c in cases}["ddp @4"] == 64 and cases[0].rows == 16
    assert not cases[0].trains_the_same(cases[2]) and cases[0].trains_the_same(cases[1])
    assert len({c.folder for c in cases}) == len(cases)


def test_every_case_has_a_label_and_a_folder_of_its_own() -> None:
    asked = [
        "ddp",
        "ddp launch.nproc=4",
        "ddp model.x=1",
        "ddp task.x=1",
        "ddp global_batch_size=32",
        "fsdp x=1/2",
        "fsdp x=1:2",
    ]
    cases = cases_of(asked, "single", [2], 16, "strong")
    placed = {(c.entry.strategy, c.ranks, c.rows, c.entry.settings) for c in cases}
    assert (
        len(cases) == len(placed) == len({c.label for c in cases}) == len({c.folder for c in cases})
    )
    assert {c.rows for c in cases if "global_batch_size=32" in c.entry.settings} == {32}
    assert all(c.overrides[-1] == f"global_batch_size={c.rows}" for c in cases)


# What the figures say


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    rows = [row(str(i), (float(speed),), memory) for i, (speed, memory) in enumerate(points)]
    found = pareto_front(rows)
    assert found
    for each in rows:
        beaten = any(
            (o.tokens_per_second > each.tokens_per_second and memory_of(o) <= memory_of(each))
            or (o.tokens_per_second >= each.tokens_per_second and memory_of(o) < memory_of(each))
            for o in rows
        )
        assert (each in found) == (not beaten)


def test_the_verdict_names_the_best_and_owns_up_to_noise() -> None:
    rows = [
        row("single", (100, 101), 30, 0, 1),
        row("ddp", (95, 105), 20, 8),
        row("fsdp", (96, 104), 9, 12),
        row("3d", (1,), 1, 1, 8),
    ]
    told = {v.title: v for v in verdicts(results(*rows))}
    assert (
        told["fastest"].strategy,
        told["leanest in tensor memory"].strategy,
        told["fewest bytes sent"].strategy,
    ) == (
        "ddp, fsdp, about equal",
        "fsdp",
        "ddp",
    )
    # 3d has more ranks than were asked for, single sends nothing
    assert "a tie" in told["fastest"].note
    told = {
        v.title: v
        for v in verdicts(results(rows[0], row("ddp", (200, 205)), row("fsdp", (96, 104))))
    }
    assert "more than the repeats differ" in told["fastest"].note


@given(
    st.lists(st.floats(50, 150), min_size=2, max_size=5),
    st.lists(st.floats(50, 150), min_size=2, max_size=5),
)
def test_a_difference_is_noise_where_any_two_repeats_could_be_equal(
    before: list[float], after: list[float]
) -> None:
    (found,) = differences(results(row("ddp", tuple(before))), results(row("ddp", tuple(after))))
    assert found.noise == (max(before) >= min(after) and max(after) >= min(before))
    assert found.least <= found.ratio <= found.most


def test_a_page_without_figures_tells_the_reasons() -> None:
    found = results(
        Row("single", 1, reason="no room <b>", failed=True), Row("ddp [x]", 2, reason="too few")
    )
    found.environment |= {
        "memory_bytes": 1,
        "gpu": None,
        "python": "3",
        "packages": {"torch": "2"},
        "platform": "x",
    }
    found.facts |= {"data": "d", "task": "t", "global_batch_size": 1, "dtype": "fp32", "seed": 0}
    text = page.document(found, {}, str)
    assert (
        "Nothing has run to its end" in text and "too few" in text and "no room &lt;b&gt;" in text
    )
    assert Cells(text).missing == ["single", "ddp [x]"]


MACHINE: dict[str, Any] = {
    "memory_bytes": 1,
    "gpu": None,
    "python": "3",
    "packages": {"torch": "2"},
    "platform": "x",
    "cpu": "y",
}
FACTS: dict[str, Any] = {"task": "t", "global_batch_size": 1, "dtype": "fp32", "seed": 0}


def test_names_steer_neither_a_page_nor_a_figure_nor_a_document() -> None:
    """Markup, Markdown, escape sequences and other directions in a label are text, in whatever
    it is shown.
    """
    evil = "a<b>|<img src=x onerror=alert(1)>[x](javascript:y)`\x1b[31m\u202e"
    found = results(
        row("ddp", (100.0,)),
        row(evil, (90.0,)),
        Row("no\n# Title", 2, reason="b\n\n<script>|", failed=True),
    )
    found.environment |= MACHINE
    found.facts |= FACTS | {"data": evil}
    for each in found.ran:
        each.losses, each.seconds, each.wire_bytes = [2.0, 1.0], [0.1, 0.2], 3.0
    told = markdown.document(found)
    assert not {"<img", "<script", "\x1b", "\u202e"} & {
        w for w in ("<img", "<script", "\x1b", "\u202e") if w in told
    }
    assert "\n# Title" not in told and "](javascript" not in told.replace("\\[x]", "")
    for chart in (
        charts.tradeoff(found),
        charts.losses(found),
        charts.pace(found),
        charts.throughput(found),
        charts.steps(found),
    ):
        said = json.dumps(
            [
                {k: v for k, v in t.items() if k != "customdata"}
                for t in chart.figure.to_dict()["data"]
            ],
            ensure_ascii=False,
        )
        assert (
            "\\u001b" not in said
            and "\u202e" not in said
            and "<img" not in re.sub("</?b>|<br>", "", said)
        ), chart.name
        assert "&lt;img" in said or chart.name == "scaling", chart.name


def test_names_that_are_not_utf8_end_no_comparison(tmp_path: Path) -> None:
    """Of columns, in a reason; of files, in a strategy's settings and in the command."""
    odd = "data.source.path=\udcff"
    found = results(
        Row("ddp", 2, reason="too few"),
        Row(f"ddp {odd}", 2, reason="no column \udcff\x1b[2J", failed=True),
    )
    found.command = f"dtrain compare {odd}"
    found.environment |= MACHINE
    found.facts |= FACTS | {"data": odd}
    comparison.report(found, tmp_path)
    for name in ("results.csv", "report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert r"\udcff" in text and "\x1b" not in text, name


def test_a_reason_is_kept_as_it_may_be_shown(tmp_path: Path) -> None:
    """A run that fails for a name that steers a terminal: what is kept of it steers none."""
    found = results(Row("ddp", 2))
    found.asked = 1

    def start(*_: object) -> dict[str, Any]:
        raise ValueError("no column \udcff\x1b[2J\nof\tthese")

    runner.run_all(
        [Case(Entry("ddp"), 2, 4, "ddp")], found, tmp_path, 1, start, lambda: found.write(tmp_path)
    )
    assert (
        found.rows[0].reason
        == r"no column \udcff\x1b[2J of these"
        in (tmp_path / "results.csv").read_text()
    )


def test_what_another_model_trains_is_not_judged_even_without_a_baseline() -> None:
    other = row("expert", (900,))
    other.trained = ["model.n_experts=8"]
    found = results(
        Row("single", 1, reason="no room", failed=True),
        row("ddp", (100,)),
        row("fsdp", (50,)),
        other,
    )
    assert [r.strategy for r in found.comparable] == ["ddp", "fsdp"]
    loose = row("local_sgd", (950,))
    loose.synchronous = False
    assert results(row("single"), row("ddp"), loose).loose == [loose]
    assert [r.strategy for r in results(row("single"), row("ddp"), loose).comparable] == [
        "single",
        "ddp",
    ]


def test_tensors_are_not_compared_with_processes() -> None:
    """Where one comparison did not follow its tensors (compile=true), the ratio is of the
    processes.
    """
    followed, other = row("ddp", memory=10), row("ddp", memory=10)
    other.memory_bytes, other.peak_memory_bytes = None, 3000
    (found,) = differences(results(followed), results(other))
    assert found.memory_ratio == 3.0
    (found,) = differences(results(row("ddp", memory=10)), results(row("ddp", memory=20)))
    assert found.memory_ratio == 2.0
    titles = [verdict.title for verdict in verdicts(results(other))]
    assert "leanest in process memory" in titles and "leanest in tensor memory" not in titles


def test_one_repeat_cannot_tell_noise_and_strangers_cannot_be_compared() -> None:
    (found,) = differences(results(row("ddp", (100,))), results(row("ddp", (50,)), row("fsdp")))
    assert (found.strategy, found.noise, found.ratio) == ("ddp", None, 0.5)
    with pytest.raises(ValueError, match="no strategy ran in both: ddp and fsdp"):
        differences(results(row("ddp")), results(row("fsdp")))


@pytest.mark.parametrize(
    "name", ["runs", "results.json", "results.csv", "report.md", "report.html"]
)
def test_a_comparison_writes_and_removes_nothing_behind_a_link(name: str, tmp_path: Path) -> None:
    """Whichever of its own is there already, it is another comparison's."""
    theirs, folder = tmp_path / "theirs", tmp_path / "mine"
    folder.mkdir()
    (theirs / "single").mkdir(parents=True) if name == "runs" else theirs.write_text("theirs")  # noqa: B018
    (folder / name).symlink_to(theirs)
    with (
        pytest.raises(ValueError, match=f"has {name} of another comparison: set overwrite=true"),
        _locked(folder, False),
    ):
        pass
    with _locked(folder, True):
        assert not os.path.lexists(folder / name) and (
            (theirs / "single").is_dir() or theirs.read_text() == "theirs"
        )


def test_losses_are_compared_at_equal_time() -> None:
    quick, slow = row("ddp"), row("local_sgd")
    slow.seconds, slow.losses = [0.5, 1.5, 2.5], [5.0, 4.0, 3.0]
    assert equal_time([quick, slow]) == 2.0
    assert [loss_at(slow, seconds) for seconds in (0.1, 0.5, 1.0, 2.0, 9.0)] == [
        5.0,
        5.0,
        5.0,
        4.0,
        3.0,
    ]


def folders(tmp_path: Path, first: Results, second: Results) -> list[str]:
    for name, found in (("first", first), ("second", second)):
        (tmp_path / name).mkdir(exist_ok=True)
        found.write(tmp_path / name)
    return [str(tmp_path / "first"), str(tmp_path / "second")]


@pytest.mark.parametrize(("rate", "bound", "said"), [
    (80.0, "0.9", "fail_below=0.9: ddp 0.800"), (80.0, "0.8", ""), (80.0, "0.801", "ddp 0.800"),
    (120.0, "0.9", ""), (120.0, "1.5", "fail_below=1.5: ddp 1.200"), (80.0, "9e-1", "ddp 0.800"),
])  # fmt: skip
def test_a_throughput_below_the_bound_fails(
    rate: float, bound: str, said: str, tmp_path: Path
) -> None:
    """By the medians, whatever the spread of the repeats; at the bound itself it does not."""
    first = results(row("single"), row("ddp", (50.0, 100.0, 200.0)))
    second = results(row("single", (200.0,)), row("ddp", (rate / 2, rate, rate * 2)), row("fsdp"))
    pair = folders(tmp_path, first, second)
    with pytest.raises(Failed, match=f"^throughput falls .*{said}$") if said else nullcontext():
        show_difference([*pair, f"fail_below={bound}"])


def test_a_strategy_that_runs_no_more_is_below_any_bound(tmp_path: Path) -> None:
    """One that the second comparison was not asked for is none of its matters."""
    first = results(row("single"), row("ddp"), row("fsdp"), row("tensor"))
    second = results(row("single"), Row("ddp", 2, reason="no room"), Row("fsdp", 2))
    pair = folders(tmp_path, first, second)
    show_difference(pair)
    with pytest.raises(Failed, match=r"fail_below=0\.5: ddp did not run, fsdp did not run$"):
        show_difference([*pair, "fail_below=0.5"])


@pytest.mark.parametrize("bound", ["", "0", "-1", "nan", "inf", "much", "ddp.loss < 1"])
def test_what_is_no_bound_is_refused(bound: str, tmp_path: Path) -> None:
    pair = folders(tmp_path, results(row("ddp")), results(row("ddp")))
    with pytest.raises(ValueError, match=f"^fail_below={bound}: give a number above 0, such as"):
        show_difference([*pair, f"fail_below={bound}"])


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    found = results(row("single"), row("ddp", (1.5, 2.5)), Row("fsdp", 2, reason="why"))
    found.write(tmp_path)
    assert read(tmp_path) == found
    table = (tmp_path / "results.csv").read_text().splitlines()
    assert table[0].split(",")[1:-2] == list(FIGURES) and len(table) == 4
    for broken, said in (
        ('{"schema": 99}', "has schema 99, this version reads 1"),
        ("[", "is not readable"),
        ("[]", "holds no JSON object"),
        ('{"schema": 1}', "is not as dtrain compare writes it: KeyError: 'rows'"),
        ('{"schema": 1, "rows": [3]}', "is not as dtrain compare writes it"),
        ("[" * 100_000, "nested too deep"),
    ):
        (tmp_path / "results.json").write_text(broken)
        with pytest.raises(ValueError, match=said):
            read(tmp_path)
    with pytest.raises(ValueError, match="has no results.json"):
        read(tmp_path / "nowhere")


@given(drawn=st.data())
def test_whatever_stands_in_results_is_read_or_refused_in_a_line(drawn: st.DataObject) -> None:
    """One value of a good file, wherever it stands, is another one, or gone; control characters
    come as text.
    """
    with TemporaryDirectory() as folder:
        results(row("single"), row("ddp")).write(Path(folder))
        found = json.loads((Path(folder) / "results.json").read_text())
        node = found
        while isinstance(node, dict | list) and node:
            key = drawn.draw(
                st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
            )
            if not (isinstance(node[key], dict | list) and node[key] and drawn.draw(st.booleans())):
                node[key] = drawn.draw(
                    st.sampled_from([None, 3, -1.5, True, "text\x1b[2J", [], {}, [1], {"a": None}])
                )
                break
            node = node[key]
        (Path(folder) / "results.json").write_text(json.dumps(found))
        good = Path(folder) / "[" / "x]"  # no markup of the table's
        good.mkdir(parents=True)
        results(row("single"), row("ddp")).write(good)
        for pair in ([folder, str(good)], [str(good), folder]):
            try:
                made = read(Path(folder))
                with redirect_stdout(StringIO()) as said, suppress(Failed):
                    show_difference([*pair, "fail_below=0.9"])
            except ValueError as error:
                assert "\n" not in str(error) and "\x1b" not in str(error)
            else:
                assert "\x1b" not in str(vars(made)).replace(
                    "\\x1b", ""
                ) + said.getvalue() and "[/x]" in "".join(said.getvalue().split())


@pytest.mark.parametrize(("key", "value", "said"), [
    ("environment", {}, ""), ("facts", [], "facts="), ("rows.0.repeats", [3], "repeats="),
    ("rows.0.repeats", [{}], "repeats="),
    ("rows.0.repeats", [{"tokens_per_second": 0}], "repeats="),
    ("rows.0.repeats", [{"tokens_per_second": [1]}], "repeats="),
    ("rows.0.repeats", [{"tokens_per_second": 10**400}], "repeats="),
    ("rows.0.strategy", [1], "strategy="),
    ("rows.0.loss", {}, "loss="), ("rows.0.ranks", 10**400, "ranks="),
    ("rows.0.losses", 3, "losses="), ("rows.0.losses", ["x"], "losses="),
])  # fmt: skip
def test_a_figure_of_another_kind_is_named(key: str, value: Any, said: str, tmp_path: Path) -> None:
    """What a comparison knows nothing of, such as where it ran, is told as such."""
    results(row("single"), row("ddp")).write(tmp_path)
    node = found = json.loads((tmp_path / "results.json").read_text())
    *way, last = (int(part) if part.isdecimal() else part for part in key.split("."))
    for part in way:
        node = node[part]
    node[last] = value
    (tmp_path / "results.json").write_text(json.dumps(found))
    with (
        pytest.raises(
            ValueError,
            match=f"results.json.*: {said}.* is not what dtrain compare writes there",
        )
        if said
        else nullcontext()
    ):
        show_difference([str(tmp_path)] * 2)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (2 << 20, "2.0 MiB"),
        (13 << 28, "3.2 GiB"),
        (2048 << 30, "2,048.0 GiB"),
    ],
)
def test_sizes_are_said_in_words(number: float, words: str) -> None:
    assert in_bytes(number) == words


# The whole thing


def run(*arguments: str, cwd: Path, cache: Path) -> warm.Ended:
    return warm.run(
        [*SCRIPT, "model=tiny", "steps=6", *arguments],
        cwd=cwd,
        env=os.environ | {"DTRAIN_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        timeout=500,
    )


ASKED = (
    'strategies=[single,ddp,"pipeline strategy.pp.schedule=zbv","ddp optimizer.lr=1e30","fsdp '
    'launch.nproc=4",'
    'accelerate_local_sgd,"expert model.n_experts=4"]'
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, warm.Ended]:
    """One comparison with everything that may happen in it."""
    folder = tmp_path_factory.mktemp("compared")
    process = run(ASKED, "repeats=2", "hydra.run.dir=out", cwd=folder, cache=cache)
    return folder / "out", process


def test_strategies_stand_side_by_side_and_one_that_fails_stops_no_other(ran) -> None:
    folder, process = ran
    found = {each.strategy: each for each in read(folder).rows}
    assert list(found) == [
        "single",
        "ddp",
        "pipeline schedule=zbv",
        "fsdp",
        "accelerate_local_sgd",
        "single lr=1e30",
        "ddp lr=1e30",
        "single n_experts=4",
        "expert n_experts=4",
    ]
    assert (
        process.returncode == 1
        and "failed: single lr=1e30, ddp lr=1e30" in process.stderr.splitlines()[-1]
    )
    assert "Traceback" not in process.stderr
    data = json.loads((folder / "runs" / "ddp" / "0" / "summary.json").read_text())["data"]
    assert read(folder).facts["data digest"] == data["digest"]
    diverged = found["ddp lr=1e30"]
    assert (
        diverged.failed
        and "gradient norm" in diverged.reason
        and "try a lower optimizer.lr" in diverged.reason
    )
    impossible = found["pipeline schedule=zbv"]
    assert not impossible.failed and "use at most pp=1, or more blocks" in impossible.reason
    assert f"pipeline schedule=zbv: not possible here: {impossible.reason}" in process.stdout
    assert (found["single"].ranks, found["ddp"].ranks, found["fsdp"].ranks) == (1, 2, 4)
    for name in ("ddp", "fsdp", "expert n_experts=4"):
        each = found[name]
        assert each.loss_difference < 1e-5 * each.loss and len(each.repeats) == 2
        assert each.reference == ("single n_experts=4" if name.startswith("expert") else "single")
        assert each.losses[-1] == each.loss and len(each.losses) == 6
    assert found["ddp"].traffic == found["ddp"].traffic_predicted != [[], []]
    assert all(
        kinds["parameters"]["most"] == kinds["parameters"]["predicted"] > 0
        for kinds in found["fsdp"].memory
    )
    assert not found["accelerate_local_sgd"].synchronous and found["ddp"].synchronous
    assert in_words(found["accelerate_local_sgd"])["loss_difference"] == "not sync."
    assert len(found["ddp"].seconds) == 6 and found["ddp"].seconds == sorted(found["ddp"].seconds)
    # those that no instrument disturbs
    assert [len(each["step_seconds"]) for each in found["ddp"].repeats] == [2, 2]


def test_the_repeats_take_turns(ran) -> None:
    made = sorted(
        (file.stat().st_mtime, str(file.relative_to(ran[0] / "runs").parent))
        for file in (ran[0] / "runs").glob("*/*/summary.json")
    )
    order = [place for _, place in made]
    assert (
        order[:2] == ["single/0", "ddp/0"]
        and order[len(order) // 2] == "single/1"
        and len(order) % 2 == 0
    )


class Cells(HTMLParser):
    """The numbers of a page, by strategy and figure; and what else it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: dict[tuple[str, str], tuple[Any, str]] = {}
        self.missing: list[str] = []
        self.cards: list[str] = []
        self.sources: list[str] = []
        self._row = self._cell = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.sources += [
            found[key] for key in ("src", "href") if found.get(key, "").startswith(("http", "//"))
        ]
        if tag == "tr" and "data-strategy" in found:
            self._row = found["data-strategy"]
        if tag == "details" and "data-strategy" in found:
            self.cards.append(found["data-strategy"])
        if "data-missing" in found:
            self.missing.append(found["data-missing"])
        if tag == "td" and "data-figure" in found:
            self._cell = (self._row, found["data-figure"])
            self.values[self._cell] = (json.loads(found["data-value"]), "")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.values[self._cell] = (self.values[self._cell][0], data)
            self._cell = None


def assert_tells_the_results(text: str, found: Results) -> None:
    seen = Cells(text)
    first = [each.rows[0] for each in verdicts(found) if each.rows[0].ranks > 1]
    cards = [*dict.fromkeys(each.strategy for each in [*first, *found.ran])]
    assert seen.cards == cards and seen.sources == []
    assert seen.missing == [each.strategy for each in found.rows if each.reason or not each.ran]
    assert len(seen.values) == len(found.ran) * len(COLUMNS)
    for each in found.ran:
        for figure, words in in_words(each).items():
            assert seen.values[each.strategy, figure] == (getattr(each, figure), words)


def test_the_page_tells_the_results_and_needs_no_network(ran) -> None:
    text, found = (ran[0] / "report.html").read_text(), read(ran[0])
    assert_tells_the_results(text, found)
    assert "@media (prefers-color-scheme: dark)" in text and "@media print" in text
    for each in found.ran:
        assert each.command.replace("'", "&#39;") in text
    document = (ran[0] / "report.md").read_text()
    assert all(f"| {each.strategy} | {each.ranks} |" in document for each in found.ran)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here to open the page in")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_the_page_without_an_error(ran, width: int, tmp_path: Path) -> None:
    """And its scripts leave the numbers as they are; every figure is drawn; nothing is wider
    than the window.
    """
    text, found = (ran[0] / "report.html").read_text(), read(ran[0])
    probe = """<script>setTimeout(() => { plots.forEach(draw); document.body.dataset.problems = JSON.stringify(problems);
        document.body.dataset.drawn = document.querySelectorAll(".plot .main-svg").length > 0 && plots.every(plot => plot.box.querySelector("svg"));
        document.body.dataset.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth; }, 1500)</script></body>"""
    opened = text.replace('<details class="card"', '<details open class="card"').replace(
        "</body>", probe
    )
    file = tmp_path / "page.html"
    file.write_text(opened)
    browser = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            f"--window-size={width},900",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert browser.returncode == 0 and "CONSOLE" not in browser.stderr, browser.stderr[-2000:]
    assert re.search(r"data-problems=\"(.*?)\"", browser.stdout)[1] == "[]"  # type: ignore[index]
    assert 'data-drawn="true"' in browser.stdout and 'data-wide="0"' in browser.stdout
    assert_tells_the_results(browser.stdout, found)


def test_two_results_are_compared_and_a_bound_decides_the_status(
    ran, tmp_path: Path, cache: Path
) -> None:
    folder = ran[0]
    found = read(folder)
    slow = replace(found, rows=[replace(each) for each in found.rows])
    for each in slow.ran:
        each.repeats = [
            repeat | {"tokens_per_second": repeat["tokens_per_second"] / 100}
            for repeat in each.repeats
        ]
        each.tokens_per_second = (each.tokens_per_second or 0) / 100
    slow.environment = slow.environment | {"commit": "another"}
    (tmp_path / "slow").mkdir()
    slow.write(tmp_path / "slow")

    def between(*arguments: str) -> warm.Ended:
        return warm.run([*SCRIPT, "--from", *arguments], cwd=tmp_path)

    seen = between(str(folder), "slow")
    assert (
        seen.returncode == 0
        and "0.010" in seen.stdout
        and "slower" in seen.stdout
        and "then another" in seen.stdout
    )
    assert "within noise" in between(str(folder), str(folder)).stdout
    seen = between(str(folder), "slow", "fail_below=0.9")
    slower = ", ".join(f"{each.strategy} 0.010" for each in found.ran)
    assert seen.returncode == 1
    assert seen.stderr == f"dtrain: throughput falls below fail_below=0.9: {slower}\n"
    assert between("slow", str(folder), "fail_below=0.9").returncode == 0
    seen = between(str(folder), "slow", "fail_if=ddp.tokens_per_second < 0.9 * baseline")
    assert seen.returncode == 2
    assert seen.stderr.endswith("fail_if: here it is --from DIR1 DIR2 fail_below=0.9\n")
    seen = between(str(folder))
    assert seen.returncode == 2 and "give two folders" in seen.stderr
    seen = between(str(folder), "nowhere")
    assert seen.returncode == 2 and "nowhere has no results.json" in seen.stderr
    with pytest.raises(ValueError, match="give two folders"):
        show_difference([str(folder), str(folder), "steps=3"])


def test_figures_of_other_data_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, digest in (("one", "a1"), ("two", "b2")):
        found = results(row("ddp"))
        found.facts |= {"data digest": digest}
        found.environment |= {"packages": {}}
        (tmp_path / name).mkdir()
        found.write(tmp_path / name)
    show_difference([str(tmp_path / "one"), str(tmp_path / "two")])
    assert "not alike: data digest a1, then b2" in capsys.readouterr().out
    assert "data digest a1" in markdown.block(read(tmp_path / "one"))
    found.facts.pop("data digest")
    del found.environment["cores"]
    found.write(tmp_path / "two")  # an older one, or of data that have none
    show_difference([str(tmp_path / "one"), str(tmp_path / "two")])
    said = capsys.readouterr().out
    assert "not alike: data digest a1, then None" in said and "cores: 2, then unknown" in said


def test_what_can_be_known_before_is_refused_before(ran, call) -> None:
    folder = ran[0]
    for arguments, said in (
        (("strategies=[single,ddpp]",), "unknown strategy 'ddpp': did you mean 'ddp'?"),
        (
            (f"hydra.run.dir={folder}",),
            "has results.json of another comparison: set overwrite=true",
        ),
        (("fail_if=ddp.loss < 1",), "fail_if: here it is --from DIR1 DIR2 fail_below=0.9"),
        (("fail_below=0.9",), "fail_below: here it is --from DIR1 DIR2 fail_below=0.9"),
        (("steps=4", "measure.skip_steps=4"), "steps=4: the first 4 are not timed"),
        (("measure.skip_steps=9",), "the first 9 are not timed"),
        (("world_sizes=[0]",), "world_sizes=[0] must be at least 1 each"),
        (("scaling=sideways",), "scaling=sideways is unknown: use strong, weak"),
        (("repeats=0",), "repeats=0 must be at least 1"),
    ):
        status, _, err = call(
            "model=tiny", "steps=6", "strategies=[single,ddp]", *arguments, config="compare"
        )
        assert (
            status == 2 and err.startswith("dtrain: ") and said in err and err.count("\n") == 1
        ), err
    assert len(read(folder).ran) == 6


def begun(folder: Path, cache: Path, *arguments: str) -> warm.Process:
    """A comparison whose second strategy trains for long."""
    command = [
        *SCRIPT,
        "model=tiny",
        "steps=100000",
        'strategies=["single steps=6",ddp,fsdp]',
        'baseline="single steps=6"',
        "hydra.run.dir=out",
        *arguments,
    ]
    return warm.popen(command, cwd=folder, env=os.environ | {"DTRAIN_CACHE": str(cache)})


def ranks_of(folder: Path, case: str, count: int) -> list[int]:
    """Process numbers of a running case's ranks, once they train."""
    place = folder / "out" / "runs" / case / "0"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        logs = [place / "logs" / f"rank{rank}.log" for rank in range(count)]
        if (
            all(log.exists() for log in logs)
            and (place / "metrics.jsonl").exists()
            and (place / "metrics.jsonl").stat().st_size
        ):
            return [int(re.search(r"process (\d+)", log.read_text())[1]) for log in logs]  # type: ignore[index]
        time.sleep(0.05)
    raise AssertionError(f"{case} has not begun")


def left_of(session: int) -> list[int]:
    """Processes that still belong to a session."""
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = each.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[3]) == session and words[0] != "Z":
            found.append(int(each.parent.name))
    return found


def assert_nothing_left(session: int) -> None:
    deadline = time.monotonic() + 20
    while left := left_of(session):
        assert time.monotonic() < deadline, [warm.command_of(pid) for pid in left]
        time.sleep(0.1)


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, cache: Path) -> None:
    process = begun(tmp_path, cache)
    ranks_of(tmp_path, "ddp", 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130 and err.splitlines()[-1] == "dtrain: interrupted"
    found = read(tmp_path / "out")
    assert [each.strategy for each in found.ran] == ["single steps=6"]
    assert_tells_the_results((tmp_path / "out" / "report.html").read_text(), found)
    assert_nothing_left(process.pid)


def test_a_killed_rank_fails_its_strategy_alone(tmp_path: Path, cache: Path) -> None:
    process = begun(tmp_path, cache)
    for case in ("ddp", "fsdp"):
        os.kill(ranks_of(tmp_path, case, 2)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1 and err.splitlines()[-1] == "dtrain: failed: ddp, fsdp"
    reasons = {each.strategy: each.reason for each in read(tmp_path / "out").rows if each.failed}
    assert reasons == {"ddp": "rank 1 ended with signal 9", "fsdp": "rank 1 ended with signal 9"}
    assert_nothing_left(process.pid)


@pytest.mark.deep
def test_killing_the_comparison_leaves_no_orphans(tmp_path: Path, cache: Path) -> None:
    process = begun(tmp_path, cache)
    ranks_of(tmp_path, "ddp", 2)
    process.kill()
    process.communicate(timeout=240)
    assert_nothing_left(process.pid)
    assert [each.strategy for each in read(tmp_path / "out").ran] == ["single steps=6"]


@pytest.mark.deep
def test_a_sweep_starts_each_job_under_torchrun(tmp_path: Path, cache: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts/train.py"),
        "--multirun",
        "hydra/launcher=torchrun",
        "hydra.launcher.nproc_per_node=2",
        "strategy=[replicate,fsdp],ddp,fsdp",
        "model=tiny",
        "steps=2",
        "eval.every=0",
        "hydra.sweep.dir=sweep",
    ]
    ended = warm.run(
        command, cwd=tmp_path, env=os.environ | {"DTRAIN_CACHE": str(cache)}, timeout=200
    )
    told = [
        json.loads((tmp_path / "sweep" / job / "summary.json").read_text()) for job in ("1", "2")
    ]
    assert [(each["strategy"], each["world_size"]) for each in told] == [("ddp", 2), ("fsdp", 2)]
    assert not (tmp_path / "sweep" / "0" / "summary.json").exists()  # 4 ranks or more
    assert ended.returncode != 0 and "needs at least 2 ranks on each" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(
        "dtrain: strategy=[replicate,fsdp] model=tiny steps=2"
    )


# What the figures draw


def points(trace: Any, along: str = "x", of: Any = None) -> dict[str, Any]:
    """What a trace shows of each strategy, or a part of it."""
    return dict(zip(trace.customdata, getattr(of or trace, along), strict=True))


def traces(chart: Chart) -> dict[str, Any]:
    return {trace.name: trace for trace in chart.figure.data}


def test_efficiency_is_throughput_a_rank_over_that_of_the_fewest() -> None:
    """Twice as fast on twice as many is 1; as fast as before on four is a quarter.

    The chart has it in per cent.
    """
    rows = [
        row("ddp @1", (100.0,), ranks=1),
        row("ddp @2", (200.0,)),
        row("ddp @4", (100.0,), ranks=4),
        row("fsdp @2", (50.0,)),
        row("fsdp @8", (100.0,), ranks=8),
        row("tensor @2"),
    ]
    assert [efficiency(each, rows[0]) for each in rows[:3]] == [1.0, 1.0, 0.25]
    found = traces(charts.scaling(results(*rows)))
    assert set(found) == {"ddp", "fsdp", "ideal"}  # tensor has one world size alone
    assert points(found["ddp"], "y") == {"ddp @1": 100.0, "ddp @2": 100.0, "ddp @4": 25.0}
    assert points(found["fsdp"], "y") == {"fsdp @2": 100.0, "fsdp @8": 50.0}
    assert points(found["fsdp"], "x") == {"fsdp @2": 2, "fsdp @8": 8} and set(found["ideal"].y) == {
        100
    }


def test_bars_are_medians_and_whiskers_reach_the_slowest_and_the_fastest_repeat() -> None:
    """Of throughput; every undisturbed step of every repeat is in the box of step times, in
    milliseconds.
    """
    ddp, fsdp = row("ddp", (80.0, 100.0, 130.0)), row("fsdp", (40.0,))
    for repeat, seconds in zip(ddp.repeats, ([0.5, 0.25], [1.0], [2.0]), strict=True):
        repeat["step_seconds"] = seconds
    (bars,) = charts.throughput(results(ddp, fsdp)).figure.data
    assert points(bars) == {"ddp": 100.0, "fsdp": 40.0}
    reach = zip(bars.customdata, bars.error_x.array, bars.error_x.arrayminus, strict=True)
    assert sorted(reach) == [("ddp", 30.0, 20.0), ("fsdp", 0.0, 0.0)]
    boxes = traces(charts.steps(results(ddp, fsdp)))
    assert {name: box.x for name, box in boxes.items()} == {
        "ddp": (500, 250, 1000, 2000),
        "fsdp": (100,),
    }


def test_the_tradeoff_shows_each_row_by_mebibytes_and_tokens_a_second_and_joins_the_front() -> None:
    rows = [
        row("ddp", (100.0,), 4 * MIB),
        row("fsdp", (50.0,), 1 * MIB),
        row("zero1", (40.0,), 3 * MIB),
    ]
    for each, axis in zip(rows, ("dp", "fsdp", "dp"), strict=True):
        each.mesh = {axis: 2}
    front_, *groups = charts.tradeoff(results(*rows)).figure.data
    assert (front_.x, front_.y) == ((1.0, 4.0), (50.0, 100.0))
    assert {group.name: (points(group), points(group, "y")) for group in groups} == {
        "data parallel": ({"ddp": 4.0, "zero1": 3.0}, {"ddp": 100.0, "zero1": 40.0}),
        "sharded data": ({"fsdp": 1.0}, {"fsdp": 50.0}),
    }
    symbols = {
        name: each
        for group in groups
        for name, each in points(group, "symbol", group.marker).items()
    }
    assert symbols == {"ddp": "circle", "fsdp": "circle", "zero1": "circle-open"}


def test_curves_are_over_steps_and_over_seconds_and_the_worst_difference_is_told() -> None:
    rows = [row("single", ranks=1), row("ddp"), row("fsdp"), row("local_sgd")]
    rows[1].loss_difference, rows[2].loss_difference, rows[3].loss_difference = 2e-7, 3e-5, 0.5
    rows[3].synchronous, rows[3].seconds, rows[3].losses = False, [0.5, 2.5], [5.0, 1.0]
    losses, pace = charts.losses(results(*rows)), charts.pace(results(*rows))
    told = {name: (trace.x, trace.y) for name, trace in traces(losses).items()}
    assert told["ddp"] == ((1, 2), (3.0, 2.0)) and told["local_sgd"] == ((1, 2), (5.0, 1.0))
    assert losses.caption.endswith("its reference is 3.0e-05 (fsdp).")
    told = {name: (trace.x, trace.y) for name, trace in traces(pace).items()}
    assert told["ddp"] == ((1.0, 2.0), (3.0, 2.0)) and told["local_sgd"] == ((0.5, 2.5), (5.0, 1.0))
    assert pace.figure.layout.shapes[0].x0 == 2.0
    assert pace.caption.endswith(
        "after 2.0 s (dotted) the loss is single 2.0000; local_sgd 5.0000."
    )


def costly() -> Results:
    """Of two ranks the second holds and sends more; of three kinds of message one is not
    foreseen.
    """
    kinds = ("parameters", "gradients", "optimizer", "activations", "communication", "other")

    def rank(times: int, *predicted: int | None) -> dict[str, Any]:
        sizes = zip(kinds, range(1, 7), (*predicted, None, None), strict=True)
        return {
            kind: {"most": times * size * MIB, "predicted": told, "at_peak": 0}
            for kind, size, told in sizes
        }

    def sent(axis: str, operation: str, mebibytes: float) -> dict[str, Any]:
        return {
            "axis": axis,
            "operation": operation,
            "calls": 1,
            "bytes": 1,
            "wire_bytes": mebibytes * MIB,
        }

    known, unknown = row("3d"), row("ep")
    known.mesh, known.memory = {"tp": 2, "dp": 2}, [rank(1, 1, 1, 1, 1), rank(3, *(2 * MIB,) * 4)]
    known.traffic = [
        [sent("dp", "all_reduce", 9)],
        [sent("dp", "all_reduce", 4), sent("tp", "send", 6)],
    ]
    known.traffic_predicted = [
        [sent("dp", "all_reduce", 1)],
        [sent("dp", "all_reduce", 4), sent("tp", "send", 3)],
    ]
    unknown.memory, unknown.traffic = (
        [rank(2, 1, 1, 1, None)] * 2,
        [[sent("ep", "all_to_all", 2)], []],
    )
    unknown.traffic_predicted = [None, []]
    alone = row("single", ranks=1)
    alone.traffic, alone.traffic_predicted = [[]], [[]]
    return results(alone, known, unknown)


def test_memory_is_the_fullest_ranks_and_ticks_are_where_its_kinds_should_end() -> None:
    """In mebibytes, stacked; without a tick where a kind is not foreseen."""
    found = traces(costs.memory(costly()))
    for number, kind in enumerate(KINDS, 1):
        assert points(found[kind]) == {"3d": 3.0 * number, "ep": 2.0 * number}
    assert found["predicted"].y == ("3d",) * 4 and found["predicted"].x == (2.0, 4.0, 6.0, 8.0)


def test_messages_are_the_busiest_ranks_and_the_tick_is_what_the_formulas_add_up_to() -> None:
    found = traces(costs.messages(costly()))
    told = {name: points(trace) for name, trace in found.items() if name != "predicted"}
    assert told == {
        "dp all_reduce": {"3d": 4.0, "ep": 0.0},
        "tp send": {"3d": 6.0, "ep": 0.0},
        "ep all_to_all": {"3d": 0.0, "ep": 2.0},
    }
    assert points(found["predicted"]) == {"3d": 7.0}


def test_messages_of_a_group_along_no_axis_are_drawn_too() -> None:
    """DeepSpeed's pipeline has groups of its own: `other`."""
    each = row("deepspeed_pipeline")
    message = {
        "axis": "other",
        "operation": "all_reduce",
        "calls": 1,
        "bytes": 1,
        "wire_bytes": 5 * MIB,
    }
    each.traffic, each.traffic_predicted = [[message], [message]], [None, None]
    found = traces(costs.messages(results(row("single", ranks=1), each)))
    assert points(found["other all_reduce"]) == {"deepspeed_pipeline": 5.0}


@pytest.mark.parametrize(("mesh", "kind"), [
    ({}, "one process"), ({"dp": 2}, "data parallel"), ({"fsdp": 4, "dp": 1}, "sharded data"),
    ({"tp": 2}, "tensor"),
    ({"pp": 2, "dp": 1}, "pipeline"), ({"cp": 2}, "context"), ({"ep": 2}, "experts"),
    ({"dp": 2, "tp": 2}, "composed"),
    ({"dp": 1}, "one process"),
])  # fmt: skip
def test_a_kind_is_that_of_the_axes_with_several_ranks(mesh: dict[str, int], kind: str) -> None:
    """And each has a colour of its own."""
    each = row("x")
    each.mesh = mesh
    assert family(each)[0] == kind and len({colour for _, colour in FAMILIES.values()}) == len(
        FAMILIES
    )


def test_what_is_exposed_is_what_nothing_computes_beside() -> None:
    """In red, in milliseconds from the first bar; a send exposes nobody, nor does a thousandth
    of a step.
    """

    def event(rank: int, kind: str, name: str, begin: int, end: int) -> dict[str, Any]:
        return {
            "ph": "X",
            "pid": rank,
            "cat": kind,
            "name": name,
            "ts": 1000 * begin,
            "dur": 1000 * (end - begin),
        }

    events = [
        event(0, "phase", "optimizer", 50, 2050),
        event(0, "compute", "compute", 50, 100),
        event(0, "communication", "all_reduce (dp)", 60, 150),
        event(0, "communication", "all_gather (dp)", 140, 250),
        event(0, "communication", "send (pp)", 400, 900),
        event(0, "communication", "all_reduce (dp)", 950, 951),
        event(1, "compute", "compute", 50, 2050),
        event(1, "communication", "all_reduce (dp)", 70, 170),
        {"ph": "M", "pid": 0, "name": "process_name"},
    ]
    each = row("ddp")
    each.exposed_share, each.bubble = 0.0755, {"measured": 0.25, "theory": 0.2}
    chart = step.gantt(events, each)
    red = traces(chart)["exposed communication"]
    assert (red.base, red.x) == ((50.0,), (150.0,)) and len(red.y) == 1
    reduced = traces(chart)["all_reduce"]
    assert sorted(zip(reduced.base, reduced.x, strict=True)) == [
        (10.0, 90.0),
        (20.0, 100.0),
        (900.0, 1.0),
    ]
    assert (
        "is 8% of the step" in chart.caption and "bubble is 25.0%, 20.0% in theory" in chart.caption
    )
