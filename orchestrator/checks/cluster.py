"""Finds what the nodes of a cluster lack for a run, before anything starts; each row of its table has a remedy."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerboost.gguf import is_gguf
from orchestrator.checks.findings import MISSING, WARN, Finding
from orchestrator.recipe.recipe import Recipe
from orchestrator.run.lock import STALE_AFTER_S
from tasks.cluster import node_probe
from tasks.cluster.node_probe import Answer, NodeReport, ProbeRequest
from tasks.cluster.resources import NodeResources

PACKAGES = ("ray", "torch", "transformers", "deepspeed", "lm-eval")
SKEW_WARNING_S, SKEW_LIMIT_S = 2.0, STALE_AFTER_S / 2
_SAME_EVERYWHERE = ("python", "ray", "layerboost")
"""These must have the same version on every node.

Ray refuses to mix versions of Python or of itself, and records name a single version of layerboost.
"""

_GIB = 1024**3


@dataclass(frozen=True)
class Needs:
    """Describes what a run needs of every node; without a recipe, what every run needs.

    Attributes:
        request: the questions that each node answers.
        packages: the distributions without which nothing works.
    """

    request: ProbeRequest
    packages: tuple[str, ...] = ("torch", "transformers")

    @classmethod
    def of_run(cls, recipe: Recipe, folder: str) -> Needs:
        """Returns what the run of a recipe needs; `folder` is the path or fsspec URL of its run folder."""
        paths: dict[str, str] = {}
        models: dict[str, tuple[str, str | None]] = {}
        datasets: dict[str, str] = {}
        quality, healing = recipe.quality, recipe.healing
        named_models = {"model.path": (recipe.model.path, recipe.model.revision)}
        if healing.tokens and healing.teacher is not None:
            named_models["healing.teacher"] = (healing.teacher, healing.teacher_revision)
        for name, (model, revision) in named_models.items():
            if is_gguf(model):
                continue  # it is unpacked into the run folder, where workers read it
            if Path(model).exists():
                paths[name] = model
            elif "://" not in model:
                models[name] = (model, revision)
        texts = {"quality.text": quality.text}
        texts |= {f"sensitivity.texts[{index}]": text for index, text in enumerate(recipe.sensitivity.texts)}
        texts |= {name: text.path for name, text in healing.named_sources()} if healing.tokens else {}
        for name, text in texts.items():
            if text is not None and Path(text).exists():
                paths[name] = text
            elif text is not None and "://" not in text:
                datasets[name] = text
        for name in ("tasks", "final_tasks"):
            for index, task in enumerate(getattr(quality, name)):
                if Path(task).is_absolute():
                    paths[f"quality.{name}[{index}]"] = task
        packages = ["torch", "transformers"]
        packages += ["deepspeed"] if healing.tokens else []
        packages += ["lm-eval"] if quality.tasks or quality.final_tasks else []
        request = ProbeRequest(
            folder=node_probe.existing_ancestor(folder), token=uuid.uuid4().hex[:12],
            paths=paths, models=models, datasets=datasets, packages=PACKAGES,
        )  # fmt: skip
        return cls(request, tuple(packages))


def check_nodes(
    needs: Needs, nodes: Sequence[NodeResources], timeout_s: float = node_probe.ANSWER_TIMEOUT_S
) -> list[Finding]:
    """Asks every node of the connected cluster and turns the answers into rows; leaves no file behind.

    Args:
        needs: what the run needs.
        nodes: the nodes to ask.
        timeout_s: the time after which a node counts as silent.
    """
    request = needs.request
    folder = request.folder
    written = None if folder is None else node_probe.put_probe_file(folder, request.token, "driver")
    if written is not None:
        return [Finding("run folder", str(folder), MISSING, f"{written} here; give a folder that can be written")]
    unread: dict[str, str] = {}
    try:
        answers = node_probe.probe_nodes(request, nodes, timeout_s)
    finally:
        if folder is not None:
            node_probe.take_probe_file(folder, request.token, "driver")
    for node_id, answer in answers.items():
        if folder is not None and answer.report is not None and answer.report.storage is None:
            reason = node_probe.take_probe_file(folder, request.token, node_id)
            unread |= {node_id: reason} if reason else {}
    here = node_probe.versions(PACKAGES)
    findings: list[Finding] = []
    for node in nodes:
        findings += node_findings(node, answers[node.node_id], needs, here, unread.get(node.node_id))
    return findings


def node_findings(
    node: NodeResources,
    answer: Answer,
    needs: Needs,
    here: Mapping[str, str | None],
    unread: str | None = None,
) -> Iterator[Finding]:
    """Yields the rows of one node; a node without faults has a single row.

    Args:
        node: the node.
        answer: its answer.
        needs: what the run needs.
        here: the driver's versions.
        unread: why the driver cannot read what the node wrote; None if it can.
    """
    at, report = node.address, answer.report
    if report is None:
        yield Finding(
            at, answer.failure, MISSING, "look at ray status and the node's logs; restart its ray or take it out"
        )
        return
    faults = [
        *_storage_findings(at, report, needs, unread),
        *(
            Finding(f"{at} {name}", f"{_value(needs, name)} {reason}", MISSING, _reach(needs, name))
            for name, reason in report.missing.items()
        ),
        *_version_findings(at, report, needs, here),
        *_shm_findings(at, report, node.object_store_bytes),
        *_clock_findings(at, answer.ahead_s),
    ]
    yield from faults or [Finding(at, f"{node.cpus:g} CPUs, {node.gpus:g} GPUs")]


def _storage_findings(at: str, report: NodeReport, needs: Needs, unread: str | None) -> Iterator[Finding]:
    remedy = "give an --out that all nodes share: a shared file system mounted there, or a URL such as s3://bucket/run"
    if report.storage is not None:
        yield Finding(f"{at} run folder", f"{needs.request.folder} {report.storage}", MISSING, remedy)
    elif unread is not None:
        yield Finding(f"{at} run folder", f"its file in {needs.request.folder} is not here ({unread})", MISSING, remedy)


def _version_findings(at: str, report: NodeReport, needs: Needs, here: Mapping[str, str | None]) -> Iterator[Finding]:
    for package, ours in here.items():
        theirs = report.versions.get(package)
        if theirs == ours or (theirs is None and package not in (*_SAME_EVERYWHERE, *needs.packages)):
            continue
        if theirs is None:
            yield Finding(f"{at} {package}", "not installed", MISSING, f"pip install '{package}=={ours}' there")
            continue
        is_same = package not in _SAME_EVERYWHERE or (package == "python" and _minor(theirs) == _minor(ours))
        yield Finding(
            f"{at} {package}", f"{theirs}, here {ours}", WARN if is_same else MISSING,
            f"install {package} {ours} there, or {theirs} here",
        )  # fmt: skip


def _shm_findings(at: str, report: NodeReport, object_store_bytes: float) -> Iterator[Finding]:
    if report.shm_bytes is not None and report.shm_bytes < object_store_bytes:
        yield Finding(
            f"{at} /dev/shm",
            f"{report.shm_bytes / _GIB:.2f} GiB, Ray's object store has {object_store_bytes / _GIB:.2f} GiB",
            WARN,
            "give it more (docker run --shm-size) or ray start less --object-store-memory; now Ray uses slower files",
        )


def _clock_findings(at: str, ahead_s: float) -> Iterator[Finding]:
    if abs(ahead_s) < SKEW_WARNING_S:
        return
    found = f"at least {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine"
    state = MISSING if abs(ahead_s) > SKEW_LIMIT_S else WARN
    remedy = "set its clock (chrony or ntpd): the clock decides whether the lock of a run folder is abandoned"
    yield Finding(f"{at} clock", found, state, remedy)


def _value(needs: Needs, name: str) -> str:
    request = needs.request
    if name in request.models:
        return request.models[name][0]
    return request.paths.get(name) or request.datasets[name]


def _reach(needs: Needs, name: str) -> str:
    if name in needs.request.paths:
        return "copy it there under the same path, or name one that all nodes share"
    return "let the node reach the hub, or fill its cache (hf download)"


def _minor(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]
