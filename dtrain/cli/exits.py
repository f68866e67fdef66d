"""End the process with one line and an exit status for each error."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from dtrain.compare.command import Failed
from dtrain.config.errors import USER_ERRORS, explain, system_error
from dtrain.launch.hang_detector import Hang
from dtrain.launch.rank_processes import RanksFailed, write_error_file
from dtrain.report.terminal import on_one_line, without_control_characters
from dtrain.train import NonFinite

USAGE = 2  # exit status for a mistake of the user's
FAILED = 1  # and for a run that broke off
INTERRUPTED = 130
RUN_ERRORS = (NonFinite, Hang)  # no mistakes: a run that cannot go on
# How long other ranks leave rank 0 to say what is wrong, before torchrun stops it for their exit.
GRACE_S = 3.0


class Ended(SystemExit):
    """The process ends with a status, and has printed the line."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(status)
        self.line, self.status = line, status


@contextmanager
def explained(config_name: str) -> Iterator[None]:
    """End the process with one line for a mistake.

    It is entered inside the job too: Hydra says more of an error than that.
    """
    try:
        yield
    except (*USER_ERRORS, *RUN_ERRORS) as error:
        end(explain(error, config_name), FAILED if isinstance(error, RUN_ERRORS) else USAGE)
    except RanksFailed as error:
        if error.status > 0 and error.printed:
            raise Ended(str(error), error.status) from None
        end(str(error), FAILED)
    except Failed as error:
        end(str(error), FAILED)
    except KeyboardInterrupt:
        end("interrupted", INTERRUPTED)
    except (RuntimeError, MemoryError) as error:
        if not system_error(error):
            raise
        end(explain(error, config_name), USAGE)


def end(line: str, status: int) -> NoReturn:
    """Print the line and end the process.

    Other ranks leave rank 0 the time to print and end first.
    """
    own_rank = os.environ.get("RANK", "")
    rank = int(own_rank) if own_rank.isdecimal() else 0
    if os.environ.get("DTRAIN_TRACEBACK"):
        _print_traceback()
    write_error_file(line := on_one_line(line))
    if rank:
        time.sleep(GRACE_S)
    print(f"dtrain: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)
    raise Ended(line, status) from None


def crash(error: Exception) -> NoReturn:
    """End a rank for an error that nobody foresaw, with its traceback."""
    _print_traceback()
    write_error_file(in_one_line(error))
    sys.exit(FAILED)


def in_one_line(error: Exception) -> str:
    """Return an error's class and the first line of its text."""
    return on_one_line(f"{type(error).__name__}: {error}".splitlines()[0])


def _print_traceback() -> None:
    print(without_control_characters(traceback.format_exc()), end="", file=sys.stderr, flush=True)
