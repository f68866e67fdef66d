"""DeepSpeed's engine under our loop: one process's curve, our checkpoints, and the messages
that its stages should send.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import STRATEGIES, Case, Outcome, assert_all_equal, refusal, train
from test_checkpoint import _train
from test_cost import Case as Costed
from test_cost import Other, measured, predicted, same_messages
from torch.utils.cpp_extension import _get_build_directory

from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision
from dtrain.strategy.deepspeed.autotp import AutoTP
from dtrain.strategy.deepspeed.library import fresh_groups
from dtrain.strategy.deepspeed.pipeline import DeepSpeedPipeline
from dtrain.strategy.deepspeed.ulysses import DeepSpeedUlysses
from dtrain.strategy.deepspeed.zero import DeepSpeed
from dtrain.strategy.fsdp import FSDP

pytest.importorskip("deepspeed", reason="the extra dtrain[deepspeed] is not installed")

TOLERANCE = 1e-5  # relative, in fp32


@pytest.fixture
def world(worlds_with_engines):
    return worlds_with_engines


FREED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}


def zero(stage: int, **settings: Any) -> partial[DeepSpeed]:
    settings = {"stage": stage, **(FREED if stage == 3 else {}), **settings}
    return partial(DeepSpeed, deepspeed={"zero_optimization": settings})


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
PLANS: dict[str, partial[DeepSpeed]] = {
    **{f"zero{stage}": zero(stage) for stage in range(4)},
    **{f"zero{stage}, small buckets": zero(stage, reduce_bucket_size=2000) for stage in (1, 3)},
    "zero1, overlap": zero(1, overlap_comm=True),
    "zero3, defaults": partial(DeepSpeed, deepspeed={"zero_optimization": {"stage": 3}}),
    **{f"zero{stage}, offload": zero(stage, **OFFLOAD) for stage in (2, 3)},
}
KNOWN = {f"deepspeed {name}": [made] for name, made in PLANS.items()}


KNOWN |= {
    "pipeline": [DeepSpeedPipeline, partial(PLANS["zero1"], 1)],
    "pipeline dp": [partial(DeepSpeedPipeline, 2), PLANS["zero1"]],
}
KNOWN |= {
    f"sequences zero{stage}": [PLANS[f"zero{stage}"], partial(DeepSpeedUlysses, 2)]
    for stage in range(4)
}
KNOWN |= {f"autotp zero{stage}": [PLANS[f"zero{stage}"], partial(AutoTP, 2)] for stage in (1, 2, 3)}


@pytest.fixture(scope="session")
def cpu_adam() -> None:
    """DeepSpeed's CPU Adam, compiled before ranks wait for it: that takes minutes of a core,
    once for a machine.
    """
    code = (
        "from dtrain.strategy.deepspeed.library import free_builds\nfree_builds()\n"
        "from deepspeed.ops.op_builder import CPUAdamBuilder\nCPUAdamBuilder().load()"
    )
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.DEVNULL
    )


def trained(case: Case, size: int) -> Outcome:
    with mock.patch.dict(STRATEGIES, KNOWN):
        return train(case, size)


def kept(*arguments: Any) -> Outcome:
    with mock.patch.dict(STRATEGIES, KNOWN):
        return _train(*arguments)


@pytest.fixture(scope="module")
def single() -> dict[Case, Outcome]:
    """One process's outcome of each case, made once."""
    return {}


def reference(case: Case, known: dict[Case, Outcome], world) -> Outcome:
    plain = case.reference()
    if plain not in known:
        known[plain] = world(2).run(trained, plain, 1)[0]
    return known[plain]


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_every_stage_equals_one_process(name: str, world, single) -> None:
    """Losses, norms, metrics, weights and states; three ranks, micro-batches, clipping that
    cuts.
    """
    case = Case(
        "masked_token", f"deepspeed {name}", "fp32", clip_norm=0.05, micro_batch_size=2, steps=4
    )
    check(replace(case, recompute=name != "zero0"), 3, single, world)


def check(case: Case, size: int, single: dict[Case, Outcome], world) -> None:
    """All but the gradients, which are the engine's, and gone when it has stepped."""
    expected = reference(case, single, world)
    found = world(size).run(trained, case, size)
    for each in found:
        each.gradients = expected.gradients
    assert_all_equal(found, expected, TOLERANCE)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PLANS)
def test_every_stage_equals_one_process_for_long(
    name: str, world, single, request: pytest.FixtureRequest
) -> None:
    """The same of two tasks, and of variants of the stages."""
    if "offload" in name:
        request.getfixturevalue("cpu_adam")
    cases = [
        Case("next_token", f"deepspeed {name}", "fp32", micro_batch_size=2),
        Case("masked_token", f"deepspeed {name}", "fp32"),
    ]
    if name in ("zero1", "zero2", "zero3"):
        cases += [
            Case(
                "masked_token",
                f"deepspeed {name}",
                "fp32",
                clip_norm=0.05,
                micro_batch_size=2,
                recompute=True,
                steps=8,
            )
        ]
    for case in cases:
        check(case, 3, single, world)


HEADS = (("n_kv_heads", 6), ("activation", "swiglu"))  # that share keys


OTHERS = [
    ("autotp zero1", 4), ("autotp zero2", 2), ("autotp zero3", 2),
    ("sequences zero0", 2), ("sequences zero1", 4), ("sequences zero2", 2), ("sequences zero3", 2),
]  # fmt: skip
QUICK = ("autotp zero1", "sequences zero2")


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(*each, marks=[] if each[0] in QUICK else pytest.mark.deep) for each in OTHERS],
)
def test_its_other_axes_equal_one_process(name: str, size: int, world, single) -> None:
    """Two ranks of tp or cp, alone and beside two of dp; clipping that cuts."""
    steps = 4 if name in QUICK else 8
    case = Case(
        "masked_token", name, "fp32", clip_norm=0.05, micro_batch_size=3, steps=steps, model=HEADS
    )
    check(case, size, single, world)


@pytest.mark.parametrize(("name", "size", "tied"), [
    ("pipeline", 3, True), ("pipeline dp", 4, False),
    *(pytest.param(*each, marks=pytest.mark.deep) for each in [
        ("pipeline", 2, True), ("pipeline", 2, False), ("pipeline", 3, False),
        ("pipeline dp", 4, True)]),
])  # fmt: skip
def test_its_pipeline_equals_one_process(name: str, size: int, tied: bool, world, single) -> None:
    """A tied matrix on both ends, uneven stages, clipping that cuts; and an untied one."""
    model = (("n_layers", 4), ("tied", tied))
    check(
        Case("masked_token", name, "fp32", clip_norm=0.05, steps=4, model=model),
        size,
        single,
        world,
    )


def test_a_gan_has_two_engines(world, single) -> None:
    case = Case("gan", "deepspeed zero1", "fp32", steps=4)
    found = world(2).run(trained, case, 2)
    expected = reference(case, single, world)
    for each in found:
        assert each.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        assert each.norms == pytest.approx(expected.norms, rel=TOLERANCE)


@pytest.mark.parametrize(
    "stage", [2, *(pytest.param(stage, marks=pytest.mark.deep) for stage in (1, 3))]
)
def test_bf16_drifts_as_little_as_ours(stage: int, world, single) -> None:
    case = Case("next_token", f"deepspeed zero{stage}", "bf16", steps=8)
    ours = world(2).run(trained, replace(case, strategy="fsdp"), 2)[0]
    theirs = world(2).run(trained, case, 2)[0]
    exact = reference(replace(case, dtype="fp32"), single, world)
    drift = [
        max(abs(a - b) for a, b in zip(each.losses, exact.losses, strict=True))
        for each in (ours, theirs)
    ]
    assert 0 < drift[1] < 3 * drift[0]
    assert all(t.dtype == torch.float32 for t in theirs.weights.values())


def in_fp16(case: Case, size: int, stage: int, scale_power: int) -> Outcome:
    """On a CPU that DeepSpeed was told to take for one that has fp16."""
    fp16 = {"enabled": True, "initial_scale_power": scale_power, "hysteresis": 1}
    settings = {"zero_optimization": {"stage": stage}, "fp16": fp16}
    from deepspeed.accelerator import get_accelerator

    known = {case.strategy: [partial(DeepSpeed, deepspeed=settings)]}
    has_fp16 = mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    with has_fp16, mock.patch.dict(STRATEGIES, known):
        return train(case, size)


@pytest.mark.parametrize("stage", [3, 1, pytest.param(2, marks=pytest.mark.deep)])
def test_fp16_leaves_out_the_steps_that_do_not_fit(stage: int, world, single) -> None:
    """With a scale that fits it follows fp32; with one that is too large, steps change nothing
    until it is halved.
    """
    case = Case("next_token", "fp16", "fp32", clip_norm=0.5, steps=12)
    exact = reference(case, single, world)
    fits = world(2).run(in_fp16, case, 2, stage, 8)[0]
    assert fits.losses == pytest.approx(exact.losses, rel=2e-3)
    assert fits.norms == pytest.approx(exact.norms, rel=2e-2)
    assert fits.losses != exact.losses
    for late in world(2).run(in_fp16, case, 2, stage, 24):
        left_out = sum(not math.isfinite(norm) for norm in late.norms)
        assert 0 < left_out < 12
        # none in between
        assert late.norms[left_out:] == pytest.approx([n for n in late.norms if math.isfinite(n)])
        assert {float(t) for name, t in late.weights.items() if name.endswith(".step")} == {
            12.0 - left_out
        }


SAVERS = [
    ("deepspeed zero3", 3),
    ("fsdp", 2),
    ("deepspeed zero1", 2),
    ("autotp zero1", 2),
    ("deepspeed zero0", 3),
    ("deepspeed zero2", 3),
    ("deepspeed zero3, defaults", 2),
    ("deepspeed zero2, offload", 2),
    ("autotp zero3", 4),
    ("pipeline", 2),
    ("pipeline dp", 4),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "plans", [SAVERS[:4], pytest.param(SAVERS, marks=pytest.mark.deep)], ids=["four", "all"]
)
def test_what_either_saves_the_other_resumes(
    plans: list[tuple[str, int]], world, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """DeepSpeed's stage 3 under native fsdp and back, and every stage under every other, on
    other numbers of ranks.
    """
    if any("offload" in name for name, _ in plans):
        request.getfixturevalue("cpu_adam")
    cases = {name: Case("next_token", name, "fp32", steps=8) for name, _ in plans}
    for number, (saver, size) in enumerate(plans):
        folder = str(tmp_path / f"{saver}-{size}")
        whole = world(size).run(kept, cases[saver], size, folder, True, False)[0]
        for other, ranks in plans:
            if (saver, size) == plans[0] or (other, ranks) == plans[number % 2]:
                resumed = world(ranks).run(kept, cases[other], ranks, folder, False, True)[0]
                assert resumed.losses == pytest.approx(whole.losses[4:], rel=TOLERANCE), (
                    saver,
                    other,
                )
                # heads in another order have equal losses
                for name in resumed.weights.keys() & whole.weights.keys():
                    far = (resumed.weights[name] - whole.weights[name]).norm() / whole.weights[
                        name
                    ].norm()
                    assert far < 1e-3, (saver, other, name)


COSTS = {
    **{f"zero{stage}": Costed(3, (zero(stage),)) for stage in range(4)},
    **{
        f"zero{stage}, micro-batches": Costed(
            3, (zero(stage, reduce_bucket_size=9000),), Other, several=True
        )
        for stage in range(4)
    },
    **{
        f"zero{stage}, bf16": Costed(2, (zero(stage),), precision=Precision("bf16"))
        for stage in (1, 2, 3)
    },
}


@pytest.mark.parametrize("case", [
    pytest.param(case, id=name,
                 marks=[] if name in ("zero1", "zero2, micro-batches", "zero3",
                                      "zero3, bf16") else pytest.mark.deep)
    for name, case in COSTS.items()
])  # fmt: skip
def test_messages_and_memory_are_as_told(case: Costed, world) -> None:
    for ours, told in zip(world(case.ranks).run(measured, case), predicted(case), strict=True):
        same_messages(ours, told)
        assert replace(ours, messages=(), activation_bytes=0) == replace(
            told, messages=(), activation_bytes=0
        )
        assert abs(ours.activation_bytes / told.activation_bytes - 1) < 0.1


@pytest.mark.parametrize(("settings", "said"), [
    ({"overlap_comm": True}, "overlap_comm=False, and it is True"),
    ({"offload_optimizer": {"device": "cpu"}}, "offload_optimizer=None"),
    ({"reduce_bucket_size": 100}, "larger than reduce_bucket_size"),
])  # fmt: skip
def test_what_is_not_known_is_not_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        predicted(Costed(2, (zero(2, **settings),)))
    with pytest.raises(ValueError, match="stage3_param_persistence_threshold=0"):
        predicted(Costed(2, (partial(DeepSpeed, deepspeed={"zero_optimization": {"stage": 3}}),)))


def _of(settings: dict[str, Any], *others: Any, **plan: Any) -> str:
    try:
        Plan.of([DeepSpeed(2, settings), *others], 2 * 2 ** len(others), **plan)
    except ValueError as error:
        return str(error)
    return ""


def test_contradictions_are_refused_in_one_line() -> None:
    said = {
        _of(
            {"gradient_clipping": 2.0}
        ): "gradient_clipping=2.0 is for the run to say: use clip_norm",
        _of(
            {"train_batch_size": 8}
        ): "train_batch_size=8 is for the run to say: use global_batch_size",
        _of({"fp16": {"enabled": True}}): "stage 1, 2 or 3 alone, not dtype=fp32, stage 0",
        _of({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}): "needs a GPU",
        _of({"zero_optimization": {"stage": 4}}): "stage=4 must be 0, 1, 2 or 3",
        _of({"zero_optimization": {"stage": 2, "reduce_bucket_sizes": 5}}): "reduce_bucket_sizes=5",
        _of(
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}
        ): "reduce_bucket_size=many",
        _of({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}): "use false",
        _of({}, FSDP(2)): "stands alone, not beside fsdp",
        _of({}, precision=Precision("fp64")): "use fp32 or bf16",
        _of({}, precision=Precision("bf16")): "stage 0",
        _of({}, compile=True): "compile=true",
        _of({}, AutoTP(2)): "for stages 1, 2 and 3",
        _of({}, DeepSpeedPipeline(2)): "tells no norm",
        _of(
            {"zero_optimization": {"stage": 2}}, DeepSpeedPipeline(2)
        ): "refuses it at stage 2: use stage 1",
        _of({}, AutoTP(2), FSDP(2)): "or tensor beside others",
    }
    for line, wanted in said.items():
        assert wanted in line and "\n" not in line
    with mock.patch.dict(STRATEGIES, KNOWN):
        refusals = [
            refusal(Case("gan", f"deepspeed zero{stage}", "fp32"), 2) for stage in (0, 2, 3)
        ]
    for said_of in refusals:
        assert "use stage 1" in said_of


def test_what_cannot_be_built_is_said(caplog: pytest.LogCaptureFixture) -> None:
    disks = {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"},
        }
    }
    with mock.patch("dtrain.strategy.deepspeed.library.reaches_disks", return_value=False):
        assert "install libaio-dev" in _of(disks)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    strategy = zero(2, **OFFLOAD)(2)
    with mock.patch("deepspeed.ops.adam.DeepSpeedCPUAdam", side_effect=RuntimeError("no ninja")):
        assert strategy.optimizer(optimizer, model, Plan.of([strategy], 2)) is optimizer
    assert "CPU Adam cannot be built, torch's steps: no ninja" in caplog.text


def test_states_in_host_memory_are_stepped_as_they_would_be_elsewhere() -> None:
    """By an optimizer of the same kind and settings: torch stands in for what takes minutes to
    compile.
    """

    def compiled(groups: list[dict[str, Any]], adamw_mode: bool = True) -> torch.optim.Optimizer:
        return (torch.optim.AdamW if adamw_mode else torch.optim.Adam)(groups)

    weights, strategy = [], zero(2, **OFFLOAD)(2)
    for offloaded in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        groups = [
            {"params": [model.weight], "weight_decay": 0.3},
            {"params": [model.bias], "lr": 0.2},
        ]
        optimizer: Any = torch.optim.AdamW(groups, lr=0.1, betas=(0.5, 0.6), eps=1e-3)
        if offloaded:
            with mock.patch("deepspeed.ops.adam.DeepSpeedCPUAdam", compiled):
                optimizer = strategy.optimizer(optimizer, model, Plan.of([strategy], 2))
        for _ in range(2):
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert type(optimizer) is torch.optim.AdamW and torch.equal(*weights)


def test_nothing_of_deepspeed_is_imported_without_it() -> None:
    """Nor by the file of the strategy: only by a plan that has it."""
    code = (
        "import sys, dtrain.cli, dtrain.strategy.deepspeed.zero\n"
        "assert not {'deepspeed', 'accelerate', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize("place", ["XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"])
def test_a_lock_is_taken_away_if_nobody_builds_any_more(
    place: str, alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands where torch builds extensions; one of a minute ago is of a build that runs."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv(place, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    locks = {}
    for name, age_s in (("killed", 3600), ("runs", 60)):
        locks[name] = Path(_get_build_directory(name, verbose=False)) / "lock"
        locks[name].touch()
        os.utime(locks[name], (time.time() - age_s,) * 2)
        assert tmp_path in locks[name].parents
    fresh_groups(mock.Mock(), Plan.of([], 1))
    assert not locks["killed"].exists() and locks["runs"].exists()
