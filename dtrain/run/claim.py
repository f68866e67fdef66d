"""A run's folder belongs to one run, while it goes on and afterwards."""

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
from dtrain.run.checkpoint_files import AUTO, CHECKPOINTS, MANIFEST, published, run_of

OUTPUTS = Path("outputs")  # where Hydra puts runs by default
RESUMABLE = "resumable"  # a file in the folder of a run that was told to stop
HYDRA = ".hydra"  # Hydra's name of the folder that holds a run's configuration
# where there is one of these there is a run
EVIDENCE = ("metrics.jsonl", "summary.json", f"{CHECKPOINTS}/step-*/{MANIFEST}", "tensorboard/*")
FILES = ("metrics.jsonl", "metrics.new", "summary.json", RESUMABLE)
FOLDERS = ("tensorboard", "logs", "pictures", "profile")
OUTPUT = (*FILES, CHECKPOINTS, *FOLDERS)  # all that a run writes, but for `.hydra`
TOKENIZER = "tokenizer.json"  # written by data
RESTARTED_S = 40.0  # torchrun gives a rank 30 seconds to end, before it starts another one


@contextmanager
def claimed(folder: Path, world: World, config: Config, files: Mapping[str, str]) -> Iterator[Path]:
    """Make the run's folder and lock it while the context lasts. Collective.

    Yields the folder: the one where the ranks were before their launcher restarted them, or else
    the one that was asked for.

    Args:
        folder: rank 0's counts.
        files: texts to write into `.hydra`, by name.

    Raises:
        ValueError: another run goes on there, or has left its figures or weights and is neither
            resumed nor overwritten; or something else is in the way.
        OSError: the folder cannot be written.
    """
    locks: list[Lock] = []
    try:
        yield on_rank_zero(lambda: _claim(folder, world, config, files, locks))
    finally:
        for lock in locks:
            lock.close()


def _claim(
    folder: Path, world: World, config: Config, files: Mapping[str, str], locks: list[Lock]
) -> Path:
    if config.overwrite and config.resume is not None:
        raise ValueError(
            f"overwrite=true begins anew, resume={config.resume} goes on: leave one of them out"
        )
    earlier = run_of((folder, OUTPUTS), world.agents)
    if earlier and earlier.resolve() != folder.resolve():
        with suppress(OSError):
            folder.rmdir()  # made for this attempt
        folder = earlier
    folder.mkdir(parents=True, exist_ok=True)
    check_free(folder, (), (HYDRA,))
    restarted = bool(earlier) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    patience_s = RESTARTED_S if restarted else 0.0
    locks.append(lock := Lock(folder, patience_s=patience_s))
    agents = lock.before.get("agents")
    again = bool(earlier) or (isinstance(agents, list) and any(a in agents for a in world.agents))
    if not (again or _resumes(config, folder)):
        _make_room(folder, config)
    check_free(folder, (*FILES, TOKENIZER), FOLDERS, (CHECKPOINTS,))
    if (checkpoints := folder / CHECKPOINTS).is_symlink():
        locks.append(_lock_target(checkpoints, patience_s))
    lock.leave(agents=sorted(world.agents))
    for name, text in files.items():
        (folder / HYDRA).mkdir(exist_ok=True)
        (folder / HYDRA / name).write_text(text)
    (folder / RESUMABLE).unlink(missing_ok=True)
    return folder.resolve()


def _lock_target(link: Path, patience_s: float) -> Lock:
    """Lock the folder, on another disk say, that a link leads to: another run may link to it."""
    target, own = link.resolve(), link.parent.resolve()
    for folder in (target, *target.parents[:2]):
        if folder != own and any(os.path.lexists(folder / name) for name in (HYDRA, *FILES)):
            raise ValueError(
                f"the link {link} leads into another run's folder, {folder}: lead it to a "
                f"folder of its own, or use another hydra.run.dir"
            )
    lock = Lock(target, patience_s=patience_s, key=CHECKPOINTS)
    lock.leave()
    return lock


def _resumes(config: Config, folder: Path) -> bool:
    """Return whether `resume` names the run in this folder, if there is one."""
    if config.resume in (None, AUTO):
        return config.resume == AUTO
    if config.resume == "latest":
        return bool(published(folder / CHECKPOINTS))
    return Path(str(config.resume)).expanduser().resolve().is_relative_to(folder.resolve())


def _make_room(folder: Path, config: Config) -> None:
    """Refuse a folder that holds a run; with `overwrite` remove what the run has written."""
    paths = (path for pattern in EVIDENCE for path in sorted(folder.glob(pattern)))
    evidence = next((path for path in paths if path.lstat().st_size), None)
    if evidence and not config.overwrite:
        raise ValueError(
            f"hydra.run.dir={folder} holds a run ({evidence.relative_to(folder)}): resume=auto "
            f"goes on with it, overwrite=true removes it, another hydra.run.dir leaves it alone"
        )
    if evidence and config.init_from:
        source = Path(config.init_from).expanduser().resolve()
        if config.init_from == "latest" or source.is_relative_to(folder.resolve()):
            raise ValueError(
                f"overwrite=true would remove what init_from={config.init_from} is to be taken "
                f"from: use another hydra.run.dir"
            )
    for name in OUTPUT if config.overwrite else ():
        remove(folder / name)
