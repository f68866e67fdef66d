"""Which checkpoints there are, and whether they are whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from dtrain.files import json_files
from dtrain.files.disk import digest, sync

CHECKPOINTS, MANIFEST, SHARD = "checkpoints", "checkpoint.json", ".safetensors"
NO_HEADER = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
    RuntimeError,
)
AUTO = "auto"  # resume from the run's newest, if it has any


def resume_candidates(
    resume: str, run_folder: Path, outputs: Path, *, key: str = "resume"
) -> list[Path]:
    """The checkpoints that `resume` names, the newest first.

    Args:
        key: of the configuration, for what is said.
        resume: a checkpoint, a folder of them, a run's folder; or `latest`: this run's newest, or
            else the newest of all runs below `outputs`.

    Raises:
        ValueError: none there; says where.
    """
    if resume == "latest":
        found = published(run_folder / "checkpoints")
        if not found:
            runs = [
                published(folder)
                for folder in _below(outputs)
                if os.path.lexists(folder / "latest")
            ]
            found = max((run for run in runs if run), key=lambda run: _written(run[-1]), default=[])
        where = f"{run_folder} or below {outputs}"
    else:
        path = Path(resume).expanduser()
        if (path / MANIFEST).exists():
            path, written = path.resolve(), published(path.resolve().parent)
            found = written[: written.index(path) + 1] if path in written else [path]
        else:
            found = published(path / "checkpoints") or published(path)
        where = str(path)
    if not found:
        raise ValueError(f"{key}={resume}: no checkpoint in {where}")
    return list(reversed(found))


def run_of(places: Iterable[Path], agents: frozenset[str]) -> Path | None:
    """The run below these folders that ranks of one of these agents were at, as its checkpoints
    tell.
    """
    found = []
    for place in places if agents else ():
        for path in (path for folder in _below(place) for path in folder.glob("step-*")):
            with suppress(ValueError, OSError):  # damaged, or another run has just removed it
                if agents.intersection(read_manifest(path).get("agents", ())):
                    found.append((_written(path), path.parent.parent))
    return max(found, default=(None, None))[1]


def _below(place: Path) -> Iterator[Path]:
    """The folders of checkpoints of the runs below a folder; links on the way to a run are not
    followed.
    """
    for above, names, _ in os.walk(place):
        if CHECKPOINTS in names:
            names.remove(CHECKPOINTS)
            yield Path(above, CHECKPOINTS)


def first_undamaged(
    newest_first: list[Path],
    verify: Callable[[Path], str],
    *,
    fallback: bool,
    note: Callable[[str], None],
) -> Path:
    """The first of these checkpoints.

    Args:
        verify: says what is wrong with one, as below.
        fallback: if it is damaged, take the newest whole one before it, and `note` so.

    Raises:
        ValueError: damaged; says in what, and what would do.
    """
    for path, older in zip(newest_first, [*newest_first[1:], None], strict=True):
        damage = verify(path)
        if not damage:
            return path
        if not older:
            raise ValueError(f"checkpoint {path} is damaged: {damage}; there is no earlier one")
        if not fallback:
            raise ValueError(
                f"checkpoint {path} is damaged: {damage}; checkpoint.fallback=true would take "
                f"{older.name}"
            )
        note(f"checkpoint {path} is damaged: {damage}; falling back to {older.name}")
    raise AssertionError("no checkpoint was given")


def verify(path: Path) -> str:
    """What is wrong with the files of a checkpoint, or an empty string."""
    if said := check_sizes(path):
        return said
    return difference_from(path, {name: file_digest(path / name) for name in files_of(path)})


def check_sizes(path: Path) -> str:
    """What is wrong that can be known without reading the files to their end."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    if with_checksum(manifest) != manifest:
        return f"{MANIFEST} does not have its SHA-256"
    return _outline(path, manifest["files"])


def files_of(path: Path) -> list[str]:
    """The names of a checkpoint's files, as it says itself."""
    return list(read_manifest(path)["files"])


def _outline(path: Path, files: dict[str, dict[str, Any]]) -> str:
    for name, expected in files.items():
        try:
            found = (path / name).lstat()
        except FileNotFoundError:
            return f"{name} is missing"
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is no regular file"
        if found.st_size != expected["bytes"]:
            return f"{name} has {found.st_size} bytes, not {expected['bytes']}"
    if stray := sorted({file.name for file in path.glob(f"*{SHARD}")} - files.keys()):
        return f"{stray[0]} is not in {MANIFEST}"
    return ""


def difference_from(path: Path, found: dict[str, dict[str, Any]]) -> str:
    """What is wrong with its files, of which `found` are the descriptions."""
    for name, expected in read_manifest(path)["files"].items():
        if found[name] != expected:
            return f"{name} does not have its SHA-256"
    try:
        tensors: dict[str, Any] = (
            HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        )
    except (SafetensorError, *NO_HEADER) as error:
        return f"the header of a shard is none of ours: {type(error).__name__}: {str(error)[:80]}"
    for name, tensor in tensors.items():  # whoever reads it makes room for all of it
        odd = any(
            len(part.offsets) != len(part.sizes) or min(part.offsets, default=0) < 0
            for part in tensor.chunks
        )
        if odd or sum(math.prod(part.sizes) for part in tensor.chunks) != math.prod(tensor.size):
            return f"its parts of {name} do not make it up"
    return ""


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, tokens, and what its run gave.

    Raises:
        ValueError: it says what none of ours says; of files, that they are elsewhere.
        OSError: it cannot be read.
    """
    manifest = json_files.read(path / MANIFEST)
    if absent := [
        key for key in ("step", "tokens", "files") if manifest.get(key) in (None, {}, [])
    ]:
        raise ValueError(f"{MANIFEST} tells no {absent[0]}")
    files, agents = manifest["files"], manifest.get("agents", [])
    fits = {
        key: type(manifest[key]) is int and 0 <= manifest[key] < 1 << 63
        for key in ("step", "tokens")
    }
    fits["files"] = isinstance(files, dict)
    fits["agents"] = isinstance(agents, list) and all(isinstance(agent, str) for agent in agents)
    if wrong := [key for key, right in fits.items() if not right]:
        raise ValueError(f"{MANIFEST} has {wrong[0]}={str(manifest[wrong[0]])[:40]}")
    for name, found in files.items():
        if Path(name).name != name or not name.endswith(SHARD) or not name.isprintable():
            raise ValueError(
                f"{MANIFEST} names the file {name[:80]!r}, which is none of a checkpoint's"
            )
        if not (
            isinstance(found, dict)
            and type(found.get("bytes")) is int
            and isinstance(found.get("sha256"), str)
        ):
            raise ValueError(f"{MANIFEST} does not tell bytes and SHA-256 of {name!r}")
    return manifest


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, with the checksum of all else in it."""
    rest = json.loads(
        json.dumps({key: value for key, value in manifest.items() if key != "sha256"})
    )
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def steps_of(path: Path) -> int:
    """That a checkpoint has done; 0 if its manifest is damaged: whoever loads it will say so."""
    try:
        manifest = read_manifest(path)
        return int(manifest["step"]) if with_checksum(manifest) == manifest else 0
    except ValueError:
        return 0


def published(folder: Path) -> list[Path]:
    """The published checkpoints of a folder, in the order in which they were written; a link
    there stays one.
    """
    here = folder.resolve()
    return sorted(
        (here / p.name for p in folder.glob("step-*") if (p / MANIFEST).exists()), key=_written
    )


def _written(path: Path) -> tuple[int, str]:
    return (path / MANIFEST).stat().st_mtime_ns, path.name


def file_digest(file: Path) -> dict[str, Any]:
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": digest(file)}
