"""Starts actors of a class with given resources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.cluster.resources import WorkerResources


def actor_maker(worker_class: type, resources: WorkerResources, *args) -> Callable[[], Any]:
    """Returns a function that starts one Ray actor of a plain worker class with its share of the cluster."""

    def make():
        import ray

        return ray.remote(worker_class).options(**resources.actor_options()).remote(*args)

    return make
