"""Every mistake that a plan, a strategy, a layout or a configuration refuses: what is said.

One table holds them all; a test reads the sources and finds what the table lacks.
"""

from __future__ import annotations

import ast
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import GAN, MLP, NextToken
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from own_models import MODELS
from torch import Tensor, nn

import dtrain
from dtrain.cli import exits
from dtrain.compare.command import Failed
from dtrain.config.build import build
from dtrain.config.errors import NO_MORE_PROCESSES
from dtrain.config.groups import CONFIGS, check_axes
from dtrain.config.schema import Comparison, register, validated
from dtrain.data.base import Data
from dtrain.data.rows import Rows
from dtrain.data.sources import Source, StandardLibrary
from dtrain.data.tokenizer import Bytes, Tokenizer
from dtrain.launch import rank_processes
from dtrain.launch.hang_detector import Hang
from dtrain.launch.rank_processes import RanksFailed
from dtrain.launch.world import World
from dtrain.model.block import Core
from dtrain.model.layout import Layout, ModelFactory, refuse_batch_norm, sequence_length
from dtrain.model.transformer import Transformer
from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision
from dtrain.parallel.strategy import Strategy
from dtrain.run.assemble import COMPILERS, assemble, optimizer_of
from dtrain.strategy.accelerate.ddp import AccelerateDDP
from dtrain.strategy.accelerate.deepspeed import AccelerateDeepSpeed
from dtrain.strategy.accelerate.fsdp import AccelerateFSDP
from dtrain.strategy.accelerate.local_sgd import AccelerateLocalSGD
from dtrain.strategy.allreduce import AllReduce
from dtrain.strategy.context.strategy import ContextParallel
from dtrain.strategy.ddp import DDP
from dtrain.strategy.deepspeed.autotp import AutoTP
from dtrain.strategy.deepspeed.pipeline import DeepSpeedPipeline
from dtrain.strategy.deepspeed.ulysses import DeepSpeedUlysses
from dtrain.strategy.deepspeed.zero import DeepSpeed
from dtrain.strategy.expert import ExpertParallel
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.local_sgd import LocalSGD
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.pipeline.strategy import PipelineParallel
from dtrain.strategy.replicate import Replicate
from dtrain.strategy.tensor.strategy import TensorParallel
from dtrain.strategy.zero1 import Zero1
from dtrain.task.base import Sizes, Task
from dtrain.train import NonFinite

SOURCE = Path(dtrain.__file__).parent
ROOMS = (
    "strategy/*.py",
    "strategy/*/strategy.py",
    *(f"strategy/accelerate/{name}.py" for name in ("ddp", "local_sgd", "fsdp", "deepspeed")),
    *(f"strategy/deepspeed/{name}.py" for name in ("zero", "autotp", "pipeline", "ulysses")),
    "parallel/plan.py",
    "parallel/mesh.py",
    "parallel/strategy.py",
    "config/schema.py",
    "config/groups.py",
    "config/build.py",
    "model/layout.py",
    "run/assemble.py",
)
NOT_ASKED = ("cost",)  # functions that say only that a prediction is not known: nobody's mistake


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """Whatever is refused here is refused by one process alone, before it meets others."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a process group was started")

    assert not dist.is_initialized()
    with mock.patch.object(dist, "init_process_group", started):
        yield
    assert not dist.is_initialized()


# What is asked for: models and tasks that do not fit


class Bare(nn.Module):
    """Blocks whose attention is named, and nothing said of heads."""

    layout = Layout(first="first", blocks="blocks", last="last", attention="core")

    def __init__(self, core: type[Core] = Core) -> None:
        super().__init__()
        block = nn.Module()
        block.core = core(causal=True, dropout=0.0)
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.blocks = nn.ModuleList([block])


class Lost(nn.Module):
    """It takes nothing."""

    def forward(self) -> None: ...


def lost() -> None:
    """Ask tensor parallelism for a model that does not run."""
    task = NextToken()
    task.models = {"model": Lost}
    TensorParallel(2).check_task(task, Plan.of([], 1))


class Doubled(Core):
    """Attention of another kind."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(2 * q, k, v)


class Sharing(nn.Module):
    """Two blocks with one matrix."""

    layout = Layout(first="first", blocks="blocks", last="last")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.blocks[1].weight = self.blocks[0].weight


class Elsewhere(Strategy):
    axis: ClassVar[str] = "elsewhere"


class Together(NextToken):
    """Compares the tokens of a row."""

    mixes_tokens = True


class ARow(NextToken):
    """One target for a whole row."""

    def batch(self, step: int) -> dict[str, Tensor]:
        return super().batch(step) | {"weight": torch.ones(self.rows, 1)}


class Unplaced(NextToken):
    """Tells its model no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = (replace(self.updates[0], inputs=("tokens",)),)


class Following(NextToken):
    """With a second model that follows the first."""

    def __init__(self) -> None:
        super().__init__()
        self.models |= {"average": self.models["model"]}


class Frozen(NextToken):
    """Nothing of its model trains."""

    def __init__(self) -> None:
        super().__init__()
        self.models = {"model": lambda: GPT().requires_grad_(False)}


def frozen_first() -> nn.Module:
    """A model whose embedding and first block do not train."""
    model = GPT()
    for part in (
        model.get_submodule(model.layout.first),
        model.get_submodule(f"{model.layout.blocks}.0"),
    ):
        part.requires_grad_(False)
    return model


def with_attribute(value: object) -> nn.Module:
    """A model on one of whose weights something is written."""
    model = GPT()
    next(model.parameters()).scale = value
    return model


class Stepper(torch.optim.SGD):
    """An optimizer of its author's."""

    def __init__(self) -> None:
        super().__init__([nn.Parameter(torch.ones(1))])


class Curved(GAN):
    """Its losses hold gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = tuple(replace(update, second_order=True) for update in self.updates)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), nn.BatchNorm1d(2))


class Holding(nn.Module):
    """A module in a module."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


def on_model(strategy: Strategy, model: ModelFactory, ranks: int, *others: Strategy) -> None:
    """Ask for a model under strategies."""
    with torch.device("meta"):
        made = model()
    Plan.of([strategy, *others], ranks).check_model(made)


def on_task(strategy: Strategy, task: Task, ranks: int, *beside: Strategy) -> None:
    """Ask for a task under strategies."""
    Plan.of([strategy, *beside], ranks).check_updates(task)


def zero(stage: int, **settings: Any) -> DeepSpeed:
    return DeepSpeed(2, {"zero_optimization": {"stage": stage}, **settings})


def accelerated(stage: int) -> AccelerateDeepSpeed:
    return AccelerateDeepSpeed(2, {"zero_optimization": {"stage": stage}})


def missing(package: str, strategy: Strategy, where: str) -> None:
    """Ask for a strategy without the package that it needs."""
    found = {package: None}
    with mock.patch(f"dtrain.strategy.{where}.find_spec", lambda name: found.get(name, object())):
        Plan.of([strategy], 2)


GPT = partial(Transformer, 61, 24, 24, 2, 12)
FP16 = {"fp16": {"enabled": True}}
BF16, NARROW = Precision("bf16"), Precision("bf16", weights="bf16")


# What is asked for: configurations


def composed(name: str, *overrides: str) -> Any:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides))


def run(*overrides: str, ranks: int = 1) -> None:
    """Ask for a run, as far as that needs no data."""
    assemble(validated(composed("train", "model=tiny", *overrides)), World(0, ranks, 0, ranks))


def both(*names: str) -> None:
    """Ask for several strategies by their names."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        check_axes(list(names))


def built(target: str, **arguments: Any) -> Strategy:
    """Ask for a strategy by its class."""
    return build({"_target_": target, **arguments}, Strategy, "strategy.dp")


def text(**tokenizer: Any) -> Data:
    """Ask for text with this tokenizer."""
    source = {"_target_": "dtrain.data.sources.StandardLibrary"}
    node = {"_target_": "dtrain.data.text.Text", "name": "x", "cache": "x", "source": source}
    return build(node | {"tokenizer": tokenizer}, Data, "data", parts=(Source, Tokenizer))


def task_of_rows() -> Task:
    """Ask for a language model of labelled rows."""
    data = Rows("functions", StandardLibrary(), Bytes())
    node, sizes = {"_target_": "dtrain.task.causal_lm.CausalLM"}, Sizes(0, 1, None, 1)
    return build(node, Task, "task", models={"model": GPT}, data=data, sizes=sizes)


def without_compilers() -> None:
    with mock.patch("shutil.which", return_value=None):
        run("compile=true")


def lacking(body: str) -> None:
    """Ask for a class of a module that cannot be imported."""
    with TemporaryDirectory() as folder, mock.patch.object(sys, "path", [folder, *sys.path]):
        (Path(folder) / "lacking.py").write_text(body)
        sys.modules.pop("lacking", None)
        built("lacking.Mine")


DDP_CLASS = "dtrain.strategy.ddp.DDP"


@dataclass(frozen=True)
class Refusal:
    """A mistake: how it is made; which option, which value and which remedy are named."""

    ask: Callable[[], object]
    option: str
    value: str
    remedy: str


def own(model: str, *strategies: Strategy) -> None:
    Plan.of(list(strategies), 2 if strategies else 1).check_model(MODELS[model]())


REFUSALS = {
    "tensor, a model that does not run": Refusal(
        lost, "Lost", "does not run on two rows", "let it run on one process first"
    ),
    # the mesh
    "an axis that there is not": Refusal(
        lambda: Plan.of([Elsewhere()], 2),
        "strategy Elsewhere",
        "axis elsewhere",
        "pp, dp, fsdp, cp, ep, tp",
    ),
    "two on one axis": Refusal(
        lambda: Plan.of([DDP(), Replicate()], 4), "DDP and Replicate", "axis dp", "choose one"
    ),
    "no ranks": Refusal(
        lambda: Plan.of([FSDP(-3)], 4), "strategy.fsdp.degree", "=-3", "at least 1, or -1"
    ),
    "too few ranks": Refusal(
        lambda: Plan.of([DDP(3)], 4), "strategy dp=3", "the job has 4", "uses 3 ranks"
    ),
    "a rest that does not come out even": Refusal(
        lambda: Plan.of([Replicate(2), FSDP()], 5),
        "strategy dp=2 x fsdp=rest",
        "the job has 5",
        "uses a multiple of 2 ranks",
    ),
    "no strategy": Refusal(
        lambda: Plan.of([], 2), "strategy single", "the job has 2", "choose a strategy: ddp"
    ),
    "a rest of one": Refusal(
        lambda: Plan.of([Replicate(), FSDP()], 2),
        "dp=rest x fsdp=rest",
        "the job has 2",
        "at least 2 ranks on each of dp and fsdp: 4 or more in all, the job has 2; or set "
        "strategy.dp.degree",
    ),
    "rows of a rank": Refusal(
        lambda: Plan.of([DDP()], 4).micro_batches(10, 2),
        "global_batch_size",
        "=10 is not divisible by 4 data-parallel ranks x micro_batch_size=2",
        "use global_batch_size=8 or 16",
    ),
    "blocks to compute again": Refusal(
        lambda: Plan.of([], 1, recompute=True).check_model(MLP(2, 2, 2)),
        "activation_checkpointing",
        "=true acts on a model's blocks, and MLP names none in a Layout",
        "use activation_checkpointing=false",
    ),
    "blocks to compile": Refusal(
        lambda: Plan.of([], 1, compile=True).check_model(MLP(2, 2, 2)),
        "compile",
        "=true acts on a model's blocks, and MLP names none in a Layout",
        "use compile=false",
    ),
    # the layout
    "batch norm": Refusal(
        lambda: refuse_batch_norm(Normed()), "batch norm", "Normed", "use GroupNorm or LayerNorm"
    ),
    "batch norm under a plan": Refusal(
        lambda: on_model(DDP(), Normed, 2), "batch norm", "Normed", "use GroupNorm or LayerNorm"
    ),
    "no length": Refusal(
        lambda: sequence_length(nn.Linear(1, 1), None), "seq_len", "does not say", "set seq_len"
    ),
    "too long": Refusal(
        lambda: sequence_length(GPT(), 25),
        "seq_len",
        "=25 is longer than the model's context=24",
        "use at most 24, or set model.context",
    ),
    # ddp
    "ddp, no bucket": Refusal(
        lambda: DDP(2, bucket_mb=-1.5), "strategy.dp.bucket_mb", "=-1.5", "more than 0"
    ),
    "ddp, an empty bucket": Refusal(
        lambda: DDP(2, bucket_mb=0.0), "strategy.dp.bucket_mb", "=0.0", "more than 0"
    ),
    "ddp beside fsdp": Refusal(
        lambda: Plan.of([DDP(2), FSDP(2)], 4), "strategy ddp", "beside fsdp", "use replicate"
    ),
    "ddp, a narrow sum": Refusal(
        lambda: Plan.of([DDP()], 2, precision=Precision("bf16", reduce="bf16")),
        "precision.reduce",
        "=bf16",
        "use replicate or fsdp",
    ),
    # fsdp
    "fsdp, each micro-batch, beside a pipeline": Refusal(
        lambda: Plan.of([FSDP(2, reduce_each=True), PipelineParallel(2)], 4),
        "strategy.fsdp.reduce_each",
        "=true",
        "use reduce_each=false",
    ),
    "fsdp, weights put away too early": Refusal(
        lambda: Plan.of([FSDP(2), PipelineParallel(2, schedule="zbv")], 4),
        "strategy.fsdp.reshard_after_forward",
        "schedule zbv computes",
        "use strategy.fsdp.reshard_after_forward=false",
    ),
    # tensor
    "tensor, nothing to split": Refusal(
        lambda: on_model(TensorParallel(), Bare, 2),
        "`column`",
        "Bare",
        "use a strategy on dp or fsdp",
    ),
    "tensor, no tokens to cut": Refusal(
        lambda: on_model(TensorParallel(sequence_parallel=True), partial(MLP, 2, 2, 2), 2),
        "`first`",
        "MLP",
        "use sequence_parallel=false",
    ),
    "tensor, heads": Refusal(
        lambda: on_model(TensorParallel(), GPT, 5), "tp=5", "n_heads=12", "use 1, 2, 3, 4, 6, 12"
    ),
    "tensor, outputs": Refusal(
        lambda: on_model(TensorParallel(), partial(MLP, 6, 10, 1), 4),
        "tp=4",
        "the 10 outputs of MLP's up",
        "use 1, 2, 5, 10",
    ),
    "tensor, whole outputs": Refusal(
        lambda: on_task(TensorParallel(), Together(), 2),
        "loss",
        "task Together",
        "use strategy.tp.loss_parallel=false",
    ),
    "tensor, tokens": Refusal(
        lambda: on_task(TensorParallel(sequence_parallel=True), NextToken(), 5),
        "5 (tp x cp",
        "seq_len=24",
        "use 20 or 25",
    ),
    # context
    "context, a method": Refusal(
        lambda: Plan.of([ContextParallel(method="spiral")], 2),
        "strategy.cp.method",
        "=spiral",
        "use ring, ulysses",
    ),
    "context, no attention": Refusal(
        lambda: on_model(ContextParallel(), partial(MLP, 2, 2, 2), 2),
        "`attention`",
        "MLP",
        "use a strategy on dp or fsdp",
    ),
    "context, dropout": Refusal(
        lambda: on_model(ContextParallel(), partial(GPT, dropout=0.3), 2),
        "dropout",
        "=0.3",
        "use strategy.cp.method=ulysses or model.dropout=0",
    ),
    "context, another attention": Refusal(
        lambda: Plan.of([ContextParallel()], 2).check_model(Bare(Doubled)),
        "attention",
        "Bare",
        "use strategy.cp.method=ulysses",
    ),
    "context, experts that count": Refusal(
        lambda: on_model(ContextParallel(), partial(GPT, n_experts=4, capacity_factor=1.5), 2),
        "cp=2",
        "experts of Transformer",
        "use model.capacity_factor=null and model.balance=bias",
    ),
    "context, unknown heads": Refusal(
        lambda: on_model(ContextParallel(method="ulysses"), Bare, 2),
        "n_heads",
        "Bare",
        "use strategy.cp.method=ring",
    ),
    "context, heads": Refusal(
        lambda: on_model(ContextParallel(method="ulysses"), GPT, 5),
        "cp=5",
        "n_heads=12",
        "use 1, 2, 3, 4, 6, 12",
    ),
    "context, heads that tp has split": Refusal(
        lambda: on_model(ContextParallel(3, method="ulysses"), GPT, 18, TensorParallel(6)),
        "cp=3",
        "n_heads=12 / tp=6",
        "use 1, 2",
    ),
    "context, no positions": Refusal(
        lambda: on_task(ContextParallel(), Unplaced(), 2),
        "`positions`",
        "task Unplaced",
        "use strategy=ddp",
    ),
    "context, a value a row": Refusal(
        lambda: on_task(ContextParallel(), ARow(), 2),
        "cp=2",
        "`weight` of the batch",
        "use a strategy on another axis",
    ),
    "context, tokens": Refusal(
        lambda: on_task(ContextParallel(), NextToken(), 5), "2 x cp=5", "seq_len=24", "use 20 or 30"
    ),
    "context, tokens of a ring": Refusal(
        lambda: on_task(ContextParallel(), NextToken(), 8),
        "2 x cp=8 (each rank takes two chunks of the balanced ring)",
        "seq_len=24",
        "use 16 or 32, or strategy.cp.balanced=false",
    ),
    # experts
    "expert, none": Refusal(
        lambda: on_model(ExpertParallel(), GPT, 2),
        "Transformer has no experts (model.n_experts",
        "=0",
        "use model=moe",
    ),
    "expert, too many": Refusal(
        lambda: on_model(ExpertParallel(), partial(GPT, n_experts=6), 4),
        "ep=4",
        "n_experts=6",
        "use 1, 2, 3, 6 ranks along ep",
    ),
    # pipeline
    "pipeline, a schedule": Refusal(
        lambda: PipelineParallel(2, schedule="2f2b"),
        "strategy.pp.schedule",
        "=2f2b",
        "use gpipe, 1f1b",
    ),
    "pipeline, stages of a rank": Refusal(
        lambda: PipelineParallel(2, stages_per_rank=3),
        "strategy.pp.stages_per_rank",
        "=3",
        "schedule 1f1b holds 1 a rank",
    ),
    "pipeline, no stages": Refusal(
        lambda: PipelineParallel(2, schedule="looped_bfs", stages_per_rank=0),
        "strategy.pp.stages_per_rank",
        "=0",
        "holds 2 or more a rank",
    ),
    "pipeline, a split in words": Refusal(
        lambda: PipelineParallel(2, split=["a", 1]),
        "strategy.pp.split",
        "=['a', 1]",
        "such as [5,3]",
    ),
    "pipeline, no micro-batches": Refusal(
        lambda: PipelineParallel(2, micro_batches=0),
        "strategy.pp.micro_batches",
        "=0",
        "at least 1",
    ),
    "pipeline, compiled": Refusal(
        lambda: Plan.of([PipelineParallel(2, schedule="zbv")], 2, compile=True),
        "schedule zbv",
        "compile=true",
        "use compile=false",
    ),
    "pipeline, no blocks": Refusal(
        lambda: on_model(PipelineParallel(2), partial(MLP, 2, 2, 2), 2),
        "pipeline",
        "MLP",
        "use a strategy on dp or fsdp",
    ),
    "pipeline, too few blocks": Refusal(
        lambda: on_model(PipelineParallel(3), GPT, 3),
        "pp=3 x 1 stages a rank are 3 stages",
        "the model has 2 blocks",
        "use at most pp=2, or more blocks",
    ),
    "pipeline, too few blocks for a round": Refusal(
        lambda: on_model(PipelineParallel(2, schedule="looped_bfs", stages_per_rank=3), GPT, 2),
        "pp=2 x 3 stages a rank",
        "the model has 2 blocks",
        "use schedule gpipe or 1f1b",
    ),
    "pipeline, a split that does not sum up": Refusal(
        lambda: on_model(PipelineParallel(2, split=[2, 1]), GPT, 2),
        "strategy.pp.split",
        "=[2, 1]",
        "must be 2 numbers of at least 1 that sum to the model's 2 blocks",
    ),
    "pipeline, shared weights": Refusal(
        lambda: on_model(PipelineParallel(2), Sharing, 2),
        "Sharing shares",
        "blocks.0.weight with blocks.1.weight",
        "only first and last module may share",
    ),
    "fsdp, a weight in two blocks": Refusal(
        lambda: on_model(FSDP(2), Sharing, 2),
        "Sharing shares",
        "blocks.0.weight with blocks.1.weight",
        "use strategy=ddp, allreduce or zero1",
    ),
    "replicate, a weight in two blocks": Refusal(
        lambda: on_model(Replicate(2), Sharing, 2),
        "Sharing shares",
        "strategy replicate exchanges each block",
        "use strategy=ddp, allreduce or zero1",
    ),
    "nothing trains": Refusal(
        lambda: Plan.of([], 1).check_task(Frozen()),
        "nothing of Transformer trains",
        "requires_grad",
        "false of all",
    ),
    "pipeline, two models": Refusal(
        lambda: on_task(PipelineParallel(2), GAN(), 2),
        "pipeline",
        "task GAN",
        "use a strategy on dp or fsdp",
    ),
    "pipeline, two numbers of micro-batches": Refusal(
        lambda: Plan.of([PipelineParallel(2, micro_batches=3)], 2).micro_batches(12, 2),
        "strategy.pp.micro_batches",
        "=3 x micro_batch_size=2 is not the 12 rows",
        "set one of them",
    ),
    "pipeline, too few rows": Refusal(
        lambda: Plan.of([PipelineParallel(4)], 4).micro_batches(3, None),
        "schedule 1f1b on pp=4 needs at least 4 micro-batches",
        "a rank has 3 rows",
        "use more rows (global_batch_size) or gpipe",
    ),
    "pipeline, uneven micro-batches": Refusal(
        lambda: Plan.of([PipelineParallel(2, micro_batches=5)], 2).micro_batches(12, None),
        "schedule 1f1b on pp=2",
        "12 rows in 5",
        "use strategy.pp.micro_batches=2 or 3 or 4 or 6 or 12",
    ),
    # local SGD
    "local_sgd beside a pipeline": Refusal(
        lambda: Plan.of([LocalSGD(2), PipelineParallel(2)], 4),
        "strategy local_sgd",
        "pipeline",
        "use fsdp or tensor",
    ),
    "local_sgd, more fragments than weights": Refusal(
        lambda: on_model(LocalSGD(num_fragments=7), partial(MLP, 2, 2, 2), 2),
        "strategy.dp.num_fragments",
        "=7",
        "more than the model's 4 weights",
    ),
    "local_sgd, a model that follows": Refusal(
        lambda: on_task(LocalSGD(), Following(), 2), "task Following", "follows another", "use ddp"
    ),
    **{
        f"local_sgd, {name}": Refusal(
            partial(LocalSGD, 2, **{name: value}), f"strategy.dp.{name}", f"={value}", remedy
        )
        for name, value, remedy in (
            ("sync_every", -2, "at least 1"),
            ("outer_lr", -0.5, "above 0"),
            ("outer_momentum", 1.5, "from 0 to below 1"),
            ("num_fragments", 17, "from 1 to sync_every=8"),
            ("sync_delay", 13, "from 0 to below sync_every=8"),
            ("keep_local", 1.25, "from 0 to below 1"),
        )
    },
    # the parameter server
    "parameter_server beside fsdp": Refusal(
        lambda: Plan.of([ParameterServer(2), FSDP(2)], 4),
        "strategy parameter_server",
        "beside fsdp",
        "use replicate in its place",
    ),
    "parameter_server, no workers": Refusal(
        lambda: Plan.of([ParameterServer(servers=3)], 3),
        "3 servers",
        "has 3 ranks",
        "start 4 or more",
    ),
    "parameter_server, compiled": Refusal(
        lambda: Plan.of([ParameterServer()], 3, compile=True),
        "strategy parameter_server",
        "compile",
        "use compile=false",
    ),
    "parameter_server, thin matrices in bf16": Refusal(
        lambda: Plan.of([ParameterServer(compression="power_sgd")], 3, precision=NARROW),
        "strategy.dp.compression=power_sgd",
        "bf16",
        "keep weights in fp32",
    ),
    "parameter_server, on GPUs": Refusal(
        lambda: Plan.of([ParameterServer()], 3, device=torch.device("cuda")),
        "strategy parameter_server",
        "from host memory",
        "use device=cpu",
    ),
    "parameter_server, more than there are weights": Refusal(
        lambda: on_model(ParameterServer(servers=5), partial(MLP, 2, 2, 2), 8),
        "strategy.dp.servers",
        "=5",
        "more than the model's 4 weights",
    ),
    "parameter_server, loads of experts": Refusal(
        lambda: on_model(ParameterServer(), partial(GPT, n_experts=4), 3),
        "keeps more than weights",
        "Transformer",
        "use ddp",
    ),
    "parameter_server, a model that follows": Refusal(
        lambda: on_task(ParameterServer(servers=2), Following(), 4),
        "several servers",
        "task Following",
        "use strategy.dp.servers=1",
    ),
    **{
        f"parameter_server, {name}": Refusal(
            partial(ParameterServer, 3, **{name: value}), f"strategy.dp.{name}", f"={value}", remedy
        )
        for name, value, remedy in (
            ("mode", "later", "one of async, bounded, sync"),
            ("max_staleness", -7, "at least 0"),
            ("compression", "zip", "one of none, fp16"),
            ("servers", -7, "at least 1"),
            ("restarts", -7, "at least 0"),
            ("top_k_fraction", 1.75, "above 0, at most 1"),
            ("power_sgd_rank", -7, "at least 1"),
        )
    },
    # Accelerate
    "accelerate_ddp alone": Refusal(
        lambda: Plan.of([AccelerateDDP()], 1), "Accelerate", "on one rank", "use strategy=single"
    ),
    "accelerate_local_sgd, no steps": Refusal(
        lambda: AccelerateLocalSGD(2, sync_every=0),
        "strategy.dp.sync_every",
        "=0 must",
        "at least 1",
    ),
    "accelerate_local_sgd, a model that follows": Refusal(
        lambda: on_task(AccelerateLocalSGD(), Following(), 2),
        "task Following",
        "follows another",
        "use accelerate_ddp",
    ),
    "accelerate_fsdp beside tensor": Refusal(
        lambda: Plan.of([AccelerateFSDP(2), TensorParallel(2)], 4),
        "strategy accelerate_fsdp",
        "beside tp",
        "use fsdp there",
    ),
    "accelerate_fsdp on a CPU": Refusal(
        lambda: Plan.of([AccelerateFSDP()], 2), "FSDP plugin", "on a CPU", "use strategy=fsdp"
    ),
    "accelerate_fsdp, two models": Refusal(
        lambda: Plan((AccelerateFSDP(2),), 2).check_updates(GAN()),
        "strategy accelerate_fsdp",
        "task GAN trains 2 models",
        "use accelerate_ddp",
    ),
    "accelerate_deepspeed, two models": Refusal(
        lambda: on_task(accelerated(1), GAN(), 2),
        "strategy accelerate_deepspeed",
        "task GAN trains 2 models",
        "use accelerate_ddp",
    ),
    "accelerate_deepspeed without transformers": Refusal(
        lambda: missing("transformers", AccelerateDeepSpeed(), "accelerate.deepspeed"),
        "DeepSpeed plugin",
        "the package transformers",
        "pip install transformers",
    ),
    "accelerate_deepspeed, stage 0": Refusal(
        lambda: Plan.of([AccelerateDeepSpeed()], 2),
        "strategy accelerate_deepspeed",
        "stage 0",
        "use accelerate_ddp",
    ),
    "accelerate_deepspeed beside fsdp": Refusal(
        lambda: Plan.of([accelerated(1), FSDP(2)], 4),
        "strategy accelerate_deepspeed",
        "beside fsdp",
        "use fsdp or zero1 there",
    ),
    "accelerate_deepspeed without DeepSpeed": Refusal(
        lambda: missing("deepspeed", accelerated(1), "deepspeed.zero"),
        "strategy accelerate_deepspeed",
        "the package deepspeed",
        "pip install",
    ),
    "accelerate_deepspeed, weights": Refusal(
        lambda: Plan.of([accelerated(1)], 2, precision=Precision("fp64")),
        "strategy accelerate_deepspeed",
        "dtype=fp64",
        "use fp32 or bf16",
    ),
    "accelerate_deepspeed, a narrow sum": Refusal(
        lambda: Plan.of([accelerated(1)], 2, precision=Precision("bf16", reduce="bf16")),
        "not for strategy accelerate_deepspeed",
        "precision.reduce=bf16",
        "set strategy.dp.deepspeed.communication_data_type",
    ),
    # DeepSpeed
    "deepspeed, what the run says": Refusal(
        lambda: DeepSpeed(2, {"train_batch_size": 77}),
        "strategy.dp.deepspeed.train_batch_size",
        "=77",
        "use global_batch_size",
    ),
    "deepspeed, slices in turns": Refusal(
        lambda: DeepSpeed(2, {"zero_optimization": {"stage": 1, "round_robin_gradients": True}}),
        "round_robin_gradients",
        "=true",
        "use false",
    ),
    "deepspeed, a stage": Refusal(
        lambda: zero(4), "strategy.dp.deepspeed.zero_optimization.stage", "=4", "0, 1, 2 or 3"
    ),
    "deepspeed beside fsdp": Refusal(
        lambda: Plan.of([zero(1), FSDP(2)], 4),
        "strategy deepspeed",
        "beside fsdp",
        "use fsdp or zero1 there",
    ),
    "deepspeed without its package": Refusal(
        lambda: missing("deepspeed", zero(1), "deepspeed.zero"),
        "strategy deepspeed",
        "the package deepspeed",
        "pip install",
    ),
    "deepspeed, weights": Refusal(
        lambda: Plan.of([zero(1)], 2, precision=Precision("fp64")),
        "strategy deepspeed",
        "dtype=fp64",
        "use fp32 or bf16",
    ),
    "deepspeed_autotp, stage 0": Refusal(
        lambda: Plan.of([zero(0), AutoTP(2)], 4),
        "strategy deepspeed_autotp",
        "stage 0",
        "stages 1, 2 and 3",
    ),
    "deepspeed, bf16 at stage 0": Refusal(
        lambda: Plan.of([zero(0)], 2, precision=BF16),
        "stage 0",
        "dtype=bf16",
        "use stage 1, 2 or 3",
    ),
    "deepspeed, a narrow sum": Refusal(
        lambda: Plan.of([zero(1)], 2, precision=Precision("bf16", reduce="bf16")),
        "precision.reduce",
        "=bf16",
        "set strategy.dp.deepspeed.communication_data_type",
    ),
    "deepspeed, compiled": Refusal(
        lambda: Plan.of([zero(1)], 2, compile=True), "compile", "=true", "use compile=false"
    ),
    "deepspeed, fp16 with bf16": Refusal(
        lambda: Plan.of([zero(1, **FP16)], 2, precision=BF16),
        "strategy.dp.deepspeed.fp16.enabled=true",
        "dtype=bf16, stage 1, 1 axes",
        "use dtype=bf16 there",
    ),
    "deepspeed, a loss that holds gradients": Refusal(
        lambda: on_task(zero(1), Curved(), 2),
        "holds gradients",
        "task Curved",
        "use another loss, or strategy=zero1",
    ),
    "deepspeed, two models": Refusal(
        lambda: on_task(zero(3), GAN(), 2), "stage 3", "task GAN trains 2 models", "use stage 1"
    ),
    "deepspeed_autotp without its ZeRO": Refusal(
        lambda: Plan.of([AutoTP(2), DDP(2)], 4),
        "strategy deepspeed_autotp",
        "DeepSpeed's",
        "use strategy=deepspeed_autotp, or tensor",
    ),
    "deepspeed_autotp, nothing to split": Refusal(
        lambda: on_model(AutoTP(2), Bare, 4, zero(1)),
        "`column`",
        "Bare",
        "use a strategy on dp or fsdp",
    ),
    "deepspeed_autotp, experts": Refusal(
        lambda: on_model(AutoTP(2), partial(GPT, n_experts=4), 4, zero(1)),
        "AutoTP",
        "experts",
        "use strategy=tensor",
    ),
    "deepspeed_autotp, heads": Refusal(
        lambda: on_model(AutoTP(5), GPT, 10, zero(1)), "tp=5", "n_heads=12", "use 1, 2, 3, 4, 6, 12"
    ),
    "deepspeed_autotp, a model that follows": Refusal(
        lambda: on_task(AutoTP(2), Following(), 4, zero(1)),
        "average of task Following",
        "follows another",
        "use strategy=tensor",
    ),
    "deepspeed_pipeline without its ZeRO": Refusal(
        lambda: Plan.of([DeepSpeedPipeline(2), DDP(2)], 4),
        "strategy deepspeed_pipeline",
        "ZeRO on dp",
        "use strategy=pipeline",
    ),
    "deepspeed_pipeline, nothing trains": Refusal(
        lambda: on_model(DeepSpeedPipeline(2), frozen_first, 4, zero(1)),
        "nothing trains in stage 0",
        "of 2",
        "use strategy=pipeline",
    ),
    "no clipping by nought": Refusal(
        lambda: run("clip_norm=0"), "clip_norm", "=0.0 must be more than 0", "or null"
    ),
    "deepspeed_pipeline, a stage": Refusal(
        lambda: Plan.of([DeepSpeedPipeline(2), zero(2)], 4),
        "DeepSpeed's pipeline refuses it",
        "at stage 2",
        "use stage 1",
    ),
    "deepspeed_pipeline, stage 0": Refusal(
        lambda: Plan.of([DeepSpeedPipeline(2), zero(0)], 4),
        "DeepSpeed's pipeline tells no norm",
        "at stage 0",
        "use stage 1",
    ),
    "deepspeed_ulysses without its ZeRO": Refusal(
        lambda: Plan.of([DeepSpeedUlysses(2), AllReduce(2)], 4),
        "strategy deepspeed_ulysses",
        "ZeRO on dp",
        "use strategy=context strategy.cp.method=ulysses",
    ),
    "deepspeed_ulysses, one rank": Refusal(
        lambda: Plan.of([DeepSpeedUlysses(1), zero(1)], 2),
        "strategy.cp.degree",
        "=1",
        "2 or more ranks",
    ),
    "deepspeed_ulysses, key heads": Refusal(
        lambda: on_model(DeepSpeedUlysses(2), partial(GPT, n_kv_heads=3), 4, zero(1)),
        "cp=2",
        "n_kv_heads=3",
        "use 1, 3",
    ),
    # a configuration
    "strategies that Hydra would merge": Refusal(
        lambda: both("allreduce", "zero1"), "allreduce and zero1", "axis dp", "choose one of them"
    ),
    "a part that refuses its argument": Refusal(
        lambda: text(_target_="dtrain.data.tokenizer.Bytes", vocab_size=77),
        "data.tokenizer.vocab_size",
        "=77",
        "use data/tokenizer=bpe",
    ),
    "an argument that there is not": Refusal(
        lambda: built(DDP_CLASS, depth=3), "strategy.dp", "'depth'", "unexpected keyword argument"
    ),
    "an argument that is missing": Refusal(
        lambda: build({"_target_": "dtrain.data.sources.Files"}, Source, "data.source"),
        "data.source: ",
        "'path'",
        "missing a required argument",
    ),
    "data of another kind": Refusal(
        task_of_rows,
        "task CausalLM takes Text",
        "data=functions are Rows",
        "choose other data (docs/tasks.md)",
    ),
    "a value of another type": Refusal(
        lambda: built(DDP_CLASS, bucket_mb="much"),
        "strategy.dp.bucket_mb",
        "=much",
        "must be float, not str",
    ),
    "no class": Refusal(
        lambda: build({"degree": 2}, Strategy, "strategy.dp"),
        "strategy.dp",
        "has no _target_",
        "nothing says what to build",
    ),
    "a class that there is not": Refusal(
        lambda: built("dtrain.strategy.dpd.DDP"),
        "strategy.dp._target_",
        "=dtrain.strategy.dpd.DDP",
        "there is no module dtrain.strategy.dpd",
    ),
    "a name without a module": Refusal(
        lambda: built("DDP"), "strategy.dp._target_", "=DDP", "write module.Class"
    ),
    "a class that its module has not": Refusal(
        lambda: built("dtrain.strategy.ddp.DPP"),
        "strategy.dp._target_",
        "=dtrain.strategy.ddp.DPP",
        "module dtrain.strategy.ddp has no DPP",
    ),
    "a module that lacks another": Refusal(
        lambda: lacking("import not_installed_here"),
        "strategy.dp._target_",
        "=lacking.Mine",
        "No module named 'not_installed_here'",
    ),
    "a module that has another name now": Refusal(
        lambda: built("dtrain.strategy.base.Strategy"),
        "strategy.dp._target_",
        "=dtrain.strategy.base.Strategy",
        "it is dtrain.parallel.strategy now",
    ),
    "a name that stands in another module now": Refusal(
        lambda: lacking("from dtrain.strategy.tensor import TensorParallel"),
        "strategy.dp._target_",
        "=lacking.Mine",
        "it is dtrain.strategy.tensor.strategy.TensorParallel now",
    ),
    "a module that breaks": Refusal(
        lambda: lacking("1 / 0"), "strategy.dp._target_", "=lacking.Mine", "division by zero"
    ),
    "a class of another kind": Refusal(
        lambda: built("torch.nn.Linear"),
        "strategy.dp._target_",
        "=torch.nn.Linear",
        "is not a Strategy",
    ),
    "a function": Refusal(
        lambda: built("os.system"), "strategy.dp._target_", "=os.system", "is not a Strategy"
    ),
    "a part of another kind": Refusal(
        lambda: text(_target_="subprocess.Popen"),
        "data.tokenizer._target_",
        "=subprocess.Popen",
        "Source or Tokenizer",
    ),
    "a key that there is not": Refusal(
        lambda: run("+eval.foo=1"), "unknown key", "'eval.foo'", "beside it are every, batches"
    ),
    "a value that was taken away": Refusal(
        lambda: run("~steps"), "steps", "has no value", "set steps=…"
    ),
    "a range of another's": Refusal(
        lambda: build({"_target_": "torch.nn.Dropout", "p": 3}, nn.Module, "model"),
        "model.p",
        "=3",
        "has to be between 0 and 1",
    ),
    "a part with a range": Refusal(
        lambda: build(
            {"_target_": "test_refusals.Holding", "part": {"_target_": "torch.nn.Dropout", "p": 3}},
            nn.Module,
            "model",
            parts=(nn.Module,),
        ),
        "model.part.p",
        "=3",
        "has to be between 0 and 1",
    ),
    "a name": Refusal(lambda: run("dtype=fp23"), "dtype", "=fp23", "use fp32, bf16, fp64"),
    "too little": Refusal(
        lambda: run("global_batch_size=-5"), "global_batch_size", "=-5", "at least 1"
    ),
    "too much": Refusal(
        lambda: run("lr_schedule.min_lr_ratio=1.5"), "lr_schedule.min_lr_ratio", "=1.5", "at most 1"
    ),
    "a number that is none": Refusal(
        lambda: build(
            {"_target_": "torch.optim.AdamW", "lr": math.inf},
            torch.optim.Optimizer,
            "optimizer",
            params=[],
        ),
        "optimizer.lr",
        "=inf",
        "a finite number",
    ),
    "a size beyond all": Refusal(
        lambda: build(
            {"_target_": "torch.nn.Linear", "in_features": 10**30, "out_features": 1},
            nn.Module,
            "model",
        ),
        "model.in_features",
        f"={10**30}",
        "larger than 1,000,000,000,000",
    ),
    "a range of no number": Refusal(
        lambda: run("launch.timeout_s=inf"), "launch.timeout_s", "=inf", "a finite number"
    ),
    # a layout
    "a layout that is none": Refusal(
        lambda: own("ADict"), "layout of ADict", "a dict", "write Layout(…)"
    ),
    "names in no tuple": Refusal(
        lambda: own("Listed"), "layout.column of Listed", "'blocks.*.mlp.up'", "in a tuple"
    ),
    "a name of nothing": Refusal(
        lambda: own("Misspelt"), "layout.blocks of Misspelt", "'layers'", "it has first"
    ),
    "what no checkpoint takes": Refusal(
        lambda: own("Sparse"), "graph of Sparse", "sparse_coo", "persistent=False"
    ),
    "an extra state": Refusal(
        lambda: own("Extra"), "first.scale of Extra", "get_extra_state", "keep it in a buffer"
    ),
    "blocks that are none": Refusal(
        lambda: own("Unblocked"), "layout.blocks of Unblocked", "'first.token'", "name a ModuleList"
    ),
    "attention that is nowhere": Refusal(
        lambda: own("Unattended"),
        "layout.attention of Unattended",
        "'core'",
        "it has n1, n2, attention, mlp",
    ),
    "complex weights": Refusal(
        lambda: own("Complex", Zero1()), "turn of Complex", "zero1", "use strategy=ddp"
    ),
    "a tensor on a weight": Refusal(
        lambda: Plan.of([FSDP()], 2).check_model(with_attribute(torch.ones(2))),
        ".scale of Transformer",
        "fsdp",
        "write a number",
    ),
    "what is written on a weight": Refusal(
        lambda: zero(1).refuse_written(Stepper(), with_attribute(2)),
        ".scale is written",
        "Stepper",
        "use strategy=fsdp or zero1",
    ),
    "a hook on a gradient": Refusal(
        lambda: own("Hooked", DDP()),
        "first.token.weight of Hooked",
        "a hook",
        "in `forward` instead",
    ),
    "complex weights of a fused optimizer": Refusal(
        lambda: optimizer_of({"_target_": "torch.optim.AdamW", "fused": True}, MODELS["Complex"]()),
        "optimizer.fused",
        "=true",
        "set optimizer.fused=false",
    ),
    "a single number": Refusal(
        lambda: own("Scalar", FSDP()), "scale of Scalar", "fsdp", "the shape (1,)"
    ),
    "a weight of others": Refusal(
        lambda: own("Normed", TensorParallel()),
        "blocks.0.mlp.up of Normed",
        "parametrize",
        "use a strategy on dp",
    ),
    # a run
    "no compiler": Refusal(
        without_compilers, "compile", "=true", "there is none of " + ", ".join(COMPILERS)
    ),
    "too few steps to profile": Refusal(
        lambda: run("profile=true", "steps=3"), "profile=true", "steps=3", "a run's first 4 steps"
    ),
    "a fault on no rank": Refusal(
        lambda: run("inject.missed_collective.rank=7"),
        "inject.missed_collective.rank",
        "=7",
        "none of the 1 ranks",
    ),
    "a straggler on no rank": Refusal(
        lambda: run("inject.straggler.rank=7"), "inject.straggler.rank", "=7", "none of the 1 ranks"
    ),
    "a fault that nobody waits for": Refusal(
        lambda: run("strategy=parameter_server", "inject.missed_collective.rank=1", ranks=3),
        "inject.missed_collective.rank",
        "=1",
        "inject.straggler.rank=1 or above slows a worker",
    ),
    "a server that is slow": Refusal(
        lambda: run("strategy=parameter_server", "inject.straggler.rank=0", ranks=3),
        "inject.straggler.rank",
        "=0",
        "inject.straggler.rank=1 or above slows a worker",
    ),
}


@cache
def caught(name: str) -> ValueError:
    with (
        mock.patch("dtrain.strategy.deepspeed.zero.check_zero"),
        pytest.raises(ValueError) as found,
    ):
        REFUSALS[name].ask()
    return found.value


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_the_option_its_value_and_a_remedy(name: str) -> None:
    """In one line, in one process, before there is a process group."""
    refusal, said = REFUSALS[name], str(caught(name))
    assert "\n" not in said
    for part in (refusal.option, refusal.value, refusal.remedy):
        assert part in said, said


def _raised(file: Path) -> Iterator[int]:
    """Lines where a file refuses something."""
    inside: list[str] = []

    def walk(node: ast.AST) -> Iterator[int]:
        named = isinstance(node, ast.FunctionDef)
        inside.extend([node.name] if named else [])
        refuses = isinstance(node, ast.Raise) and "ValueError" in ast.dump(node)
        if refuses and inside[-1] not in NOT_ASKED:
            yield node.lineno  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            yield from walk(child)
        if named:
            inside.pop()

    return walk(ast.parse(file.read_text()))


def test_the_table_has_every_refusal_of_these_files() -> None:
    """By the line that raises: a new one is put into the table."""
    seen = set()
    for name in REFUSALS:
        last = traceback.extract_tb(caught(name).__traceback__)[-1]
        seen.add((Path(last.filename).resolve(), last.lineno))
    rooms = [sorted(SOURCE.glob(room)) for room in ROOMS]
    assert all(rooms)
    lacking = [
        f"{file.relative_to(SOURCE)}:{line}"
        for files in rooms
        for file in files
        for line in _raised(file)
        if (file.resolve(), line) not in seen
    ]
    assert not lacking


# Ranges


def _bounded(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every option that has a range: its name, a value beyond, and what is said of the range."""
    for item in fields(kind):
        name, rule = prefix + item.name, item.metadata
        if is_dataclass(default := getattr(item, "default_factory", None)):
            yield from _bounded(default, f"{name}.")  # type: ignore[arg-type]
        if "least" in rule:
            yield name, rule["least"] - 1, f"must be at least {rule['least']}"
        if "above" in rule:
            yield name, rule["above"], f"must be more than {rule['above']}, or null: none"
        if "most" in rule:
            yield name, rule["most"] + 1, f"must be at most {rule['most']}"
        if "names" in rule:
            yield name, "none_of_them", f"is unknown: use {', '.join(rule['names'])}"


BOUNDED = list(_bounded(Comparison))


@pytest.fixture(scope="module")
def comparison() -> Any:
    return composed("compare")


def test_every_option_with_a_range_is_held_to_it(comparison: Any) -> None:
    """Just beyond each end; the message has the name in full, the value and the range."""
    names = {name for name, *_ in BOUNDED}
    assert len(names) > 20 and {"launch.threads", "measure.peak_flops", "repeats"} <= names
    assert validated(comparison).steps >= 1
    for name, value, remedy in BOUNDED:
        config = deepcopy(comparison)
        OmegaConf.update(config, name, value)
        with pytest.raises(ValueError) as found:
            validated(config)
        assert str(found.value) == f"{name}={OmegaConf.select(config, name)} {remedy}"


def test_what_is_no_number_is_in_no_range(comparison: Any) -> None:
    for name, bound in {
        "lr_schedule.min_lr_ratio": "a finite number",
        "clip_norm": "more than",
        "inject.straggler.factor": "a finite number",
    }.items():
        config = deepcopy(comparison)
        OmegaConf.update(config, name, float("nan"))
        with pytest.raises(ValueError, match=f"{name}=nan must be {bound}"):
            validated(config)


# Exit statuses


WANT = (
    "there is not as much memory as is asked for{}: a smaller model or vocabulary, or let a rank "
    "hold less, by "
    "strategy=fsdp, micro_batch_size, activation_checkpointing=true"
)
ENDS: list[tuple[BaseException, int, str]] = [
    (ValueError("steps=0 must be at least 1"), 2, "steps=0 must be at least 1"),
    (OSError("no room"), 2, "no room"),
    (NonFinite("step 3: loss nan"), 1, "step 3: loss nan"),
    (Hang("ranks wait"), 1, "ranks wait"),
    (Failed("failed: ddp"), 1, "failed: ddp"),
    (RanksFailed(1, -9, "", printed=False), 1, "rank 1 ended with signal 9"),
    (RanksFailed(1, 3, "said already", printed=True), 3, ""),
    (RanksFailed(0, 2, "said already", printed=True), 2, ""),
    (RanksFailed(1, 3, "", printed=False), 1, "rank 1 ended with exit status 3"),  # by a library
    (
        RanksFailed(1, 4, "torch has seen it", printed=False),
        1,
        "rank 1 ended with exit status 4: torch has seen it",
    ),
    (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("can't start new thread"), 2, NO_MORE_PROCESSES),
    (MemoryError(), 2, WANT.format("")),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to "
            "allocate 549755814144 bytes. Error code 12 (Cannot allocate memory)"
        ),
        2,
        WANT.format(" (549755814144 bytes at once)"),
    ),
    (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 1 GiB"
        ),
        2,
        WANT.format(" (2.50 GiB at once)"),
    ),
    (BlockingIOError(11, "Resource temporarily unavailable"), 2, NO_MORE_PROCESSES),
]
IDS = [
    f"{type(error).__name__} {status} {number}" for number, (error, status, _) in enumerate(ENDS)
]


@pytest.mark.parametrize(("error", "status", "line"), ENDS, ids=IDS)
def test_a_command_ends_with_the_status_of_what_went_wrong(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for a mistake, 1 for a run that broke off, a rank's own; one line, if none was said."""
    with pytest.raises(SystemExit) as ended, exits.explained("train"):
        raise error
    assert ended.value.code == status
    assert capsys.readouterr().err == (f"dtrain: {line}\n" if line else "")


def test_a_rank_that_the_kernel_ends_for_want_of_memory_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the kernel's own count; not where another signal, or nothing, has ended it."""
    counts = iter((7, 7, 8))
    monkeypatch.setattr(rank_processes.MemoryWatch, "_killed", staticmethod(lambda: next(counts)))
    watch = rank_processes.MemoryWatch()
    said = [str(watch), str(watch)]
    assert said[0] == "" and "want of memory" in said[1]
    for status, told in ((-9, said[1]), (-11, "")):
        assert (
            str(rank_processes._first({1: status}, {1: "nowhere"}, said[1]))
            == f"rank 1 ended with signal {-status}{told}"
        )


def test_a_bug_is_not_told_as_a_mistake() -> None:
    """Its traceback is what a person needs."""
    with pytest.raises(ZeroDivisionError), exits.explained("train"):
        _ = 1 / 0
