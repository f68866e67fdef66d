"""Say which rank this process is in its job and on its machine, and its device and cores."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

# the last one is DeepSpeed's
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@dataclass(frozen=True)
class World:
    """This rank's place in the job and on its machine.

    Attributes:
        agents: once connected, unique names of the processes of torchrun that have started the
            job's ranks, and may start them again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    agents: frozenset[str] = frozenset()

    @classmethod
    def of_environment(cls) -> World | None:
        """Return what the launcher's variables say; None: no launcher has set them.

        Raises:
            ValueError: variables that contradict each other.
        """
        given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        if wrong := [f"{name}={value}" for name, value in given.items() if not value.isdecimal()]:
            raise ValueError(f"{wrong[0]} is no number: a launcher sets it")
        env = {name: int(value) for name, value in given.items()}
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return None
        if missing := [name for name in VARIABLES[:2] if name not in env]:
            raise ValueError(
                f"{given} without {missing[0]}: a launcher sets both; unset them for one process"
            )
        local_size = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))
        world = cls(env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", env["RANK"]), local_size)
        if not 0 <= world.rank < world.size:
            raise ValueError(f"RANK={world.rank} is not below WORLD_SIZE={world.size}")
        return world


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(name: str, world: World) -> torch.device:
    """Return this rank's device: `auto` is a GPU where there is one for every local rank.

    Raises:
        ValueError: a GPU is asked for and there is none for this rank.
    """
    gpus = torch.cuda.device_count()
    # DeepSpeed, which transformers imports too, would look for a GPU and print a line about it.
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if name == "cpu" or (name == "auto" and gpus < world.local_size):
        return torch.device("cpu")
    if gpus < world.local_size:
        raise ValueError(
            f"device=cuda: every rank needs a GPU, {world.local_size} on this machine, and torch "
            f"sees {gpus}: use device=cpu or fewer ranks"
        )
    return torch.device("cuda", world.local_rank)
