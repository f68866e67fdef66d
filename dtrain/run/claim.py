"""Whose a run's folder is: one run's, while it goes on and afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dtrain.config.schema import Config
from dtrain.files.disk import remove
from dtrain.files.lock import Lock, check_free
from dtrain.launch.collectives import on_rank_zero
from dtrain.launch.world import World
from dtrain.run import checkpoint_files

OUTPUTS = Path("outputs")  # where Hydra puts runs by default
RESUMABLE = "resumable"  # a file in the folder of a run that was told to stop
HYDRA = ".hydra"  # a folder in it, as Hydra has it: what was asked for
# by a run
MADE = (
    "metrics.jsonl",
    "summary.json",
    f"checkpoints/step-*/{checkpoint_files.MANIFEST}",
    "tensorboard/*",
)
FILES = ("metrics.jsonl", "metrics.new", "summary.json", RESUMABLE)
FOLDERS = ("tensorboard", "logs", "pictures", "profile")
LEFT = (*FILES, checkpoint_files.CHECKPOINTS, *FOLDERS)
TOKENIZER = "tokenizer.json"  # which data leave beside it
RESTARTED_S = 40.0  # torchrun gives a rank 30 seconds to end, before it starts another one


@contextmanager
def claimed(folder: Path, world: World, config: Config, files: Mapping[str, str]) -> Iterator[Path]:
    """The run's folder, made, and held by this run alone while the context lasts. A collective.

    It is the folder where the ranks were before their launcher restarted them, or else this one.

    Args:
        folder: what rank 0 says counts.
        files: to be left in `.hydra`, by name.

    Raises:
        ValueError: another run goes on there, or has left its figures or weights and is neither
            resumed nor overwritten; or something else is in the way.
        OSError: the folder cannot be written.
    """
    held: list[Lock] = []
    try:
        yield on_rank_zero(lambda: _claim(folder, world, config, files, held))
    finally:
        for lock in held:
            lock.close()


def _claim(
    folder: Path, world: World, config: Config, files: Mapping[str, str], held: list[Lock]
) -> Path:
    if config.overwrite and config.resume is not None:
        raise ValueError(
            f"overwrite=true begins anew, resume={config.resume} goes on: leave one of them out"
        )
    before = checkpoint_files.run_of((folder, OUTPUTS), world.agents)
    if before and before.resolve() != folder.resolve():
        with suppress(OSError):
            folder.rmdir()  # made for this attempt
        folder = before
    folder.mkdir(parents=True, exist_ok=True)
    check_free(folder, (), (HYDRA,))
    restarted = bool(before) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    patience_s = RESTARTED_S if restarted else 0.0
    held.append(lock := Lock(folder, patience_s=patience_s))
    agents = lock.before.get("agents")
    again = bool(before) or (
        isinstance(agents, list) and any(agent in agents for agent in world.agents)
    )
    if not (again or _goes_on(config, folder)):
        _make_room(folder, config)
    check_free(folder, (*FILES, TOKENIZER), FOLDERS, (checkpoint_files.CHECKPOINTS,))
    if (checkpoints := folder / checkpoint_files.CHECKPOINTS).is_symlink():
        held.append(_elsewhere(checkpoints, patience_s))
    lock.leave(agents=sorted(world.agents))
    for name, text in files.items():
        (folder / HYDRA).mkdir(exist_ok=True)
        (folder / HYDRA / name).write_text(text)
    (folder / RESUMABLE).unlink(missing_ok=True)
    return folder.resolve()


def _elsewhere(checkpoints: Path, patience_s: float) -> Lock:
    """Hold the folder, on another disk say, that a link leads to: another run may have the same
    link.
    """
    there, own = checkpoints.resolve(), checkpoints.parent.resolve()
    for at in (there, *there.parents[:2]):
        if at != own and any(os.path.lexists(at / name) for name in (HYDRA, *FILES)):
            raise ValueError(
                f"the link {checkpoints} leads into another run's folder, {at}: lead it to a "
                f"folder of "
                f"its own, or use another hydra.run.dir"
            )
    lock = Lock(there, patience_s=patience_s, key=checkpoint_files.CHECKPOINTS)
    lock.leave()
    return lock


def _goes_on(config: Config, folder: Path) -> bool:
    """Is the run that this folder holds, if there is one, resumed?"""
    if config.resume in (None, checkpoint_files.AUTO):
        return config.resume == checkpoint_files.AUTO
    if config.resume == "latest":
        return bool(checkpoint_files.published(folder / "checkpoints"))
    return Path(str(config.resume)).expanduser().resolve().is_relative_to(folder.resolve())


def _make_room(folder: Path, config: Config) -> None:
    """Refuse a folder that holds a run; or remove what the run has left."""
    found = [
        path for pattern in MADE for path in sorted(folder.glob(pattern)) if path.lstat().st_size
    ]
    if found and not config.overwrite:
        raise ValueError(
            f"hydra.run.dir={folder} holds a run ({found[0].relative_to(folder)}): resume=auto "
            f"goes on "
            f"with it, overwrite=true removes it, another hydra.run.dir leaves it alone"
        )
    source = config.init_from and Path(config.init_from).expanduser().resolve()
    if (
        found
        and source
        and (config.init_from == "latest" or source.is_relative_to(folder.resolve()))
    ):
        raise ValueError(
            f"overwrite=true would remove what init_from={config.init_from} is to be taken from: "
            f"use another hydra.run.dir"
        )
    for name in LEFT if config.overwrite else ():
        remove(folder / name)
