"""launch/kubernetes is what Kubernetes and Kubeflow take, by their own schemas; no cluster has
seen it here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="pip install kubernetes-validate"
)
models = pytest.importorskip(
    "kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api"
)

KUBERNETES = "1.37"
KUBEFLOW = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
FOLDER = Path(__file__).parent.parent.parent / "launch" / "kubernetes"
MANIFESTS = [
    pytest.param(manifest, id=f"{file.stem}-{manifest['kind']}")
    for file in sorted(FOLDER.glob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
]
PODS = {
    "Job": lambda manifest: manifest["spec"]["template"]["spec"],
    "TrainingRuntime": lambda m: m["spec"]["template"]["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]["template"]["spec"],
}


def validate(manifest: dict[str, Any]) -> None:
    """Raise ValueError for what the schema of its kind does not know, or knows otherwise."""
    if model := KUBEFLOW.get(manifest["kind"]):
        # it leaves out what it does not know
        if (known := model.from_dict(manifest).to_dict()) != manifest:
            raise ValueError(f"unknown keys: of {manifest} the schema knows {known}")
        return
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(error.message) from error


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_is_valid(manifest: dict[str, Any]) -> None:
    validate(manifest)


def _misspell(manifest: dict[str, Any]) -> None:
    manifest["spec"]["replica"] = 1


def _misspell_deeply(manifest: dict[str, Any]) -> None:
    if pod := PODS.get(manifest["kind"]):
        pod(manifest)["containers"][0]["imagePullPolice"] = "Always"
    else:
        _misspell(manifest)


def _mistype(manifest: dict[str, Any]) -> None:
    key = sorted(manifest["spec"])[0]
    manifest["spec"][key] = 1.5


@pytest.mark.parametrize("broken", [_misspell, _misspell_deeply, _mistype])
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_broken_manifest_is_refused(
    manifest: dict[str, Any], broken: Callable[[dict[str, Any]], None]
) -> None:
    manifest = copy.deepcopy(manifest)
    broken(manifest)
    # the latter two: Kubeflow's own, of wrong types
    with pytest.raises((ValueError, TypeError, AttributeError)):
        validate(manifest)


@pytest.mark.parametrize("manifest", [m for m in MANIFESTS if m.values[0]["kind"] in PODS])
def test_pods_have_few_rights_and_time_to_end(manifest: dict[str, Any]) -> None:
    pod = PODS[manifest["kind"]](manifest)
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert pod["terminationGracePeriodSeconds"] >= 60 and pod["restartPolicy"] == "Never"
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert not rights["allowPrivilegeEscalation"] and rights["capabilities"] == {
            "drop": ["ALL"]
        }
