"""What a small classifier sees in images."""

from __future__ import annotations

import torch
from torch import Tensor


class Features:
    """The hidden layer of a perceptron that has learned the samples' labels: what a Fréchet
    distance is taken in.

    Trained here, by scikit-learn, in a second or a few; the same everywhere for the same samples.
    """

    WIDTH = 64

    def __init__(self, values: Tensor, labels: Tensor) -> None:
        from sklearn.neural_network import MLPClassifier

        if len(labels.unique()) < 2:
            raise ValueError("samples without two classes have no features to compare")
        self.model = MLPClassifier((self.WIDTH,), max_iter=60, early_stopping=True, random_state=0)
        self.model.fit(values.flatten(1).numpy(), labels.numpy())
        self._weight, self._bias = (
            torch.as_tensor(part[0]) for part in (self.model.coefs_, self.model.intercepts_)
        )

    def __call__(self, values: Tensor) -> Tensor:  # (N, ...) -> (N, WIDTH), in fp64
        flat = values.flatten(1).double().cpu()
        return (flat @ self._weight.double() + self._bias.double()).relu()
