"""Two hosts on one machine: network namespaces with a virtual cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from runs import two_nodes

DEVICE = "veth"


@dataclass(frozen=True)
class Hosts:
    """Their names; host i has the address 10.77.0.(i + 1), on the device DEVICE."""

    names: tuple[str, str]

    def on(self, host: int) -> tuple[str, ...]:
        """What to put before a command, so that it runs there."""
        return "ip", "netns", "exec", self.names[host]

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def node(self, host: int) -> list[str]:
        """torchrun's words for the one node of two that is this host; the rendezvous is on the
        first.
        """
        return [
            *two_nodes(f"{self.address(0)}:29400", f"is_host={1 - host}"),
            "--local-addr",
            self.address(host),
        ]

    def cable(self, *, plugged: bool) -> None:
        """Let packets get lost, as if the cable were pulled out, or arrive again."""
        for host, name in enumerate(self.names):
            other = self.address(1 - host)
            if plugged:
                ip("-n", name, "neigh", "del", other, "dev", DEVICE)
            else:
                ip(
                    "-n",
                    name,
                    "neigh",
                    "replace",
                    other,
                    "lladdr",
                    "02:00:00:00:00:01",
                    "dev",
                    DEVICE,
                    "nud",
                    "permanent",
                )


class NotHere(Exception):  # noqa: N818  a reason to skip
    """This machine allows no such thing; the text says why."""


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make them, and take them away.

    Raises:
        NotHere: there is no permission, or no `ip`.
    """
    if not shutil.which("ip") or os.geteuid():
        raise NotHere("network namespaces need root and iproute2's `ip`")
    names = tuple(f"dtrain-{uuid.uuid4().hex[:6]}-{host}" for host in (0, 1))
    try:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                raise NotHere(f"`ip netns add` is not permitted here: {made.stderr.strip()}")
        end = (DEVICE, "mtu", "9000")
        made = ip(
            "-n",
            names[0],
            "link",
            "add",
            *end,
            "type",
            "veth",
            "peer",
            "name",
            *end,
            "netns",
            names[1],
        )
        if made.returncode:
            raise NotHere(f"no virtual cable can be made here: {made.stderr.strip()}")
        for host, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{host + 1}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                ip("-n", name, "link", "set", device, "up")
        yield Hosts(names)  # type: ignore[arg-type]
    finally:
        for name in names:
            ip("netns", "del", name)
