"""The figures of a run: measured, shown at its start, left at its end."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dtrain.cost import environment, flops, peak_memory
from dtrain.cost.throughput import Throughput
from dtrain.data.paths import left_out_in_words
from dtrain.launch.collectives import all_gather_object
from dtrain.launch.world import World
from dtrain.model import own
from dtrain.model.initialize import on_meta
from dtrain.run.assemble import Parts
from dtrain.task.base import Task


def throughput_meter(job: Parts, world: World) -> tuple[Throughput, str]:
    """Return a meter of throughput and MFU, and the source of its peak. Collective."""
    stated = job.config.measure.peak_flops
    dist.barrier()  # the ranks measure at the same time, as they will compute at the same time
    peak, source = (
        (stated, "stated")
        if stated
        else flops.peak(job.plan.device, job.plan.precision.compute_dtype)
    )
    total = torch.tensor(peak, dtype=torch.float64, device=job.plan.device)
    dist.all_reduce(total)
    return Throughput(
        skip_steps=job.config.measure.skip_steps,
        world_size=world.size,
        flops_per_token=flops_per_token(job.task),
        peak_flops=total.item() / world.size,
    ), source


def flops_per_token(task: Task) -> float | None:
    """Return a step's operations over its tokens (or samples), counted on one row of meta tensors.

    None if a model cannot run there.
    """
    models = {
        name: model
        for name, factory in task.models.items()
        if (model := on_meta(factory)) is not None
    }
    row = {name: tensor[:1] for name, tensor in task.batch(0).items()}
    batch = {name: tensor.to("meta") for name, tensor in row.items()}
    try:
        total = sum(
            (flops.count(partial(update.loss, models, batch)) for update in task.updates), start=0
        )
        return total / task.size(row)
    except Exception:  # of a user's model: it may fail in any way
        logging.getLogger("dtrain").warning(
            "no operations are counted, so no MFU: a model does not run on meta tensors"
        )
        return None


def facts(job: Parts, meter: Throughput, peak_source: str) -> tuple[str, ...]:
    """Return lines for a person: model, data, batch, device."""
    # not the trainer's models: an engine may have put their parameters away
    models = [
        factory() if (model := on_meta(factory)) is None else model
        for factory in job.task.models.values()
    ]
    parameters = sum(p.numel() for model in models for p in model.parameters())
    precision, config = job.plan.precision, job.config
    weights = str(precision.weights_dtype).removeprefix("torch.")
    data = ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
        for key, value in job.data.describe().items()
    )
    rows, micro_batch_size = config.global_batch_size, config.micro_batch_size
    epoch = f", {job.task.epoch / rows:,.1f} steps an epoch" if job.task.epoch else ""
    lines = [
        f"model: {parameters:,} parameters; computes in {precision.compute}, weights in {weights}",
        f"data: {data}",
    ]
    if any(job.data.left_out.values()):
        lines.append(f"left out of the data: {left_out_in_words(job.data.left_out)}")
    lines += own.settings_in_words(config.model)
    if job.task.summary:
        lines.append(f"task: {job.task.summary}")
    return (
        *lines,
        *job.tried,
        f"batch: {rows} rows over {job.plan.row_parts} x "
        f"{job.plan.micro_batches(rows, micro_batch_size)} micro-batches{epoch}",
        f"device: {job.plan.device.type}, {torch.get_num_threads()} threads a process; "
        f"peak {(meter.peak_flops or math.nan) / 1e9:,.0f} GFLOP/s a rank ({peak_source})",
    )


def summary_of(
    job: Parts,
    world: World,
    strategy: str,
    figures: dict[str, Any],
    meter: Throughput,
    peak_source: str,
) -> dict[str, Any]:
    """Return what `summary.json` holds of any run. Collective."""
    peaks = all_gather_object(peak_memory.peak_bytes(job.plan.device))
    left_out = {"left_out": dict(job.data.left_out)} if job.data.left_out else {}
    return {
        "strategy": strategy,
        "mesh": job.plan.degrees,
        "synchronous": all(strategy.synchronous for strategy in job.plan.strategies),
        "world_size": world.size,
        "steps": figures["step"],
        "loss": figures["loss"],
        "val_loss": figures.get("val_loss"),
        **meter.summary(),
        "peak_flops_source": peak_source,
        "peak_memory_bytes": max(peaks),
        "peak_memory_bytes_by_rank": peaks,
        "tokens": figures["tokens"],
        "unit": job.task.unit,
        "data": job.data.describe() | left_out,
        "environment": environment.describe(),
        "config": job.written,
    }
