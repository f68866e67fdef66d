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
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from dtrain.files.disk import remove, sync
from dtrain.launch.collectives import all_gather_object, on_all_ranks, on_rank_zero
from dtrain.parallel.optimizer import OPTIMIZER_STATE
from dtrain.run.checkpoint_files import (
    MANIFEST,
    SHARD,
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
    """Write a run's checkpoints into one folder.

    Collective: all ranks make one, save and wait together.

    Args:
        folder: where they go; shared by all ranks.
        keep_last: how many to keep.
        asynchronous: copy the tensors and write them while training goes on.
        ranks: those that save, rank 0 among them; None: all.
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
        plain_copies = StagingOptions(False, False, False, False)  # in host memory
        self._stager = DefaultStager(plain_copies)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        on_rank_zero(lambda: clear(self.folder))

    @property
    def newest(self) -> str | None:
        """The last one that was published, or None."""
        return str(latest.resolve()) if (latest := self.folder / "latest").exists() else None

    def save(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write the tensors and `about` (JSON) as the state after `step` steps.

        Raises:
            OSError: this or the last asynchronous save could not be written; earlier ones are
                whole.
        """
        self.wait()
        tensors = _apart({n: _as_saved(n, tensor, {}) for n, tensor in tensors.items()})
        if self.asynchronous:
            copies = self._stager.stage(tensors)
            self._thread = threading.Thread(target=self._write_guarded, args=(step, copies, about))
            self._thread.start()
        else:
            self._write(step, tensors, about)

    def wait(self) -> None:
        """Wait until the asynchronous save has ended; raise what it raised."""
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
            dcp_save(tensors, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:
            causes = {str(cause).strip().splitlines()[0] for cause, _ in error.failures.values()}
            raise OSError(
                f"checkpoint of step {step} could not be written: {'; '.join(sorted(causes))}"
            ) from error
        names = on_rank_zero(
            lambda: sorted(file.name for file in partial.glob(f"*{SHARD}")), self._group
        )
        files = file_digests(partial, names, self._group)
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
    """Remove what a killed process has left half-written or half-removed among checkpoints."""
    for left in folder.glob(f"{PARTIAL}*"):
        remove(left)


def file_digests(
    folder: Path, names: list[str], group: dist.ProcessGroup | None = None
) -> dict[str, dict[str, Any]]:
    """Return sizes and checksums of these files of a folder. Collective.

    Each rank reads its share: if one read a large model alone, the others would time out.
    """
    own = names[dist.get_rank(group) :: dist.get_world_size(group)]
    shares = on_all_ranks(lambda: {name: file_digest(folder / name) for name in own}, group)
    return {name: digest for share in shares for name, digest in share.items()}


def verified(path: Path) -> str:
    """Return what is wrong with the files of a checkpoint, or an empty string. Collective.

    Every rank returns the same.
    """
    if problem := on_rank_zero(lambda: check_sizes(path)):
        return problem
    digests = file_digests(path, on_rank_zero(lambda: files_of(path)))
    return on_rank_zero(lambda: difference_from(path, digests))


def load(path: Path, states: list[dict[str, Tensor]], *, late: bool = False) -> None:
    """Fill the tensors of `states`, whatever their sharding, from the checkpoint. Collective.

    Every rank gives equally many states. A weight that no step has used has no optimizer state:
    `states` loses those that the checkpoint lacks.

    Args:
        late: add to `states` what an optimizer makes only after some steps. False for strategies
            that cannot restore it (`Plan.without_late_states`).

    Raises:
        ValueError: the checkpoint is of another model; names the first tensor and both shapes.
    """
    reader, saved, shapes = _shapes(path, states)
    if late:
        _add_late(reader, saved, shapes, states)
    kinds = {name.rpartition(".")[2] for name in saved if name.startswith(OPTIMIZER_STATE)}
    begun = bool(read_manifest(path)["step"])
    for name in [n for n in shapes if n.startswith(OPTIMIZER_STATE) and n not in saved]:
        if name.rpartition(".")[2] in kinds or not (kinds or begun):
            del shapes[name]
            for tensors in states:
                tensors.pop(name, None)
    for name in sorted(shapes | saved, key=lambda n: (n.startswith(OPTIMIZER_STATE), n)):
        if shapes.get(name) != saved.get(name):
            kind = "optimizer" if name.startswith(OPTIMIZER_STATE) else "model"
            raise ValueError(
                f"{path} is of another {kind}: {name} is {saved.get(name, 'absent')} there, "
                f"{shapes.get(name, 'absent')} here"
            )
    for tensors in states:
        _read(reader, tensors, saved)


def load_weights(
    path: Path, states: list[dict[str, Tensor]], *, taken: list[str], new: list[str]
) -> None:
    """Fill the weights of `states` that the checkpoint has in the same shape. Collective.

    Args:
        states: as `load` takes them; optimizer states are left alone.
        taken: gets the names of the weights that are filled.
        new: gets the names of the weights that stay as they are.

    Raises:
        ValueError: nothing fits.
    """
    reader, saved, shapes = _shapes(path, states)
    weights = {n: shape for n, shape in shapes.items() if not n.startswith(OPTIMIZER_STATE)}
    taken += [name for name in sorted(weights) if saved.get(name) == weights[name]]
    new += [name for name in sorted(weights) if saved.get(name) != weights[name]]
    if not taken:
        name = new[0]
        raise ValueError(
            f"init_from: nothing in {path} fits this model: {name} is "
            f"{saved.get(name, 'absent')} there, {weights[name]} here"
        )
    for tensors in states:
        _read(reader, {n: tensor for n, tensor in tensors.items() if n in taken}, saved)


def _read(reader: Any, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
    named = {name: _as_saved(name, tensor, saved) for name, tensor in tensors.items()}
    dcp_load(named, storage_reader=reader)


def _add_late(
    reader: Any, saved: dict[str, Any], shapes: dict[str, Any], states: list[dict[str, Tensor]]
) -> None:
    """Allocate the states that an optimizer adds to a weight's others only after some steps."""
    owners = {name.rpartition(".")[0] for name in shapes}
    late = [
        n
        for n in saved
        if n.startswith(OPTIMIZER_STATE) and n not in shapes and n.rpartition(".")[0] in owners
    ]
    metadata = reader.read_metadata().state_dict_metadata if late else {}
    for full in late:
        owner = full.rpartition(".")[0]
        weight = owner.removeprefix(OPTIMIZER_STATE)
        for part in (p for p in states if any(n.rpartition(".")[0] == owner for n in p)):
            dtype, like = metadata[full].properties.dtype, part[weight]
            same = saved[full] == tuple(_as_saved(full, like, saved).shape)
            dtype = like.dtype if same and like.is_complex() else dtype
            part[full] = (
                torch.empty_like(like, dtype=dtype)
                if same
                else torch.empty(saved[full], dtype=dtype)
            )
        shapes[full] = saved[full]


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, copied where they overlap or are not contiguous: the format needs it."""
    separate, end = dict(tensors), 0
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    names = [name for name, tensor in local.items() if tensor.numel()]
    for name in sorted(names, key=lambda name: local[name].data_ptr()):
        tensor, begin = local[name], local[name].data_ptr()
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if begin < end or not tensor.is_contiguous():
            separate[name] = tensors[name].clone().contiguous()
        end = max(end, begin + (last + 1) * tensor.itemsize)
    return separate


def _as_saved(name: str, tensor: Tensor, saved: dict[str, Any]) -> Tensor:
    """View a complex tensor as the format takes it: two real parts in a last dim.

    A tensor whose shape the checkpoint has (`saved`) stays complex.
    """
    real = tensor.is_complex() and saved.get(name) != tuple(tensor.shape)
    return torch.view_as_real(tensor) if real else tensor


def _shapes(
    path: Path, states: list[dict[str, Tensor]]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return a reader, and the shapes of the checkpoint's tensors and of all ranks' tensors."""
    reader = HuggingFaceStorageReader(str(path))
    metadata = reader.read_metadata().state_dict_metadata
    saved = {name: tuple(getattr(entry, "size", ())) for name, entry in metadata.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for of_rank in all_gather_object(
        {n: tuple(_as_saved(n, t, saved).shape) for part in states for n, t in part.items()}
    ):
        shapes |= of_rank
    return reader, saved, shapes


def _write_synced(file: Path, content: dict[str, Any]) -> None:
    with file.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
