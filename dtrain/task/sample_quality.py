"""How like two sets of samples are, told in the features of a classifier: (N, D) and (M, D),
fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """|m - m'|² + tr(S + S' - 2 (S S')^½): the distance of two normal distributions (Dowson &
    Landau 1982).
    """
    (m, s), (n, t) = ((x.mean(0), torch.cov(x.T)) for x in (real, made))
    # (S S')^½ has the eigenvalues' roots for its trace, and those are the roots of S^½ S' S^½,
    # which is symmetric.
    values, vectors = torch.linalg.eigh(s)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return float((m - n).square().sum() + s.trace() + t.trace() - 2 * shared)


def precision_recall(real: Tensor, made: Tensor) -> tuple[float, float]:
    """The share of each set that lies among the other: within a sample's distance to its third
    neighbour there.
    """

    def inside(points: Tensor, of: Tensor) -> float:
        # the first is itself
        own = torch.cdist(of, of).kthvalue(min(NEIGHBOURS + 1, len(of)), dim=1).values
        return float((torch.cdist(points, of) <= own).any(1).double().mean())

    return inside(made, real), inside(real, made)
