"""Equal or refused, nothing else: every plan gives the losses, norms and weights of one process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import lru_cache

import pytest
from cases import STRATEGIES, Case, Outcome, train

from dtrain.job import COMPILERS

# Rounding alone: sums are taken in another order. fp64 has 1.1e-16, fp32 6e-8; twenty Adam steps carry it on.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
VARIANTS = (
    "ddp_small_buckets",
    "fsdp_reduce_each",
    "fsdp_offload",
    "hsdp_zero2",
)  # of a strategy that is tried in full


@lru_cache
def reference(case: Case) -> Outcome:
    return train(case, 1)


def assert_equal(ours: Outcome, theirs: Outcome, tolerance: float) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=tolerance)
    assert ours.norms == pytest.approx(theirs.norms, rel=tolerance)
    assert ours.metrics == pytest.approx(theirs.metrics, rel=tolerance)
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weights in ours.weights.items():
        expected = theirs.weights[name]
        difference, size = (weights - expected).norm().item(), expected.norm().item()
        assert difference <= tolerance * size, f"{name}: relative difference {difference / size:.1e}"


def cases() -> list[tuple[Case, int]]:
    found = []
    for strategy in STRATEGIES.keys() - {"single"}:
        found += [(Case(task, strategy), 4) for task in ("next_token", "gan")]
        if strategy == "fsdp_reduce_each":
            found += [(Case("masked_token", strategy, micro_batch_size=1), 4)]
        if strategy in VARIANTS:
            continue
        found += [(Case("next_token", strategy, dtype="fp32"), 4), (Case("next_token", strategy, recompute=True), 4)]
        found += [(Case(task, strategy, micro_batch_size=1), 4) for task in ("masked_token", "gan")]
        found += [(Case("masked_token", strategy, clip_norm=None), 4)]
        if strategy != "hsdp":  # which needs four ranks
            found += [(Case(task, strategy), size) for task in ("masked_token", "gan") for size in (2, 3)]
    return sorted(found, key=lambda pair: (pair[1], str(pair[0])))


@pytest.mark.parametrize(("case", "size"), cases(), ids=str)
def test_plan_equals_one_process(case: Case, size: int, world, alone) -> None:
    expected = reference(replace(case, strategy="single", micro_batch_size=None, recompute=False))
    for ours in world(size).run(train, case, size):
        assert_equal(ours, expected, TOLERANCE[case.dtype])


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler: none here")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_blocks_equal_one_plain_process(strategy: str, world, alone) -> None:
    for ours in world(2).run(train, Case("next_token", strategy, dtype="fp32", compile=True), 2):
        assert_equal(ours, reference(Case("next_token", "single", dtype="fp32")), TOLERANCE["fp32"])


def test_the_oracle_can_fail(alone) -> None:
    """A different clipping norm is told apart: the comparison has teeth."""
    with pytest.raises(AssertionError):
        assert_equal(
            train(Case("next_token", "single", clip_norm=0.5), 1), reference(Case("next_token", "single")), 1e-5
        )
