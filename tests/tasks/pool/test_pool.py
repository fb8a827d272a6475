"""Tests units on actors that die, raise, do not start or are interrupted: no finished result is lost."""

import os
import random
import signal
import sys
import threading
import time

import pytest
from ray import cloudpickle

from tasks.pool.finished import worker_info
from tasks.pool.pool import run_units
from tasks.pool.watch import Watch

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.cluster


class Squares:
    """Squares numbers; a unit is (number, fault). Files in `folder` mark the faults that have happened already."""

    def __init__(self, folder, starts_only_with=None):
        self.folder, self.n_runs = folder, 0
        if starts_only_with is not None and not starts_only_with.exists():
            raise RuntimeError("no model there")

    def info(self):
        return worker_info()

    def run(self, unit):
        number, trouble = unit
        self.n_runs += 1
        mark = self.folder / f"{number}-{trouble}"
        if trouble == "raises":
            raise ValueError(f"cannot square {number}")
        if trouble in ("dies once", "raises once") and not mark.exists():
            mark.touch()
            if trouble == "raises once":
                raise OSError("a hiccup")
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "slow":
            mark.touch()
            time.sleep(1.0)
        if trouble == "hangs" or (trouble == "hangs once" and not mark.exists()):
            mark.touch()
            time.sleep(600)
        if trouble == "out of memory once" and not mark.exists():
            mark.touch()
            raise MemoryError
        return number**2, self.n_runs


def _run(ray, folder, units, needs=None, **settings):
    results, failures = {}, []

    def take(done):
        assert done.unit[0] not in results, "a result came twice"
        results[done.unit[0]] = (done.result[0], done.seconds, done.worker.to_dict())

    actor = ray.remote(Squares).options(num_cpus=1)
    settings = {"n_workers": 2, "on_result": take, "on_failure": failures.append} | settings
    try:
        returned = run_units(units, lambda: actor.remote(folder, needs), **settings)
    except BaseException as error:
        return results, failures, error
    assert returned == failures
    return results, failures, None


def test_all_units_finish_on_few_actors(ray_local, tmp_path):
    units = [(n, "slow" if n < 2 else None) for n in range(random.randint(8, 12))]
    results, failures, error = _run(ray_local, tmp_path, units)
    assert error is None and not failures
    assert {n: result[0] for n, result in results.items()} == {n: n**2 for n, _ in units}
    infos = [info for _, _, info in results.values()]
    assert 1 <= len({info["pid"] for info in infos}) <= 2
    assert {info["node_id"] for info in infos} == {ray_local.get_runtime_context().get_node_id()}
    assert results[0][1] >= 1.0 > min(duration_s for _, duration_s, _ in results.values()) > 0


def test_an_actor_killed_in_mid_unit_is_replaced_and_its_unit_done_again(ray_local, tmp_path):
    units = [(0, None), (1, "dies once"), (2, "raises once"), (3, None), (4, "dies once"), (5, None)]
    results, failures, error = _run(ray_local, tmp_path, units)
    assert error is None and not failures
    assert {n: result[0] for n, result in results.items()} == {n: n**2 for n in range(6)}
    assert (tmp_path / "1-dies once").exists() and (tmp_path / "4-dies once").exists()


def test_a_unit_that_always_fails_is_reported_with_its_error_and_the_rest_is_done(ray_local, tmp_path):
    units = [(0, "raises"), (1, None), (2, "dies"), (3, None), (4, None)]
    results, failures, error = _run(ray_local, tmp_path, units, max_attempts=2)
    assert error is None and sorted(results) == [1, 3, 4]
    by_unit = {failure.unit[0]: failure for failure in failures}
    assert sorted(by_unit) == [0, 2] and all(failure.n_attempts == 2 for failure in failures)
    assert by_unit[0].error.splitlines()[0] == "ValueError: cannot square 0"
    assert "actor" in by_unit[2].error.lower()


def test_a_hung_unit_is_ended_and_tried_again_and_fails_after_three_times(ray_local, tmp_path):
    events = []
    units = [(0, "hangs once"), (1, None), (2, "hangs"), (3, "slow")]
    start = time.monotonic()
    results, failures, error = _run(ray_local, tmp_path, units, watch=Watch(2.0, events.append))
    assert error is None and sorted(results) == [0, 1, 3]
    assert time.monotonic() - start < 60
    (failure,) = failures
    assert failure.unit[0] == 2 and failure.n_attempts == 3
    assert failure.error == "TimeoutError: no result within 2 s; its worker was ended"
    told = {number: [(event.what, event.attempt) for event in events if event.unit[0] == number] for number in range(4)}
    assert told[0] == [("started", 1), ("retried", 1), ("started", 2), ("done", 2)]
    assert told[1] == told[3] == [("started", 1), ("done", 1)]
    assert told[2] == [(what, n) for n in (1, 2) for what in ("started", "retried")] + [("started", 3), ("failed", 3)]
    assert results[0][2]["attempt"] == 2 and "attempt" not in results[1][2]
    retried = next(event for event in events if event.what == "retried")
    assert retried.error.startswith("TimeoutError") and retried.worker.node and 2.0 <= retried.seconds < 5


def test_a_slow_hand_over_makes_no_unit_hung(ray_local, tmp_path):
    def take(done):
        time.sleep(2.5 if done.unit[0] == 0 else 0)

    events = []
    settings = {"on_result": take, "watch": Watch(1.5, events.append)}
    _, failures, error = _run(ray_local, tmp_path, [(n, None) for n in range(4)], **settings)
    assert error is None and not failures
    assert {event.what for event in events} == {"started", "done"}


def test_actors_that_cannot_start_fail_the_units_instead_of_waiting(ray_local, tmp_path):
    results, failures, error = _run(
        ray_local, tmp_path, [(0, None), (1, None)], needs=tmp_path / "missing", n_workers=1, max_attempts=2
    )
    assert error is None and not results
    assert [failure.n_attempts for failure in failures] == [0, 0]
    assert all("no model there" in failure.error for failure in failures)


def test_the_first_interrupt_finishes_what_is_in_flight_and_starts_no_more(ray_local, tmp_path):
    handler = signal.getsignal(signal.SIGINT)

    def interrupt_when_one_is_in_flight():
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_one_is_in_flight, daemon=True).start()
    units = [(n, "slow") for n in range(12)]
    results, failures, error = _run(ray_local, tmp_path, units)
    assert isinstance(error, KeyboardInterrupt) and not failures
    started = {int(mark.name.split("-")[0]) for mark in tmp_path.iterdir()}
    assert set(results) == started and 1 <= len(results) <= 4
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_error_of_the_callback_ends_the_run(ray_local, tmp_path):
    def take(*_):
        raise OSError("disk full")

    _, _, error = _run(ray_local, tmp_path, [(n, None) for n in range(4)], on_result=take)
    assert isinstance(error, OSError) and str(error) == "disk full"


def test_an_actor_works_on_while_its_result_is_taken(ray_local, tmp_path):
    def take(done):
        deadline = time.monotonic() + 20
        while done.unit[0] == 0 and not (tmp_path / "1-slow").exists():
            assert time.monotonic() < deadline, "the only actor waits for its result to be taken"
            time.sleep(0.01)

    _, failures, error = _run(ray_local, tmp_path, [(0, None), (1, "slow")], n_workers=1, on_result=take)
    assert error is None and not failures


def test_results_that_are_there_end_together(ray_local, tmp_path):
    taken, ends = [], []

    def take(done):
        taken.append(done.unit[0])
        time.sleep(0.3)

    settings = {"on_result": take, "on_results_end": lambda: ends.append(len(taken))}
    _, failures, error = _run(ray_local, tmp_path, [(n, None) for n in range(12)], **settings)
    assert error is None and not failures
    assert sorted(taken) == list(range(12))
    assert ends == sorted(set(ends)) and ends[-1] == 12, "each result is followed by an end"
    assert len(ends) < 12, "two actors were done while a result was taken"


def test_no_units_need_no_actor():
    assert run_units([], lambda: pytest.fail("made an actor"), n_workers=2, on_result=pytest.fail) == []
