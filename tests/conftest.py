from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

# Before torch: threads that wait for each other must not hold the cores that other tests need.
os.environ["OMP_WAIT_POLICY"] = "passive"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# the ranks of a world import the tests' modules by name
sys.path.insert(0, str(Path(__file__).parent))

import warm  # noqa: E402
from hosts import Hosts, NotHere, two_hosts  # noqa: E402
from worlds import World, worlds  # noqa: E402

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
pytest_plugins = ["times"]


SLICES = 24  # of the deep tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="the deep tests too, all of them")
    parser.addoption(
        "--slice", type=int, metavar="K", help=f"slice K of the deep tests too, from 1 to {SLICES}"
    )


def pytest_configure(config: pytest.Config) -> None:
    # as a shell in the background and `nohup` leave them to us
    for each in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(each) == signal.SIG_IGN:
            signal.signal(
                each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL
            )
    settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
    settings.load_profile("quick")
    number = config.getoption("slice")
    if number is not None and not 1 <= number <= SLICES:
        raise pytest.UsageError(f"--slice={number}: there are slices 1 to {SLICES}")
    if not hasattr(config, "workerinput"):  # one cache for all
        folder = tempfile.mkdtemp(prefix="dtrain-tests-")
        os.environ["DTRAIN_CACHE"] = f"{folder}/cache"
        config.add_cleanup(partial(shutil.rmtree, folder, ignore_errors=True))
        if config.getoption("numprocesses", None):  # and one server of warm processes
            os.environ["DTRAIN_NURSERY"] = str(warm.nursery().address)


def pytest_report_header(config: pytest.Config) -> str:
    chosen = config.getoption("slice")
    deep = (
        "all"
        if config.getoption("exhaustive")
        else f"slice {chosen} of {SLICES}"
        if chosen
        else "none"
    )
    return f"deep tests: {deep}"


# What shares something dear, an import on each rank or a fixture, runs in one process; all else
# where there is room.
TOGETHER = {
    r"test_(deepspeed|accelerate|presence_engines|hf)\.py": "engines",
    r"test_capabilities\.py": "capabilities",
    r"test_compare\.py": "compare",
    r"test_faults\.py::test_(killed_ranks|a_lost_node|a_run_that_is_told)": "faults",
    r"test_slurm\.py": "slurm",
    r"test_chaos\.py": "chaos",
}


class Together(LoadScopeScheduling):
    """xdist's way to hand out tests, by the groups above (its own `loadgroup` does not work
    with pytest 9.2).
    """

    def _split_scope(self, nodeid: str) -> str:
        return next(
            (group for pattern, group in TOGETHER.items() if re.search(pattern, nodeid)), nodeid
        )


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the deep tests that are not asked for."""
    chosen = config.getoption("slice")
    left_out = (
        []
        if config.getoption("exhaustive")
        else [
            item
            for item in items
            if item.get_closest_marker("deep")
            and zlib.crc32(item.nodeid.encode()) % SLICES + 1 != chosen
        ]
    )
    config.hook.pytest_deselected(items=left_out)
    gone = set(map(id, left_out))
    items[:] = [item for item in items if id(item) not in gone]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """What a test that fails has started does not disturb the next one."""
    yield
    warm.end_what_is_left()


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where all tests' data are kept, prepared by the first that needs them."""
    return Path(os.environ["DTRAIN_CACHE"])


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """A world of so many ranks, started once."""
    with worlds() as of:
        yield of


@pytest.fixture(scope="session")
def worlds_with_engines() -> Iterator[Callable[[int], World]]:
    """The same, of ranks that have imported DeepSpeed, Accelerate, transformers and the tests
    of these.
    """
    with (
        mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"),
        worlds("test_deepspeed", "test_accelerate", "test_presence_engines", "test_hf") as of,
    ):
        yield of


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts on a cable of their own."""
    try:
        with two_hosts() as both:
            yield both
    except NotHere as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """This process as a world of one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_rank() -> Iterator[None]:
    """The same for one test: of a file that starts runs in this process too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
