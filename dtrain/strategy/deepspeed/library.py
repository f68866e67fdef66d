"""DeepSpeed as a library: imported without what it prints, in the process group that is there."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtrain.parallel.strategy import ParallelContext

ENGINE = "deepspeed"
STALE_S = 900  # an older lock on an extension is of a build that was killed


def imported() -> Any:
    """Return the module of DeepSpeed, set to the CPU on a machine without GPUs."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Sums in shared memory, for inference: compiled at first use, and a killed build's lock makes
    # all later runs wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_beside_zero(plan: ParallelContext, strategy: str, remedy: str) -> None:
    """Raise ValueError if the plan has not this strategy and DeepSpeed's ZeRO on `dp` only."""
    zero = plan.strategy_on("dp")
    if not hasattr(zero, "stage") or len(plan.strategies) > 2:
        raise ValueError(
            f"strategy {strategy} goes with DeepSpeed's ZeRO on dp alone: use {remedy}"
        )


def check_zero(zero: dict[str, Any]) -> None:
    """Raise ValueError for what DeepSpeed's schema, or this machine, refuses of its settings."""
    from pydantic import ValidationError

    imported()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    where = "strategy.dp.deepspeed.zero_optimization"
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}.{key}={first['input']}: {first['msg']}") from None
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme" and not reaches_disks():
            raise ValueError(
                f"{where}.{part}.device=nvme: DeepSpeed cannot build its asynchronous I/O; "
                f"install libaio-dev and a compiler, or use cpu"
            )


def check_fp16(setting: str) -> None:
    """Raise ValueError, which names the setting, if DeepSpeed's accelerator has no fp16."""
    imported()
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise ValueError(
            f"{setting} needs a GPU, and DeepSpeed found none that computes in fp16: use dtype=bf16"
        )


def reaches_disks() -> bool:
    """Return whether DeepSpeed's asynchronous I/O is compiled, or can be."""
    imported()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def fresh_groups(deepspeed: Any, plan: ParallelContext) -> None:
    """Give DeepSpeed the process group, without the groups of an earlier run of this process."""
    os.environ.setdefault("LOCAL_RANK", str(plan.device.index or dist.get_rank()))
    deepspeed.init_distributed(dist_backend=dist.get_backend())  # reads LOCAL_RANK
    free_builds()
    groups = deepspeed.utils.groups
    for kind in ("_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_TENSOR_MODEL_PARALLEL_GROUP"):
        setattr(groups, kind, None)
    groups.mpu = None


def free_builds() -> None:
    """Remove the lock of a build that was killed: all later builds of it would wait for it."""
    from torch.utils.cpp_extension import get_default_build_root

    # torch's own place has a folder for each version
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    locks = Path(own).glob("*/lock") if own else Path(get_default_build_root()).glob("*/*/lock")
    for lock in locks:
        with suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > STALE_S:
                lock.unlink(missing_ok=True)


def sequences(plan: ParallelContext) -> Any:
    """Return DeepSpeed's groups for Ulysses, or None where no strategy cuts sequences."""
    if not plan.strategy_on("cp"):
        return None
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    parallel_state_sp._release_sequence_parallel_groups()  # of an earlier run of this process
    parallel_state_sp.initialize_sequence_parallel(plan.degrees["cp"])
    return parallel_state_sp
