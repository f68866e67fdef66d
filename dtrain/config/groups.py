"""The groups of `configs/`, such as `strategy` and `model`: what there is to choose from."""

from __future__ import annotations

import re
from pathlib import Path

from hydra import compose

CONFIGS = (Path(__file__).parents[1] / "configs").resolve()  # in a checkout a link


def group_names() -> list[str]:
    """Return the names of all groups, such as `task/augment`."""
    return [str(folder.relative_to(CONFIGS)) for folder in CONFIGS.rglob("*") if folder.is_dir()]


def options(group: str) -> list[str]:
    """Return the names that a group has to choose from."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def strategy_comment(strategy: str) -> str:
    """Return the comment with which a strategy's YAML begins."""
    comment = re.search("# *(.*)", (CONFIGS / "strategy" / f"{strategy}.yaml").read_text())
    return comment[1] if comment else ""


def check_axes(names: list[str]) -> None:
    """Refuse two strategies of one axis in a list: Hydra would merge them into one.

    Raises:
        ValueError: names both strategies and the axis.
    """
    holders: dict[str, str] = {}
    for name in names if len(names) > 1 else ():
        for axis in compose(f"strategy/{name}").get("strategy", {}):
            if axis in holders:
                raise ValueError(
                    f"{holders[axis]} and {name} both want the axis {axis}: choose one of them"
                )
            holders[axis] = name
