"""What ranks do together: what one of them meets, all of them hear of, and none waits for
another's work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from worlds import World

from dtrain.launch.collectives import on_all_ranks, on_rank_zero
from dtrain.run import checkpoint, checkpoint_files


class Odd(Exception):
    """Nobody else can make it again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _said(function: Callable[[], object]) -> str:
    try:
        return str(function())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _fail(error: Exception) -> None:
    raise error


def _errors(size: int) -> list[str]:
    group, rank = dist.new_group(list(range(size)), timeout=timedelta(seconds=20)), dist.get_rank()
    errors = [
        KeyError("key"),
        RuntimeError("bug"),
        Odd(1, 2),
        AssertionError("never"),
        MemoryError(),
    ]
    told = [
        _said(lambda error=error: on_rank_zero(lambda: _fail(error), group)) for error in errors
    ]  # type: ignore[misc]
    told.append(_said(lambda: on_all_ranks(lambda: _fail(Odd(3, 4)) if rank else rank, group)))
    told.append(_said(lambda: on_all_ranks(lambda: 10 * rank, group)))
    return told


def test_any_error_of_one_rank_is_raised_on_all(world: Callable[[int], World]) -> None:
    """In seconds: nobody is left in the exchange until its timeout."""
    begun = time.monotonic()
    found = world(2).run(_errors, 2)
    assert time.monotonic() - begun < 20
    assert (
        found[0]
        == found[1]
        == [
            "KeyError: 'key'",
            "RuntimeError: bug",
            "RuntimeError: Odd: 1 and 2",
            "AssertionError: never",
            "MemoryError: ",
            "RuntimeError: Odd: 3 and 4",
            "[0, 10]",
        ]
    )


def _read_by(folder: str) -> tuple[list[str], list[str], str, str]:
    """The shards that this rank reads while a checkpoint is written, and while it is verified; what
    is found then, and when a byte has changed.
    """
    read: list[str] = []
    describe = checkpoint_files.file_digest

    def noted(file: Path) -> dict[str, object]:
        read.append(file.name)
        return describe(file)

    with mock.patch.object(checkpoint, "file_digest", noted):
        # A tensor a rank: each writes a shard of its own.
        made = checkpoint.Checkpoints(Path(folder), keep_last=1)
        made.save(1, {f"of.{dist.get_rank()}": torch.ones(8)}, {"tokens": 1})
        path = (Path(folder) / "latest").resolve()
        written = len(read)
        sound = checkpoint.verified(path)
        verified = read[written:]
    dist.barrier()
    if dist.get_rank() == 0:
        shard = sorted(path.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    dist.barrier()
    return read[:written], verified, sound, checkpoint.verified(path)


def test_shards_are_read_by_all_ranks_and_judged_alike(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    """Each of them once, when it is written and when it is verified: no rank waits while
    another reads all.
    """
    found = world(2).run(_read_by, str(tmp_path))
    names = sorted(p.name for p in (tmp_path / "latest").resolve().glob("*.safetensors"))
    for at in (0, 1):
        assert sorted(sum((each[at] for each in found), [])) == names and all(
            len(each[at]) == 1 for each in found
        )
    assert {each[2] for each in found} == {""}
    assert {each[3] for each in found} == {f"{names[1]} does not have its SHA-256"}
