"""Tests recipes: the documented example, defaults, paths, identity, and a helpful line for every mistake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from orchestrator.recipe.errors import InputError, nearest
from orchestrator.recipe.fields import resolve_sequence_tokens
from orchestrator.recipe.load import load_recipe, recipe_from_dict
from orchestrator.recipe.recipe import Recipe

EXAMPLE = """
model: {path: Qwen/Qwen3-4B, revision: main, dtype: bfloat16}
quality: {tasks: [arc_easy, hellaswag, ./tasks/recall.yaml], limit: 500, text: data.txt}     # with a remark
sensitivity: {treatments: [none], score: benchmark}
search: {trials: 40, middle: linear_window, window: 64, seed: 0}
healing: {tokens: 10_000_000, text: HuggingFaceFW/fineweb-edu, candidates: 3, method: lora, rank: 16, zero_stage: 2}
throughput: {engine: transformers, concurrency: [50, 100, 200], prompt_tokens: 512, new_tokens: 128}
placement: {workers: auto, gpus_per_worker: 1}
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(EXAMPLE)
    return path


def test_documented_example(example):
    recipe = load_recipe(example)
    assert recipe.model.path == "Qwen/Qwen3-4B"
    assert recipe.healing.tokens == 10_000_000
    assert recipe.throughput.concurrency == (50, 100, 200)
    assert recipe.placement.gpus_per_worker == 1
    assert recipe.quality.tasks == ("arc_easy", "hellaswag", str(example.parent / "tasks/recall.yaml"))
    assert recipe.search.sampler == "tpe"


def test_resolved_yaml_loads_to_an_equal_recipe(example, tmp_path):
    recipe = load_recipe(example, ["search.plans=[SSLN]", "search.remove_below=[0, 0.1]"])
    resolved = tmp_path / "elsewhere" / "resolved.yaml"
    resolved.parent.mkdir()
    resolved.write_text(recipe.resolved_yaml())
    assert load_recipe(resolved) == recipe


def test_recipe_is_frozen(example):
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(example).search.window = 3


def test_overrides_are_yaml_values(example):
    overrides = ["healing.tokens=1e6", "search.plans=[sslw]", "healing.learning_rate=1e-3", "quality.limit=null"]
    recipe = load_recipe(example, overrides)
    assert recipe.healing.tokens == 1_000_000
    assert recipe.search.plans == ("SSLW",)
    assert recipe.healing.learning_rate == 1e-3
    assert recipe.quality.limit is None


def test_an_override_may_begin_a_section(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: m}\nquality: {tasks: [t]}\nsearch:\n")
    assert load_recipe(path, ["search.trials=3"]).search.trials == 3


def test_paths_beside_the_recipe_come_before_the_current_directory(tmp_path, monkeypatch):
    beside, here = tmp_path / "recipes", tmp_path / "here"
    for folder, names in ((beside, ("both.txt",)), (here, ("both.txt", "only.txt", "arc_easy"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("text")
    (beside / "r.yaml").write_text(
        "model: {path: ./missing}\nquality: {text: both.txt, tasks: [arc_easy]}\nhealing: {tokens: 9, text: only.txt}"
    )
    monkeypatch.chdir(here)
    recipe = load_recipe("../recipes/r.yaml")
    assert recipe.quality.text == str(beside / "both.txt")
    assert [text.path for text in recipe.healing.text] == [str(here / "only.txt")]
    assert recipe.model.path == str(beside / "missing")
    assert recipe.quality.tasks == ("arc_easy",), "a bare task name is no path"


def test_hub_names_and_urls_stay(example, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(example, ["quality.text=s3://bucket/text.jsonl"])
    assert recipe.quality.text == "s3://bucket/text.jsonl"
    assert recipe.healing.text[0].path == "HuggingFaceFW/fineweb-edu"


WRONG = [
    ("search.widnow=3", "search.widnow", "3", "did you mean window?"),
    ("healing.window=3", "healing.window", "3", "did you mean search.window?"),
    ("serach.window=3", "serach", "window", "did you mean search?"),
    ("search.foo=1", "search.foo", "1", "known are method"),
    ("search.window=0", "search.window", "0", "greater than or equal to 1"),
    ("search.window=true", "search.window", "True", "must be a number"),
    ("search.window=wide", "search.window", "wide", "integer"),
    ("search.trials=-1", "search.trials", "-1", "greater than or equal to 0"),
    ("search.remove_below=[1, 0]", "search.remove_below", "[1, 0]", "swap"),
    ("search.remove_below=0.1", "search.remove_below", "0.1", "list"),
    ("search.remove_below=[1]", "search.remove_below[1]", "missing", "[low, high]"),
    ("search.remove_below=[0, .nan]", "search.remove_below[1]", "nan", "finite"),
    ("search.plans=[SSX]", "search.plans[0]", "SSX", "letters S"),
    ("search.plans=[SS, ss]", "search.plans", "ss", "twice"),
    ("search.sampler=tpee", "search.sampler", "tpee", "did you mean tpe?"),
    ("healing.tokens=-1", "healing.tokens", "-1", "greater than or equal to 0"),
    ("healing.zero_stage=4", "healing.zero_stage", "4", "less than or equal to 3"),
    ("healing.text=null", "healing.text", "missing", "give a file"),
    ("healing.text=data.txt", "healing.text", "data.txt", "give another text"),
    ("healing.text=[{path: a.txt, wieght: 2}]", "healing.text[0].wieght", "2", "did you mean weight?"),
    ("healing.text=[{path: a.txt}, {path: data.txt}]", "healing.text[1].path", "data.txt", "give another text"),
    ("healing.text=[{weight: 2}]", "healing.text[0].path", "missing", "give a file or a hub name"),
    ("healing.text=[{path: a.txt, weight: 0}]", "healing.text[0].weight", "0", "greater than 0"),
    ("healing.text=[{path: a.txt, format: chats}]", "healing.text[0].format", "chats", "did you mean chat?"),
    ("healing.text=[{path: a.txt, temperature: 1}]", "healing.text[0].temperature", "1", "of sampled text only"),
    ("healing.text=[{format: sampled}]", "healing.text[0].weight", "missing", "give a number above 0"),
    ("healing.text=[{format: sampled, weight: 1, path: b}]", "healing.text[0].path", "b", "leave the path out"),
    ("healing.text=[{format: sampled, weight: 1, split: b}]", "healing.text[0].split", "b", "leave it out"),
    (
        "healing.text=[{format: sampled, weight: 1}, {format: sampled, weight: 2}]",
        "healing.text",
        "sampled",
        "keep one source",
    ),
    ("healing.text=3", "healing.text", "3", "must be a list"),
    ("healing.divergence=kl", "healing.divergence", "kl", "forward_kl, reverse_kl, jensen_shannon"),
    ("healing.divergence_weight=0", "healing.divergence_weight", "0", "leaves no loss"),
    ("healing.hidden_weight=-1", "healing.hidden_weight", "-1", "greater than or equal to 0"),
    ("healing.window_dropout=1.5", "healing.window_dropout", "1.5", "less than or equal to 1"),
    ("healing.stop_when_flat=1", "healing.stop_when_flat", "1", "less than 1"),
    ("healing.curve=[0.1, 1]", "healing.curve[1]", "1", "less than 1"),
    ("healing.curve=[0.1, 0.1]", "healing.curve", "0.1", "twice"),
    ("healing.transfer=by_layers", "healing.transfer", "by_layers", "did you mean by_layer?"),
    ("healing.documents=apat", "healing.documents", "apat", "did you mean apart?"),
    ("healing.teacher_revision=v2", "healing.teacher_revision", "v2", "has no healing.teacher"),
    ("healing.baselines=[cosin]", "healing.baselines[0]", "cosin", "is unknown; use one of window"),
    ("healing.baselines=[last, last]", "healing.baselines", "last", "twice"),
    ("sensitivity.score=nl", "sensitivity.score", "nl", "did you mean nll?"),
    ("sensitivity.treatments=[softmax]", "sensitivity.treatments[0]", "softmax", "none, affine, window, linear_window"),
    ("sensitivity.treatments=[]", "sensitivity.treatments", "[]", "at least 1"),
    ("quality.tasks=arc_easy", "quality.tasks", "arc_easy", "[arc_easy]"),
    ("quality.tasks=[]", "sensitivity.score", "benchmark", "needs quality.tasks"),
    ("throughput.engine=vlm", "throughput.engine", "vlm", "did you mean vllm?"),
    ("throughput.environment=venv", "throughput.environment", "venv", "set throughput.engine: vllm"),
    ("throughput.repeats=2", "throughput.repeats", "2", "greater than or equal to 3"),
    ("throughput.concurrency=[1, 0]", "throughput.concurrency[1]", "0", "greater than or equal to 1"),
    ("placement.workers=0", "placement.workers", "0", "auto or a whole number"),
    ("placement.gpus_per_worker=1.5", "placement.gpus_per_worker", "1.5", "a worker computes on one GPU"),
    ("placement.gpus_per_worker=2", "placement.gpus_per_worker", "2", "a worker computes on one GPU"),
    ("placement.gpus_per_worker=-1", "placement.gpus_per_worker", "-1", "auto or a number"),
    ("placement.labels={evalute: a}", "placement.labels.evalute", "a", "did you mean evaluate?"),
    ("model.path=", "model.path", "missing", "string"),
    ("model.path=''", "model.path", "(empty)", "must not be empty"),
    ("model.device=gpu", "model.device", "gpu", "cuda"),
    ("search=3", "--set", "search=3", "section.field=value"),
    ("a.b.c=3", "--set", "a.b.c=3", "section.field=value"),
    ("search.plans=[S", "--set search.plans", "[S", "YAML"),
]


def test_an_environment_is_named_by_its_folder(example):
    by_python, by_folder = (
        load_recipe(example, ["throughput.engine=vllm", f"throughput.environment={given}"])
        for given in ("/venvs/vllm/bin/python3", "/venvs/vllm")
    )
    assert by_python.throughput.environment == by_folder.throughput.environment == "/venvs/vllm"
    (example.parent / "venv" / "bin").mkdir(parents=True)
    (example.parent / "venv" / "bin" / "python").symlink_to("/usr/bin/env")
    beside = load_recipe(example, ["throughput.engine=vllm", "throughput.environment=venv/bin/python"])
    assert beside.throughput.environment == str(example.parent / "venv")


@pytest.mark.parametrize(("override", "field", "value", "remedy"), WRONG, ids=[case[0] for case in WRONG])
def test_wrong_values(example, override, field, value, remedy):
    with pytest.raises(InputError) as caught:
        load_recipe(example, [override])
    assert caught.value.field == field
    assert value in str(caught.value.value if caught.value.value is not None else "missing") or value == "(empty)"
    assert str(caught.value).startswith(f"{field}: ")
    assert value in str(caught.value)
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_thresholds_crossed_against_each_other(example):
    overlapping = ["search.remove_below=[0, 0.5]", "search.keep_above=[0.2, 1]"]
    assert load_recipe(example, overlapping).search.keep_above == (0.2, 1.0)
    with pytest.raises(InputError, match=r"search.remove_below: \[0.5, 0.6\].*lower the first or raise the second"):
        load_recipe(example, ["search.remove_below=[0.5, 0.6]", "search.keep_above=[0.1, 0.4]"])


@pytest.mark.parametrize("score", ["nll", "kl", "cosine"])
def test_text_scores_need_a_text(score):
    data = {"model": {"path": "m"}, "quality": {"tasks": ["t"]}, "sensitivity": {"score": score}}
    with pytest.raises(InputError, match=f"sensitivity.score: {score}: needs quality.text"):
        recipe_from_dict(data)
    data["quality"] = {"text": "t.txt"}
    assert recipe_from_dict(data).sensitivity.score == score


@pytest.mark.parametrize(
    ("text", "value", "remedy"),
    [
        ("model: {path: m", "line 1", "not valid YAML"),
        ("- a\n- b\n", "r.yaml", "must hold the sections"),
        ("model: {path: m}\nmodel: {path: n}\n", "line 2", "stands twice"),
        ("", "r.yaml", "must hold the sections"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, value, remedy):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert caught.value.field == "recipe"
    assert value in str(caught.value.value)
    assert remedy in caught.value.remedy


def test_a_missing_recipe_names_its_neighbour(example):
    with pytest.raises(InputError, match=r"did you mean .*recipe\.yaml"):
        load_recipe(example.with_name("recipes.yaml"))


def test_a_misspelling_is_named_and_not_the_key_that_it_hides():
    with pytest.raises(InputError, match=r"model.pth: m: unknown key; did you mean path\?"):
        recipe_from_dict({"model": {"pth": "m"}, "quality": {"tasks": ["t"]}})


def test_missing_section_is_named():
    with pytest.raises(InputError, match=r"quality: missing: needed"):
        recipe_from_dict({"model": {"path": "m"}})
    with pytest.raises(InputError, match=r"quality: missing: give quality\.tasks"):
        recipe_from_dict({"model": {"path": "m"}, "quality": {}})


def test_long_values_are_shortened_to_one_line():
    error = InputError("a", "x\n" * 500, "no")
    assert len(str(error)) < 250
    assert "\n" not in str(error)


def test_nearest_ignores_case_and_knows_when_nothing_is_near():
    assert nearest("WINDOWS", ["window", "seed"]) == "did you mean window?"
    assert nearest("zzz", ["window", "seed"]) == ""


def test_sequence_tokens_follow_the_context():
    assert resolve_sequence_tokens(None, 4096) == 512
    assert resolve_sequence_tokens(None, 128) == 128
    assert resolve_sequence_tokens(None, None) == 512
    assert resolve_sequence_tokens(64, 128) == 64


def test_texts_are_a_mixture_that_survives_the_round_trip(example, tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}")
    override = (
        "healing.text=[{path: ./web.txt, weight: 3}, {path: chats.jsonl, format: chat, split: b},"
        " {format: sampled, weight: 1, temperature: 0.8}]"
    )
    recipe = load_recipe(example, [override, "healing.split=a", "healing.field=body"])
    found = dict(recipe.healing.named_sources())
    web, chats, sampled = found.values()
    assert list(found)[1] == "healing.text[1].path"
    assert (web.path, web.weight, web.split, web.field) == (str(tmp_path / "web.txt"), 3.0, "a", "body")
    assert (chats.path, chats.weight, chats.split) == (str(tmp_path / "chats.jsonl"), 1.0, "b")
    assert (sampled.path, sampled.temperature) == (None, 0.8)
    source = chats.source()
    assert (source.path, source.weight, source.split, source.field, source.format) == (
        chats.path,
        1.0,
        "b",
        "body",
        "chat",
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.resolved_yaml())
    assert load_recipe(resolved) == recipe


def test_the_healing_spec_has_what_the_recipe_says_and_the_same_defaults(example):
    from layerboost.healing.spec import HealingSpec

    plain = load_recipe(example, ["healing.rank=32"]).healing.spec(4096)
    assert plain == HealingSpec(tokens=10_000_000)
    changes = {
        "divergence": "jensen_shannon",
        "temperature": 2.0,
        "hidden_weight": 0.5,
        "cross_entropy_weight": 0.1,
        "window_dropout": 0.25,
        "transfer_learning_rate": 0.01,
        "micro_batch_sequences": 2,
        "activation_checkpointing": True,
        "stop_when_flat": 0.02,
    }
    changed = load_recipe(example, [f"healing.{name}={value}" for name, value in changes.items()]).healing.spec(256)
    assert changed == HealingSpec(tokens=10_000_000, sequence_tokens=256, rank=16, **changes)


def test_the_cosine_baseline_needs_a_text(example):
    with pytest.raises(InputError, match=r"healing.baselines: cosine: .*quality.text; give one"):
        load_recipe(example, ["quality.text=null", "healing.baselines=[last, cosine]"])
    assert load_recipe(example, ["healing.baselines=[last, 'random:3']"]).healing.baselines == ("last", "random:3")


def test_an_optimizer_in_host_memory_needs_zero(example):
    with pytest.raises(InputError, match=r"healing.offload_optimizer: True: needs healing.zero_stage"):
        load_recipe(example, ["healing.offload_optimizer=true", "healing.zero_stage=0"])


def test_every_field_survives_the_round_trip(example):
    values = yaml.safe_load(load_recipe(example).resolved_yaml())
    assert set(values) == set(Recipe.model_fields)
    assert os.path.isabs(values["quality"]["tasks"][2])


def test_the_score_follows_from_what_there_is_to_judge_by():
    def score(**quality) -> str:
        return recipe_from_dict({"model": {"path": "m"}, "quality": quality}).sensitivity.score

    assert score(tasks=["t"], text="t.txt") == score(text="t.txt") == "nll"
    assert score(tasks=["t"]) == "margin"


@pytest.mark.parametrize(
    ("overrides", "field", "remedy"),
    [
        (["sensitivity.adaptive={removed: 3}"], "sensitivity.adaptive", "either removed and middle"),
        (["sensitivity.adaptive={removed: 3, middle: 2, keep_above: 1}"], "sensitivity.adaptive", "either removed"),
        (["sensitivity.adaptive={removed: 3, midle: 2}"], "sensitivity.adaptive.midle", "did you mean middle?"),
        (
            ["sensitivity.adaptive={removed: 3, middle: 2}", "sensitivity.treatments=[none, window]"],
            "sensitivity.treatments",
            "use [none], or leave sensitivity.adaptive out",
        ),
        (
            ["sensitivity.adaptive={removed: 3, middle: 2}", "sensitivity.score=cosine"],
            "sensitivity.adaptive",
            "needs no ablation",
        ),
        (
            ["search.refine={plans: 8}"],
            "sensitivity.treatments",
            "lacks linear_window, whose costs",
        ),
        (["search.refine={metod: greedy}"], "search.refine.metod", "did you mean method?"),
        (
            ["search.refine={plans: 8}", "sensitivity.adaptive={removed: 3, middle: 2}"],
            "search.refine",
            "leave one of them out",
        ),
        (["sensitivity.context_tokens=[64]", "quality.text=null"], "sensitivity.context_tokens", "needs quality.text"),
        (["sensitivity.stable_at=1"], "sensitivity.stable_at", "less than 1"),
        (["sensitivity.stable_at=0.9", "sensitivity.score=margin"], "sensitivity.stable_at", "does not rank by"),
        (
            ["sensitivity.stable_at=0.9", "sensitivity.score=nll", "sensitivity.compare=true"],
            "sensitivity.stable_at",
            "sensitivity.compare",
        ),
        (
            [
                "sensitivity.stable_at=0.9",
                "sensitivity.score=nll",
                "search.refine={plans: 8}",
                "sensitivity.treatments=[none, linear_window]",
            ],
            "sensitivity.stable_at",
            "search.refine",
        ),
        (
            ["sensitivity.stable_at=0.9", "sensitivity.score=nll", "sensitivity.adaptive={removed: 3, middle: 2}"],
            "sensitivity.stable_at",
            "sensitivity.adaptive",
        ),
        (["placement.activations_gib=0"], "placement.activations_gib", "must be auto or a number of GiB"),
    ],
)
def test_settings_of_the_sweep_that_do_not_fit_together(example, overrides, field, remedy):
    with pytest.raises(InputError) as caught:
        load_recipe(example, overrides)
    assert caught.value.field == field
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_that_we_ship_is_accepted(recipe):
    loaded = load_recipe(recipe)
    assert loaded.healing.tokens >= loaded.healing.batch_sequences * int(loaded.healing.sequence_tokens)
