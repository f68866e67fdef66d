"""The pipeline's bubble, measured beside its theory: make bench-bubble

Two stages, a core each, of a model with large products.
"""

from statistics import median

from runner import train

SCHEDULES, REPEATS = ("1f1b", "gpipe", "interleaved_1f1b", "zbv"), 3
SETTINGS = (
    "strategy=pipeline",
    "launch.nproc=2",
    "profile=true",
    "steps=4",
    "eval.every=0",
    "model.d_model=2048",
    "model.n_layers=4",
    "global_batch_size=4",
    "strategy.pp.micro_batches=4",
)


def measure(schedule: str) -> dict[str, float]:
    """Return a run's bubble, measured and in theory."""
    summary, _ = train(*SETTINGS, f"strategy.pp.schedule={schedule}")
    return summary["profile"]["bubble"]


rounds = [{schedule: measure(schedule) for schedule in SCHEDULES} for _ in range(REPEATS)]
for schedule in SCHEDULES:
    measured = [each[schedule]["measured"] for each in rounds]
    theory = rounds[0][schedule]["theory"]
    print(
        f"{schedule:18} {median(measured):6.1%} measured ({min(measured):.1%} to "
        f"{max(measured):.1%})  "
        f"{theory:6.1%} in theory"
    )
