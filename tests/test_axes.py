"""The pages of docs/axes: their figures are what strategies predict today, their drawings are drawn."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import docs_drawings
import pytest
import torch
from cases import NextToken, adamw
from docs_figures import (
    BEGIN,
    END,
    PAGES,
    ROOT,
    B,
    Line,
    Page,
    Run,
    T,
    document,
    label,
    message_table,
    symbols,
    words,
)
from hydra import compose, initialize_config_dir

from dtrain.config.schema import register, validated
from dtrain.cost.predict import Cost, fold
from dtrain.cost.recorder import record_footprint
from dtrain.parallel.plan import Plan
from dtrain.run.assemble import model_factories, strategies_of
from dtrain.strategy.pipeline.schedule import Schedule, bubble
from dtrain.task.batch import Batch

AXES = ROOT / "docs" / "axes"
KIB = 2**10


class Rows(NextToken):
    """The shapes of what `model=tiny` trains on."""

    def __init__(self, models: dict[str, Any]) -> None:
        super().__init__()
        self.models = models

    def batch(self, step: int) -> Batch:
        tokens = torch.zeros(B, T, dtype=torch.long)
        return {"tokens": tokens, "positions": torch.arange(T).expand(B, -1), "targets": tokens}


@cache
def costs(typed: tuple[str, ...], ranks: int) -> list[Cost]:
    """What a command predicts for each rank, without ranks."""
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = validated(compose("train", overrides=list(typed)))
    plan = Plan.of(strategies_of(config), ranks)
    rows = config.micro_batch_size
    footprint = record_footprint(
        Rows(model_factories(config)), plan, adamw, global_batch_size=B, micro_batch_size=rows
    )
    return [fold(footprint, plan, rank) for rank in range(ranks)]


def predicted(run: Run, page: Page) -> list[Cost]:
    """What a run predicts; of local SGD, that of a step in which the ranks meet."""
    typed = [re.sub("sync_every=.*", "sync_every=1", word) for word in words(run, page)]
    return costs(tuple(typed), run.ranks)


def messages(run: Run, page: Page) -> list[Line]:
    """The lines of the page's table, by the predictions alone."""
    found: dict[str, Line] = {}
    degrees = {"hsdp": {"dp": 2, "fsdp": 2}}.get(run.strategy.split()[0], {})
    for cost in predicted(run, page)[: None if run.together else 1]:
        for m in cost.messages:
            sent = m.wire_bytes(degrees.get(m.axis, run.ranks))
            key = f"{m.axis} {m.operation}"
            old = found.get(key, Line(m.axis, m.operation, 0, 0, 0.0))
            found[key] = Line(
                m.axis, m.operation, old.calls + m.calls, old.bytes + m.bytes, old.wire_bytes + sent
            )
    return list(found.values())


def measured_part(name: str) -> str:
    return document(name).read_text().partition(BEGIN)[2].partition(END)[0]


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_messages_are_predicted_and_what_its_formulas_say(name: str) -> None:
    """`make docs-figures` has measured the same."""
    page, told = PAGES[name], measured_part(name)
    weights = predicted(page.runs[0], page)[0].parameter_bytes
    table = message_table(page, [messages(run, page) for run in page.runs], weights)
    assert "\n".join(table) in told
    assert symbols(page, weights) in told


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_memory_is_predicted(name: str) -> None:
    page, told = PAGES[name], measured_part(name)
    for run in page.runs:
        cost = predicted(run, page)[0]
        (row,) = re.findall(rf"^\| `{re.escape(label(run))}` \| ([^a-z]+) \|$", told, re.M)
        cells = [re.findall(r"[\d.,]+", cell) for cell in row.split(" | ")]
        if all(len(cell) == 1 for cell in cells):  # no prediction is told of it
            assert run.strategy.startswith(("local_sgd", "diloco"))
            continue
        fixed = (cost.parameter_bytes, cost.gradient_bytes, cost.optimizer_bytes)
        assert [cell[0] for cell in cells[:3]] == [f"{size / KIB:,.1f}" for size in fixed]
        assert [cell[1] for cell in cells] == [
            f"{size / KIB:,.1f}" for size in (*fixed, cost.activation_bytes or 0)
        ]


# ranks, settings, operations, a factor on their payload; the answer in KiB
EXERCISES = {
    "data": [(4, "strategy=ddp micro_batch_size=2", {"all_reduce"}, 1.5, "706.5")],
    "sharded": [
        (2, "strategy=fsdp micro_batch_size=4", {"all_gather"}, 1, "1,884.0"),
        (2, "strategy=zero2 micro_batch_size=4", {"all_gather"}, 1, "942.0"),
        (2, "strategy=fsdp micro_batch_size=4", {"reduce_scatter"}, 1, "471.0"),
        (2, "strategy=fsdp micro_batch_size=4 strategy.fsdp.reduce_each=true", {"reduce_scatter"}, 1, "942.0"),
    ],
    "tensor": [
        (2, "strategy=tensor", {"all_reduce"}, 2 / 16, "321.5"),
        (2, "strategy=tensor", {"all_reduce"}, 3 / 16, "482.25"),
    ],
    "context": [
        (4, "strategy=context", {"send"}, 1, "2,560.0"),
        (4, "strategy=context strategy.cp.method=ulysses", {"all_to_all"}, 1, "1,024.0"),
        (4, "strategy=context strategy.cp.method=ulysses", {"all_to_all"}, 3 / 4, "768.0"),
    ],
    "experts": [
        (2, "strategy=expert model.n_experts=4 model.top_k=1", {"all_to_all"}, 2, "2,048.1"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ranks", "typed", "operations", "factor", "told"),
    [(name, *each) for name, answers in EXERCISES.items() for each in answers],
)
def test_an_exercises_answer_is_what_the_strategy_predicts(
    name: str, ranks: int, typed: str, operations: set[str], factor: float, told: str
) -> None:
    """Rank 0's payload times a factor: what of it is sent, or of all ranks, or of fewer rows."""
    cost = costs((f"launch.nproc={ranks}", "model=tiny", *typed.split()), ranks)[0]
    size = factor * sum(m.bytes for m in cost.messages if m.operation in operations) / KIB
    assert f"{size:,.{len(told.partition('.')[2])}f}" == told
    assert told in document(name).read_text().partition(END)[2]


def test_the_pipelines_exercise_is_what_the_schedule_says() -> None:
    text = (AXES / "pipeline.md").read_text()
    one, zero = Schedule("1f1b", 4, 1), Schedule("zbv", 4, 2)
    assert bubble(one, 27) == pytest.approx(0.1) and bubble(one, 28) < 0.1
    for share in (f"{bubble(one, 8):.0%}", f"{bubble(one, 28):.1%}", f"{bubble(zero, 8):.1%}"):
        assert share.replace("%", " %") in text


@pytest.mark.parametrize("name", docs_drawings.DRAWINGS)
def test_a_drawing_is_what_the_script_draws(name: str) -> None:
    """Otherwise: `make drawings`."""
    assert (AXES / f"{name}.svg").read_text() == docs_drawings.DRAWINGS[name]().svg()
