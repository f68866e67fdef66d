"""Files of a configuration from outside: settings of ours are taken, what Hydra would run by
them is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import call  # noqa: F401

Call = Callable[..., tuple[int, str, str]]
QUICK = [
    "model=tiny",
    "steps=1",
    "eval.every=0",
    "global_batch_size=4",
    "seq_len=16",
    "measure.peak_flops=1e12",
    "launch.threads=1",
    "hydra.run.dir=mine",
]
TOUCH = "{_target_: pathlib.Path.touch, self: {_target_: pathlib.Path, _args_: [PWNED]}}"
BAD = {
    "callbacks": f"hydra: {{callbacks: {{a: {TOUCH}}}}}",
    "job_logging": (
        "hydra: {job_logging: {version: 1, handlers: {a: {class: logging.FileHandler, filename: "
        "PWNED}}}}"
    ),
    "job.env_set": "hydra: {job: {env_set: {LD_PRELOAD: a.so}}}",
    "launcher": "hydra: {launcher: {_target_: os.abort}}",
    "sweeper": "hydra: {sweeper: {_target_: os.abort}}",
}


def files(folder: Path, text: str) -> None:
    """As an experiment, and as a configuration of its own."""
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    (folder / "experiment" / "ours.yaml").write_text("# @package _global_\nseed: 3\n")
    (folder / "alone.yaml").write_text(f"defaults: [train, _self_]\n{text}\n")


@pytest.mark.parametrize("key", BAD)
@pytest.mark.parametrize(
    "way", [["+experiment=theirs"], ["--config-name=alone"]], ids=["part", "whole"]
)
def test_what_hydra_would_run_is_refused(
    key: str, way: list[str], call: Call, tmp_path: Path
) -> None:
    files(tmp_path / "conf", BAD[key])
    options = [word for word in way if word.startswith("-")]
    status, _, err = call("--config-dir=conf", *options, *(set(way) - set(options)), *QUICK)
    assert status == 2 and err.splitlines() == [
        f"dtrain: hydra.{key} is set by a file outside dtrain (conf), and runs code, or can: read "
        f"it, and add "
        "allow_hydra_code=true if you trust it"
    ]
    assert not (tmp_path / "PWNED").exists() and not (tmp_path / "mine").exists()


def test_what_is_typed_or_ours_or_allowed_is_not(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_NAME", "")
    files(tmp_path / "conf", "seed: 7\nhydra: {job: {env_set: {A_NAME: set}}}")
    files(tmp_path / "plain", "seed: 7")
    plain = ["--config-dir=plain", "+experiment=theirs", *QUICK]
    asked = ["--config-dir=conf", "+experiment=theirs", *QUICK, "overwrite=true"]
    for words in ([*plain, "+hydra.job.env_set.A_NAME=typed"], [*asked, "allow_hydra_code=true"]):
        status, _, err = call(*words)
        assert (status, err) == (0, "")
        assert "seed: 7" in (tmp_path / "mine" / ".hydra" / "config.yaml").read_text()


# by which the file is composed in other ways, and where Hydra's own first composition fails
SWEEPS = {
    "a word beside it": ["--config-dir=conf", "-m", "+experiment=theirs", "seed=1,2"],
    "the file itself": ["--config-dir=conf", "-m", "+experiment=ours,theirs"],
    "all files": ["--config-dir=conf", "-m", "+experiment=glob(*)"],
    "asked for in a file": [
        "--config-dir=conf",
        "+experiment=theirs",
        "seed=1,2",
        "hydra.mode=MULTIRUN",
    ],
    "another folder": ["hydra.searchpath=[file://conf]", "+experiment=theirs"],
    "another folder, swept": ["-m", "hydra.searchpath=[file://conf]", "+experiment=ours,theirs"],
}


@pytest.mark.parametrize("key", ["callbacks", "job_logging", "job.env_set"])
@pytest.mark.parametrize("way", SWEEPS)
def test_no_way_leads_round_it(key: str, way: str, call: Call, tmp_path: Path) -> None:
    files(tmp_path / "conf", BAD[key])
    options = [word for word in SWEEPS[way] if word.startswith("-")]
    settings = [word for word in SWEEPS[way] if not word.startswith("-")]
    status, _, err = call(*options, *settings, *QUICK, "hydra.sweep.dir=swept")
    said = (
        "several values"
        if "MULTIRUN" in settings[-1]
        else f"hydra.{key} is set by a file outside dtrain (conf)"
    )
    assert status == 2 and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "PWNED").exists() and not (tmp_path / "mine").exists()
    assert not (tmp_path / "swept" / "0").exists()


def test_a_package_that_a_file_names_as_a_folder_is_not_imported(
    call: Call, tmp_path: Path
) -> None:
    files(tmp_path / "conf", "hydra: {searchpath: ['pkg://this']}")
    sys.modules.pop("this", None)
    status, _, err = call("--config-dir=conf", "--config-name=alone", *QUICK)
    assert status == 2 and "hydra.searchpath is set by a file outside dtrain (conf)" in err
    assert "this" not in sys.modules


def test_a_strategy_from_outside_is_taken(call: Call, tmp_path: Path) -> None:
    """Of a list each is composed by itself too, without what train.yaml says of Hydra's."""
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "theirs.yaml").write_text("dp: {_target_: nothing.like.That}")
    status, _, err = call("--config-dir=conf", "strategy=[tensor,theirs]", *QUICK)
    assert status == 2 and err.startswith(
        "dtrain: strategy.dp._target_=nothing.like.That cannot be imported"
    )


@pytest.mark.parametrize("word", ["--experimental-rerun=theirs.pickle", "--exp=theirs.pickle"])
def test_a_pickled_run_is_not_read(word: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "theirs.pickle").write_bytes(b"cpathlib\nPath\n(S'PWNED'\ntR.")
    status, _, err = call(word)
    assert status == 2 and err.splitlines() == [
        "dtrain: --experimental-rerun=theirs.pickle: a pickle runs code, and is not read: a run "
        "is repeated by "
        "--config-dir=RUN/.hydra --config-name=config"
    ]


@pytest.mark.parametrize("way", ["--config-name=theirs", "+experiment=theirs"])
@pytest.mark.parametrize("text", [
    b"\xff\xfe", b"a: \xe9", b"\0", b"[" * 20_000, b"a: [", b"a: b: c",
    b"!!python/object/apply:os.getpid []", b"&a [*a]", b"- 1",
    b"3", b"a: 1\na: 2",
], ids=lambda text: repr(text[:20]))  # fmt: skip
def test_a_file_that_is_no_configuration_is_told_by_its_name(
    text: bytes, way: str, call, tmp_path: Path
) -> None:
    file = tmp_path / "conf" / ("theirs.yaml" if "name" in way else "experiment/theirs.yaml")
    file.parent.mkdir(parents=True)
    file.write_bytes(text)
    status, _, err = call("--config-dir=conf", way, "hydra.run.dir=run")
    assert (
        status == 2 and err.startswith("dtrain: ") and err.count("\n") == 1 and "theirs" in err
    ), err
