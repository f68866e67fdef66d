"""What a run leaves holds no secret that it was given, and the run itself gets it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_cli
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dtrain.compare import command
from dtrain.config.build import build, error_with_setting
from dtrain.config.secret import HIDDEN, is_secret, masked, masked_override, printable
from dtrain.model import own
from dtrain.report.base import Logger, Run
from hydra_plugins import dtrain_torchrun

call = test_cli.call  # a fixture
Call = Callable[..., tuple[int, str, str]]
QUICK = [
    "model=tiny",
    "steps=1",
    "eval.every=0",
    "global_batch_size=4",
    "seq_len=16",
    "measure.peak_flops=1e12",
    "launch.threads=1",
]
PLAIN, HIDDEN_IN_ENVIRONMENT, LETTERS = "plain-55aa", "hidden-77cc", st.text("abcdef", min_size=1)
SECRETS = [
    "api_key",
    "apiKey",
    "WANDB_API_KEY",
    "password",
    "db-password",
    "hf_token",
    "token",
    "secret",
    "access_key",
    "aws_secret_access_key",
    "credentials",
    "authorization",
]
OPEN = [
    "pad_token",
    "end_of_text",
    "eos_token",
    "tokenizer",
    "tokens_per_second",
    "key_column",
    "monkey",
    "token_drop",
    "additional_special_tokens",
    "author",
    "passes",
    "keys",
]


class Service(Logger):
    """One that needs a key, and another."""

    def __init__(self, api_key: str, account: str, size: int, place: str) -> None:
        self._given = [api_key, account, size, place]

    def start(self, run: Run) -> None:
        (run.folder.parent / "given").write_text(json.dumps(self._given))
        (run.folder / "told").write_text(json.dumps(run.config))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_uses_what_it_leaves_nowhere(
    ranks: int, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIDDEN_NAME", HIDDEN_IN_ENVIRONMENT)
    monkeypatch.setenv("HIDDEN_SIZE", "3")
    given = {
        "_target_": "test_secret.Service",
        "account": "${oc.env:HIDDEN_NAME}",
        "api_key": PLAIN,
        "size": "'${oc.decode:${oc.env:HIDDEN_SIZE}}'",
        "place": f"'https://me:{PLAIN}@host/x'",
    }
    service = [f"+logger.service.{name}={value}" for name, value in given.items()]
    status, out, err = call(
        *QUICK,
        f"launch.nproc={ranks}",
        *service,
        f"strategy={['single', 'ddp'][ranks - 1]}",
        f"+hydra.job.env_set.A_TOKEN={PLAIN}",
        "hydra.run.dir=mine",
    )
    assert not status, err
    address = f"https://me:{PLAIN}@host/x"
    assert json.loads((tmp_path / "given").read_text()) == [
        PLAIN,
        HIDDEN_IN_ENVIRONMENT,
        3,
        address,
    ]
    files = [file for file in (tmp_path / "mine").rglob("*") if file.is_file()]
    found = [
        f.name
        for f in files
        if {s for s in (PLAIN, HIDDEN_IN_ENVIRONMENT) if s.encode() in f.read_bytes()}
    ]
    assert found == [] and {"summary.json", "config.yaml", "overrides.yaml", "told"} <= {
        f.name for f in files
    }
    assert PLAIN not in out and HIDDEN_IN_ENVIRONMENT not in out
    told = json.loads((tmp_path / "mine" / "summary.json").read_text())["config"]["logger"][
        "service"
    ]
    assert told == {
        "_target_": "test_secret.Service",
        "account": "${oc.env:HIDDEN_NAME}",
        "size": 3,
        "api_key": HIDDEN,
        "place": f"https://{HIDDEN}@host/x",
    }
    again = call("--config-dir=mine/.hydra", "--config-name=config", "hydra.run.dir=again")
    # asked for, and not taken to be "(hidden)"
    assert again[0] == 2 and "logger.service.api_key" in again[2]


@pytest.mark.parametrize("name", [*SECRETS, *OPEN])
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret(name) == (name in SECRETS)


@given(
    st.recursive(
        LETTERS | st.integers() | st.none(), lambda e: st.lists(e) | st.dictionaries(LETTERS, e)
    )
)
def test_all_else_stays(value: Any) -> None:
    assert masked({"a": value}) == {"a": value}


@pytest.mark.parametrize(("value", "told"), [
    ({"credentials": {"wandb": "abc", "more": [{"x": "y"}]}},
     {"credentials": {"wandb": HIDDEN, "more": [{"x": HIDDEN}]}}),
    ({"auth": {"_target_": "a.Basic", "user": "me"}},
     {"auth": {"_target_": "a.Basic", "user": HIDDEN}}),
    ({"password": 1234, "pwd": 0.5, "secret": True},
     {"password": HIDDEN, "pwd": HIDDEN, "secret": True}),
    ({"max_tokens": 512, "token": 7}, {"max_tokens": 512, "token": 7}),  # counts, or ids
    ({"model": {"layout": {"token": "transformer.wte"}}},) * 2,
    ({"api_key": "abc${x}", "secret": "${oc.env:X,sesame}"}, {"api_key": HIDDEN, "secret": HIDDEN}),
    ({"api_key": "${oc.decode:${oc.env:X}}", "secret": "${oc.env:X,null}"},) * 2,
    ({"a": "https://me:sesame@${host}/x"}, {"a": f"https://{HIDDEN}@${{host}}/x"}),
    ({"a": "https://${oc.env:A}:${oc.env:B}@host"},) * 2,
])  # fmt: skip
def test_what_is_hidden_of_a_value(value: Any, told: Any) -> None:
    assert masked(value) == told


@given(st.lists(LETTERS, max_size=3), st.sampled_from(SECRETS))
def test_a_secret_is_found_however_deep(path: list[str], name: str) -> None:
    value: Any = {name: "sesame", "rows": [{name: ["sesame"]}]}
    for each in path:
        value = {each: value}
    assert (
        "sesame" not in json.dumps(masked(value)) and json.dumps(masked(value)).count(HIDDEN) == 2
    )


@pytest.mark.parametrize(("word", "told"), [
    ("logger.api_key=x", f"logger.api_key={HIDDEN}"), ("+a.token='x y'", f"+a.token={HIDDEN}"),
    ("seed=3", "seed=3"),
    ("~logger", "~logger"), ("a=https://u:p@h", f"a=https://{HIDDEN}@h"),
    ("a.token=${oc.env:X}", "a.token=${oc.env:X}"),
    ("+a={b: 1, password: x, c: [1]}", f"+a={{b: 1, password: {HIDDEN}, c: [1]}}"),
    ("+a={b: {api_key: 'x y'}, c: 2}", f"+a={{b: {{api_key: {HIDDEN}}}, c: 2}}"),
    ("+a={credentials: {b: x, c: [y]}, d: 1}", f"+a={{credentials: {HIDDEN}"),
    ("a.auth.b=x", f"a.auth.b={HIDDEN}"),
    ("+a={password: x y, b: 1}", f"+a={{password: {HIDDEN}, b: 1}}"),
    (r"+a={password: x\,y, b: 1}", f"+a={{password: {HIDDEN}, b: 1}}"),
    (r"+a={password: 'x\'y', b: 1}", f"+a={{password: {HIDDEN}, b: 1}}"),
    ("+a={token: ${oc.env:X}, b: 1}", "+a={token: ${oc.env:X}, b: 1}"),
    ("strategies=[single,'ddp +logger.api_key=x']",
     f"strategies=[single,'ddp +logger.api_key={HIDDEN}']"),
    ("model.layout.token=wte", "model.layout.token=wte"),
    ("+model.layout={token: wte}", "+model.layout={token: wte}"),
])  # fmt: skip
def test_words_of_the_command_line(word: str, told: str) -> None:
    assert masked_override(word) == told


def test_whatever_way_leads_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another key, by a whole node, within a text, by a default; what is no text stays
    readable.
    """
    monkeypatch.setenv("HIDDEN_NAME", HIDDEN_IN_ENVIRONMENT)
    monkeypatch.setenv("HIDDEN_SIZE", "3")
    monkeypatch.setenv("HIDDEN_NODE", f"{{a: [{HIDDEN_IN_ENVIRONMENT}]}}")
    config = OmegaConf.create({
        "a": "${oc.env:HIDDEN_NAME}", "b": "${a}", "c": {"d": ["at ${b}", "${.0}", 7], "e": "${f}"},
        "g": "${c}", "f": "plain", "h": "${oc.decode:${oc.env:HIDDEN_SIZE}}",
        "i": "${oc.env:NO_SUCH_NAME,open}", "j": "???", "k": None,
        "l": "${oc.decode:${oc.env:HIDDEN_NODE}}", "m": {"n": "${l}"},
    })  # fmt: skip
    c = {"d": ["at ${b}", "${.0}", 7], "e": "plain"}
    assert printable(config) == {
        "a": "${oc.env:HIDDEN_NAME}",
        "b": "${a}",
        "c": c,
        "g": c,
        "f": "plain",
        "h": 3,
        "i": "${oc.env:NO_SUCH_NAME,open}",
        "j": None,
        "k": None,
        "l": "${oc.decode:${oc.env:HIDDEN_NODE}}",
        "m": {"n": "${l}"},
    }
    assert (
        OmegaConf.to_container(config, resolve=True, throw_on_missing=False)["b"]
        == HIDDEN_IN_ENVIRONMENT
    )


def test_what_a_sweep_leaves_and_says_hides_it_too(call: Call, tmp_path: Path) -> None:
    """Hydra writes its own file of a sweep, and would write others where it is asked to."""
    words = [
        "-m",
        "seed=1,2",
        *QUICK,
        "steps=0",
        f"+logger.service.api_key={PLAIN}",
        f"+hydra.job.env_set.A_TOKEN={PLAIN}",
    ]
    status, out, err = call(*words, "hydra.sweep.dir=swept", "hydra.output_subdir=.hydra")
    files = [file for file in (tmp_path / "swept").rglob("*") if file.is_file()]
    assert status == 2 and [file.name for file in files] == ["multirun.yaml"]
    told = files[0].read_text()
    assert (
        f"logger.service.api_key={HIDDEN}" in told and "steps=0" in told and "api_key: ???" in told
    )
    assert PLAIN not in told + out + err and HIDDEN in out
    status, _, err = call(*QUICK, "hydra.output_subdir=told")
    assert (
        status == 2
        and "hydra.output_subdir=told: what a run was asked for is left in .hydra" in err
    )


@pytest.mark.parametrize("word", ["steps=abc,2", "model=nothing,tiny", "+nothing.here=1,2"])
def test_a_sweep_whose_first_job_cannot_be_composed_hides_it_too(
    word: str, call: Call, tmp_path: Path
) -> None:
    """By then Hydra has written what was asked for."""
    status, out, err = call(
        "-m", word, *QUICK, f"+logger.service.api_key={PLAIN}", "hydra.sweep.dir=swept"
    )
    (file,) = (tmp_path / "swept").rglob("*.yaml")
    assert status == 2 and PLAIN not in file.read_text() + out + err and HIDDEN in file.read_text()


@pytest.mark.parametrize("word", [
    f"logger.service.api_key={PLAIN} b$c(", f"+steps.api_key={PLAIN}",
    f"+logger.service.api_key={PLAIN},x",
    f"hydra.run.dir=file/x logger.service.api_key={PLAIN}",
])  # fmt: skip
def test_a_mistake_is_told_without_it(word: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, out, err = call(*QUICK, *(word.split() if word.startswith("hydra") else [word]))
    assert status == 2 and PLAIN not in out + err


def test_what_a_class_of_the_users_is_given_or_says_hides_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = {
        "_target_": "collections.UserDict",
        "api_key": PLAIN,
        "more": {"auth": {"pin": 90125}},
        "size": 3,
    }
    error = error_with_setting(
        ValueError(f"api_key {PLAIN} and 90125 are wrong for size 3"),
        node,
        "logger.service",
    )
    assert str(error) == (
        f"logger.service.api_key={HIDDEN} or logger.service.size=3: api_key {HIDDEN} and "
        f"{HIDDEN} are "
        f"wrong for size 3"
    )
    mine = {"_target_": "test_secret.Service", **node, "account": PLAIN} | {
        "_target_": "test_secret.Service"
    }
    assert list(own.settings_in_words(mine)) == [
        f"test_secret.Service is given api_key={HIDDEN}, more={{'auth': {{'pin': '{HIDDEN}'}}}}, "
        f"size=3, account={PLAIN}"
    ]
    with pytest.raises(
        ValueError, match=re.escape(f"logger.s.api_key={HIDDEN} must be int, not str")
    ):
        build({"_target_": "test_secret.Counted", "api_key": PLAIN}, Logger, "logger.s")


class Counted(Logger):
    def __init__(self, api_key: int) -> None:
        del api_key


def test_a_comparison_hides_it_in_all_that_it_writes(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what holds for all, and of what is an entry's own; two entries that differ in it alone
    stay two.
    """
    monkeypatch.setattr(command.runner, "run_all", lambda *_: None)
    entries = f"strategies=[single,'ddp +model.api_key={PLAIN}','ddp +model.api_key={PLAIN}x']"
    words = [*QUICK, "steps=9", f"+logger.service={{_target_: a.B, api_key: {PLAIN}}}", entries]
    status, out, err = call(
        *words, "hydra.run.dir=mine", "hydra.output_subdir=.hydra", config="compare"
    )
    files = [file for file in (tmp_path / "mine").rglob("*") if file.is_file()]
    assert status and {"results.json", "report.md", "report.html"} <= {file.name for file in files}
    assert (
        PLAIN not in out + err and [file.name for file in files if PLAIN in file.read_text()] == []
    )
    rows = json.loads((tmp_path / "mine" / "results.json").read_text())["rows"]
    # and a baseline for each of the two
    assert len(rows) == 5 == len({row["strategy"] for row in rows})


def test_a_sweep_under_torchrun_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun gets it, and a person sees it nowhere."""
    ran: list[list[str]] = []
    monkeypatch.setattr(dtrain_torchrun, "_run", lambda command: ran.append(command) or 1)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    launcher = dtrain_torchrun.TorchrunLauncher(1, [])
    launcher.config = OmegaConf.create(
        {"hydra": {"sweep": {"dir": str(tmp_path), "subdir": "0"}, "job": {}}}
    )
    launcher.context = SimpleNamespace(
        config_loader=SimpleNamespace(load_sweep_config=lambda config, _: config)
    )
    returned = launcher.launch([[f"+logger.service.api_key={PLAIN}"]], 0)
    assert f"+logger.service.api_key={PLAIN}" in ran[0]
    assert PLAIN not in str(returned[0]._return_value) and HIDDEN in str(returned[0]._return_value)
    out = capsys.readouterr().out
    assert PLAIN not in out and HIDDEN in out
