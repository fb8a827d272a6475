"""Listens for the notice that a process or its machine will be ended: SIGTERM, or a cloud's notice for a spot machine.

When a worker of a Train job gets one, all workers write a checkpoint after the current step. The machine is drained, so
that Ray places nothing on it any more, and Ray Train does not count its end as a failure of the job.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

logger = logging.getLogger(__name__)

POLL_S = 5.0
_TIMEOUT_S = 2.0
_GRACE_S = {"aws": 120, "gcp": 30}
"""Seconds between a cloud's notice and the end of the machine."""

_given = threading.Event()


class TerminationNoticeError(RuntimeError):
    """The work stops after a checkpoint, because a worker or its machine will be ended."""


@dataclass(frozen=True)
class MetadataServers:
    """Holds the addresses of the clouds' metadata servers; an empty one is not asked."""

    aws: str = "http://169.254.169.254"
    gcp: str = "http://metadata.google.internal"


CLOUDS = MetadataServers()


def notice_given() -> bool:
    """Says whether this process or its machine will be ended."""
    return _given.is_set()


def listen_for_notices(servers: MetadataServers) -> None:
    """Takes a first SIGTERM as a notice and asks the clouds; a second SIGTERM has its usual effect.

    It must be called on the main thread, because signal handlers can only be set there.
    """
    usual = signal.getsignal(signal.SIGTERM)

    def take(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, usual)
        _given.set()

    signal.signal(signal.SIGTERM, take)
    threading.Thread(target=_poll, args=(servers,), name="termination-notices", daemon=True).start()


def _poll(servers: MetadataServers) -> None:
    """Finds the metadata server that answers, if any, and asks it until it gives notice."""
    asked: dict[str, Callable[[], bool]] = {
        "aws": lambda: _aws_notice(servers.aws),
        "gcp": lambda: _gcp_notice(servers.gcp),
    }
    for cloud, is_given in asked.items():
        if not getattr(servers, cloud):
            continue
        try:
            is_given()
        except (OSError, ValueError):
            continue  # this machine is not in that cloud
        while not _given.is_set():
            try:
                if is_given():
                    _given.set()
                    _drain_this_node(cloud)
                    return
            except (OSError, ValueError) as error:
                logger.warning("the %s metadata server does not answer (%s); trying again", cloud, error)
            time.sleep(POLL_S)
        return


def _aws_notice(server: str) -> bool:
    """Asks IMDSv2 whether EC2 will stop, terminate or hibernate this spot instance.

    Raises:
        OSError, ValueError: nothing answers, or another kind of server does.
    """
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "300"}
    token = _ask(f"{server}/latest/api/token", ttl, method="PUT")
    try:
        action = _ask(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise
    return bool(json.loads(action)["action"])


def _gcp_notice(server: str) -> bool:
    """Asks whether Compute Engine is preempting this instance; raises the errors of `_aws_notice`."""
    said = _ask(f"{server}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    if said not in ("TRUE", "FALSE"):
        raise ValueError(f"preempted: {said!r} is neither TRUE nor FALSE")
    return said == "TRUE"


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=headers, method=method)
    with direct.open(request, timeout=_TIMEOUT_S) as answer:
        return answer.read().decode().strip()


def _drain_this_node(cloud: str) -> None:
    """Makes Ray place nothing more on this machine; running work goes on until it ends."""
    import ray
    from ray.core.generated import autoscaler_pb2

    context = ray.get_runtime_context()
    client = ray._raylet.GcsClient(address=context.gcs_address)  # type: ignore[attr-defined]
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
    deadline_ms = int((time.time() + _GRACE_S[cloud]) * 1000)
    is_accepted, why_not = client.drain_node(context.get_node_id(), reason, f"notice of {cloud}", deadline_ms)
    if not is_accepted:
        logger.warning("this node is not drained: %s", why_not)
