"""Checks LayerBoost with the plug-in of this folder installed; `tests/test_plugins.py` starts these checks."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from layerboost import PlanCache, convert
from layerboost.attention import naive_attention
from layerboost.cache import cache_bytes
from layerboost.checkpoint import load_model, save_checkpoint
from layerboost.evaluation.scores import SCORES, Scores, mean_score
from layerboost.healing.adapters import feature_map_parameters
from layerboost.healing.losses import Divergence, divergence_and_gradient
from layerboost.plan import TREATMENTS, Plan, PlanError, Treatment
from layerboost.registry import UnknownEntryError
from layerboost.search.loop import SearchSpec
from layerboost.search.plan_space import PlanSpace
from layerboost.search.proposers import make_proposer
from layerboost.sensitivity.drops import mean_drop
from layerboost.speed.byte_model import ByteModel
from layerboost.sweep.layer_sweep import LayerSweep
from orchestrator import cli
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.load import load_recipe
from orchestrator.report.canvas import letter_colours, treatment_colour
from orchestrator.report.figures import strips_picture
from orchestrator.report.tables import PARETO_COLUMNS, pareto_table
from tests.conftest import N_LAYERS, small_recipe

NAME, VERSION = "layerboost-testplugin", "1.2.3"
GATED = Treatment("gated_mean")
N_TOKENS = 13


@pytest.fixture
def parent():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def converted(parent):
    model = convert(parent, Plan.parse("SGWG", window=4)).eval()
    for _, parameter in feature_map_parameters(model):
        torch.nn.init.normal_(parameter)
    return model


def test_a_treatment_is_one_object_that_travels_between_processes():
    assert pickle.loads(pickle.dumps(GATED)) is GATED is Treatment("gated_mean")
    assert list(Treatment)[-1] is GATED and [t.letter for t in Treatment] == ["S", "L", "W", "N", "A", "G"]
    assert Plan.parse("SGSN").plugins == {NAME: VERSION} and Plan.parse("SLWN", 4).plugins == {}
    with pytest.raises(PlanError, match=r"'X'; use .*N \(none\), A \(affine\), G \(gated_mean\)"):
        Plan.parse("SX")
    with pytest.raises(UnknownEntryError, match="did you mean gated_mean"):
        Treatment("gated_meen")


@torch.inference_mode()
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_token_by_token_equals_the_full_forward(converted, padded):
    tokens = torch.randint(50, (3, N_TOKENS))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :4] = mask[2, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = converted(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for first in (1, 5):  # a prompt of one token, and of several
        cache, outputs = PlanCache(converted.config), []
        for start, stop in [(0, first), *((t, t + 1) for t in range(first, N_TOKENS))]:
            part = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            outputs.append(converted(tokens[:, start:stop], past_key_values=cache, use_cache=True, **part).logits)
        found = torch.cat(outputs, dim=1)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


@torch.inference_mode()
def test_its_layers_compute_its_definition_and_not_softmax(parent, converted):
    layer = converted.model.layers[1].self_attn
    query, key, value = (torch.randn(2, heads, 7, 8) for heads in (4, 2, 2))
    found = naive_attention(GATED, query, key, value, scaling=1.0, feature_map=layer.gated_mean)
    mean = value.cumsum(2) / torch.arange(1, 8)[:, None]
    gate = layer.gated_mean.logit.sigmoid()[:, None, None]
    torch.testing.assert_close(found, gate * mean.repeat_interleave(2, dim=1))
    tokens = torch.randint(50, (2, 9))
    assert not torch.allclose(parent(tokens).logits, converted(tokens).logits, atol=1e-3)


@torch.inference_mode()
def test_bytes_are_those_of_the_live_cache(parent, converted):
    plan, cache = Plan.parse("SGWG", window=4), PlanCache(converted.config)
    converted(torch.randint(50, (3, N_TOKENS)), past_key_values=cache, use_cache=True)
    model = ByteModel(parent.config)
    assert cache_bytes(cache) == model.cache_bytes(plan, concurrency=3, context_tokens=N_TOKENS, dtype_bytes=4)
    assert model.layer(0, GATED).state_values == 2 * 8 + 1
    more = model.layer(0, GATED).n_parameters - model.layer(0, Treatment.SOFTMAX).n_parameters
    assert more == 4  # one gate for each head


@torch.inference_mode()
def test_a_sweep_computes_it_as_the_model_does(parent):
    plan, tokens, found = Plan.parse("SGSG"), torch.randint(50, (2, 9)), {}

    def emit(indices, states):
        found.update(zip(indices, states, strict=True))

    sweep = LayerSweep(parent, [plan])
    sweep.run(tokens, emit)
    states = sweep.logits(found[0].flatten(0, 1)).unflatten(0, tokens.shape)
    torch.testing.assert_close(states, convert(parent, plan)(tokens, use_cache=False).logits)


@torch.inference_mode()
def test_a_checkpoint_carries_the_requirement(converted, tmp_path):
    save_checkpoint(converted, None, tmp_path / "model")
    record = json.loads((tmp_path / "model" / "config.json").read_text())["layerboost"]
    assert record["plugins"] == {NAME: VERSION}
    assert f"the plug-in {NAME} {VERSION}" in (tmp_path / "model" / "README.md").read_text()
    loaded, tokens = load_model(str(tmp_path / "model")), torch.randint(50, (2, 9))
    torch.testing.assert_close(loaded(tokens).logits, converted(tokens).logits)
    generated = loaded.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 14)

    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = "from transformers import AutoModelForCausalLM as A; A.from_pretrained({!r}, trust_remote_code=True)"
    for before, needed in (
        (
            "import layerboost; ",
            f"plug-in {NAME}: the plan SGWG was made with version {VERSION} and it is not",
        ),
        ("", f"plug-in {NAME}: the plan SGWG needs layerboost and {NAME}=={VERSION}"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", before + script.format(str(tmp_path / "model"))],
            env=plain,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0 and needed in done.stderr.splitlines()[-1], done.stderr
        assert f"{NAME}=={VERSION}" in done.stderr.splitlines()[-1]


def test_a_score_is_compared_item_by_item():
    base = Scores([mean_score("text", "nll", [1.0, 2.0, 3.0], False, primary=True)])
    worse = Scores([mean_score("text", "nll", [1.5, 2.5, 3.5], False, primary=True)])
    row = mean_drop(base, worse, "likelihood")
    expected = sum(math.exp(-x) - math.exp(-x - 0.5) for x in (1, 2, 3)) / 3
    assert row.metric == "likelihood" and row.n_items == 3 and row.drop == pytest.approx(expected)
    assert SCORES["likelihood"].kept(-row.drop, None) == pytest.approx(1 - expected)


def test_a_searcher_proposes():
    spec = SearchSpec(PlanSpace(4, (Treatment.SOFTMAX, Treatment.NONE)), "alternating", trials=2)
    proposer = make_proposer(spec, {}, {}, 1.0)
    assert [str(proposer.suggest(trial).plan) for trial in range(2)] == ["NSNS", "NSSN"]
    assert proposer.suggest(2) is None


def test_a_divergence_has_its_gradient():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    student.requires_grad_()
    value, gradient = divergence_and_gradient(Divergence("total_variation"), student.detach(), teacher)
    expected = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0])


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("sensitivity.treatments=[nothing]", "none, affine, gated_mean, window, linear_window"),
        ("sensitivity.score=likelyhood", "cosine, likelihood; did you mean likelihood?"),
        ("search.middle=mean", "linear_window, window, gated_mean"),
        ("search.method=alternate", "swaps, alternating"),
        ("search.plans=[SXS]", "N (none), A (affine), G (gated_mean), one for each layer"),
        ("healing.divergence=total", "jensen_shannon, total_variation"),
        ("throughput.engine=stop", "transformers, vllm, stopwatch"),
        ("constraints.pin={0: gated}", "none, affine, gated_mean"),
        ("constraints.at_most={n_gated: 1}", "n_window, n_affine, n_gated_mean, peak_memory_mib"),
    ],
)
def test_recipe_errors_list_it(inputs, override, allowed):
    with pytest.raises(InputError) as caught:
        load_recipe(inputs.recipe, [override])
    assert allowed in caught.value.remedy


def test_a_recipe_takes_it(inputs):
    given = ["sensitivity.treatments=[none, gated_mean]", "sensitivity.score=likelihood", "search.middle=gated_mean"]
    given += ["search.method=alternating", "search.plans=[SGN]", "healing.divergence=total_variation"]
    given += ["throughput.engine=stopwatch", "constraints.at_most={n_gated_mean: 2}", "constraints.pin={0: gated_mean}"]
    recipe = load_recipe(inputs.recipe, given)
    assert recipe.search.plans == ("SGN",) and recipe.sensitivity.score == "likelihood"


def test_help_names_it(capsys):
    for command, said in (("convert", "N none, A affine, G gated_mean"), ("bench", "{transformers,vllm,stopwatch}")):
        with pytest.raises(SystemExit):
            cli.build_parser().parse_args([command, "--help"])
        assert said in " ".join(capsys.readouterr().out.split())


def test_help_with_a_plugin_imports_nothing_heavy():
    script = (
        "import sys; from orchestrator import cli; cli.build_parser().format_help(); "
        "print('layerboost_testplugin' in sys.modules, sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


def test_tables_and_pictures_show_it():
    assert [name for name in PARETO_COLUMNS if name.startswith("n_")] == [
        "n_softmax",
        "n_linear_window",
        "n_window",
        "n_none",
        "n_affine",
        "n_gated_mean",
    ]
    row = {"plan_id": "0", "plan": "GSGN", "origin": "search", "status": "ok"}
    table = pareto_table([row])
    assert table.loc[0, ["n_gated_mean", "n_none"]].tolist() == [2, 1]
    assert treatment_colour("gated_mean") == letter_colours()["G"][0] == "#123456"
    picture = strips_picture([("plan", "GSGN")])
    assert b"#123456" in picture.svg and b"G gated_mean" in picture.svg


def test_bench_times_with_its_engine(inputs, capsys):
    sizes = ["--concurrency", "1", "2", "--prompt-tokens", "8", "--new-tokens", "3", "--json"]
    assert cli.main(["bench", str(inputs.model), "--engine", "stopwatch", *sizes]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["engine"], row["concurrency"], row["speedup"]) for row in rows] == [
        ("stopwatch", 1, 1.0),
        ("stopwatch", 2, 1.0),
    ]
    assert all(row["output_throughput_tok_per_s"] > 0 for row in rows)
    assert cli.main(["bench", str(inputs.model), "--engine", "stopwatch", "--no-prefill"]) == 2


def test_convert_by_hand(inputs, capsys):
    out = inputs.folder / "converted"
    assert cli.main(["convert", str(inputs.model), "--plan", "GSN", "--out", str(out)]) == 0
    assert load_model(str(out)).config.layerboost["plan"] == "GSN"


@pytest.mark.cluster
@pytest.mark.slow
def test_a_runs_identities_name_it_where_it_is_used(inputs):
    inputs.values = small_recipe(
        sensitivity={"treatments": ["none", "gated_mean"], "score": "likelihood", "shares": 1},
        search={"trials": 2, "method": "alternating", "middle": "gated_mean", "speed": "bytes"},
        healing={"tokens": 0},
    )
    inputs.write_recipe()
    out = inputs.folder / "run"
    assert cli.main(["run", str(inputs.recipe), "--out", str(out), "--until", "search"]) == 0
    known: dict[str, list[dict]] = {}
    for path in sorted((out / "records").rglob("*.json")):
        identity = json.loads(path.read_text())["identity"]
        known.setdefault(identity["unit"], []).append(identity)
    swept = [plan for identity in known["sweep"] for plan in identity["plans"]]
    assert sum(plan.get("plugins") == {NAME: VERSION} for plan in swept) == N_LAYERS
    assert all(("plugins" in plan) == ("G" in plan["plan"]) for plan in swept)
    assert [identity["plugins"] for identity in known["search"]] == [{NAME: VERSION}]
    assert all("plugins" not in identity for identity in known["count"])
    assert (
        "gated_mean" in (out / "sensitivity.csv").read_text() and "likelihood" in (out / "sensitivity.csv").read_text()
    )
    assert json.loads((out / "run.json").read_text())["environment"]["plugins"] == {NAME: VERSION}


def test_the_registry_knows_whose_it_is():
    assert str(TREATMENTS.plugin_of("gated_mean")) == f"{NAME} {VERSION}" and TREATMENTS.plugin_of("window") is None
