"""What a server does for one worker, in a thread: it hands out weights and takes gradients."""

from __future__ import annotations

import logging
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch.distributed import Store, TCPStore

from dtrain.strategy.parameter_server.connection import Connection, PeerLost
from dtrain.strategy.parameter_server.protocol import OVER, Header, Kind, Life
from dtrain.strategy.parameter_server.server import Server

POLL_S = 0.05  # how often a server looks for a worker
PATIENCE_S = 0.5  # after which a worker that must wait is told so
TURN_S = 0.002  # how often a server looks whether a waiting worker may go on


class WorkerSession:
    """One worker in all its lives.

    Args:
        address: of the store that workers reach.
        timeout_s: after which a silent worker counts as gone.
    """

    def __init__(
        self, server: Server, worker: int, address: tuple[str, int], timeout_s: float
    ) -> None:
        self.server, self.worker = server, worker
        self.address, self.timeout_s = address, timeout_s
        self.gradients = self.compute_seconds = self.wait_seconds = 0.0
        self.traffic = Counter[str]()  # as `Connection.counts`

    def run(self) -> None:
        """Serve the worker until it ends well, or is given up."""
        # a wait on a store holds up all who share it
        store = TCPStore(*self.address, is_master=False)
        try:
            for number in range(self.server.strategy.restarts + 1):
                life = Life(self.worker, number)
                if not self._await_begin(store, life):
                    self.server.give_up(self.worker)
                    if store.check([life.ended]):
                        continue
                    return
                try:
                    name = life.connection(self.server.rank)
                    return self.serve(Connection(store, name, 0, self.timeout_s))
                except PeerLost as error:
                    logging.getLogger("dtrain").warning("worker %d is gone: %s", self.worker, error)
                    store.set(life.lost, "")
                    self.server.remove_worker(self.worker)
        except BaseException as error:  # noqa: BLE001  the rank's loop raises it
            self.server.fail(error)

    def _await_begin(self, store: Store, life: Life) -> bool:
        """Wait for a life to begin; return False if it ended before, or there is no more work."""
        key = life.begun if self.server.rank == 0 else life.welcome
        while not store.check([key]):
            if self.server.failure or any(store.check([k]) for k in (OVER, life.gone, life.ended)):
                return False
            time.sleep(POLL_S)
        if self.server.rank == 0:
            store.set(life.welcome, "")
        return True

    def serve(self, connection: Connection) -> None:
        """Answer one life of the worker, until it says BYE. Raise PeerLost if it is gone."""
        decoders = self.server.share.compressions(self.server.strategy)
        traffic = self.traffic  # of earlier lives
        compute_seconds, wait_seconds = self.compute_seconds, self.wait_seconds
        with ThreadPoolExecutor(1) as aside:  # applies a gradient, while the worker is told to wait
            applied = aside.submit(self.server.add_worker, self.worker)
            try:
                while (header := connection.receive_header()).kind != Kind.BYE:
                    if header.kind == Kind.PULL:
                        self._answer(connection, header.item, applied)
                    if header.kind == Kind.PUSH:
                        decoder = decoders[self.server.model_of(header.item)]
                        used = connection.receive_flags(len(decoder.shapes))
                        message = torch.empty(decoder.size, dtype=torch.uint8)
                        gradients = decoder.decode(connection.receive_tensor(message))
                        self.gradients += 1
                        self.compute_seconds = compute_seconds + header.compute_seconds
                        self.wait_seconds = wait_seconds + header.wait_seconds
                        applied = aside.submit(
                            self.server.push, self.worker, header, gradients, used
                        )
                    self.traffic = traffic + Counter(connection.counts)
            finally:
                applied.result()  # what went wrong there says more than that the worker is gone

    def _answer(self, connection: Connection, wanted: int, applied: Future[None]) -> None:
        """Send the weights, or word to wait or to stop, after PATIENCE_S at the latest.

        Whoever evaluates or saves keeps the lock. A worker that heard nothing for long would think
        that the server is gone.
        """
        deadline = time.monotonic() + PATIENCE_S
        header, weights = Header(Kind.WAIT), None
        if wait([applied], PATIENCE_S).done:
            applied.result()
            while (left := deadline - time.monotonic()) > 0 and self.server.lock.acquire(
                timeout=left
            ):
                try:
                    header, weights = self.server.answer(self.worker, wanted)
                finally:
                    self.server.lock.release()
                if header.kind != Kind.WAIT:
                    break
                time.sleep(TURN_S)
        connection.send_header(header)
        if weights is not None:
            connection.send_tensor(weights)
