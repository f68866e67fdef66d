"""GANs beside mixtures of Gaussians: python scripts/bench_gan.py prints the figures of
docs/tasks.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from sklearn.mixture import GaussianMixture

from dtrain.data.images import Digits
from dtrain.task.sample_quality import frechet_distance, precision_recall

SAMPLES = 1024

for name in ("gan_ring", "gan_digits"):
    folder = Path("outputs") / name
    settings = (f"+experiment={name}", f"hydra.run.dir={folder}", "overwrite=true")
    subprocess.run([sys.executable, "scripts/train.py", *settings], check=True)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    print(name, {key: value for key, value in last.items() if key.startswith("val_")})

data = Digits()
data.prepare(lambda what, done: None)
train, held_out = (data.split[side][0] for side in ("train", "validation"))
print(
    "features' accuracy",
    data.features.model.score(held_out.flatten(1).numpy(), data.split["validation"][1].numpy()),
)
drawn = {"real ones, of the other side": train}
for kind in ("diag", "full"):
    mixture = GaussianMixture(10, covariance_type=kind, reg_covar=1e-2, random_state=0).fit(
        train.flatten(1).double().numpy()
    )
    drawn[f"ten Gaussians, {kind}"] = torch.from_numpy(mixture.sample(SAMPLES)[0]).clamp(-1, 1)
for name, values in drawn.items():
    real, made = data.features(held_out), data.features(values)
    precision, recall = precision_recall(real, made)
    print(
        f"{name}: frechet {frechet_distance(real, made):.3f}, precision "
        f"{precision:.3f}, recall "
        f"{recall:.3f}"
    )
