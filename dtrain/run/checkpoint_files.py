"""Find checkpoints and verify their files. `checkpoint.py` writes, publishes and loads them."""

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
    SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError,
    RecursionError, RuntimeError,
)  # fmt: skip
AUTO = "auto"  # resume from the run's newest, if it has any


def resume_candidates(
    resume: str, run_folder: Path, outputs: Path, *, key: str = "resume"
) -> list[Path]:
    """Return the checkpoints that `resume` names, the newest first.

    Args:
        resume: a checkpoint, a folder of them, a run's folder; or `latest`: this run's newest, or
            else the newest of all runs below `outputs`.
        key: the configuration's name of `resume`, for the error.

    Raises:
        ValueError: there is none.
    """
    if resume == "latest":
        written = published(run_folder / CHECKPOINTS)
        if not written:
            runs = [
                published(folder)
                for folder in _below(outputs)
                if os.path.lexists(folder / "latest")
            ]
            written = max(filter(None, runs), key=lambda run: _write_order(run[-1]), default=[])
        where = f"{run_folder} or below {outputs}"
    else:
        path = Path(resume).expanduser()
        if (path / MANIFEST).exists():
            path = path.resolve()
            siblings = published(path.parent)
            written = siblings[: siblings.index(path) + 1] if path in siblings else [path]
        else:
            written = published(path / CHECKPOINTS) or published(path)
        where = str(path)
    if not written:
        raise ValueError(f"{key}={resume}: no checkpoint in {where}")
    return written[::-1]


def run_of(folders: Iterable[Path], agents: frozenset[str]) -> Path | None:
    """Return the newest run below the folders whose checkpoints name one of the agents, or None."""
    runs = []
    for folder in folders if agents else ():
        for path in (path for below in _below(folder) for path in below.glob("step-*")):
            with suppress(ValueError, OSError):  # damaged, or another run has just removed it
                if agents.intersection(read_manifest(path).get("agents", ())):
                    runs.append((_write_order(path), path.parent.parent))
    return max(runs, default=(None, None))[1]


def _below(folder: Path) -> Iterator[Path]:
    """Yield the folders of checkpoints below a folder; links on the way are not followed."""
    for parent, names, _ in os.walk(folder):
        if CHECKPOINTS in names:
            names.remove(CHECKPOINTS)
            yield Path(parent, CHECKPOINTS)


def first_undamaged(
    newest_first: list[Path],
    verify: Callable[[Path], str],
    *,
    fallback: bool,
    note: Callable[[str], None],
) -> Path:
    """Return the newest of the checkpoints, or with `fallback` the newest undamaged one.

    Args:
        verify: returns what is wrong with a checkpoint, as `verify` below.
        note: is called for each damaged one that is left out.

    Raises:
        ValueError: it is damaged; names the damage and the remedy.
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
    """Return what is wrong with the files of a checkpoint, or an empty string."""
    return check_sizes(path) or difference_from(
        path, {name: file_digest(path / name) for name in files_of(path)}
    )


def check_sizes(path: Path) -> str:
    """Return what is wrong as far as names and sizes of files can tell, or an empty string."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    if with_checksum(manifest) != manifest:
        return f"{MANIFEST} does not have its SHA-256"
    files = manifest["files"]
    for name, expected in files.items():
        try:
            status = (path / name).lstat()
        except FileNotFoundError:
            return f"{name} is missing"
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no regular file"
        if status.st_size != expected["bytes"]:
            return f"{name} has {status.st_size} bytes, not {expected['bytes']}"
    if stray := sorted({file.name for file in path.glob(f"*{SHARD}")} - files.keys()):
        return f"{stray[0]} is not in {MANIFEST}"
    return ""


def files_of(path: Path) -> list[str]:
    """Return the names of a checkpoint's files, from its manifest."""
    return list(read_manifest(path)["files"])


def difference_from(path: Path, digests: dict[str, dict[str, Any]]) -> str:
    """Return what is wrong with the files of a checkpoint that have these digests, or ""."""
    for name, expected in read_manifest(path)["files"].items():
        if digests[name] != expected:
            return f"{name} does not have its SHA-256"
    try:
        tensors: dict[str, Any] = (
            HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        )
    except NO_HEADER as error:
        return f"the header of a shard is none of ours: {type(error).__name__}: {str(error)[:80]}"
    for name, tensor in tensors.items():  # loading allocates all of a tensor
        odd = any(
            len(part.offsets) != len(part.sizes) or min(part.offsets, default=0) < 0
            for part in tensor.chunks
        )
        if odd or sum(math.prod(part.sizes) for part in tensor.chunks) != math.prod(tensor.size):
            return f"its parts of {name} do not make it up"
    return ""


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest: step, tokens, files, and what its run added.

    Raises:
        ValueError: a field is absent or none that we write, or names a file elsewhere.
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
    for name, entry in files.items():
        if Path(name).name != name or not name.endswith(SHARD) or not name.isprintable():
            raise ValueError(
                f"{MANIFEST} names the file {name[:80]!r}, which is none of a checkpoint's"
            )
        if not (
            isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and isinstance(entry.get("sha256"), str)
        ):
            raise ValueError(f"{MANIFEST} does not tell bytes and SHA-256 of {name!r}")
    return manifest


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with the checksum of everything else in it."""
    rest = json.loads(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}))
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def steps_of(path: Path) -> int:
    """Return the steps of a checkpoint; 0 if its manifest is damaged: loading it will say so."""
    try:
        manifest = read_manifest(path)
        return int(manifest["step"]) if with_checksum(manifest) == manifest else 0
    except ValueError:
        return 0


def published(folder: Path) -> list[Path]:
    """Return the published checkpoints of a folder, oldest first; links are not followed."""
    resolved = folder.resolve()
    names = [path.name for path in folder.glob("step-*") if (path / MANIFEST).exists()]
    return sorted((resolved / name for name in names), key=_write_order)


def _write_order(path: Path) -> tuple[int, str]:
    return (path / MANIFEST).stat().st_mtime_ns, path.name


def file_digest(file: Path) -> dict[str, Any]:
    """Sync a file; return its size and SHA-256."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": digest(file)}
