"""The losses and norms that workers report with their gradients, as the figures of a step."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.task.base import Update


class GradientLog:
    """The gradients that have come since the last step, by the step's updates."""

    def __init__(self, updates: Sequence[Update]) -> None:
        self._updates = updates
        self._losses, self._norms = ([list[float]() for _ in updates] for _ in range(2))

    def add(self, update: int, loss: float, norm: float) -> None:
        self._losses[update].append(loss)
        self._norms[update].append(norm)

    def set_norms(self, update: int, norm: float) -> None:
        """Give all gradients of an update the norm of their mean, which no worker knows."""
        self._norms[update] = [norm] * len(self._norms[update])

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the mean losses and root mean square norms by model, and begin anew."""
        losses: dict[str, float] = {}
        norms: dict[str, float] = {}
        for update, own_losses, own_norms in zip(
            self._updates, self._losses, self._norms, strict=True
        ):
            if own_losses:
                losses[update.trains] = sum(own_losses) / len(own_losses)
                norms[update.trains] = (sum(n**2 for n in own_norms) / len(own_norms)) ** 0.5
            own_losses.clear()
            own_norms.clear()
        return losses, norms
