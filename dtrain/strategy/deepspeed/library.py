"""DeepSpeed as a library: imported without its talk, in our process group, one run after
another.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtrain.parallel.strategy import ParallelContext

# a lock on an extension that is being compiled is older than that if nobody compiles it
STALE_S = 900


def imported() -> Any:
    """DeepSpeed, without the lines that it prints as it is imported; on a machine without GPUs
    it is told so.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Sums in shared memory, for inference: compiled at first use, and a killed build's lock makes
    # all later runs wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_zero(zero: dict[str, Any]) -> None:
    """Raise ValueError for whatever DeepSpeed's own schema, or this machine, finds wrong with
    `zero_optimization`.
    """
    from pydantic import ValidationError

    imported()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"strategy.dp.deepspeed.zero_optimization.{'.'.join(map(str, first['loc']))}"
        raise ValueError(f"{where}={first['input']}: {first['msg']}") from None
    for what in ("offload_optimizer", "offload_param"):
        if (zero.get(what) or {}).get("device") == "nvme" and not reaches_disks():
            raise ValueError(
                f"strategy.dp.deepspeed.zero_optimization.{what}.device=nvme: DeepSpeed "
                f"cannot build "
                f"its asynchronous I/O; install libaio-dev and a compiler, or use cpu"
            )


def check_fp16(said: str) -> None:
    """Raise ValueError, about the setting as it was `said`, where DeepSpeed's accelerator has
    no fp16.
    """
    imported()
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise ValueError(
            f"{said} needs a GPU, and DeepSpeed found none that computes in fp16: use dtype=bf16"
        )


def reaches_disks() -> bool:
    """Can DeepSpeed's asynchronous I/O be compiled, or has it been?"""
    imported()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def fresh_groups(deepspeed: Any, plan: ParallelContext) -> None:
    """DeepSpeed in the process group that is there, without the groups of an earlier run of
    this process.
    """
    # it asks for one
    os.environ.setdefault("LOCAL_RANK", str(plan.device.index or dist.get_rank()))
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    free_builds()
    for name in (
        "_DATA_PARALLEL_GROUP",
        "_MODEL_PARALLEL_GROUP",
        "_TENSOR_MODEL_PARALLEL_GROUP",
        "mpu",
    ):
        setattr(deepspeed.utils.groups, name, None)


def free_builds() -> None:
    """Take away the lock of a build that was killed: all later ones of what it compiles would
    wait for it.
    """
    from torch.utils.cpp_extension import get_default_build_root

    # by torch's habit there is a folder for each version
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    locks = Path(own).glob("*/lock") if own else Path(get_default_build_root()).glob("*/*/lock")
    for lock in locks:
        with suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > STALE_S:
                lock.unlink(missing_ok=True)


def sequences(plan: ParallelContext) -> Any:
    """DeepSpeed's groups for Ulysses, if a strategy of its cuts sequences."""
    if not plan.strategy_on("cp"):
        return None
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    parallel_state_sp._release_sequence_parallel_groups()  # of an earlier run of this process
    parallel_state_sp.initialize_sequence_parallel(plan.degrees["cp"])
    return parallel_state_sp
