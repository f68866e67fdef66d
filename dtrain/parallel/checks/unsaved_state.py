"""Check that a user's model keeps nothing from call to call that no checkpoint holds.

Such as counts and generators in attributes, and buffers that are not persistent.
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
    """Call the model twice with the same weights, saved buffers and global generators.

    Yields lines for a person: what changes, though the outputs do not.

    Raises:
        ValueError: the second outputs differ, or a buffer that is not saved changes: a run that
            resumes would not go on where it stopped.
    """
    model, name = run.model, type(run.model).__name__
    unsaved, calls = _not_persistent(model), []
    saved = {key: buffer.clone() for key, buffer in model.named_buffers() if key not in unsaved}
    for _ in range(2):
        restore_values(model, saved)
        set_weights(model, run.weights)
        seed_everything(0)
        calls.append(
            (
                run(EVERYTHING),
                _attributes(model, tolerance),
                {k: b.clone() for k, b in unsaved.items()},
            )
        )
    (first, before, buffers_before), (second, after, buffers_after) = calls
    restore_values(model, saved)
    changed = sorted(key for key in before | after if before.get(key) != after.get(key))
    for key, buffer in buffers_before.items():
        if difference(buffers_after[key], buffer) > tolerance:
            raise ValueError(
                f"{key} of {name} changes with each forward pass, and no checkpoint holds it, so "
                "no run could resume: leave persistent=False out"
            )
    if (far := difference(second, first)) > tolerance:
        what = f"{', '.join(changed[:3])} of {name}" if changed else f"something that {name} keeps"
        raise ValueError(
            f"{what} changes with each forward pass, its outputs with it (by {far:.2g} of the "
            "largest), and no checkpoint holds it, so no run could resume: make it a buffer, or "
            "draw by torch's global generator"
        )
    if changed:
        yield (
            f"probe: {', '.join(changed[:3])} of {name} changes with each forward pass, and no "
            "checkpoint holds it: a resumed run begins it anew"
        )


def _not_persistent(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that `state_dict` leaves out, except those that each step sets."""
    return {
        f"{path}.{key}".strip("."): buffer
        for path, module in model.named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if key in module._non_persistent_buffers_set and not isinstance(module, StepAware)
    }


def _attributes(model: nn.Module, tolerance: float) -> dict[str, Kept]:
    """Return the values in plain attributes, by name, to their depths."""
    modules = {id(module): module for module in model.modules()}
    places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    return {
        f"{path}.{key}".strip("."): Kept(value, places, modules, tolerance)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if key[0] != "_" and key != "training" and not isinstance(module, StepAware)
    }
