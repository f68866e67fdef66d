"""Report to TensorBoard: every figure of a step is a scalar."""

from __future__ import annotations

from typing import Any

from dtrain.report.base import Logger, Run


class TensorBoard(Logger):
    """Write event files into `<run>/tensorboard`.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "logger=tensorboard needs `tensorboard`: pip install 'dtrain[tensorboard]'"
            ) from None
        self._make = SummaryWriter
        self._writer: SummaryWriter | None = None

    def start(self, run: Run) -> None:
        self._writer = self._make(str(run.folder / "tensorboard"))

    def step(self, figures: dict[str, Any]) -> None:
        assert self._writer is not None
        for name, value in figures.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
