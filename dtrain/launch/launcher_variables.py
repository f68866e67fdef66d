"""Translate other launchers' variables and arguments into torchrun's variables.

Those are RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. `deepspeed` and
`python -m torch.distributed.launch` set them, and give the script an argument --local_rank=0.
mpirun and srun have variables of their own; the user sets where the processes meet.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

ARGUMENTS = ("--local_rank", "--local-rank")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# Other launchers' variables, by that of the number of processes: this one's rank, its rank on its
# machine, the number of processes there.
LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE":
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MV2_COMM_WORLD_SIZE":
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "PMI_SIZE": ("PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # of a step; a batch script itself has other variables
    "SLURM_STEP_NUM_TASKS": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}  # fmt: skip


def script_arguments(
    arguments: list[str], environment: MutableMapping[str, str] = os.environ
) -> list[str]:
    """Return the script's own arguments, and put the launcher's into the environment.

    Raises:
        ValueError: several processes have been started, and nothing says where they meet: each
            would train alone.
    """
    kept: list[str] = []
    is_value = False  # of the argument before
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if is_value or name in ARGUMENTS:
            is_value = not (is_value or equals)
            if not is_value and "LOCAL_RANK" not in environment:
                environment["LOCAL_RANK"] = value if equals else argument
        else:
            kept.append(argument)
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        _translate(environment)
    return kept


def _translate(environment: MutableMapping[str, str]) -> None:
    for size, (rank, local_rank, local_size) in LAUNCHERS.items():
        number = environment.get(size, "")
        if not number.isdecimal() or int(number) < 2 or rank not in environment:
            continue
        environment["RANK"] = environment[rank]
        if missing := [name for name in MEETING if name not in environment]:
            raise ValueError(
                f"{size}={number}: {number} processes were started, and each would train alone: "
                f"use torchrun, or set {' and '.join(missing)}, where they meet (a machine's name, "
                f"a free port there)"
            )
        environment["WORLD_SIZE"] = number
        for name, other in (("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", local_size)):
            # "4(x2)": on each of two machines
            if digits := re.match(r"\d+", environment.get(other, "")):
                environment.setdefault(name, digits[0])
        return
