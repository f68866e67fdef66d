"""One checkpoint, any plan: whole or not there, and on the curve of the run that was not
interrupted.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import warm
from cases import (
    MOE,
    STRATEGIES,
    VARIANTS,
    Case,
    Outcome,
    assert_equal,
    find,
    full_tensor,
    refusal,
    trainer,
)

from dtrain.config.schema import Config, LRSchedule
from dtrain.launch.world import World
from dtrain.parallel.strategy import full_tensor, local_part
from dtrain.report.base import Logger
from dtrain.run import checkpoint_files
from dtrain.run.assemble import Parts
from dtrain.run.checkpoint import Checkpoints, _apart, load, load_weights
from dtrain.run.checkpoint_files import read_manifest, run_of, verify
from dtrain.run.resume import Resume, begin_from, manifest_fields, starting_point

STEPS, SAVED_AT = 6, 4
EXACT, CROSS = 0.0, 1e-12  # the same strategy: bit for bit; another one: rounding in fp64
PLANS = [("single", 1), ("ddp", 2), ("replicate", 3), ("fsdp", 4), ("zero2", 2), ("hsdp", 4)]
DEEP, SPREAD = (("n_layers", 4),), (("n_layers", 4), *MOE)


def _train(
    case: Case,
    size: int,
    folder: str,
    save: bool,
    resume: bool,
    asynchronous: bool = False,
    at: int = SAVED_AT,
) -> Outcome:
    made = trainer(case, size)
    if resume:
        path = find(folder, Path(folder), Path(folder), fallback=False, note=print)
        made.load(partial(load, path))
        made.next_step, made.tokens = read_manifest(path)["step"], read_manifest(path)["tokens"]
    checkpoints = (
        Checkpoints(Path(folder), keep_last=1, asynchronous=asynchronous) if save else None
    )
    outcome = Outcome()
    for step in made.steps():
        outcome.losses.append(step.loss)
        if checkpoints and step.step == at:
            checkpoints.save(step.step, made.state(), {"tokens": made.tokens})
    if checkpoints:
        checkpoints.wait()
    outcome.weights = {name: full_tensor(t).clone() for name, t in made.state().items()}
    return outcome


def run(world, case: Case, size: int, *arguments) -> Outcome:
    return (
        _train(case, 1, *arguments)
        if size == 1
        else world(size).run(_train, case, size, *arguments)[0]
    )


@pytest.mark.parametrize(
    "saver",
    [
        *(
            pytest.param(plan, marks=[] if plan[0] in ("single", "hsdp") else pytest.mark.deep)
            for plan in PLANS
        )
    ],
    ids=str,
)
def test_what_one_plan_saves_every_plan_resumes(
    saver: tuple[str, int], world, alone, tmp_path: Path
) -> None:
    strategy, size = saver
    uninterrupted = run(world, Case("gan", strategy, steps=STEPS), size, str(tmp_path), True, False)
    for other, other_size in PLANS:
        resumed = run(
            world, Case("gan", other, steps=STEPS), other_size, str(tmp_path), False, True
        )
        tolerance = EXACT if (other, other_size) == saver else CROSS
        assert resumed.losses == pytest.approx(
            uninterrupted.losses[SAVED_AT:], rel=tolerance, abs=0
        )
        for name, expected in uninterrupted.weights.items():
            assert (resumed.weights[name] - expected).norm() <= tolerance * expected.norm(), (
                other,
                name,
            )


def _all_from(saver: str, plans: list[str], model: tuple, folder: str) -> int:
    """One plan saves at step 2 of 3, then all resume from it, on one process's curve; how many
    did.
    """
    cases = {
        plan: Case("next_token", plan, steps=3, model=model) for plan in ("single", saver, *plans)
    }
    expected = _train(cases["single"], 1, folder, False, False)
    resumed = replace(expected, losses=expected.losses[2:])
    saved = _train(cases[saver], 4, f"{folder}/{saver}", True, False, at=2)
    assert_equal(saved, expected, CROSS)
    for plan in plans:
        ours = _train(cases[plan], 4, f"{folder}/{saver}", False, True)
        try:
            assert_equal(ours, resumed, CROSS)
            if plan == saver:
                # ddp puts its buckets in another order after a first step, and sums of four depend
                # on theirs.
                exact = CROSS if plan == "ddp" else EXACT
                assert_equal(ours, replace(saved, losses=saved.losses[2:]), exact)
        except AssertionError as error:
            raise AssertionError(f"{plan} from {saver}: {error}") from None
    return len(plans)


SPREADING = ["expert", "moe_fsdp", "fsdp_tensor", "pipeline_fsdp", "zero1", "1f1b", "ring"]
DENSE = [
    s for s in STRATEGIES if s not in VARIANTS and not refusal(Case("next_token", s, model=DEEP), 4)
]
# One of a kind, each resumed by the next: sliced, staged, replicated with states shared out, of
# several axes.
RING_OF_PLANS = ["fsdp", "1f1b", "zero1", "tensor_sequence", "pipeline_tensor", "hsdp"]


@pytest.mark.parametrize(("saver", "plans", "model"), [
    *((saver, [saver, following], DEEP) for saver,
      following in pairwise([*RING_OF_PLANS, RING_OF_PLANS[0]])),
    ("moe_fsdp", ["moe_fsdp", "expert"], SPREAD),
    *(pytest.param(saver, DENSE, DEEP, marks=pytest.mark.deep) for saver in DENSE),
    *(pytest.param(saver, SPREADING, SPREAD, marks=pytest.mark.deep) for saver in SPREADING),
], ids=lambda v: v if isinstance(v, str) else str(len(v)))  # fmt: skip
def test_every_plan_on_four_ranks_resumes_from_others(
    saver: str, plans: list[str], model: tuple, world, tmp_path: Path
) -> None:
    """From itself and from another one; the deep tests: from every one."""
    assert world(4).run(_all_from, saver, plans, model, str(tmp_path)) == [len(plans)] * 4


def _states(size: int) -> list[str]:
    made = trainer(Case("gan", "zero1", steps=1), size)
    made.load(lambda states: None)
    made.load(lambda states: None)  # of which ranks that step something have states by now
    filled = sorted(made.state())
    for _ in made.steps():
        pass
    assert sorted(made.state()) == filled
    return filled


def test_a_rank_with_no_share_of_the_optimizer_asks_for_no_message(world) -> None:
    """Four tensors among six ranks: the two that step nothing must not be alone in filling
    states.
    """
    names = world(6).run(_states, 6)
    assert sum(any(n.startswith("optimizer.generator") for n in each) for each in names) == 4


def test_an_asynchronous_save_is_of_its_step_though_training_went_on(world, tmp_path: Path) -> None:
    case = Case("next_token", "fsdp", steps=STEPS)
    outcomes = []
    for name, asynchronous in (("blocking", False), ("background", True)):
        run(world, case, 4, str(tmp_path / name), True, False, asynchronous)
        outcomes.append(run(world, case, 4, str(tmp_path / name), False, True))
    assert outcomes[0].losses == outcomes[1].losses


def _several(folder: str, steps: list[int], keep_last: int) -> None:
    made = trainer(Case("next_token", "fsdp", steps=1), 2)
    checkpoints = Checkpoints(Path(folder), keep_last=keep_last)
    for step in steps:
        checkpoints.save(step, made.state(), {"tokens": 0})


def _staged_apart(folder: str) -> bool:
    made = trainer(Case("next_token", "fsdp", steps=1), 2)
    tensors = {name: local_part(tensor) for name, tensor in made.state().items()}
    staged = Checkpoints(Path(folder), keep_last=1, asynchronous=True)._stager.stage(made.state())
    return all(
        local_part(staged[name]).data_ptr() != t.data_ptr()
        for name, t in tensors.items()
        if t.numel()
    )


def test_an_asynchronous_save_copies_every_tensor(world, tmp_path: Path) -> None:
    assert world(2).run(_staged_apart, str(tmp_path)) == [True, True]


@pytest.fixture
def three(world, tmp_path: Path) -> Path:
    world(2).run(_several, str(tmp_path), [1, 2, 3], 3)
    return tmp_path


def test_only_the_last_are_kept_and_latest_points_at_the_newest(world, three: Path) -> None:
    world(2).run(_several, str(three), [4], 2)
    assert sorted(p.name for p in three.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert (three / "latest").resolve().name == "step-00000004"


def test_a_run_resumed_from_an_earlier_one_is_the_newest(world, three: Path) -> None:
    """Step 2 again, after 3: nothing is replaced, the new one is the latest, and the oldest
    goes first.
    """
    world(2).run(_several, str(three), [2], 3)
    assert sorted(p.name for p in three.glob("step-*")) == [
        "step-00000002",
        "step-00000002-2",
        "step-00000003",
    ]
    assert find(str(three), three, three, fallback=False, note=print).name == "step-00000002-2"


def test_a_clock_that_was_set_back_makes_no_checkpoint_old(world, three: Path) -> None:
    for manifest in three.glob("step-*/checkpoint.json"):
        later = manifest.stat().st_mtime_ns + 7200 * 10**9
        os.utime(manifest, ns=(later, later))
    world(2).run(_several, str(three), [4, 5], 2)
    assert sorted(p.name for p in three.glob("step-*")) == ["step-00000004", "step-00000005"]
    assert (
        (three / "latest").resolve().name
        == checkpoint_files.published(three)[-1].name
        == "step-00000005"
    )


def test_leftovers_of_a_killed_save_are_cleared(world, three: Path) -> None:
    (three / ".partial-00000009").mkdir()
    (three / ".partial-00000009" / "shard").write_bytes(b"half")
    world(2).run(_several, str(three), [4], 3)
    assert not list(three.glob(".partial*"))


def damage_truncate(path: Path) -> None:
    file = next(path.glob("shard-*"))
    file.write_bytes(file.read_bytes()[:-7])


def damage_flip(path: Path) -> None:
    file = next(path.glob("shard-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_lose(path: Path) -> None:
    next(path.glob("shard-*")).unlink()


def damage_manifest(path: Path) -> None:
    (path / "checkpoint.json").write_text('{"step": 3')


def damage_number(path: Path) -> None:
    told = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(told | {"step": told["step"] + 1}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_number, "checkpoint.json does not have its SHA-256"),
        (damage_truncate, "bytes, not"),
        (damage_flip, "SHA-256"),
        (damage_lose, "is missing"),
        (damage_manifest, "not readable"),
    ],
)
def test_damage_is_named_and_earlier_ones_taken_only_if_told(
    damage, said: str, three: Path
) -> None:
    newest = three / "step-00000003"
    assert verify(newest) == ""
    damage(newest)
    with pytest.raises(
        ValueError,
        match=f"step-00000003 is damaged: .*{said}.*fallback=true would take step-00000002",
    ):
        find(str(three), three, three, fallback=False, note=print)
    notes: list[str] = []
    assert find(str(three), three, three, fallback=True, note=notes.append).name == "step-00000002"
    assert "falling back to step-00000002" in notes[0]


FILES = {"shard-1.safetensors": {"bytes": 1, "sha256": "0"}}


def _told(path: Path, **told: Any) -> None:
    """Let the manifest say this, and have its SHA-256."""
    manifest = {**json.loads((path / "checkpoint.json").read_text()), **told}
    (path / "checkpoint.json").write_text(
        json.dumps(
            checkpoint_files.with_checksum({k: v for k, v in manifest.items() if v != "none"})
        )
    )


def _shard(path: Path) -> Path:
    return min(path.glob("shard-*"))


def _linked(path: Path) -> None:
    """The same file, but elsewhere."""
    _shard(path).rename(path.parent.parent / "elsewhere")
    _shard_name = sorted(read_manifest(path)["files"])[0]
    (path / _shard_name).symlink_to(path.parent.parent / "elsewhere")


def _piped(path: Path) -> None:
    shard = _shard(path)
    shard.unlink()
    os.mkfifo(shard)


def _raw(path: Path, text: str) -> None:
    (path / "checkpoint.json").write_text(text)


def _header(path: Path, header: Any, length: int | None = None) -> None:
    """A shard of two numbers with this header, which its manifest vouches for."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    _shard(path).write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + bytes(8)
    )
    _told(path, files={_shard(path).name: checkpoint_files.file_digest(_shard(path))})


def _parts(path: Path, told: Any, shape: int = 2) -> None:
    """The shard says this of where its part of a tensor lies."""
    text = told if isinstance(told, str) else json.dumps(told)
    _header(
        path,
        {
            "__metadata__": {"DCP_SHARDING_INFO": text},
            "weight": {"dtype": "F32", "shape": [shape], "data_offsets": [0, 8]},
        },
    )


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file above": (
        lambda p: _told(p, files={"../x.safetensors": FILES["shard-1.safetensors"]}),
        "names the file '../x",
    ),
    "a file of the system": (
        lambda p: _told(p, files={"/etc/passwd": FILES["shard-1.safetensors"]}),
        "names the file '/etc",
    ),
    "a device": (
        lambda p: _told(p, files={"/dev/zero": {"bytes": 0, "sha256": ""}}),
        "names the file '/dev/zero'",
    ),
    "a file within": (
        lambda p: _told(p, files={"a/b.safetensors": FILES["shard-1.safetensors"]}),
        "names the file 'a/b",
    ),
    "another kind": (
        lambda p: _told(p, files={"latest": FILES["shard-1.safetensors"]}),
        "names the file 'latest'",
    ),
    "no files": (lambda p: _told(p, files={}), "tells no files"),
    "files in a list": (lambda p: _told(p, files=["shard"]), r"has files=\['shard'\]"),
    "a file without a size": (
        lambda p: _told(p, files={"shard-1.safetensors": {}}),
        "does not tell bytes",
    ),
    "a file of nothing": (
        lambda p: _told(p, files={"shard-1.safetensors": None}),
        "does not tell bytes",
    ),
    "a negative step": (lambda p: _told(p, step=-7), "step=-7"),
    "a step in words": (lambda p: _told(p, step="3"), "step=3"),
    "a step of a kind": (lambda p: _told(p, step=True), "step=True"),
    "no step": (lambda p: _told(p, step="none"), "tells no step"),
    "tokens of no number": (lambda p: _told(p, tokens=[1]), r"tokens=\[1\]"),
    "no tokens": (lambda p: _told(p, tokens="none"), "tells no tokens"),
    "more tokens than there are": (lambda p: _told(p, tokens=10**400), "tokens=1000"),
    "agents of no kind": (lambda p: _told(p, agents=3), "agents=3"),
    "agents in lists": (lambda p: _told(p, agents=[["x"]]), "agents="),
    "half a letter": (
        lambda p: _told(p, files={"\ud800.safetensors": FILES["shard-1.safetensors"]}),
        "names the file",
    ),
    "a deep header": (lambda p: _header(p, '{"weight":' * 200_000), "header"),
    "a header of all memory": (lambda p: _header(p, "{}", 2**63), "header"),
    "a header longer than its file": (lambda p: _header(p, "{}", 2**20), "header"),
    "a header that is cut": (lambda p: _header(p, "{", 1), "header"),
    "a tensor beyond its file": (
        lambda p: _header(
            p, {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**40]}}
        ),
        "header",
    ),
    "a tensor larger than its numbers": (
        lambda p: _header(
            p, {"weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}
        ),
        "header",
    ),
    "a tensor of no kind": (
        lambda p: _header(p, {"weight": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}}),
        "header",
    ),
    "deep parts": (lambda p: _parts(p, "[" * 200_000), "header"),
    "parts in a list": (lambda p: _parts(p, []), "header"),
    "parts of another": (lambda p: _parts(p, {"bias": {"saved_offsets": [0]}}), "header"),
    "a part nowhere": (lambda p: _parts(p, {"weight": None}), "header"),
    "a part in words": (lambda p: _parts(p, {"weight": {"saved_offsets": "0"}}), "header"),
    "a part at a fraction": (lambda p: _parts(p, {"weight": {"saved_offsets": [0.5]}}), "header"),
    "a part beyond numbers": (
        lambda p: _parts(p, {"weight": {"saved_offsets": [2**70]}}),
        "do not make it up",
    ),
    "a part of more memory than there is": (
        lambda p: _parts(p, {"weight": {"saved_offsets": [2**50]}}),
        "its parts of weight do not make it up",
    ),
    "a part before the begin": (
        lambda p: _parts(p, {"weight": {"saved_offsets": [-1]}}),
        "do not make it up",
    ),
    "a part of more dims": (
        lambda p: _parts(p, {"weight": {"saved_offsets": [0, 0]}}),
        "do not make it up",
    ),
    "a list": (lambda p: _raw(p, "[]"), "holds no JSON object"),
    "deep": (
        lambda p: _raw(p, '{"step": 3, "files": ' + '{"a":' * 500 + "1" + "}" * 501),
        "nested deeper",
    ),
    "very deep": (lambda p: _raw(p, "[" * 200_000), "nested too deep"),
    "a large number": (lambda p: _raw(p, '{"step": ' + "9" * 5000 + "}"), "not readable"),
    "a link out": (_linked, "is no regular file"),
    "a pipe": (_piped, "is no regular file"),
    "one more": (
        lambda p: (p / "shard-x.safetensors").write_bytes(b"x"),
        "shard-x.safetensors is not in checkpoint.json",
    ),
}


@pytest.fixture(scope="module")
def two(alone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one process."""
    folder = tmp_path_factory.mktemp("two")
    for step in (2, 3):
        Checkpoints(folder, keep_last=2).save(step, {"weight": torch.ones(2)}, {"tokens": 0})
    return folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_somebody_else_has_made_is_refused_by_name_and_disturbs_no_other_run(
    kind: str, two: Path, tmp_path: Path
) -> None:
    """Before anything of it is read; runs that look below the same folder go on."""
    three = tmp_path / "run" / "checkpoints"
    shutil.copytree(two, three, symlinks=True)
    newest, (change, said) = three / "step-00000003", HOSTILE[kind]
    change(newest)
    with pytest.raises(ValueError, match=f"step-00000003 is damaged: .*{said}") as found:
        find(str(three), three, three, fallback=False, note=print)
    assert "\n" not in str(found.value)
    assert (
        find(str(three), three, three, fallback=True, note=lambda text: None).name
        == "step-00000002"
    )
    assert (
        checkpoint_files.steps_of(newest) in (0, 3)
        and run_of([three.parent], frozenset({"x"})) is None
    )
    assert checkpoint_files.resume_candidates("latest", tmp_path / "new", tmp_path)[0] == newest


def test_what_is_kept_last_is_of_this_run_alone(alone, tmp_path: Path) -> None:
    """A link in its folder goes, and the checkpoint of another run behind it stays; a dangling
    one is no place.
    """
    theirs, ours = (
        Checkpoints(tmp_path / run / "checkpoints", keep_last=1) for run in ("theirs", "ours")
    )
    theirs.save(1, {"weight": torch.ones(2)}, {"tokens": 0})
    there = tmp_path / "theirs" / "checkpoints" / "step-00000001"
    here = tmp_path / "ours" / "checkpoints"
    here.mkdir(parents=True)
    for name in ("step-00000001", ".partial-00000009"):
        (here / name).symlink_to(there)
    (here / "step-00000002").symlink_to(tmp_path / "nowhere")
    Checkpoints(here, keep_last=1)
    for step in (2, 3):
        ours.save(step, {"weight": torch.ones(2)}, {"tokens": 0})
    assert verify(there) == "" and sorted(p.name for p in here.glob("*-0*")) == [
        "step-00000002",
        "step-00000003",
    ]
    assert (here / "step-00000002").is_symlink() and read_manifest(here / "latest")["step"] == 3


def test_links_are_not_followed_to_runs(tmp_path: Path) -> None:
    """Two of them that lead back make 2^40 ways; a run's own folder of checkpoints may be a
    link.
    """
    mine, far = tmp_path / "outputs" / "mine", tmp_path / "far"
    _small(far / "step-00000001", 1)
    mine.mkdir(parents=True)
    (mine / "checkpoints").symlink_to(far)
    (far / "latest").symlink_to("step-00000001")
    for name in "xy":
        (tmp_path / "outputs" / name).symlink_to(".")
    assert run_of([tmp_path / "outputs"], frozenset({"agent"})) == mine
    assert checkpoint_files.resume_candidates("latest", tmp_path / "new", tmp_path / "outputs") == [
        far / "step-00000001"
    ]


def _small(folder: Path, step: int) -> None:
    """A checkpoint, as far as is looked at to find it."""
    folder.mkdir(parents=True)
    files = {"a.safetensors": {"bytes": 1, "sha256": ""}}
    (folder / checkpoint_files.MANIFEST).write_text(
        json.dumps({"step": step, "tokens": 0, "files": files, "agents": ["agent"]})
    )


def test_a_restart_finds_the_run_of_its_own_launch(tmp_path: Path) -> None:
    for name, step, agents in (
        ("a", 5, ["x"]),
        ("a", 9, ["x", "y"]),
        ("b", 7, ["z"]),
        ("c", 8, []),
    ):
        checkpoint = tmp_path / name / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text(
            json.dumps(
                checkpoint_files.with_checksum(
                    {"step": step, "tokens": 0, "agents": agents, "files": FILES}
                )
            )
        )
        os.utime(checkpoint / "checkpoint.json", ns=(step, step))

    def found(*agents: str) -> str | None:
        path = run_of([tmp_path], frozenset(agents))
        return path and str(path.relative_to(tmp_path))

    assert found("x") == found("y", "new") == "a" and found("z") == "b"
    assert found("x", "z") == "a"  # where the newest is
    assert found() is None and found("new") is None
    newest = tmp_path / "a" / "checkpoints" / "step-00000009"
    assert checkpoint_files.steps_of(newest) == 9
    damage_number(newest)
    # so that it is not passed over, but refused by its name
    assert checkpoint_files.steps_of(newest) == 0


def test_no_checkpoint_is_said_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"resume=latest: no checkpoint in {tmp_path}"):
        find("latest", tmp_path, tmp_path, fallback=False, note=print)


def _load_other(folder: str) -> str:
    made = trainer(Case("next_token", "fsdp", steps=1, model=(("d_model", 48),)), 2)
    try:
        made.load(
            partial(load, find(folder, Path(folder), Path(folder), fallback=False, note=print))
        )
    except ValueError as error:
        return str(error)
    return ""


def test_another_model_is_refused_by_its_first_tensor_and_both_shapes(world, three: Path) -> None:
    for said in world(2).run(_load_other, str(three)):
        assert (
            "another model: model.blocks.0.attention.key.weight is (24, 24) there, (48, 48) here"
            in said
        )


def test_nothing_in_a_checkpoint_is_a_pickle(three: Path) -> None:
    names = {p.suffix for p in three.glob("step-*/*")}
    assert names == {".safetensors", ".json"}


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(2))
def test_kill_9_during_a_save_leaves_the_last_one_whole(seed: int, tmp_path: Path) -> None:
    """A save at every step, so that the kill comes during one; the run then resumes to the same
    loss.
    """
    root = Path(__file__).parent.parent
    command = [
        sys.executable,
        "scripts/train.py",
        "model=tiny",
        "steps=400",
        "checkpoint.every=1",
        "eval.every=0",
        "model.d_model=256",
        f"hydra.run.dir={tmp_path}",
    ]
    environment = os.environ | {"DTRAIN_CACHE": str(tmp_path / "cache")}
    process = warm.popen(command, cwd=root, env=environment)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and (
        not metrics.exists() or metrics.read_text().count("\n") < 5 + seed
    ):
        time.sleep(0.01)
    time.sleep(0.013 * seed)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps_done = [
        json.loads(line)["step"]
        for line in metrics.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    latest = (tmp_path / "checkpoints" / "latest").resolve()
    assert verify(latest) == "" and read_manifest(latest)["step"] >= steps_done[-1] - 1
    for left in tmp_path.glob("checkpoints/step-*"):
        assert verify(left) == ""


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing fails where a file would be larger, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "background"])
def test_a_save_that_failed_is_told_once_and_no_other_is_lost(
    asynchronous: bool, alone, tmp_path: Path
) -> None:
    """By the next call at the latest; the checkpoint before it is whole, and the one after it
    is written.
    """
    checkpoints = Checkpoints(tmp_path, keep_last=3, asynchronous=asynchronous)
    tensors = {"weight": torch.ones(2**19, dtype=torch.float64)}
    checkpoints.save(1, tensors, {"tokens": 1})
    checkpoints.wait()
    with files_of_at_most(tensors["weight"].nbytes // 2):
        for end in (
            checkpoints.wait,
            lambda: checkpoints.save(3, {"weight": torch.ones(2)}, {"tokens": 3}),
        ):
            with pytest.raises(
                OSError, match="checkpoint of step 2 could not be written: .*File too large"
            ):
                checkpoints.save(2, tensors, {"tokens": 2})
                end()
            checkpoints.wait()
    checkpoints.save(4, tensors, {"tokens": 4})
    checkpoints.wait()
    assert [
        (read_manifest(path)["step"], verify(path)) for path in checkpoint_files.published(tmp_path)
    ] == [
        (1, ""),
        (4, ""),
    ]


def test_latest_is_what_was_written_last_of_this_run_or_else_of_all(alone, tmp_path: Path) -> None:
    """Whatever the runs are called and however many steps they have done; also where folders
    stand deeper.
    """
    for run, step, written in (("b", 9, 3), ("c/deep", 4, 7), ("a", 5, 5)):
        folder = tmp_path / "outputs" / run
        Checkpoints(folder / "checkpoints", keep_last=1).save(
            step, {"weight": torch.ones(2)}, {"tokens": 0}
        )
        manifest = folder / "checkpoints" / f"step-{step:08d}" / "checkpoint.json"
        os.utime(manifest, ns=(written, written))

    def latest(run: str) -> str:
        found = find(
            "latest", tmp_path / "outputs" / run, tmp_path / "outputs", fallback=False, note=print
        )
        return str(found.relative_to(tmp_path / "outputs").parents[1])

    assert latest("new") == "c/deep"
    assert [latest(run) for run in ("a", "b", "c/deep")] == ["a", "b", "c/deep"]


CURVE: dict[str, Any] = {
    "model": {"d_model": 24, "dropout": 0.5},
    "task": {"augment": {"mask": {"rate": 0.1}}},
    "seed": 7,
    "steps": 99,
    "dtype": "bf16",
    "precision": {"weights": "bf16"},
    "clip_norm": None,
    "global_batch_size": 24,
    "seq_len": 12,
    "optimizer": {"lr": 1e-4},
    "lr_schedule": LRSchedule(5, 0.5),
}


@pytest.fixture(scope="module")
def resumed(alone, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """What is noted when a run with these settings and data goes on from a checkpoint of
    another.
    """
    folder = tmp_path_factory.mktemp("run")
    made = trainer(Case("next_token", "single", steps=9), 1)
    notes = []

    class Notes(Logger):
        def note(self, text: str) -> None:
            notes.append(text)

    def job(data: dict[str, Any], **settings: Any) -> Parts:
        config = Config(
            seed=0,
            steps=9,
            dtype="fp32",
            precision={},
            clip_norm=1.0,
            global_batch_size=12,
            seq_len=24,
            optimizer={"lr": 1e-3},
            lr_schedule=LRSchedule(10, 0.1),
            resume=str(folder),
            task={},
            model={"d_model": 24, "dropout": 0.0},
        )
        described: Any = SimpleNamespace(describe=lambda: data)
        told = replace(config, **settings)
        return Parts(told, described, made.task, made.plan, Notes(), written=asdict(told))

    next(made.steps())
    told = manifest_fields(job({"name": "ours", "digest": "1"}), made, World())
    Checkpoints(folder / "checkpoints", keep_last=1).save(3, made.state(), told)

    def resume(data: dict[str, Any], **settings: Any) -> list[str]:
        notes.clear()
        parts = job(data, **settings)
        start = starting_point(parts, folder, World())
        assert isinstance(start, Resume)
        begin_from(made, parts, start)
        assert notes[0].startswith("resumed from") and notes[0].endswith(", step 3")
        return notes[1:]

    return resume


def test_a_resume_says_whatever_of_its_run_would_change_the_curve(
    resumed: Callable[..., list[str]],
) -> None:
    """Data too, by what they say of themselves; where all is as it was nothing is said."""
    same = {"name": "ours", "digest": "1"}
    assert (
        resumed(same) == []
        and resumed(same, activation_checkpointing=True, logger={"console": {}}) == []
    )
    (said,) = resumed(same | {"digest": "2"})
    assert said == "the checkpoint's run had data.digest=1, this one has 2: the curve may differ"
    for name, value in CURVE.items():
        for said in (told := resumed(same, **{name: value})):
            assert said.startswith(f"the checkpoint's run had {name}") and said.endswith(
                ": the curve may differ"
            )
        assert len(told) == (2 if name == "lr_schedule" else 1), told
    (said,) = resumed(same, model=CURVE["model"])
    assert "had model.dropout=0.0, this one has 0.5" in said
    (said,) = resumed(same, task=CURVE["task"])
    assert "had task.augment.mask.rate=None, this one has 0.1" in said
    assert [
        said.split("had ")[1].split("=")[0]
        for said in resumed({"name": "ours"}, seed=1, clip_norm=2.0)
    ] == ["data.digest", "seed", "clip_norm"]


@pytest.mark.parametrize(
    ("dtype", "as_it_is"),
    [(torch.complex64, False), (torch.complex64, True), (torch.complex128, False)],
)
def test_complex_numbers_are_saved_and_restored(
    dtype: torch.dtype, as_it_is: bool, alone, tmp_path: Path
) -> None:
    """The format has none of 128 bits: of a run in fp64 no checkpoint could be written. Older ones
    have them as they are.
    """
    made = torch.randn(3, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    names = ("turn", "optimizer.turn.exp_avg")
    kept = (
        nullcontext()
        if not as_it_is
        else mock.patch("dtrain.run.checkpoint._as_saved", lambda name, tensor, saved: tensor)
    )
    with kept:
        Checkpoints(tmp_path, keep_last=1).save(
            1, {name: made.clone() for name in names}, {"tokens": 0}
        )
    path = find(str(tmp_path), tmp_path, tmp_path, fallback=False, note=print)
    found = {name: torch.zeros_like(made) for name in names}
    load(path, [found])
    assert all(torch.equal(tensor, made) for tensor in found.values())
    begun, taken, new = {"turn": torch.zeros_like(made)}, list[str](), list[str]()
    load_weights(path, [begun], taken=taken, new=new)
    assert (taken, new) == (["turn"], []) and torch.equal(begun["turn"], made)
    late = {"turn": torch.zeros_like(made), "optimizer.turn.step": torch.zeros(())}
    Checkpoints(tmp_path, keep_last=1).save(2, late | dict.fromkeys(names, made), {"tokens": 0})
    load(find(str(tmp_path), tmp_path, tmp_path, fallback=False, note=print), [late], late=True)
    assert torch.equal(late["optimizer.turn.exp_avg"], made)


def test_views_of_one_tensor_are_saved_and_restored(alone, tmp_path: Path) -> None:
    """As the cosines and sines of a table, or a mask and a part of it; parts that stand apart
    are not copied.
    """
    table = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    made = {
        "cosine": table[:, ::2],
        "sine": table[:, 1::2],
        "part": table[1:3],
        "all": table,
        "turned": table.T,
        "left": (halves := torch.arange(8.0))[:4],
        "right": halves[4:],
        "none": table[:0],
        "by columns": torch.randn(3, 5).T,
    }
    Checkpoints(tmp_path, keep_last=1).save(1, made, {"tokens": 0})
    found = {name: torch.zeros_like(tensor) for name, tensor in made.items()}
    load(find(str(tmp_path), tmp_path, tmp_path, fallback=False, note=print), [found])
    assert not [name for name, tensor in made.items() if not torch.equal(found[name], tensor)]
    apart = _apart(made)
    assert all(apart[name] is made[name] for name in ("left", "right"))
