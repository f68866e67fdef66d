"""What counting messages costs: steps with the recorder and without, by turns; the median of
the pairs' ratios.
"""

from __future__ import annotations

import sys
from functools import partial
from statistics import median

import torch.distributed as dist
from hydra import compose, initialize_config_dir

from dtrain.config.groups import CONFIGS
from dtrain.config.schema import register, validated
from dtrain.cost.profile import Profile
from dtrain.launch.rank_processes import spawn
from dtrain.launch.rendezvous import process_group
from dtrain.launch.world import World
from dtrain.run.assemble import assemble
from dtrain.run.run import optimizer_of
from dtrain.train import Settings, Trainer

STRATEGIES, PAIRS = ("ddp", "fsdp", "tensor", "pipeline", "context"), 40


def ratios(overrides: list[str]) -> list[float]:
    """Of each pair of steps on one rank: seconds with over seconds without."""
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = validated(compose("train", overrides=overrides))
    world = World.of_environment() or World()
    job = assemble(config, world)
    with process_group(
        world, job.plan.device, threads=config.launch.threads, timeout_s=config.launch.timeout_s
    ):
        plan, seconds = job.plan.connect(), {True: [], False: []}  # type: ignore[var-annotated]
        profile = Profile(plan)
        settings = Settings(2 * PAIRS + 4, global_batch_size=config.global_batch_size)
        trainer = Trainer(
            job.task, plan, partial(optimizer_of, config.optimizer), settings, profile.phase
        )
        steps = trainer.steps()
        for number in range(2 * PAIRS + 4):
            on = bool(number // 2 % 2) ^ bool(number % 2)  # off on, on off, off on ...
            dist.barrier()
            if on:
                with profile:
                    step = next(steps)
            else:
                step = next(steps)
            if number >= 4:
                seconds[on].append(step.step_seconds)
    return [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]


if __name__ == "__main__":
    for strategy in STRATEGIES:
        found = spawn(ratios, [f"strategy={strategy}", *sys.argv[1:]], nproc=2)
        print(f"{strategy:10} {median(found) - 1:+.1%} of a step (median of {PAIRS} pairs)")
