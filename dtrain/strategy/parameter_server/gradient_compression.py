"""Gradients made small for their way to a parameter server, and large again there.

    none        as they are
    fp16, bf16  half the bytes
    top_k       the largest elements of each gradient and their places; the rest joins the next one
    power_sgd   for each matrix two thin ones, P Q' ~ M; the rest joins the next one

A worker has one encoder, which keeps the rest and Q between steps. Sources: Stich et al. 2018,
sparsified SGD with memory (1809.07599); Vogels et al. 2019, PowerSGD (1905.13727).
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
        share: of the elements that top_k keeps.
        rank: of power_sgd's matrices.
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
        self._narrow = NARROW.get(method, dtype)
        self._leaves_rest = method in ("top_k", "power_sgd")
        self._share, self._rank = share, rank
        # what each gradient travels as, on the meta device
        self._layouts = [self._layout(shape) for shape in self.shapes]
        self._sizes = [p.numel() * p.element_size() for pieces in self._layouts for p in pieces]
        self.size = sum(self._sizes)  # in bytes
        self._rest: list[Tensor] = []
        self._q: dict[int, Tensor] = {}

    def _layout(self, shape: Size) -> list[Tensor]:
        if self.method == "top_k":
            number = max(1, round(self._share * prod(shape)))
            sizes: list[tuple[Sequence[int], torch.dtype]]
            sizes = [([number], self.dtype), ([number], torch.int32)]
        elif self.method == "power_sgd" and self._is_smaller_as_two(shape):
            n, m = shape[0], prod(shape[1:])
            sizes = [([n, self._rank], self.dtype), ([m, self._rank], self.dtype)]
        else:
            sizes = [(shape, self._narrow)]
        return [torch.empty(size, dtype=dtype, device="meta") for size, dtype in sizes]

    def _is_smaller_as_two(self, shape: Size) -> bool:
        """Return whether two thin matrices are smaller than the gradient."""
        if len(shape) < 2:
            return False
        n, m = shape[0], prod(shape[1:])
        return self._rank * (n + m) < n * m

    @torch.no_grad()
    def encode(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the message, in bytes. The gradients stay as they are."""
        if self._leaves_rest:
            rest = self._rest or [torch.zeros_like(gradient) for gradient in gradients]
            gradients = [gradient + left for gradient, left in zip(gradients, rest, strict=True)]
        pieces = [
            piece
            for index, gradient in enumerate(gradients)
            for piece in self._pieces(index, gradient)
        ]
        message = torch.cat([piece.contiguous().view(-1).view(torch.uint8) for piece in pieces])
        if self._leaves_rest:
            self._rest = [g - sent for g, sent in zip(gradients, self.decode(message), strict=True)]
        return message

    def _pieces(self, index: int, gradient: Tensor) -> list[Tensor]:
        """Return the pieces as which a gradient travels."""
        layout = self._layouts[index]
        if len(layout) == 1:
            return [gradient.to(self._narrow)]
        if self.method == "top_k":
            flat = gradient.flatten()
            places = flat.abs().topk(layout[0].numel(), sorted=False).indices
            return [flat[places], places.int()]
        matrix = gradient.flatten(1)
        if index not in self._q:
            generator = torch.Generator().manual_seed(index)
            self._q[index] = torch.randn(layout[1].shape, generator=generator).to(matrix)
        p = torch.linalg.qr(matrix @ self._q[index]).Q
        self._q[index] = matrix.T @ p
        return [p, self._q[index]]

    @torch.no_grad()
    def decode(self, message: Tensor) -> list[Tensor]:
        """Return the gradients, without what the message leaves out."""
        parts = iter(torch.split(message, self._sizes))
        gradients = []
        for shape, layout in zip(self.shapes, self._layouts, strict=True):
            first, *second = (next(parts).clone().view(p.dtype).view(p.shape) for p in layout)
            if not second:
                gradients.append(first.to(self.dtype))
            elif self.method == "top_k":
                flat = torch.zeros(prod(shape), dtype=self.dtype)
                gradients.append(flat.index_add(0, second[0].long(), first).view(shape))
            else:
                gradients.append((first @ second[0].T).view(shape))
        return gradients
