"""The survey as tables: for the terminal, and for a block of a page that a test compares."""

from __future__ import annotations

import re

from dtrain.compare.survey import ITSELF, PARTLY, REFUSED, SAME_AXIS, Combination, survey
from dtrain.config.groups import strategy_comment
from dtrain.report.tables import Sheet

BEGIN, END = "<!-- capabilities -->\n", "<!-- /capabilities -->\n"


def survey_tables() -> list[Sheet]:
    """Return the survey's tables: single strategies, pairs, compositions, refusals."""
    trials = survey()
    pairs = {frozenset(part.name for part in t.parts): t.mark for t in trials if t.parts}
    named = [t for t in trials if not t.parts]
    single = [t for t in named if len(t.axes) <= 1]
    composed = [t for t in named if len(t.axes) > 1]
    composes = {
        name for pair, mark in pairs.items() if mark not in (REFUSED, SAME_AXIS) for name in pair
    }
    names = [t.name for t in single if t.name in composes]
    lonely = [t.name for t in single if t.axes and t.name not in composes]
    legend = (
        f"{PARTLY}: for some of the tasks; {REFUSED}: refused; {SAME_AXIS}: both want one axis; "
        f"those that stand alone, {', '.join(lonely)}, are not here"
    )
    refused = reasons([t for t in trials if not t.parts or composes >= {p.name for p in t.parts}])
    return [
        Sheet(
            f"Strategies, for the tasks {', '.join(trials[0].refusals)}",
            ("strategy", "axis", "divides of a batch", "tasks", "in a sentence"),
            [
                (
                    t.name,
                    " ".join(t.axes),
                    "".join(s.divides or "nothing" for s in t.strategies),
                    t.tasks,
                    strategy_comment(t.name),
                )
                for t in single
            ],
        ),
        Sheet(
            f"Two together ({legend})",
            ("", *names),
            [
                (one, *(pairs.get(frozenset((one, other)), ITSELF) for other in names))
                for one in names
            ],
        ),
        Sheet(
            "Compositions that have a name",
            ("strategy", "mesh", "tasks", "in a sentence"),
            [(t.name, " x ".join(t.axes), t.tasks, strategy_comment(t.name)) for t in composed],
        ),
        Sheet(
            "Refusals",
            ("how many", "which", "reason"),
            [(str(len(which)), ", ".join(which), reason) for reason, which in refused.items()],
        ),
    ]


def reasons(trials: list[Combination]) -> dict[str, list[str]]:
    """Return the names of what each reason refuses.

    Reasons that differ in the strategies' names alone are one, with … for the names.
    """
    refused: dict[str, list[tuple[str, str]]] = {}
    for trial in trials:
        names = "|".join({name for s in trial.strategies for name in (type(s).__name__, s.axis)})
        for reason in dict.fromkeys(filter(None, trial.asked.values())):
            tasks = [task for task, each in trial.asked.items() if each == reason]
            of_all = len(tasks) == len(trial.asked)
            name = trial.name if of_all else f"{trial.name} ({', '.join(tasks)})"
            pattern = re.sub(rf"\b({names})\b", "…", reason)
            refused.setdefault(pattern, []).append((reason, name))
    return {
        cases[0][0] if len({reason for reason, _ in cases}) == 1 else pattern: [
            name for _, name in cases
        ]
        for pattern, cases in refused.items()
    }


def show() -> None:
    """Print the tables."""
    for sheet in survey_tables():
        sheet.show()


def markdown() -> str:
    """Return the tables as a block of docs/strategies.md."""
    return "\n".join(sheet.markdown() for sheet in survey_tables())
