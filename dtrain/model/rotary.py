"""Rotary positions: attention's scores depend on the distance of two tokens alone.

Each pair of a head's features is turned by an angle that grows with the position; early pairs turn
fast. B batch, T tokens, H heads, D features of a head. Source: Su et al. 2021 (2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]  # cosine and sine, each (B, 1, T, D)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Return cosine and sine of each position's angles, in fp32: (B, T) -> 2 x (B, 1, T, D)."""
    exponents = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
    angles = positions.unsqueeze(-1).float() / theta**exponents
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its position's angle: (B, H, T, D) -> same."""
    cosine, sine = (table.to(x.dtype) for table in rotary)
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-right, left), dim=-1) * sine
