"""Tests work that really runs out of memory: it goes on with less at a time and gives the same result."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ray import cloudpickle

from tasks.healing.job import StepEvent
from tasks.healing.run import heal
from tasks.pool.finished import worker_info
from tasks.pool.out_of_memory import in_memory, is_out_of_memory
from tasks.pool.pool import run_units
from tasks.pool.watch import Watch
from tests.tasks.healing.test_healing import check_result, folder, job_of, local, record_steps, steps_in

__all__ = ["folder", "local"]

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def allocate_too_much() -> None:
    torch.empty(2**50)


def test_the_errors_of_allocators_are_known():
    with pytest.raises(RuntimeError) as caught:
        allocate_too_much()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(OSError("DefaultCPUAllocator"))


def test_less_is_tried_until_it_fits_or_is_the_least():
    batch, tried = 8, []

    def call() -> int:
        tried.append(batch)
        if batch > most:
            allocate_too_much()
        return batch

    def shrink() -> bool:
        nonlocal batch
        batch //= 2
        return batch >= 1

    most = 2
    assert in_memory(call, shrink) == 2 and tried == [8, 4, 2]
    most = 0
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        in_memory(call, shrink)
    assert tried == [8, 4, 2, 2, 1]


_JUDGE = """
import json, resource, sys
from pathlib import Path
import torch
from layerboost.evaluation.scores import QualitySpec
from layerboost.plan import Plan
from tasks.evaluation import EvaluationUnit, EvaluationWorker; from layerboost.checkpoint import ModelSource

folder, limit_mib = Path(sys.argv[1]), int(sys.argv[2])
spec = QualitySpec(text=str(folder / "text.txt"), n_sequences=256, sequence_tokens=64, batch_size=256)
worker = EvaluationWorker(ModelSource(str(folder)), spec, threads=1, activations_gib=32.0)
few = QualitySpec(text=spec.text, n_sequences=2, sequence_tokens=64, batch_size=2)
worker.evaluation(few).run([worker.untouched])  # what is loaded and allocated in any case
if limit_mib:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (limit_mib << 20),) * 2)
print(json.dumps(worker.run(EvaluationUnit(plan=Plan.parse("NS")))))
"""


def test_judging_with_too_little_memory_gives_the_same_scores(tmp_path, tiny_checkpoint):
    import json

    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = [f"w{n % 94}" for n in range(5, 5 + 257 * 64)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    AutoTokenizer.from_pretrained(tiny_checkpoint / "model").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)

    def judge(limit_mib: int) -> dict:
        root = Path(__file__).parents[3]
        done = subprocess.run(
            [sys.executable, "-c", _JUDGE, str(tmp_path), str(limit_mib)],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    free, tight = judge(0), judge(250)
    assert "shrunk" not in free
    assert tight["shrunk"]["batch_size"] < 256 and tight["shrunk"]["activations_gib"] < 32
    for ours, expected in zip(tight["scores"]["metrics"], free["scores"]["metrics"], strict=True):
        assert ours["value"] == pytest.approx(expected["value"], abs=1e-5)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_healing_that_runs_out_of_memory_goes_on_with_a_smaller_micro_batch(folder, local, tmp_path):
    import ray

    steps = tmp_path / "steps"
    record = record_steps(steps)

    def run_out_twice(event: StepEvent) -> None:
        record(event)
        for step in (3, 7):
            mark = tmp_path / f"out-{step}"
            if event.step == step and not mark.exists():
                mark.touch()
                allocate_too_much()

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        # Ray Train goes on after the first failure and gives up after the second; `heal` then starts it again.
        job = job_of(folder, "memory", max_failures=1, on_step=run_out_twice)
        result = heal(job)
        check_result(result, job, local)
        assert result.micro_batch_sequences == 1  # halved twice from four
        assert heal(job).micro_batch_sequences is None, "a job that is done is forgotten"
    finally:
        ray.shutdown()
    assert len(steps_in(steps)) < 8 + 4, "started over"


@pytest.mark.cluster
@pytest.mark.slow
def test_a_hung_step_ends_its_process_and_is_done_again(folder, local, tmp_path):
    import ray

    mark = tmp_path / "hung"

    def hang_once(event: StepEvent) -> None:
        if event.rank == 1 and event.step == 5 and not mark.exists():
            mark.touch()
            time.sleep(600)

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        job = job_of(folder, "hung", n_workers=2, max_failures=1, on_step=hang_once, step_timeout_s=30.0)
        start = time.monotonic()
        check_result(heal(job), job, local)
    finally:
        ray.shutdown()
    assert mark.exists() and time.monotonic() - start < 300


class Eater:
    """Allocates memory until Ray ends it; `shrink` quarters the amount."""

    def __init__(self, n_bytes):
        self.n_bytes, self.n_shrinks = n_bytes, 0

    def info(self):
        return worker_info()

    def shrink(self):
        self.n_bytes //= 4
        self.n_shrinks += 1

    def run(self, unit):
        eaten = []
        for _ in range(self.n_bytes >> 24):
            eaten.append(bytearray(os.urandom(1 << 12) * (1 << 12)))
            time.sleep(0.005)
        time.sleep(2)  # so that Ray's memory monitor notices
        return self.n_shrinks


@pytest.mark.cluster
@pytest.mark.slow
def test_a_worker_that_ray_ends_for_its_memory_is_replaced_by_one_that_takes_less():
    import psutil
    import ray

    eats = 3 << 30
    for _ in range(3):  # the free memory changes while other programs work
        memory = psutil.virtual_memory()
        if memory.available < 2 * eats:
            pytest.skip("needs 6 GiB of free memory")
        threshold = 1 - (memory.available - eats // 2) / memory.total
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=1 << 27,
            _system_config={"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100},
        )
        try:
            results, events = [], []
            actor = ray.remote(Eater).options(num_cpus=1, max_restarts=0)
            failures = run_units(
                ["a"],
                lambda actor=actor: actor.remote(eats),
                n_workers=1,
                on_result=lambda done, found=results: found.append(done.result),
                watch=Watch(on_event=events.append),
            )
        finally:
            ray.shutdown()
        if not failures and results[0] >= 1:
            return
    pytest.fail(f"{failures} {results} {[event.error for event in events]}")
