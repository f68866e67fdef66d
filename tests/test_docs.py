"""What the documents say to type can be typed."""

from __future__ import annotations

import re
import shlex
import tomllib
from math import prod
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from packaging.requirements import Requirement

from dtrain.cli import WORDS
from dtrain.config.schema import register, validated
from dtrain.config.untrusted_config import ALLOWED
from dtrain.parallel.plan import Plan
from dtrain.run.assemble import strategies_of

# Versions with a hole that a configuration or an image of somebody else's would reach, and the
# first without it.
MENDED = {
    "hydra-core": ("1.3.7", "1.3.8"),
    "jinja2": ("3.1.5", "3.1.6"),
    "pillow": ("10.2.0", "10.3"),
}
ROOT = Path(__file__).parent.parent
COMMANDS = "train|compare|info"
TEXTS = [
    ROOT / "README.md",
    *ROOT.glob("docs/**/*.md"),
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("configs/**/*.yaml"),
]


# `torchrun … scripts/train.py …`, `python scripts/train.py …`, `dtrain train …`
COMMAND = re.compile(
    r"(?:(?:python|torchrun) (?P<launch>.*?)scripts/(?P<script>\w+)\.py|"
    rf"\bdtrain (?P<word>{COMMANDS})(?=[ `]|$)) ?(?P<rest>[^`#|]*)"
)


def commands() -> list[tuple[str, tuple[str, ...], int]]:
    """Script, overrides and ranks, each once."""
    found = {}
    for text in TEXTS:
        for line in text.read_text().splitlines():
            if match := COMMAND.search(line):
                rest = match["rest"]
                # two folders, and no configuration: tests/test_compare.py
                if rest.startswith("--from "):
                    continue
                words = tuple(word for word in shlex.split(rest) if not word.startswith("-"))
                found[match["script"] or match["word"], words, ranks_of(match["launch"] or "")] = (
                    None
                )
    return [*found]


def ranks_of(launch: str) -> int:
    """How many torchrun is told to start: on the most nodes, if it is told a range."""
    options = (
        re.search(rf"--{option}[= ](?:\d+:)?(\d+)", launch)
        for option in ("nnodes", "nproc-per-node")
    )
    return prod(int(told[1]) for told in options if told)


@pytest.mark.parametrize(("script", "overrides", "ranks"), commands(), ids=str)
def test_every_command_of_the_documents_composes(
    script: str, overrides: tuple[str, ...], ranks: int
) -> None:
    register()
    assert (ROOT / "scripts" / f"{script}.py").exists()
    if " ".join(overrides) in WORDS.get(script, {}):
        return
    # of a sweep the first job
    single = [o if "[" in o else o.split(",")[0] for o in overrides]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        settings = validated(
            compose(script, overrides=[o for o in single if not o.startswith("hydra.")])
        )
    assert settings.steps >= 1
    if any(o.startswith("strategy=") for o in single):
        world_size = getattr(settings, "world_size", None) or settings.launch.nproc
        Plan.of(strategies_of(settings), max(ranks, world_size))


def test_every_link_of_the_documents_is_there() -> None:
    """As GitHub shows them; tests/test_site.py looks at the site that is made of them."""
    for text in TEXTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", text.read_text()):
            path, _, anchor = target.partition("#")
            file = text.parent / path if path else text
            assert target.startswith("http") or file.exists(), f"{text.name}: {target}"
            assert not anchor or target.startswith("http") or anchor in anchors(file), (
                f"{text.name}: {target}"
            )


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings: words, hyphens between them."""
    code_left_out = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", code_left_out, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("dtrain train launch.nproc=2", ("train", "launch.nproc=2")),
        ("`python scripts/info.py model=tiny` tells", ("info", "model=tiny")),
        ("torchrun --nproc-per-node 2 scripts/train.py", ("train", "")),
        ("docker run dtrain dtrain compare steps=9", ("compare", "steps=9")),
    ],
)
def test_commands_of_the_documents_are_found(line: str, found: tuple[str, str]) -> None:
    match = COMMAND.search(line)
    assert match and (match["script"] or match["word"], match["rest"]) == found


def test_the_makefile_has_what_the_readme_names() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test"} <= set(targets)


def test_no_version_with_a_known_hole_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {found.name: found.specifier for found in map(Requirement, project["dependencies"])}
    taken = {
        name: [version in needed[name] for version in versions] for name, versions in MENDED.items()
    }
    assert taken == {name: [False, True] for name in MENDED}


def test_it_is_said_that_a_configuration_is_code_and_what_is_refused() -> None:
    warning = "**A configuration is code, like a Makefile: read one before you run it.**"
    assert warning in (ROOT / "README.md").read_text()
    text = " ".join((ROOT / "docs/settings.md").read_text().split())
    assert warning in text
    for word in (
        "callbacks",
        "logging",
        "launchers",
        "env_set",
        "--config-dir",
        "hydra.searchpath",
        ALLOWED,
    ):
        assert word in text
    assert (
        "**A configuration is code**, like a Makefile: read one before you run it"
        in (ROOT / "SECURITY.md").read_text()
    )
