"""Every YAML composes, and what it names can be built."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from dtrain.cli import ranks
from dtrain.compare import description
from dtrain.config import aliases
from dtrain.config.build import build, imported, misfit
from dtrain.config.errors import explain
from dtrain.config.schema import register, validated
from dtrain.data.base import Data
from dtrain.data.sources import Source
from dtrain.data.tokenizer import Tokenizer
from dtrain.launch.world import World
from dtrain.model import own
from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision
from dtrain.parallel.strategy import EARLIER, REST, Executor, Strategy
from dtrain.report.base import Logger
from dtrain.run.checkpoint import Checkpoints
from dtrain.run.run import run
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
from dtrain.task.base import Task

CONFIGS = Path(__file__).parent.parent / "configs"
NEEDED = {
    **dict.fromkeys(("files", "rows", "squad"), ["data.source.path=x"]),
    **dict.fromkeys(("hub", "hub_rows"), ["data.source.name=x"]),
    **dict.fromkeys(("digits", "mnist", "ring"), ["model=convnet"]),
    "images": ["data.path=x", "model=convnet"],
    "hub_images": ["data.source.name=x", "model=convnet"],
    "file": ["data.tokenizer.path=x"],
    "tracker": ["logger.tracker.name=tensorboard"],
    "hf": ["model.name_or_path=x"],
    "hf_gpt2": ["model.name_or_path=x"],
    "hf_llama": ["model.name_or_path=x"],
}
# The published sizes, in parameters.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
    "mixtral_8x7b": 46_702_792_704,
}
ABOUT = {
    "tiny": 0.12e6,
    "toy_3m": 3.2e6,
    "toy_11m": 10.8e6,
    "gpt3_175b": 175e9,
    "moe": 9.55e6,
    "convnet": 4.06e4,
}


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def composed(*overrides: str) -> Any:
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/**/*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}"
)
def test_every_option_of_every_group_composes(path: Path) -> None:
    if path.parent.name in ("help",):
        return
    group = path.parent.relative_to(CONFIGS).as_posix()
    prefix = "+" if group in ("experiment", "task/augment") else ""
    config = composed(f"{prefix}{group}={path.stem}", *NEEDED.get(path.stem, []))
    assert validated(config).steps >= 1


@pytest.mark.parametrize("name", options("strategy"))
def test_every_strategy_builds_a_plan(name: str) -> None:
    nodes = OmegaConf.to_container(composed(f"strategy={name}").strategy)
    strategies = [build(node, Strategy, f"strategy.{axis}") for axis, node in nodes.items()]
    assert all(strategy.axis == axis for strategy, axis in zip(strategies, nodes, strict=True))
    if name == "accelerate_fsdp":  # whose refusal tests/test_accelerate.py has
        with pytest.raises(ValueError, match="on a CPU"):
            Plan.of(strategies, 16)
    else:
        assert Plan.of(strategies, 16 if strategies else 1)


@pytest.mark.parametrize(
    "name", [name for name in options("model") if not name.startswith(("hf", "gan"))]
)
def test_every_model_has_its_published_size(name: str) -> None:
    node = OmegaConf.to_container(composed(f"model={name}"), resolve=True)["model"]
    with torch.device("meta"):
        size = sum(p.numel() for p in build(node, nn.Module, "model").parameters())
    assert (
        size == PUBLISHED[name]
        if name in PUBLISHED
        else size == pytest.approx(ABOUT[name], rel=0.03)
    )


@pytest.mark.parametrize("name", options("data"))
def test_every_data_builds(name: str) -> None:
    node = validated(composed(f"data={name}", *NEEDED.get(name, []))).data
    assert build(node, Data, "data", parts=(Source, Tokenizer)).name == name


@pytest.mark.parametrize("name", options("logger"))
def test_every_logger_builds(name: str) -> None:
    nodes = validated(composed(f"logger={name}", *NEEDED.get(name, []))).logger
    assert all(isinstance(build(node, Logger, "logger"), Logger) for node in nodes.values())


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_optimizer_builds(name: str) -> None:
    node = validated(composed(f"optimizer={name}")).optimizer
    assert build(node, torch.optim.Optimizer, "optimizer", params=[nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("fp32", torch.float32, torch.float32)),
        (["dtype=bf16"], ("bf16", torch.float32, torch.float32)),
        (["precision=bf16_mixed"], ("bf16", torch.float32, torch.float32)),
        (["precision=bf16_pure"], ("bf16", torch.bfloat16, torch.bfloat16)),
        (["dtype=fp64"], ("fp64", torch.float64, torch.float64)),
        (["precision=bf16_mixed", "dtype=fp32"], ("fp32", torch.float32, torch.float32)),
    ],
)
def test_dtype_and_precision_agree(overrides: list[str], expected: tuple) -> None:
    config = validated(composed(*overrides))
    precision = Precision.of(config.dtype, config.precision)
    assert (precision.compute, precision.weights_dtype, precision.reduce_dtype) == expected


def test_lists_of_strategies_compose_on_the_command_line() -> None:
    config = composed("strategy=[replicate,fsdp]", "strategy.dp.degree=2")
    assert list(config.strategy) == ["dp", "fsdp"] and config.strategy.dp.degree == 2
    assert config.strategy == composed("strategy=hsdp", "strategy.dp.degree=2").strategy


def test_every_key_of_the_main_yaml_has_a_comment() -> None:
    lines = (CONFIGS / "train.yaml").read_text().split("\n\n", 1)[1].splitlines()
    keys = [line for line in lines if line.strip() and not line.endswith(":")]
    assert all("  # " in line for line in keys)


# What a name promises


PIPELINE = partial(
    PipelineParallel, schedule="1f1b", micro_batches=None, stages_per_rank=1, split=None
)
SHARDED = partial(FSDP, reshard_after_forward=True, reduce_each=False, cpu_offload=False)
SPLIT = partial(TensorParallel, sequence_parallel=False, loss_parallel=True)
SLICED = partial(ContextParallel, method="ring", balanced=True)
LOCAL = partial(
    LocalSGD, sync_every=8, nesterov=True, num_fragments=1, sync_delay=0, keep_local=0.5
)
BUCKETS = {"reduce_bucket_size": 50_000_000}


def zero(stage: int, **settings: int) -> DeepSpeed:
    return DeepSpeed(REST, {"zero_optimization": {"stage": stage, **settings}})


# Each as its name and its paper have it, outermost axis first. Of composed ones the inner axes have
# two ranks.
STRATEGIES: dict[str, list[Strategy]] = {
    "single": [],
    "ddp": [DDP(REST, 25.0)],
    "replicate": [Replicate(REST)],
    "allreduce": [AllReduce(REST)],
    "zero1": [Zero1(REST)],
    # Rajbhandari et al. 2019: stages 2, 3
    "zero2": [SHARDED(REST, reshard_after_forward=False)],
    "fsdp": [SHARDED(REST)],
    "hsdp": [Replicate(REST), SHARDED(REST)],
    "tensor": [SPLIT(REST)],
    "tensor_sequence": [SPLIT(REST, sequence_parallel=True)],
    "pipeline": [PIPELINE(REST)],
    "context": [SLICED(REST)],
    "expert": [ExpertParallel(REST)],
    "replicate_tensor": [Replicate(REST), SPLIT(2)],
    "fsdp_tensor": [SHARDED(REST), SPLIT(2)],
    "fsdp_context": [SHARDED(REST), SLICED(2)],
    "hsdp_tensor": [Replicate(REST), SHARDED(REST), SPLIT(2)],
    "pipeline_fsdp": [PIPELINE(2), SHARDED(REST)],
    "pipeline_tensor": [PIPELINE(2), SPLIT(REST)],
    "3d": [PIPELINE(2), SHARDED(REST), SPLIT(2)],
    "4d": [PIPELINE(2), SHARDED(REST), SLICED(2), SPLIT(2)],
    "moe_fsdp": [ExpertParallel(2), SHARDED(REST)],
    "local_sgd": [LOCAL(REST, outer_lr=1.0, outer_momentum=0.0)],  # Stich 2018: a plain mean
    "diloco": [LOCAL(REST, outer_lr=0.7, outer_momentum=0.9)],  # Douillard et al. 2023, section 2
    "parameter_server": [
        ParameterServer(
            REST,
            mode="async",
            max_staleness=4,
            servers=1,
            divide_by_staleness=False,
            compression="none",
            top_k_fraction=0.01,
            power_sgd_rank=2,
            restarts=3,
        )
    ],
    "accelerate_ddp": [AccelerateDDP(REST, 25.0, {})],
    "accelerate_local_sgd": [AccelerateLocalSGD(REST, 8)],
    "accelerate_fsdp": [
        AccelerateFSDP(REST, reshard_after_forward=True, plugin={}, parallelism={})
    ],
    "accelerate_deepspeed": [AccelerateDeepSpeed(REST, zero(2, **BUCKETS).settings)],
    "deepspeed_zero0": [zero(0)],
    "deepspeed_zero1": [zero(1, **BUCKETS)],
    "deepspeed_zero2": [zero(2, **BUCKETS)],
    "deepspeed_zero3": [
        zero(
            3,
            **BUCKETS,
            stage3_param_persistence_threshold=0,
            stage3_prefetch_bucket_size=0,
            stage3_max_reuse_distance=0,
        )
    ],
    "deepspeed_autotp": [zero(1, **BUCKETS), AutoTP(2)],
    "deepspeed_pipeline": [
        DeepSpeedPipeline(2, micro_batches=None, split=None),
        zero(1, **BUCKETS),
    ],
    "deepspeed_ulysses": [zero(1, **BUCKETS), DeepSpeedUlysses(2)],
}


def option_of(group: str, name: str) -> Any:
    """What a group's option says, after those that it names as its defaults."""
    own = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
    before = [option_of(group, each) for each in own.pop("defaults", []) if each != "_self_"]
    return OmegaConf.merge(*before, own)


def test_a_strategys_name_says_what_is_built() -> None:
    """Class by class, with all that each was given."""
    assert options("strategy") == sorted(STRATEGIES)
    for name, expected in STRATEGIES.items():
        nodes = OmegaConf.to_container(option_of("strategy", name))
        made = [build(node, Strategy, f"strategy.{axis}") for axis, node in nodes.items()]  # type: ignore[union-attr]
        assert [(type(each), vars(each)) for each in made] == [
            (type(each), vars(each)) for each in expected
        ], name


# (Brown et al. 2020, appendix B), (Radford et al. 2015, section 4: little momentum), plain.
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "adamw": (
        torch.optim.AdamW,
        {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True},
    ),
    "adam_gan": (
        torch.optim.AdamW,
        {"lr": 5e-4, "betas": (0.5, 0.99), "eps": 1e-8, "weight_decay": 0, "fused": True},
    ),
    "sgd": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0, "weight_decay": 0, "nesterov": False, "dampening": 0},
    ),
}
FORMATS = {
    "fp32": ("fp32", torch.float32, torch.float32),
    "bf16_mixed": ("bf16", torch.float32, torch.float32),
    "bf16_pure": ("bf16", torch.bfloat16, torch.bfloat16),
    "fp64": ("fp64", torch.float64, torch.float64),
}


def test_an_optimizers_and_a_precisions_name_say_what_they_are() -> None:
    """As the papers have them; a mean of squares is never shorter than that of gradients."""
    assert (options("optimizer"), options("precision")) == (sorted(OPTIMIZERS), sorted(FORMATS))
    for name, (kind, settings) in OPTIMIZERS.items():
        node = OmegaConf.to_container(option_of("optimizer", name))
        made = build(
            node, torch.optim.Optimizer, "optimizer", params=[nn.Parameter(torch.zeros(2))]
        )  # type: ignore[arg-type]
        (group,) = made.param_groups
        found = {
            key: tuple(value) if isinstance(value, list) else value for key, value in group.items()
        }
        assert type(made) is kind and {key: found[key] for key in settings} == settings
        assert "betas" not in found or found["betas"][0] < found["betas"][1]
    for name, formats in FORMATS.items():
        node = option_of("precision", name)
        precision = Precision(compute=node.dtype, **node.precision)
        assert (precision.compute, precision.weights_dtype, precision.reduce_dtype) == formats


GPT2 = {
    "vocab_size": 50257,
    "context": 1024,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "norm_first": True,
    "activation": "gelu_tanh",
    "position": "learned",
    "tied": True,
    "bias": True,
    "n_kv_heads": None,
    "d_ff": None,
    "n_experts": 0,
    "causal": True,
    "segments": 0,
    "head_transform": False,
    "outputs": None,
    "dropout": 0.0,
}
LLAMA = GPT2 | {
    "vocab_size": 128256,
    "context": 8192,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rotary",
    "rope_theta": 500_000.0,
    "tied": False,
    "bias": False,
    "n_kv_heads": 8,
}


def sized(
    model: dict[str, Any], layers: int, heads: int, width: int, **more: Any
) -> dict[str, Any]:
    return model | {"n_layers": layers, "n_heads": heads, "d_model": width, **more}


MODELS = {
    # Radford et al. 2019, table 2; epsilon, activation and heads of its code (openai/gpt-2).
    "gpt2": sized(GPT2, 12, 12, 768),
    "gpt2_medium": sized(GPT2, 24, 16, 1024),
    "gpt2_large": sized(GPT2, 36, 20, 1280),
    "gpt2_xl": sized(GPT2, 48, 25, 1600),
    "gpt3_175b": sized(GPT2, 96, 96, 12288, context=2048),  # Brown et al. 2020, table 2.1
    # Dubey et al. 2024, table 3; epsilon of its code (meta-llama/llama3).
    "llama_8b": sized(LLAMA, 32, 32, 4096, d_ff=14336),
    "llama_70b": sized(LLAMA, 80, 64, 8192, d_ff=28672),
    # Jiang et al. 2024, table 1; rotary base and the balance loss's weight of its published
    # configuration.
    "mixtral_8x7b": sized(
        LLAMA,
        32,
        32,
        4096,
        d_ff=14336,
        vocab_size=32000,
        context=32768,
        rope_theta=1e6,
        n_experts=8,
        top_k=2,
        capacity_factor=None,
        balance="loss",
        balance_rate=0.02,
    ),
}


def test_a_published_model_has_its_published_settings() -> None:
    """All that its weights would need, and heads of a width that they share."""
    assert set(MODELS) == set(PUBLISHED) | {"gpt3_175b"}
    for name, published in MODELS.items():
        node = option_of("model", name)
        assert {key: node[key] for key in published} == published, name
        assert node.d_model % node.n_heads == 0 and node.d_model // node.n_heads in (64, 80, 128)


# What a setting reaches


REACHES: dict[str, Any] = {
    "steps": 3, "seed": 11, "global_batch_size": 6, "micro_batch_size": 2, "seq_len": 12,
    "clip_norm": 0.125, "activation_checkpointing": True, "eval.every": 2, "eval.batches": 5,
    "checkpoint.every": 1, "checkpoint.keep_last": 9, "checkpoint.asynchronous": True,
    "lr_schedule.warmup_steps": 7, "lr_schedule.min_lr_ratio": 0.375, "measure.skip_steps": 4,
    "measure.peak_flops": 8e9, "inject.straggler.rank": 0, "inject.straggler.factor": 1.0625,
    "launch.threads": 1, "launch.timeout_s": 77.0, "dtype": "bf16", "precision.weights": "bf16",
    "optimizer.lr": 0.03125, "optimizer.betas": [0.25, 0.5], "model.dropout": 0.4375,
    "data.validation_fraction": 0.1875,
}  # fmt: skip
SEEN_BY = {  # what cannot be changed in a run of one process on a CPU, or ends it, and the tests that change it
    "device": "test_cli: device=cuda is refused without GPUs", "compile": "test_cli, test_exact",
    "profile": "test_instruments", "resume": "test_cli", "init_from": "test_tasks",
    "checkpoint.fallback": "test_cli", "probe": "test_own_model", "overwrite": "test_folder",
    "checkpoint.last": "test_folder", "inject.missed_collective.rank": "test_instruments",
    "inject.missed_collective.step": "test_instruments", "launch.nproc": "test_cli",
}  # fmt: skip


def reached(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """What a run has given to those that act by it, key for key."""
    config = composed(
        "model=tiny",
        "data=files",
        f"data.source.path={folder}/text",
        f"data.cache={folder}/cache",
        *overrides,
    )
    config.logger = {"files": {"_target_": "dtrain.report.files.Files"}}
    with ExitStack() as stack:

        def seen(where: str) -> mock.Mock:
            module, _, name = where.rpartition(".")
            wrapped = mock.Mock(wraps=getattr(import_module(module), name))
            return stack.enter_context(mock.patch(where, wrapped))

        names = (
            "Trainer",
            "Checkpoints",
            "HangDetector",
            "process_group",
            "begin_from",
        )
        trainer, checkpoints, watch, connected, taken = (
            seen(f"dtrain.run.run.{name}") for name in names
        )
        slowed = seen("dtrain.run.observers.slowed")
        meter = seen("dtrain.run.summary.Throughput")
        save = stack.enter_context(mock.patch.object(Checkpoints, "save"))
        run(validated(config), World(), folder / "run", "single")
    task, plan, _, settings, _ = trainer.call_args.args
    made, job = taken.call_args.args[:2]
    batch = task.batch(0)["tokens"]
    straggler = slowed.call_args.args[0]
    optimizer = made.optimizers["model"]
    lines = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        "steps": settings.steps,
        "seed": settings.seed,
        "global_batch_size": len(batch),
        "seq_len": batch.shape[1],
        "micro_batch_size": settings.micro_batch_size,
        "clip_norm": plan.clip_norm,
        "activation_checkpointing": plan.recompute,
        "eval.batches": len(list(task.validation())),
        "eval.every": [line["step"] for line in lines if "val_loss" in line],
        "checkpoint.every": [call.args[0] for call in save.call_args_list],
        "checkpoint.keep_last": checkpoints.call_args.kwargs["keep_last"],
        "checkpoint.asynchronous": checkpoints.call_args.kwargs["asynchronous"],
        "lr_schedule.warmup_steps": settings.warmup_steps,
        "lr_schedule.min_lr_ratio": settings.min_lr_ratio,
        "measure.skip_steps": meter.call_args.kwargs["skip_steps"],
        "measure.peak_flops": meter.call_args.kwargs["peak_flops"],
        "inject.straggler.rank": straggler.rank,
        "inject.straggler.factor": straggler.factor,
        "launch.threads": connected.call_args.kwargs["threads"],
        "launch.timeout_s": (connected.call_args.kwargs["timeout_s"], watch.call_args.args[1]),
        "dtype": plan.precision.compute,
        "precision.weights": plan.precision.weights,
        "optimizer.lr": optimizer.defaults["lr"],
        "optimizer.betas": list(optimizer.defaults["betas"]),
        "model.dropout": made.models["model"].blocks["0"].attention.core.dropout,
        "data.validation_fraction": job.data.validation_fraction,
    }


def test_every_setting_reaches_what_acts_by_it(tmp_path: Path) -> None:
    """All changed at once, to values of which no two are alike, in one run of two updates."""
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text(
            f"document {number}: " + "words and words " * 9
        )
    default = composed("model=tiny")
    assert not [key for key, value in REACHES.items() if OmegaConf.select(default, key) == value]
    found = reached(tmp_path, [f"{key}={value}" for key, value in REACHES.items()])
    timeout = REACHES["launch.timeout_s"]
    seen = {
        "eval.every": [2, 3],
        "checkpoint.every": [1, 2, 3],
        "launch.timeout_s": (timeout, timeout),
    }
    assert found == REACHES | seen


def test_no_setting_is_left_out() -> None:
    """Of train.yaml and of launch: each is in the test above, or in one that is named."""
    own = OmegaConf.load(CONFIGS / "train.yaml")

    def within(node: Any, prefix: str) -> set[str]:
        nodes = {
            key: value for key, value in node.items() if prefix or key not in ("defaults", "hydra")
        }
        return {
            name
            for key, value in nodes.items()
            for name in (
                within(value, f"{prefix}{key}.")
                if OmegaConf.is_config(value)
                else [f"{prefix}{key}"]
            )
        }

    keys = within(own, "")
    keys |= {f"launch.{key}" for key in OmegaConf.load(CONFIGS / "launch" / "local.yaml")}
    groups = ("dtype", "precision", "optimizer", "model", "data")
    assert {key for key in REACHES if key.split(".")[0] not in groups} | set(SEEN_BY) == keys
    assert not REACHES.keys() & SEEN_BY.keys()


class Kept(nn.Module):
    """Keeps what it is given."""

    def __init__(self, text: str, parts: list[Any], **more: Any) -> None:
        super().__init__()
        self.given = text, parts, more


def test_what_was_checked_is_built_as_it_stands() -> None:
    """A text that looks like an interpolation, or a class within it, is a text."""
    text = "${oc.env:HOME}"
    parts = ["${now:%Y}", {"a": "${x}", "b": r"\${y}"}, "{_target_: builtins.print}"]
    node = {"_target_": "test_configs.Kept", "text": text, "parts": parts, "more": {"c": None}}
    assert build(node, nn.Module, "model").given == (text, parts, {"more": {"c": None}})
    within = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    node = {"_target_": "torch.nn.Sequential", "_args_": [within, {**within, "in_features": 3}]}
    assert [layer.in_features for layer in build(node, nn.Module, "model", parts=(nn.Module,))] == [
        2,
        3,
    ]
    made = build(
        {"_target_": "test_configs.Kept", "text": "", "parts": [{**within, "_partial_": True}]},
        nn.Module,
        "model",
        parts=(nn.Module,),
    )
    assert made.given[1][0]().out_features == 3


# A value, an annotation, and what the value should be.
MISFITS = [
    (1, int, ""), (1, float, ""), (1.5, int, "int"), (True, int, "int"), (1, bool, "bool"),
    ("1", float | None, "float or null"), ("fp32", str | int, ""), (2, list[int], "list"),
    (2, tuple[float, float], "list"), ([2], tuple[float, float], "a list of 2"),
    ([2], tuple[float, ...], ""), (None, int, ""), ("a", Any, ""), ("a", object, ""),
    ("a", Path, ""), ("a", Path | int, "Path or int"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "hint", "wanted"), MISFITS, ids=str)
def test_a_value_is_held_to_its_annotation_as_far_as_that_tells(
    value: Any, hint: Any, wanted: str
) -> None:
    assert misfit(value, hint) == wanted


ASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "build": lambda node: own.build_model(node, "model", 3),
    "handed": own.accepted_settings,
    "check_asked": lambda node: own.check_asked(node, ["model.depth=1"]),
    "told": lambda node: list(own.settings_in_words(node)),
    "class_of": lambda node: description._class_of(node["_target_"]),
    "make": lambda node: build(node, nn.Module, "model"),
}


@pytest.mark.parametrize("asks", ASKS)
def test_what_is_no_place_for_a_class_is_never_imported(asks: str) -> None:
    """`this` prints when it is imported; `antigravity` would open a browser."""
    sys.modules.pop("this", None)
    before = set(sys.modules)
    with suppress(ValueError):
        ASKS[asks]({"_target_": "this.Model"})
    assert set(sys.modules) == before and "this" not in before


@pytest.mark.parametrize("old", aliases.MOVED)
def test_what_has_moved_is_told_and_is_there(old: str, tmp_path: Path, monkeypatch) -> None:
    """In a configuration of an earlier version, and in code of a user's."""
    new = aliases.MOVED[old]
    before = f"{old}.Some"
    if find_spec(new.rpartition(".")[0]).submodule_search_locations is None:  # type: ignore[union-attr]
        before = old  # no module, but a name in one
        assert imported(new, "it")
    else:
        assert import_module(new).__doc__
    with pytest.raises(ValueError, match=f": it is {re.escape(new)} now$"):
        imported(before, "it")
    module, _, name = before.rpartition(".")
    (tmp_path / "theirs.py").write_text(f"from {module} import {name}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    with pytest.raises(
        ValueError, match=f"^it cannot be imported: [^/]*: it is {re.escape(new)} now$"
    ):
        imported("theirs.Model", "it")


@pytest.mark.parametrize("kind", [Strategy, Executor])
def test_a_hook_by_an_earlier_name_is_refused(kind: type) -> None:
    """Nobody would call it, and the class would train something else."""
    found = [earlier for earlier, now in EARLIER.items() if hasattr(kind, now)]
    assert len(found) == (8 if kind is Strategy else 4)
    for earlier in found:
        with pytest.raises(TypeError, match=f"Mine.{earlier}: it is {EARLIER[earlier]} now"):
            type("Mine", (kind,), {earlier: lambda self: None})


@pytest.mark.parametrize(
    "kind, earlier, now",
    [
        (Task, "told", "summary"),
        (Data, "leave", "save_for_inference"),
        (Data, "kept", "cache_folder"),
    ],
)
def test_an_attribute_by_an_earlier_name_is_refused(kind: type, earlier: str, now: str) -> None:
    with pytest.raises(TypeError, match=f"Mine.{earlier}: it is {now} now"):
        type("Mine", (kind,), {earlier: ""})
    type("Mine", (kind,), {now: ""})


@pytest.mark.parametrize("strategy", sorted({*options("strategy")} - {"single"}))
def test_each_strategys_card_tells_its_cost(strategy: str) -> None:
    for node in option_of("strategy", strategy).values():
        assert description._cost(description._class_of(node["_target_"])).startswith("Cost")


def test_a_runs_own_configuration_of_an_earlier_version_is_told_the_new_names(
    tmp_path: Path,
) -> None:
    config = OmegaConf.create(OmegaConf.to_container(composed("model=tiny")))
    del config["lr_schedule"]
    config["schedule"] = {"warmup_steps": 3}
    with pytest.raises(Exception) as found:  # noqa: B017  OmegaConf's, told by `explain`
        validated(config)
    assert explain(found.value, "train") == "unknown key 'schedule': here it is lr_schedule"


def test_ranks_are_given_what_was_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An escaped interpolation is a text, on the ranks that `start` starts too."""
    register()
    monkeypatch.setenv("A_NAME", "a-value")
    monkeypatch.setattr(ranks, "assemble", lambda *_: None)
    monkeypatch.setattr(
        ranks, "spawn", lambda function, *arguments, **_: (function, pickle.dumps(arguments))
    )
    monkeypatch.setattr(ranks, "run", lambda config, *_: config)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(
            "train",
            overrides=["model=tiny", r"+model.a='\${oc.env:A_NAME}'", r"+model.b='\${foo}'"],
        )
    function, arguments = ranks.start(config, tmp_path, "ddp")
    monkeypatch.setattr(ranks.World, "of_environment", lambda: ranks.World())
    got = function(*pickle.loads(arguments))
    assert (got.model["a"], got.model["b"]) == ("${oc.env:A_NAME}", "${foo}") and got == validated(
        config
    )
