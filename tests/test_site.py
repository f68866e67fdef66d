"""The documents as a site: it builds, its links lead somewhere, and it asks nobody for anything."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import docs_reference
import docs_site
import pytest
from docs_site import ROOT, build, faults, prepare

# What a browser would not find, or would ask another host for.
WRONG = {
    '<a href="axes/nowhere.html">x</a>': "index.html links to axes/nowhere.html",
    '<a href="glossary.html#no-such-term">x</a>': "index.html links to glossary.html#no-such-term",
    '<img src="missing.svg">': "index.html links to missing.svg",
    '<script src="https://cdn.example/x.js"></script>': "index.html fetches https://cdn.example/x.js",
    '<link rel="stylesheet" href="//fonts.example/x.css">': "index.html fetches //fonts.example/x.css",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("docs"))


def test_the_site_has_every_document_and_the_reference(site: Path) -> None:
    """`build` itself refuses broken links and what would be fetched."""
    built = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    docs = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    made = {f"reference/{name}" for name in docs_reference.pages()}
    assert {str(Path(name).with_suffix(".html")) for name in docs | made} <= built


def test_every_page_stands_in_the_navigation() -> None:
    nav = re.findall(r'= "([\w./-]+\.md)"', (ROOT / "zensical.toml").read_text())
    docs = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert docs <= {*nav}
    assert len(nav) == len({*nav})


def test_a_page_shows_the_source_as_it_is(site: Path) -> None:
    shown = re.sub(r"<[^>]+>", "", (site / "axes" / "data.html").read_text())
    assert "class DDP(Strategy):" in shown


def test_the_search_finds_pages(site: Path) -> None:
    assert "staleness" in (site / "search.json").read_text()


def test_what_is_wrong_with_a_page_is_said(site: Path) -> None:
    page, sheet = site / "index.html", site / "assets" / "extra.css"
    text = page.read_text()
    try:
        page.write_text(text.replace("</body>", f"{''.join(WRONG)}</body>"))
        sheet.write_text("@font-face { src: url(https://fonts.example/a.woff2); }")
        assert {*faults(site)} == {
            *WRONG.values(),
            "assets/extra.css fetches https://fonts.example/a.woff2",
        }
    finally:
        page.write_text(text)
        sheet.unlink()


def test_a_document_with_a_broken_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*docs_site.TOP, "zensical.toml"):
        (tmp_path / name).write_text(
            (ROOT / name).read_text() if name.endswith("toml") else "# x\n"
        )
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "data.md").write_text("# Data\n\n[there](tasks.md)\n")
    monkeypatch.setattr(docs_site, "ROOT", tmp_path)
    monkeypatch.setattr(docs_site, "pages", dict)
    with pytest.raises(SystemExit, match="docs/data.md links to tasks.md, which is no file"):
        prepare(tmp_path / "first")
    (tmp_path / "docs" / "data.md").write_text("# Data\n\n[there](#tasks)\n")
    with pytest.raises(SystemExit, match="anchor does not exist"):
        build(tmp_path / "second")


def test_the_extra_that_builds_the_site_is_among_those_of_the_tests() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert [word.split(">=")[0] for word in extras["docs"]] == ["zensical"]
    assert any("docs" in re.split(r"[\[\],]", word) for word in extras["test"])
