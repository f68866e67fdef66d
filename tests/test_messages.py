"""What a mistake on the command line is told: which key, what is there, and what to type
instead.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import nn

from dtrain import cli
from dtrain.compare.entries import Entry
from dtrain.config.aliases import ALIASES, RENAMED, our_name
from dtrain.config.build import OPTIMIZER_RANGES, build
from dtrain.config.errors import check_overrides
from dtrain.config.groups import CONFIGS, options
from dtrain.config.override import for_a_shell, parsed, setting, value_of
from dtrain.config.schema import register
from dtrain.parallel.strategy import Strategy
from dtrain.run.run import _resumable

NAMES = [
    "/x/a=b.txt",
    "/x/a (1).txt",
    "/x/日本語.txt",
    "it's.txt",
    "a,b.txt",
    "[a].txt",
    "{a}",
    " a",
    "a  b",
    "",
    "null",
    "1e3",
    "true",
    "a:b",
    "$x",
    'say "hi"',
    "a\\b",
    "end\\",
    "a\\'b",
    "x!",
    "`ls`",
    "#1",
    "*.txt",
    "/plain/name",
]


# Words of a command line


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_can_be_typed(name: str) -> None:
    """By a shell and then by Hydra: both give the text back."""
    (word,) = shlex.split(for_a_shell("resume", name))
    found = parsed(word)
    assert found and value_of(found) == name and value_of(parsed(setting("k", name))) == name
    assert for_a_shell("resume", "/plain/name") == "resume=/plain/name"


def test_a_stopped_run_says_how_to_go_on_also_where_its_folders_name_is_not_utf8(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "\udcff"
    folder.mkdir()
    job: Any = SimpleNamespace(config=SimpleNamespace(steps=3), logger=mock.Mock())
    assert "stopped after step 2" in _resumable(job, folder, 2)
    assert r"\udcff" in (folder / "resumable").read_text()


def test_a_stopped_run_says_a_resume_that_can_be_typed(tmp_path: Path) -> None:
    """Also where its folder's name is none of Hydra's grammar."""
    folder = tmp_path / "a=b (1)"
    folder.mkdir()
    job: Any = SimpleNamespace(config=SimpleNamespace(steps=3), logger=mock.Mock())
    said = _resumable(job, folder, 2)
    (word,) = shlex.split(said.partition("resumable: ")[2])
    assert (
        value_of(parsed(word)) == str(folder) and (folder / "resumable").read_text() == f"{said}\n"
    )


def test_an_entry_of_a_comparison_may_hold_any_path() -> None:
    """Its command is Hydra's to read, and a shell's."""
    entry = Entry.of("fsdp 'data.source.path=/x/a=b (1).txt' strategy.fsdp.degree=2")
    assert [value_of(parsed(word)) for word in entry.overrides] == ["fsdp", "/x/a=b (1).txt", 2]


WORDS = [
    (["data.source.path=/x/a=b.txt"], "\"data.source.path='/x/a=b.txt'\""),
    (["data.source.path=/x/a (1).txt"], "\"data.source.path='/x/a (1).txt'\""),
    (["data.source.path=/x/日本語.txt"], "\"data.source.path='/x/日本語.txt'\""),
    (["data.source.path=a.txt", "b.txt"],
     "'b.txt' is no key=value: a pattern is quoted for the shell, \"data.source.path='…*'\", and several files are data.source.path=[a.txt,b.txt]"),
    (["strategies=single,ddp"], "a list is strategies=[single,ddp]"),
    (["optimizer.lr=1,2"], "a run for each takes --multirun"),
    (["foo"], "'foo' is no key=value, and none of the words capabilities, readme"),
    (["=3"], "=3 names no key"),
    (["--lr", "0.1"], "--lr is no option: settings are key=value without dashes: optimizer.lr"),
    (["--steps=3"], "without dashes: steps"),
    (["steps=2", "-m", "seed=1,2"], "seed=1,2: settings stand together, before or after options"),
    (["launch=3"],
     "launch is a group: choose launch=NAME, of local, or set a key of it: launch.nproc, launch.threads"),
    (["model=null"], "model is a group: choose model=NAME, of convnet"),
    (["strategy={dp:5}"], "strategy is a group: choose strategy=NAME, of 3d, 4d"),
    (["task/augment=3"], "task/augment is a group: choose task/augment=NAME, of crop"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"), WORDS, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_a_word_that_hydra_cannot_take_is_told_what_to_type(words: list[str], told: str) -> None:
    register()
    with mock.patch.object(sys, "argv", ["info.py", *words]), pytest.raises(ValueError) as found:
        check_overrides(words, ("capabilities", "readme"))
    assert told in str(found.value)


def test_what_hydra_takes_passes() -> None:
    for words in (
        [
            "strategy=[replicate,fsdp]",
            "+experiment=hang",
            "~optimizer.lr",
            "++steps=3",
            "model@a=tiny",
        ],
        ["--multirun", "strategy=ddp,fsdp", "seed=range(3)", "model=tiny,toy_3m"],
        ["--cfg", "job", "model.d_model=32"],
        ["seed=1,2", "-m"],
        ["data/tokenizer=bytes", "resume=null"],
    ):
        check_overrides(words)


# Keys and choices, as the command tells them


@pytest.fixture
def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Any:
    """Call `train` with words that are wrong: the one line that comes, status 2. Nothing trains."""

    def of(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        monkeypatch.setattr(cli.commands, "run", lambda *_: pytest.fail("it trains"))
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as ended:
            cli.main("train", cli.train)
        line = capsys.readouterr().err
        assert ended.value.code == 2 and line.startswith("dtrain: ") and line.count("\n") == 1, line
        return line

    return of


UNKNOWN = [
    ("+foo=3", "unknown key 'foo': the configuration has strategy, model, task"),
    ("++foo=3", "unknown key 'foo'"),
    ("+eval.foo=1", "unknown key 'eval.foo': eval has every, batches"),
    ("+launch.x=1", "unknown key 'launch.x': launch has nproc, threads"),
    ("+checkpoint.keeps_last=1", "did you mean 'checkpoint.keep_last'?"),
    ("+a.b.c=3", "unknown key 'a'"),
    ("+hydra.foo=1", "unknown key 'hydra.foo': --cfg hydra prints all keys"),
    ("+hydra.run.folder=x", "unknown key 'hydra.run.folder'"),
    ("+hydra.job.x=1", "unknown key 'hydra.job.x'"),
    ("data/tokenizer=file", "data.tokenizer.path has no value: set data.tokenizer.path=…"),
    ("data=files", "data.source.path has no value"),
    ("learning_rate=0.1", "optimizer.lr"),
    ("strategy=DDP", "did you mean 'ddp'?"),
    ("~steps", "steps has no value: set steps=…"),
    ("~eval", "eval.every has no value"),
    ("+steps=4", "steps is there already: write steps=… without the +"),
    ("~foo", "there is no foo to take away"),
    ("model.foo=3", "unknown key 'model.foo': model has _target_, vocab_size"),
    ("zzz=3", "unknown key 'zzz': the configuration has strategy"),
    ("every=3", "did you mean 'eval.every' or 'checkpoint.every'?"),
    ("model.D_model=3", "did you mean 'model.d_model'?"),
    ("lr=0.1", "'lr': here it is optimizer.lr"),
    ("optimizer.learning-rate=0.1", "here it is optimizer.lr"),
    (
        "batch_size=8",
        "here it is global_batch_size (over all ranks) or micro_batch_size (a rank's)",
    ),
    (
        "epochs=3",
        "here it is steps: an epoch of text is train_tokens / (global_batch_size x seq_len)",
    ),
    (
        "precision=fp16",
        "here it is dtype=bf16; fp16 is DeepSpeed's alone: strategy=deepspeed_zero2 +strategy.dp",
    ),
    ("dtype=fp16", "use fp32, bf16, fp64; here it is dtype=bf16; fp16 is DeepSpeed's alone"),
    ("strategy=FSDP", "unknown strategy 'FSDP': did you mean 'fsdp'?"),
    ("strategy=zero3", "here it is strategy=fsdp, or strategy=deepspeed_zero3"),
    (
        "logger=WandB",
        (
            "here it is logger=[default,tracker] logger.tracker.name=wandb (pip install "
            "accelerate wandb)"
        ),
    ),
    ("optimizer=lion", "unknown optimizer 'lion': use one of adam_gan, adamw, sgd"),
]


@pytest.mark.parametrize(
    ("word", "told"), UNKNOWN, ids=lambda v: v if "=" in v and " " not in v else ""
)
def test_a_key_or_choice_that_there_is_not_is_told_ours_or_none(
    word: str, told: str, said: Any
) -> None:
    assert told in said(word)


@pytest.mark.parametrize("old", RENAMED)
def test_what_had_another_name_is_told_by_its_new_one(
    old: str, said: Any, known: set[str], tmp_path: Path
) -> None:
    """On the command line, and in a file of an earlier version."""
    new: str = RENAMED[old]
    node: Any
    assert new.split("=")[1] in options(new.split("=")[0]) if "=" in new else new in known
    beside = [
        f"strategy={name}"
        for name in ("parameter_server", "local_sgd")
        if new.startswith("strategy.dp")
    ][not new.endswith(("fraction", "rank")) :]
    assert f"{old.split('=')[-1]!r}: here it is {new}\n" in said(
        old if "=" in old else f"{old}=1", *beside
    )
    if old.startswith("strategy.dp."):  # in a file its constructor says so
        target = (
            "local_sgd.LocalSGD"
            if beside == ["strategy=local_sgd"]
            else "parameter_server.strategy.ParameterServer"
        )
        node = {"_target_": f"dtrain.strategy.{target}", old.removeprefix("strategy.dp."): 1}
        with pytest.raises(ValueError, match=f": here it is {new}$"):
            build(node, Strategy, "strategy.dp")
    elif "=" not in old:
        first = RENAMED.get(old.split(".")[0], new)
        assert f": here it is {first}\n" in said(f"+{old}=1")
        (tmp_path / "experiment").mkdir()
        node = 1
        for part in reversed(old.split(".")):
            node = {part: node}
        (tmp_path / "experiment" / "theirs.yaml").write_text(
            f"# @package _global_\n{json.dumps(node)}"
        )
        said_of_file = said("+experiment=theirs", f"--config-dir={tmp_path}")
        assert f": here it is {first}\n" in said_of_file


def test_a_folder_that_cannot_be_is_told_with_its_key(said: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert f"hydra.run.dir={file}: {file} is a file, and no folder" in said(
        "model=tiny", f"hydra.run.dir={file}"
    )
    assert f"hydra.run.dir={file}/x: {file} is a file, and no folder" in said(
        "model=tiny", f"hydra.run.dir={file}/x"
    )
    assert "hydra.run.dir=/proc/x: /proc/x: No such file" in said(
        "model=tiny", "hydra.run.dir=/proc/x"
    )


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The keys of the configuration, with those of some strategies, optimizers and loggers."""
    register()
    found: set[str] = set()

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            found.add(f"{prefix}{key}")
            if OmegaConf.is_dict(child := node._get_node(key)):
                walk(child, f"{prefix}{key}.")

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for name in ("3d", "expert", "context", "deepspeed_zero2", "local_sgd", "parameter_server"):
            walk(compose("train", [f"strategy={name}"]), "")
        walk(compose("train", ["optimizer=sgd", "logger=[default,tracker]", "data=files"]), "")
    return found


@pytest.mark.parametrize("words", ALIASES)
def test_an_alias_names_what_there_is(words: str, known: set[str]) -> None:
    """Every dotted key, and every choice of a group, of what is told instead; whatever the case
    and the dashes.
    """
    for word in words.split():
        told = our_name(word)
        assert (
            told and "{" not in told and our_name(f"train.{word.upper().replace('_', '-')}") == told
        )
        for group, name in re.findall(r"(strategy|precision|optimizer)=(\w+)", told):
            assert name in options(group)
        for key in re.findall(r"[a-z]\w*(?:\.\w+)+", told):
            assert key in known or key in ("hydra.run.dir", "strategy.dp.deepspeed.fp16.enabled"), (
                key
            )


def test_no_word_of_ours_is_taken_for_anothers(known: set[str]) -> None:
    """A key of the configuration's top has no alias."""
    assert not [key for key in known if "." not in key and our_name(key)]


# Ranges that other libraries' constructors hold


ADAMW = {
    "_target_": "torch.optim.AdamW",
    "lr": 1e-3,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
}
RANGES = [
    ({"lr": -1}, "optimizer.lr=-1: Invalid learning rate: -1; lr takes 0 or more"),
    (
        {"betas": [2, 0.9]},
        (
            "optimizer.betas=[2, 0.9]: Invalid beta parameter at index 0: 2; betas takes "
            "numbers from "
            "0, and below 1"
        ),
    ),
    ({"betas": [0.9]}, "optimizer.betas=[0.9] must be a list of 2"),
    ({"betas": 3}, "optimizer.betas=3 must be list, not int"),
    ({"eps": -2.0}, "optimizer.eps=-2.0: Invalid epsilon value: -2.0; eps takes 0 or more"),
    ({"weight_decay": -1}, "optimizer.weight_decay=-1: Invalid weight_decay value: -1"),
    ({"lr": -1, "eps": -1}, "optimizer.lr=-1 or optimizer.eps=-1: Invalid"),
    ({"_foo": 1}, "optimizer: got an unexpected keyword argument '_foo'"),
]


@pytest.mark.parametrize(("given", "told"), RANGES, ids=str)
def test_a_constructors_refusal_names_the_key(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as found:
        build(
            ADAMW | given, torch.optim.Optimizer, "optimizer", params=[nn.Parameter(torch.ones(1))]
        )
    assert str(found.value).startswith(told)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop"])
def test_the_ranges_are_torchs(name: str) -> None:
    made = lambda **given: getattr(torch.optim, name)([nn.Parameter(torch.ones(1))], **given)  # noqa: E731
    ends = {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0, "momentum": 0.0, "betas": (0.0, 0.0)}
    beyond = {**dict.fromkeys(ends, -1e-9), "betas": (0.9, 1.0)}
    assert ends.keys() == OPTIMIZER_RANGES.keys()
    for key in ends.keys() & signature(getattr(torch.optim, name)).parameters.keys():
        made(**{key: ends[key]})
        with pytest.raises(ValueError, match="Invalid"):
            made(**{key: beyond[key]})


class Odd(nn.Module):
    """A user's own model that breaks in its own way."""

    def __init__(self, heads: int = 1, width: int = 4) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} does not fit"
        _ = [1, 2][heads - 1]


def test_a_users_constructor_that_breaks_is_told_with_its_node() -> None:
    node = {"_target_": "test_messages.Odd"}
    for given, told in (
        ({"heads": 3}, "model.width=4: AssertionError: width 4 does not fit"),
        ({"heads": 4}, "model: IndexError: list index out of range"),
    ):
        with pytest.raises(ValueError) as found:
            build(node | {"width": 4} | given, nn.Module, "model")
        assert str(found.value).startswith(told) and "(DTRAIN_TRACEBACK=1 shows where)" in str(
            found.value
        )


class Refusing(nn.Module):
    """With words that name a setting themselves; what it is given may be anything."""

    def __init__(self, data: Any) -> None:
        raise ValueError("seq_len=9 is too long")


def test_a_refusal_that_names_a_setting_stays_as_it_is() -> None:
    with pytest.raises(ValueError) as found:
        build({"_target_": "test_messages.Refusing"}, nn.Module, "model", data=3)
    assert str(found.value) == "seq_len=9 is too long"
