"""What the workers of a Train job held when its driver died: the job's next attempt gives it back.

Ray Train leaves this to an actor that asks the dashboard whether the driver lives. A cluster without a dashboard never
answers, and the placement group would keep its CPUs and GPUs until the cluster ends. So the group is noted in the
cluster's own store, where whoever starts the job again finds it.
"""

from __future__ import annotations

from ray._raylet import PlacementGroupID
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
    remove_placement_group,
)

from .healing_job import HealingJob


def note_resources(job: HealingJob) -> None:
    """Called in a worker of the job: notes the placement group that it runs in."""
    group = get_current_placement_group()
    if group is not None:
        _internal_kv_put(_key(job), group.id.binary())


def free_resources(job: HealingJob) -> None:
    """Removes the placement group of an earlier attempt; there may be none.

    Nothing runs in it any more: workers end with the driver that started them.
    """
    noted = _internal_kv_get(_key(job))
    if noted is None:
        return
    group = PlacementGroup(PlacementGroupID(noted))
    if placement_group_table(group).get("state", "REMOVED") != "REMOVED":
        remove_placement_group(group)
    _internal_kv_del(_key(job))


def _key(job: HealingJob) -> bytes:
    return f"layerboost:placement_group:{job.storage_path}:{job.name}".encode()
