"""What `accelerate launch` and its configuration file say, by environment variables.

    accelerate launch --use_fsdp ...  ->  ACCELERATE_USE_FSDP=true  ->  a rank's environment

dtrain does not follow them: the run's configuration says what is done. A rank refuses to start
where they say something else.
"""

from __future__ import annotations

import os

from dtrain.parallel.strategy import ParallelContext
from dtrain.strategy.accelerate.deepspeed import AccelerateDeepSpeed

STRATEGIES = {  # what starts ranks for another strategy, and the strategy
    "ACCELERATE_USE_FSDP": "AccelerateFSDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "AccelerateFSDP",
    "ACCELERATE_USE_DEEPSPEED": "AccelerateDeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "none of ours",
}
UNSET = ("", "no", "none")  # words that ask for nothing
DEFAULTS = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}  # nor does this one
ZERO = "strategy.dp.deepspeed.zero_optimization"


def refuse_contradictions(plan: ParallelContext, micro_batches: int) -> None:
    """Raise ValueError where `accelerate launch` asks for something else than the run does.

    The message names both.
    """
    asked = {k: v.lower() for k, v in os.environ.items() if k.startswith("ACCELERATE_")}
    cpu = asked.get("ACCELERATE_USE_CPU") == "true"
    if cpu and "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        raise ValueError(
            "accelerate launch --cpu has started one process alone: use ACCELERATE_USE_CPU=true "
            "accelerate launch --multi_gpu --num_processes N, or torchrun"
        )
    kinds = [type(strategy).__name__ for strategy in plan.strategies]
    for variable, kind in STRATEGIES.items():
        if asked.get(variable) == "true" and kind not in kinds:
            raise ValueError(
                f"accelerate launch says {variable}=true, which is {kind}, and the strategy is "
                f"{' with '.join(kinds) or 'single'}"
            )
    for variable, value, setting in _settings(plan, micro_batches, asked):
        word = asked.get(variable, "")
        if word not in (*UNSET, DEFAULTS.get(variable)) and not _same(word, value):
            raise ValueError(
                f"accelerate launch says {variable}={word}, the run {value}: set {setting}"
            )


def _settings(
    plan: ParallelContext, micro_batches: int, asked: dict[str, str]
) -> list[tuple[str, object, str]]:
    """Return a table: a variable, what the run does, and the setting of the run's for it."""
    settings: list[tuple[str, object, str]] = [
        ("ACCELERATE_MIXED_PRECISION", plan.precision.compute, "dtype"),
        ("ACCELERATE_DYNAMO_BACKEND", "no", "compile=true instead of it"),
    ]
    strategy = plan.strategy_on("dp")
    if not isinstance(strategy, AccelerateDeepSpeed) or not asked.get("ACCELERATE_USE_DEEPSPEED"):
        return settings
    for part in ("optimizer", "param"):
        device = (strategy.zero.get(f"offload_{part}") or {}).get("device", "none")
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE"
        settings.append((variable, device, f"{ZERO}.offload_{part}"))
    return [
        *settings,
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", strategy.stage, f"{ZERO}.stage"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", micro_batches, "micro_batch_size"),
        ("ACCELERATE_GRADIENT_CLIPPING", plan.clip_norm, "clip_norm"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none", "strategy.dp.deepspeed"),
    ]


def _same(word: str, value: object) -> bool:
    """Return whether a variable's word is the value, or the same number."""
    try:
        return word == str(value).lower() or float(word) == float(str(value))
    except ValueError:
        return False
