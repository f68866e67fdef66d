"""Every YAML composes, and what it names can be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from dtrain.config import checked, make, register
from dtrain.data.base import Data
from dtrain.data.sources import Source
from dtrain.data.tokenizer import Tokenizer
from dtrain.plan import Plan
from dtrain.precision import Precision
from dtrain.report.base import Logger
from dtrain.strategy.base import Strategy

CONFIGS = Path(__file__).parent.parent / "configs"
NEEDED = {
    **dict.fromkeys(("files", "rows", "squad"), ["data.source.path=x"]),
    **dict.fromkeys(("hub", "hub_rows"), ["data.source.name=x"]),
    **dict.fromkeys(("digits", "mnist", "ring"), ["model=convnet"]),
    "images": ["data.path=x", "model=convnet"],
    "hub_images": ["data.source=x", "model=convnet"],
    "file": ["data.tokenizer.path=x", "data.tokenizer.vocab_size=300"],
    "tracker": ["logger.tracker.name=tensorboard"],
    "hf": ["model.name_or_path=x"],
    "hf_gpt2": ["model.name_or_path=x"],
    "hf_llama": ["model.name_or_path=x"],
}
# The published sizes, in parameters.
PUBLISHED = {"gpt2": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200,
             "llama_8b": 8_030_261_248, "llama_70b": 70_553_706_496, "mixtral_8x7b": 46_702_792_704}  # fmt: skip
ABOUT = {"tiny": 0.12e6, "mini": 3.2e6, "small": 10.8e6, "gpt3_175b": 175e9, "moe": 9.55e6, "convnet": 4.06e4}


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def composed(*overrides: str) -> Any:
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/**/*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_option_of_every_group_composes(path: Path) -> None:
    if path.parent.name in ("help",):
        return
    group = path.parent.relative_to(CONFIGS).as_posix()
    prefix = "+" if group in ("experiment", "task/augment") else ""
    config = composed(f"{prefix}{group}={path.stem}", *NEEDED.get(path.stem, []))
    assert checked(config).steps >= 1


@pytest.mark.parametrize("name", options("strategy"))
def test_every_strategy_builds_a_plan(name: str) -> None:
    nodes = OmegaConf.to_container(composed(f"strategy={name}").strategy)
    strategies = [make(node, Strategy, f"strategy.{axis}") for axis, node in nodes.items()]
    assert all(strategy.axis == axis for strategy, axis in zip(strategies, nodes, strict=True))
    if name == "accelerate_fsdp":  # whose refusal tests/test_accelerate.py has
        with pytest.raises(ValueError, match="on a CPU"):
            Plan.of(strategies, 16)
    else:
        assert Plan.of(strategies, 16 if strategies else 1)


@pytest.mark.parametrize("name", [name for name in options("model") if not name.startswith(("hf", "gan"))])
def test_every_model_has_its_published_size(name: str) -> None:
    node = OmegaConf.to_container(composed(f"model={name}"), resolve=True)["model"]
    with torch.device("meta"):
        size = sum(p.numel() for p in make(node, nn.Module, "model").parameters())
    assert size == PUBLISHED[name] if name in PUBLISHED else size == pytest.approx(ABOUT[name], rel=0.03)


@pytest.mark.parametrize("name", options("data"))
def test_every_data_builds(name: str) -> None:
    node = checked(composed(f"data={name}", *NEEDED.get(name, []))).data
    assert make(node, Data, "data", parts=(Source, Tokenizer)).name == name


@pytest.mark.parametrize("name", options("logger"))
def test_every_logger_builds(name: str) -> None:
    nodes = checked(composed(f"logger={name}", *NEEDED.get(name, []))).logger
    assert all(isinstance(make(node, Logger, "logger"), Logger) for node in nodes.values())


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_optimizer_builds(name: str) -> None:
    node = checked(composed(f"optimizer={name}")).optimizer
    assert make(node, torch.optim.Optimizer, "optimizer", params=[nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("fp32", torch.float32, torch.float32)),
        (["dtype=bf16"], ("bf16", torch.float32, torch.float32)),
        (["precision=bf16"], ("bf16", torch.float32, torch.float32)),
        (["precision=bf16_pure"], ("bf16", torch.bfloat16, torch.bfloat16)),
        (["dtype=fp64"], ("fp64", torch.float64, torch.float64)),
        (["precision=bf16", "dtype=fp32"], ("fp32", torch.float32, torch.float32)),
    ],
)
def test_dtype_and_precision_agree(overrides: list[str], expected: tuple) -> None:
    config = checked(composed(*overrides))
    precision = Precision(compute=config.dtype, **config.precision)
    assert (precision.compute, precision.weights_dtype, precision.reduce_dtype) == expected


def test_lists_of_strategies_compose_on_the_command_line() -> None:
    config = composed("strategy=[replicate,fsdp]", "strategy.dp.degree=2")
    assert list(config.strategy) == ["dp", "fsdp"] and config.strategy.dp.degree == 2
    assert config.strategy == composed("strategy=hsdp", "strategy.dp.degree=2").strategy


def test_every_key_of_the_main_yaml_has_a_comment() -> None:
    lines = (CONFIGS / "train.yaml").read_text().split("\n\n", 1)[1].splitlines()
    keys = [line for line in lines if line.strip() and not line.endswith(":")]
    assert all("  # " in line for line in keys)
