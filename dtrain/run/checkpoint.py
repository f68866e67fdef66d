"""Checkpoints: one form for every plan, whole or not there.

    checkpoints/step-00000040/shard-*.safetensors   each rank's part of weights and optimizer states
                              checkpoint.json       step, tokens, size and SHA-256 of every file
    checkpoints/latest -> step-00000040

torch's distributed checkpoint (DCP) writes and reshards; the files are safetensors, so that loading
never unpickles anything. A checkpoint is written under another name, checked off in
`checkpoint.json`, synced and renamed: a kill at any moment leaves the ones before it as they were.
The folder is shared by all nodes.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from dtrain.files.disk import remove, sync
from dtrain.launch.collectives import all_gather_object, on_all_ranks, on_rank_zero
from dtrain.parallel.optimizer import OPTIMIZER_STATE
from dtrain.run.checkpoint_files import (
    MANIFEST,
    check_sizes,
    difference_from,
    file_digest,
    files_of,
    published,
    read_manifest,
    with_checksum,
)

PARTIAL = ".partial-"
VERSION = 1


class Checkpoints:
    """Write a run's checkpoints into one folder. Making one, `save` and `wait` are collectives.

    Args:
        folder: where they go; shared by all ranks.
        keep_last: how many to keep.
        asynchronous: copy the tensors and write them while training goes on.
        ranks: that save, the first among them; None: all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        asynchronous: bool = False,
        ranks: list[int] | None = None,
    ) -> None:
        self.folder, self.keep_last, self.asynchronous = folder, keep_last, asynchronous
        # A group of its own: a thread's collectives must not mix with the training's.
        self._group = dist.new_group(ranks, backend="gloo")
        # plain copies in host memory
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        on_rank_zero(lambda: clear(self.folder))

    @property
    def newest(self) -> str | None:
        """The last one that was published; None: there is none."""
        return str(latest.resolve()) if (latest := self.folder / "latest").exists() else None

    def save(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write the tensors and `about` (JSON) as the state before `step`.

        Raises:
            OSError: this or the last asynchronous save could not be written; earlier ones are
                whole.
        """
        self.wait()
        tensors = _apart({name: _written(name, tensor, {}) for name, tensor in tensors.items()})
        if self.asynchronous:
            copies = self._stager.stage(tensors)
            self._thread = threading.Thread(target=self._write_guarded, args=(step, copies, about))
            self._thread.start()
        else:
            self._write(step, tensors, about)

    def wait(self) -> None:
        """Until the asynchronous save has ended; raises what it raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write_guarded(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        try:
            self._write(step, tensors, about)
        except BaseException as error:  # noqa: BLE001  handed to the training thread by `wait`
            self._error = error

    def _write(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        partial = self.folder / f"{PARTIAL}{step:08d}"
        try:
            self._fill(partial, step, tensors, about)
        except KeyboardInterrupt:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _fill(
        self, partial: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any]
    ) -> None:
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
        except dcp.CheckpointException as error:
            causes = sorted(
                {str(cause).strip().splitlines()[0] for cause, _ in error.failures.values()}
            )
            raise OSError(
                f"checkpoint of step {step} could not be written: {'; '.join(causes)}"
            ) from error
        files = file_digests(
            partial, on_rank_zero(lambda: _written_in(partial), self._group), self._group
        )
        on_rank_zero(lambda: self._publish(partial, step, about, files), self._group)

    def _publish(
        self, partial: Path, step: int, about: dict[str, Any], files: dict[str, Any]
    ) -> None:
        _write_synced(
            partial / MANIFEST,
            with_checksum({"version": VERSION, "step": step, **about, "files": files}),
        )
        sync(partial)
        written = published(self.folder)
        if written:  # what is written last is the newest, also where the clock was set back
            newest = (written[-1] / MANIFEST).stat().st_mtime_ns + 1
            os.utime(
                partial / MANIFEST,
                ns=(newest, max(newest, (partial / MANIFEST).stat().st_mtime_ns)),
            )
        final = self.folder / f"step-{step:08d}"
        # a resumed run comes by the same step again: nothing is replaced
        for again in itertools.count(2):
            if not os.path.lexists(final):
                break
            final = self.folder / f"step-{step:08d}-{again}"
        partial.rename(final)
        pointer = self.folder / f"{PARTIAL}latest"
        remove(pointer)
        pointer.symlink_to(final.name)
        os.replace(pointer, self.folder / "latest")
        sync(self.folder)
        for old in [*written, final][: -self.keep_last]:
            gone = self.folder / f"{PARTIAL}{old.name}"
            old.rename(gone)  # at once: removing takes a while, and a kill would leave half of it
            remove(gone)


def clear(folder: Path) -> None:
    """Remove what a process that was killed has left half-written, or half-removed, among a
    run's checkpoints.
    """
    for left in folder.glob(f"{PARTIAL}*"):
        remove(left)


def _written_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def file_digests(
    folder: Path, names: list[str], group: dist.ProcessGroup | None = None
) -> dict[str, dict[str, Any]]:
    """Sizes and checksums of these files of a folder. A collective: each rank reads its share of
    them.

    So that the others do not wait for one that reads a large model alone, until their patience
    ends.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = names[rank::size]
    shares = on_all_ranks(lambda: {name: file_digest(folder / name) for name in own}, group)
    return {name: found for share in shares for name, found in share.items()}


def verified(path: Path) -> str:
    """What is wrong with the files of a checkpoint, or an empty string.

    A collective, the same on every rank.
    """
    if said := on_rank_zero(lambda: check_sizes(path)):
        return said
    found = file_digests(path, on_rank_zero(lambda: files_of(path)))
    return on_rank_zero(lambda: difference_from(path, found))


def load(path: Path, states: list[dict[str, Tensor]], *, late: bool = False) -> None:
    """Fill the tensors of `states`, whatever their sharding, from the checkpoint. A collective.

    Every rank gives equally many states. An optimizer has no state of a weight that no step has
    used: what is made here of such states, and is not there, is taken out of `states`. `late`: what
    is there, and comes after some steps alone, is put into `states`; an engine would not take it.

    Raises:
        ValueError: the checkpoint is of another model; the first differing tensor and both shapes
            are named.
    """
    reader, saved, ours = _shapes(path, states)
    if late:
        _add_late(reader, saved, ours, states)
    kinds = {name.rpartition(".")[2] for name in saved if name.startswith(OPTIMIZER_STATE)}
    begun = bool(read_manifest(path)["step"])
    for name in [n for n in ours if n.startswith(OPTIMIZER_STATE) and n not in saved]:
        if name.rpartition(".")[2] in kinds or not (kinds or begun):
            del ours[name]
            for tensors in states:
                tensors.pop(name, None)
    for name in sorted(ours | saved, key=lambda n: (n.startswith("optimizer."), n)):
        if ours.get(name) != saved.get(name):
            kind = "optimizer" if name.startswith("optimizer.") else "model"
            raise ValueError(
                f"{path} is of another {kind}: {name} is {saved.get(name, 'absent')} there, "
                f"{ours.get(name, 'absent')} here"
            )
    for tensors in states:
        dcp.load(
            {name: _written(name, tensor, saved) for name, tensor in tensors.items()},
            storage_reader=reader,
        )


def load_weights(
    path: Path, states: list[dict[str, Tensor]], *, taken: list[str], new: list[str]
) -> None:
    """Fill those tensors of `states` that the checkpoint has too, in the same shape; all others
    stay. A collective.

    Args:
        path, states: as `load` takes them; optimizer states are left alone.
        taken, new: told the names of those filled, and of those that stay.

    Raises:
        ValueError: nothing fits.
    """
    reader, saved, ours = _shapes(path, states)
    weights = {name: shape for name, shape in ours.items() if not name.startswith(OPTIMIZER_STATE)}
    taken += [name for name in sorted(weights) if saved.get(name) == weights[name]]
    new += [name for name in sorted(weights) if saved.get(name) != weights[name]]
    if not taken:
        name = new[0]
        raise ValueError(
            f"init_from: nothing in {path} fits this model: {name} is "
            f"{saved.get(name, 'absent')} there, "
            f"{weights[name]} here"
        )
    for tensors in states:
        known = {
            name: _written(name, tensor, saved) for name, tensor in tensors.items() if name in taken
        }
        dcp.load(known, storage_reader=reader)


def _add_late(
    reader: Any, saved: dict[str, Any], ours: dict[str, Any], states: list[dict[str, Tensor]]
) -> None:
    """Make room for states that come after some steps, of weights that have others: no first
    step has made them.
    """
    owners = {name.rpartition(".")[0] for name in ours}
    late = [
        n
        for n in saved
        if n.startswith(OPTIMIZER_STATE) and n not in ours and n.rpartition(".")[0] in owners
    ]
    metadata = reader.read_metadata().state_dict_metadata if late else {}
    for full in late:
        owner = full.rpartition(".")[0]
        weight = owner.removeprefix(OPTIMIZER_STATE)
        for part in (p for p in states if any(n.rpartition(".")[0] == owner for n in p)):
            dtype, like = metadata[full].properties.dtype, part[weight]
            same = saved[full] == tuple(_written(full, like, saved).shape)
            dtype = like.dtype if same and like.is_complex() else dtype
            part[full] = (
                torch.empty_like(like, dtype=dtype)
                if same
                else torch.empty(saved[full], dtype=dtype)
            )
        ours[full] = saved[full]


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors; copies of those that lie among the numbers of others, or not row by row: the
    format takes no such views.
    """
    found, end = dict(tensors), 0
    here = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    for name in sorted((n for n, t in here.items() if t.numel()), key=lambda n: here[n].data_ptr()):
        tensor, begin = here[name], here[name].data_ptr()
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if begin < end or not tensor.is_contiguous():
            found[name] = tensors[name].clone().contiguous()
        end = max(end, begin + (last + 1) * tensor.itemsize)
    return found


def _written(name: str, tensor: Tensor, saved: dict[str, Any]) -> Tensor:
    """A tensor as the format takes it, in the same memory: complex numbers as their two parts, in a
    last dim.

    Unless the checkpoint, whose shapes are `saved`, has them as they are.
    """
    return (
        torch.view_as_real(tensor)
        if tensor.is_complex() and saved.get(name) != tuple(tensor.shape)
        else tensor
    )


def _shapes(
    path: Path, states: list[dict[str, Tensor]]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A reader of the checkpoint, and the shapes of all tensors there and of all ranks here."""
    reader = HuggingFaceStorageReader(str(path))
    saved = {
        n: tuple(getattr(m, "size", ()))
        for n, m in reader.read_metadata().state_dict_metadata.items()
    }
    ours: dict[str, tuple[int, ...]] = {}
    for theirs in all_gather_object(
        {n: tuple(_written(n, t, saved).shape) for part in states for n, t in part.items()}
    ):
        ours |= theirs
    return reader, saved, ours


def _write_synced(file: Path, content: dict[str, Any]) -> None:
    with file.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
