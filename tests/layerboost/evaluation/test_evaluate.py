from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layerboost.convert import convert
from layerboost.evaluation.evaluate import evaluate, spec_fingerprint
from layerboost.evaluation.likelihood import score_sequences
from layerboost.evaluation.lm_eval_run import BOOTSTRAP_ITERS
from layerboost.evaluation.plan_evaluation import PlanEvaluation
from layerboost.evaluation.scores import MetricScore, QualityError, QualitySpec, Scores, quality, retained
from layerboost.evaluation.statistics import paired_difference
from layerboost.evaluation.task_files import TaskFileError, UnknownTaskError, check_tasks, task_identity
from layerboost.plan import Plan

TEXT = "the a cat dog bird saw liked chased ran slept and then big small red old . house tree"
WORDS = TEXT.split()
VOCABULARY = ["<unk>", "<s>", "</s>", *WORDS]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _llama(seed: int, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return _llama(0)


@pytest.fixture(scope="module")
def other() -> LlamaForCausalLM:
    return _llama(1)


def _sentences(n: int, seed: int, words: int = 8) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(n):
        yield " ".join(rng.choice(WORDS) for _ in range(words))


def _write_task(folder: Path, name: str, records: list[dict], **config) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"task": name, **data, **config}))
    return str(path)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    choices = [
        {"context": s, "choices": rng.sample(WORDS, 3), "gold": rng.randrange(3)} for s in _sentences(30, seed=1)
    ]
    endings = [{"context": s, "ending": f" {rng.choice(WORDS)}"} for s in _sentences(20, seed=2)]
    texts = [{"text": s} for s in _sentences(10, seed=3, words=20)]
    return {
        "choice": _write_task(
            folder,
            "choice",
            choices,
            output_type="multiple_choice",
            doc_to_text="context",
            doc_to_choice="choices",
            doc_to_target="gold",
            metric_list=[
                {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
            ],
        ),
        "contexts": _write_task(  # as winogrande: the choices are what comes before, and the target is common to them
            folder,
            "contexts",
            [
                {"contexts": list(_sentences(2, seed=10 + n)), "gold": n % 2, "ending": f"{WORDS[n]} {WORDS[n + 1]}"}
                for n in range(len(WORDS) - 1)
            ],
            output_type="multiple_choice",
            doc_to_text="gold",
            doc_to_choice="contexts",
            doc_to_target="ending",
            metric_list=[
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
            ],
        ),
        "ending": _write_task(
            folder,
            "ending",
            endings,
            output_type="loglikelihood",
            doc_to_text="context",
            doc_to_target="ending",
            metric_list=[
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        ),
        "rolling": _write_task(
            folder,
            "rolling",
            texts,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="text",
            metric_list=[
                {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            ],
        ),
        "answer": _write_task(
            folder,
            "answer",
            [{"context": s, "ending": "then"} for s in _sentences(20, seed=2)],
            output_type="generate_until",
            doc_to_text="context",
            doc_to_target="ending",
            generation_kwargs={"until": ["."], "max_gen_toks": 4, "do_sample": False},
            filter_list=[
                {"name": "first", "filter": [{"function": "take_first"}]},
                {
                    "name": "word",
                    "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}],
                },
            ],
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        ),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(_sentences(40, seed=4, words=15)))
    return str(path)


def _simple_evaluate(model, tokenizer, path: str, batch_size: int, **settings) -> dict:
    """Calls lm-eval directly, as in its documentation."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    config = yaml.safe_load(Path(path).read_text())
    config["dataset_kwargs"]["data_files"]["test"] = str(Path(path).with_suffix(".jsonl"))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=[config],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=BOOTSTRAP_ITERS,
        **settings,
    )


@pytest.fixture(scope="module")
def scores(model, tokenizer, tasks, text) -> Scores:
    spec = QualitySpec(tasks=tuple(tasks.values()), text=text, n_sequences=6, sequence_tokens=32, batch_size=4)
    return evaluate(model, tokenizer, spec)


@pytest.mark.parametrize("name", ["choice", "contexts", "ending", "rolling", "answer"])
def test_every_kind_of_task_scores_exactly_as_lm_eval_alone(model, tokenizer, tasks, scores, name):
    results = _simple_evaluate(model, tokenizer, tasks[name], batch_size=4)["results"][name]
    expected = {key: value for key, value in results.items() if "," in key}
    got = {}
    for score in scores.metrics:
        if score.task == name and score.metric not in ("margin", "ece"):
            metric, _, filter_name = score.metric.partition("@")
            got[f"{metric},{filter_name or 'none'}"] = score.value
            got[f"{metric}_stderr,{filter_name or 'none'}"] = "N/A" if score.stderr is None else score.stderr
    assert got == expected
    assert len(got) >= 4


def test_limit_and_examples_are_lm_evals(model, tokenizer, tasks):
    spec = QualitySpec(tasks=(tasks["choice"],), limit=7, num_fewshot=2, batch_size=3)
    score = evaluate(model, tokenizer, spec).get("choice", "acc")
    alone = _simple_evaluate(model, tokenizer, tasks["choice"], 3, limit=7, num_fewshot=2)["results"]["choice"]
    assert (score.value, score.stderr) == (alone["acc,none"], alone["acc_stderr,none"])
    assert score.n_items == len(score.items) == 7
    without = evaluate(model, tokenizer, dataclasses.replace(spec, num_fewshot=None))
    assert without.get("choice", "margin").items != evaluate(model, tokenizer, spec).get("choice", "margin").items


def test_items_are_in_the_tasks_order_and_average_to_the_value(model, tokenizer, tasks, scores):
    samples = _simple_evaluate(model, tokenizer, tasks["choice"], 4)["samples"]["choice"]
    acc = scores.get("choice", "acc")
    assert acc.items == [sample["acc"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    assert acc.n_items == 30
    assert sum(acc.items) / 30 == pytest.approx(acc.value)
    assert 0 < acc.value < 1


def test_values_that_are_no_mean_of_items_have_none(scores):
    for task, metric, n_items in (
        ("choice", "brier_score", 30),
        ("ending", "perplexity", 20),
        ("rolling", "word_perplexity", 10),
    ):
        score = scores.get(task, metric)
        assert score.items is None
        assert score.n_items == n_items
    assert scores.get("ending", "perplexity").stderr > 0
    assert scores.get("rolling", "word_perplexity").stderr is None
    answers = scores.get("answer", "exact_match@word")
    assert len(answers.items) == 20
    assert 0 < answers.value < 1


def test_directions_are_the_tasks(scores):
    directions = {(score.task, score.metric): score.higher_is_better for score in scores.metrics}
    assert directions[("choice", "acc")]
    assert directions[("choice", "margin")]
    assert not directions[("ending", "perplexity")]
    assert not directions[("text", "nll")]


@torch.no_grad()
def test_margin_is_the_right_choice_minus_the_best_wrong_one(model, tokenizer, tasks, scores):
    margins = []
    for line in Path(tasks["choice"]).with_suffix(".jsonl").read_text().splitlines():
        record = json.loads(line)
        log_p = model(torch.tensor([tokenizer(record["context"])["input_ids"]])).logits[0, -1].log_softmax(-1)
        of_choice = [log_p[VOCABULARY.index(choice)].item() for choice in record["choices"]]
        right = of_choice.pop(record["gold"])
        margins.append(right - max(of_choice))
    margin = scores.get("choice", "margin")
    assert margin.items == pytest.approx(margins, abs=1e-4)
    assert [item > 0 for item in margin.items] == [item == 1 for item in scores.get("choice", "acc").items]
    assert margin.stderr == pytest.approx(np.std(margins, ddof=1) / math.sqrt(30), rel=1e-3)


def test_margin_knows_answers_given_as_text_and_several_right_answers(model, tokenizer, tmp_path):
    records = [{"context": "the cat", "choices": ["saw", "ran", "slept"], "answer": "ran", "right": [0, 1]}] * 2
    settings = {"output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices"}
    by_text = _write_task(tmp_path, "by_text", records, doc_to_target="answer", **settings)
    several = _write_task(tmp_path, "several", records, doc_to_target="right", **settings)
    scores = evaluate(model, tokenizer, QualitySpec(tasks=(by_text, several)))
    with torch.no_grad():
        log_p = model(torch.tensor([tokenizer("the cat")["input_ids"]])).logits[0, -1].log_softmax(-1)
    saw, ran, slept = (log_p[VOCABULARY.index(word)].item() for word in ("saw", "ran", "slept"))
    assert scores.get("by_text", "margin").items == pytest.approx([ran - max(saw, slept)] * 2, abs=1e-4)
    assert scores.get("several", "margin").items == pytest.approx([max(saw, ran) - slept] * 2, abs=1e-4)


def test_task_data_that_changes_is_read_again(model, tokenizer, tmp_path):
    records = [{"context": "the cat", "choices": ["saw", "ran"], "gold": 0}] * 3
    settings = {"output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices"}
    spec = QualitySpec(tasks=(_write_task(tmp_path, "changing", records, doc_to_target="gold", **settings),))
    before, fingerprint = evaluate(model, tokenizer, spec), spec_fingerprint(spec)
    _write_task(tmp_path, "changing", [record | {"gold": 1} for record in records], doc_to_target="gold", **settings)
    after = evaluate(model, tokenizer, spec)
    assert after.get("changing", "acc").value == 1 - before.get("changing", "acc").value
    assert spec_fingerprint(spec) != fingerprint


def test_functions_beside_a_task_file_are_used_and_part_of_its_identity(model, tokenizer, tmp_path):
    records = [{"context": "the cat", "choices": ["saw", "ran"], "gold": 0}] * 2
    path = _write_task(tmp_path, "coded", records, output_type="multiple_choice", doc_to_choice="choices")
    with Path(path).open("a") as file:
        file.write("doc_to_text: !function helpers.prompt\ndoc_to_target: !function helpers.target\n")
    helpers = tmp_path / "helpers.py"
    helpers.write_text("def prompt(doc):\n    return doc['context']\n\n\ndef target(doc):\n    return doc['gold']\n")
    spec = QualitySpec(tasks=(path,))
    check_tasks(spec.tasks)
    assert evaluate(model, tokenizer, spec).get("coded", "margin").n_items == 2
    fingerprint = spec_fingerprint(spec)
    helpers.write_text(helpers.read_text() + "\n")
    assert spec_fingerprint(spec) != fingerprint


def test_packaged_task_is_loaded_from_its_own_file(model, tokenizer, monkeypatch):
    import datasets

    def load_dataset(path, name=None, **kwargs):
        assert (path, name) == ("allenai/ai2_arc", "ARC-Easy")
        question = {
            "id": "0",
            "question": "the cat",
            "choices": {"text": ["saw", "ran"], "label": ["A", "B"]},
            "answerKey": "B",
        }
        split = datasets.Dataset.from_list([question] * 3)
        return datasets.DatasetDict({"train": split, "validation": split, "test": split})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(
        "layerboost.evaluation.lm_eval_run._packaged_manager", lambda: pytest.fail("built lm-eval's whole index")
    )
    scores = evaluate(model, tokenizer, QualitySpec(tasks=("arc_easy",), limit=2))
    assert [(score.metric, score.n_items, score.primary) for score in scores.metrics] == [
        ("acc", 2, True),
        ("acc_norm", 2, False),
        ("margin", 2, False),
        ("ece", 2, False),
    ]


def test_group_counts_as_one_task_and_pairs_over_all_its_items(model, tokenizer, tasks, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    group = {
        "group": "both",
        "task": ["small", "large"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    rng = random.Random(5)
    for name, n in (("small", 5), ("large", 15)):
        path = _write_task(
            tmp_path,
            name,
            [{"context": s, "choices": rng.sample(WORDS, 2), "gold": 0} for s in _sentences(n, seed=n)],
            output_type="multiple_choice",
            doc_to_text="context",
            doc_to_choice="choices",
            doc_to_target="gold",
        )
        config = yaml.safe_load(Path(path).read_text())
        config["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / f"{name}.jsonl")
        Path(path).write_text(yaml.safe_dump(config))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("layerboost.evaluation.lm_eval_run._packaged_manager", lambda: manager)
    scores = evaluate(model, tokenizer, QualitySpec(tasks=("both", tasks["choice"]), batch_size=4))
    assert [(score.task, score.metric) for score in scores.primary()] == [("both", "acc"), ("choice", "acc")]
    acc = scores.get("both", "acc")
    assert acc.n_items == 20
    assert acc.items == scores.get("small", "acc").items + scores.get("large", "acc").items
    assert quality(scores)[0] == pytest.approx((acc.value + scores.get("choice", "acc").value) / 2)


def test_task_marked_as_unsafe_is_not_run(model, tokenizer, tmp_path):
    settings = {"output_type": "multiple_choice", "doc_to_text": "c", "doc_to_choice": ["a", "the"], "doc_to_target": 0}
    path = _write_task(tmp_path, "unsafe", [{"c": "cat"}], unsafe_code=True, **settings)
    with pytest.raises(ValueError, match="unsafe"):
        evaluate(model, tokenizer, QualitySpec(tasks=(path,)))


def test_task_that_lm_eval_cannot_load_is_named(model, tokenizer, tmp_path):
    path = _write_task(tmp_path, "broken", [{"c": "cat"}], output_type="guess", doc_to_text="c", doc_to_target="c")
    with pytest.raises(QualityError, match=r"quality\.tasks: .*broken\.yaml cannot be loaded .*guess"):
        evaluate(model, tokenizer, QualitySpec(tasks=(path,)))


def test_evaluation_leaves_everything_as_it_was(model, tokenizer, tasks, capsys):
    tokenizer.pad_token = None
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    model.train()
    try:
        evaluate(model, tokenizer, QualitySpec(tasks=tuple(tasks.values()), limit=2))
        assert model.training
    finally:
        model.eval()
    assert tokenizer.pad_token is None
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[2])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "%|" not in printed.err and "bootstrapping" not in printed.err


@torch.no_grad()
def _naive_nll(model, sequences: torch.Tensor) -> list[float]:
    return [model(input_ids=row[None], labels=row[None]).loss.item() for row in sequences]


@torch.no_grad()
def _naive_kl(base, model, sequences: torch.Tensor) -> list[float]:
    values = []
    for row in sequences:
        p, q = (m(input_ids=row[None]).logits[0, :-1].log_softmax(-1) for m in (base, model))
        values.append((p.exp() * (p - q)).sum(-1).mean().item())
    return values


def _sequences(n: int = 7, tokens: int = 20) -> torch.Tensor:
    return torch.randint(3, len(VOCABULARY), (n, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("logits_at_once", [1, 7 * len(VOCABULARY), 2**24])
def test_likelihood_and_divergence_equal_the_naive_loops(model, other, monkeypatch, logits_at_once):
    monkeypatch.setattr("layerboost.evaluation.likelihood._LOGITS_AT_ONCE", {"cpu": logits_at_once, "cuda": 0})
    sequences = _sequences()
    measured = score_sequences(other, sequences, base=model, batch_size=3)
    assert measured.nll == pytest.approx(_naive_nll(other, sequences), abs=1e-5)
    assert measured.kl == pytest.approx(_naive_kl(model, other, sequences), abs=1e-5)
    assert min(measured.kl) > 0.01
    assert score_sequences(model, sequences, base=model).kl == pytest.approx([0.0] * 7, abs=1e-7)
    assert score_sequences(model, sequences).kl is None


def test_logits_are_not_kept_for_all_positions(model, monkeypatch):
    monkeypatch.setattr("layerboost.evaluation.likelihood._LOGITS_AT_ONCE", {"cpu": 5 * len(VOCABULARY), "cuda": 0})
    monkeypatch.setattr("layerboost.evaluation.likelihood._CHUNKS_A_PRODUCT", {"cpu": 3, "cuda": 0})
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output[..., 0].numel()))
    try:
        score_sequences(model, _sequences(4, 30), batch_size=4)
    finally:
        handle.remove()
    assert max(rows) == 3 * 5
    assert sum(rows) >= 4 * 29


def test_family_that_caps_its_logits_is_scored_with_the_cap():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    gemma = Gemma2ForCausalLM(config).eval()
    assert score_sequences(gemma, _sequences()).nll == pytest.approx(_naive_nll(gemma, _sequences()), abs=1e-5)


def test_likelihood_of_a_text_is_over_its_first_packed_sequences(model, other, tokenizer, text):
    from layerboost.text.documents import pack, read_documents

    spec = QualitySpec(text=text, n_sequences=5, sequence_tokens=24, batch_size=2)
    scores = evaluate(other, tokenizer, spec, base=model)
    sequences = pack(read_documents(text), tokenizer, 24)
    assert [(score.task, score.metric) for score in scores.metrics] == [
        ("text", "nll"),
        ("text", "kl"),
        ("text", "ece"),
    ]
    assert scores.get("text", "nll").items == pytest.approx(_naive_nll(other, sequences[:5]), abs=1e-5)
    assert scores.get("text", "kl").items == pytest.approx(_naive_kl(model, other, sequences[:5]), abs=1e-5)
    assert scores.get("text", "nll").value == pytest.approx(np.mean(_naive_nll(other, sequences[:5])), abs=1e-5)
    everything = evaluate(other, tokenizer, dataclasses.replace(spec, n_sequences=None))
    assert everything.get("text", "nll").n_items == len(sequences) > 5


def test_sequences_longer_than_the_context_are_refused(model, tokenizer, text):
    with pytest.raises(QualityError, match=r"quality\.sequence_tokens: 129 .* at most 128"):
        evaluate(model, tokenizer, QualitySpec(text=text, sequence_tokens=129))


def test_scores_survive_json(scores):
    again = Scores.from_dict(json.loads(json.dumps(scores.to_dict())))
    assert again == scores
    with pytest.raises(QualityError, match=r"choice/nothing was not measured; there are choice/acc, choice/acc_norm"):
        again.get("choice", "nothing")


def test_quality_is_the_mean_of_one_metric_of_each_task(scores):
    primary = {score.task: score.metric for score in scores.primary()}
    accuracies = dict.fromkeys(("choice", "contexts", "ending"), "acc")
    assert primary == accuracies | {"rolling": "word_perplexity", "answer": "exact_match@first"}
    value, stderr = quality(scores)
    expected = [
        *(scores.get(task, "acc").value for task in accuracies),
        1 / scores.get("rolling", "word_perplexity").value,
        scores.get("answer", "exact_match@first").value,
    ]
    assert value == pytest.approx(sum(expected) / 5)
    assert stderr is None  # lm-eval reports no standard error for word perplexity
    without = Scores([score for score in scores.metrics if score.task in ("choice", "ending")])
    errors = [scores.get(task, "acc").stderr for task in ("choice", "ending")]
    assert quality(without)[1] == pytest.approx(math.hypot(*errors) / 2)


def _score(task: str, items: list[float], metric: str = "acc", higher: bool = True) -> MetricScore:
    stderr = float(np.std(items, ddof=1) / math.sqrt(len(items)))
    return MetricScore(task, metric, float(np.mean(items)), stderr, higher, items, primary=True)


def test_quality_of_a_text_is_a_probability():
    items = [1.0, 1.2, 1.4]
    scores = Scores([_score("text", items, "nll", higher=False)])
    value, stderr = quality(scores)
    assert value == pytest.approx(math.exp(-1.2))
    assert stderr == pytest.approx(math.exp(-1.2) * scores.metrics[0].stderr)
    later = [1.1, 1.3, 1.6]
    ratio, stderr = retained(scores, Scores([_score("text", later, "nll", higher=False)]))
    assert ratio == pytest.approx(math.exp(1.2 - np.mean(later)))
    assert stderr == pytest.approx(ratio * paired_difference(items, later).stderr)


def _retained(base: np.ndarray, other: np.ndarray) -> tuple[float, float | None]:
    return retained(Scores([_score("a", base.tolist())]), Scores([_score("a", other.tolist())]))


def test_retained_error_is_that_of_many_repetitions():
    def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        hardness = rng.normal(size=60)
        return 5 + hardness + 0.1 * rng.normal(size=60), 4 + hardness + 0.1 * rng.normal(size=60)

    ratios = np.array([_retained(*draw(seed))[0] for seed in range(2000)])
    base, other = draw(5)
    ratio, stderr = _retained(base, other)
    assert ratio == pytest.approx(other.mean() / base.mean())
    assert stderr == pytest.approx(ratios.std(), rel=0.3)


def test_retained_of_equal_models_is_exactly_one_and_of_a_base_at_zero_is_nothing():
    base = np.random.default_rng(0).random(20)
    assert _retained(base, base) == (1.0, 0.0)
    ratio, stderr = _retained(np.zeros(2), np.array([1.0, 0.0]))
    assert math.isnan(ratio)
    assert stderr is None


def test_retained_pairs_items_within_tasks_and_adds_tasks():
    rng = np.random.default_rng(0)

    def draw(n: int) -> tuple[list[float], list[float]]:
        base = rng.random(n) + 0.5
        return base.tolist(), (0.8 * base + 0.02 * rng.random(n)).tolist()

    first, second = draw(40), draw(90)
    one = retained(Scores([_score("a", first[0])]), Scores([_score("a", first[1])]))
    items, others = np.array(first[0]), np.array(first[1])
    ratio = others.mean() / items.mean()
    assert one == pytest.approx((ratio, (others - ratio * items).std(ddof=1) / math.sqrt(40) / items.mean()))
    base = Scores([_score("a", first[0]), _score("b", second[0])])
    ratio, stderr = retained(base, Scores([_score("a", first[1]), _score("b", second[1])]))
    assert ratio == pytest.approx((np.mean(first[1]) + np.mean(second[1])) / (np.mean(first[0]) + np.mean(second[0])))
    parts = [np.std(np.subtract(o, np.multiply(ratio, b)), ddof=1) / math.sqrt(len(b)) for b, o in (first, second)]
    assert stderr == pytest.approx(math.hypot(*parts) / (np.mean(first[0]) + np.mean(second[0])))
    assert retained(base, base) == (1.0, 0.0)


def test_retained_without_items_uses_the_errors_of_both():
    base = Scores([MetricScore("a", "acc", 0.8, 0.03, True, primary=True)])
    other = Scores([MetricScore("a", "acc", 0.6, 0.04, True, primary=True)])
    assert retained(base, other) == pytest.approx((0.75, math.hypot(0.04, 0.75 * 0.03) / 0.8))
    nothing = Scores([MetricScore("a", "acc", 0.0, 0.0, True, primary=True)])
    ratio, stderr = retained(nothing, other)
    assert math.isnan(ratio)
    assert stderr is None


def test_qualities_that_cannot_be_compared_are_refused():
    base = Scores([_score("a", [0.0, 1.0])])
    with pytest.raises(QualityError, match="same tasks"):
        retained(base, Scores([_score("b", [0.0, 1.0])]))
    with pytest.raises(QualityError, match="a/acc: items: 2 of the base against 3"):
        retained(base, Scores([_score("a", [0.0, 1.0, 1.0])]))
    with pytest.raises(QualityError, match="no quality metric"):
        quality(Scores())
    with pytest.raises(QualityError, match="a/brier_score is better when lower"):
        quality(Scores([_score("a", [0.0, 1.0], "brier_score", higher=False)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither tasks nor text"),
        ({"text": "x.txt", "limit": 0}, r"quality\.limit: 0 .* at least 1"),
        ({"text": "x.txt", "n_sequences": 0}, r"quality\.n_sequences: 0"),
        ({"text": "x.txt", "sequence_tokens": 1}, r"quality\.sequence_tokens: 1 .* at least 2"),
        ({"text": "x.txt", "batch_size": 0}, r"quality\.batch_size: 0"),
        ({"text": "x.txt", "num_fewshot": -1}, r"quality\.num_fewshot: -1"),
    ],
)
def test_spec_refuses_what_means_nothing(settings, message):
    with pytest.raises(QualityError, match=message):
        QualitySpec(**settings)


def test_unknown_names_are_refused_quickly_with_the_nearest_ones():
    start = time.perf_counter()
    with pytest.raises(UnknownTaskError, match=r"'arc_esy' .*arc_easy.*'helaswag' .*hellaswag") as error:
        check_tasks(["arc_esy", "mmlu", "helaswag"])
    assert time.perf_counter() - start < 3
    assert "mmlu" not in str(error.value)
    check_tasks(["arc_easy", "hellaswag", "mmlu", "ai2_arc", "wikitext", "lambada_openai"])


def test_names_given_twice_or_reserved_are_refused(tmp_path):
    with pytest.raises(UnknownTaskError, match="'arc_easy' is given twice"):
        check_tasks(["arc_easy", "arc_easy"])
    with pytest.raises(TaskFileError, match="'text', a reserved name"):
        check_tasks([_write_task(tmp_path, "text", [{"c": "cat"}])])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file .*task.yaml"),
        ("- a\n", "holds no fields"),
        ("a: [\n", "is not YAML"),
        ("group: all\ntask: [a, b]\n", "is no task"),
        ("task: a\ndoc_to_txt: b\n", "unknown field 'doc_to_txt'; did you mean doc_to_text"),
        ("task: a\ninclude: other.yaml\n", "no file .*other.yaml .included by .*task.yaml"),
        ("task: a\ninclude: task.yaml\n", "includes itself"),
        (
            "task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n",
            "gone.jsonl, which is missing",
        ),
    ],
)
def test_bad_task_files_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "task.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TaskFileError, match=message) as error:
        check_tasks([str(path)])
    assert "\n" not in str(error.value)


def test_data_named_by_an_included_file_lies_beside_that_file(model, tokenizer, tmp_path):
    settings = {"output_type": "multiple_choice", "doc_to_text": "c", "doc_to_choice": ["a", "the"], "doc_to_target": 0}
    _write_task(tmp_path / "common", "common", [{"c": "cat"}, {"c": "dog"}], **settings)
    path = tmp_path / "own.yaml"
    path.write_text("task: own\ninclude: common/common.yaml\n")
    spec = QualitySpec(tasks=(str(path),))
    check_tasks(spec.tasks)
    assert evaluate(model, tokenizer, spec).get("own", "acc").n_items == 2
    fingerprint = spec_fingerprint(spec)
    (tmp_path / "common" / "common.jsonl").write_text('{"c": "bird"}\n')
    assert spec_fingerprint(spec) != fingerprint


def test_fingerprint_is_of_contents_and_numbers(tmp_path, tasks, text):
    spec = QualitySpec(tasks=(tasks["choice"], "arc_easy"), text=text, limit=5)
    moved = tmp_path / "moved"
    moved.mkdir()
    for source in (text, tasks["choice"], str(Path(tasks["choice"]).with_suffix(".jsonl"))):
        (moved / Path(source).name).write_bytes(Path(source).read_bytes())
    elsewhere = dataclasses.replace(
        spec, tasks=(str(moved / "choice.yaml"), "arc_easy"), text=str(moved / Path(text).name)
    )
    assert len(spec_fingerprint(spec)) == 64
    assert spec_fingerprint(elsewhere) == spec_fingerprint(spec)
    changes = {
        "limit": 6,
        "n_sequences": 3,
        "sequence_tokens": 64,
        "num_fewshot": 1,
        "tasks": ("arc_easy",),
        "text": None,
    }
    changed = {spec_fingerprint(dataclasses.replace(spec, **{name: value})) for name, value in changes.items()}
    assert len(changed | {spec_fingerprint(spec)}) == len(changes) + 1


def _assert_scores_equal(found: Scores, expected: Scores) -> None:
    assert [(m.task, m.metric, m.primary, m.n_items) for m in found.metrics] == [
        (m.task, m.metric, m.primary, m.n_items) for m in expected.metrics
    ]
    for mine, theirs in zip(found.metrics, expected.metrics, strict=True):
        if mine.metric in ("acc", "acc_norm", "exact_match"):
            assert (mine.value, mine.stderr, mine.items) == (theirs.value, theirs.stderr, theirs.items)
        else:
            assert mine.value == pytest.approx(theirs.value, rel=1e-5, abs=1e-6), (mine.task, mine.metric)
            assert (mine.items is None) == (theirs.items is None)
            assert mine.items is None or mine.items == pytest.approx(theirs.items, rel=1e-4, abs=1e-5)


PLANS = [Plan.parse(plan, 4) for plan in ("SS", "NS", "SW", "LS", "NN")]


def test_plans_judged_together_score_as_each_plans_model_alone(model, tokenizer, tasks, text):
    spec = QualitySpec(
        tasks=tuple(tasks.values()), text=text, n_sequences=6, sequence_tokens=32, batch_size=4, num_fewshot=1
    )
    together = PlanEvaluation(model, tokenizer, spec).run(PLANS)
    for plan, found in zip(PLANS, together, strict=True):
        variant = model if str(plan) == "SS" else convert(model, plan)
        _assert_scores_equal(found, evaluate(variant, tokenizer, spec, base=model))


def test_parts_of_the_work_put_together_are_the_whole(model, tokenizer, tasks, text):
    spec = QualitySpec(tasks=(tasks["choice"], tasks["rolling"]), text=text, n_sequences=6, sequence_tokens=32)
    evaluation = PlanEvaluation(model, tokenizer, spec)
    whole = evaluation.run(PLANS[:2])
    log_p = torch.zeros(2, len(evaluation.benchmarks.requests), dtype=torch.float64)
    greedy = torch.ones(log_p.shape, dtype=torch.bool)
    for first in range(0, len(evaluation.items), 7):
        items = evaluation.items[first : first + 7]
        asked = [index for item in items for index in item.requests]
        part = evaluation.answer(PLANS[:2], items)
        log_p[:, asked], greedy[:, asked] = part.log_p[:, asked], part.greedy[:, asked]
    texts = [evaluation.read_text(PLANS[:2], torch.arange(6)[part]) for part in (slice(4), slice(4, 6))]
    for i, plan in enumerate(PLANS[:2]):
        said = tuple(torch.cat([getattr(part, name)[i] for part in texts]) for name in ("nll", "kl", "gaps"))
        _assert_scores_equal(evaluation.scores(plan, (log_p[i], greedy[i]), said), whole[i])


def test_only_the_likelihood_is_the_likelihood_of_everything(model, tokenizer, tasks, text):
    every = QualitySpec(text=text, n_sequences=6, sequence_tokens=32, batch_size=2)
    alone = dataclasses.replace(every, likelihood_only=True)
    found, whole = (PlanEvaluation(model, tokenizer, spec).run(PLANS) for spec in (alone, every))
    for plan, only, of_all in zip(PLANS, found, whole, strict=True):
        assert only.metrics == [of_all.get("text", "nll")], "the same numbers, in the same order"
        variant = model if plan.is_untouched else convert(model, plan)
        apart = evaluate(variant, tokenizer, alone, base=model)
        assert [metric.metric for metric in apart.metrics] == ["nll"]
        assert apart.get("text", "nll").items == pytest.approx(only.get("text", "nll").items, rel=1e-5)
    assert spec_fingerprint(alone) != spec_fingerprint(every)


def test_the_fingerprint_of_a_spec_that_measures_everything_is_that_of_earlier_versions():
    spec = QualitySpec(tasks=("arc_easy",), limit=7)
    assert spec_fingerprint(spec) == hashlib.sha256(
        json.dumps(
            {
                "tasks": [task_identity("arc_easy")],
                "limit": 7,
                "text": None,
                "n_sequences": 64,
                "sequence_tokens": 512,
                "batch_size": 8,
                "num_fewshot": None,
                "retrieval": [],
            },
            sort_keys=True,
        ).encode()
    ).hexdigest()  # fmt: skip


def test_some_items_score_as_lm_eval_scores_those_samples(model, tokenizer, tasks):
    spec = QualitySpec(tasks=(tasks["choice"], tasks["ending"]))
    evaluation = PlanEvaluation(model, tokenizer, spec)
    some = [item for item in evaluation.items if item.doc_id in (1, 4, 5, 11)]
    answers = evaluation.answer([PLANS[0]], some)
    found = evaluation.scores(PLANS[0], (answers.log_p[0], answers.greedy[0]), None, some)
    whole = evaluate(model, tokenizer, spec)
    for task, metric in (("choice", "acc"), ("choice", "margin"), ("ending", "acc")):
        items = whole.get(task, metric).items
        assert found.get(task, metric).items == pytest.approx([items[i] for i in (1, 4, 5, 11)], abs=1e-5)


def test_tasks_without_chosen_items_are_not_asked(model, tokenizer, tasks):
    evaluation = PlanEvaluation(
        model, tokenizer, QualitySpec(tasks=(tasks["choice"], tasks["ending"], tasks["answer"]))
    )
    assert evaluation.generating == ["answer"]
    some = [item for item in evaluation.items if item.task == "choice"][:5]
    answers = evaluation.answer([PLANS[0]], some)
    found = evaluation.scores(PLANS[0], (answers.log_p[0], answers.greedy[0]), None, some)
    assert {(score.task, score.n_items) for score in found.metrics} == {("choice", 5)}


def test_contexts_too_long_for_the_model_lose_their_beginning_as_in_lm_eval(model, tokenizer, tmp_path):
    n_positions = model.config.max_position_embeddings
    path = _write_task(
        tmp_path,
        "long",
        [{"context": s, "choices": ["cat", "big small red"], "gold": 0} for s in _sentences(4, 9, words=n_positions)],
        output_type="multiple_choice",
        doc_to_text="context",
        doc_to_choice="choices",
        doc_to_target="gold",
    )
    spec = QualitySpec(tasks=(path,))
    (found,) = PlanEvaluation(model, tokenizer, spec).run(PLANS[:1])
    _assert_scores_equal(found, evaluate(model, tokenizer, spec))


def test_real_model_scores_as_lm_eval_and_transformers_do(shared_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from layerboost.text.documents import pack, read_documents

    folder = shared_dir / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    records = (shared_dir / "data" / "name_cloze_present.jsonl").read_text().splitlines()[:20]
    path = _write_task(
        tmp_path,
        "name_cloze",
        [json.loads(record) for record in records],
        output_type="multiple_choice",
        doc_to_text="context",
        doc_to_choice="choices",
        doc_to_target="gold",
        target_delimiter="",
    )
    text = str(shared_dir / "data" / "tinystories_val.txt")
    spec = QualitySpec(tasks=(path,), text=text, n_sequences=48, sequence_tokens=512)
    scores = evaluate(model, tokenizer, spec)
    alone = _simple_evaluate(model, tokenizer, path, spec.batch_size)["results"]["name_cloze"]
    assert scores.get("name_cloze", "acc").value == alone["acc,none"] > 0.5
    sequences = pack(read_documents(text), tokenizer, 512, limit_sequences=48)
    assert scores.get("text", "nll").items == pytest.approx(_naive_nll(model, sequences), abs=1e-4)
    assert scores.get("text", "nll").value == pytest.approx(1.43, abs=0.03)  # the value is published with the model
