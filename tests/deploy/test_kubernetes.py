"""The manifests: built by kustomize, held against Kubernetes' own schemas, and against what we promise of them."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashbulb_service.embedded import EmbeddedServer

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed"
)

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

KUBERNETES = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
PROMETHEUS = KUBERNETES.parent / "prometheus"
OVERLAYS = ("cpu", "gpu", "dev", "pools")
SCALED = ("cpu", "gpu", "pools")
KEDA = json.loads(Path(__file__).with_name("scaledobject.schema.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@cache
def build(overlay: str) -> tuple[dict[str, Any], ...]:
    """Return the objects of an overlay."""
    folder = KUBERNETES / "overlays" / overlay
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    return tuple(yaml.safe_load_all(done.stdout))


def pods(overlay: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and pod of everything that runs."""
    for one in build(overlay):
        if one["kind"] in {"Deployment", "StatefulSet"}:
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def find(overlay: str, kind: str, name: str) -> dict[str, Any]:
    """Return one object."""
    return next(o for o in build(overlay) if o["kind"] == kind and o["metadata"]["name"] == name)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_its_schema(overlay: str) -> None:
    for one in build(overlay):
        if one["kind"] == "ScaledObject":
            jsonschema.validate(one, KEDA)
        else:
            kubernetes_validate.validate(one, "1.31", strict=True)


def test_the_schemas_refuse_a_planted_fault() -> None:
    broken = {**find("cpu", "Deployment", "api")}
    broken["spec"] = {**broken["spec"], "replicas": "two"}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.31", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_meets_the_restricted_standard(overlay: str) -> None:
    for name, pod in pods(overlay):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert "memory" in container["resources"]["limits"], name
        for container in pod["containers"]:
            assert container["startupProbe"] and container["livenessProbe"], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_longer_to_end_than_flashbulb_takes(overlay: str) -> None:
    config = next(one["data"] for one in build(overlay) if one["kind"] == "ConfigMap")
    needed = float(config["FLASHBULB_DRAIN_S"]) + float(config["FLASHBULB_DRAIN_NOTICE_S"])
    for name, pod in pods(overlay):
        if name != "valkey":
            assert pod["terminationGracePeriodSeconds"] > needed, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_load_balancers_hear_of_a_stop_before_connections_end(overlay: str) -> None:
    config = next(one["data"] for one in build(overlay) if one["kind"] == "ConfigMap")
    api = find(overlay, "Deployment", "api")["spec"]["template"]["spec"]["containers"][0]
    probe = api["readinessProbe"]
    assert float(config["FLASHBULB_DRAIN_NOTICE_S"]) > probe["periodSeconds"] * probe["failureThreshold"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_of_the_config_map_exist(overlay: str) -> None:
    from flashbulb_service.settings import check_names

    check_names(next(one["data"] for one in build(overlay) if one["kind"] == "ConfigMap"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_first_key_is_made_in_a_container_that_runs_without_one(overlay: str) -> None:
    """The documented `exec` went to APIs that ended with "no key" again and again."""
    pod = find(overlay, "Deployment", "api")["spec"]["template"]["spec"]
    (waiting,) = pod["initContainers"]
    for name in ("image", "envFrom"):
        assert waiting[name] == pod["containers"][0][name]
    assert all(mount in pod["containers"][0]["volumeMounts"] for mount in waiting["volumeMounts"])
    assert "/run/secrets/flashbulb" in {mount["mountPath"] for mount in waiting["volumeMounts"]}
    readme = (KUBERNETES.parent / "README.md").read_text(encoding="utf-8")
    assert f"exec deploy/api --container {waiting['name']} -- flashbulb keys create me" in readme


def test_pods_of_the_api_wait_for_the_first_key_and_no_longer(tmp_path: Path) -> None:
    (waiting,) = find("cpu", "Deployment", "api")["spec"]["template"]["spec"]["initContainers"]
    # While it would sleep, somebody makes a key: it says once that it waits.
    _program(tmp_path / "flashbulb", f'exec {sys.executable} -m flashbulb_service.cli "$@"')
    _program(tmp_path / "sleep", "echo waits; flashbulb keys create me >/dev/null 2>&1")
    with EmbeddedServer(tmp_path / "queue") as server:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "FLASHBULB_REDIS": server.url,
        }
        without_keys = environment | {"FLASHBULB_AUTH": "off"}
        told = [
            subprocess.run(
                waiting["command"], env=env, capture_output=True, text=True, check=True, timeout=50
            ).stdout
            for env in (without_keys, environment)
        ]
    assert told == ["", "waits\n"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prometheus_reads_every_pod_once_and_has_the_key_that_the_api_asks_for(overlay: str) -> None:
    """An annotation gives no key for the API; with one, each API told all the workers' counts again."""
    from flashbulb_service.tenants.access import scope_of

    config = yaml.safe_load((PROMETHEUS / "kubernetes.yml").read_text(encoding="utf-8"))
    readers: dict[str, list[dict[str, Any]]] = {}
    for name, pod in pods(overlay):
        template = find(overlay, "StatefulSet" if name == "valkey" else "Deployment", name)["spec"][
            "template"
        ]
        assert "annotations" not in template["metadata"], "whoever looks for annotations reads it again"
        label = template["metadata"]["labels"]["app.kubernetes.io/name"]
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        for job in config["scrape_configs"]:
            assert job["kubernetes_sd_configs"] == [{"role": "pod", "namespaces": {"names": ["flashbulb"]}}]
            (kept,) = job["relabel_configs"]
            if any(re.fullmatch(kept["regex"], f"{label};{port}") for port in ports):
                readers.setdefault(label, []).append(job)
    (api,) = readers.pop("api")
    assert scope_of("/metrics") == "admin" and api["authorization"]["type"] == "Bearer"
    readme = (KUBERNETES.parent / "README.md").read_text(encoding="utf-8")
    folder, _, key = api["authorization"]["credentials_file"].rpartition("/")
    assert f"keys create prometheus --scope admin > deploy/secrets/metrics_{key}" in readme
    assert f"secret generic {folder.rpartition('/')[2]} --from-file={key}=" in readme and folder in readme
    assert api["metric_relabel_configs"] == [{"source_labels": ["worker"], "regex": ".+", "action": "drop"}]
    assert set(readers) == {"worker"}
    assert len(readers["worker"]) == len([name for name, _ in pods(overlay) if name.startswith("worker")])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_can_read_what_prometheus_is_to_read(tmp_path: Path) -> None:
    config = yaml.safe_load((PROMETHEUS / "kubernetes.yml").read_text(encoding="utf-8"))
    for job in config["scrape_configs"]:
        del job["kubernetes_sd_configs"]  # Debian's promtool is built without
    (tmp_path / "kubernetes.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["promtool", "check", "config", "--syntax-only", tmp_path / "kubernetes.yml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_service_of_the_cluster_becomes_a_setting(overlay: str) -> None:
    """One named flashbulb put FLASHBULB_SERVICE_HOST into every pod, and pods ended with "unknown setting"."""
    assert {name: pod.get("enableServiceLinks") for name, pod in pods(overlay)} == {
        name: False for name, _ in pods(overlay)
    }


def test_one_node_takes_our_images_as_they_were_loaded_into_it() -> None:
    for name, pod in pods("dev"):
        if name != "valkey":
            for container in pod["containers"] + pod.get("initContainers", []):
                assert container["imagePullPolicy"] == "IfNotPresent", name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_name_that_a_policy_selects_is_a_pod(overlay: str) -> None:
    labels = {"valkey", "api", "worker"}
    for policy in (one for one in build(overlay) if one["kind"] == "NetworkPolicy"):
        selected = policy["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name")
        assert selected is None or selected in labels
    names = {one["metadata"]["name"] for one in build(overlay) if one["kind"] == "NetworkPolicy"}
    assert {"deny-all", *labels} <= names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("minReplicas", 0),  # the autoscaler's own name for it
        ("maxReplicaCount", "8"),
        ("pollingInterval", 0),
        ("scaleTargetRef", {"kind": "Deployment"}),
        ("triggers", []),
        ("triggers", [{"type": "prometheus", "metadata": {"query": "up", "threshold": "5"}}]),
        (
            "triggers",
            [
                {
                    "type": "prometheus",
                    "metadata": {"serverAddress": "http://p", "query": "up", "threshold": 5},
                }
            ],
        ),
    ],
    ids=["unknown", "text", "never", "no name", "no trigger", "no server", "a number as metadata"],
)
def test_kedas_schema_refuses_a_planted_fault(field: str, value: object) -> None:
    broken = copy.deepcopy(find("cpu", "ScaledObject", "worker"))
    broken["spec"][field] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, KEDA)


def scaled(overlay: str) -> list[dict[str, Any]]:
    """Return the ScaledObjects of an overlay."""
    return [one for one in build(overlay) if one["kind"] == "ScaledObject"]


@pytest.mark.parametrize("overlay", SCALED)
def test_workers_scale_with_the_work_that_waits_down_to_none(overlay: str) -> None:
    from flashbulb_service.observability import Metrics
    from flashbulb_service.queue import Limits

    config = next(one["data"] for one in build(overlay) if one["kind"] == "ConfigMap")
    found = [one["spec"] for one in scaled(overlay)]
    targets = [spec["scaleTargetRef"]["name"] for spec in found]
    assert targets == [name for name, _ in pods(overlay) if name.startswith("worker")] != []
    for spec in found:
        assert spec["minReplicaCount"] == 0
        (trigger,) = spec["triggers"]
        assert "flashbulb_queue_work_seconds" in trigger["metadata"]["query"]
        # What runs or waits for a retry is no waiting work: the last worker must outlast both.
        assert spec["cooldownPeriod"] > float(config["FLASHBULB_DRAIN_S"]) + Limits().max_backoff_s
    assert "flashbulb_queue_work_seconds" in Metrics().names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_an_autoscaler_counts_has_no_count_of_its_own(overlay: str) -> None:
    """The two would fight: each apply set the API back to two pods."""
    autoscalers = ("ScaledObject", "HorizontalPodAutoscaler")
    scalers = [one["spec"] for one in build(overlay) if one["kind"] in autoscalers]
    targets = {spec["scaleTargetRef"]["name"] for spec in scalers}
    assert ("api" in targets) == (overlay != "dev")
    for name in targets:
        assert "replicas" not in find(overlay, "Deployment", name)["spec"], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_apis_are_ready_without_workers_exactly_where_workers_scale_to_none(overlay: str) -> None:
    from flashbulb_service.settings import Settings

    config = next(one["data"] for one in build(overlay) if one["kind"] == "ConfigMap")
    settings = Settings(ready_without_workers=config.get("FLASHBULB_READY_WITHOUT_WORKERS", "false"))
    assert settings.ready_without_workers == bool(scaled(overlay))


@pytest.mark.parametrize("overlay", SCALED)
def test_models_come_from_the_bucket_with_room_and_time_to_fetch_them(overlay: str) -> None:
    from flashbulb_service.settings import Settings

    config = next(one["data"] for one in build(overlay) if one["kind"] == "ConfigMap")
    settings = Settings(models_url=config["FLASHBULB_MODELS_URL"], data="/data")
    workers = [pod for name, pod in pods(overlay) if name.startswith("worker")]
    assert len(workers) == len(scaled(overlay))
    for pod in workers:
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert str(settings.models).startswith("/data/")
        (room,) = (v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == mounts["/data"])
        assert int(room.removesuffix("Gi")) << 30 > settings.models_max_bytes
        probe = pod["containers"][0]["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 3600
    assert "FLASHBULB_MODELS_URL" not in next(o["data"] for o in build("dev") if o["kind"] == "ConfigMap")


def test_each_pool_takes_its_model_scales_by_its_work_and_selects_its_pods() -> None:
    from flashbulb_service.settings import Settings

    selectors = []
    for one in scaled("pools"):
        name = one["metadata"]["name"].removeprefix("worker-")
        deployment = find("pools", "Deployment", one["spec"]["scaleTargetRef"]["name"])["spec"]
        budget = find("pools", "PodDisruptionBudget", one["metadata"]["name"])["spec"]
        env = {v["name"]: v["value"] for v in deployment["template"]["spec"]["containers"][0]["env"]}
        wanted = Settings(models_wanted=json.loads(env["FLASHBULB_MODELS_WANTED"])).models_wanted
        assert wanted == {name} and (KUBERNETES.parents[1] / "models" / name).is_dir()
        matched = re.search(r'model=~"([^"]+)"', one["spec"]["triggers"][0]["metadata"]["query"])
        assert matched is not None  # Prometheus matches whole values
        known = [
            f"{folder.name}@1" for folder in (KUBERNETES.parents[1] / "models").iterdir() if folder.is_dir()
        ]
        assert [model for model in known if re.fullmatch(matched[1], model)] == [f"{name}@1"]
        labels = deployment["template"]["metadata"]["labels"]
        assert deployment["selector"] == budget["selector"]
        assert deployment["selector"]["matchLabels"].items() <= labels.items()
        selectors.append(deployment["selector"]["matchLabels"])
    assert len(selectors) == 2 and selectors[0] != selectors[1]
    assert not any(
        "FLASHBULB_MODELS_WANTED" in str(one) for one in build("pools") if one["kind"] == "ConfigMap"
    )


def test_a_gpu_worker_asks_for_one_gpu() -> None:
    container = find("gpu", "Deployment", "worker")["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"].startswith("flashbulb-worker-gpu:")


TRAINING = KUBERNETES.parent / "training"


def test_the_training_job_fits_its_schema_and_starts_what_there_is() -> None:
    from typer.testing import CliRunner

    from flashbulb_distill.cli import app

    service, job = yaml.safe_load_all((TRAINING / "kubernetes.yaml").read_text(encoding="utf-8"))
    for one in (service, job):
        kubernetes_validate.validate(one, "1.31", strict=True)
    pod = job["spec"]["template"]["spec"]
    arguments = pod["containers"][0]["args"]
    # Every pod finds the first one by the job's name, its index and the headless service.
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{service['metadata']['name']}:29400" in arguments
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--nnodes={job['spec']['parallelism']}" in arguments
    assert f"--nproc-per-node={pod['containers'][0]['resources']['limits']['nvidia.com/gpu']}" in arguments
    command = arguments[arguments.index("flashbulb") :]
    assert command[:3] == ["flashbulb", "distill", "run"]
    told = CliRunner().invoke(app, ["run", "--help"]).output
    assert all(option.split("=")[0] in told for option in command if option.startswith("--"))
    assert "--resume" in command
    # A pod starts in /data: what it reads is named from the root, and is in the ConfigMap that the pages say to make.
    read = set(re.findall(r"/recipe/([a-z.]+)", " ".join(command)))
    assert read == {"recipe.yaml", "prompts.txt"}
    for page in (TRAINING / "kubernetes.yaml", TRAINING.parent / "README.md"):
        (made,) = re.findall(r"create configmap recipe .*", page.read_text(encoding="utf-8"))
        assert set(re.findall(r"--from-file=([a-z.]+)", made)) == read
