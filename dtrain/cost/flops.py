"""Floating-point operations: what a batch needs, and what a device can do."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16 peaks by the device's full name, from the vendor's data sheets.
STATED_PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
}
SECONDS = 0.1


def count(run: Callable[[], Tensor]) -> int:
    """Count the operations of matrix products in `run()` and the backward pass of its loss.

    On the meta device this costs no arithmetic. Attention counts as if no score were masked, as is
    usual for MFU; element-wise work does not count.
    """
    with FlopCounterMode(display=False) as counter:
        loss = run()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return a rank's peak in operations a second, and its source: a data sheet or a measurement.

    The measurement is the best of several products of large matrices, on a CPU with this rank's
    threads. All ranks of a machine should call it together: they share the machine's units.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if name in STATED_PEAKS:
            return STATED_PEAKS[name], f"data sheet of {name}, bf16 dense"
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _timed_product(a, b)  # loads the library, which on a GPU takes longer than SECONDS
    best, end = _timed_product(a, b), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        best = min(best, _timed_product(a, b))
    return (
        2 * size**3 / best,
        f"measured: {size} x {size} {str(dtype).removeprefix('torch.')} matrix product",
    )


def _timed_product(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
