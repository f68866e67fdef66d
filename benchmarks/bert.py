"""The table of docs/tasks.md on pre-training, and docs/bert.png: make bench-bert

Does it help where there are few labels? Pre-trains (+experiment=bert_pretrain, some 40 minutes on
two cores) unless outputs/bert is there; then trains the same model from it and from nothing, and
TF-IDF with logistic regression, on each number of labels: medians of 3 seeds.
"""

from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from runner import read, train
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from dtrain.data.rows import Rows
from dtrain.data.stdlib_rows import Functions
from dtrain.data.tokenizer import Bytes
from dtrain.task.labelled_rows import random_rows

LABELS, SEEDS = (100, 500, None), (0, 1, 2)  # None: all that there are
BERT = Path("outputs/bert")


def last_figures(folder: Path, *settings: str) -> dict[str, float]:
    """Return the last figures of a run on two ranks, which may be an earlier one."""
    if not (folder / "summary.json").exists():
        train("strategy=ddp", "launch.nproc=2", *settings, folder=folder)
    return read(folder)[1][-1]


def baseline(data: Rows, labels: int | None, seed: int) -> float:
    """Return the accuracy of TF-IDF and logistic regression on the same rows."""
    labelled, held_out = random_rows(data.split["train"], labels, seed), data.split["validation"]
    model = make_pipeline(
        TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True),
        LogisticRegression(C=100, max_iter=1000),
    )
    model.fit([row["text"] for _, row in labelled], [row["label"] for _, row in labelled])
    return model.score([row["text"] for _, row in held_out], [row["label"] for _, row in held_out])


torch.set_num_threads(1)
last_figures(BERT, "+experiment=bert_pretrain")
data = Rows("functions", Functions(), Bytes(), group="file")
data.prepare(lambda what, done: None)
ways: dict[str, list[list[float]]] = {
    "pre-trained": [],
    "from nothing": [],
    "TF-IDF + logistic regression": [],
}
for labels in LABELS:
    for way, source in (("pre-trained", str(BERT)), ("from nothing", "null")):
        ways[way].append(
            [
                last_figures(
                    Path(f"outputs/bert_{way.replace(' ', '_')}_{labels}_{seed}"),
                    "+experiment=bert_finetune",
                    f"init_from={source}",
                    f"seed={seed}",
                    f"task.examples={labels or 'null'}",
                    "eval.every=200",
                )["val_accuracy"]
                for seed in SEEDS
            ]
        )
    ways["TF-IDF + logistic regression"].append([baseline(data, labels, seed) for seed in SEEDS])
names = [str(labels or len(data.split["train"])) for labels in LABELS]
print(f"| accuracy with so many labels | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
for way, accuracies in ways.items():
    cells = [f"{median(s):.1%} ({min(s):.1%} to {max(s):.1%})" for s in accuracies]
    print(f"| {way} | {' | '.join(cells)} |")
figure = Figure(figsize=(6, 4), layout="constrained")
axes = figure.subplots()
for way, accuracies in ways.items():
    axes.plot(names, [median(s) for s in accuracies], marker="o", label=way)
    axes.fill_between(names, [min(s) for s in accuracies], [max(s) for s in accuracies], alpha=0.2)
axes.set(xlabel="labels", ylabel="accuracy on files not seen", ylim=(0, 1))
axes.legend()
figure.savefig("docs/bert.png", dpi=120)
