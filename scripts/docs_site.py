"""The documents as a site in site/: make docs

It copies docs/ and the documents at the top into a folder, adds the reference, shows linked
sources as pages, lets zensical build, and looks at what came out: every link and anchor leads
somewhere, and no page asks another host for anything.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from os.path import relpath
from pathlib import Path
from urllib.parse import unquote, urldefrag

from docs_reference import pages

ROOT = Path(__file__).resolve().parent.parent
TOP = ("README.md", "README.zh.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "sh", ".toml": "toml", "": "text"}
# a line that GitHub does not show: <!-- source: dtrain/strategy/ddp.py -->
SOURCE = re.compile(r"^<!-- source: (\S+) -->$", re.M)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.M | re.S)
# what a browser fetches by itself, by element; of <link> but these
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
NOT_FETCHED = {"canonical", "prev", "next", "alternate"}
EXTERNAL = re.compile(r"(?:https?:)?//")


def prepare(folder: Path) -> None:
    """Write zensical's configuration and the pages that it reads into a folder."""
    docs = folder / "docs"
    shutil.copytree(ROOT / "docs", docs)
    (docs / "reference").mkdir()
    texts = {path: path.read_text() for path in (ROOT / "docs").rglob("*.md")}
    texts |= {ROOT / name: (ROOT / name).read_text() for name in TOP}
    texts |= {ROOT / "docs" / "reference" / name: text for name, text in pages().items()}
    sources: set[Path] = set()  # that some page links to
    for path, text in texts.items():
        targets = {target: file for target, file in _files_linked(path, text)}
        if lost := [t for t, file in targets.items() if not file.is_file() and file not in texts]:
            raise SystemExit(f"{path.relative_to(ROOT)} links to {lost[0]}, which is no file")
        sources |= {file for file in targets.values() if _place(file).parts[0] == "source"}
        (docs / _place(path)).write_text(_rewritten(path, text, targets))
    for source in sources:
        page = docs / _place(source)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"# {source.relative_to(ROOT)}\n\n{_fenced(source)}")
    (folder / "zensical.toml").write_text("".join(_configuration(docs)))


def _configuration(docs: Path) -> Iterator[str]:
    """Yield the lines of zensical.toml, but for pages that do not exist."""
    for line in (ROOT / "zensical.toml").read_text().splitlines(keepends=True):
        page = re.search(r'= "([\w./-]+\.md)"', line)
        if page is None or (docs / page[1]).exists():
            yield line


def _place(path: Path) -> Path:
    """Return where a file of the repository stands among the pages."""
    name = path.relative_to(ROOT)
    if name.parts[0] == "docs":
        return Path(*name.parts[1:])
    if path.suffix == ".md":
        return Path("index.md") if path == ROOT / "README.md" else name
    return Path("source", f"{name}.md")


def _files_linked(path: Path, text: str) -> Iterator[tuple[str, Path]]:
    """Yield the targets of a document's links into the repository, with the files meant."""
    for part in CODE.split(text)[::2]:
        for _, link, _ in LINK.findall(part):
            target, _ = urldefrag(link)
            if target and not re.match(r"\w+:", target):
                yield target, (path.parent / target).resolve()


def _rewritten(path: Path, text: str, targets: dict[str, Path]) -> str:
    """Return a document whose links lead to pages, and which shows the sources that it names."""

    def relinked(match: re.Match[str]) -> str:
        target, anchor = urldefrag(match[2])
        if target not in targets:
            return match[0]
        link = relpath(_place(targets[target]), _place(path).parent)
        return f"{match[1]}{link}{f'#{anchor}' if anchor else ''}{match[3]}"

    parts = CODE.split(text)
    parts[::2] = [LINK.sub(relinked, part) for part in parts[::2]]
    return SOURCE.sub(lambda match: _folded(ROOT / match[1]), "".join(parts))


def _fenced(source: Path) -> str:
    language = LANGUAGES.get(source.suffix, "text")
    return f"````{language}\n{source.read_text()}````\n"


def _folded(source: Path) -> str:
    name = source.relative_to(ROOT)
    return f'<details markdown="1"><summary>{name}</summary>\n\n{_fenced(source)}\n</details>'


class Page(HTMLParser):
    """What a page has and wants: its anchors, its links, and what a browser fetches for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value for key, value in attrs if value}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        target = values.get(FETCHED.get(tag, "href" if tag == "a" else ""))
        if not target or values.get("rel") in NOT_FETCHED:
            return
        (self.links if tag == "a" else self.fetched).append(target)


def faults(site: Path) -> list[str]:
    """Return what is wrong with a site: broken links and anchors, and what it would fetch."""
    read = {page: Page(page.read_text()) for page in sorted(site.rglob("*.html"))}
    found = []
    for page, parsed in read.items():
        name = page.relative_to(site)
        for target in parsed.links + parsed.fetched:
            if EXTERNAL.match(target):
                if target in parsed.fetched:
                    found.append(f"{name} fetches {target}")
            elif not re.match(r"\w+:", target) and not _leads(page, target, site, read):
                found.append(f"{name} links to {target}")
    for sheet in site.rglob("*.css"):
        for target in re.findall(
            r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", sheet.read_text()
        ):
            found.append(f"{sheet.relative_to(site)} fetches {target}")
    return found


def _leads(page: Path, target: str, site: Path, read: dict[Path, Page]) -> bool:
    """Return whether a link within the site leads to a file, and to an anchor that it has."""
    path, anchor = urldefrag(unquote(target))
    path = path.partition("?")[0]
    start = site if path.startswith("/") else page.parent
    file = (start / path.lstrip("/")).resolve() if path else page
    file = file / "index.html" if file.is_dir() else file
    in_file = not anchor or file not in read or anchor in read[file].anchors
    return file.is_file() and in_file


def build(folder: Path) -> Path:
    """Build the site in an empty folder, and return where it is.

    Raises:
        SystemExit: a link is broken, or a page would fetch something.
    """
    prepare(folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    site = folder / "site"
    if found := faults(site.resolve()):
        raise SystemExit("\n".join(found))
    return site


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / "site")
    into = parser.parse_args(words).into
    with tempfile.TemporaryDirectory() as folder:
        site = build(Path(folder))
        shutil.rmtree(into, ignore_errors=True)
        shutil.move(site, into)
    pages_built = len([*into.rglob("*.html")])
    print(f"{pages_built} pages in {into}: python -m http.server --directory {into}")


if __name__ == "__main__":
    main()
