"""Times a few of each step of a run on this machine; the estimate is made from these timings.

Everything is timed on twins of few layers (`twins`), on as little as takes `ENOUGH_S`, and scaled to the model's layers
and the run's tokens.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..convert import convert
from ..evaluation.evaluate import evaluate
from ..evaluation.plan_evaluation import PlanEvaluation
from ..evaluation.retrieval import retrieval_items
from ..evaluation.scores import QualitySpec
from ..families import decoder_layers
from ..healing.spec import HEAL, TRANSFER, HealingSpec
from ..healing.training import CurveRow, heal_locally
from ..plan import Plan, Treatment
from ..speed.decoding import last_logits, prefill_chunk_tokens, random_tokens, timed_generation
from ..text.batches import PackedText
from ..text.sampling import SamplingSpec, sample_documents
from .costs import DecodeCosts, EvaluationCosts, HealingCosts
from .twins import LayerCosts, Twins

Made = TypeVar("Made")

ENOUGH_S = 0.3
"""A timing of this length is trusted; after a shorter one twice as much is timed."""

DOCUMENTS = 8
"""Documents of each task that a probe judges."""

_LOOP_S = 0.055
"""Seconds that the loop of `slowness` takes on the machine that fixed costs were measured on."""

_DECODE_STEPS = 3
_HEALING_STEPS = 2

_LEAST_TOKENS = 64
"""Fewer tokens of a sequence are not timed, because a call's own cost would stand out."""

_STEP_FORWARDS = 5
"""About how many forward passes the passes of teacher and student and the backward pass of a healing step cost."""


def slowness() -> float:
    """Returns how many times longer plain Python takes here than on the machine that fixed costs were measured on."""
    start, total = time.perf_counter(), 0
    for i in range(1_000_000):
        total += i * i
    return (time.perf_counter() - start) / _LOOP_S


def extrapolated_s(run: Callable[[int], object], total: int, *, first: int = 1, enough_s: float = ENOUGH_S) -> float:
    """Returns the seconds that `run(total)` would take, extrapolated from smaller runs until one takes `enough_s`.

    The first run warms up and is repeated. The last two runs give the cost of each further unit.
    """
    if total == 0:
        return 0.0
    n = min(first, total)
    warm_up_s = _timed(partial(run, n))
    points = [(n, min(warm_up_s, _timed(partial(run, n))))]
    while n < total and points[-1][1] < enough_s:
        n = min(total, 2 * n)
        points.append((n, _timed(partial(run, n))))
    last, last_s = points[-1]
    each_s = last_s / last
    if len(points) > 1:
        before, before_s = points[-2]
        each_s = min(each_s, max(0.5 * each_s, (last_s - before_s) / (last - before)))
    return last_s + (total - last) * each_s


def evaluation_costs(
    twins: Twins,
    tokenizer: PreTrainedTokenizerBase,
    spec: QualitySpec,
    *,
    treatments: Sequence[Treatment],
    swept: Sequence[Treatment],
) -> EvaluationCosts:
    """Times judging by a spec.

    Args:
        twins: Twins of the untouched parent, on the device and with the threads of a worker.
        tokenizer: Its tokenizer.
        spec: What is judged by.
        treatments: Treatments whose uniform plans are judged; they include softmax and those of `swept`.
        swept: Treatments that single layers get in a sweep.
    """
    n_layers, costs = twins.n_layers, EvaluationCosts(0.0, 0.0, {}, {}, 0.0, {}, {})
    if spec.tasks:
        costs = _task_costs(twins, tokenizer, replace(spec, text=None, retrieval=()), treatments, swept)
    if spec.text is not None:
        text, plan_s = _text_costs(twins, tokenizer, replace(spec, tasks=(), retrieval=()), treatments)
        # A pass of any other plan runs the untouched model beside it, for the divergence.
        base_s = text.fixed_s + n_layers * text.layer_s[Treatment.SOFTMAX]
        beside_s = {name.value: base_s + plan_s + n_layers * each_s for name, each_s in text.layer_s.items()}
        text_s = beside_s | {Treatment.SOFTMAX.value: base_s}
        swept_s = _swept_s(text, swept, n_layers, plan_s)
        costs = replace(
            costs,
            text_s=text_s,
            direct_s=costs.direct_s + sum(text_s.values()) / len(text_s) + _retrieval_s(twins, tokenizer, spec),
            sweep_s=costs.sweep_s | {"text": swept_s},
            # The likelihood is measured without the untouched model. A plan is taken to need the seconds then that it
            # adds to a pass beside that model.
            likelihood_s=LayerCosts(plan_s, text.layer_s).uniform_s(n_layers),
        )
    zero = dict.fromkeys((treatment.value for treatment in treatments), 0.0)
    return replace(
        costs,
        tasks_s=costs.tasks_s or zero,
        text_s=costs.text_s or zero,
        likelihood_s=costs.likelihood_s or zero,
    )


def _task_costs(
    twins: Twins,
    tokenizer: PreTrainedTokenizerBase,
    spec: QualitySpec,
    treatments: Sequence[Treatment],
    swept: Sequence[Treatment],
) -> EvaluationCosts:
    """Times judging by the tasks of a spec: a document of each, and a few, tell what grows with their number."""
    n_all = document_count(spec)  # this imports lm-eval and loads the tasks
    one, few = (replace(spec, limit=min(spec.limit or n, n)) for n in (1, DOCUMENTS))
    PlanEvaluation(twins.few, tokenizer, one)  # warms up
    of_one = _clocked(lambda: PlanEvaluation(twins.few, tokenizer, one))
    of_few = _clocked(lambda: PlanEvaluation(twins.few, tokenizer, few))
    n_one, n_few = (len(judge.benchmarks.items) for judge, _ in (of_one, of_few) if judge.benchmarks is not None)

    def of_all_s(one_s: float, few_s: float) -> float:
        return scaled_s(one_s, n_one, few_s, n_few, n_all)

    judges = {twins.few: of_few[0], twins.one: PlanEvaluation(twins.one, tokenizer, few)}

    def answered_s(model: PreTrainedModel, plan: Plan) -> float:
        judge, n_items = judges[model], len(judges[model].items)
        return extrapolated_s(lambda n: judge.answer([plan], judge.items[:n]), n_items, first=max(1, n_items // 2))

    answered = twins.layer_costs(treatments, answered_s)
    of_all = answered.scaled(max(1.0, n_all / max(1, n_few)))
    tasks_s = of_all.uniform_s(twins.n_layers)
    some = twins.plan(Treatment.SOFTMAX, twins.n_few)
    scoring_s = []
    for judge in (of_one[0], of_few[0]):
        answers = judge.answer([some])
        said = answers.log_p[0], answers.greedy[0]
        judge.scores(some, said, None)  # warms up
        # Scoring is short enough for one pause of the machine to distort it: take the minimum of several runs.
        scoring_s.append(min(_timed(partial(judge.scores, some, said, None)) for _ in range(3)))
    mixed_layers = tuple(treatments[layer % len(treatments)] for layer in range(twins.n_few))
    student = convert(twins.few, Plan(mixed_layers, twins.window, twins.sinks)).eval()
    evaluate(student, tokenizer, one)  # warms up
    direct_s = of_all_s(*(_timed(partial(evaluate, student, tokenizer, quality)) for quality in (one, few)))
    # Without anything to answer, tasks have the model generate, which grows with its layers.
    few_layers_s = sum(of_all.uniform_s(twins.n_few).values())
    deeper = sum(tasks_s.values()) / few_layers_s if few_layers_s else twins.n_layers / twins.n_few
    return EvaluationCosts(
        prepare_s=of_all_s(of_one[1], of_few[1]),
        # While scores are computed, tasks have the model generate.
        score_s=of_all_s(*scoring_s) * (twins.n_layers / twins.n_few if of_few[0].generating else 1.0),
        tasks_s=tasks_s,
        text_s={},
        direct_s=direct_s * deeper,
        sweep_s={"tasks": _swept_s(of_all, swept, twins.n_layers, of_all.fixed_s)},
        likelihood_s={},
    )


def _text_costs(
    twins: Twins, tokenizer: PreTrainedTokenizerBase, spec: QualitySpec, treatments: Sequence[Treatment]
) -> tuple[LayerCosts, float]:
    """Times reading the text of a spec.

    Returns:
        The costs of all its sequences, and the seconds that do not depend on the layers for a plan that is read beside
        the untouched model; these are fewer than for that model, whose logits both plans' divergences need.
    """
    judges = {model: PlanEvaluation(model, tokenizer, spec) for model in (twins.one, twins.few)}
    sequences = judges[twins.few].sequences
    assert sequences is not None

    def read_s(model: PreTrainedModel, plan: Plan) -> float:
        return extrapolated_s(lambda n: judges[model].read_text([plan], torch.arange(n)), len(sequences))

    base = twins.layer_costs([Treatment.SOFTMAX], read_s)
    few_base_s, one_base_s = (base.fixed_s + n * base.layer_s[Treatment.SOFTMAX] for n in (twins.n_few, 1))
    others = [treatment for treatment in treatments if treatment is not Treatment.SOFTMAX]
    # The untouched model ran beside each of these plans, with all layers of the twin.
    beside_s = {name: read_s(twins.few, twins.plan(name, twins.n_few)) - few_base_s for name in others}
    plan_s, layer_s = base.fixed_s, dict(base.layer_s)
    if others and twins.n_few > 1:
        of_one_s = read_s(twins.one, twins.plan(others[0], 1)) - one_base_s
        each_s = (beside_s[others[0]] - of_one_s) / (twins.n_few - 1)
        plan_s = max(0.0, of_one_s - max(0.0, each_s))
    for name, seconds in beside_s.items():
        layer_s[name] = max(0.0, seconds - plan_s) / twins.n_few
    return LayerCosts(base.fixed_s, {name: layer_s[name] for name in treatments}), plan_s


def _retrieval_s(twins: Twins, tokenizer: PreTrainedTokenizerBase, spec: QualitySpec) -> float:
    """Returns the seconds of reading the sequences in which a model must find tokens again."""
    asked = retrieval_items(tokenizer, spec)
    if not asked:
        return 0.0
    longest = max(distance.tokens.shape[1] for distance in asked)
    n_sequences = sum(distance.tokens.numel() for distance in asked) / longest
    return n_sequences * twins.deep_s(partial(_forward_s, n_tokens=longest))


def _swept_s(costs: LayerCosts, swept: Sequence[Treatment], n_layers: int, plan_s: float) -> float:
    """Returns the seconds of a sweep: each plan shares the layers below its own, and the untouched model, with others.

    The plan that treats layer l runs that layer and the softmax layers above it, and takes `plan_s` apart from layers.
    """
    above = n_layers * (n_layers - 1) // 2
    softmax_s = costs.layer_s[Treatment.SOFTMAX]
    plans_s = sum(n_layers * (costs.layer_s[treatment] + plan_s) + above * softmax_s for treatment in swept)
    return costs.fixed_s + n_layers * softmax_s + plans_s


def document_count(spec: QualitySpec) -> int:
    """Returns the number of documents of all tasks of a spec together."""
    from ..evaluation.lm_eval_run import load_benchmarks
    from ..evaluation.task_files import task_identity

    loaded = load_benchmarks(spec.tasks, tuple(map(task_identity, spec.tasks)), spec.num_fewshot)
    counts = [len(task.eval_docs) for benchmark in loaded for task in benchmark.tasks.values()]
    return sum(count if spec.limit is None else min(count, int(spec.limit)) for count in counts)


def healing_costs(
    twins: Twins,
    spec: HealingSpec,
    *,
    treatments: Sequence[Treatment],
    n_workers: int = 1,
    teacher: PreTrainedModel | None = None,
) -> HealingCosts:
    """Times steps of healing on random tokens; each of `n_workers` workers runs its share of a batch.

    Steps are timed on few tokens and extrapolated to those of a whole step. What does not grow with the tokens (reading
    the weights, updating the trained parameters) is told apart by timing softmax on a quarter of those tokens too.
    """
    share, vocabulary = -(-spec.batch_sequences // n_workers), twins.model.config.get_text_config().vocab_size
    small, large = _step_sizes(twins, spec, share)
    scale = share * spec.sequence_tokens / math.prod(large)
    transfer_s = 0.0

    def n_rounds(n_sequences: int) -> int:
        return -(-n_sequences // (spec.micro_batch_sequences or n_sequences))

    def step_s(model: PreTrainedModel, plan: Plan, size: tuple[int, int]) -> float:
        nonlocal transfer_s
        sequence_tokens, batch = size
        has_transfer = plan.treatments[0].is_transferred and spec.transfer_fraction > 0
        n_steps = (2 if has_transfer else 1) * (1 + _HEALING_STEPS)
        short = replace(
            spec,
            tokens=batch * sequence_tokens * n_steps,
            sequence_tokens=sequence_tokens,
            batch_sequences=batch,
            transfer_fraction=0.5 if has_transfer else 0.0,
            stop_when_flat=None,
        )
        text = PackedText(torch.randint(vocabulary, (n_steps * batch, sequence_tokens)))
        found = _step_seconds(model, plan, text, short)
        transfer_s = found.get(TRANSFER, transfer_s)
        return found[HEAL]

    of_large = twins.layer_costs(treatments, partial(step_s, size=large))
    constant = LayerCosts(0.0, dict.fromkeys(treatments, 0.0))
    if small != large:
        of_small = twins.layer_costs([Treatment.SOFTMAX], partial(step_s, size=small))
        constant = _constant_part(of_small, math.prod(small), of_large, math.prod(large))
    whole = _scaled_beyond(constant, of_large, scale, n_rounds(share) / n_rounds(large[1]))
    # Transfer trains each layer by itself, without the head, so that its step grows as those of layers do.
    deeper = twins.n_layers / twins.n_few
    layer_s, whole_layer_s = (costs.layer_s[Treatment.SOFTMAX] for costs in (of_large, whole))
    transfer_step_s = transfer_s * deeper * (whole_layer_s / layer_s if layer_s else scale)
    steps_s = whole.uniform_s(twins.n_layers)
    teacher_step_s = scale * twins.deep_s(partial(_forward_s, n_tokens=large[0], n_sequences=large[1]))
    if teacher is not None:
        # The student's own parent was the teacher in what was timed.
        own_s, teacher_step_s = teacher_step_s, scale * _forward_s(teacher, *large)
        steps_s = {name: max(0.0, seconds + teacher_step_s - own_s) for name, seconds in steps_s.items()}
    return HealingCosts(steps_s, transfer_step_s, n_trained(twins.model, spec), teacher_step_s)


def _step_sizes(twins: Twins, spec: HealingSpec, share: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns two sizes of a step, each as the tokens of a sequence and the sequences, at most a whole step.

    The smaller one takes about `ENOUGH_S`: it doubles until a forward pass takes its share of that time, since few
    tokens keep a GPU from its speed, and their time says nothing of many. The larger one has four times its tokens.
    """
    sizes = [(min(_LEAST_TOKENS, spec.sequence_tokens), 1)]
    while sizes[-1] != (spec.sequence_tokens, share):
        sequence_tokens, batch = sizes[-1]
        if sequence_tokens < spec.sequence_tokens:
            sizes.append((min(spec.sequence_tokens, 2 * sequence_tokens), batch))
        else:
            sizes.append((sequence_tokens, min(share, 2 * batch)))
    enough_s = ENOUGH_S / _STEP_FORWARDS / 2
    small = next((n for n, size in enumerate(sizes) if _forward_s(twins.few, *size) >= enough_s), len(sizes) - 1)
    return sizes[small], sizes[min(small + 2, len(sizes) - 1)]


def _constant_part(small: LayerCosts, n_small: int, large: LayerCosts, n_large: int) -> LayerCosts:
    """Returns the part of costs that does not grow with the tokens; it is that of a softmax layer for all treatments.

    Args:
        small: Costs of softmax with `n_small` tokens.
        n_small, n_large: Numbers of tokens, the second one larger.
        large: Costs of all treatments with `n_large` tokens.
    """

    def constant_s(small_s: float, large_s: float) -> float:
        return min(large_s, max(0.0, (n_large * small_s - n_small * large_s) / (n_large - n_small)))

    softmax_s = constant_s(small.layer_s[Treatment.SOFTMAX], large.layer_s[Treatment.SOFTMAX])
    layer_s = {treatment: min(each_s, softmax_s) for treatment, each_s in large.layer_s.items()}
    return LayerCosts(constant_s(small.fixed_s, large.fixed_s), layer_s)


def _scaled_beyond(constant: LayerCosts, costs: LayerCosts, scale: float, rounds: float = 1.0) -> LayerCosts:
    """Returns the costs of `scale` times the tokens; a part of `costs` is constant, in each of `rounds` micro batches.

    The update of the parameters is counted in each micro batch too, because it is not told apart from the rest.
    """

    def scaled(constant_s: float, seconds: float) -> float:
        return rounds * constant_s + scale * (seconds - constant_s)

    layer_s = {name: scaled(constant.layer_s[name], each_s) for name, each_s in costs.layer_s.items()}
    return LayerCosts(scaled(constant.fixed_s, costs.fixed_s), layer_s)


@torch.inference_mode()
def _forward_s(model: PreTrainedModel, n_tokens: int, n_sequences: int = 1) -> float:
    """Returns the seconds of a forward pass over sequences of random tokens, with the logits of the last ones alone."""
    tokens = random_tokens(model, n_sequences, n_tokens, seed=0)

    def run() -> None:
        last_logits(model, tokens)
        _synchronize(model)

    run()  # warms up
    return _timed(run)


def n_trained(model: PreTrainedModel, spec: HealingSpec) -> int:
    """Returns how many parameters healing trains: all, or those of the adapters of every projection."""
    if spec.method == "full":
        return sum(parameter.numel() for parameter in model.parameters())
    projections = [m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)]
    return sum(spec.rank * (m.in_features + m.out_features) for m in projections)


def _step_seconds(model: PreTrainedModel, plan: Plan, text: PackedText, spec: HealingSpec) -> dict[str, float]:
    """Returns the seconds of a step in each phase; the first step of a phase warms up and is not counted."""
    ended: dict[str, list[float]] = {}

    def on_step(row: CurveRow) -> None:
        _synchronize(model)
        ended.setdefault(row.phase, []).append(time.perf_counter())

    heal_locally(model, plan, text, spec, on_step=on_step)
    return {phase: (times[-1] - times[0]) / max(1, len(times) - 1) for phase, times in ended.items()}


@torch.inference_mode()
def decode_costs(twins: Twins, *, concurrency: int, prompt_tokens: int, treatments: Sequence[Treatment]) -> DecodeCosts:
    """Times the first and the last chunk of a prefill, and a few decode steps, of each uniform plan.

    What chunks cost grows linearly from the first to the last, with the context that they attend to.
    """
    chunk_tokens = min(prompt_tokens, prefill_chunk_tokens(twins.model, concurrency))
    n_filled = prompt_tokens - chunk_tokens
    prompts = random_tokens(twins.model, concurrency, prompt_tokens, seed=0)
    steps_s: dict[tuple[PreTrainedModel, Plan], float] = {}

    def prefill_s(model: PreTrainedModel, plan: Plan) -> float:
        variant = model if plan.is_untouched else convert(model, plan).eval()
        timed_generation(variant, prompts[:1, :8], 2)  # warms up
        first_s, _, _ = timed_generation(variant, prompts[:, :chunk_tokens], 1)
        last_s, decoded_s, _ = timed_generation(variant, prompts, 1 + _DECODE_STEPS, n_filled=n_filled)
        steps_s[model, plan] = sum(decoded_s) / _DECODE_STEPS
        return prompt_tokens / chunk_tokens * (first_s + last_s) / 2

    prefills = twins.layer_costs(treatments, prefill_s)
    steps = twins.layer_costs(treatments, lambda model, plan: steps_s[model, plan])
    n_layers = twins.n_layers
    return DecodeCosts(concurrency, prompt_tokens, prefills.uniform_s(n_layers), steps.uniform_s(n_layers))


def sample_token_s(twins: Twins, tokenizer: PreTrainedTokenizerBase, spec: SamplingSpec) -> float:
    """Returns the seconds per token of sampling one full batch of documents."""
    n_tokens = min(16, spec.max_tokens)

    def sampled_s(model: PreTrainedModel) -> float:
        def sample(n_tokens: int) -> list[list[int]]:
            n = spec.batch_size
            return sample_documents(model, tokenizer, n, n_tokens, seed=spec.seed, batch_size=n)

        sample(2)  # warms up
        return _timed(lambda: sample(n_tokens)) / n_tokens

    return twins.deep_s(sampled_s)


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


def scaled_s(one_s: float, n_one: int, few_s: float, n_few: int, n_all: int) -> float:
    """Returns the seconds of `n_all` units from those of two numbers of them: a fixed part and a part for each."""
    each_s = max(0.0, few_s - one_s) / max(1, n_few - n_one)
    return few_s + (n_all - n_few) * each_s


def _clocked(make: Callable[[], Made]) -> tuple[Made, float]:
    """Returns what a call returns, and the seconds that it took."""
    start = time.perf_counter()
    made = make()
    return made, time.perf_counter() - start


def _timed(run: Callable[[], object]) -> float:
    """Returns the seconds that one call takes."""
    return _clocked(run)[1]


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
