"""Compare two sets of samples by a classifier's features: (N, D) and (M, D), fp64."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Return the distance of two normal distributions: |m - m'|² + tr(S + S' - 2 (S S')^½).

    Source: Dowson & Landau 1982.
    """
    (m, s), (n, t) = ((x.mean(0), torch.cov(x.T)) for x in (real, fake))
    # The trace of (S S')^½ is the sum of the roots of S S''s eigenvalues, which are those of
    # S^½ S' S^½, a symmetric matrix.
    values, vectors = torch.linalg.eigh(s)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return float((m - n).square().sum() + s.trace() + t.trace() - 2 * shared)


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Return the share of fake samples that lie among the real ones, and the reverse.

    A point lies among a set if it is nearer to one of its samples than that sample's third
    neighbour.
    """

    def share_inside(points: Tensor, samples: Tensor) -> float:
        # the first neighbour is the sample itself
        nearest = min(NEIGHBOURS + 1, len(samples))
        radii = torch.cdist(samples, samples).kthvalue(nearest, dim=1).values
        return float((torch.cdist(points, samples) <= radii).any(1).double().mean())

    return share_inside(fake, real), share_inside(real, fake)
