"""Which gradients there are: rows that use other parameters than others do, and parameters that no
row uses.

The oracle is one process, which has a gradient of what any row used and steps nothing else.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import warm
from cases import STRATEGIES, Outcome, adamw, assert_all_equal, find, finish, full_tensor, plan_of
from cases import Case as Told
from test_cli import PYTHON
from torch import Tensor, nn

from dtrain.model.layout import Layout
from dtrain.run.checkpoint import Checkpoints, load
from dtrain.run.checkpoint_files import read_manifest
from dtrain.strategy.local_sgd import LocalSGD
from dtrain.task.base import Supervised, Task
from dtrain.task.batch import Batch
from dtrain.task.causal_lm import count_correct, count_targets, cross_entropy
from dtrain.train import Settings, Trainer

WORDS, TOKENS, ROWS, WIDTH = 11, 4, 12, 8
TOLERANCE = 1e-12  # relative, in fp64


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Each row takes one of two ways; a third is never taken."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.spare = Half(), Half(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        y = x.clone()
        if x.is_meta:  # a pipeline asks for shapes
            return y
        for kind, way in enumerate((self.a, self.b)):
            if (mine := kinds == kind).any():
                y = y.index_add(0, mine.nonzero().squeeze(1), way(x[mine]))
        return y


class Ways(nn.Module):
    """(B, T) tokens, (B, T) whose first column says which way a row takes -> (B, T, V)."""

    layout = Layout(
        first="first",
        blocks="blocks",
        last="last",
        column=("blocks.*.a.up", "blocks.*.b.up"),
        row=("blocks.*.a.down", "blocks.*.b.down"),
        vocabulary=("last",),
    )

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, tokens: Tensor, ways: Tensor) -> Tensor:
        x = self.first(tokens)
        for block in self.blocks:
            x = block(x, ways[:, 0])
        return self.last(x)


class Skipping(Ways):
    """Whole blocks, which fsdp exchanges when they run, are for some rows only."""

    def forward(self, tokens: Tensor, ways: Tensor) -> Tensor:
        x = self.first(tokens)
        for kind, block in enumerate(self.blocks):
            mine = (ways[:, 0] == kind) if kind < 2 else torch.ones(len(x), dtype=torch.bool)
            if mine.any():
                x = x.index_add(0, mine.nonzero().squeeze(1), block(x[mine], ways[mine, 0]))
        return self.last(x)


class Rows(Task):
    """Steps in which all rows take one way, then a half, then here and there, then but the
    last, then but the first.
    """

    WAYS = ([0] * 12, [0] * 6 + [1] * 6, [0, 1] * 6, [0] * 11 + [1], [1] + [0] * 11)

    def __init__(self, model: type[nn.Module] = Ways) -> None:
        self.models = {"model": model}
        self.updates = (
            Supervised("model", ("tokens", "ways"), cross_entropy, count_targets, count_correct),
        )

    def batch(self, step: int) -> Batch:
        tokens = torch.randint(
            1, WORDS, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(step)
        )
        ways = torch.tensor(self.WAYS[step % len(self.WAYS)])[:, None].expand(-1, TOKENS)
        return {
            "tokens": tokens[:, :-1],
            "ways": ways.contiguous(),
            "targets": tokens[:, 1:].contiguous(),
        }

    def validation(self) -> list[Batch]:
        return [self.batch(2)]

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()


class Settled(Rows):
    """Blocks that all ranks run alike until the fourth step."""

    WAYS = ([0, 1] * 6, [0, 1] * 6, [0, 1] * 6, [0] * 6 + [1] * 6)


def made(
    strategy: str,
    size: int,
    micro: int | None,
    *,
    task: Task | None = None,
    steps: int = 5,
    optimizer: Any = adamw,
    clip: float | None = 0.05,
    dtype: str = "fp64",
    seed: int = 0,
) -> Trainer:
    with mock.patch.dict(STRATEGIES, local_sgd=[partial(LocalSGD, sync_every=1)]):
        plan = plan_of(Told("", strategy, dtype, clip_norm=clip), size).connect()
    settings = Settings(steps, seed, global_batch_size=ROWS, micro_batch_size=micro, warmup_steps=1)
    return Trainer(task or Rows(), plan, optimizer, settings)


def trained(*arguments: Any, **named: Any) -> Outcome:
    return finish(made(*arguments, **named))


PLANS = [
    ("allreduce", 2, None),
    ("zero1", 3, 2),
    ("replicate", 2, 2),
    ("fsdp", 2, None),
    ("fsdp", 3, 2),
    ("zero2", 2, 2),
    ("fsdp_reduce_each", 2, 2),
    ("ddp", 2, None),
    ("ddp", 3, 2),
    ("ddp_small_buckets", 2, 3),
    ("tensor", 2, None),
    ("tensor_sequence", 2, 2),
    ("1f1b", 2, 2),
    ("zbv", 2, 2),
    ("hsdp", 4, None),
    ("hsdp_reduce_each", 4, 1),
    ("pipeline_fsdp", 4, 2),
    ("fsdp_tensor", 4, None),
]


@pytest.fixture(scope="module")
def expected(alone) -> Outcome:
    return trained("single", 1, None)


# beside another of their kind
ALIKE = ("zero2", "ddp_small_buckets", "tensor_sequence", "zbv", "hsdp")


@pytest.mark.parametrize(
    ("strategy", "size", "micro"),
    [pytest.param(*each,
                  marks=[pytest.mark.deep] if each[0] in ALIKE or each == ("ddp", 2,
                                                                           None) else []) for each in PLANS],
    ids=str,
)  # fmt: skip
def test_what_rows_do_not_use_is_zeros_or_nothing(
    strategy: str, size: int, micro: int | None, expected: Outcome, world
) -> None:
    found = world(size).run(trained, strategy, size, micro)
    assert_all_equal(found, expected, TOLERANCE)


def _kept(folder: str, strategy: str, size: int) -> Outcome:
    """Two steps, a checkpoint, and as many by another trainer that goes on from it."""
    first = made(strategy, size, None, steps=2)
    for _ in first.steps():
        pass
    Checkpoints(Path(folder), keep_last=1).save(2, first.state(), {"tokens": 0})
    return _resumed(folder, strategy, size)


def _resumed(folder: str, strategy: str, size: int) -> Outcome:
    second = made(strategy, size, None)
    second.load(partial(load, find(folder, Path(folder), Path(folder), fallback=False, note=print)))
    second.next_step = 2
    second.settings = Settings(5, global_batch_size=ROWS, warmup_steps=1)
    return finish(second)


def _whole(strategy: str, size: int) -> Outcome:
    return trained(strategy, size, None)


@pytest.mark.parametrize("strategy", ["zero1", "fsdp", "1f1b"])
def test_a_run_whose_steps_do_not_use_all_goes_on_from_its_checkpoint(
    strategy: str, world, tmp_path: Path
) -> None:
    """And what it saves, another resumes: weights that no step has used have no state there,
    and get none.
    """
    for other in (strategy, "allreduce"):
        task = _kept if other == strategy else _resumed
        for ours in world(2).run(task, str(tmp_path), other, 2):
            assert not [
                name for name in ours.weights if "spare" in name and name.startswith("optimizer.")
            ]
            assert {float(t) for n, t in ours.weights.items() if ".b.up.weight.step" in n} <= {
                4.0,
                5.0,
            }


def _steps_of(folder: str) -> dict[str, float]:
    """Of a checkpoint before any step, and of the run that goes on from it."""
    first = made("single", 1, None)
    Checkpoints(Path(folder), keep_last=1).save(0, first.state(), {"tokens": 0})
    path = find(folder, Path(folder), Path(folder), fallback=False, note=print)
    assert read_manifest(path)["step"] == 0
    second = made("single", 1, None)
    second.load(partial(load, path))
    return {"first": finish(first).losses[-1], "second": finish(second).losses[-1]}


def test_a_checkpoint_before_the_first_step_has_no_state_and_is_resumed(
    alone, tmp_path: Path
) -> None:
    losses = _steps_of(str(tmp_path))
    assert losses["first"] == losses["second"]


@pytest.mark.parametrize("strategy", ["single", "zero1", "fsdp", "local_sgd"])
def test_looking_at_the_state_changes_nothing(strategy: str, world) -> None:
    assert world(2).run(_looked, strategy) == [True, True]


def _looked(strategy: str) -> bool:
    size = 1 if strategy == "single" else 2
    plain, looked = (made(strategy, size, None, steps=3) for _ in range(2))
    looked.state()
    ours, theirs = finish(looked), finish(plain)
    same = ours.weights.keys() == theirs.weights.keys() and ours.losses == theirs.losses
    return same and all(
        torch.equal(tensor, theirs.weights[name]) for name, tensor in ours.weights.items()
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_local_sgd_takes_the_mean_of_what_some_ranks_have_stepped(world, alone) -> None:
    """With plain SGD and a mean in every step it is one process, but for what it says of a norm."""
    expected = trained("single", 1, None, optimizer=sgd, clip=None)
    for ours in world(2).run(partial(trained, optimizer=sgd, clip=None), "local_sgd", 2, None):
        assert ours.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        for name, tensor in expected.weights.items():
            assert torch.allclose(ours.weights[name], tensor, rtol=TOLERANCE, atol=1e-14)


def _averaged(steps: int) -> list[str]:
    run = made("local_sgd", 2, None, task=Settled(), steps=steps)
    for _ in run.steps():
        pass
    return sorted(run.state())


def test_states_that_one_rank_alone_has_are_averaged_with_zeros(world) -> None:
    ours, theirs = world(2).run(_averaged, 4)
    assert ours == theirs
    ours, theirs = world(2).run(partial(_alone, Rows), 2)  # rank 0 has not met the second way
    assert ours == theirs and any(".b.up.weight.exp_avg" in name for name in ours)


def _alone(task: type[Task], steps: int) -> list[str]:
    run = made("local_sgd", 2, None, task=task(), steps=steps)
    for _ in run.steps():
        pass
    found = run.state()
    assert all(full_tensor(tensor).isfinite().all() for tensor in found.values())
    return sorted(found)


class Uneven(Skipping):
    """A block that is larger than the others: messages of two sizes would meet."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].more = nn.Linear(WIDTH, WIDTH)


class Soon(Rows):
    """The first step is the last that all ranks run alike."""

    WAYS = ([0, 1] * 6, [0] * 6 + [1] * 6)


class Later(Rows):
    """In the fourth step one rank has rows of both ways, and the other of one: it runs a block
    less.
    """

    WAYS = ([0, 1] * 6, [0, 1] * 6, [0, 1] * 6, [0, 1] * 3 + [1] * 6)


def _refused(strategy: str, task: Task, *, ours: bool = False) -> str:
    with (
        mock.patch("dtrain.parallel.units.of_others", lambda _: not ours),
        mock.patch("dtrain.parallel.units.ALIKE", 3),
    ):
        run = made(strategy, 2, None, task=task, steps=4)
        try:
            for _ in run.steps():
                pass
        except ValueError as error:
            return f"{run.next_step}: {error}"
    return "nothing"


@pytest.mark.parametrize("strategy", ["fsdp", "replicate"])
def test_blocks_that_ranks_do_not_run_alike_are_refused(strategy: str, world) -> None:
    """Before their messages: of one size they would be taken for each other's."""
    for rank, said in enumerate(world(2).run(_refused, strategy, Settled(Skipping))):
        assert (
            said.startswith(f"3: 1 of 2 ranks go on to blocks.{rank}")
            and "use strategy=ddp, allreduce" in said
        )


@pytest.mark.parametrize("strategy", ["fsdp", "replicate"])
def test_how_often_each_block_has_run_is_compared_of_every_model(strategy: str, world) -> None:
    """Also of those of ours, whose ranks do not call what they run next."""
    for said in world(2).run(partial(_refused, ours=True), strategy, Settled(Skipping)):
        assert said.startswith("3: blocks.") and "use strategy=ddp, allreduce or zero1" in said


@pytest.mark.parametrize("task", [Soon, Settled, Later])
@pytest.mark.parametrize("strategy", ["fsdp", "replicate"])
def test_blocks_of_two_sizes_are_refused_before_their_messages(
    strategy: str, task: type[Task], world
) -> None:
    """In whatever step; and where one rank runs less than the other."""
    number = len(task.WAYS) - 1
    first, second = world(2).run(_refused, strategy, task(Uneven))
    assert (
        first.startswith(f"{number}: 1 of 2 ranks go on to blocks.0")
        and "use strategy=ddp, allreduce" in first
    )
    assert second.startswith(f"{number}: 1 of 2 ranks go on to blocks.1")


LATE = """
import os
from torch import nn
from dtrain.model.layout import Layout

class Late(nn.Module):
    layout = Layout(first="first", blocks="blocks", last="last")

    def __init__(self):
        super().__init__()
        self.first, self.last, self.calls = nn.Embedding(256, 8), nn.Linear(8, 256), 0
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))])

    def forward(self, tokens, positions):
        self.calls += 1
        x = self.blocks[0](self.first(tokens))
        every = self.calls <= STEPS or self.calls % 2 if os.environ["RANK"] == "1" or ALIKE else True
        return self.last(self.blocks[1](x) if every else x)
"""


@pytest.mark.parametrize("alike", [True, False])
def test_a_block_that_a_rank_leaves_out_late_is_left_out_by_all_or_ends_the_run(
    alike: bool, tmp_path: Path, cache: Path
) -> None:
    """When ranks call no more, since all have run the same for some updates."""
    (tmp_path / "late.py").write_text(LATE.replace("STEPS", "5").replace("ALIKE", str(alike)))
    command = [
        *PYTHON,
        "~model",
        "+model._target_=late.Late",
        "probe=false",
        "strategy=fsdp",
        "launch.nproc=2",
        "steps=9",
        "launch.timeout_s=6",
        "eval.every=0",
        "seq_len=8",
        "global_batch_size=4",
        "launch.threads=1",
    ]
    environment = {**os.environ, "DTRAIN_CACHE": str(cache), "PYTHONPATH": str(tmp_path)}
    process = warm.popen(command, cwd=tmp_path, env=environment)
    out, err = process.communicate()
    if alike:
        assert (process.returncode, err) == (0, "") and "step      9" in out
    else:
        said = (
            "dtrain: rank 1: rank 1 goes on to the backward pass, and others to something else: "
            "fsdp and replicate "
            "exchange a block when it runs, so all ranks must run it alike; use strategy=ddp, "
            "allreduce or zero1"
        )
        assert process.returncode == 2 and said in err.splitlines() and "Traceback" not in err


def test_ranks_that_run_other_blocks_are_no_matter_to_ddp(world, alone) -> None:
    expected = trained("single", 1, None, task=Settled(Skipping), steps=4)
    assert_all_equal(
        world(2).run(partial(trained, task=Settled(Skipping), steps=4), "ddp", 2, 2),
        expected,
        TOLERANCE,
    )


class Frozen(Ways):
    """Embedding and the first half of the blocks do not train."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)
        self.blocks[:2].requires_grad_(False)


@pytest.mark.parametrize(
    ("strategy", "size"),
    [*((each, 2) for each in ("1f1b", "gpipe", "interleaved_1f1b", "ddp", "fsdp", "zero1",
                              "tensor")), ("pipeline_fsdp", 4)],
)  # fmt: skip
def test_what_is_frozen_stays_as_it_is_also_a_whole_stage(
    strategy: str, size: int, world, alone
) -> None:
    expected = trained("single", 1, None, task=Rows(Frozen))
    assert_all_equal(
        world(size).run(partial(trained, task=Rows(Frozen)), strategy, size, 2), expected, TOLERANCE
    )


class Transposed(Ways):
    """With a parameter that is laid out by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight = nn.Parameter(torch.randn(WIDTH, WORDS).t() * 0.1)


def _saved(folder: str, size: int) -> Outcome:
    run = made("fsdp" if size > 1 else "single", size, None, task=Rows(Transposed))
    Checkpoints(Path(folder), keep_last=1).save(0, run.state(), {"tokens": 0})
    return finish(run)


def test_a_parameter_that_is_laid_out_by_columns(world, alone, tmp_path: Path) -> None:
    expected = _saved(str(tmp_path / "1"), 1)
    assert_all_equal(world(2).run(_saved, str(tmp_path / "2"), 2), expected, TOLERANCE)
