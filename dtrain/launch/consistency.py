"""Do all ranks run the same?

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
    """Compare what decides the result on every rank. A collective.

    Args:
        config: of this rank; `launch`, which may differ from machine to machine, is left out.
        data: what these say of themselves.
        written: the configuration as it may be shown; None: as it is.

    Raises:
        ValueError: on every rank alike, naming the first rank that differs, and in what.
    """
    own = _facts(config, data, written)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
    digests = all_gather_object(digest)
    if len(set(digests)) == 1:
        return
    every, hosts = all_gather_object(own), all_gather_object(socket.gethostname())
    rank = next(rank for rank, each in enumerate(digests) if each != digests[0])
    first, other = every[0], every[rank]
    names = sorted(name for name in first | other if first.get(name) != other.get(name))
    told = [
        f"{name} is {other.get(name, 'absent')} there, {first.get(name, 'absent')} here"
        for name in names[:3]
    ]
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(
        f"rank {rank} on {hosts[rank]} is to run something else than rank 0 on {hosts[0]}: "
        f"{'; '.join(told)}{more}"
    )


def digest(tensor: Tensor) -> int:
    """A number that tells a tensor's values from others."""
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a model has values of: parameters, buffers, and tensors in plain attributes, which
    nobody moves or saves.
    """
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
    """Compare the values that each rank begins with, by name, and the order of the names. A
    collective.

    Raises:
        ValueError: on every rank alike, naming the first that the ranks do not have alike.
    """
    every = all_gather_object(dict(digests))
    for rank, theirs in enumerate(every):
        first = next(r for r in range(rank + 1) if every[r].keys() == theirs.keys())
        if moved := [
            name for name, other in zip(theirs, every[first], strict=True) if name != other
        ]:
            raise ValueError(
                f"{moved[0]} of {model} stands at another place on rank {rank} than on rank "
                f"{first}: Python gives a "
                f"set another order in each process; go through a list, or through sorted(…)"
            )
        for name, value in theirs.items():
            other = next((r for r in range(rank) if every[r].get(name, value) != value), None)
            if other is not None:
                raise ValueError(
                    f"{name} of {model} begins with other values on rank {rank} than on rank "
                    f"{other}: draw it by torch's, numpy's or Python's global generator, which the "
                    f"seed sets, or from a file that all ranks have"
                )


def _facts(
    config: Mapping[str, Any], data: Mapping[str, Any], written: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """By name: settings, versions, and a digest of each file of ours and of what is not to be
    shown.
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
            facts[key] = (
                f"{facts.get(key, HIDDEN)} {hashlib.sha256(str(value).encode()).hexdigest()[:8]}"
            )
    facts |= {"torch": torch.__version__, "Python": platform.python_version()}
    for file in sorted(ROOT.rglob("*.py")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        facts[f"the code of dtrain/{file.relative_to(ROOT).as_posix()}"] = digest[:12]
    return facts
