from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # the ranks of a world import the tests' modules by name

from hosts import Hosts, NotHere, two_hosts  # noqa: E402
from worlds import World  # noqa: E402

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="300 drawn models, and every pair of checkpoints' plans")


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("short", max_examples=15, deadline=None, derandomize=True)
    settings.register_profile("exhaustive", max_examples=300, deadline=None)
    settings.load_profile("exhaustive" if config.getoption("exhaustive") else "short")


@pytest.fixture(scope="session")
def exhaustive(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("exhaustive")


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """A world of so many ranks, started once."""
    worlds: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in worlds:
            worlds[size] = World(size)
        return worlds[size]

    yield of
    for each in worlds.values():
        each.close()


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
