"""Write a log file for each rank: warnings, errors and log records, shown on the console or not."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dtrain.report.terminal import without_control_characters


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_control_characters(super().format(record))


class _File(logging.FileHandler):
    """A log file whose own errors, of a full disk say, do not end the run or hide its error."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def writing(folder: Path, rank: int) -> Iterator[Path]:
    """Write `logs/rank<r>.log` while the context lasts.

    Standard output and error of all ranks but 0 go there too, also what libraries print.
    """
    file = folder / "logs" / f"rank{rank}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _File(file)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    logging.captureWarnings(True)
    logging.getLogger("dtrain").info("rank %d, process %d", rank, os.getpid())
    saved = _redirect(handler) if rank else None
    try:
        yield file
    except BaseException:
        logging.getLogger("dtrain").exception("the run ends with an error")
        raise
    finally:
        if saved:
            _restore(saved)
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


def _redirect(handler: logging.FileHandler) -> tuple[int, int]:
    _flush()
    assert handler.stream is not None
    target = handler.stream.fileno()
    saved = os.dup(1), os.dup(2)
    os.dup2(target, 1)
    os.dup2(target, 2)
    return saved


def _restore(saved: tuple[int, int]) -> None:
    _flush()
    for number, descriptor in zip((1, 2), saved, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
