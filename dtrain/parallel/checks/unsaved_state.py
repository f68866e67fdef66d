"""What a model keeps that no checkpoint holds: counts and generators in attributes, buffers
that are not persistent.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from dtrain.data.seeded import seed_everything
from dtrain.model.layout import StepAware
from dtrain.parallel.checks.row_independence import (
    EVERYTHING,
    Run,
    difference,
    restore_values,
    set_weights,
)
from dtrain.parallel.optimizer_extras import Kept


def try_again(run: Run, tolerance: float) -> Iterator[str]:
    """Call the model twice alike: weights, saved buffers and the global generators as they were
    before.

    Yields lines for a person: what changes, though its outputs do not follow.

    Raises:
        ValueError: the second outputs are others, or a buffer that is not saved goes on: a run that
            resumes would not go on where it stopped.
    """
    model, name = run.model, type(run.model).__name__
    unsaved, found = _not_persistent(model), []
    saved = {key: buffer.clone() for key, buffer in model.named_buffers() if key not in unsaved}
    for _ in range(2):
        restore_values(model, saved)
        set_weights(model, run.weights)
        seed_everything(0)
        found.append(
            (
                run(EVERYTHING),
                _attributes(model, tolerance),
                {k: b.clone() for k, b in unsaved.items()},
            )
        )
    (first, before, moved), (second, after, again) = found
    restore_values(model, saved)
    changed = sorted(key for key in before | after if before.get(key) != after.get(key))
    for key, buffer in moved.items():
        if difference(again[key], buffer) > tolerance:
            raise ValueError(
                f"{key} of {name} goes on with each forward pass, and no checkpoint holds it, so "
                "that no run could resume: leave persistent=False out"
            )
    if (far := difference(second, first)) > tolerance:
        what = (
            f"{', '.join(changed[:3])} of {name} goes"
            if changed
            else f"something that {name} keeps goes"
        )
        raise ValueError(
            f"{what} on with each forward pass, its outputs follow (by {far:.2g} of the largest), "
            "and no checkpoint holds it, so that no run could resume: make it a buffer, or draw "
            "by torch's global generator"
        )
    if changed:
        yield (
            f"probe: {', '.join(changed[:3])} of {name} changes with each forward pass, and no "
            "checkpoint holds it: a resumed run begins it anew"
        )


def _not_persistent(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that `state_dict` leaves out; not those of a step's number, which each step sets."""
    return {
        f"{path}.{key}".strip("."): buffer
        for path, module in model.named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if key in module._non_persistent_buffers_set and not isinstance(module, StepAware)
    }


def _attributes(model: nn.Module, tolerance: float) -> dict[str, Kept]:
    """Values in plain attributes, by name, to their depths."""
    stop = {id(module): module for module in model.modules()}
    places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    return {
        f"{path}.{key}".strip("."): Kept(value, places, stop, tolerance)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if key[0] != "_" and key != "training" and not isinstance(module, StepAware)
    }
