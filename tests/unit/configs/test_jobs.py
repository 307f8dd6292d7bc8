"""The manifests in configs/jobs/: of the fields that each platform knows, of this project's versions, and retried."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from configs.loading import load_config
from configs.schema import FinetuneConfig

ROOT = Path(__file__).resolve().parents[3]
JOBS = ROOT / "configs" / "jobs"


def fields(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has these fields and no other."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}  # quoted, or Kubernetes refuses them

# Kubernetes' and KubeRay's (ray.io/v1, RayJob) own names and types, as far as the manifest has them.
POD = fields(
    spec=fields(
        serviceAccountName=TEXT,
        containers=listed(
            fields(
                name=TEXT,
                image=TEXT,
                ports=listed(fields(containerPort=NUMBER, name=TEXT)),
                env=listed(
                    fields(
                        name=TEXT,
                        value=TEXT,
                        valueFrom=fields(secretKeyRef=fields(name=TEXT, key=TEXT, optional=FLAG)),
                    )
                ),
                resources=fields(requests=TEXTS, limits=TEXTS),
                volumeMounts=listed(fields(name=TEXT, mountPath=TEXT)),
            )
        ),
        volumes=listed(
            fields(name=TEXT, configMap=fields(name=TEXT), emptyDir=fields(medium=TEXT, sizeLimit=TEXT))
        ),
    )
)
RAY_JOB = fields(
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(name=TEXT),
    spec=fields(
        entrypoint=TEXT,
        backoffLimit=NUMBER,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=NUMBER,
        runtimeEnvYAML=TEXT,
        rayClusterSpec=fields(
            rayVersion=TEXT,
            authOptions=fields(mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=FLAG,
            headGroupSpec=fields(rayStartParams=TEXTS, template=POD),
            workerGroupSpecs=listed(
                fields(
                    groupName=TEXT,
                    replicas=NUMBER,
                    minReplicas=NUMBER,
                    maxReplicas=NUMBER,
                    rayStartParams=TEXTS,
                    template=POD,
                )
            ),
        ),
    ),
)
ANYSCALE_JOB = fields(
    name=TEXT,
    entrypoint=TEXT,
    image_uri=TEXT,
    compute_config=TEXT,
    working_dir=TEXT,
    excludes=listed(TEXT),
    env_vars=TEXTS,
    max_retries=NUMBER,
)


@pytest.fixture
def ray_job() -> dict[str, Any]:
    return documents()["RayJob"]


@pytest.fixture
def run(tmp_path: Path) -> FinetuneConfig:
    """The YAML that the RayJob's nodes find."""
    (name, text), *_ = documents()["ConfigMap"]["data"].items()
    (tmp_path / name).write_text(text)
    return load_config(tmp_path / name).config


def documents() -> dict[str, Any]:
    text = (JOBS / "kuberay_ray_job.yaml").read_text("utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_the_ray_job_has_fields_that_kuberay_knows(ray_job: dict[str, Any]):
    jsonschema.validate(ray_job, RAY_JOB)


def test_the_ray_job_is_of_this_project(ray_job: dict[str, Any]):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert f"ray[train]=={cluster['rayVersion']}" in project["dependencies"]
    home = re.findall(r"^WORKDIR (.*)$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)[-1]
    assert ray_job["spec"]["entrypoint"].split()[:2] == ["python", f"{home}/main.py"]


def test_a_failed_attempt_is_retried_with_the_same_run_name(ray_job: dict[str, Any], run: FinetuneConfig):
    assert ray_job["spec"]["backoffLimit"] > 0
    assert run.run_name
    assert run.storage_path and run.storage_path.startswith("s3://")


def test_the_ray_jobs_cluster_can_hold_the_run(ray_job: dict[str, Any], run: FinetuneConfig):
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["maxReplicas"] * gpus >= run.most_devices


def test_the_ray_job_finds_its_yaml(ray_job: dict[str, Any]):
    config_map = documents()["ConfigMap"]
    head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (volume,) = head["volumes"]
    (mount,) = head["containers"][0]["volumeMounts"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert mount["name"] == volume["name"]
    assert f" {mount['mountPath']}/{next(iter(config_map['data']))} " in ray_job["spec"]["entrypoint"]


def test_the_ray_job_asks_for_a_token_and_holds_no_secret(ray_job: dict[str, Any]):
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert yaml.safe_load(ray_job["spec"]["runtimeEnvYAML"])["env_vars"].keys() == {
        "RAY_JOB_STOP_WAIT_TIME_S"
    }
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for variable in group["template"]["spec"]["containers"][0]["env"]:
            assert "value" not in variable


def test_the_anyscale_job():
    job = yaml.safe_load((JOBS / "anyscale_job.yaml").read_text("utf-8"))
    jsonschema.validate(job, ANYSCALE_JOB)
    assert job["max_retries"] > 0
    assert job["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S"}
    _, program, path, *overrides, _ = job["entrypoint"].split()
    assert program == "main.py"
    assert load_config(ROOT / path, overrides).config.run_name


@pytest.mark.parametrize(
    ("codes", "ends_with", "attempts"),
    [([0], 0, 1), ([1, 0], 0, 2), ([1, 1, 1, 1], 1, 4), ([2], 2, 1), ([1, 143], 143, 2)],
)
def test_the_script_tries_failures_again_and_nothing_else(
    tmp_path: Path, codes: list[int], ends_with: int, attempts: int
):
    """With a `python` that ends with one code after the other."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> "$CALLS"\nread -r codes < "$CODES"\necho "${codes#* }" > "$CODES"\nexit "${codes%% *}"\n'
    )
    python.chmod(0o755)
    (tmp_path / "codes").write_text(" ".join(map(str, codes)) + "\n")
    done = subprocess.run(
        [JOBS / "ray_job.sh", "run.yaml", "num_epochs=2"],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "CALLS": str(tmp_path / "calls"),
            "CODES": str(tmp_path / "codes"),
            "RAY_ADDRESS": "http://head:8265",
        },
        timeout=30,
    )
    assert done.returncode == ends_with
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["main.py run.yaml num_epochs=2 --submit http://head:8265"] * attempts


def test_the_script_needs_a_job_server():
    done = subprocess.run(
        [JOBS / "ray_job.sh", "run.yaml"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "RAY_ADDRESS=http://HEAD:8265" in done.stderr
