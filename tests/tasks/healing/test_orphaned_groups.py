"""Tests that placement groups of dead makers are removed and those of living makers stay."""

from __future__ import annotations

import sys

import pytest
import ray
from ray import cloudpickle
from ray.util.placement_group import placement_group, remove_placement_group

from tasks.healing.orphaned_groups import free_groups_of_the_dead, freeing_groups_of_the_dead
from tests.conftest import wait_for_cpus

pytestmark = pytest.mark.cluster
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Maker:
    """Makes a placement group and holds it, as Train's controller does."""

    def hold(self) -> None:
        self.group = placement_group([{"CPU": 0.5}])
        ray.get(self.group.ready())

    def let_go(self) -> None:
        remove_placement_group(self.group)


class Trial:
    """Owns the maker, as a trial does: its death ends the maker."""

    def start(self) -> None:
        self.maker = ray.remote(num_cpus=0)(Maker).remote()
        ray.get(self.maker.hold.remote())

    def stop(self) -> None:
        ray.get(self.maker.let_go.remote())


def started():
    trial = ray.remote(num_cpus=0)(Trial).remote()
    ray.get(trial.start.remote())
    return trial


def test_without_a_cluster_there_is_nothing_to_free(caplog):
    assert not ray.is_initialized()
    with freeing_groups_of_the_dead():
        pass
    assert not caplog.records and not ray.is_initialized()


def test_the_group_of_a_dead_maker_is_given_back_and_others_are_kept(ray_local):
    own = placement_group([{"CPU": 0.5}])
    ray.get(own.ready())
    living, killed = started(), started()
    wait_for_cpus(0.5)
    with freeing_groups_of_the_dead():
        ray.kill(killed)
        wait_for_cpus(1)
        ray.get(living.stop.remote())
    assert free_groups_of_the_dead() == 0
    wait_for_cpus(1.5)
    remove_placement_group(own)
    wait_for_cpus(2)


def test_what_died_last_is_waited_for(ray_local):
    killed = started()
    with freeing_groups_of_the_dead():
        ray.kill(killed)
    wait_for_cpus(2)
