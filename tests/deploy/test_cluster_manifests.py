"""deploy/cluster as far as it can be checked without Kubernetes: by Ray's own readers of these files, and flyray's."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from flyray.actors.device_choice import ALL_GPUS_VISIBLE
from flyray.cluster.cluster_room import check_engines
from flyray.cluster.config import FlyrayConfig
from flyray.cluster.deployment import FromFile, application
from flyray.cluster.local_ray import SERVE_ENVIRONMENT

DEPLOY = Path(__file__).parents[2] / "deploy"
FOLDER = DEPLOY / "cluster"
ENVIRONMENT = SERVE_ENVIRONMENT | dict.fromkeys(ALL_GPUS_VISIBLE, "1")
# Of docs/reference/api.md of KubeRay 1.3, ray.io/v1.
RAY_SERVICE = {"upgradeStrategy", "serveConfigV2", "rayClusterConfig"}
RAY_CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


CONFIG = FlyrayConfig.model_validate(read("engines.yaml"))
SERVICE = read("rayservice.yaml")
CLUSTER = SERVICE["spec"]["rayClusterConfig"]


def containers() -> list[dict[str, Any]]:
    groups = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


def test_a_ray_service_has_the_fields_that_there_are() -> None:
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    assert set(SERVICE["spec"]) == RAY_SERVICE
    assert set(CLUSTER) == RAY_CLUSTER
    assert all(set(group) == WORKER_GROUP for group in CLUSTER["workerGroupSpecs"])
    values = [group["rayStartParams"].values() for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"])]
    assert all(isinstance(value, str) for group in values for value in group)


def test_rays_autoscaler_reads_gpus_and_finds_room_for_all_engines() -> None:
    resource = SERVICE | {"spec": CLUSTER, "metadata": {"name": "flyray", "namespace": "default"}}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    worker = types["mi325x"]
    assert worker["resources"]["GPU"] == CONFIG.engine.shards
    engine = CONFIG.engine_config()
    for engines in (worker["min_workers"], worker["max_workers"]):
        nodes = [worker["resources"]] * engines
        check_engines(engines, engine.shards, engine.shard_bundle, CONFIG.serve.front_replicas, nodes)
    assert (worker["min_workers"], worker["max_workers"]) == (CONFIG.serve.engines.min, CONFIG.serve.engines.max)


def test_serve_reads_what_kuberay_deploys_and_flyray_makes_the_application_of_it() -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))
    (app,) = schema.applications
    module, _, name = app.import_path.partition(":")
    assert (module, name) == ("flyray.cluster.deployment", "from_file")
    mounts = {mount["name"]: mount["mountPath"] for mount in containers()[1]["volumeMounts"]}
    assert FromFile.model_validate(app.args).path == f"{mounts['flyray']}/engines.yaml"
    assert CONFIG.model.path.startswith(mounts["models"])
    assert (schema.http_options.host, schema.http_options.port) == (CONFIG.serve.host, CONFIG.serve.port)
    assert application(CONFIG)


def test_a_pod_serves_where_the_configuration_says_and_lives_while_its_engine_drains() -> None:
    worker = containers()[1]
    probe = worker["readinessProbe"]["httpGet"]
    assert probe == {"path": "/health", "port": CONFIG.serve.port}
    assert CONFIG.serve.port in [port["containerPort"] for port in worker["ports"]]
    assert "livenessProbe" not in worker
    grace = CLUSTER["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > CONFIG.serve.engines.drain_timeout_s
    built = (DEPLOY / "Containerfile.rocm").read_text()
    assert f"EXPOSE {CONFIG.serve.port}" in built
    assert {each["image"] for each in containers()} == {"flyray-rocm"}
    assert "-t flyray-rocm" in built
    (maps,) = read("kustomization.yaml")["configMapGenerator"]
    assert maps["files"] == ["engines.yaml"]
    assert {"name": "flyray", "configMap": {"name": maps["name"]}} in CLUSTER["headGroupSpec"]["template"]["spec"][
        "volumes"
    ]


def test_every_cluster_starts_with_the_environment_that_flyray_gives_its_own() -> None:
    for container in containers():
        assert {entry["name"]: entry["value"] for entry in container["env"]} == ENVIRONMENT
    script = f". {FOLDER}/environment.sh && env -0"
    told = subprocess.run(["sh", "-c", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True)
    found = dict(entry.split("=", 1) for entry in told.stdout.decode().split("\0") if entry)
    assert {name: value for name, value in found.items() if name.startswith("RAY_")} == ENVIRONMENT


def test_ray_up_takes_its_file() -> None:
    config = read("ray-up.yaml")
    files = {f"deploy/cluster/{name}" for name in ("engines.yaml", "environment.sh")}
    assert set(config["file_mounts"].values()) == files
    assert all((DEPLOY.parent / source).is_file() for source in config["file_mounts"].values())
    assert config["max_workers"] + 1 == CONFIG.serve.engines.max
    assert config["docker"]["image"] == containers()[0]["image"]
    prepared = prepare_config(config)
    validate_config(prepared)
    (node,) = prepared["available_node_types"].values()
    assert (node["min_workers"], node["max_workers"]) == (0, 3)
