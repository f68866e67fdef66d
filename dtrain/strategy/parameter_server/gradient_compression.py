"""Gradients made small for their way to a parameter server, and large again there.

    none        as they are
    fp16, bf16  half the bytes
    top_k       each gradient's largest elements and where they are; the rest joins the next one
    power_sgd   of each matrix two thin ones, P Q' ~ M; the rest joins the next one

A worker has one encoder; what it keeps between steps (the rest, Q) is its own. Sources: Stich et
al. 2018, sparsified SGD with memory (1809.07599); Vogels et al. 2019, PowerSGD (1905.13727).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Size, Tensor

METHODS = ("none", "fp16", "bf16", "top_k", "power_sgd")
NARROW = {"fp16": torch.float16, "bf16": torch.bfloat16}


class GradientCompression:
    """How gradients of given shapes travel: as one tensor of bytes.

    Args:
        method: one of METHODS.
        shapes: of the gradients, in the order in which they are handed in.
        dtype: of the gradients.
        share: of the elements that top_k keeps; rank: of power_sgd's matrices.
    """

    def __init__(
        self,
        method: str,
        shapes: Sequence[Size],
        dtype: torch.dtype,
        *,
        share: float = 0.01,
        rank: int = 2,
    ) -> None:
        self.method, self.shapes, self.dtype = method, list(shapes), dtype
        self.kept = [max(1, round(share * prod(shape))) for shape in shapes]
        self.ranks = [self._thin(shape, rank) for shape in shapes]
        self._pieces_of_a_message = self._empty()
        # in bytes
        self.size = sum(piece.numel() * piece.element_size() for piece in self._pieces_of_a_message)
        self._rest: list[Tensor] = []
        self._q: dict[int, Tensor] = {}

    @staticmethod
    def _thin(shape: Size, rank: int) -> int:
        """The rank at which a gradient travels; 0: whole, since two thin matrices would not be
        smaller.
        """
        n, m = (shape[0], prod(shape[1:])) if len(shape) > 1 else (0, 0)
        return rank if rank * (n + m) < n * m else 0

    def _empty(self) -> list[Tensor]:
        """The pieces of a message, on the meta device."""
        made = []
        for shape, kept, rank in zip(self.shapes, self.kept, self.ranks, strict=True):
            if self.method == "top_k":
                made += [
                    torch.empty(kept, dtype=self.dtype, device="meta"),
                    torch.empty(kept, dtype=torch.int32, device="meta"),
                ]
            elif self.method == "power_sgd" and rank:
                made += [
                    torch.empty(size, rank, dtype=self.dtype, device="meta")
                    for size in (shape[0], prod(shape[1:]))
                ]
            else:
                made.append(
                    torch.empty(shape, dtype=NARROW.get(self.method, self.dtype), device="meta")
                )
        return made

    @torch.no_grad()
    def encode(self, gradients: Sequence[Tensor]) -> Tensor:
        """The message: bytes. Gradients are left as they are."""
        if self.method in ("top_k", "power_sgd"):
            rest = self._rest or [torch.zeros_like(gradient) for gradient in gradients]
            gradients = [gradient + left for gradient, left in zip(gradients, rest, strict=True)]
        pieces = [
            piece
            for index, gradient in enumerate(gradients)
            for piece in self._pieces(index, gradient)
        ]
        message = torch.cat([piece.contiguous().view(-1).view(torch.uint8) for piece in pieces])
        if self.method in ("top_k", "power_sgd"):
            self._rest = [g - sent for g, sent in zip(gradients, self.decode(message), strict=True)]
        return message

    def _pieces(self, index: int, gradient: Tensor) -> list[Tensor]:
        if self.method == "top_k":
            flat = gradient.flatten()
            where = flat.abs().topk(self.kept[index], sorted=False).indices
            return [flat[where], where.int()]
        if self.method == "power_sgd" and (rank := self.ranks[index]):
            matrix = gradient.flatten(1)
            if index not in self._q:
                drawn = torch.randn(
                    matrix.shape[1], rank, generator=torch.Generator().manual_seed(index)
                )
                self._q[index] = drawn.to(matrix)
            p = torch.linalg.qr(matrix @ self._q[index]).Q
            self._q[index] = matrix.T @ p
            return [p, self._q[index]]
        return [gradient.to(NARROW.get(self.method, self.dtype))]

    @torch.no_grad()
    def decode(self, message: Tensor) -> list[Tensor]:
        """The gradients, as far as the message tells them."""
        empty = self._pieces_of_a_message
        parts = torch.split(message, [piece.numel() * piece.element_size() for piece in empty])
        pieces = [
            part.clone().view(like.dtype).view(like.shape)
            for part, like in zip(parts, empty, strict=True)
        ]
        found = []
        for shape, rank in zip(self.shapes, self.ranks, strict=True):
            if self.method == "top_k":
                values, where = pieces.pop(0), pieces.pop(0)
                found.append(
                    torch.zeros(prod(shape), dtype=self.dtype)
                    .index_add(0, where.long(), values)
                    .view(shape)
                )
            elif self.method == "power_sgd" and rank:
                found.append((pieces.pop(0) @ pieces.pop(0).T).view(shape))
            else:
                found.append(pieces.pop(0).to(self.dtype))
        return found
