"""Other launchers' words for who a process is, said in torchrun's: RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE.

`deepspeed` and `python -m torch.distributed.launch` say those, and give the script an argument
--local_rank=0. mpirun and srun have variables of their own; where the processes meet is for the
user to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

ARGUMENTS = ("--local_rank", "--local-rank")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
THEIRS = {  # number of processes: which of them, which on its machine, how many there
    "OMPI_COMM_WORLD_SIZE": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MV2_COMM_WORLD_SIZE": (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    "PMI_SIZE": ("PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # not of a batch script
    "SLURM_STEP_NUM_TASKS": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def script_arguments(
    arguments: list[str], environment: MutableMapping[str, str] = os.environ
) -> list[str]:
    """The arguments that are the script's; what the others and the variables say is put into the
    environment.

    Raises:
        ValueError: several processes have been started, and nothing says where they meet: each
            would train alone.
    """
    kept: list[str] = []
    waiting = False
    for argument in arguments:
        name, given, value = argument.partition("=")
        if waiting or name in ARGUMENTS:
            waiting = not (waiting or given)
            if not waiting and "LOCAL_RANK" not in environment:
                environment["LOCAL_RANK"] = value if given else argument
        else:
            kept.append(argument)
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        _translate(environment)
    return kept


def _translate(environment: MutableMapping[str, str]) -> None:
    for size, (rank, local_rank, local_size) in THEIRS.items():
        number = environment.get(size, "")
        if not number.isdecimal() or int(number) < 2 or rank not in environment:
            continue
        environment["RANK"] = environment[rank]
        if missing := [name for name in MEETING if name not in environment]:
            raise ValueError(
                f"{size}={number}: {number} processes were started, and each would train alone: "
                f"use torchrun, or set "
                f"{' and '.join(missing)}, where they meet (a machine's name, a free port there)"
            )
        environment["WORLD_SIZE"] = number
        for ours, theirs in (("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", local_size)):
            # "4(x2)": on each of two machines
            if found := re.match(r"\d+", environment.get(theirs, "")):
                environment.setdefault(ours, found[0])
        return
