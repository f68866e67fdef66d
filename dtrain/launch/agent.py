"""Run torchrun for `launch/node.sh`, and end with the status of the first rank that failed.

torchrun itself would end with 1, and print a report where that rank has said why.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from dtrain.launch.rank_processes import MemoryWatch

FAILED = 1


def main() -> int:
    """Do as torchrun does with the same arguments and environment; return the exit status.

    It is the failed rank's: 2 for a mistake of the user's, 1 for a run that broke off; 128 + N for
    signal N.
    """
    # The rank that fails says why.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    memory = MemoryWatch()
    try:
        torchrun(parse_args(sys.argv[1:]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        # Ranks that were stopped for another's failure are not the reason.
        failures = [each for each in error.failures.values() if each.exitcode != -signal.SIGTERM]
        first = min(failures or error.failures.values(), key=lambda failure: failure.timestamp)
        if first.exitcode > 0:
            return first.exitcode
        reason = str(memory) if first.exitcode == -signal.SIGKILL else ""
        return _failed(
            f"local rank {first.local_rank} of {socket.gethostname()} ended by "
            f"{signal.Signals(-first.exitcode).name}{reason}"
        )
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        return _failed(f"the machines have not met: {str(error).strip() or type(error).__name__}")
    return 0


def _failed(reason: str) -> int:
    print(f"dtrain: {reason}", file=sys.stderr, flush=True)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
