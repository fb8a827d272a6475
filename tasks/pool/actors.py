"""Describes what a pool asks of its workers, and starts them as Ray actors with their share of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from tasks.cluster.resources import WorkerResources
from tasks.pool.finished import WorkerInfo

if TYPE_CHECKING:
    from ray import ObjectRef

Arguments = ParamSpec("Arguments")
Unit = TypeVar("Unit")
Result = TypeVar("Result")
Unit_contra = TypeVar("Unit_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class UnitWorker(Protocol[Unit_contra, Result_co]):
    """Describes a plain class that works on units.

    It may also have a method `shrink()`, which halves what it holds at a time.
    """

    def info(self) -> WorkerInfo: ...

    def run(self, unit: Unit_contra, /) -> Result_co: ...


class RemoteMethod(Protocol[Arguments, Result]):
    """Describes a method of an actor."""

    def remote(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> ObjectRef[Result]: ...


class UnitActor(Protocol[Unit_contra, Result]):
    """Describes the handle of an actor that is a `UnitWorker`."""

    @property
    def info(self) -> RemoteMethod[[], WorkerInfo]: ...

    @property
    def run(self) -> RemoteMethod[[Unit_contra], Result]: ...


def end_actor(actor: UnitActor[Unit, Result]) -> None:
    """Ends an actor's process, in mid-unit if need be."""
    import ray

    ray.kill(cast(Any, actor))


def actor_maker(
    worker_class: Callable[Arguments, UnitWorker[Unit, Result]],
    resources: WorkerResources,
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Callable[[], UnitActor[Unit, Result]]:
    """Returns a function that starts one Ray actor of a plain worker class with its share of the cluster."""

    def make() -> UnitActor[Unit, Result]:
        import ray

        remote_class: Any = ray.remote(worker_class)  # Ray's types do not carry the arguments of a class
        handle = remote_class.options(**resources.actor_options()).remote(*args, **kwargs)
        return cast(UnitActor[Unit, Result], handle)

    return make
