"""The same of others' engines: rows that use other parameters, weights that no row uses, ranks
that own none.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cases import STRATEGIES, Outcome, assert_all_equal, find, finish
from test_accelerate import KNOWN as ACCELERATED
from test_deepspeed import KNOWN
from test_presence import Block, Rows, Settled, Ways, made, trained
from torch import Tensor, nn

from dtrain.run.checkpoint import Checkpoints, load
from dtrain.strategy.accelerate.local_sgd import AccelerateLocalSGD
from dtrain.train import Trainer

pytest.importorskip("deepspeed", reason="the extra dtrain[deepspeed] is not installed")
pytest.importorskip("accelerate", reason="the extra dtrain[accelerate] is not installed")

ENGINES: dict[str, list[Any]] = {
    **KNOWN,
    **ACCELERATED,
    "accelerate_local_sgd": [partial(AccelerateLocalSGD, sync_every=2)],
}
TOLERANCE = 1e-5  # relative, in fp32


def of(strategy: str, size: int, *arguments: Any, **named: Any) -> Trainer:
    with mock.patch.dict(STRATEGIES, ENGINES):
        return made(strategy, size, *arguments, **named)


def _refused(strategy: str, size: int, micro: int | None) -> str:
    run = of(strategy, size, micro, task=Rows(), dtype="fp32")
    try:
        for _ in run.steps():
            pass
    except ValueError as error:
        return f"{run.next_step}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    "strategy",
    [
        "deepspeed zero0",
        "deepspeed zero1",
        "deepspeed zero2",
        "deepspeed zero3",
        "pipeline",
        "accelerate_zero2",
        "autotp zero1",
    ],
)
def test_what_some_rows_do_not_use_is_refused_by_name(strategy: str, world) -> None:
    """In the first step, on every rank: DeepSpeed averages in the order in which gradients come."""
    for said in world(2).run(_refused, strategy, 2, 2):
        assert said.startswith("0: ") and "use strategy=ddp, zero1 or fsdp" in said
        assert ".b." in said or "spare" in said


class One(nn.Module):
    """A single weight, which of two ranks one owns."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, tokens: Tensor, ways: Tensor) -> Tensor:
        return self.table(tokens)


def _looked(strategy: str, size: int, model: type[nn.Module], look: bool) -> Outcome:
    run = of(strategy, size, None, task=Rows(model), steps=3, dtype="fp32")
    if look:
        run.state()
    return finish(run)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_that_owns_no_weight_says_none(stage: int, world) -> None:
    """It said its own copy's, under the owner's names; and looking at the state before the
    first step changes nothing.
    """
    strategy = f"deepspeed zero{stage}"
    expected = world(2).run(_looked, "single", 1, One, False)[0]
    for look in (False, True):
        found = world(2).run(_looked, strategy, 2, One, look)
        assert sorted(len(each.weights) for each in found) == [0, len(expected.weights)]
        for each in found:
            each.gradients = expected.gradients
        assert_all_equal(found, expected, TOLERANCE)


def _saved(folder: str, model: type[nn.Module]) -> None:
    run = made("single", 1, None, task=Rows(model), steps=2, dtype="fp32")
    for _ in run.steps():
        pass
    Checkpoints(Path(folder), keep_last=1).save(2, run.state(), {"tokens": 0})


def _resumed(folder: str, strategy: str, model: type[nn.Module]) -> str:
    run = of(strategy, 2, None, task=Rows(model), dtype="fp32")
    try:
        run.load(
            partial(load, find(folder, Path(folder), Path(folder), fallback=False, note=print))
        )
    except ValueError as error:
        return str(error)
    return ""


class Late(Ways):
    """A way is first met in the second step: it has been stepped once less."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            del block.spare
        del self.blocks[1:]

    def forward(self, tokens: Tensor, ways: Tensor) -> Tensor:
        x = self.first(tokens)
        for block in self.blocks:
            x = block(x, ways[:, 0])
        return self.last(x)


class Frozen(Late):
    """Every row takes both ways, and the embedding does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class Both(Rows):
    WAYS = ([0, 1] * 6,)


@pytest.mark.parametrize("strategy", ["deepspeed zero1", "deepspeed zero3", "accelerate_zero2"])
def test_what_is_frozen_is_no_matter_to_engines(
    strategy: str, world, alone, tmp_path: Path
) -> None:
    """As they say themselves, who refuse what is not used. Their checkpoints have it too."""
    expected = _gone_on("single", 1, str(tmp_path / "one"))
    found = world(2).run(_gone_on, strategy, 2, str(tmp_path / "two"))
    for each in found:
        each.gradients = expected.gradients
    assert_all_equal(found, expected, TOLERANCE)


def _gone_on(strategy: str, size: int, folder: str) -> Outcome:
    """Two steps, a checkpoint, and a third by a run that began with other weights."""
    first, second = (
        of(strategy, size, None, task=Both(Frozen), steps=n, dtype="fp32", seed=n) for n in (2, 3)
    )
    for _ in first.steps():
        pass
    Checkpoints(Path(folder), keep_last=1).save(2, first.state(), {"tokens": 0})
    second.load(partial(load, find(folder, Path(folder), Path(folder), fallback=False, note=print)))
    second.next_step = 2
    return finish(second)


class Dropping(Block):
    """Drops half of all, but for its author, who keeps it from that."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Dropout(0.5).eval()

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        return self.spare(super().forward(x, kinds))


class Asleep(Ways):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dropping() for _ in range(2))


def _asleep(strategy: str, size: int) -> Outcome:
    return finish(of(strategy, size, 2, task=Both(Asleep), steps=2, dtype="fp32"))


@pytest.mark.parametrize("strategy", ["pipeline", "deepspeed zero1"])
def test_what_its_author_keeps_in_evaluation_no_engine_wakes(strategy: str, world, alone) -> None:
    expected = _asleep("single", 1)
    found = world(2).run(_asleep, strategy, 2)
    for each in found:
        each.gradients = expected.gradients
    assert_all_equal(found, expected, TOLERANCE)


@pytest.mark.parametrize(
    ("model", "why"), [(Ways, "spare"), (Late, "have been stepped 1 to 2 times")]
)
def test_states_that_deepspeed_cannot_keep_are_refused(
    model: type[nn.Module], why: str, world, alone, tmp_path
) -> None:
    _saved(str(tmp_path), model)
    for said in world(2).run(_resumed, str(tmp_path), "deepspeed zero1", model):
        assert why in said and "resume with strategy=ddp, zero1 or fsdp" in said


@pytest.mark.parametrize("micro", [None, 2])
def test_accelerates_ddp_is_one_process(micro: int | None, world) -> None:
    expected = world(2).run(trained, "single", 1, None)[0]
    found = world(2).run(_trained, "accelerate_ddp", 2, micro)
    for each in found:
        each.gradients = expected.gradients  # Accelerate clips
    assert_all_equal(found, expected, 1e-12)


def _trained(*arguments: Any) -> Outcome:
    return finish(of(*arguments))


def _names(steps: int) -> list[str]:
    run = of("accelerate_local_sgd", 2, None, task=Settled(), steps=steps)
    for _ in run.steps():
        pass
    return sorted(run.state())


def test_accelerates_local_sgd_saves_what_ranks_have(world) -> None:
    ours, theirs = world(2).run(_names, 3)
    assert ours == theirs and not any("optimizer" in name and "spare" in name for name in ours)
