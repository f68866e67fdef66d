"""A parameter server and its workers in few processes: what a gradient does to the weights."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from threading import Thread
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import ROWS, NextToken
from own_models import MODELS, OwnModel, Plain
from torch import Tensor, nn

from dtrain.config.schema import Config, Inject, Launch, Straggler
from dtrain.launch.world import World
from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision
from dtrain.strategy.parameter_server.connection import Connection, PeerLost
from dtrain.strategy.parameter_server.protocol import OVER, Header, Kind, Life
from dtrain.strategy.parameter_server.server import Server
from dtrain.strategy.parameter_server.session import WorkerSession
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.parameter_server.trainer import ParameterServerTrainer, local_trainer
from dtrain.strategy.parameter_server.worker import Worker
from dtrain.train import Settings, Trainer

TOLERANCE = 1e-12  # rounding alone, in fp64
RATE, STEPS, MOST = 0.3, 5, 0.2  # the last is what norms are clipped to
SETTINGS = Settings(STEPS, global_batch_size=ROWS)
TIMEOUT_S = 60
CONFIG = Config(
    launch=Launch(timeout_s=TIMEOUT_S),
    inject=Inject(straggler=Straggler(rank=None)),
    seed=0,
    steps=STEPS,
    global_batch_size=ROWS,
    micro_batch_size=None,
)
Found = tuple[list[float], dict[str, Tensor]]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE)


def plan_of(computing: int, servers: int = 1, **options: Any) -> Plan:
    """So many workers and servers."""
    clip_norm = options.pop("clip_norm", None)
    size = computing + servers
    strategy = ParameterServer(size, servers=servers, **options)
    return Plan.of([strategy], size, precision=Precision("fp64"), clip_norm=clip_norm)


def server_of(plan: Plan, rank: int, optimizer: Any = sgd) -> Server:
    strategy: Any = plan.strategy_on("dp")
    trainer = local_trainer(NextToken(), plan, strategy, optimizer, SETTINGS)
    return Server(trainer, strategy, rank, None, TIMEOUT_S)


def test_silence_ends_when_it_has_lasted_as_long_as_it_may() -> None:
    """Of one who is there and says nothing, such as a stopped process."""
    store, heard = dist.HashStore(), []

    def listen() -> None:
        try:
            Connection(store, "silent", 1, 1.0).receive_header()
        except PeerLost as error:
            heard.append(error)

    listener = Thread(target=listen, daemon=True)
    listener.start()
    server = Connection(store, "silent", 0, 1.0)
    listener.join(60)
    assert heard and server.counts["sent"] == 0


# A server hears what is written here


class Written:
    """The other end of a connection: a worker that sends what is written here, and then dies."""

    def __init__(self, *messages: Any) -> None:
        self.left, self.counts = list(messages), {}

    def receive_header(self) -> Header:
        if not self.left:
            raise PeerLost("nobody there")
        return self.left.pop(0)

    def receive_tensor(self, like: Tensor) -> Tensor:
        return like.copy_(self.left.pop(0))

    def receive_flags(self, number: int) -> list[bool]:
        return [True] * number  # used

    def send_header(self, header: Header) -> None:
        """It listens to nothing."""

    def send_tensor(self, tensor: Tensor) -> None:
        """Nor takes anything."""


class Second:
    """The second of two servers, to which gradients come; and its weights as they should be."""

    def __init__(self, computing: int, **options: Any) -> None:
        self.server = server_of(plan_of(computing, 2, **options), rank=1)
        self.own = self.server.share.by_model["model"]
        self.expected = [p.detach().clone() for p in self.own]
        self.chance = torch.Generator().manual_seed(0)

    def gradient(self, factor: float) -> list[Tensor]:
        """A drawn one, which the weights are to follow by so many times the rate."""
        drawn = [torch.randn(p.shape, dtype=p.dtype, generator=self.chance) for p in self.own]
        for weight, gradient in zip(self.expected, drawn, strict=True):
            weight -= factor * RATE * gradient
        return drawn

    def push(self, item: int, gradient: Sequence[Tensor], version: int = 0) -> tuple[Any, Any]:
        encoder = self.server.share.compressions(self.server.strategy)["model"]
        return Header(Kind.PUSH, item, version, 0.0, 1.0), encoder.encode(gradient)

    def serve(self, worker: int, *messages: Any) -> None:
        connection: Any = Written(*messages)
        WorkerSession(self.server, worker, ("", 0), TIMEOUT_S).serve(connection)

    def assert_expected(self) -> None:
        for weight, expected in zip(self.own, self.expected, strict=True):
            torch.testing.assert_close(weight.detach(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_a_gradient_that_is_computed_again_counts_once(mode: str) -> None:
    """Its first worker died when one of two servers had it: that one keeps the first."""
    second = Second(3, mode=mode)
    first, other, again = second.gradient(1), second.gradient(1), second.gradient(0)
    with pytest.raises(PeerLost):
        second.serve(0, Header(Kind.PULL), *second.push(0, first))
    second.serve(1, *second.push(0, again), *second.push(1, other), Header(Kind.BYE))
    second.assert_expected()
    assert second.server.applied == second.server.version == 2


@pytest.mark.parametrize("divides", [True, False])
def test_a_gradients_rate_is_divided_by_its_staleness_if_asked_for(divides: bool) -> None:
    """By the updates since its weights were pulled, where those are more than one."""
    second = Second(5, divide_by_staleness=divides)
    pulled = (0, 0, 0, 3, 0)  # at which version; each of these gradients is an update
    staleness = [version - at for version, at in enumerate(pulled)]
    assert staleness == [0, 1, 2, 0, 4]
    messages: list[Any] = []
    for item, (version, stale) in enumerate(zip(pulled, staleness, strict=True)):
        gradient = second.gradient(1 / max(1, stale) if divides else 1)
        messages += second.push(item, gradient, version)
    second.serve(0, *messages, Header(Kind.BYE))
    second.assert_expected()
    assert second.server.staleness == {0: 2, 1: 1, 2: 1, 4: 1}


# What a worker computes


class Spare(Plain):
    """With a weight that nothing uses, and noise by Python's generator in training."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return super().forward(tokens, positions) * random.choice((0.8, 1.2))


def test_a_worker_draws_by_the_seed_and_says_what_its_rows_have_used(alone) -> None:
    """It is a process of its own, whose Python draws anew in each life."""
    losses = []
    for first in (1, 2):
        worker = Worker((OwnModel(Spare), plan_of(1)), CONFIG, World(1, 2))
        random.seed(first)
        gradients = [worker.gradient(item) for item in (0, 1, 2, 3)]
        losses.append([gradient.loss for gradient in gradients])
    used = gradients[0].by_parameter
    assert losses[0] == losses[1] and len(set(losses[0])) == 4
    names = {name for name, p in worker.models["model"].named_parameters() if id(p) not in used}
    assert names == {"spare.weight", "spare.bias"}


def absent() -> Any:
    """Parts for a worker process, where no rank looks after one."""
    raise AssertionError


def refused(model: str) -> str:
    plan = plan_of(1)
    try:
        ParameterServerTrainer(
            OwnModel(MODELS[model]),
            plan,
            sgd,
            SETTINGS,
            CONFIG,
            World(dist.get_rank(), plan.world_size),
            absent,
        )
    except ValueError as error:
        return str(error)
    return ""


def test_a_model_that_is_another_in_each_process_is_refused(world) -> None:
    """By what no server sends: weights would be the server's."""
    assert (
        world(2).run(refused, "Attribute")
        == [
            "angles of Attribute begins with other values on rank 1 than on rank 0: draw it by "
            "torch's, numpy's "
            "or Python's global generator, which the seed sets, or from a file that all ranks have"
        ]
        * 2
    )


# A whole run: servers are ranks of a world, the worker is a thread of the first


def served(servers: int, **options: Any) -> Found:
    """The losses of a run with one worker, and the weights that this rank would save."""
    rank, plan = dist.get_rank(), plan_of(1, servers, clip_norm=MOST, **options)
    made = ParameterServerTrainer(
        NextToken(), plan, sgd, SETTINGS, CONFIG, World(rank, plan.world_size), absent
    )

    life = Life(0, 0)

    def compute() -> None:
        store = dist.TCPStore(*made.address, is_master=False)
        try:
            own = Worker((NextToken(), plan), CONFIG, World(servers, plan.world_size))
            store.set(life.begun, "")
            names = [life.connection(server) for server in range(servers)]
            own.run([Connection(store, name, 1, TIMEOUT_S) for name in names])
        except BaseException:
            store.set(life.gone, "")  # so that nobody waits
            raise

    log = logging.getLogger("dtrain")
    level, thread = log.level, Thread(target=compute, daemon=True)
    try:
        if rank == 0:
            thread.start()
        losses = [step.loss for step in made.steps()]
    finally:
        log.setLevel(level)
    state = {name: tensor.clone() for name, tensor in made.state().items()}
    return losses, {name: t for name, t in state.items() if not name.startswith("optimizer.")}


@pytest.fixture(scope="module")
def expected(alone) -> Found:
    """Losses and weights of one process, with clipping that cuts."""
    plan = Plan.of([], 1, precision=Precision("fp64"), clip_norm=MOST)
    made = Trainer(NextToken(), plan, sgd, SETTINGS)
    steps = list(made.steps())
    assert min(step.grad_norm for step in steps) > 2 * MOST
    return [step.loss for step in steps], made.state()


def assert_same(found: Found, expected: Found) -> None:
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert (found[1][name] - tensor).norm() <= TOLERANCE * tensor.norm(), name


@pytest.mark.parametrize("mode", ["async", "bounded", "sync"])
def test_one_worker_is_one_process(mode: str, expected) -> None:
    """Nothing is stale then."""
    assert_same(served(1, mode=mode, divide_by_staleness=True), expected)


def test_each_of_two_servers_saves_the_whole_model(expected, world) -> None:
    """Its own share of the weights, and those that the other has."""
    for found in world(2).run(served, 2):
        assert_same(found, expected)


# Who looks after a worker


class Lives:
    """Starts processes that end at once with these statuses; the last is of all later ones."""

    def __init__(self, *statuses: int) -> None:
        self.statuses, self.begun = list(statuses), 0

    def set_forkserver_preload(self, modules: Sequence[str]) -> None:
        """Nothing is forked."""

    def Process(self, target: Any, args: Sequence[Any]) -> Any:
        status = self.statuses[min(self.begun, len(self.statuses) - 1)]
        assert args[-1] == self.begun
        self.begun += 1
        return SimpleNamespace(start=lambda: None, pid=0, exitcode=status)


@pytest.fixture
def keeper(alone) -> Iterator[Any]:
    """A rank that looks after a worker, when all else is over."""

    def of(restarts: int) -> ParameterServerTrainer:
        plan = plan_of(1, restarts=restarts)
        made = ParameterServerTrainer(NextToken(), plan, sgd, SETTINGS, CONFIG, World(1, 2), absent)
        made._store.set(OVER, "")
        return made

    yield of


@pytest.mark.parametrize("restarts", [0, 1, 3])
def test_a_worker_is_started_again_as_often_as_asked_for(restarts: int, keeper) -> None:
    """After the last time it is given up; one that ends well is not started again."""
    for statuses, lives in (((-9,), restarts + 1), ((0,), 1), ((*[1] * restarts, 0), restarts + 1)):
        made, found = keeper(restarts), Lives(*statuses)
        with mock.patch(
            "dtrain.strategy.parameter_server.supervisor.multiprocessing.get_context",
            lambda _, of=found: of,
        ):
            assert list(made.steps()) == []
        assert found.begun == lives
        assert made._store.check([Life(0, 0).gone]) == (statuses[-1] != 0)


def decaying(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=0.5)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_what_no_workers_rows_have_used_is_not_stepped(mode: str) -> None:
    """Of two parts of a round; in async each gradient is a step, of what its own rows have used."""
    plan = plan_of(2, 1, mode=mode)
    server = server_of(plan, 0, decaying)
    own = server.share.by_model["model"]
    before = [p.detach().clone() for p in own]
    zeros, ones = [torch.zeros_like(p) for p in own], [torch.ones_like(p) for p in own]
    first = [True, *[False] * (len(own) - 1)]
    second = [False, True, *[False] * (len(own) - 2)]
    given = [[ones[0], *zeros[1:]], [zeros[0], ones[1], *zeros[2:]]]
    if mode == "sync":
        server._apply_round(0, {0: (given[0], first), 1: (given[1], second)})
    else:
        server._apply(0, given[0], first, 1.0)
    moved = [not torch.equal(p.detach(), old) for p, old in zip(own, before, strict=True)]
    assert moved == [True, mode == "sync", *[False] * (len(own) - 2)]
