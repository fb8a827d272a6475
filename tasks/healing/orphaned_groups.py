"""Frees the placement groups of Train controllers that died with their trials, while the other trials go on.

Ray removes a placement group when both the actor and the job that made it are gone. A killed Tune trial takes its Train
controller with it, but the job lives on. Ray Train leaves that case to an actor that asks the dashboard, so a cluster
without a dashboard would keep the group's CPUs and GPUs until the job ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.util.placement_group import PlacementGroup, remove_placement_group

logger = logging.getLogger(__name__)

_EVERY_S = 2.0
_END_WITHIN_S = 10.0


@contextmanager
def freeing_groups_of_the_dead() -> Iterator[None]:
    """Calls `free_groups_of_the_dead` every two seconds during the block, and at its end until no group is left.

    The cluster learns of a controller's death some time after its trial's. At the end of the block, when no trial is
    left, it therefore waits for the last groups, for at most ten seconds. After an error or Ctrl-C it does not wait.
    """
    ended = threading.Event()

    def sweep() -> None:
        while not ended.wait(_EVERY_S):
            _n_left()

    thread = threading.Thread(target=sweep, name="leftovers", daemon=True)
    thread.start()
    try:
        yield
        deadline = time.monotonic() + _END_WITHIN_S
        while _n_left() and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        ended.set()
        thread.join()


def _n_left() -> int:
    """Calls `free_groups_of_the_dead`; gives 0 if the cluster cannot be asked, which must not end a healing."""
    try:
        return free_groups_of_the_dead()
    except Exception:
        logger.warning("cannot ask which placement groups are left", exc_info=True)
        return 0


def free_groups_of_the_dead() -> int:
    """Removes the placement groups of this Ray job that a dead actor made.

    Returns:
        The number of groups that actors of this job, other than the caller, held before the removal; 0 without a
        cluster.
    """
    if not ray.is_initialized():
        return 0
    groups = _groups_of_other_actors()
    for group in groups:
        if group.creator_actor_dead:
            logger.info("freeing placement group %s, whose actor is dead", group.placement_group_id.hex())
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
    return len(groups)


def _groups_of_other_actors() -> list[Any]:
    """Reads the groups from Ray's internal records, because its public table does not name the maker of a group."""
    context = ray.get_runtime_context()
    actor_id = context.get_actor_id()
    no_maker_or_caller = {ActorID.nil().binary(), b"" if actor_id is None else bytes.fromhex(actor_id)}
    records = cluster_state._connect_and_get_accessor().get_placement_group_table()
    return [
        group
        for group in map(PlacementGroupTableData.FromString, records)
        if group.creator_job_id.hex() == context.get_job_id()
        and group.creator_actor_id not in no_maker_or_caller
        and group.state != PlacementGroupTableData.REMOVED
    ]
