"""Times a few of each step of a run on this machine; the estimate is made from these timings."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..convert import convert
from ..evaluation.evaluate import evaluate
from ..evaluation.plan_evaluation import PlanEvaluation
from ..evaluation.scores import QualitySpec
from ..families import decoder_layers
from ..healing.spec import HEAL, TRANSFER, HealingSpec
from ..healing.training import CurveRow, heal_locally
from ..plan import Plan, Treatment
from ..speed.decoding import timed_generation
from ..text.batches import PackedText
from ..text.sampling import SamplingSpec, sample_documents
from .costs import DecodeCosts, EvaluationCosts, HealingCosts

ENOUGH_S = 0.3
"""A timing of this length is trusted; after a shorter one twice as much is timed."""

DOCUMENTS = 8
"""Documents of each task that a probe judges."""

_LOOP_S = 0.055
"""Seconds that the loop of `slowness` takes on the machine that fixed costs were measured on."""

_DECODE_STEPS = 3
_HEALING_STEPS = 2
_SWEPT_LAYERS = 4


def slowness() -> float:
    """Returns how many times longer plain Python takes here than on the machine that fixed costs were measured on."""
    start, total = time.perf_counter(), 0
    for i in range(1_000_000):
        total += i * i
    return (time.perf_counter() - start) / _LOOP_S


def extrapolated_s(run: Callable[[int], object], total: int, *, first: int = 1, enough_s: float = ENOUGH_S) -> float:
    """Returns the seconds that `run(total)` would take, extrapolated from smaller runs until one takes `enough_s`.

    The first run is not timed because it warms up. The last two runs give the cost of each further unit.
    """
    n = min(first, total)
    run(n)
    points: list[tuple[int, float]] = []
    while True:
        start = time.perf_counter()
        run(n)
        points.append((n, time.perf_counter() - start))
        if n == total or points[-1][1] >= enough_s:
            break
        n = min(total, 2 * n)
    last, last_s = points[-1]
    each_s = last_s / last
    if len(points) > 1:
        before, before_s = points[-2]
        each_s = min(each_s, max(0.5 * each_s, (last_s - before_s) / (last - before)))
    return last_s + (total - last) * each_s


def evaluation_costs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: QualitySpec,
    *,
    treatments: Sequence[Treatment],
    swept: Sequence[Treatment],
    window: int,
    n_documents: int | None = None,
    shares: int = 16,
) -> EvaluationCosts:
    """Times judging by a spec.

    Args:
        model, tokenizer: The untouched parent, on the device and with the threads of a worker.
        spec: What is judged by.
        treatments: Treatments whose uniform plans are judged.
        swept: Treatments that single layers get in a sweep.
        window: Window of windowed treatments, in tokens.
        n_documents: Documents of all tasks together; None counts them.
        shares: Shares into which a sweep cuts the items; it determines how many sequences are read together.
    """
    n_layers = len(decoder_layers(model))
    plans = {treatment.value: Plan.uniform(treatment, n_layers, window) for treatment in treatments}
    single, weight = _single_layer_plans(n_layers, swept, window)
    some = Plan(tuple(treatments[layer % len(treatments)] for layer in range(n_layers)), window)
    student = convert(model, some)
    prepare_s = score_s = direct_s = 0.0
    tasks_s, text_s, sweep_s = dict.fromkeys(plans, 0.0), dict.fromkeys(plans, 0.0), {}
    if spec.tasks:
        limit = min(spec.limit or DOCUMENTS, DOCUMENTS)
        few = replace(spec, text=None, retrieval=(), limit=limit)
        PlanEvaluation(model, tokenizer, replace(few, limit=1))  # imports lm-eval and loads the tasks
        start = time.perf_counter()
        judge = PlanEvaluation(model, tokenizer, few)
        prepare_s = time.perf_counter() - start
        assert judge.benchmarks is not None
        items = len(judge.benchmarks.items)
        scale = max(1.0, (n_documents or document_count(spec)) / max(1, items))
        judge.answer([some])  # warms up
        for name, plan in plans.items():
            tasks_s[name] = scale * _timed(partial(judge.answer, [plan]))
        answers = judge.answer([some])
        said = answers.log_p[0], answers.greedy[0]
        judge.scores(some, said, None)  # warms up
        # Scoring hardly depends on the number of documents and is short enough for one pause of the machine to
        # distort it: take the minimum of several runs.
        score_s = min(_timed(lambda: judge.scores(some, said, None)) for _ in range(3))
        sweep_s["tasks"] = scale * weight * _timed(lambda: judge.answer(single))
        # lm-eval has a fixed overhead even for a single document, so time one and a few documents.
        evaluate(student, tokenizer, replace(few, limit=1))
        one_s = _timed(lambda: evaluate(student, tokenizer, replace(few, limit=1)))
        few_s = _timed(lambda: evaluate(student, tokenizer, few))
        direct_s += _scaled_s(one_s, 1, few_s, limit, scale)
        prepare_s *= scale
    if spec.text is not None:
        judge = PlanEvaluation(model, tokenizer, replace(spec, tasks=(), retrieval=()))
        assert judge.sequences is not None
        n = len(judge.sequences)

        def read(plans: Sequence[Plan]) -> Callable[[int], object]:
            return lambda k: judge.read_text(plans, torch.arange(k))

        for name, plan in plans.items():
            text_s[name] = extrapolated_s(read([plan]), n, first=2)
        share = min(n, max(1, -(-n // shares)))
        sweep_s["text"] = n / share * weight * _timed(lambda: read(single)(share))
        few = replace(spec, tasks=(), n_sequences=min(n, spec.batch_size))
        direct_s += n / min(n, spec.batch_size) * _timed(lambda: evaluate(student, tokenizer, few, base=model))
    return EvaluationCosts(prepare_s, score_s, tasks_s, text_s, direct_s, sweep_s)


def document_count(spec: QualitySpec) -> int:
    """Returns the number of documents of all tasks of a spec together."""
    from ..evaluation.lm_eval_run import load_benchmarks
    from ..evaluation.task_files import task_identity

    loaded = load_benchmarks(spec.tasks, tuple(map(task_identity, spec.tasks)), spec.num_fewshot)
    counts = [len(task.eval_docs) for benchmark in loaded for task in benchmark.tasks.values()]
    return sum(count if spec.limit is None else min(count, int(spec.limit)) for count in counts)


def healing_costs(
    model: PreTrainedModel,
    spec: HealingSpec,
    *,
    middle: Treatment,
    window: int,
    n_workers: int = 1,
    teacher: PreTrainedModel | None = None,
) -> HealingCosts:
    """Times steps of healing on random tokens; each of `n_workers` workers runs its share of a batch."""
    n_layers, config = len(decoder_layers(model)), model.config.get_text_config()
    batch = -(-spec.batch_sequences // n_workers)
    n_steps = 2 * _HEALING_STEPS
    text = PackedText(torch.randint(config.vocab_size, (n_steps * batch, spec.sequence_tokens)))
    short = replace(spec, batch_sequences=batch, tokens=batch * spec.sequence_tokens * n_steps, stop_when_flat=None)
    step_s, transfer_step_s = {}, 0.0
    for treatment in (Treatment.SOFTMAX, Treatment.NONE, middle):
        has_transfer = treatment.has_weights and spec.transfer_fraction > 0
        of_plan = replace(short, transfer_fraction=0.5 if has_transfer else 0.0)
        if not has_transfer:
            of_plan = replace(of_plan, tokens=of_plan.tokens // 2)
        found = _step_seconds(model, Plan.uniform(treatment, n_layers, window), text, of_plan, teacher)
        step_s[treatment.value] = found[HEAL]
        transfer_step_s = found.get(TRANSFER, transfer_step_s)
    return HealingCosts(step_s, transfer_step_s, n_trained(model, spec))


def n_trained(model: PreTrainedModel, spec: HealingSpec) -> int:
    """Returns how many parameters healing trains: all, or those of the adapters of every projection."""
    if spec.method == "full":
        return sum(parameter.numel() for parameter in model.parameters())
    projections = [m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)]
    return sum(spec.rank * (m.in_features + m.out_features) for m in projections)


def _step_seconds(
    model: PreTrainedModel, plan: Plan, text: PackedText, spec: HealingSpec, teacher: PreTrainedModel | None
) -> dict[str, float]:
    """Returns the seconds of a step in each phase; the first step of a phase warms up and is not counted."""
    ended: dict[str, list[float]] = {}

    def on_step(row: CurveRow) -> None:
        _synchronize(model)
        ended.setdefault(row.phase, []).append(time.perf_counter())

    heal_locally(model, plan, text, spec, teacher=teacher, on_step=on_step)
    return {phase: (times[-1] - times[0]) / max(1, len(times) - 1) for phase, times in ended.items()}


@torch.inference_mode()
def decode_costs(
    model: PreTrainedModel, *, concurrency: int, prompt_tokens: int, treatments: Sequence[Treatment], window: int
) -> DecodeCosts:
    """Times one prefill and a few decode steps of each uniform plan."""
    n_layers = len(decoder_layers(model))
    prompts = torch.randint(model.config.get_text_config().vocab_size, (concurrency, prompt_tokens)).to(model.device)
    prefill_s, step_s = {}, {}
    for treatment in treatments:
        plan = Plan.uniform(treatment, n_layers, window)
        variant = model if treatment is Treatment.SOFTMAX else convert(model, plan).eval()
        timed_generation(variant, prompts[:1, :8], 2)  # warms up
        prefill_s[treatment.value], steps_s, _ = timed_generation(variant, prompts, 1 + _DECODE_STEPS)
        step_s[treatment.value] = sum(steps_s) / _DECODE_STEPS
    return DecodeCosts(concurrency, prompt_tokens, prefill_s, step_s)


def sample_token_s(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: SamplingSpec) -> float:
    """Returns the seconds per token of sampling one full batch of documents."""

    def sample(n_tokens: int) -> list[list[int]]:
        n = spec.batch_size
        return sample_documents(model, tokenizer, n, n_tokens, seed=spec.seed, batch_size=n)

    n_tokens = min(16, spec.max_tokens)
    sample(2)  # warms up
    return _timed(lambda: sample(n_tokens)) / n_tokens


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Sets the number of CPU threads of torch inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        gc.collect()


def _single_layer_plans(n_layers: int, swept: Sequence[Treatment], window: int) -> tuple[list[Plan], float]:
    """Returns some of a sweep's plans, evenly spread, and the factor by which all of them cost more."""
    layers = sorted({round(i * (n_layers - 1) / (_SWEPT_LAYERS - 1)) for i in range(_SWEPT_LAYERS)})
    base = Plan.uniform(Treatment.SOFTMAX, n_layers)
    plans = [base]
    for treatment in swept:
        for layer in layers:
            treatments = list(base.treatments)
            treatments[layer] = treatment
            plans.append(Plan(tuple(treatments), window if treatment.needs_window else None))

    def n_calls(at: Sequence[int]) -> int:
        return n_layers + len(swept) * sum(n_layers - layer for layer in at)

    return plans, n_calls(range(n_layers)) / n_calls(layers)


def _scaled_s(less_s: float, less: int, more_s: float, more: int, scale: float) -> float:
    """Returns the seconds of `scale` times `more` units, assuming a fixed part and a part per unit."""
    each_s = max(0.0, more_s - less_s) / max(1, more - less)
    return more_s + (scale - 1) * more * each_s


def _timed(run: Callable[[], object]) -> float:
    """Returns the seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
