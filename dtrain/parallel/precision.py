"""The number formats in which a run computes, keeps weights and reduces gradients."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Precision:
    """One format for everything, or bf16 products with weights and optimizer states in fp32.

    Mixed precision has two ways, both torch's. Under single and ddp autocast casts the inputs of
    each product; activations between blocks stay in fp32. Under fsdp and replicate weights travel
    in bf16, and activations between blocks are bf16 too. Their losses differ by bf16's rounding.

    Args:
        compute: fp32, bf16 or fp64.
        weights: one of the same names; None: fp32, or `compute` where that is wider.
        reduce: format in which fsdp and replicate sum gradients; None: that of the weights.

    Raises:
        ValueError: an unknown name, or a mixture other than products in bf16 with weights in fp32.
    """

    compute: str = "fp32"
    weights: str | None = None
    reduce: str | None = None

    @classmethod
    def of(cls, compute: str, formats: Mapping[str, Any]) -> Precision:
        """Make it of a run's `dtype` and its group `precision`.

        Raises:
            ValueError: an unknown key, or as above.
        """
        keys = [item.name for item in fields(cls) if item.name != "compute"]
        if unknown := [key for key in formats if key not in keys]:
            raise ValueError(
                f"unknown key 'precision.{unknown[0]}': beside it are {', '.join(keys)}"
            )
        return cls(compute, **formats)

    def __post_init__(self) -> None:
        for key, value in (
            ("dtype", self.compute),
            ("precision.weights", self.weights),
            ("precision.reduce", self.reduce),
        ):
            if value is not None and value not in DTYPES:
                raise ValueError(f"{key}={value} is unknown: use {', '.join(DTYPES)}")
        if self.mixed and (self.compute_dtype, self.weights_dtype) != (
            torch.bfloat16,
            torch.float32,
        ):
            raise ValueError(
                f"dtype={self.compute} with precision.weights={self.weights}: only bf16 with fp32 "
                "mix"
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.compute]

    @property
    def weights_dtype(self) -> torch.dtype:
        return (
            DTYPES[self.weights]
            if self.weights
            else torch.promote_types(torch.float32, self.compute_dtype)
        )

    @property
    def reduce_dtype(self) -> torch.dtype:
        return DTYPES[self.reduce] if self.reduce else self.weights_dtype

    @property
    def mixed(self) -> bool:
        return self.compute_dtype != self.weights_dtype

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """Return the context of every forward pass."""
        return (
            torch.autocast(device_type, dtype=self.compute_dtype) if self.mixed else nullcontext()
        )

    def fsdp_policy(self) -> MixedPrecisionPolicy:
        """Return `fully_shard`'s policy: weights travel in `compute`, gradients in `reduce`."""
        return MixedPrecisionPolicy(
            param_dtype=self.compute_dtype if self.mixed else None, reduce_dtype=self.reduce_dtype
        )
