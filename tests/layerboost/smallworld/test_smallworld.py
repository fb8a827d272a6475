"""Tests the small world: its text, its benchmarks, its training script and its committed model."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from layerboost.convert import convert
from layerboost.evaluation.evaluate import evaluate
from layerboost.evaluation.scores import QualitySpec
from layerboost.plan import Plan, Treatment
from layerboost.smallworld import train as training
from layerboost.smallworld import world
from layerboost.smallworld.benchmarks import GENERATION_TASKS, N_CHOICES, N_ITEMS, TASKS, items, tokens
from layerboost.smallworld.world import SEPARATOR, SPLITS, corpus, document, documents
from layerboost.smallworld.write import DATA_DIR, render

CHANCE = {"smallworld_holder": 1 / 4, "smallworld_recall": 1 / 4, "smallworld_agreement": 1 / 2}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(training.MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(training.MODEL_DIR, dtype=torch.float32).eval()


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, n_items: int) -> float:
    """Returns the share of items whose right choice has the highest log-likelihood after the context."""
    right = 0
    for item in items(task, n_items):
        scores = []
        context = tokenizer(item["context"])["input_ids"]
        for choice in item["choices"]:
            ids = torch.tensor([context + tokenizer(choice)["input_ids"]])
            with torch.no_grad():
                log_probabilities = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            positions = torch.arange(len(context) - 1, ids.shape[1] - 1)
            scores.append(log_probabilities[positions, ids[0, len(context) :]].sum().item())
        right += max(range(len(scores)), key=scores.__getitem__) == item["gold"]
    return right / n_items


def silence_attention(model: PreTrainedModel, layers: list[int]) -> list[torch.utils.hooks.RemovableHandle]:
    """Zeroes the attention output of some layers until the handles are removed."""
    return [
        model.model.layers[layer].self_attn.o_proj.register_forward_hook(lambda _module, _args, out: out * 0)
        for layer in layers
    ]


def test_documents_depend_on_split_and_index_alone() -> None:
    first = list(islice(documents("train"), 20))
    assert first == [document("train", index) for index in range(20)]
    assert list(islice(documents("train", start=5), 3)) == first[5:8]
    assert all("\n" not in text and SEPARATOR not in text for text in first)


def test_splits_share_no_document() -> None:
    texts = {split: set(islice(documents(split), 300)) for split in SPLITS}
    assert len(set.union(*texts.values())) == 300 * len(SPLITS)


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="split: unknown value 'test'"):
        document("test", 0)


def test_names_and_things_are_as_told_throughout_a_document() -> None:
    for index in range(50):
        drawn = world.scene("train", index)
        owners, names = dict(drawn.owner), dict(drawn.second_name)
        found = tokens(document("train", index))
        for word, following in itertools.pairwise(found):
            if word in names:
                assert following == names[word]
        for word, of, following in zip(found, found[1:], found[2:], strict=False):
            if word in owners and of == "of":
                assert following == owners[word]
        assert 40 < len(found) < 200


def test_corpus_holds_whole_documents() -> None:
    text = corpus("validation", 5000)
    assert len(text) >= 5000
    assert text.rstrip("\n").split(f"\n{SEPARATOR}\n") == [
        document("validation", index) for index in range(text.count(SEPARATOR) + 1)
    ]


def test_words_of_different_roles_differ() -> None:
    roles = (world.FIRST_NAMES, world.SECOND_NAMES, world.THINGS, world.PLACES, world.QUALITIES)
    assert sum(map(len, roles)) == len(set().union(*roles))


def test_committed_data_is_what_the_generator_yields() -> None:
    rendered = render()
    committed = {path.relative_to(DATA_DIR).as_posix() for path in DATA_DIR.rglob("*") if path.is_file()}
    assert committed == set(rendered)
    for name, text in rendered.items():
        assert (DATA_DIR / name).read_bytes() == text.encode(), name


@pytest.mark.parametrize("task", TASKS)
def test_items_are_well_formed_and_balanced(task: str) -> None:
    made = items(task)
    assert made == items(task)
    assert len({item["context"] for item in made}) == len(made) == N_ITEMS
    n_choices = 2 if task == "smallworld_agreement" else N_CHOICES
    for item in made:
        assert len(set(item["choices"])) == n_choices
        assert all(choice.startswith(" ") and choice[1:].isalpha() for choice in item["choices"])
        assert not item["context"].endswith(" ")
        assert item["distance_tokens"] > 0
    golds = Counter(item["gold"] for item in made)
    assert max(golds.values()) - min(golds.values()) <= 4


def test_the_holder_is_the_only_choice_that_the_context_holds() -> None:
    for item in items("smallworld_holder"):
        context = tokens(item["context"])
        assert [choice.strip() in context for choice in item["choices"]].count(True) == 1
        assert item["choices"][item["gold"]].strip() in context


def test_recall_items_cannot_be_guessed_from_mentions() -> None:
    made = items("smallworld_recall")
    contexts = [tokens(item["context"]) for item in made]
    last_mention, most_mentions = Counter(), 0
    for item, context in zip(made, contexts, strict=True):
        choices = [choice.strip() for choice in item["choices"]]
        assert set(choices) <= set(context)
        recency = sorted(choices, key=lambda word, context=context: context[::-1].index(word))
        last_mention[recency.index(choices[item["gold"]])] += 1
        most_mentions += max(choices, key=context.count) == choices[item["gold"]]
    assert max(last_mention.values()) - min(last_mention.values()) <= 2
    assert most_mentions / len(made) < 0.5


def test_what_is_to_be_written_stands_in_the_context_at_a_distance() -> None:
    made = items("smallworld_naming")
    assert len({item["context"] for item in made}) == N_ITEMS
    for item in made:
        context, first = tokens(item["context"]), item["context"].split()[-1]
        second = item["answer"].split()[0]
        assert {after for name, after in itertools.pairwise(context) if name == first} == {second}
        assert item["distance_tokens"] >= 16


def test_agreement_items_cannot_be_guessed_from_the_last_noun() -> None:
    same, forms = 0, Counter()
    for item in (made := items("smallworld_agreement")):
        plural = item["choices"][item["gold"]] == " are"
        same += plural == item["context"].endswith("s")
        forms[plural] += 1
    assert abs(same / len(made) - 0.5) < 0.05
    assert abs(forms[True] - forms[False]) <= 4


@pytest.mark.parametrize("task", [*TASKS, *GENERATION_TASKS])
def test_task_files_point_beside_themselves(task: str) -> None:
    path: Path = DATA_DIR / "tasks" / f"{task}.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["task"] == task
    assert config["target_delimiter"] == ""
    lines = (path.parent / config["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == items(task)


def test_tokenizer_keeps_text_and_makes_words_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    for text in (document("train", 3), "Any text: café, 1+1=2\n\ttabs"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(SEPARATOR)["input_ids"] == [0]
    for task in TASKS:
        for item in items(task, 50):
            assert all(len(tokenizer(choice)["input_ids"]) == 1 for choice in item["choices"])
    text = document("train", 4)
    assert len(tokenizer(text)["input_ids"]) <= len(tokens(text)) + 3


def test_a_few_training_steps_lower_the_loss(tmp_path: Path) -> None:
    options = "--layers 2 --hidden 32 --ffn 64 --heads 2 --kv-heads 1 --rows 2 --row-tokens 64 --no-bf16 --lr 1e-2"
    schedule = "--warmup 2 --log-every 100 --decay-steps 10"
    losses = []
    for steps in (1, 40):
        out = tmp_path / str(steps)
        training.main([*f"{options} {schedule} --steps {steps}".split(), "--out", str(out)])
        losses.append(json.loads((out / "training.json").read_text())["validation_nll_nats_per_token"])
        assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= {
            path.name for path in out.iterdir()
        }
    assert losses[1] < losses[0] - 1.0


def test_training_is_reproducible() -> None:
    options = "--layers 1 --hidden 32 --ffn 32 --heads 2 --kv-heads 1 --rows 2 --row-tokens 64 --steps 3 --warmup 1"
    args = training.parse_args(options.split())
    tokenizer = training.train_tokenizer(args.vocab_size)
    weights = []
    for _ in range(2):
        model = training.build_model(len(tokenizer), args)
        training.train(model, tokenizer, args)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_committed_model_was_made_with_the_default_arguments(model: PreTrainedModel) -> None:
    record = json.loads((training.MODEL_DIR / "training.json").read_text())
    defaults = {key: value for key, value in vars(training.parse_args([])).items() if key != "out"}
    assert record["arguments"] == defaults
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert sum(path.stat().st_size for path in training.MODEL_DIR.iterdir()) < 12_000_000


@pytest.mark.parametrize("task", TASKS)
def test_committed_model_needs_its_attention(
    task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    n_items = 60
    whole = accuracy(model, tokenizer, task, n_items)
    handles = silence_attention(model, list(range(model.config.num_hidden_layers)))
    silent = accuracy(model, tokenizer, task, n_items)
    for handle in handles:
        handle.remove()
    assert whole > CHANCE[task] + 0.25
    assert abs(silent - CHANCE[task]) < 0.2


def test_committed_model_writes_what_a_window_forgets(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    spec = QualitySpec(tasks=(str(DATA_DIR / "tasks" / "smallworld_naming.yaml"),), limit=24)
    windowed = convert(model, Plan.uniform(Treatment.WINDOW, model.config.num_hidden_layers, 16))
    whole, short = (evaluate(m, tokenizer, spec).primary()[0] for m in (model, windowed))
    assert whole.generated
    assert whole.value > 0.75 > 0.5 > short.value
