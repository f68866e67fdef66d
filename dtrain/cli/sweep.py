"""The jobs of a sweep (--multirun): one that fails ends no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dtrain.cli.commands import typed_settings
from dtrain.cli.exits import INTERRUPTED, Ended, end, in_one_line
from dtrain.config.secret import masked_override
from dtrain.launch.rank_processes import STOP_REQUESTS
from dtrain.report.sweep import Told, show_job


class JobFailed(Exception):
    """A job of a sweep ended with a status."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line, status)
        self.status = status


@contextmanager
def recorded(jobs: list[Told]) -> Iterator[None]:
    """In a sweep, print which job begins, and note in `jobs` why it failed, if it did.

    Raises:
        JobFailed: in place of the job's end; Hydra keeps it until the other jobs have run.
    """
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        yield
        return
    if STOP_REQUESTS:  # by a signal that came when the job before had done all its steps
        end("interrupted", INTERRUPTED)
    overrides = tuple(map(masked_override, typed_settings()))
    job = Told(str(hydra_config.job.num), overrides, Path(hydra_config.runtime.output_dir))
    show_job(job)
    jobs.append(job)
    try:
        yield
    except Ended as ended:
        if ended.status == INTERRUPTED:
            raise
        job.reason = ended.line
        raise JobFailed(ended.line, ended.status) from None
    except Exception as error:  # Hydra keeps any other, too
        job.reason = in_one_line(error)
        raise
