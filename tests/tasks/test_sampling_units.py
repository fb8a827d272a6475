"""Tests that the units of sampling workers together give what one process samples, also through Ray."""

from __future__ import annotations

import pytest

from layerboost.checkpoint import ModelSource, load_model, load_tokenizer
from layerboost.text.sampling import SamplingSpec, sample_documents
from tasks.cluster.resources import WorkerResources
from tasks.sampling import SampleUnit, SamplingWorker, sample_units

SPEC = SamplingSpec(max_tokens=12, seed=4, temperature=1.5, batch_size=3)
UNITS = [SampleUnit(first, 3) for first in range(0, 9, 3)]


@pytest.fixture(scope="module")
def source(tiny_checkpoint) -> ModelSource:
    return ModelSource(str(tiny_checkpoint / "model"), device="cpu")


@pytest.fixture(scope="module")
def expected(source) -> list[list[int]]:
    model, tokenizer = load_model(source.path), load_tokenizer(source.path)
    return sample_documents(model, tokenizer, 9, 12, seed=4, temperature=1.5, batch_size=9)


def test_a_worker_samples_as_its_spec_says(source, expected):
    worker = SamplingWorker(source, SPEC)
    assert [document for unit in UNITS for document in worker.run(unit)] == expected


@pytest.mark.cluster
def test_through_ray_the_documents_are_the_same(ray_local, source, expected):
    found = {}

    def take(done):
        found[done.unit] = done.result

    units = [*UNITS, SampleUnit(0, 0)]
    failures = sample_units(units, source, SPEC, WorkerResources(2, 1, 0), on_result=take, max_attempts=2)
    assert [document for unit in UNITS for document in found[unit]] == expected
    (failure,) = failures
    assert failure.unit == units[-1] and failure.n_attempts == 2 and "n_documents: 0" in failure.error
