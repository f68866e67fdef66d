"""What a strategy's YAML says of it."""

from __future__ import annotations

import re

from dtrain.config.schema import CONFIGS


def strategy_comment(strategy: str) -> str:
    """The comment with which a strategy's YAML begins."""
    found = re.search("# *(.*)", (CONFIGS / "strategy" / f"{strategy}.yaml").read_text())
    return found[1] if found else ""
