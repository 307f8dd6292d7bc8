"""The job manifests in configs/jobs/ use known fields, match the project and retry failed attempts."""

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
from service.config import load_service

ROOT = Path(__file__).resolve().parents[3]
JOBS = ROOT / "configs" / "jobs"


def fields(**properties: Any) -> dict[str, Any]:
    """Return the JSON schema of an object with these fields and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def list_of(items: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an array of these items."""
    return {"type": "array", "items": items}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}  # Kubernetes accepts only strings as values

# Names and types of Kubernetes and KubeRay (ray.io/v1, RayJob), limited to the fields that the manifest uses.
POD = fields(
    spec=fields(
        serviceAccountName=TEXT,
        containers=list_of(
            fields(
                name=TEXT,
                image=TEXT,
                ports=list_of(fields(containerPort=NUMBER, name=TEXT)),
                env=list_of(
                    fields(
                        name=TEXT,
                        value=TEXT,
                        valueFrom=fields(secretKeyRef=fields(name=TEXT, key=TEXT, optional=FLAG)),
                    )
                ),
                resources=fields(requests=TEXTS, limits=TEXTS),
                volumeMounts=list_of(fields(name=TEXT, mountPath=TEXT)),
            )
        ),
        volumes=list_of(
            fields(name=TEXT, configMap=fields(name=TEXT), emptyDir=fields(medium=TEXT, sizeLimit=TEXT))
        ),
    )
)
RAY_CLUSTER = fields(
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    headGroupSpec=fields(rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=list_of(
        fields(
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            rayStartParams=TEXTS,
            template=POD,
        )
    ),
)
RAY_SERVICE = fields(
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=fields(name=TEXT),
    spec=fields(serveConfigV2=TEXT, rayClusterConfig=RAY_CLUSTER),
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
        rayClusterSpec=RAY_CLUSTER,
    ),
)
ANYSCALE_SERVICE = fields(
    name=TEXT,
    image_uri=TEXT,
    compute_config=TEXT,
    working_dir=TEXT,
    excludes=list_of(TEXT),
    applications=list_of(fields(name=TEXT, route_prefix=TEXT, import_path=TEXT, args=TEXTS)),
    query_auth_token_enabled=FLAG,
)
ANYSCALE_JOB = fields(
    name=TEXT,
    entrypoint=TEXT,
    image_uri=TEXT,
    compute_config=TEXT,
    working_dir=TEXT,
    excludes=list_of(TEXT),
    env_vars=TEXTS,
    max_retries=NUMBER,
)


@pytest.fixture
def ray_job() -> dict[str, Any]:
    """Return the RayJob manifest."""
    return manifests_by_kind()["RayJob"]


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    """Load the run's YAML from the ConfigMap that the RayJob mounts."""
    (name, text), *_ = manifests_by_kind()["ConfigMap"]["data"].items()
    (tmp_path / name).write_text(text)
    return load_config(tmp_path / name).config


def manifests_by_kind() -> dict[str, Any]:
    """Return the documents of the KubeRay manifest by kind."""
    text = (JOBS / "kuberay_ray_job.yaml").read_text("utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_ray_job_uses_only_known_kuberay_fields(ray_job: dict[str, Any]):
    jsonschema.validate(ray_job, RAY_JOB)


def test_ray_job_matches_the_ray_version_and_image_of_the_project(ray_job: dict[str, Any]):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert f"ray[train]=={cluster['rayVersion']}" in project["dependencies"]
    workdir = re.findall(r"^WORKDIR (.*)$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)[-1]
    assert ray_job["spec"]["entrypoint"].split()[:2] == ["python", f"{workdir}/main.py"]


def test_ray_job_retries_with_a_fixed_run_name_in_a_bucket(ray_job: dict[str, Any], config: FinetuneConfig):
    assert ray_job["spec"]["backoffLimit"] > 0
    assert config.run_name
    assert config.storage_path and config.storage_path.startswith("s3://")


def test_ray_cluster_has_enough_gpus_for_the_run(ray_job: dict[str, Any], config: FinetuneConfig):
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["maxReplicas"] * gpus >= config.most_devices


def test_entrypoint_reads_the_yaml_from_the_mounted_config_map(ray_job: dict[str, Any]):
    config_map = manifests_by_kind()["ConfigMap"]
    head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (volume,) = head["volumes"]
    (mount,) = head["containers"][0]["volumeMounts"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert mount["name"] == volume["name"]
    assert f" {mount['mountPath']}/{next(iter(config_map['data']))} " in ray_job["spec"]["entrypoint"]


def test_ray_job_requires_a_token_and_contains_no_secret(ray_job: dict[str, Any]):
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert yaml.safe_load(ray_job["spec"]["runtimeEnvYAML"])["env_vars"].keys() == {
        "RAY_JOB_STOP_WAIT_TIME_S"
    }
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for variable in group["template"]["spec"]["containers"][0]["env"]:
            assert "value" not in variable


def test_anyscale_job_is_valid_and_retries_a_named_run():
    job = yaml.safe_load((JOBS / "anyscale_job.yaml").read_text("utf-8"))
    jsonschema.validate(job, ANYSCALE_JOB)
    assert job["max_retries"] > 0
    assert job["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S"}
    _, program, path, *overrides, _ = job["entrypoint"].split()
    assert program == "main.py"
    assert load_config(ROOT / path, overrides).config.run_name


@pytest.mark.parametrize(
    ("codes", "exit_code", "attempts"),
    [([0], 0, 1), ([1, 0], 0, 2), ([1, 1, 1, 1], 1, 4), ([2], 2, 1), ([1, 143], 143, 2)],
)
def test_script_retries_only_after_exit_code_1(
    tmp_path: Path, codes: list[int], exit_code: int, attempts: int
):
    """A fake `python` exits with each of the codes in turn."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> "$CALLS"\nread -r codes < "$CODES"\necho "${codes#* }" > "$CODES"\nexit "${codes%% *}"\n'
    )
    python.chmod(0o755)
    (tmp_path / "codes").write_text(" ".join(map(str, codes)) + "\n")
    completed = subprocess.run(
        [JOBS / "ray_job.sh", "run.yaml", "num_epochs=2"],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "CALLS": str(tmp_path / "calls"),
            "CODES": str(tmp_path / "codes"),
            "RAY_ADDRESS": "http://head:8265",
        },
        timeout=30,
    )
    assert completed.returncode == exit_code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["main.py run.yaml num_epochs=2 --submit http://head:8265"] * attempts


def test_script_without_a_job_server_fails_and_names_ray_address():
    completed = subprocess.run(
        [JOBS / "ray_job.sh", "run.yaml"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert completed.returncode == 1
    assert "RAY_ADDRESS=http://HEAD:8265" in completed.stderr


def test_ray_service_uses_only_known_fields_and_serves_the_mounted_service(tmp_path: Path):
    documents = yaml.safe_load_all((JOBS / "kuberay_ray_service.yaml").read_text("utf-8"))
    kinds = {document["kind"]: document for document in documents}
    jsonschema.validate(kinds["RayService"], RAY_SERVICE)
    for name, text in kinds["ConfigMap"]["data"].items():
        (tmp_path / name).write_text(text)
    (application,) = yaml.safe_load(kinds["RayService"]["spec"]["serveConfigV2"])["applications"]
    check_application(application)
    service = load_service(tmp_path / Path(application["args"]["config"]).name)
    (group,) = kinds["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert all(group["maxReplicas"] >= base.config.most_devices for base in service.bases.values())


def test_anyscale_service_uses_only_known_fields_and_serves_a_cookbook():
    manifest = yaml.safe_load((JOBS / "anyscale_service.yaml").read_text("utf-8"))
    jsonschema.validate(manifest, ANYSCALE_SERVICE)
    (application,) = manifest["applications"]
    check_application(application)
    assert load_service(ROOT / application["args"]["config"]).bases


def check_application(application: dict[str, Any]) -> None:
    module, _, name = application["import_path"].partition(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")
    assert f"def {name}(arguments: dict[str, str])" in source
    assert list(application["args"]) == ["config"]
