"""The command line as a person meets it: in this process where that is enough, in real ranks
where it is not.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import warm
from hydra.core.global_hydra import GlobalHydra

from dtrain import cli
from dtrain.launch.rank_processes import on_stop_signals
from dtrain.run.checkpoint_files import read_manifest, verify
from dtrain.run.claim import RESUMABLE
from hydra_plugins.dtrain_torchrun import _outcome

ROOT = Path(__file__).parent.parent
TINY = ["model=tiny", "steps=3", "eval.every=0", "global_batch_size=4"]


@pytest.fixture
def call(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Call a script's `main` with arguments; its exit status, what it printed, and what it said
    was wrong.
    """

    def of(*arguments: str, config: str = "train") -> tuple[int, str, str]:
        monkeypatch.setenv("DTRAIN_CACHE", str(cache))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{config}.py", *arguments])
        GlobalHydra.instance().clear()
        status = 0
        try:
            cli.main(config, getattr(cli, config))
        except SystemExit as ended:
            status = int(ended.code or 0)
        out = capfd.readouterr()
        return status, out.out, out.err

    return of


def test_a_run_leaves_its_figures(call, tmp_path: Path) -> None:
    status, out, err = call(
        *TINY, "eval.every=2", "logger=[default,tensorboard]", "hydra.run.dir=here"
    )
    assert (status, err) == (0, "") and "single on 1 rank" in out
    steps = [
        json.loads(line) for line in (tmp_path / "here" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [step["step"] for step in steps] == [1, 2, 3]
    names = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds"}
    assert all(names <= step.keys() for step in steps)
    assert ["val_loss" in step for step in steps] == [False, True, True]
    assert [step["tokens"] for step in steps] == [256, 512, 768]
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary.keys() >= {
        "strategy",
        "world_size",
        "steps",
        "loss",
        "val_loss",
        "tokens_per_second",
        "step_seconds_median",
        "mfu",
        "peak_memory_bytes",
        "environment",
        "config",
    }
    assert (summary["strategy"], summary["world_size"], summary["steps"]) == ("single", 1, 3)
    assert summary["loss"] == steps[-1]["loss"] and summary["val_loss"] == steps[-1]["val_loss"]
    assert summary["environment"]["packages"]["torch"] == torch.__version__
    assert list((tmp_path / "here" / "tensorboard").glob("events*"))
    assert (tmp_path / "here" / "logs" / "rank0.log").read_text()


def test_resume_goes_on_where_the_run_stopped(call, tmp_path: Path) -> None:
    options = [
        "model=tiny",
        "eval.every=0",
        "global_batch_size=4",
        "lr_schedule.min_lr_ratio=1",
        "model.dropout=0.1",
    ]
    whole = call(*options, "steps=6", "hydra.run.dir=whole")
    first = call(*options, "steps=4", "checkpoint.every=2", "hydra.run.dir=part")
    rest = call(*options, "steps=6", "resume=latest", "checkpoint.last=false", "hydra.run.dir=part")
    assert whole[0] == first[0] == rest[0] == 0 and "resumed from" in rest[1]
    curves = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()
        ]
        for d in ("whole", "part")
    ]
    assert curves[0] == curves[1]  # bit for bit, dropout too
    status, _, err = call(
        *options, "steps=6", "resume=part/checkpoints/step-00000004", "model.d_model=32"
    )
    assert status == 2 and re.search(
        r"another model: model\.blocks\.0\.attention\.key\.bias is \(64,\) there, \(32,\) here", err
    )
    status, _, err = call(
        *options, "steps=6", "resume=part/checkpoints/step-00000004", "optimizer=sgd"
    )
    assert status == 2 and "of another optimizer" in err
    status, out, _ = call(
        *options,
        "steps=7",
        "resume=part/checkpoints/step-00000002",
        "clip_norm=0.5",
        "hydra.run.dir=part",
    )
    assert status == 0 and "had clip_norm=1.0, this one has 0.5" in out
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4, 5, 6, 7]  # one object a step, though steps 3 to 6 were done twice
    status, _, err = call(*options, "steps=4", "resume=part/checkpoints/step-00000004")
    assert status == 2 and "has done 4 steps already, steps=4: ask for more steps" in err


MISTAKES = [
    (["strategy=fspd"],
     "unknown strategy 'fspd': did you mean 'fsdp'? (3d, 4d, accelerate_ddp, accelerate_deepspeed, "),
    (["strategy=[fsdp,tensr]"], "unknown strategy 'tensr'"),
    (["model=gpt2_larg"], "unknown model 'gpt2_larg': did you mean 'gpt2_large'?"),
    (["experiment=stdlib_small"],
     "group 'experiment' has no default to override: append to it with +experiment=…, of "),
    (["profile=true", "steps=2"],
     "profile=true looks at a run's first 4 steps, steps=2 are too few"),
    (["inject.missed_collective.rank=3"],
     "inject.missed_collective.rank=3 is none of the 1 ranks of this run"),
    (["stepz=3"], "unknown key 'stepz': did you mean 'steps'?"),
    (["optimiser=adamw"], "unknown key 'optimiser': did you mean 'optimizer'?"),
    (["eval.evry=3"], "unknown key 'eval.evry': did you mean 'eval.every'?"),
    (["strategy=fsdp", "strategy.fsdp.degre=2"], "did you mean 'strategy.fsdp.degree'?"),
    (["strategy=fsdp", "strategy.dp.degree=2"], "did you mean 'strategy.fsdp.degree'?"),
    (["steps=abc"], "steps=abc: Value 'abc' of type 'str' could not be converted to Integer"),
    (["steps=0"], "steps=0 must be at least 1"),
    (["steps=-3"], "steps=-3 must be at least 1"),
    (["global_batch_size=0"], "global_batch_size=0 must be at least 1"),
    (["micro_batch_size=-1"], "micro_batch_size=-1 must be at least 1"),
    (["dtype=fp23"], "dtype=fp23 is unknown: use fp32, bf16, fp64"),
    (["device=cuda"], "device=cuda: every rank needs a GPU"),
    (["model.n_heads=5"], "model.n_heads=5 does not divide d_model=64: use 1, 2, 4"),
    (["model.d_model=-64"], "model.d_model=-64 must be at least 1"),
    (["seq_len=100"], "seq_len=100 is longer than the model's context=64: use at most 64"),
    (["global_batch_size=6", "micro_batch_size=4"],
     "global_batch_size=6 is not divisible by 1 data-parallel ranks x micro_batch_size=4: use global_batch_size=4 or 8, or micro_batch_size=1 or 2 or 3 or 6"),
    (["strategy=ddp", "strategy.dp.degree=3"], "strategy dp=3 uses 3 ranks, the job has 1"),
    (["strategy=[ddp,fsdp]"], "needs at least 2 ranks on each of dp and fsdp"),
    (["launch.nproc=2"], "strategy single uses 1 rank, the job has 2"),
    (["launch.nproc=4", "strategy=[ddp,fsdp]"], "ddp stands alone"),
    (["launch.nproc=4", "strategy=[allreduce,zero1]"],
     "allreduce and zero1 both want the axis dp: choose one of them"),
    (["launch.nproc=4", "strategy=[ddp,replicate]"],
     "ddp and replicate both want the axis dp: choose one of them"),
    (["launch.nproc=3", "strategy=tensor"], "n_heads=4 is not divisible by tp=3: use 1, 2, 4"),
    (["launch.nproc=2", "strategy=tensor", "model.d_ff=99"],
     "d_ff=99 is not divisible by tp=2: use 1, 3, 9, 11, 33, 99"),
    (["launch.nproc=2", "strategy=tensor", "model.n_heads=2", "model.n_kv_heads=1"],
     "n_kv_heads=1 is not divisible by tp=2: use 1"),
    (["launch.nproc=4", "strategy=tensor_sequence", "seq_len=62"],
     "seq_len=62 is not divisible by 4 (tp x cp, sequence_parallel): use 60 or 64"),
    (["launch.nproc=4", "strategy=pipeline"],
     "pp=4 x 1 stages a rank are 4 stages, the model has 2 blocks: use at most pp=2"),
    (["launch.nproc=2", "strategy=pipeline", "strategy.pp.schedule=1f1c"],
     "strategy.pp.schedule=1f1c is unknown: use gpipe, 1f1b"),
    (["launch.nproc=2", "strategy=pipeline", "strategy.pp.micro_batches=1"],
     "schedule 1f1b on pp=2 cannot run 4 rows in 1 micro-batches: use strategy.pp.micro_batches=2 or 4"),
    (["launch.nproc=2", "strategy=pipeline", "global_batch_size=1"],
     "schedule 1f1b on pp=2 needs at least 2 micro-batches, and a rank has 1 row"),
    (["launch.nproc=2", "strategy=pipeline", "strategy.pp.schedule=zbv",
      "strategy.pp.stages_per_rank=3"], "schedule zbv holds 2 a rank"),
    (["launch.nproc=2", "strategy=pipeline", "strategy.pp.schedule=dualpipev", "model.n_layers=4",
      "strategy.pp.micro_batches=2"],
      "schedule dualpipev on pp=2 cannot run 4 rows in 2 micro-batches: use strategy.pp.micro_batches=4"),
    (["launch.nproc=2", "strategy=pipeline", "strategy.pp.split=[1,2]"],
     "strategy.pp.split=[1, 2] must be 2 numbers of at least 1 that sum to the model's 2 blocks"),
    (["launch.nproc=4", "strategy=pipeline_fsdp", "strategy.pp.schedule=zbv", "model.n_layers=4"],
     "use strategy.fsdp.reshard_after_forward=false"),
    (["launch.nproc=4", "strategy=context", "seq_len=60"],
     "seq_len=60 is not divisible by 2 x cp=4 (each rank takes two chunks of the balanced ring): use 56 or 64, or strategy.cp.balanced=false"),
    (["launch.nproc=3", "strategy=context", "strategy.cp.method=ulysses", "seq_len=63"],
     "n_heads=4 is not divisible by cp=3: use 1, 2, 4"),
    (["launch.nproc=2", "strategy=context", "model.dropout=0.1"],
     "ring attention cannot drop attention weights"),
    (["launch.nproc=4", "strategy=expert", "model.n_experts=6"],
     "n_experts=6 is not divisible by ep=4: use 1, 2, 3, 6"),
    (["launch.nproc=2", "strategy=expert"], "has no experts (model.n_experts=0)"),
    (["launch.nproc=8", "strategy=3d", "strategy.tp.degree=4", "strategy.fsdp.degree=2"],
     "strategy pp=2 x fsdp=2 x tp=4 uses 16 ranks, the job has 8"),
    (["launch.nproc=0"], "launch.nproc=0 must be at least 1"),
    (["launch.nproc=2", "strategy=ddp", "global_batch_size=3"],
     "global_batch_size=3 is not divisible by 2"),
    (["resume=nowhere"], "resume=nowhere: no checkpoint in nowhere"),
    (["data=files"], "data.source.path"),
    (["data=files", "data.source.path=nowhere"], "data.source.path=nowhere: no such file"),
    (["data=files", f"data.source.path='{ROOT}/docs/*.md'", "data/tokenizer=bpe",
      "data.tokenizer.vocab_size=300", "model.vocab_size=256"],
      "model.vocab_size=256 is less than the tokenizer's 300 ids"),
    (["hydra.run.dir=/proc/nowhere"], "/proc/nowhere"),
    (["task._target_=os.system"], "task._target_=os.system is not a Task"),
    (["data.source._target_=subprocess.Popen"],
     "data.source._target_=subprocess.Popen is not a Source or Tokenizer"),
    (["model._target_=no.such.Model"], "model._target_=no.such.Model cannot be imported"),
    (["data=files", "data.source.path=3"], "data.source.path=3 must be str or list, not int"),
    (["+model.x=[{_target_:builtins.print,_args_:[said]}]"],
     "model.x.0._target_=builtins.print is not a part of it"),
    (["model.d_model=abc"], "model.d_model=abc must be int, not str"),
    (["optimizer.lr=abc"], "optimizer.lr=abc must be float"),
    (["strategy=ddp", "strategy.dp.degree=x"], "strategy.dp.degree=x must be int, not str"),
    (["strategy=fsdp", "strategy.fsdp.cpu_offload=maybe"],
     "strategy.fsdp.cpu_offload=maybe must be bool, not str"),
    (["logger.console=null"], "logger.console has no _target_"),
    (["dtype=fp64", "precision.weights=fp32"],
     "dtype=fp64 with precision.weights=fp32: only bf16 with fp32 mix"),
    (["strategy=ddp", "precision=bf16_mixed", "precision.reduce=bf16"],
     "ddp sums gradients in the weights' format"),
    (["+precision.reduces=bf16"],
     "unknown key 'precision.reduces': did you mean 'precision.reduce'?"),
    (["+model.depth=3"], "unexpected keyword argument 'depth'"),
    (["logger=tracker", "logger.tracker.name=wandbb"],
     "logger.tracker.name=wandbb is unknown: use"),
]  # fmt: skip


# Of a checkpoint rank 0 says for all whether it is there.
FOUND_BY_RANKS = (["resume=nowhere"],)


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_a_mistake_gets_one_line(
    arguments: list[str], message: str, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before any rank is started, or meets others."""
    begun = mock.Mock(side_effect=AssertionError("it should have been refused before"))
    monkeypatch.setattr(cli.ranks, "spawn", begun)
    if arguments not in FOUND_BY_RANKS:
        monkeypatch.setattr(torch.distributed, "init_process_group", begun)
    status, _, err = call(*TINY, *arguments)
    assert status == 2 and not begun.called
    assert message in err and err.startswith("dtrain: ") and err.count("\n") == 1


def test_a_diverging_run_stops_and_keeps_its_checkpoint(call, tmp_path: Path) -> None:
    status, _, err = call(
        "model=tiny",
        "steps=30",
        "optimizer.lr=1e30",
        "lr_schedule.warmup_steps=0",
        "optimizer=sgd",
        "clip_norm=null",
        "checkpoint.every=1",
        "global_batch_size=4",
        "hydra.run.dir=here",
    )
    assert status == 1 and re.match(
        r"dtrain: step \d+: loss \S+, gradient norm \S+ of 'model' \(", err
    )
    step = int(re.match(r"dtrain: step (\d+)", err)[1])  # type: ignore[index]
    assert (tmp_path / "here" / "checkpoints" / "latest").resolve().name == f"step-{step - 1:08}"
    assert "Traceback" in (tmp_path / "here" / "logs" / "rank0.log").read_text()


def test_compiling_without_a_compiler_is_refused(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    status, _, err = call(*TINY, "compile=true")
    assert status == 2 and "compile=true needs a C++ compiler, and there is none of" in err


def test_info_tells_a_models_sizes(call) -> None:
    status, out, _ = call("model=gpt2", config="info")
    assert status == 0 and "124,439,808" in out  # the published size of GPT-2
    status, out, _ = call("model=llama_70b", "seq_len=1024", config="info")
    assert "70,553,706,496" in out  # and of Llama 3 70B
    assert "262.8 GiB" in out  # four bytes each
    status, out, _ = call("model=tiny", config="info")
    told = re.findall(r"\d[\d.,]* (?:[GMK]iB|B|[GMk]?FLOP)\b", out)
    # none of it is 0.000 GiB
    assert len(told) == 5 and not [each for each in told if re.match(r"0[., ]", each)], told


def test_a_tracker_of_accelerate_takes_the_figures(call, tmp_path: Path) -> None:
    status, _, err = call(
        *TINY, "logger=[default,tracker]", "logger.tracker.name=tensorboard", "hydra.run.dir=here"
    )
    assert (status, err) == (0, "") and list((tmp_path / "here" / "dtrain").glob("events*"))


def test_multirun_tries_each(call, tmp_path: Path) -> None:
    status, out, _ = call("--multirun", *TINY, "optimizer.lr=1e-3,1e-2", "hydra.sweep.dir=sweep")
    assert status == 0 and len(list((tmp_path / "sweep").glob("*/summary.json"))) == 2


def test_a_job_that_fails_ends_no_other_and_says_why(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake, and an error that nobody has foreseen; the status is that of the first."""
    train = cli.commands.run

    def run(settings, *others):
        if settings.seed == 7:
            raise KeyError("nobody knows")
        return train(settings, *others)

    monkeypatch.setattr(cli.commands, "run", run)
    status, out, err = call(
        "--multirun", *TINY, "micro_batch_size=3,1", "seed=1,7", "hydra.sweep.dir=sweep"
    )
    assert status == 2 and [p.parent.name for p in (tmp_path / "sweep").glob("*/summary.json")] == [
        "2"
    ]
    said = "global_batch_size=4 is not divisible by 1 data-parallel ranks x micro_batch_size=3"
    assert err.count(f"dtrain: {said}") == 1 and "Traceback" not in err
    assert [line.split(":", 1)[0] for line in out.splitlines() if " failed: " in line] == [
        f"job {n} failed" for n in (0, 1, 3)
    ]
    assert f"job 0 failed: {said}" in out and out.count(" failed: KeyError: 'nobody knows'") == 2


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's model, in a module outside the package: the `_target_` that names it."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Mine(nn.Sequential):\n"
        "    def __init__(self, vocab_size, context, **others):\n"
        "        super().__init__(nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size))\n"
        "        self.context = context\n"
        "    def forward(self, tokens, positions):\n"
        "        return super().forward(tokens)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return "mine.Mine"


def test_a_users_own_model_trains(call, own_model: str) -> None:
    status, out, err = call(*TINY, f"model._target_={own_model}")
    assert (status, err) == (0, "") and "model: 4,352 parameters" in out


def test_what_a_model_cannot_do_is_refused(call, own_model: str) -> None:
    for option in ("activation_checkpointing", "compile"):
        status, _, err = call(*TINY, f"model._target_={own_model}", f"{option}=true")
        assert (
            status == 2
            and f"{option}=true acts on a model's blocks, and Mine names none in a Layout" in err
        )


def start(command: list[str], folder: Path, cache: Path, **environment: str) -> warm.Ended:
    environment = {**os.environ, "DTRAIN_CACHE": str(cache), **environment}
    return warm.run(command, cwd=folder, env=environment, timeout=400)


TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    str(ROOT / "scripts/train.py"),
]
PYTHON = [sys.executable, str(ROOT / "scripts/train.py")]


def losses(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_torchrun_and_our_own_launch_give_the_same_run(tmp_path: Path, cache: Path) -> None:
    options = [*TINY, "strategy=fsdp"]
    ran = start([*TORCHRUN, *options], tmp_path, cache)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("fsdp on 2 ranks (fsdp=2)") == 1  # rank 0 alone speaks
    (folder,) = (tmp_path / "outputs").glob("*/*")  # by Hydra's habits, and one for both ranks
    assert {p.name for p in folder.glob("logs/*")} == {"rank0.log", "rank1.log"}
    assert "rank 1, process" in (folder / "logs" / "rank1.log").read_text()
    ours = start([*PYTHON, *options, "launch.nproc=2", "hydra.run.dir=ours"], tmp_path, cache)
    assert ours.returncode == 0, ours.stderr
    assert losses(folder) == losses(tmp_path / "ours")


def test_under_torchrun_a_mistake_ends_all_ranks_with_one_line(tmp_path: Path, cache: Path) -> None:
    ran = start([*TORCHRUN, *TINY, "strategy=fspd"], tmp_path, cache)
    assert ran.returncode != 0
    assert (
        ran.stderr.count("dtrain: ") == 1
        and "unknown strategy 'fspd': did you mean 'fsdp'?" in ran.stderr
    )
    assert not (tmp_path / "outputs").exists()


def test_an_unwritable_folder_ends_all_ranks_with_one_line(tmp_path: Path, cache: Path) -> None:
    ran = start([*TORCHRUN, *TINY, "strategy=ddp", "hydra.run.dir=/proc/nowhere"], tmp_path, cache)
    assert (
        ran.returncode != 0 and ran.stderr.count("dtrain: ") == 1 and "/proc/nowhere" in ran.stderr
    )


def test_a_damaged_checkpoint_ends_all_ranks_with_one_line(
    call, tmp_path: Path, cache: Path
) -> None:
    assert call(*TINY, "checkpoint.every=1", "hydra.run.dir=run")[0] == 0
    shard = next((tmp_path / "run" / "checkpoints" / "latest").resolve().glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    resume = [
        *TINY,
        "steps=5",
        "strategy=fsdp",
        "launch.nproc=2",
        "hydra.run.dir=run",
        "resume=latest",
    ]
    ran = start([*PYTHON, *resume], tmp_path, cache)
    assert ran.returncode != 0 and ran.stderr.count("dtrain: ") == 1
    assert re.search(
        r"step-00000003 is damaged: .* bytes, not .*checkpoint.fallback=true would take "
        r"step-00000002",
        ran.stderr,
    )
    ran = start([*PYTHON, *resume, "checkpoint.fallback=true"], tmp_path, cache)
    assert ran.returncode == 0 and "falling back to step-00000002" in ran.stdout


def test_a_port_in_use_is_said(tmp_path: Path, cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        bare = start(
            [*PYTHON, *TINY, "strategy=ddp"],
            tmp_path,
            cache,
            RANK="0",
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
    assert (
        bare.returncode == 2
        and f"port in use: 127.0.0.1:{port} is taken" in bare.stderr.splitlines()[-1]
    )


def test_a_rank_that_crashes_says_why_and_ends_the_others(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "crash.py").write_text(
        "import os\n"
        "from dtrain.task.causal_lm import CausalLM\n"
        "class Crash(CausalLM):\n"
        "    def batch(self, step):\n"
        "        if step == 1 and os.environ['RANK'] == '1':\n"
        "            raise RuntimeError('a bug of mine')\n"
        "        return super().batch(step)\n"
    )
    options = [
        *TINY,
        "strategy=ddp",
        "launch.nproc=2",
        "task._target_=crash.Crash",
        "hydra.run.dir=run",
    ]
    ran = start([*PYTHON, *options], tmp_path, cache, PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1 and "a bug of mine" in ran.stderr
    assert "a bug of mine" in (tmp_path / "run" / "logs" / "rank1.log").read_text()


def test_an_interrupted_run_ends_with_one_line_and_no_process(tmp_path: Path, cache: Path) -> None:
    environment = {**os.environ, "DTRAIN_CACHE": str(cache)}
    command = [
        *PYTHON,
        *TINY,
        "steps=100000",
        "strategy=ddp",
        "launch.nproc=2",
        "hydra.run.dir=run",
    ]
    process = warm.popen(command, cwd=tmp_path, env=environment)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert (
        process.returncode == 130
        and err.endswith("dtrain: interrupted\n")
        and "Traceback" not in err
    )
    ranks = [
        int(re.search(r"process (\d+)", log.read_text())[1])
        for log in (tmp_path / "run" / "logs").iterdir()
    ]  # type: ignore[index]
    assert len(ranks) == 2 and not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_rank_is_named(tmp_path: Path, cache: Path) -> None:
    """And the checkpoint that both ranks had written before is whole."""
    environment = {**os.environ, "DTRAIN_CACHE": str(cache)}
    command = [
        *PYTHON,
        *TINY,
        "steps=100000",
        "checkpoint.every=1",
        "strategy=fsdp",
        "launch.nproc=2",
        "hydra.run.dir=run",
    ]
    process = warm.popen(command, cwd=tmp_path, env=environment)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    wait_for(lambda: latest.exists() and read_manifest(latest)["step"] >= 3)
    log = (tmp_path / "run" / "logs" / "rank1.log").read_text()
    os.kill(int(re.search(r"process (\d+)", log)[1]), signal.SIGKILL)  # type: ignore[index]
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1 and err.splitlines()[-1] == "dtrain: rank 1 ended with signal 9"
    assert all(verify(path) == "" for path in (tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_sweep_ends_where_one_of_its_jobs_was_told_to(
    call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other begins, and the status says so."""
    begun: list[float] = []

    def told(settings, *_) -> dict[str, str]:
        begun.append(settings.optimizer["lr"])
        return {RESUMABLE: "stopped after step 1 of 3", "interrupted": False}

    monkeypatch.setattr(cli.commands, "run", told)
    status, _, err = call("--multirun", *TINY, "optimizer.lr=1e-3,1e-2", "hydra.sweep.dir=sweep")
    assert (status, begun, err) == (130, [1e-3], "dtrain: interrupted\n")


def test_a_sweep_ends_where_a_job_had_done_all_its_steps_when_it_was_told_to(
    call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job ends well, whoever told it; the next does not begin."""
    begun: list[float] = []

    def told(settings, *_) -> dict[str, str]:
        begun.append(settings.optimizer["lr"])
        with on_stop_signals(lambda number, frame: None):
            os.kill(os.getpid(), signal.SIGTERM)
        return {"val_loss": 1.0}

    monkeypatch.setattr(cli.commands, "run", told)
    status, _, err = call("--multirun", *TINY, "optimizer.lr=1e-3,1e-2", "hydra.sweep.dir=sweep")
    assert (status, begun, err) == (130, [1e-3], "dtrain: interrupted\n")
    assert (
        call("--multirun", *TINY, "optimizer.lr=1e-3", "hydra.sweep.dir=again")[0] == 0
    )  # of this process's next command


def test_a_sweeper_is_told_the_validation_loss(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether less or more than the training loss, which it is told where nothing is held out."""
    told, train = [], cli.train

    def trained(config) -> None:
        for held_out in (0.25, 4.0, 0.0, None):
            summary = {"loss": 1.5, "val_loss": held_out}
            monkeypatch.setattr(cli.commands, "run", lambda *_, summary=summary: summary)
            (tmp_path / "summary.json").write_text(json.dumps(summary))
            told.append((train(config), _outcome(tmp_path, 0, [], config).return_value))
        monkeypatch.setattr(
            cli.commands,
            "run",
            lambda *_: {RESUMABLE: "stopped after step 1 of 3", "interrupted": False},
        )
        assert math.isnan(train(config))  # it has no loss yet; and alone it ends well

    monkeypatch.setattr(cli, "train", trained)
    assert call(*TINY) == (0, "", "")
    assert told == [(loss, loss) for loss in (0.25, 4.0, 0.0, 1.5)]
