"""Runs lm-eval on a model in memory; values are exactly lm-eval's, and the score of each item is kept with them."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..environ import environment
from .calibration_error import bin_gaps, calibration_score, dense_gaps
from .scores import MetricScore, QualityError, QualitySpec, filtered_metric, mean_score
from .task_files import is_task_file, packaged_names, read_task_file, task_identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP_ITERS = 1000
"""Resamples for the standard error of the few lm-eval metrics that have no closed form."""


def benchmark_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: QualitySpec
) -> list[MetricScore]:
    """Scores a model by the tasks of a spec; the values are exactly those of lm-eval."""
    from lm_eval.models.huggingface import HFLM

    training = model.training
    try:
        return run_harness(lambda: HFLM(model, tokenizer=own_tokenizer(tokenizer), batch_size=spec.batch_size), spec)
    finally:
        model.train(training)


def run_harness(
    make_lm: Callable[[], Any], spec: QualitySpec, *, samples: Mapping[str, Sequence[int]] | None = None
) -> list[MetricScore]:
    """Runs lm-eval on everything in a spec, without output, and returns the scores.

    Args:
        make_lm: Makes (or returns again) the `lm_eval.api.model.LM` that answers.
        spec: The tasks; lm-eval does not use the spec's text.
        samples: Ids of the documents to ask about, ascending, for each task that is to be asked; all if None. With
            samples, the tasks of a group are scored one by one, without the group.
    """
    import lm_eval

    with _quiet(), _random_state_kept():
        benchmarks = load_benchmarks(spec.tasks, tuple(map(task_identity, spec.tasks)), spec.num_fewshot)
        results = lm_eval.simple_evaluate(
            model=make_lm(),
            tasks=_parts(benchmarks, samples),
            num_fewshot=spec.num_fewshot,
            batch_size=spec.batch_size,
            limit=None if samples is not None else spec.limit,
            samples=None if samples is None else {task: list(ids) for task, ids in samples.items()},
            bootstrap_iters=BOOTSTRAP_ITERS,
            task_manager=_local_manager(),
            confirm_run_unsafe_code=False,
        )
        assert results is not None  # None only on other ranks than 0, and a model in memory is always rank 0.
        return [score for benchmark in benchmarks for score in _scores_of(benchmark, results)]


def own_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a copy for HFLM, which sets a padding token; the caller's tokenizer must not change."""
    copied = copy.deepcopy(tokenizer)
    # This suppresses a warning about contexts too long for the model. It does not apply: HFLM cuts them to fit.
    copied.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return copied


def _parts(benchmarks: Sequence[_Benchmark], samples: Mapping[str, Sequence[int]] | None) -> list[Any]:
    """Returns what lm-eval runs; a task without samples is left out, or lm-eval would use all of its documents."""
    if samples is None:
        return [part for benchmark in benchmarks for part in benchmark.parts]
    return [task for benchmark in benchmarks for name, task in benchmark.tasks.items() if name in samples]


@dataclass(frozen=True)
class _Benchmark:
    """Holds one entry of the spec as lm-eval loaded it; `parts` is one group, or one or several tasks."""

    parts: list[Any]
    tasks: dict[str, Any]
    groups: list[str]


@lru_cache(maxsize=2)
def load_benchmarks(
    names: tuple[str, ...], identities: tuple[str, ...], num_fewshot: int | None
) -> tuple[_Benchmark, ...]:
    """Loads tasks and their data once for all the models that a process judges, unless their content changes.

    `identities` and `num_fewshot` serve as cache keys only: `num_fewshot` since simple_evaluate writes it into tasks.
    """
    benchmarks = []
    for name in names:
        try:
            benchmarks.append(_load_benchmark(name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise QualityError(
                f"quality.tasks: {name} cannot be loaded ({reason}); correct the task or leave it out"
            ) from error
    return tuple(benchmarks)


def _load_benchmark(name: str) -> _Benchmark:
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = _local_manager()
    wanted: str | dict[str, Any] = name
    if is_task_file(name):
        resolved = read_task_file(name)
        wanted = load_yaml(name) | {key: resolved[key] for key in ("dataset_path", "dataset_kwargs") if key in resolved}
    elif (packaged := packaged_names().get(name)) is not None and packaged.own_file is not None:
        wanted = str(packaged.own_file)
    else:
        manager = _packaged_manager()
    loaded = manager.load([wanted])
    groups = loaded.get("groups", {})
    parts = [groups[name]] if name in groups else list(loaded["tasks"].values())
    return _Benchmark(parts, loaded["tasks"], list(groups))


@lru_cache(maxsize=1)
def _local_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


@lru_cache(maxsize=1)
def _packaged_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _scores_of(benchmark: _Benchmark, results: Mapping[str, Any]) -> list[MetricScore]:
    by_task = {
        name: _task_scores(name, task, results) for name, task in benchmark.tasks.items() if name in results["results"]
    }
    by_group = {name: _group_scores(name, by_task, results) for name in benchmark.groups}
    top = benchmark.groups[0] if benchmark.groups else None
    for owner in [by_group[top]] if top is not None and by_group[top] else by_task.values():
        if owner:
            _primary_of(owner).primary = True
    return [score for scores in (*by_group.values(), *by_task.values()) for score in scores]


def _primary_of(scores: Sequence[MetricScore]) -> MetricScore:
    def rank(score: MetricScore) -> int:
        if score.unfiltered_metric == "acc":
            return 0
        if score.unfiltered_metric in ("margin", "ece"):
            return 4
        return 1 if score.higher_is_better else 2 if score.probability is not None else 3

    return min(scores, key=rank)


def _task_scores(name: str, task: Any, results: Mapping[str, Any]) -> list[MetricScore]:
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    scores = []
    for metric, filter_name, value, stderr in _reported(results["results"][name]):
        items = [sample.get(metric) for sample in samples if sample["filter"] == filter_name]
        scores.append(
            MetricScore(
                name,
                filtered_metric(metric, filter_name),
                value,
                stderr,
                bool(results["higher_is_better"][name].get(metric, True)),
                _items_of_mean(items, value),
                n_items=len(items),
                generated=task.OUTPUT_TYPE == "generate_until",
            )
        )
    choices = _choices(task, samples)
    if choices:
        margins, confidences, correct = zip(*choices, strict=True)
        scores.append(mean_score(name, "margin", list(margins), True))
        gaps = bin_gaps(torch.tensor(confidences, dtype=torch.float64)[:, None], torch.tensor(correct)[:, None])
        scores.append(calibration_score(name, gaps))
    return scores


def _group_scores(name: str, by_task: Mapping[str, list[MetricScore]], results: Mapping[str, Any]) -> list[MetricScore]:
    scores = []
    for metric, filter_name, value, stderr in _reported(results["results"].get(name, {})):
        called = filtered_metric(metric, filter_name)
        parts = [score for task_scores in by_task.values() for score in task_scores if score.metric == called]
        # If a group weights its tasks by size, its value is the mean over all their items and can be paired as well.
        known = [part.items for part in parts if part.items is not None]
        items = [item for part in known for item in part] if len(known) == len(parts) else []
        direction = all(part.higher_is_better for part in parts)
        scores.append(
            MetricScore(
                name,
                called,
                value,
                stderr,
                direction,
                _items_of_mean(items, value),
                n_items=sum(part.n_items or 0 for part in parts),
                generated=any(part.generated for part in parts),
            )
        )
    calibrations = [score.gaps for task_scores in by_task.values() for score in task_scores if score.gaps is not None]
    if scores and len(calibrations) > 1:
        scores.append(calibration_score(name, dense_gaps([item for gaps in calibrations for item in gaps])))
    return scores


def _reported(row: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """Yields metric, filter, value and standard error of a row of lm-eval's results."""
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        stderr = row.get(f"{metric}_stderr,{filter_name}")
        yield metric, filter_name, float(value), None if stderr is None or stderr == "N/A" else float(stderr)


def _items_of_mean(items: Sequence[Any], value: float) -> list[float] | None:
    if not items or not all(_is_number(item) for item in items):
        return None
    numbers = [float(item) for item in items]
    # Perplexities and some other aggregates log numbers whose mean is not the metric's value.
    return numbers if math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-9, abs_tol=1e-12) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | np.bool_)


def _choices(task: Any, samples: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, bool]]:
    """Returns margin, confidence and correctness of the chosen answer for each item of a multiple-choice task.

    Items that have only right or only wrong answers are left out. The confidence is the probability of the most likely
    choice among the choices alone.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return []
    found = []
    for sample in samples:
        if sample["filter"] != samples[0]["filter"]:
            continue
        choices = task.doc_to_choice(sample["doc"])
        right = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        if isinstance(right, str):
            right = [i for i, choice in enumerate(choices) if choice == right][:1]
        right = right if isinstance(right, list) else [right]
        # The log-likelihoods of the choices may be followed by the unconditional ones, for mutual information.
        log_p = [float(response[0][0]) for response in sample["resps"][: len(choices)]]
        of_right = [p for i, p in enumerate(log_p) if i in right]
        of_wrong = [p for i, p in enumerate(log_p) if i not in right]
        if of_right and of_wrong:
            confidence = 1 / math.fsum(math.exp(p - max(log_p)) for p in log_p)
            found.append((max(of_right) - max(of_wrong), confidence, log_p.index(max(log_p)) in right))
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the progress of lm-eval and datasets, and redirects what else they print from stdout to stderr.

    It also caches compiled templates, since lm-eval compiles the same template again for each document.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import lm_eval.utils
    import tqdm

    bar = tqdm.tqdm

    def no_bar(*args: Any, **kwargs: Any) -> Any:
        return bar(*args, **kwargs | {"disable": True})

    def no_report(*_: Any) -> None:
        """Replaces reports that nothing here reads; those on the machine and on git take two seconds each time."""

    logger = logging.getLogger("lm_eval")
    level = logger.level
    hide_bars = not datasets.utils.are_progress_bars_disabled()
    with contextlib.ExitStack() as stack:
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface, tqdm):
            stack.enter_context(_replaced(module, "tqdm", no_bar))
        for name in ("add_env_info", "get_git_commit_hash"):
            stack.enter_context(_replaced(lm_eval.evaluator, name, no_report))
        # Metrics print "bootstrapping for stddev" between the lines of our progress.
        stack.enter_context(_replaced(lm_eval.api.metrics, "print", no_report))
        templates = lm_eval.utils.env
        stack.enter_context(_replaced(templates, "from_string", lru_cache(maxsize=1024)(templates.from_string)))
        stack.enter_context(environment({"DISABLE_MULTIPROC": "1"}))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        logger.setLevel(logging.ERROR)
        stack.callback(logger.setLevel, level)
        if hide_bars:
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    had, before = name in vars(module), getattr(module, name, None)
    setattr(module, name, value)
    try:
        yield
    finally:
        if had:
            setattr(module, name, before)
        else:
            delattr(module, name)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restores the random state after lm-eval's seeding, so that surrounding training does not repeat its numbers."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
