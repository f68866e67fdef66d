"""What is shipped beside the package holds what SECURITY.md and the documents say of it:
containers, pods, CI, pins.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml")) + sorted(
    (ROOT / ".github" / "workflows").glob("*.yml")
)
COMMIT = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")
DIGEST = re.compile(r"python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}")


def read(file: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / file).read_text())


def pins(file: str) -> dict[str, str]:
    """The versions that a file of requirements names, by the package's name as PyPI has it."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", (ROOT / file).read_text(), re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


# Containers


SERVICES = [
    pytest.param(service, id=f"{file}-{name}")
    for file in ("compose", "tensorboard")
    for name, service in read(f"docker/{file}.yaml")["services"].items()
]


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_has_few_rights_and_limits(service: dict[str, Any]) -> None:
    assert (
        service["read_only"]
        and service["cap_drop"] == ["ALL"]
        and "no-new-privileges:true" in service["security_opt"]
    )
    assert (
        service["mem_limit"]
        and service["pids_limit"]
        and all("size=" in each for each in service["tmpfs"])
    )
    user = service["user"]
    assert user == "1000:1000" or re.fullmatch(r"(\$\{RUN_AS:\?[^}]+\}):\1", user)
    assert not service.keys() & {"privileged", "network_mode", "pid", "ipc", "devices", "cap_add"}


def test_nodes_publish_nothing_and_have_no_way_out() -> None:
    made = read("docker/compose.yaml")
    assert made["networks"] == {"nodes": {"internal": "${INTERNAL:-true}"}}
    assert all(
        each["networks"] == ["nodes"] and "ports" not in each for each in made["services"].values()
    )


def test_tensorboard_reads_the_runs_alone_and_is_published_on_loopback() -> None:
    made = read("docker/tensorboard.yaml")
    (service,) = made["services"].values()
    assert [each.rpartition(":/")[2] for each in service["volumes"]] == ["dtrain/outputs:ro"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    (network,) = service["networks"]
    assert made["networks"][network]["driver_opts"] == {
        "com.docker.network.bridge.enable_ip_masquerade": "false"
    }


def test_docker_runs_page_takes_away_what_compose_takes_away() -> None:
    flags = re.search(r'^safe="(.*)"$', (ROOT / "docs" / "docker.md").read_text(), re.M)
    assert flags and all(
        flag in flags[1]
        for flag in (
            "--read-only",
            "--cap-drop ALL",
            "--security-opt no-new-privileges:true",
            "--memory ",
            "--pids-limit 1024",
            "--network none",
            "--tmpfs /tmp:size=1g",
        )
    )
    for line in re.findall(r"^docker run .*", (ROOT / "docs" / "docker.md").read_text(), re.M):
        assert line.startswith("docker run $safe ") and "--user $(id -u)" in line


def test_a_base_is_named_by_one_digest_everywhere() -> None:
    found = {
        file: DIGEST.findall((ROOT / "docker" / file).read_text())
        for file in ("Dockerfile", "compose.yaml", "smoke.sh")
    }
    assert (
        all(len(each) == 1 for each in found.values())
        and len({each[0] for each in found.values()}) == 1
    )


def test_the_image_is_built_of_what_may_go_in() -> None:
    """All that the Dockerfile copies is let in by .dockerignore; nothing else is."""
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored and not any(
        part in each for each in let_in for part in (".git", "outputs", ".venv")
    )
    for copied in re.findall(
        r"^COPY (?!--from)(.*) \S+$", (ROOT / "docker" / "Dockerfile").read_text(), re.M
    ):
        for name in copied.split():
            name = re.sub(r"\$\{CERTIFICATE:-(.*)\}", r"\1", name)
            places = [Path(name), *Path(name).parents[:-1]]  # a folder lets in what is in it
            assert any(place.match(each) for each in let_in for place in places), name


# Pods


@pytest.mark.parametrize("file", ["job", "trainjob"])
def test_pods_are_fenced_before_they_are_there_and_have_room_that_ends(file: str) -> None:
    manifests = list(
        yaml.safe_load_all((ROOT / "launch" / "kubernetes" / f"{file}.yaml").read_text())
    )
    assert [each["kind"] for each in manifests].index("NetworkPolicy") == 0 and len(manifests) > 1
    policy = manifests[0]["spec"]
    own = {"podSelector": policy["podSelector"]}
    assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["ingress"] == [{"from": [own]}]
    pods, dns = policy["egress"]
    assert pods == {"to": [own]} and {each["port"] for each in dns["ports"]} == {53}
    assert dns["to"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        }
    ]
    text = (ROOT / "launch" / "kubernetes" / f"{file}.yaml").read_text()
    assert text.count("emptyDir:") == text.count("sizeLimit:") == 2 and "limits: {memory:" in text


# CI


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_named_by_commit_and_get_no_credentials(workflow: Path) -> None:
    made = yaml.safe_load(workflow.read_text())
    assert made["permissions"] == {"contents": "read"}
    steps = [step for job in made["jobs"].values() for step in job["steps"]]
    used = [step for step in steps if "uses" in step]
    assert used and all(COMMIT.fullmatch(step["uses"]) for step in used)
    checkouts = [step for step in used if step["uses"].startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] is False for step in checkouts)
    assert not any("permissions" in job for job in made["jobs"].values())


def test_pins_are_audited_weekly() -> None:
    made = read(".github/workflows/audit.yml")
    (when,) = made[True]["schedule"]  # `on`, as YAML 1.1 reads it
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", when["cron"])
    (job,) = made["jobs"].values()
    assert any(
        "pip-audit==" in step.get("run", "") and "constraints.txt" in step["run"]
        for step in job["steps"]
    )


def test_the_lock_has_the_pins_and_a_digest_for_each_file() -> None:
    """But for torch, whose files differ from index to index, and what it alone brings; what
    builds comes first.
    """
    lock, constraints = pins("docker/requirements.lock"), pins("constraints.txt")
    assert len(lock) > 30 and "torch" not in lock
    assert {
        name: version for name, version in lock.items() if constraints.get(name) != version
    }.keys() <= {"setuptools"}
    blocks = re.split(
        r"^(?=[A-Za-z])", (ROOT / "docker" / "requirements.lock").read_text(), flags=re.M
    )[1:]
    assert len(blocks) == len(lock) and all("--hash=sha256:" in block for block in blocks)
    build = (ROOT / "docker" / "Dockerfile").read_text()
    locked = [line for line in build.splitlines() if ".lock" in line and "pip install" in line]
    assert len(locked) == 2 and all(
        "--require-hashes" in line and "--no-deps" in line for line in locked
    )
    assert "--only-binary :all:" in locked[0] and "--no-build-isolation" in locked[1]
