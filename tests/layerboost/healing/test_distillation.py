from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerboost.convert import convert, plan_of
from layerboost.healing.adapters import (
    add_lora,
    feature_map_layers,
    feature_map_parameters,
    merge_lora,
    projection_names,
    unshare_parameters,
)
from layerboost.healing.attention_transfer import AttentionTransfer
from layerboost.healing.distillation import Distillation, head_logits, make_trainee
from layerboost.healing.losses import relative_error
from layerboost.healing.spec import HealingSpec, Phase, learning_rate_at, phases_of
from layerboost.healing.training import NonFiniteLossError, TorchEngine, accumulation_rounds, heal_locally, run_phase
from layerboost.plan import Plan, Treatment
from layerboost.text.batches import GlobalBatches, PackedText

VOCABULARY, LAYERS, WINDOW = 61, 4, 3


def tiny_model(model_type: str = "llama", seed: int = 0, **settings) -> torch.nn.Module:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type == "gpt_neox":
        shape.pop("num_key_value_heads")
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**(shape | settings))).eval()


def batches(spec: HealingSpec, n_sequences: int = 32, seed: int = 1) -> GlobalBatches:
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(3, VOCABULARY, (n_sequences, spec.sequence_tokens), generator=generator)
    return GlobalBatches(PackedText(sequences), spec.batch_sequences, spec.seed)


def spec_of(steps: int, **settings) -> HealingSpec:
    settings = {"sequence_tokens": 16, "batch_sequences": 4, "rank": 4, "learning_rate": 5e-3} | settings
    settings = {"transfer_fraction": 0.2, "alpha": 2 * settings["rank"]} | settings
    return HealingSpec(tokens=steps * settings["sequence_tokens"] * settings["batch_sequences"], **settings)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gpt_neox", {}),
    ],
)
def test_heads_of_families_give_the_models_own_logits(model_type, settings):
    model = tiny_model(model_type, **settings)
    input_ids = torch.randint(3, VOCABULARY, (2, 7))
    with torch.no_grad():
        expected = model(input_ids).logits
        actual = head_logits(model, model.base_model(input_ids).last_hidden_state)
    torch.testing.assert_close(actual, expected)
    assert Distillation(model, model, spec_of(1)).splits_head


def test_a_head_of_unknown_form_falls_back_to_whole_logits():
    teacher, student = tiny_model(seed=0), tiny_model(seed=1)
    spec = spec_of(1)
    input_ids = torch.randint(3, VOCABULARY, (2, 16))

    def bend(module, args, output):
        output.logits = output.logits.sin()
        return output

    for model in (teacher, student):
        model.register_forward_hook(bend)
    trainee = Distillation(teacher, student, spec)
    assert not trainee.splits_head
    logs = [model(input_ids).logits[:, :-1].log_softmax(-1) for model in (student, teacher)]
    expected = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean()
    torch.testing.assert_close(trainee(input_ids), expected, rtol=1e-4, atol=1e-5)


def test_hidden_term_is_the_error_of_every_layer():
    teacher, student = tiny_model(seed=0), tiny_model(seed=1)
    input_ids = torch.randint(3, VOCABULARY, (2, 16))
    losses = [Distillation(teacher, student, spec_of(1, hidden_weight=w))(input_ids) for w in (0.0, 0.5)]
    states = [m.base_model(input_ids, output_hidden_states=True).hidden_states[1:] for m in (student, teacher)]
    expected = torch.stack([relative_error(s, t) for s, t in zip(*states, strict=True)]).mean()
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * expected, rtol=1e-4, atol=1e-5)


def test_transfer_compares_each_layer_on_the_teachers_input():
    """A linear_window layer whose window covers the whole sequence is softmax, so every layer's error vanishes."""
    model = tiny_model()
    input_ids = torch.randint(3, VOCABULARY, (2, 16))
    wide = AttentionTransfer(model, convert(model, Plan.parse("NLSL", 16)), spec_of(1))
    assert wide.layers == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
    assert all(error < 1e-9 for error in wide.layer_errors(input_ids).values())
    narrow = AttentionTransfer(model, convert(model, Plan.parse("NLSL", WINDOW)), spec_of(1))
    errors = narrow.layer_errors(input_ids)
    assert all(error > 1e-4 for error in errors.values())

    captured = {}
    hook = model.model.layers[3].self_attn.register_forward_hook(
        lambda module, args, kwargs, output: captured.update(input=kwargs["hidden_states"], output=output[0]),
        with_kwargs=True,
    )
    model(input_ids)
    hook.remove()
    alone = convert(model, Plan.parse("SSSL", WINDOW))  # nothing before layer 3 differs from the teacher
    alone.model.layers[3].self_attn.linear_window.load_state_dict(
        narrow.student.model.layers[3].self_attn.linear_window.state_dict()
    )
    outputs = {}
    alone.model.layers[3].self_attn.register_forward_hook(lambda m, a, output: outputs.update(output=output[0]))
    alone(input_ids)
    expected = relative_error(outputs["output"], captured["output"])
    torch.testing.assert_close(errors["model.layers.3.self_attn"], expected)


def test_transfer_trains_feature_maps_alone_and_lowers_every_layers_error():
    model = tiny_model()
    spec = spec_of(40)
    student = convert(model, Plan.parse("LSNL", WINDOW))
    trainee = make_trainee("transfer", model, student, spec)
    trainable = {name for name, p in trainee.student.named_parameters() if p.requires_grad}
    assert trainable
    assert trainable == {name for name, _ in feature_map_parameters(student)}
    data = batches(spec)
    before = trainee.layer_errors(data.text.input_ids)
    run_phase(TorchEngine(trainee, spec), Phase("transfer", 0, 40, 2e-2), data, spec)
    after = trainee.layer_errors(data.text.input_ids)
    for name in feature_map_layers(student):
        assert after[name] < 0.9 * before[name], name


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma2", "phi3"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_healing_lowers_the_loss_and_leaves_the_teacher_bit_equal(model_type, method):
    model = tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    input_ids = torch.randint(3, VOCABULARY, (2, 16))
    logits = model(input_ids).logits
    spec = spec_of(30, method=method)
    plan = Plan.parse("LNSW", WINDOW)
    data = batches(spec)
    rows = []
    healed = heal_locally(model, plan, data.text, spec, on_step=rows.append)

    assert plan_of(healed) == plan
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(input_ids).logits, logits)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in healed.named_modules())

    measure = spec_of(1)
    with torch.no_grad():
        unhealed_kl = Distillation(model, convert(model, plan), measure)(data.text.input_ids)
        healed_kl = Distillation(model, healed, measure)(data.text.input_ids)
    assert healed_kl < 0.8 * unhealed_kl
    assert [row.phase for row in rows] == ["transfer"] * 6 + ["heal"] * 24


@pytest.mark.parametrize("tokens", [128, 640, 1000, 1919])
@pytest.mark.parametrize("plan", ["SSNN", "LSNN"])
def test_the_budget_is_used_and_never_exceeded(tokens, plan):
    spec = HealingSpec(tokens=tokens, sequence_tokens=16, batch_sequences=8, rank=2)
    rows = []
    heal_locally(tiny_model(), Plan.parse(plan, WINDOW), batches(spec).text, spec, on_step=rows.append)
    steps = tokens // 128
    assert [row.step for row in rows] == list(range(1, steps + 1))
    assert [row.tokens for row in rows] == [128 * n for n in range(1, steps + 1)]
    assert tokens - 128 < rows[-1].tokens <= tokens
    n_transfer = sum(row.phase == "transfer" for row in rows)
    assert n_transfer == (int(tokens * spec.transfer_fraction) // 128 if "L" in plan else 0)


def test_a_budget_below_one_step_is_refused():
    with pytest.raises(ValueError, match="tokens: 127 is below one step"):
        HealingSpec(tokens=127, sequence_tokens=16, batch_sequences=8)


@pytest.mark.parametrize(("field", "value"), [("method", "qlora"), ("rank", 0), ("transfer_fraction", 1.0)])
def test_a_spec_that_cannot_be_meant_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=f"{field}: .*{value}"):
        spec_of(1, **{field: value})


def test_spec_survives_json():
    spec = spec_of(3, method="full", micro_batch_sequences=2)
    assert HealingSpec.from_dict(spec.to_dict()) == spec


def test_lora_is_on_every_projection_and_merges_to_the_same_logits():
    model = tiny_model()
    student = convert(model, Plan.parse("LNSW", WINDOW))
    names = projection_names(student)
    assert len(names) == 3 * 4 + 4 * 3  # NONE has no attention left
    state = torch.random.get_rng_state()
    add_lora(student, rank=3, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    input_ids = torch.randint(3, VOCABULARY, (2, 16))
    with torch.no_grad():
        start = student(input_ids).logits
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        unmerged = student(input_ids).logits
    assert (unmerged - start).abs().max() > 1e-2
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merge_lora(student)
    with torch.no_grad():
        merged = student(input_ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-5)
    assert projection_names(student) == names
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert student.state_dict().keys() == convert(model, Plan.parse("LNSW", WINDOW)).state_dict().keys()


def test_unsharing_keeps_ties_inside_the_model():
    model = tiny_model(tie_word_embeddings=True)
    student = convert(model, Plan.parse("SSSN"))
    unshare_parameters(student)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert not {id(p) for p in student.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("micro_batch_sequences", [1, 3, None])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("with_targets", [False, True])
def test_slices_of_a_batch_weigh_as_the_whole(world_size, micro_batch_sequences, with_targets):
    """The gradient that workers average over rounds is that of the whole batch, even if nothing divides evenly."""
    spec = spec_of(1, batch_sequences=8, micro_batch_sequences=micro_batch_sequences)
    phase, data = Phase("heal", 0, 1, 1e-3), batches(spec)
    if with_targets:
        targets = torch.rand(data.text.input_ids.shape) < torch.rand(len(data.text), 1)
        targets[:, 1] = True
        data = replace(data, text=replace(data.text, targets=targets))

    class Embedding(torch.nn.Embedding):
        def begin_step(self, step, **settings): ...

    class Recorder:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))])

        def __init__(self):
            self.module = Embedding(VOCABULARY, 1).double()
            torch.nn.init.ones_(self.module.weight)

        def __call__(self, input_ids, targets=None):
            values = (self.module(input_ids).squeeze(-1).exp() * input_ids)[:, 1:]
            return values.mean() if targets is None else values[targets[:, 1:]].sum() / targets[:, 1:].sum()

        def backward(self, loss):
            (loss / accumulation_rounds(spec, world_size) / world_size).backward()

        def step(self): ...

        def get_global_grad_norm(self): ...

    losses, gradient = [], 0
    for rank in range(world_size):
        engine = Recorder()
        rows = []
        run_phase(engine, phase, data, spec, rank=rank, world_size=world_size, on_step=rows.append)
        losses.append(rows[0].loss)
        gradient = gradient + engine.module.weight.grad
    whole = Recorder()
    loss = whole(**data.batch(0).tensors())
    loss.backward()
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, whole.module.weight.grad, rtol=1e-6, atol=1e-8)


def test_micro_batches_and_activation_checkpointing_change_memory_only():
    plan = Plan.parse("LNSW", WINDOW)
    curves = []
    for settings in ({}, {"micro_batch_sequences": 2}, {"activation_checkpointing": True}):
        spec = spec_of(5, **settings)
        rows = []
        heal_locally(tiny_model(), plan, batches(spec).text, spec, on_step=rows.append)
        curves.append([row.loss for row in rows])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_bfloat16_is_trained_through_fp32_copies():
    model = tiny_model().bfloat16()
    spec = spec_of(20, learning_rate=1e-4, method="full")
    trainee = make_trainee("heal", model, convert(model, Plan.parse("SSSN")), spec)
    engine = TorchEngine(trainee, spec)
    run_phase(engine, Phase("heal", 0, 20, 1e-4), batches(spec), spec)
    assert all(master.dtype == torch.float32 for master in engine.masters)
    weight, master = engine.parameters[0], engine.masters[0]
    torch.testing.assert_close(weight, master.bfloat16())
    assert not torch.equal(master, weight.float())  # the fp32 master keeps steps too small for bfloat16


@pytest.mark.parametrize(("plan", "phase", "step"), [("LSSS", "transfer", 2), ("SSSN", "heal", 2)])
def test_a_non_finite_loss_stops_with_phase_step_and_batch(plan, phase, step):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = spec_of(10, transfer_fraction=0.5)
    data = batches(spec)
    embed, batches_seen = model.model.embed_tokens.forward, []

    def poisoned(input_ids):
        if len(input_ids) == spec.batch_sequences:  # excludes the trial of the head on a few tokens
            batches_seen.append(input_ids)
        return embed(input_ids) * (math.nan if len(batches_seen) == step else 1.0)

    model.model.embed_tokens.forward = poisoned  # only the teacher is poisoned, since the student has its own modules
    rows = []
    with pytest.raises(NonFiniteLossError) as error:
        heal_locally(model, Plan.parse(plan, WINDOW), data.text, spec, on_step=rows.append)
    sequences = ", ".join(map(str, data.indices(step - 1)))
    assert f"loss: nan in phase {phase} at step {step}, batch {step - 1} (sequences {sequences})" in str(error.value)
    assert len(rows) == step - 1
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    phase = Phase("heal", 0, 101, 2.0)
    rates = [learning_rate_at(phase, step, 0.1) for step in range(101)]
    assert [rates[0], rates[9], rates[10], rates[100]] == pytest.approx([0.2, 2.0, 2.0, 0.2])
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(("method", "rate"), [("lora", 0.5 / 128), ("full", 0.1 / 128)])
def test_the_default_learning_rate_follows_the_width(method, rate):
    spec = HealingSpec(tokens=100_000, method=method)
    assert phases_of(spec, Plan.uniform(Treatment.SOFTMAX, 2), 128)[-1].learning_rate == pytest.approx(rate)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])  # llama has no biases, gpt_neox has
def test_the_short_way_through_lora_is_peft_s_in_value_and_gradient(model_type):
    model = tiny_model(model_type)
    input_ids = torch.randint(3, VOCABULARY, (2, 16))
    add_lora(model, rank=3, alpha=5, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    results = []
    for shortened in (True, False):
        if not shortened:
            for module in model.modules():
                if "forward" in vars(module) and hasattr(module, "lora_A"):
                    del module.forward
        model.zero_grad()
        loss = model(input_ids).logits.square().mean()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        results.append({"loss": loss.detach(), **gradients})
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-7, msg=name)
