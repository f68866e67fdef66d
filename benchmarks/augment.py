"""The table of docs/tasks.md on augmentation: make bench-augment

What does it do where a model overfits, with few samples and many epochs? The lowest and the last
loss on held-out data, medians of 3 seeds.
"""

from statistics import median

from runner import train

IMAGES = (
    "task=image_classification",
    "task.examples=100",
    "steps=600",
    "eval.every=100",
    "eval.batches=100",
)
TEXTS = (
    "task=classification",
    "task.examples=300",
    "model=tiny",
    "steps=600",
    "eval.every=100",
    "eval.batches=40",
)
TRIED = {
    "digits, 100 images": (IMAGES, ("", "crop", "cutout", "mixup", "crop,cutout,mixup")),
    "functions, 300 texts": (
        TEXTS,
        ("", "token_drop", "span_mask", "text_crop", "text_crop,token_drop,span_mask"),
    ),
}


def losses(settings: tuple[str, ...], changes: str, seed: int) -> tuple[float, float, float]:
    """Return the lowest and the last loss on held-out data, and the last accuracy."""
    augment = [f"+task/augment=[{changes}]"] if changes else []
    _, lines = train(*settings, *augment, f"seed={seed}")
    values = [line["val_loss"] for line in lines if "val_loss" in line]
    return min(values), values[-1], lines[-1]["val_accuracy"]


print("| data | augmentation | lowest loss | last loss | last accuracy |\n|---|---|---|---|---|")
for name, (settings, several) in TRIED.items():
    for changes in several:
        lowest, last, accuracy = (
            median(each)
            for each in zip(*(losses(settings, changes, s) for s in (0, 1, 2)), strict=True)
        )
        print(
            f"| {name} | {changes or 'none'} | {lowest:.3f} | {last:.3f} | {accuracy:.1%} |",
            flush=True,
        )
