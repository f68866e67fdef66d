"""What a run leaves holds no secret that it was given, and the run itself gets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_cli
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dtrain.report.base import Logger, Run
from dtrain.secret import HIDDEN, is_secret, masked, masked_override, written

call = test_cli.call  # a fixture
Call = Callable[..., tuple[int, str, str]]
QUICK = ["model=tiny", "steps=1", "eval.every=0", "global_batch_size=4", "seq_len=16", "measure.peak_flops=1e12",
         "launch.threads=1"]  # fmt: skip
PLAIN, HIDDEN_IN_ENVIRONMENT, LETTERS = "plain-55aa", "hidden-77cc", st.text("abcdef", min_size=1)
SECRETS = ["api_key", "apiKey", "WANDB_API_KEY", "password", "db-password", "hf_token", "token", "secret", "access_key",
           "aws_secret_access_key", "credentials", "authorization"]  # fmt: skip
OPEN = ["pad_token", "end_of_text", "eos_token", "tokenizer", "tokens_per_second", "key_column", "monkey", "token_drop",
        "additional_special_tokens", "author", "passes", "keys"]  # fmt: skip


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
    given = {"_target_": "test_secret.Service", "account": "${oc.env:HIDDEN_NAME}", "api_key": PLAIN,
             "size": "'${oc.decode:${oc.env:HIDDEN_SIZE}}'", "place": f"'https://me:{PLAIN}@host/x'"}  # fmt: skip
    service = [f"+logger.service.{name}={value}" for name, value in given.items()]
    status, out, err = call(*QUICK, f"launch.nproc={ranks}", *service, f"strategy={['single', 'ddp'][ranks - 1]}", f"+hydra.job.env_set.A_TOKEN={PLAIN}",
                            "hydra.run.dir=mine")  # fmt: skip
    assert not status, err
    address = f"https://me:{PLAIN}@host/x"
    assert json.loads((tmp_path / "given").read_text()) == [PLAIN, HIDDEN_IN_ENVIRONMENT, 3, address]
    files = [file for file in (tmp_path / "mine").rglob("*") if file.is_file()]
    found = [f.name for f in files if {s for s in (PLAIN, HIDDEN_IN_ENVIRONMENT) if s.encode() in f.read_bytes()}]
    assert found == [] and {"summary.json", "config.yaml", "overrides.yaml", "told"} <= {f.name for f in files}
    assert PLAIN not in out and HIDDEN_IN_ENVIRONMENT not in out
    told = json.loads((tmp_path / "mine" / "summary.json").read_text())["config"]["logger"]["service"]
    assert told == {"_target_": "test_secret.Service", "account": "${oc.env:HIDDEN_NAME}", "size": 3,
                    "api_key": HIDDEN, "place": f"https://{HIDDEN}@host/x"}  # fmt: skip
    again = call("--config-dir=mine/.hydra", "--config-name=config", "hydra.run.dir=again")
    assert again[0] == 2 and "logger.service.api_key" in again[2]  # asked for, and not taken to be "(hidden)"


@pytest.mark.parametrize("name", [*SECRETS, *OPEN])
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret(name) == (name in SECRETS)


@given(st.recursive(LETTERS | st.integers() | st.none(), lambda e: st.lists(e) | st.dictionaries(LETTERS, e)))
def test_all_else_stays(value: Any) -> None:
    assert masked({"a": value}) == {"a": value}


@given(st.lists(LETTERS, max_size=3), st.sampled_from(SECRETS))
def test_a_secret_is_found_however_deep(path: list[str], name: str) -> None:
    value: Any = {name: "sesame", "rows": [{name: ["sesame"]}]}
    for each in path:
        value = {each: value}
    assert "sesame" not in json.dumps(masked(value)) and json.dumps(masked(value)).count(HIDDEN) == 2


@pytest.mark.parametrize(("word", "told"), [
    ("logger.api_key=x", f"logger.api_key={HIDDEN}"), ("+a.token='x y'", f"+a.token={HIDDEN}"), ("seed=3", "seed=3"),
    ("~logger", "~logger"), ("a=https://u:p@h", f"a=https://{HIDDEN}@h"), ("a.token=${oc.env:X}", "a.token=${oc.env:X}"),
    ("+a={b: 1, password: x, c: [1]}", f"+a={{b: 1, password: {HIDDEN}, c: [1]}}"),
    ("+a={b: {api_key: 'x y'}, c: 2}", f"+a={{b: {{api_key: {HIDDEN}}}, c: 2}}"),
])  # fmt: skip
def test_words_of_the_command_line(word: str, told: str) -> None:
    assert masked_override(word) == told


def test_whatever_way_leads_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another key, by a whole node, within a text, by a default; what is no text stays readable."""
    monkeypatch.setenv("HIDDEN_NAME", HIDDEN_IN_ENVIRONMENT)
    monkeypatch.setenv("HIDDEN_SIZE", "3")
    config = OmegaConf.create({
        "a": "${oc.env:HIDDEN_NAME}", "b": "${a}", "c": {"d": ["at ${b}", "${.0}", 7], "e": "${f}"}, "g": "${c}",
        "f": "plain", "h": "${oc.decode:${oc.env:HIDDEN_SIZE}}", "i": "${oc.env:NO_SUCH_NAME,open}", "j": "???", "k": None,
    })  # fmt: skip
    c = {"d": ["at ${b}", "${.0}", 7], "e": "plain"}
    assert written(config) == {"a": "${oc.env:HIDDEN_NAME}", "b": "${a}", "c": c, "g": c, "f": "plain", "h": 3,
                               "i": "${oc.env:NO_SUCH_NAME,open}", "j": None, "k": None}  # fmt: skip
    assert OmegaConf.to_container(config, resolve=True, throw_on_missing=False)["b"] == HIDDEN_IN_ENVIRONMENT
