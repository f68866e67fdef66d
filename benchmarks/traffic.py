"""What it costs to count messages: make bench-traffic

Steps with and without the recorder, in turns; the median of the pairs' ratios.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
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
    """Return seconds with the recorder over seconds without, for each pair of a rank's steps."""
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
            with profile if on else nullcontext():
                step = next(steps)
            if number >= 4:
                seconds[on].append(step.step_seconds)
    return [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]


if __name__ == "__main__":
    for strategy in STRATEGIES:
        pairs = spawn(ratios, [f"strategy={strategy}", *sys.argv[1:]], nproc=2)
        print(f"{strategy:10} {median(pairs) - 1:+.1%} of a step (median of {PAIRS} pairs)")
