"""The comparison's page and its verdicts: what they name best, group, open and cut off."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_compare import CHROMIUM, FACTS, MACHINE, Cells, points, results, row, traces

from dtrain.compare import markdown
from dtrain.compare.figures import show
from dtrain.compare.page import charts, costs, page
from dtrain.compare.page.outliers import ROOM, TIMES, End, beyond, cut
from dtrain.compare.page.style import DASHES, family, lines
from dtrain.compare.results import Results, Row
from dtrain.compare.verdict import Verdict, interval, verdicts
from dtrain.report.amounts import MIB


def once(name: str, *steps: float, **others: Any) -> Row:
    """A row of one run, with these seconds of its steps; a step is ten tokens."""
    usual = sorted(steps)[len(steps) // 2]
    found = row(name, (10 / usual,), **others)
    found.step_seconds, found.repeats[0]["step_seconds"] = usual, list(steps)
    return found


def whole(*rows: Row) -> Results:
    """Results with all that a page needs."""
    found = results(*rows)
    found.environment |= MACHINE
    found.facts |= FACTS | {"data": "d"}
    for each in rows:
        each.traffic, each.traffic_predicted = [[] for _ in range(each.ranks)], [None] * each.ranks
    return found


def told(*rows: Row) -> dict[str, Verdict]:
    return {each.title.split()[0]: each for each in verdicts(results(*rows))}


# What is best


def test_repeats_decide_whether_there_is_a_fastest() -> None:
    """Whoever reaches the slowest repeat of the best may be as fast; a gap makes a winner."""
    ddp, near, far = row("ddp", (95, 105, 110)), row("fsdp", (90, 92, 95)), row("zero1", (80, 94))
    found = told(ddp, near, far)["fastest"]
    assert found.strategy == "ddp, fsdp, about equal" and found.figure == "92 to 105 tokens/s"
    assert found.note == "the spread of the repeats is wider than the distance: a tie"
    found = told(ddp, far)["fastest"]
    assert (
        found.strategy == "ddp" and found.note == "12% before zero1; more than the repeats differ"
    )


def test_of_one_run_each_the_steps_decide_and_it_says_so() -> None:
    """A slow step among many is no spread; quick and slow ones in turns are."""
    steady = [0.1] * 7 + [0.9]
    found = told(once("ddp", *steady), once("fsdp", *[0.2] * 8))["fastest"]
    assert found.strategy == "ddp"
    assert found.note == (
        "100% before fsdp; one run each: more than its steps spread (repeats=3 tells more)"
    )
    found = told(once("ddp", *[0.1, 0.1, 0.1, 0.3] * 2), once("fsdp", *[0.2] * 8))["fastest"]
    assert found.strategy == "ddp, fsdp, about equal"
    assert found.note.startswith("one run each, and the spread of its steps is wider")
    assert told(row("ddp", (200,)), row("fsdp"))["fastest"].note.endswith(
        "one step of one run each, so noise is not known (repeats=3)"
    )


@pytest.mark.parametrize(("steps", "rates"), [
    ((0.1, 0.2), (50, 100)), ((0.1, 0.2, 0.4), (25, 100)),
    ((0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.4), (50, 50)),
])  # fmt: skip
def test_of_few_steps_the_extremes_count_and_of_more_the_quartiles(
    steps: Sequence[float], rates: tuple[float, float]
) -> None:
    assert interval(once("ddp", *steps)) == pytest.approx(rates)


def test_bytes_that_differ_by_less_than_a_hundredth_are_about_equal() -> None:
    """The first of them is the leanest; a long list goes on in the note."""
    names = ("ddp", "zero1", "fsdp", "tensor", "context")
    rows = [row(name, memory=1000 + i, sent=5.0 + i) for i, name in enumerate(names)]
    found = told(*rows, row("3d", memory=1011))
    assert found["leanest"].strategy == "ddp, zero1, fsdp and 2 more, about equal"
    assert found["leanest"].note == "also tensor, context; most: 3d, 1011 B"
    assert found["fewest"].strategy == "ddp, 3d, about equal"
    rows[1].wire_bytes = None  # nobody counted
    assert list(told(*rows)) == ["fastest", "leanest"]


def test_whoever_shows_a_verdict_shows_the_tie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = whole(row("ddp", (95, 105)), row("fsdp", (96, 104)), row("zero1", (10, 11), 99, 9))
    show(found, tmp_path)
    for text in (capsys.readouterr().out, markdown.document(found), page.document(found, {}, str)):
        assert "ddp, fsdp, about equal" in text.replace("\\", "")


# What is told apart


def test_curves_are_grouped_by_family_and_told_apart_within_it() -> None:
    """A colour a family, and in it no two lines alike, however many; what is not synchronous is
    apart from what must draw one line.
    """
    rows = [row(f"{axis}{i}") for axis in ("dp", "fsdp", "tp") for i in range(9)]
    for each in rows:
        each.mesh = {each.strategy[:-1]: 2}
    rows[1].synchronous = False
    for chart in (charts.losses(results(*rows)), charts.pace(results(*rows))):
        drawn = [t for t in chart.figure.data if t.legendgroup]
        assert [t.customdata[0] for t in drawn] == [each.strategy for each in rows]
        assert [(t.legendgroup, t.line.color) for t in drawn] == [family(each) for each in rows]
        assert len({(t.line.color, t.line.dash, t.line.width) for t in drawn}) == len(rows)
    assert family(rows[1])[0] == "not synchronous" != family(rows[0])[0]
    assert {style["line"]["dash"] for style in lines(rows)} == set(DASHES)


def cards(text: str) -> dict[str, bool]:
    """Which strategies' cards stand open, in the order of the page."""
    found = re.findall(r'<details class="card" id="[\w-]+" data-strategy="(.*?)"( open)?>', text)
    return {strategy: bool(is_open) for strategy, is_open in found}


def test_the_cards_of_the_best_stand_open_before_all_others() -> None:
    """Of the fastest, the leanest and the quietest, once each; of a tie that of the first; not of
    one process, nor of what is not comparable.
    """
    rows = [
        row("single", (900,), 1, 0, ranks=1),
        row("zero1", (50,), 40, 5),
        row("ddp", (95, 105), 30, 9),
        row("fsdp", (96, 104), 10, 8),
        row("tensor", (60,), 90, 6),
        row("local_sgd", (999,), 1, 1),
    ]
    rows[-1].synchronous = False
    text = page.document(whole(*rows), {}, str)
    assert [*cards(text).items()] == [
        ("ddp", True), ("fsdp", True), ("zero1", True),
        ("single", False), ("tensor", False), ("local_sgd", False),
    ]  # fmt: skip
    assert (
        text.index('id="best-title"') < text.index('id="figures"') < text.index('id="cards-title"')
    )
    for number, each in enumerate(rows, 1):  # the table's links find them wherever they are
        assert f'href="#card-{number}">{each.strategy}<' in text
        assert f'id="card-{number}" data-strategy="{each.strategy}"' in text
    text = page.document(whole(row("single", ranks=1)), {}, str)
    assert cards(text) == {"single": False} and "best-title" not in text
    assert Cells(text).cards == ["single"]


# What is cut off


def ends(**values: float) -> list[End]:
    return [End(name, value, f"{value:.0f} s", name) for name, value in values.items()]


def test_what_is_beyond_some_times_the_median_is_cut_off_and_its_value_written() -> None:
    usual = ends(a=1, b=2, c=3)
    assert beyond([*usual, *ends(d=TIMES * 2.5)]) == [] and beyond(ends(a=0, b=0, c=9)) == []
    assert beyond(ends(a=1, b=1, c=1, d=4, e=5, f=10)) == []  # each within twice the one before
    far = ends(d=900)
    assert beyond([*usual, *far]) == far
    figure = charts.go.Figure()
    assert cut(figure, "x", usual) == "" and not figure.layout.annotations
    assert "far beyond 4 times the median is cut off" in cut(figure, "x", [*usual, *far])
    assert figure.layout.meta["cut"]["x"] == {"range": [0, 3 * ROOM], "of": [*"abcd"]}
    (mark,) = figure.layout.annotations
    assert (mark.name, mark.text, mark.x, mark.y, mark.xref) == ("d", "900 s ▸", 1, "d", "paper")


def test_a_slow_outlier_squeezes_no_axis() -> None:
    """Of times, of step times, of memory; what is drawn of it stays true."""
    rows = [once(name, 0.1, 0.1, memory=MIB) for name in ("single", "ddp", "zero1", "tensor")]
    rows += [once("fsdp", 9.0, 10.0, memory=80 * MIB)]
    rows[-1].seconds = [50.0, 100.0]
    for each in rows:
        size = (each.memory_bytes or 0) * (each.strategy != "single")
        kind = {"most": size, "predicted": None, "at_peak": 0}
        zero = kind | {"most": 0}
        each.memory = [dict.fromkeys(costs.KINDS, zero) | {"parameters": kind}]
    for make, range_, words in (
        (charts.pace, 2 * ROOM, "fsdp 100.0 s ▸"),
        (charts.steps, 100 * ROOM, "9,000 to 10,000 ms ▸"),
        (costs.memory, ROOM, "80.0 MiB ▸"),
        (charts.tradeoff, ROOM, "fsdp 80.0 MiB ▸"),
    ):
        figure = make(results(*rows)).figure
        assert figure.layout.meta["cut"]["x"]["range"] == [0, range_], make
        assert [mark.text for mark in figure.layout.annotations] == [words], make
    assert traces(charts.pace(results(*rows)))["fsdp"].x == (50.0, 100.0)
    assert points(traces(costs.memory(results(*rows)))["parameters"])["fsdp"] == 80.0


def test_a_loss_far_above_the_others_is_cut_off_too() -> None:
    rows = [row(name) for name in ("single", "ddp", "fsdp")]
    rows[2].losses = [3.0, 900.0]
    figure = charts.losses(results(*rows)).figure
    assert figure.layout.meta["cut"]["y"]["range"] == [2.0, 2 + ROOM]
    assert [mark.text for mark in figure.layout.annotations] == ["▴ fsdp 900"]


def test_words_of_outliers_do_not_stand_on_each_other() -> None:
    figure = charts.go.Figure()
    near = [End(name, 1.0, "", 100.0) for name in "abcde"]
    far = [
        End(name, 99.0, "99", across) for name, across in (("f", 10.0), ("g", 10.1), ("h", 10.2))
    ]
    cut(figure, "x", [*near, *far])
    heights = [2 * mark.y + mark.yshift for mark in figure.layout.annotations]  # 200 pixels are 100
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 15


PROBE = """<script>addEventListener("load", () => { plots.forEach(draw);
const pace = plots.find(plot => plot.box.parentElement.querySelector("#pace-title")), said = {};
const seen = () => ({ range: pace.box.layout.xaxis.range, marks: pace.box.layout.annotations.map(mark => mark.name),
  bright: pace.box.data.filter(trace => trace.legendgroup && trace.opacity === 1).map(trace => trace.name) });
const press = words => [...pace.legend.querySelectorAll("button")].find(each => each.textContent === words).click();
const keep = names => { boxes.forEach(box => box.checked = names.includes(box.value)); choose(); };
said.whole = seen(); press("ddp"); said.one = seen(); press("ddp"); said.again = seen();
press("sharded data"); said.group = seen(); press("sharded data");
keep(["ddp", "slow"]); said.two = seen();
said.entries = [...pace.legend.querySelectorAll("button.name")].filter(each => !each.hidden).map(each => each.textContent);
said.problems = problems; said.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.body.dataset.said = JSON.stringify(said); });</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here to open the page in")
def test_a_click_shows_one_curve_or_one_family_alone(tmp_path: Path) -> None:
    """A second click shows all again; an axis is whole where few are left of those within it."""
    rows = [row("single", ranks=1), row("ddp"), row("fsdp"), row("zero2"), row("slow")]
    for each, axis in zip(rows[1:], ("dp", "fsdp", "fsdp", "tp"), strict=True):
        each.mesh = {axis: 2}
    rows[-1].seconds = [50.0, 100.0]
    file = tmp_path / "page.html"
    file.write_text(page.document(whole(*rows), {}, str).replace("</body>", PROBE))
    browser = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000", "--window-size=500,900", "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    found = re.search(r'data-said="(.*?)"', browser.stdout)
    assert found, browser.stderr[-2000:]
    said = json.loads(found[1].replace("&quot;", '"'))
    assert said["problems"] == [] and said["wide"] == 0
    assert said["whole"]["range"] == [0, 2 * ROOM] and said["whole"]["marks"] == ["slow"]
    everything = ["single", "ddp", "fsdp", "zero2", "slow"]
    assert said["whole"]["bright"] == said["again"]["bright"] == everything
    assert said["one"]["bright"] == ["ddp"] and said["group"]["bright"] == ["fsdp", "zero2"]
    assert said["two"]["range"][1] >= 100 and said["two"]["marks"] == []
    assert said["two"]["bright"] == said["entries"] == ["ddp", "slow"]
