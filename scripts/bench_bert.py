"""Does pre-training help with few labels? python scripts/bench_bert.py: a table, and the figure
docs/bert.png.

Pre-trains (+experiment=bert_pretrain, some 40 minutes on two cores) unless outputs/bert is there;
then trains the same model from it and from nothing with so many labels, and TF-IDF with logistic
regression beside it: medians of 3 seeds.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from dtrain.data.rows import Rows
from dtrain.data.stdlib_rows import Functions
from dtrain.data.tokenizer import Bytes
from dtrain.task.labelled_rows import random_rows

LABELS, SEEDS = (100, 500, None), (0, 1, 2)  # None: all that there are
BERT = Path("outputs/bert")


def run(*settings: str) -> dict[str, float]:
    """The last figures of a run on two ranks."""
    folder = next(
        setting.split("=")[1] for setting in settings if setting.startswith("hydra.run.dir=")
    )
    if not (Path(folder) / "summary.json").exists():
        command = [
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "scripts/train.py",
            "strategy=ddp",
        ]
        subprocess.run([sys.executable, "-m", *command, *settings], check=True)
    return json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])


def baseline(data: Rows, labels: int | None, seed: int) -> float:
    """Accuracy of TF-IDF and logistic regression on the same rows."""
    train, held_out = random_rows(data.split["train"], labels, seed), data.split["validation"]
    model = make_pipeline(
        TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True),
        LogisticRegression(C=100, max_iter=1000),
    )
    model.fit([row["text"] for _, row in train], [row["label"] for _, row in train])
    return model.score([row["text"] for _, row in held_out], [row["label"] for _, row in held_out])


torch.set_num_threads(1)
run("+experiment=bert_pretrain", f"hydra.run.dir={BERT}")
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
                run(
                    "+experiment=bert_finetune",
                    f"init_from={source}",
                    f"seed={seed}",
                    f"task.examples={labels or 'null'}",
                    "eval.every=200",
                    f"hydra.run.dir=outputs/bert_{way.replace(' ', '_')}_{labels}_{seed}",
                )["val_accuracy"]
                for seed in SEEDS
            ]
        )
    ways["TF-IDF + logistic regression"].append([baseline(data, labels, seed) for seed in SEEDS])
names = [str(labels or len(data.split["train"])) for labels in LABELS]
print(f"| accuracy with so many labels | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
for way, found in ways.items():
    cells = [f"{median(s):.1%} ({min(s):.1%} to {max(s):.1%})" for s in found]
    print(f"| {way} | {' | '.join(cells)} |")
figure = Figure(figsize=(6, 4), layout="constrained")
axes = figure.subplots()
for way, found in ways.items():
    axes.plot(names, [median(s) for s in found], marker="o", label=way)
    axes.fill_between(names, [min(s) for s in found], [max(s) for s in found], alpha=0.2)
axes.set(xlabel="labels", ylabel="accuracy on files not seen", ylim=(0, 1))
axes.legend()
figure.savefig("docs/bert.png", dpi=120)
