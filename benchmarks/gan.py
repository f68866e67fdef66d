"""The figures of docs/tasks.md on GANs, beside mixtures of Gaussians: make bench-gan"""

from pathlib import Path

import torch
from runner import train
from sklearn.mixture import GaussianMixture

from dtrain.data.images import Digits
from dtrain.task.sample_quality import frechet_distance, precision_recall

SAMPLES = 1024

for name in ("gan_ring", "gan_digits"):
    _, lines = train(f"+experiment={name}", "overwrite=true", folder=Path("outputs") / name)
    print(name, {key: value for key, value in lines[-1].items() if key.startswith("val_")})

data = Digits()
data.prepare(lambda what, done: None)
real, held_out = (data.split[side][0] for side in ("train", "validation"))
print(
    "features' accuracy",
    data.features.model.score(held_out.flatten(1).numpy(), data.split["validation"][1].numpy()),
)
samples = {"real ones, of the other side": real}
for kind in ("diag", "full"):
    mixture = GaussianMixture(10, covariance_type=kind, reg_covar=1e-2, random_state=0).fit(
        real.flatten(1).double().numpy()
    )
    samples[f"ten Gaussians, {kind}"] = torch.from_numpy(mixture.sample(SAMPLES)[0]).clamp(-1, 1)
expected = data.features(held_out)
for name, values in samples.items():
    features = data.features(values)
    precision, recall = precision_recall(expected, features)
    print(
        f"{name}: frechet {frechet_distance(expected, features):.3f}, precision {precision:.3f}, "
        f"recall {recall:.3f}"
    )
