"""The table and the figure of docs/asynchronous.md: make bench-async

Who waits for a slow worker, and what does it cost not to wait? Of two workers one takes ten times
as long in half of the runs. Runs take turns; figures are medians over the rounds.
"""

from itertools import accumulate
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from runner import train

SLOW = ("inject.straggler.rank=1", "inject.straggler.factor=10")
SERVER = ("strategy=parameter_server", "launch.nproc=3")
TRIED = {
    "ddp": ("strategy=ddp", "launch.nproc=2"),
    "sync": (*SERVER, "strategy.dp.mode=sync"),
    "bounded, 4 ahead": (*SERVER, "strategy.dp.mode=bounded"),
    "async": (*SERVER, "strategy.dp.mode=async"),
}
ROUNDS, STEPS, SLOW_STEPS = 3, 24, 8


def main() -> None:
    runs: dict[tuple[str, bool], list] = {
        (name, slow): [] for name in TRIED for slow in (False, True)
    }
    for _ in range(ROUNDS):
        for name, slow in runs:
            own = (*SLOW, f"steps={SLOW_STEPS}") if slow else (f"steps={STEPS}",)
            runs[name, slow].append(train(*TRIED[name], "launch.threads=1", "eval.every=0", *own))
    speeds = {
        key: median(summary["tokens_per_second"] for summary, _ in several)
        for key, several in runs.items()
    }
    print(
        "| | tokens/s | one of two slowed tenfold | of one unslowed worker | last loss | "
        "staleness | waited |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in TRIED:
        summary, lines = runs[name, False][0]
        server = summary.get("profile", {}).get("asynchronous", {})
        waited = sum(w["wait_seconds"] for w in server["workers"].values()) if server else None
        loss = median(steps[-1]["loss"] for _, steps in runs[name, False])
        alone, stale = speeds[name, False] / 2, lines[-1].get("staleness", 0)
        print(
            f"| {name} | {speeds[name, False]:,.0f} | {speeds[name, True]:,.0f} | "
            f"{speeds[name, True] / alone:.0%} | "
            f"{loss:.3f} | {stale:.2f} | {'–' if waited is None else f'{waited:.1f} s'} |",
            flush=True,
        )
    draw({name: runs[name, False][0][1] for name in TRIED}, speeds, Path("docs/async.png"))


def draw(curves: dict[str, list[dict]], speeds: dict[tuple[str, bool], float], file: Path) -> None:
    """Draw throughput without and with the straggler; loss over gradients and over time."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    bars, gradients, seconds = figure.subplots(1, 3)
    for offset, slow, colour in ((-0.2, False, "#2f6fb5"), (0.2, True, "#d9822b")):
        bars.bar(
            [i + offset for i in range(len(curves))],
            [speeds[name, slow] for name in curves],
            0.38,
            color=colour,
            label="one worker slowed tenfold" if slow else "two equal workers",
        )
    bars.set_xticks(range(len(curves)), curves, fontsize=8)
    bars.set_ylabel("tokens/s")
    bars.legend(frameon=False, fontsize=8)
    for name, lines in curves.items():
        losses = [line["loss"] for line in lines]
        gradients.plot([2 * line["step"] for line in lines], losses, label=name)
        seconds.plot(list(accumulate(line["step_seconds"] for line in lines)), losses, label=name)
    gradients.set_xlabel("gradients, each of half a batch")
    seconds.set_xlabel("seconds")
    for axes in (gradients, seconds):
        axes.set_ylabel("loss")
        axes.legend(frameon=False, fontsize=8)
    for axes in (bars, gradients, seconds):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
