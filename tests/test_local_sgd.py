"""Local SGD and DiLoCo against a simulation in one process whose outer step is torch's own SGD,
and against ddp.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import ROWS, STRATEGIES, TASKS, Case, adamw, plan_of, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import _train

from dtrain.cost.profile import Profile
from dtrain.parallel.strategy import full_tensor
from dtrain.strategy.ddp import DDP
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.local_sgd import LocalSGD
from dtrain.strategy.pipeline.strategy import PipelineParallel
from dtrain.strategy.tensor.strategy import TensorParallel
from dtrain.task.batch import divide
from dtrain.train import Settings, Trainer

TOLERANCE = 1e-12
STEPS = 9
Found = tuple[list[float], list[float], dict[str, torch.Tensor]]


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3)


def made(
    strategies: list[Any],
    size: int,
    optimizer: Any,
    clip_norm: float | None = None,
    steps: int = STEPS,
) -> Trainer:
    case = Case("masked_token", "local", "fp64", clip_norm=clip_norm)
    with mock.patch.dict(STRATEGIES, {"local": strategies}):
        plan = plan_of(case, size).connect()
    return Trainer(
        TASKS["masked_token"](), plan, optimizer, Settings(steps, global_batch_size=ROWS)
    )


def trained(
    strategies: list[Any], size: int, optimizer: Any = sgd, clip_norm: float | None = None
) -> Found:
    """Losses, norms, and the weights that a checkpoint would have."""
    trainer = made(strategies, size, optimizer, clip_norm)
    steps = list(trainer.steps())
    state = {
        name: full_tensor(t).clone()
        for name, t in trainer.state().items()
        if not name.startswith("optimizer.")
    }
    return [step.loss for step in steps], [step.grad_norm for step in steps], state


def simulated(
    ranks: int, options: dict[str, Any], optimizer: Any = sgd, clip_norm: float | None = None
) -> Found:
    """All ranks in this process, by loops; the outer step is torch.optim.SGD's on the mean
    difference.
    """
    o = {
        "sync_every": 8,
        "outer_lr": 1.0,
        "outer_momentum": 0.0,
        "nesterov": True,
        "num_fragments": 1,
        "sync_delay": 0,
        "keep_local": 0.5,
    } | options
    trainer = made([], 1, optimizer)
    (update,), (start,) = trainer.task.updates, trainer.models.values()
    replicas = [deepcopy(start) for _ in range(ranks)]
    inner = [optimizer(model) for model in replicas]
    names = [list(model.parameters()) for model in replicas]
    outer = [torch.nn.Parameter(p.detach().clone()) for p in names[0]]
    momentum = {
        "momentum": o["outer_momentum"],
        "nesterov": o["nesterov"] and o["outer_momentum"] > 0,
    }
    steppers = [torch.optim.SGD([p], lr=o["outer_lr"], **momentum) for p in outer]
    losses, norms, coming = [], [], []
    for step in range(STEPS):
        batch = trainer.task.batch(step)
        scale, squares, parts = ranks / update.count(batch).double(), 0.0, []
        for model, optimizer_, rows in zip(replicas, inner, divide(batch, ranks), strict=True):
            loss = update.loss({"model": model}, rows) * scale
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
            optimizer_.step()
            optimizer_.zero_grad()
            squares, parts = squares + norm.item() ** 2, [*parts, loss.item()]
        losses.append(sum(parts) / ranks)
        norms.append((squares / ranks) ** 0.5)
        for fragment in range(o["num_fragments"]):
            if (step + 1 + fragment * o["sync_every"] // o["num_fragments"]) % o["sync_every"] == 0:
                which = range(fragment, len(outer), o["num_fragments"])
                coming.append(
                    (
                        step + o["sync_delay"],
                        {
                            i: sum((outer[i] - each[i]).detach() for each in names) / ranks
                            for i in which
                        },
                    )
                )
        while coming and coming[0][0] <= step:
            for index, difference in coming.pop(0)[1].items():
                outer[index].grad = difference
                steppers[index].step()
                for each in names:
                    keep = o["keep_local"] if o["sync_delay"] else 0.0
                    each[index].data = keep * each[index].data + (1 - keep) * outer[index].data
    mean = {
        f"model.{name}": sum(dict(model.named_parameters())[name] for model in replicas).detach()
        / ranks
        for name, _ in start.named_parameters()
    }
    return losses, norms, mean


def assert_alike(found: Found, expected: Found) -> None:
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert found[1] == pytest.approx(expected[1], rel=TOLERANCE)
    for name, tensor in expected[2].items():
        difference = (found[2][name] - tensor).norm().item()
        assert difference <= 10 * TOLERANCE * tensor.norm().item(), name


@pytest.mark.parametrize("size", [2, 3])
def test_exchanging_every_step_is_ddp(size: int, world) -> None:
    expected = world(size).run(trained, [DDP], size)[0]
    for losses, _, weights in world(size).run(trained, [partial(LocalSGD, sync_every=1)], size):
        assert_alike((losses, expected[1], weights), expected)  # norms are of a rank's own gradient


OPTIONS = {
    "mean": {"sync_every": 4},
    "diloco": {"sync_every": 3, "outer_lr": 0.7, "outer_momentum": 0.9},
    "plain momentum": {"sync_every": 2, "outer_lr": 0.5, "outer_momentum": 0.6, "nesterov": False},
    "streaming": {
        "sync_every": 4,
        "outer_lr": 0.7,
        "outer_momentum": 0.9,
        "num_fragments": 3,
        "sync_delay": 2,
        "keep_local": 0.3,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_what_the_simulation_says(name: str, world) -> None:
    """With AdamW and clipping by each rank's own norm."""
    expected = world(3).run(simulated, 3, OPTIONS[name], adamw, 0.4)[0]
    for found in world(3).run(trained, [partial(LocalSGD, **OPTIONS[name])], 3, adamw, 0.4):
        assert_alike(found, expected)


drawn = st.integers(1, 6).flatmap(
    lambda every: st.fixed_dictionaries(
        {
            "sync_every": st.just(every),
            "num_fragments": st.integers(1, every),
            "sync_delay": st.integers(0, every - 1),
            "keep_local": st.sampled_from([0.0, 0.5]),
            "outer_lr": st.sampled_from([1.0, 0.7]),
            "outer_momentum": st.sampled_from([0.0, 0.9]),
            "nesterov": st.booleans(),
        }
    )
)


@settings(max_examples=5)
@given(options=drawn)
def test_any_options_are_what_the_simulation_says(options: dict[str, Any], world) -> None:
    expected = world(2).run(simulated, 2, options)[0]
    assert_alike(world(2).run(trained, [partial(LocalSGD, **options)], 2)[1], expected)


@pytest.mark.parametrize(
    "beside", [[FSDP], [partial(TensorParallel, degree=2)]], ids=["fsdp", "tensor"]
)
@pytest.mark.parametrize("name", ["mean", "streaming"])
def test_beside_others_it_is_the_same(name: str, beside: list[Any], world) -> None:
    """Two groups that share a model each.

    `fsdp` divides the rows of a group further, which changes no mean.
    """
    options = OPTIONS[name]
    alone = world(2).run(trained, [partial(LocalSGD, 2, **options)], 2, adamw, None)[0]
    for found in world(4).run(trained, [partial(LocalSGD, 2, **options), *beside], 4, adamw, None):
        assert_alike(found, alone)


def counted(strategies: list[Any], size: int, steps: int) -> dict[str, int]:
    """Bytes of all messages along dp in so many steps, after two in which ddp finds its buckets."""
    trainer = made(strategies, size, sgd, steps=steps + 2)
    with Profile(trainer.plan) as profile:
        trainer.phase = profile.phase
        sent = [
            sum(m.bytes for m in profile.traffic if m.axis == "dp") for _ in profile.steps(trainer)
        ][2:]
    return {"bytes": sum(sent), "exchanges": sum(map(bool, sent))}


@pytest.mark.parametrize(
    "options",
    [
        {"sync_every": 4},
        {"sync_every": 4, "outer_lr": 0.7, "outer_momentum": 0.9},
        {"sync_every": 4, "num_fragments": 2},
    ],
)
def test_bytes_fall_by_exactly_h(options: dict[str, Any], world) -> None:
    every = world(2).run(counted, [DDP], 2, 8)[0]
    here = world(2).run(counted, [partial(LocalSGD, **options)], 2, 8)[0]
    assert every["bytes"] == 4 * here["bytes"] > 0
    assert (every["exchanges"], here["exchanges"]) == (8, 2 * options.get("num_fragments", 1))


def test_between_exchanges_ranks_differ_and_after_them_they_agree(world) -> None:
    for sums in world(2).run(apart, {"sync_every": 3}, 2):
        assert [a == b for a, b in sums] == [False, False, True] * 3


def apart(options: dict[str, Any], size: int) -> list[list[float]]:
    trainer, found = made([partial(LocalSGD, **options)], size, adamw), []
    for _ in trainer.steps():
        own = torch.stack(
            [p.detach().sum() for m in trainer.models.values() for p in m.parameters()]
        ).sum()
        every = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        found.append([each.item() for each in every])
        before = own.item()
        trainer.evaluate()  # of the mean, which leaves each rank its own
        assert (
            before
            == torch.stack(
                [p.detach().sum() for m in trainer.models.values() for p in m.parameters()]
            ).sum()
        )
    return found


def test_a_checkpoint_at_an_exchange_goes_on_with_the_same_weights(world, tmp_path) -> None:
    """The inner moments are the ranks' mean, so with momentum-free inner steps only would the
    curve be the same.
    """
    known = {"diloco": [partial(LocalSGD, sync_every=4, outer_lr=0.7, outer_momentum=0.9)]}
    case = Case("next_token", "diloco", steps=8)
    complete = world(2).run(kept, known, case, 2, str(tmp_path / "run"), True, False)[0]
    resumed = world(2).run(kept, known, case, 2, str(tmp_path / "run"), False, True)[0]
    assert resumed.losses[0] == pytest.approx(complete.losses[4], rel=TOLERANCE)
    assert resumed.losses == pytest.approx(complete.losses[4:], rel=0.02)


def kept(known: dict[str, Any], *arguments: Any) -> Any:
    with mock.patch.dict(STRATEGIES, known):
        return _train(*arguments)


@pytest.mark.parametrize(("options", "said"), [
    ({"sync_every": 0}, "sync_every=0 must be at least 1"),
    ({"outer_lr": 0.0}, "outer_lr=0.0 must be above 0"),
    ({"outer_momentum": 1.0}, "must be from 0 to below 1"),
    ({"num_fragments": 9}, "num_fragments=9 must be from 1 to sync_every=8"),
    ({"sync_delay": 8}, "sync_delay=8 must be from 0 to below sync_every=8"),
    ({"keep_local": 1.0}, "keep_local=1.0 must be"),
])  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="strategy.dp.") as error:
        LocalSGD(2, **options)
    assert said in str(error.value)


def test_what_cannot_be_beside_it_is_refused() -> None:
    with mock.patch.dict(
        STRATEGIES,
        {
            "both": [partial(LocalSGD, 2), partial(PipelineParallel, 2)],
            "local": [partial(LocalSGD, 2)],
        },
    ):
        assert "has a step of its own" in refusal(Case("next_token", "both"), 4)
        assert refusal(Case("gan", "local"), 2) == ""


def judged(options: dict[str, Any], size: int) -> tuple[dict[str, float], ...]:
    """Metrics between exchanges; those of the ranks' mean, and of this rank's weights, alone."""
    found = made([partial(LocalSGD, sync_every=5, **options)], size, adamw)
    steps = found.steps()
    next(steps), next(steps), next(steps)
    own = [p.detach().clone() for p in found.models["model"].parameters()]
    means = [p.clone() for p in own]
    for tensor in means:
        dist.all_reduce(tensor)
        tensor /= size
    told = [found.evaluate()]
    alone = made([], 1, adamw)
    for weights in (means, own):
        for parameter, value in zip(alone.models["model"].parameters(), weights, strict=True):
            parameter.data.copy_(value)
        told.append(alone.evaluate())
    return tuple(told)


@pytest.mark.parametrize("options", [{}, {"outer_lr": 0.7, "outer_momentum": 0.9}])
def test_an_evaluation_is_of_the_ranks_mean_weights(options: dict[str, float], world) -> None:
    """Of the model that a checkpoint has, not of any rank's own."""
    for found, of_the_mean, of_its_own in world(2).run(judged, options, 2):
        assert found == pytest.approx(of_the_mean, rel=TOLERANCE)
        assert of_its_own["loss"] != pytest.approx(of_the_mean["loss"], rel=1e-9)


def begun(options: dict[str, Any], size: int, taken: bool) -> Found:
    """A run that begins with the weights of seed 1: drawn so, or taken by one that drew others."""
    with mock.patch.dict(STRATEGIES, {"local": [partial(LocalSGD, **options)]}):
        plan = plan_of(Case("masked_token", "local", "fp64", clip_norm=None), size).connect()

    def of(seed: int) -> Trainer:
        sizes = Settings(STEPS, seed, global_batch_size=ROWS)
        return Trainer(TASKS["masked_token"](), plan, adamw, sizes)

    trainer = of(1)
    if taken:
        given = {name: p.detach().clone() for name, p in trainer.models["model"].named_parameters()}

        def fill(states: list[dict[str, torch.Tensor]]) -> None:
            for name, value in given.items():
                states[0][f"model.{name}"].copy_(value)

        trainer = of(0)
        trainer.begin(fill)
    steps = list(trainer.steps())
    state = {name: t.clone() for name, t in trainer.state().items()}
    return [step.loss for step in steps], [step.grad_norm for step in steps], state


@pytest.mark.parametrize("name", ["mean", "diloco", "streaming"])
def test_it_begins_with_the_weights_that_it_is_given(name: str, world) -> None:
    """As if they had been its first: losses, weights and all states, outer ones too."""
    drawn, taken = (world(2).run(begun, OPTIONS[name], 2, each)[0] for each in (False, True))
    assert taken[:2] == drawn[:2] and taken[2].keys() == drawn[2].keys()
    assert not [key for key, tensor in taken[2].items() if not torch.equal(tensor, drawn[2][key])]
