"""One checkpoint, any plan: whole or not there, and on the curve of the run that was not interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from cases import MOE, STRATEGIES, VARIANTS, Case, Outcome, assert_equal, refusal, trainer, whole

from dtrain import saved
from dtrain.checkpoint import Checkpoints, load
from dtrain.saved import about, find, run_of, verify
from dtrain.strategy.base import local

STEPS, SAVED_AT = 8, 4
EXACT, CROSS = 0.0, 1e-12  # the same strategy: bit for bit; another one: rounding in fp64
PLANS = [("single", 1), ("ddp", 2), ("replicate", 3), ("fsdp", 4), ("zero2", 2), ("hsdp", 4)]
DEEP, SPREAD = (("n_layers", 4),), (("n_layers", 4), *MOE)


def _train(
    case: Case, size: int, folder: str, save: bool, resume: bool, asynchronous: bool = False, at: int = SAVED_AT
) -> Outcome:
    made = trainer(case, size)
    if resume:
        path = find(folder, Path(folder), Path(folder), fallback=False, note=print)
        made.load(partial(load, path))
        made.next_step, made.tokens = about(path)["step"], about(path)["tokens"]
    checkpoints = Checkpoints(Path(folder), keep_last=1, asynchronous=asynchronous) if save else None
    outcome = Outcome()
    for step in made.steps():
        outcome.losses.append(step.loss)
        if checkpoints and step.step == at:
            checkpoints.save(step.step, made.state(), {"tokens": made.tokens})
    if checkpoints:
        checkpoints.wait()
    outcome.weights = {name: whole(t).clone() for name, t in made.state().items()}
    return outcome


def run(world, case: Case, size: int, *arguments) -> Outcome:
    return _train(case, 1, *arguments) if size == 1 else world(size).run(_train, case, size, *arguments)[0]


@pytest.mark.parametrize("saver", PLANS, ids=str)
def test_what_one_plan_saves_every_plan_resumes(saver: tuple[str, int], world, alone, tmp_path: Path) -> None:
    strategy, size = saver
    uninterrupted = run(world, Case("gan", strategy, steps=STEPS), size, str(tmp_path), True, False)
    for other, other_size in PLANS:
        resumed = run(world, Case("gan", other, steps=STEPS), other_size, str(tmp_path), False, True)
        tolerance = EXACT if (other, other_size) == saver else CROSS
        assert resumed.losses == pytest.approx(uninterrupted.losses[SAVED_AT:], rel=tolerance, abs=0)
        for name, expected in uninterrupted.weights.items():
            assert (resumed.weights[name] - expected).norm() <= tolerance * expected.norm(), (other, name)


def _all_from(saver: str, plans: list[str], model: tuple, folder: str) -> int:
    """One plan saves at step 2 of 3, then all resume from it, on one process's curve; how many did."""
    cases = {plan: Case("next_token", plan, steps=3, model=model) for plan in ("single", saver, *plans)}
    expected = _train(cases["single"], 1, folder, False, False)
    resumed = replace(expected, losses=expected.losses[2:])
    saved = _train(cases[saver], 4, f"{folder}/{saver}", True, False, at=2)
    assert_equal(saved, expected, CROSS)
    for plan in plans:
        ours = _train(cases[plan], 4, f"{folder}/{saver}", False, True)
        try:
            assert_equal(ours, resumed, CROSS)
            if plan == saver:
                # ddp puts its buckets in another order after a first step, and sums of four depend on theirs.
                exact = CROSS if plan == "ddp" else EXACT
                assert_equal(ours, replace(saved, losses=saved.losses[2:]), exact)
        except AssertionError as error:
            raise AssertionError(f"{plan} from {saver}: {error}") from None
    return len(plans)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", [DEEP, SPREAD], ids=["dense", "experts"])
def test_every_plan_on_four_ranks_resumes_from_others(model: tuple, exhaustive: bool, world, tmp_path: Path) -> None:
    """Each from itself and from the one before it, or the whole matrix; expert parallelism with experts' model."""
    plans = [s for s in STRATEGIES if s not in VARIANTS and not refusal(Case("next_token", s, model=model), 4)]
    if model == SPREAD:
        plans = ["expert", "moe_fsdp", "fsdp_tensor", "pipeline_fsdp", "zero1", "1f1b", "ring"]
    for saver, following in zip(plans, plans[1:] + plans[:1], strict=True):
        those = plans if exhaustive else [saver, following]
        assert world(4).run(_all_from, saver, those, model, str(tmp_path)) == [len(those)] * 4


def _states(size: int) -> list[str]:
    made = trainer(Case("gan", "zero1", steps=1), size)
    before = sorted(made.state())
    for _ in made.steps():
        pass
    assert sorted(made.state()) == before
    return before


def test_a_rank_with_no_share_of_the_optimizer_asks_for_no_message(world) -> None:
    """Four tensors among six ranks: the two that step nothing must not be alone in filling states."""
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
    tensors = {name: local(tensor) for name, tensor in made.state().items()}
    staged = Checkpoints(Path(folder), keep_last=1, asynchronous=True)._stager.stage(made.state())
    return all(local(staged[name]).data_ptr() != t.data_ptr() for name, t in tensors.items() if t.numel())


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
    """Step 2 again, after 3: nothing is replaced, the new one is the latest, and the oldest goes first."""
    world(2).run(_several, str(three), [2], 3)
    assert sorted(p.name for p in three.glob("step-*")) == ["step-00000002", "step-00000002-2", "step-00000003"]
    assert find(str(three), three, three, fallback=False, note=print).name == "step-00000002-2"


def test_a_clock_that_was_set_back_makes_no_checkpoint_old(world, three: Path) -> None:
    for manifest in three.glob("step-*/checkpoint.json"):
        later = manifest.stat().st_mtime_ns + 7200 * 10**9
        os.utime(manifest, ns=(later, later))
    world(2).run(_several, str(three), [4, 5], 2)
    assert sorted(p.name for p in three.glob("step-*")) == ["step-00000004", "step-00000005"]
    assert (three / "latest").resolve().name == saved.whole(three)[-1].name == "step-00000005"


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
def test_damage_is_named_and_earlier_ones_taken_only_if_told(damage, said: str, three: Path) -> None:
    newest = three / "step-00000003"
    assert verify(newest) == ""
    damage(newest)
    with pytest.raises(ValueError, match=f"step-00000003 is damaged: .*{said}.*fallback=true would take step-00000002"):
        find(str(three), three, three, fallback=False, note=print)
    notes: list[str] = []
    assert find(str(three), three, three, fallback=True, note=notes.append).name == "step-00000002"
    assert "falling back to step-00000002" in notes[0]


def test_a_restart_finds_the_run_of_its_own_launch(tmp_path: Path) -> None:
    for name, step, agents in (("a", 5, ["x"]), ("a", 9, ["x", "y"]), ("b", 7, ["z"]), ("c", 8, [])):
        checkpoint = tmp_path / name / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text(json.dumps(saved.sealed({"step": step, "agents": agents})))
        os.utime(checkpoint / "checkpoint.json", ns=(step, step))

    def found(*agents: str) -> str | None:
        path = run_of([tmp_path], frozenset(agents))
        return path and str(path.relative_to(tmp_path))

    assert found("x") == found("y", "new") == "a" and found("z") == "b"
    assert found("x", "z") == "a"  # where the newest is
    assert found() is None and found("new") is None
    newest = tmp_path / "a" / "checkpoints" / "step-00000009"
    assert saved.steps_of(newest) == 9
    damage_number(newest)
    assert saved.steps_of(newest) == 0  # so that it is not passed over, but refused by its name


def test_no_checkpoint_is_said_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"resume=latest: no checkpoint in {tmp_path}"):
        find("latest", tmp_path, tmp_path, fallback=False, note=print)


def _load_other(folder: str) -> str:
    made = trainer(Case("next_token", "fsdp", steps=1, model=(("d_model", 48),)), 2)
    try:
        made.load(partial(load, find(folder, Path(folder), Path(folder), fallback=False, note=print)))
    except ValueError as error:
        return str(error)
    return ""


def test_another_model_is_refused_by_its_first_tensor_and_both_shapes(world, three: Path) -> None:
    for said in world(2).run(_load_other, str(three)):
        assert "another model: model.blocks.0.attention.key.weight is (24, 24) there, (48, 48) here" in said


def test_nothing_in_a_checkpoint_is_a_pickle(three: Path) -> None:
    names = {p.suffix for p in three.glob("step-*/*")}
    assert names == {".safetensors", ".json"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kill_9_during_a_save_leaves_the_last_one_whole(seed: int, tmp_path: Path) -> None:
    """A save at every step, so that the kill comes during one; the run then resumes to the same loss."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "scripts/train.py", "model=tiny", "steps=400", "checkpoint.every=1", "eval.every=0",
               "model.d_model=256", f"hydra.run.dir={tmp_path}"]  # fmt: skip
    environment = os.environ | {"DTRAIN_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 5 + seed):
        time.sleep(0.01)
    time.sleep(0.013 * seed)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps_done = [
        json.loads(line)["step"] for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")
    ]
    latest = (tmp_path / "checkpoints" / "latest").resolve()
    assert verify(latest) == "" and about(latest)["step"] >= steps_done[-1] - 1
    for left in tmp_path.glob("checkpoints/step-*"):
        assert verify(left) == ""
