"""Refuse ranks that would run different things.

A node with an older copy of the code, or another setting, would train something else.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.config.secret import HIDDEN
from dtrain.files.json_files import flat
from dtrain.launch.collectives import all_gather_object

ROOT = Path(__file__).parent.parent


def refuse_differences(
    config: Mapping[str, Any], data: Mapping[str, Any], written: Mapping[str, Any] | None = None
) -> None:
    """Compare what decides the result on every rank. Collective: every rank calls it.

    Args:
        config: of this rank; `launch` is left out, for it may differ from machine to machine.
        data: what the prepared data say of themselves.
        written: the configuration as it may be shown; None: as it is.

    Raises:
        ValueError: on every rank alike; names the first rank that differs, and in what.
    """
    own = _facts(config, data, written)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
    digests = all_gather_object(digest)
    if len(set(digests)) == 1:
        return
    facts, hosts = all_gather_object(own), all_gather_object(socket.gethostname())
    rank = next(rank for rank, each in enumerate(digests) if each != digests[0])
    first, other = facts[0], facts[rank]
    names = sorted(name for name in first | other if first.get(name) != other.get(name))
    differences = [
        f"{name} is {other.get(name, 'absent')} there, {first.get(name, 'absent')} here"
        for name in names[:3]
    ]
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(
        f"rank {rank} on {hosts[rank]} is to run something else than rank 0 on {hosts[0]}: "
        f"{'; '.join(differences)}{more}"
    )


def digest(tensor: Tensor) -> int:
    """Return a checksum of a tensor's values."""
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters, buffers and tensors in plain attributes, which nobody saves."""
    plain = (
        (f"{path}.{key}".strip("."), value)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    )
    for name, tensor in (*model.named_parameters(), *model.named_buffers(), *plain):
        if not tensor.is_meta:
            yield name, tensor


def refuse_other_weights(digests: Mapping[str, int], model: str) -> None:
    """Compare the values that each rank begins with, by name, and the order of the names.

    Collective: every rank calls it.

    Raises:
        ValueError: on every rank alike; names the first tensor that differs.
    """
    by_rank = all_gather_object(dict(digests))
    for rank, own in enumerate(by_rank):
        first = next(r for r in range(rank + 1) if by_rank[r].keys() == own.keys())
        moved = [name for name, other in zip(own, by_rank[first], strict=True) if name != other]
        if moved:
            raise ValueError(
                f"{moved[0]} of {model} stands at another place on rank {rank} than on rank "
                f"{first}: Python gives a set another order in each process; go through a list, "
                f"or through sorted(…)"
            )
        for name, value in own.items():
            other = next((r for r in range(rank) if by_rank[r].get(name, value) != value), None)
            if other is not None:
                raise ValueError(
                    f"{name} of {model} begins with other values on rank {rank} than on rank "
                    f"{other}: draw it by torch's, numpy's or Python's global generator, which the "
                    f"seed sets, or from a file that all ranks have"
                )


def _facts(
    config: Mapping[str, Any], data: Mapping[str, Any], written: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return settings, versions and digests of dtrain's files, by name.

    A setting that may not be shown gets a digest.
    """
    settings, shown = (
        {key: v for key, v in each.items() if key != "launch"}
        for each in (config, written or config)
    )
    facts = {
        key: str(value) for key, value in (flat(shown) | flat(data, "the prepared data.")).items()
    }
    for key, value in flat(settings).items():
        if facts.get(key) != str(value):
            digest = hashlib.sha256(str(value).encode()).hexdigest()
            facts[key] = f"{facts.get(key, HIDDEN)} {digest[:8]}"
    facts |= {"torch": torch.__version__, "Python": platform.python_version()}
    for file in sorted(ROOT.rglob("*.py")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        facts[f"the code of dtrain/{file.relative_to(ROOT).as_posix()}"] = digest[:12]
    return facts
