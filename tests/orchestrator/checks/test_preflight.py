"""Tests the preflight one check at a time; test_cli.py tests it through the command line."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from layerboost import gguf
from orchestrator.checks import model as model_check
from orchestrator.checks import preflight
from orchestrator.checks.model import check_model
from orchestrator.checks.placement import check_placement, find_nodes
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.load import load_recipe
from orchestrator.run.content import model_content
from orchestrator.run.folder import RunFolder
from tasks.cluster.resources import NodeResources
from tests.gguf_files import TOKENS, write_gguf
from tests.models import tiny_model


def run_preflight(inputs, *overrides: str, address: str | None = None):
    folder = RunFolder(inputs.folder.parent / "out")
    return preflight.preflight(load_recipe(inputs.recipe, overrides), folder, address=address)


def test_good_inputs_pass_and_nothing_is_written(inputs):
    before = sorted(inputs.folder.parent.rglob("*"))
    facts = run_preflight(inputs)
    assert (facts.n_layers, facts.context_tokens, facts.commit) == (3, 64, None)
    assert sorted(inputs.folder.parent.rglob("*")) == before


VLLM = ("throughput.engine=vllm", "throughput.environment=/venv", "throughput.prompt_tokens=16")


def test_vllm_needs_a_family_that_it_serves_an_environment_and_room_for_longer_prompts(inputs, monkeypatch):
    asked = []
    monkeypatch.setattr("orchestrator.checks.serving.serving_environment", lambda *asked_for: asked.append(asked_for))
    run_preflight(inputs, *VLLM)
    assert asked == [("vllm", "/venv", None, ())]
    with pytest.raises(InputError, match=r"throughput\.prompt_tokens: 45: with 4 new tokens and the 16 by .* is 65"):
        run_preflight(inputs, *VLLM, "throughput.prompt_tokens=45")
    _edit_config(inputs, model_type="olmo", architectures=["OlmoForCausalLM"])
    with pytest.raises(InputError, match=r"throughput\.engine: vllm: .*'olmo', only of llama.*; use transformers"):
        run_preflight(inputs, *VLLM)


def test_what_an_environment_lacks_is_an_input_error(inputs, tmp_path):
    with pytest.raises(InputError, match=r"throughput\.environment: .*none: has no bin/python; give"):
        run_preflight(inputs, *VLLM, f"throughput.environment={tmp_path}/none")


def gguf_inputs(inputs) -> Path:
    """Has the recipe name a GGUF file in place of the folder."""
    file = inputs.folder / "tiny.gguf"
    write_gguf(tiny_model("llama", vocab_size=len(TOKENS), num_hidden_layers=3, max_position_embeddings=64), file)
    inputs.values["model"]["path"] = "./tiny.gguf"
    inputs.write_recipe()
    return file


def test_a_gguf_file_is_unpacked_into_the_run_folder_once(inputs, capsys, monkeypatch):
    file = gguf_inputs(inputs)
    facts = run_preflight(inputs)
    assert "model.path: unpacking tiny.gguf" in capsys.readouterr().err
    assert Path(facts.path).parent == inputs.folder.parent / "out" / "cache" and facts.n_layers == 3
    assert model_content(facts, None) == {"content": gguf.content_of(file), "hub": None}
    monkeypatch.setattr(gguf, "unpack", lambda *_: pytest.fail("unpacked again"))
    again = run_preflight(inputs)
    assert (again.path, again.gguf_content) == (facts.path, facts.gguf_content)
    moved = file.rename(inputs.folder / "other.gguf")
    with pytest.raises(InputError, match=r"model\.path: .*tiny\.gguf: no such file; .*other\.gguf"):
        run_preflight(inputs)
    moved.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"model\.path: .*other\.gguf: cannot be read"):
        run_preflight(inputs, "model.path=./other.gguf")


def test_a_gguf_file_may_be_a_link_as_in_the_hubs_cache(inputs):
    file = gguf_inputs(inputs)
    blob = file.rename(inputs.folder / "blob")
    file.symlink_to(blob)
    assert run_preflight(inputs).gguf_content == gguf.content_of(blob)


def test_a_gguf_file_needs_a_run_folder_on_a_disk(inputs):
    gguf_inputs(inputs)
    with pytest.raises(InputError, match=r"model\.path: .*memory://runs/x cannot be; give a folder on a shared disk"):
        preflight.preflight(load_recipe(inputs.recipe), RunFolder("memory://runs/x"))


def test_the_commands_keep_an_unpacked_gguf_file_in_the_users_cache(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    facts = check_model(str(gguf_inputs(inputs)))
    assert Path(facts.path).parent == tmp_path / "cache" / "layerboost"
    assert preflight.check_tokenizer(facts)("ab")["input_ids"] == [TOKENS.index("ab")]


def test_a_teacher_may_come_as_a_gguf_file(inputs):
    file = gguf_inputs(inputs)
    facts = run_preflight(inputs, f"healing.teacher={file}")
    assert facts.teacher is not None and facts.teacher.gguf_content == facts.gguf_content


def test_shared_models_pass(shared_dir, tmp_path):
    for name, n_layers in (("stories260K", 5), ("tinystories-12l", 12)):
        facts = check_model(str(shared_dir / "models" / name))
        assert (facts.n_layers, facts.context_tokens) == (n_layers, 512)
        assert preflight.check_tokenizer(facts).eos_token_id is not None


def _edit_config(inputs, **values) -> None:
    path = inputs.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a decoder"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a decoder"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "not a decoder|cannot be converted"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "cannot be converted.*llama"),
        ({"model_type": "never-heard-of"}, "does not load"),
        ({"model_type": "layerboost_llama", "layerboost": {"plan": "NSS", "parent": "some/parent"}}, "some/parent"),
    ],
)
def test_models_that_cannot_be_used(inputs, values, remedy):
    _edit_config(inputs, **values)
    with pytest.raises(InputError, match=remedy) as caught:
        check_model(str(inputs.model), allow_converted=False)
    assert caught.value.field == "model.path"
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(inputs):
    (inputs.model / "model.safetensors").rename(inputs.model / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (inputs.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"lacks model-00002-of-00002\.safetensors of its 2"):
        check_model(str(inputs.model))


def test_a_tokenizer_of_another_model_is_noticed(inputs):
    _edit_config(inputs, vocab_size=20)
    with pytest.raises(InputError, match=r"model\.path: .*its vocabulary has 20"):
        run_preflight(inputs)


def test_a_hub_name_without_a_connection(inputs, monkeypatch):
    from huggingface_hub import HfApi, constants

    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    with pytest.raises(InputError, match=r"hub cannot be reached \(Name or service not known\)"):
        check_model("nobody/no-such-model")


def test_a_model_from_the_cache_has_the_commit_that_it_has_online(inputs, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--some--model"
    shutil.copytree(inputs.model, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)

    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    facts = check_model("some/model", revision="main")
    assert (facts.commit, facts.local_files_only) == (commit, True)


def test_a_hub_model_with_pickles_only(monkeypatch):
    from types import SimpleNamespace

    from huggingface_hub import HfApi, constants

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha="abc", siblings=files))
    with pytest.raises(InputError, match=r"somebody/model: has its weights as pytorch_model\.bin, a pickle"):
        check_model("somebody/model")


def test_the_hubs_own_answers_become_remedies(monkeypatch):
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for error, field, remedy in (
        (RepositoryNotFoundError, "model.path", "no such model"),
        (GatedRepoError, "model.path", "log in"),
        (RevisionNotFoundError, "model.revision", "no such revision"),
    ):

        def answer(*_, error=error, **__):
            # `__new__` skips the constructor, which wants an HTTP response of whichever client the hub uses.
            raise error.__new__(error)

        monkeypatch.setattr(HfApi, "model_info", answer)
        with pytest.raises(InputError, match=remedy) as caught:
            check_model("some/model", revision="v9")
        assert caught.value.field == field


def test_a_teacher_is_found_and_compared_with_the_model(inputs):
    teacher = inputs.folder / "teacher"
    shutil.copytree(inputs.model, teacher)
    settings = ["healing.teacher=./teacher"]
    assert run_preflight(inputs).teacher is None
    found = run_preflight(inputs, *settings, "healing.hidden_weight=1").teacher
    assert found is not None and found.path == str(teacher)

    def refused(field: str, remedy: str, *more: str) -> None:
        with pytest.raises(InputError, match=remedy) as caught:
            run_preflight(inputs, *settings, *more)
        assert caught.value.field == field

    path = teacher / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": 16}))
    refused("healing.sequence_tokens", "longer than the teacher's context of 16")
    path.write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert run_preflight(inputs, *settings).teacher.n_layers == 5
    refused(
        "healing.hidden_weight", "the teacher has 5 of width 16, the model 3 of width 16", "healing.hidden_weight=1"
    )
    path.write_text(json.dumps(config | {"vocab_size": 99}))
    refused("healing.teacher", "vocabulary of 99 tokens, the model one of 63")
    path.write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    refused("healing.teacher", "not a decoder")
    path.write_text(json.dumps(config))
    tokenizer = teacher / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"word7"', '"other7"'))
    refused("healing.teacher", "its tokenizer is not the model's")
    shutil.rmtree(teacher)
    refused("healing.teacher", "no such folder")


def test_each_text_of_a_mixture_is_read(inputs):
    texts = "healing.text=[{path: heal.txt, weight: 2}, {path: %s, format: %s}, {format: sampled, weight: 1}]"
    chats = inputs.folder / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "word1"}]}))
    assert run_preflight(inputs, texts % ("heal.txt", "text"))
    for path, kind, remedy in (
        ("none.jsonl", "text", "no file"),
        ("heal.txt", "chat", "a .txt holds no conversations"),
        ("chats.jsonl", "text", "no text in the field 'text'"),
        ("chats.jsonl", "chat", "template"),
    ):
        with pytest.raises(InputError, match=remedy) as caught:
            run_preflight(inputs, texts % (path, kind))
        assert caught.value.field in ("healing.text[1].path", "model.path")


TWO_NODES = (NodeResources("b", "10.0.0.2", 8.0, 2.0), NodeResources("a", "10.0.0.1", 4.0, 1.0))


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        (["placement.gpus_per_worker=1", "placement.workers=4"], "placement.workers", 4),
        (["placement.gpus_per_worker=0.5", "placement.workers=7"], "placement.workers", 7),
        (["placement.cpus_per_worker=9"], "placement.cpus_per_worker", 9),
        (["placement.cpus_per_worker=4", "placement.gpus_per_worker=0", "placement.workers=4"], "placement.workers", 4),
        (
            ["placement.gpus_per_worker=1", "placement.healing_workers=4", "healing.batch_sequences=4"],
            "placement.healing_workers",
            4,
        ),
    ],
)
def test_more_than_there_is(inputs, overrides, field, value):
    recipe = load_recipe(inputs.recipe, overrides)
    with pytest.raises(InputError, match=r"on the cluster .*ask for") as caught:
        check_placement(recipe, TWO_NODES, "the cluster")
    assert (caught.value.field, caught.value.value) == (field, value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["placement.gpus_per_worker=1", "placement.workers=3"],
        ["placement.gpus_per_worker=0.5", "placement.workers=6"],
        ["placement.gpus_per_worker=0", "placement.cpus_per_worker=8"],
        ["placement.gpus_per_worker=1", "placement.healing_workers=4", "healing.tokens=0"],
    ],
)
def test_as_much_as_there_is(inputs, overrides):
    check_placement(load_recipe(inputs.recipe, overrides), TWO_NODES, "the cluster")


def test_labels_that_no_node_carries_are_refused_and_wait_for_an_autoscaler(inputs):
    recipe = load_recipe(inputs.recipe, ["placement.labels={heal: {layerboost/hardware: large}}"])
    with pytest.raises(InputError, match=r"placement.labels.heal: layerboost/hardware: large: on the cluster no node"):
        check_placement(recipe, TWO_NODES, "the cluster")
    check_placement(recipe, TWO_NODES, "the cluster", growth=[replace(TWO_NODES[0], labels=None)])
    check_placement(recipe, [replace(node, labels=None) for node in TWO_NODES], "this machine")


def test_this_machine_has_a_cpu():
    assert find_nodes(None)[0].cpus >= 1


def test_a_cluster_that_is_not_there():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(InputError, match=f"--address: {address}: nobody answers"):
            find_nodes(address)
    for malformed in ("somewhere", "host:port"):
        with pytest.raises(InputError, match=f"--address: {malformed}: must be host:port"):
            find_nodes(malformed)


@pytest.mark.cluster
def test_the_resources_of_a_live_cluster(inputs, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2, num_gpus=2)
        assert sorted((node.cpus, node.gpus) for node in find_nodes(cluster.address)) == [(1.0, 1.0), (2.0, 2.0)]
        run_preflight(inputs, "placement.gpus_per_worker=1", "placement.workers=3", address=cluster.address)
        with pytest.raises(InputError, match=r"placement\.workers: 4: on the cluster"):
            run_preflight(inputs, "placement.gpus_per_worker=1", "placement.workers=4", address=cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_messages_of_many_lines_become_one():
    assert model_check.first_line(ValueError("\n\n  first.\nsecond")) == "first"
    assert model_check.first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["constraints.pin={3: softmax}"], r"constraints\.pin\.3: softmax: the model has layers 0 to 2"),
        (
            ["constraints.pin={0: softmax, 2: softmax}", "constraints.at_most={n_softmax: 1}"],
            r"constraints\.at_most\.n_softmax: 1\.0: the pinned layers alone come to 2",
        ),
        (
            ["constraints.pin={0: softmax}", "constraints.at_most={kv_bytes_per_token: 1}"],
            r"constraints\.at_most\.kv_bytes_per_token: 1\.0: the pinned layers alone come to",
        ),
        (
            ["throughput.lengths={prompt_tokens: [8, 64]}"],
            r"throughput\.lengths\.prompt_tokens: 64: with \d+ new tokens is \d+, more than the model's context",
        ),
    ],
)
def test_constraints_and_lengths_that_no_plan_can_hold(inputs, overrides, message):
    with pytest.raises(InputError, match=message):
        run_preflight(inputs, *overrides)


def test_constraints_that_some_plan_holds(inputs):
    pins = ["constraints.pin={0: softmax, 2: none}", "constraints.at_most={n_softmax: 1}"]
    assert run_preflight(inputs, *pins).n_layers == 3
