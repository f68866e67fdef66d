"""Measure the throughput and step times of a run, without its warm-up steps."""

from __future__ import annotations

from array import array
from statistics import median, quantiles


class Throughput:
    """Collect steps; return what is typical of them.

    Args:
        skip_steps: first steps that do not count: they pay for allocation and first use.
        world_size: ranks, for the figures per rank.
        flops_per_token: of forward and backward, or None if unknown.
        peak_flops: a rank's peak, in floating-point operations a second, or None if unknown.
    """

    def __init__(
        self,
        *,
        skip_steps: int,
        world_size: int,
        flops_per_token: float | None,
        peak_flops: float | None,
    ) -> None:
        self.skip_steps, self.world_size = skip_steps, world_size
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._seconds, self._tokens = array("d"), array("d")  # a long run has many

    def add(self, tokens: float, seconds: float) -> None:
        """Add one step: its global tokens, each counted once on any mesh, and its time."""
        self._tokens.append(tokens)
        self._seconds.append(seconds)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the model FLOPs utilisation: operations needed, over the peak of all ranks.

        Source: Chowdhery et al. 2022, "PaLM".
        """
        if not self.flops_per_token or not self.peak_flops:
            return None
        return tokens_per_second * self.flops_per_token / (self.world_size * self.peak_flops)

    def summary(self) -> dict[str, float | int | None]:
        """Return medians over the steps that count: all but the warm-up, and at least the last."""
        if not self._seconds:
            return {}
        skipped = min(self.skip_steps, len(self._seconds) - 1)
        seconds, tokens = self._seconds[skipped:], self._tokens[skipped:]
        rate = median(t / s for t, s in zip(tokens, seconds, strict=True))
        return {
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": rate / self.world_size,
            "step_seconds_median": median(seconds),
            "step_seconds_p95": quantiles(seconds, n=20, method="inclusive")[-1]
            if len(seconds) > 1
            else seconds[0],
            "mfu": self.mfu(rate),
            "measured_steps": len(seconds),
            "flops_per_token": self.flops_per_token,
            "peak_flops_per_rank": self.peak_flops,
        }
