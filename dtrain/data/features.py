"""Features of images: the hidden layer of a small classifier."""

from __future__ import annotations

import torch
from torch import Tensor


class Features:
    """The hidden layer of a perceptron that has learned the samples' labels, for Fréchet distances.

    scikit-learn trains it in a few seconds: the same everywhere for the same samples.
    """

    WIDTH = 64

    def __init__(self, values: Tensor, labels: Tensor) -> None:
        from sklearn.neural_network import MLPClassifier

        if len(torch.unique(labels)) < 2:
            raise ValueError("samples without two classes have no features to compare")
        self.model = MLPClassifier((self.WIDTH,), max_iter=60, early_stopping=True, random_state=0)
        self.model.fit(values.flatten(1).numpy(), labels.numpy())
        self._weight, self._bias = (
            torch.as_tensor(part[0]) for part in (self.model.coefs_, self.model.intercepts_)
        )

    def __call__(self, values: Tensor) -> Tensor:  # (N, ...) -> (N, WIDTH), in fp64
        flat = values.flatten(1).double().cpu()
        return (flat @ self._weight.double() + self._bias.double()).relu()
