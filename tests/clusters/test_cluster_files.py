"""The files of clusters/ against the schemas and linters of those who read them."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
CLUSTERS = PROJECT / "clusters"
LAUNCHER_FILES = ["local.yaml", "aws.yaml", "gcp.yaml"]
# A user fills these in, as clusters/README.md explains.
VALUES = {
    "REGISTRY": "registry.example.com/me",
    "AMI_ID": "ami-0123456789abcdef0",
    "PROJECT_ID": "my-project",
    "IMAGE_FAMILY": "common-gpu",
    "HEAD_ADDRESS": "192.0.2.10",
    "WORKER_1_ADDRESS": "192.0.2.11",
    "WORKER_2_ADDRESS": "192.0.2.12",
    "SSH_USER": "me",
    "BUCKET": "bucket",
}


def filled_in(name: str) -> str:
    text = (CLUSTERS / name).read_text()
    for placeholder, value in VALUES.items():
        text = re.sub(rf"\b{placeholder}\b", value, text)
    return text


def ray_version() -> str:
    import ray

    return ray.__version__


def tool(name: str) -> str:
    """A linter beside this environment's Python."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"needs {name}: pip install -e '.[dev]'")
    return path


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_accepts_the_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(filled_in(name)))
    validate_config(config)
    broken = copy.deepcopy(config)
    broken["idle_timeout_minuts"] = 1
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(broken)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_start_is_authenticated_and_says_when_a_node_counts_as_silent(name):
    config = yaml.safe_load(filled_in(name))
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for side in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in config[side] if "ray start" in command]
        settings = dict(word.split("=", 1) for word in start.split("ray start")[0].split())
        assert settings["RAY_AUTH_MODE"] == "token"
        silent_ms = int(settings["RAY_health_check_failure_threshold"]) * (
            int(settings["RAY_health_check_period_ms"]) + int(settings["RAY_health_check_timeout_ms"])
        )
        assert silent_ms <= 40_000
        if side.startswith("head"):
            assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_start_takes_the_options_and_the_labels(name):
    """The shell splits each command as on a node, and Ray's own parser reads what is left."""
    from ray._private.label_utils import parse_node_labels_string, validate_node_label_syntax, validate_node_labels
    from ray.scripts.scripts import start as ray_start

    config = yaml.safe_load(filled_in(name))
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        if "ray start" not in command:
            assert command == "ray stop"
            continue
        show = command.replace("ray start", "printf '%s\\n'")
        words = subprocess.run(
            ["bash", "-c", show], env={"RAY_HEAD_IP": "192.0.2.10", "PATH": os.environ["PATH"]},
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        labels = ray_start.make_context("start", words).params["labels"]
        if name == "local.yaml":
            assert parse_node_labels_string(labels) == {"layerboost/hardware": "small"}
    for kind in config.get("available_node_types", {}).values():
        validate_node_labels(kind.get("labels", {}))
        validate_node_label_syntax(kind.get("labels", {}))


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_a_cloud_s_head_does_no_work_and_its_workers_are_spot_and_come_from_nothing(name):
    config = yaml.safe_load(filled_in(name))
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {key: value for key, value in types.items() if key != config["head_node_type"]}
    assert [worker["labels"]["layerboost/hardware"] for worker in workers.values()] == ["small", "large"]
    for worker in workers.values():
        assert worker["min_workers"] == 0 < worker["max_workers"]
        assert worker["resources"]["GPU"] > 0
        assert any("nvidia-smi" in command for command in worker["initialization_commands"])
        node = worker["node_config"]
        if name == "aws.yaml":
            assert node["InstanceMarketOptions"] == {"MarketType": "spot"}
        else:
            assert node["scheduling"]["provisioningModel"] == "SPOT"


def test_ec2_knows_the_fields_of_its_nodes():
    """Against the service's own description, which rejects a misspelt field or a wrong type."""
    loaders = pytest.importorskip("botocore.loaders", reason="needs botocore: pip install -e '.[dev]'")
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    ec2 = ServiceModel(loaders.Loader().load_service_model("ec2", "service-2"))
    shape = ec2.operation_model("RunInstances").input_shape
    for kind in yaml.safe_load(filled_in("aws.yaml"))["available_node_types"].values():
        report = ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), report.generate_report()
        unknown = set(kind["node_config"]) - set(shape.members)
        assert not unknown


def closed(schema: object) -> object:
    """A schema that also rejects fields it does not know, as `kubectl apply` with strict validation does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    return schema


@pytest.fixture
def rayjob() -> dict:
    return yaml.safe_load(filled_in("kuberay-rayjob.yaml"))


def test_the_rayjob_passes_the_schema_of_kuberay(rayjob, shared_dir):
    import jsonschema

    crd = yaml.load((shared_dir / "data/kuberay/ray.io_rayjobs.yaml").read_text(), yaml.CSafeLoader)
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    jsonschema.validate(rayjob["spec"], schema)
    rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(rayjob["spec"], schema)


def test_the_rayjob_is_what_kuberay_needs(rayjob):
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray_version()
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["labels"]["layerboost/hardware"] for group in cluster["workerGroupSpecs"]] == ["small", "large"]
    assert len({group["groupName"] for group in cluster["workerGroupSpecs"]}) == 2
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": "shm", "mountPath": "/dev/shm"}]
        assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"]["runAsNonRoot"] is True


def images() -> dict[str, str]:
    rayjob = yaml.safe_load((CLUSTERS / "kuberay-rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    found = {name: yaml.safe_load((CLUSTERS / name).read_text())["docker"]["image"] for name in LAUNCHER_FILES}
    for i, group in enumerate((rayjob["headGroupSpec"], *rayjob["workerGroupSpecs"])):
        found[f"kuberay-rayjob.yaml {i}"] = group["template"]["spec"]["containers"][0]["image"]
    return found


def test_images_are_of_the_ray_that_the_project_pins():
    pinned = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = [dependency for dependency in pinned if dependency.startswith("ray[")]
    series = pin.partition("==")[2].removesuffix("*")
    assert ray_version().startswith(series)
    assert set(images().values()) == {f"REGISTRY/layerboost:{ray_version()}"}
    base = re.search(r"^FROM rayproject/ray:(\S+?)-py(\d+)-gpu$", (CLUSTERS / "Dockerfile").read_text(), re.MULTILINE)
    assert base is not None and base[1] == ray_version()
    python = (int(base[2][0]), int(base[2][1:]))
    assert (3, 11) <= python < (3, 14)


def test_the_dockerfile_is_clean_and_copies_what_is_there():
    subprocess.run([tool("hadolint"), str(CLUSTERS / "Dockerfile")], check=True)
    lines = (CLUSTERS / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert copied and all((PROJECT / name).exists() for name in copied)
    allowed = (CLUSTERS / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in allowed if line.startswith("!")}
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 1000"


@pytest.mark.parametrize("path", ["clusters/slurm.sh", "tests/cluster/hosts.sh"])
def test_scripts_are_clean(path):
    subprocess.run(["bash", "-n", str(PROJECT / path)], check=True)
    subprocess.run([tool("shellcheck"), str(PROJECT / path)], check=True)


def test_no_file_holds_a_secret():
    for path in filter(Path.is_file, CLUSTERS.iterdir()):
        text = path.read_text()
        assert not re.search(r"hf_[A-Za-z0-9]{20}|AKIA[A-Z0-9]{16}|-----BEGIN|[0-9a-f]{64}", text), path
