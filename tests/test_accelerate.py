"""Accelerate in the place of our wrappers: one process's curve, and not another strategy than
was asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import (
    STRATEGIES,
    Case,
    NextToken,
    Outcome,
    adamw,
    assert_all_equal,
    assert_equal,
    refusal,
    train,
    trainer,
)
from test_checkpoint import _train
from test_cost import Case as Costed
from test_cost import Other, measured, predicted, same_messages
from torch.distributed.tensor import DTensor

from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision
from dtrain.parallel.strategy import Strategy
from dtrain.strategy.accelerate.ddp import AccelerateDDP
from dtrain.strategy.accelerate.deepspeed import AccelerateDeepSpeed
from dtrain.strategy.accelerate.environment import refuse_contradictions
from dtrain.strategy.accelerate.fsdp import AccelerateFSDP
from dtrain.strategy.accelerate.local_sgd import AccelerateLocalSGD
from dtrain.strategy.ddp import DDP
from dtrain.train import Settings, Trainer

pytest.importorskip("accelerate", reason="the extra dtrain[accelerate] is not installed")

TOLERANCE = 1e-5  # relative, in fp32


@pytest.fixture
def world(worlds_with_engines):
    return worlds_with_engines


FREED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}


def by_deepspeed(stage: int) -> partial[AccelerateDeepSpeed]:
    zero = {"stage": stage, **(FREED if stage == 3 else {})}
    return partial(AccelerateDeepSpeed, deepspeed={"zero_optimization": zero})


MADE: dict[str, Any] = {
    "accelerate_ddp": AccelerateDDP,
    **{f"accelerate_zero{stage}": by_deepspeed(stage) for stage in (1, 2, 3)},
}
KNOWN = {name: [made] for name, made in (MADE | {"accelerate_fsdp": AccelerateFSDP}).items()}


def trained(case: Case, size: int) -> Outcome:
    with mock.patch.dict(STRATEGIES, KNOWN):
        return train(case, size)


def kept(*arguments: Any) -> Outcome:
    with mock.patch.dict(STRATEGIES, KNOWN):
        return _train(*arguments)


def on_a_cpu(case: Case, size: int) -> tuple[Outcome, int, int]:
    """FSDP2 by Accelerate where it says it cannot: told that this process's devices can.

    Also shards, and all elements.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    class Told(AccelerateFSDP):
        def check(self, plan: Plan) -> None:
            """On a GPU it would pass."""

    real = AcceleratorState.__init__

    def told(self: Any, *arguments: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
        real(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = (
                DistributedType.FSDP
            )
            self.fsdp_plugin = fsdp_plugin

    with (
        mock.patch.dict(STRATEGIES, {case.strategy: [Told]}),
        mock.patch.object(AcceleratorState, "__init__", told),
    ):
        made = trainer(case, size)
        (model,) = made.models.values()
        shards = [p for p in model.parameters() if isinstance(p, DTensor)]
        assert len(shards) == len(list(model.parameters()))
        mine, every = sum(p.to_local().numel() for p in shards), sum(p.numel() for p in shards)
        return train(case, size), mine, every


@pytest.mark.parametrize("name", MADE)
def test_it_equals_one_process(name: str, world) -> None:
    case = Case("masked_token", name, "fp32", clip_norm=0.05, micro_batch_size=2, steps=4)
    expected = world(2).run(trained, case.reference(), 1)[0]
    found = world(2).run(trained, case, 2)
    for each in found:
        each.gradients = expected.gradients  # which the engine has clipped, or let go
    assert_all_equal(found, expected, TOLERANCE)


@pytest.mark.deep
@pytest.mark.parametrize("name", MADE)
def test_it_equals_one_process_for_long(name: str, world) -> None:
    cases = [
        Case("next_token", name, "fp32", micro_batch_size=2),
        Case("masked_token", name, "fp32", clip_norm=0.05),
    ]
    for case in cases:
        expected = world(2).run(trained, case.reference(), 1)[0]
        found = world(3).run(trained, case, 3)
        for each in found:
            each.gradients = expected.gradients  # which the engine has clipped, or let go
        assert_all_equal(found, expected, TOLERANCE)


def test_four_ranks_and_a_gan_of_two_models(world) -> None:
    for task, name in (("gan", "accelerate_ddp"), ("next_token", "accelerate_zero3")):
        case = Case(task, name, "fp32", steps=4)
        expected = world(2).run(trained, case.reference(), 1)[0]
        for each in world(4).run(trained, case, 4):
            assert each.losses == pytest.approx(expected.losses, rel=TOLERANCE)
            assert each.norms == pytest.approx(expected.norms, rel=TOLERANCE)


def test_its_fsdp_shards_and_equals_one_process_where_it_may(world) -> None:
    """The path that GPUs take, on a CPU that Accelerate was told to take for one."""
    case = Case("next_token", "accelerate_fsdp", "fp32", micro_batch_size=2)
    expected = world(2).run(trained, case.reference(), 1)[0]
    for found, mine, every in world(2).run(on_a_cpu, case, 2):
        found.gradients = expected.gradients
        assert_equal(found, expected, TOLERANCE)
        assert mine < 0.55 * every


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="Accelerate makes FSDP of its plugin on GPUs alone: none here",
)
@pytest.mark.parametrize("strategy", ["accelerate_fsdp", "accelerate_deepspeed", "deepspeed_zero3"])
def test_on_gpus_it_trains_as_one_does(strategy: str, tmp_path: Path) -> None:
    losses = {}
    for name, ranks in (("single", 1), (strategy, min(2, torch.cuda.device_count()))):
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "scripts/train.py",
            f"strategy={name}",
            "model=tiny",
            "steps=8",
            "device=cuda",
            f"hydra.run.dir={tmp_path / name}",
        ]
        subprocess.run(run, check=True, cwd=Path(__file__).parent.parent)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert losses[strategy] == pytest.approx(losses["single"], rel=1e-4)


def test_on_a_cpu_its_fsdp_is_refused() -> None:
    with mock.patch.dict(STRATEGIES, KNOWN):
        said = refusal(Case("next_token", "accelerate_fsdp", "fp32"), 2)
    assert "would quietly train DDP; use strategy=fsdp" in said


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def local(
    strategy: Strategy | None, size: int, steps: int = 6
) -> tuple[list[float], dict[str, torch.Tensor], list[list[float]]]:
    """Losses, the weights that a checkpoint would have, and each rank's own sum of weights
    after each step.
    """
    case = Case("masked_token", "single", "fp32")
    with mock.patch.dict(STRATEGIES, {"local": [lambda: strategy] if strategy else []}):
        made = trainer(replace(case, strategy="local", clip_norm=None), size)
    made = Trainer(made.task, made.plan, sgd, Settings(steps, global_batch_size=12))
    losses, sums = [], []
    for step in made.steps():
        losses.append(step.loss)
        own = torch.stack(
            [p.detach().double().sum() for m in made.models.values() for p in m.parameters()]
        ).sum()
        every = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        sums.append([each.item() for each in every])
    return (
        losses,
        {name: t.clone() for name, t in made.state().items() if not name.startswith("optimizer.")},
        sums,
    )


def test_local_sgd_of_every_step_is_synchronous_sgd(world) -> None:
    expected, weights, _ = world(2).run(local, None, 1)[0]
    for losses, found, sums in world(2).run(local, AccelerateLocalSGD(sync_every=1), 2):
        assert losses == pytest.approx(expected, rel=TOLERANCE)
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=TOLERANCE, atol=1e-7)
        assert all(a == b for a, b in sums)


def test_local_sgd_averages_every_third_step_and_saves_the_average(world) -> None:
    outcomes = world(2).run(local, AccelerateLocalSGD(sync_every=3), 2, 5)
    for _, found, sums in outcomes:
        assert [a == b for a, b in sums] == [False, False, True, False, False]
        average = sum(t.double().sum().item() for t in found.values())
        assert average == pytest.approx(sum(sums[-1]) / 2, abs=1e-4)


COSTS = {
    "accelerate_ddp": Costed(3, (AccelerateDDP,)),
    "accelerate_ddp, two buckets": Costed(2, (AccelerateDDP,), partial(Other, d_model=192)),
    "accelerate_ddp, micro-batches": Costed(
        2, (partial(AccelerateDDP, bucket_mb=0.005),), Other, several=True
    ),
    "accelerate_local_sgd": Costed(2, (partial(AccelerateLocalSGD, sync_every=1),)),
    **{
        f"accelerate_zero{stage}": Costed(2, (by_deepspeed(stage),), Other, several=True)
        for stage in (1, 2, 3)
    },
}


@pytest.mark.parametrize("case", COSTS.values(), ids=COSTS)
def test_messages_and_memory_are_as_told(case: Costed, world) -> None:
    for ours, told in zip(world(case.ranks).run(measured, case), predicted(case), strict=True):
        same_messages(ours, told)
        assert replace(ours, messages=(), activation_bytes=0) == replace(
            told, messages=(), activation_bytes=0
        )


def test_what_it_saves_the_native_resumes(world, tmp_path: Path) -> None:
    plans = ("accelerate_zero3", "fsdp", "accelerate_ddp", "accelerate_zero1")
    cases = {name: Case("next_token", name, "fp32", steps=8) for name in plans}
    for saver, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        folder = str(tmp_path / plans[saver])
        whole = world(2).run(kept, cases[plans[saver]], 2, folder, True, False)[0]
        resumed = world(2).run(kept, cases[plans[other]], 2, folder, False, True)[0]
        assert resumed.losses == pytest.approx(whole.losses[4:], rel=TOLERANCE), (
            plans[saver],
            plans[other],
        )


def _of(made: Any, size: int = 2, environment: dict[str, str] | None = None, **plan: Any) -> str:
    with mock.patch.dict(os.environ, environment or {}):
        try:
            refuse_contradictions(Plan.of([made()] if made else [], size, **plan), 1)
        except ValueError as error:
            return str(error)
    return ""


ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_MIXED_PRECISION": "no",
}


def test_mistakes_and_contradictions_take_one_line() -> None:
    said = {
        _of(
            partial(AccelerateDDP, ddp={"bucket_mb": 3})
        ): "unexpected keyword argument 'bucket_mb'",
        _of(AccelerateDDP, 1): "use strategy=single",
        _of(
            partial(AccelerateDDP, 2), precision=Precision("bf16", reduce="bf16")
        ): "precision.reduce=bf16",
        _of(by_deepspeed(0)): "use accelerate_ddp for stage 0",
        _of(
            DDP, environment={"ACCELERATE_USE_FSDP": "true"}
        ): "ACCELERATE_USE_FSDP=true, which is AccelerateFSDP, and the strategy is DDP",
        _of(None, 1, {"ACCELERATE_USE_MEGATRON_LM": "true"}): "the strategy is single",
        _of(
            AccelerateDDP, environment={"ACCELERATE_MIXED_PRECISION": "bf16"}
        ): "MIXED_PRECISION=bf16, the run fp32: set dtype",
        _of(
            AccelerateDDP, environment={"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
        ): "set compile=true",
        _of(
            by_deepspeed(3), environment=ZERO2
        ): "ZERO_STAGE=2, the run 3: set strategy.dp.deepspeed.zero_optimization.stage",
        _of(
            by_deepspeed(2), environment=ZERO2, clip_norm=0.5
        ): "GRADIENT_CLIPPING=1.0, the run 0.5: set clip_norm",
        _of(
            by_deepspeed(2), environment=ZERO2 | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
        ): "set micro_batch_size",
        _of(
            by_deepspeed(2),
            environment=ZERO2 | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        ): "offload_optimizer",
        _of(
            None, 1, {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "1"}
        ): "has started one process alone",
    }
    for line, wanted in said.items():
        assert wanted in line and "\n" not in line
    assert _of(by_deepspeed(2), environment=ZERO2) == ""
    assert (
        _of(
            AccelerateDDP,
            environment={"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        )
        == ""
    )


def taken_up(kind: type[Strategy], size: int) -> list[str]:
    """The tensors that are not as a checkpoint had them; it had drawn ones."""
    made = Trainer(NextToken(), Plan.of([kind(size)], size).connect(), adamw, Settings(2))
    given: dict[str, torch.Tensor] = {}

    def fill(states: list[dict[str, torch.Tensor]]) -> None:
        for state in states:
            for name, tensor in sorted(state.items()):
                given[name] = tensor.normal_(generator=chance).clone()

    chance = torch.Generator().manual_seed(1)
    made.load(fill)
    found = made.state()
    assert found.keys() == given.keys() and any(name.endswith(".exp_avg_sq") for name in given)
    return [name for name, tensor in found.items() if not torch.equal(tensor, given[name])]


@pytest.mark.parametrize("kind", [AccelerateDDP, AccelerateLocalSGD])
def test_what_is_taken_from_a_checkpoint_is_there(kind: type[Strategy], world) -> None:
    """Each weight and each of Adam's moments and counts, bit for bit."""
    assert world(2).run(taken_up, kind, 2) == [[], []]
