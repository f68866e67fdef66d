"""What a server evaluates at once, and what a comparison says in which nothing could be
compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import ROWS, NextToken
from test_cli import call  # noqa: F401
from test_server import SETTINGS, plan_of, sgd

from dtrain.strategy.parameter_server.trainer import local_trainer

WORKERS = 4


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_parameter_server_evaluates_as_many_rows_at_once_as_a_worker_trains(
    micro_batch_size: int | None,
) -> None:
    """Not the global batch, which is in the memory of no process."""
    plan, rows = plan_of(WORKERS), []
    settings = replace(SETTINGS, micro_batch_size=micro_batch_size)
    strategy = plan.strategy_on("dp")
    trainer = local_trainer(NextToken(), plan, strategy, sgd, settings)  # type: ignore[arg-type]

    def measure(models: object, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows.append(len(next(iter(part.values()))))
        return {"count": torch.tensor(rows[-1])}

    sums = trainer._executor.evaluate(SimpleNamespace(measure=measure), NextToken().batch(0))  # type: ignore[arg-type]
    assert sums["count"] == ROWS == sum(rows) and set(rows) == {micro_batch_size or ROWS // WORKERS}


def test_a_comparison_in_which_no_strategy_could_run_is_a_mistake(
    call: Callable[..., tuple[int, str, str]],
) -> None:
    """Whether the baseline could, or not even that."""
    words = ["model=tiny", "strategies=[single,ddp]", "launch.nproc=2", "model.n_heads=5"]
    status, out, err = call(*words, config="compare")
    assert status == 2 and err.count("\n") == 1 and "single: not possible here" in out
    assert err.startswith(
        "dtrain: none of the strategies could run: ddp: model.n_heads=5 does not divide"
    )
