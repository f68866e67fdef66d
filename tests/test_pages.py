"""The pages that show commands with their output: the output is theirs, and every language says the
same.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pages
import pytest
import torch

from dtrain.data.sources import StandardLibrary
from dtrain.data.text import Text
from dtrain.data.tokenizer import Bytes

DOCS = [pages.ROOT / "README.md", *sorted(pages.ROOT.glob("docs/**/*.md"))]
PAIRS = [(page, other) for page in DOCS for other in pages.translations(page)]
SHOWN = [page for page in DOCS if pages.commands(page.read_text()) and ".zh" not in page.suffixes]
SECTIONS = [
    pytest.param(section, id=f"{page.stem}: {section.splitlines()[0]}")
    for page in SHOWN
    for section in pages.sections(page.read_text())
    if pages.commands(section)
]
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
# Losses and accuracies have four decimals; speeds, times and memory never have.
REPEATED = re.compile(r"(?<![\d.])\d+\.\d{4}(?!\d)|(?<![\d,])\d{1,3}(?:,\d{3}){2,}(?![\d,])")
# By relative and absolute difference: one in the last digit, more or less.
LAST_DIGIT = {"rel": 1e-4, "abs": 1.5e-4}


def prose(text: str) -> str:
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", text))


def parts(text: str) -> dict[str, list[str]]:
    """What all languages of a page have alike."""
    words = re.sub(r"`[^`]+`|\]\([^)]*\)", " ", prose(text))
    return {
        "blocks": FENCE.findall(text),
        "marks": re.findall(r"<!--.*?-->", text),
        "headings": re.findall(r"^#+(?= )", FENCE.sub("", text), re.M),
        "code": sorted(re.findall(r"`[^`]+`", prose(text))),
        "links": sorted(
            target.replace(".zh.md", ".md") for target in re.findall(r"\]\(([^)]+)\)", prose(text))
        ),
        "figures": sorted(re.findall(r"\d+(?:[.,]\d+)*", words)),
    }


def by_section(text: str) -> list[dict[str, list[str]]]:
    return [parts(section) for section in pages.sections(text)]


@pytest.mark.parametrize(("page", "other"), PAIRS, ids=lambda path: path.name)
def test_a_translation_has_the_blocks_figures_and_headings_of_its_page(
    page: Path, other: Path
) -> None:
    assert by_section(other.read_text()) == by_section(page.read_text())


PAGE = (
    "# A\n\nIt takes 1.5 s, `x=1`: [b](b.md).\n\n```console\n$ dtrain info\n3\n```\n\n## B\n\nNo.\n"
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1.5", "1.6"),
        ("x=1", "x=2"),
        ("(b.md)", "(c.md)"),
        ("$ dtrain info\n3", "$ dtrain info\n4"),
        ("## B", "B"),
        ("## B", "### B"),
    ],
)
def test_a_translation_that_drifts_is_found(old: str, new: str) -> None:
    assert by_section(PAGE.replace("No.", "Nein.")) == by_section(PAGE)
    assert by_section(PAGE.replace(old, new)) != by_section(PAGE)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_figure_in_the_text_stands_in_an_output(section: str) -> None:
    told = re.findall(r"\d+(?:[.,]\d+)+", re.sub(r"`[^`]+`|\]\([^)]*\)", " ", prose(section)))
    shown = "\n".join(each.command + "\n" + each.output for each in pages.commands(section))
    assert not [figure for figure in told if figure not in shown]


def test_the_gan_of_the_article_finds_the_ring() -> None:
    page = (pages.ROOT / "docs" / "article.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    left: dict[str, Any] = {}
    exec(program, left)
    made, real = (left[name].detach().norm(dim=1).mean().item() for name in ("made", "real"))
    assert made == pytest.approx(real, abs=0.25)  # 0.36 after the first step


def test_output_is_written_below_its_command_in_every_block() -> None:
    text = PAGE + "\n<!-- keep: a -->\n```console\n$ python x\n$ pytest y\nold\n```\n"
    assert pages.commands(text)[1:] == [
        pages.Shown("python x", "", "a"),
        pages.Shown("pytest y", "old\n", "a"),
    ]
    again = pages.rewritten(text, ["one\n", "two\n", "three\n"])
    assert [each.output for each in pages.commands(again)] == ["one\n", "two\n", "three\n"]
    assert pages.rewritten(again, ["3\n", "", "old\n"]) == text


def test_lines_are_kept_as_a_mark_asks_without_the_folder() -> None:
    printed = "a /tmp/x/outputs/1\nb\n│ /tmp/x/outputs/2 │\n"
    assert pages.shown(printed, "/tmp/x", None) == "a outputs/1\nb\n│ outputs/2        │\n"
    assert pages.shown(printed, "/tmp/x", "^a") == "a outputs/1\n…\n"


@pytest.fixture(scope="module")
def same_library(cache: Path) -> bool:
    """Whether this Python's standard library, which runs read, is that of the pages' figures."""
    data = Text("stdlib", StandardLibrary(), Bytes(), str(cache))
    data.prepare(lambda what, done: None)
    return any(data.describe()["digest"] in page.read_text() for page in SHOWN)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.deep
def test_the_commands_of_a_section_print_what_the_page_shows(
    section: str, same_library: bool
) -> None:
    """Figures that depend on the machine, or on another Python's library, are not compared."""
    for told, output in zip(pages.commands(section), pages.outputs(section), strict=True):
        assert len(output.splitlines()) == len(told.output.splitlines()), told.command
        if told.varies or not same_library:
            continue
        found, expected = (REPEATED.findall(repeated(text)) for text in (output, told.output))
        assert [float(figure.replace(",", "")) for figure in found] == pytest.approx(
            [float(figure.replace(",", "")) for figure in expected], **LAST_DIGIT
        ), told.command
        assert Counter(words(output)) == Counter(words(told.output)), told.command


def repeated(output: str) -> str:
    return "\n".join(line for line in output.splitlines() if "not sync." not in line)


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z_]{3,}", text)
