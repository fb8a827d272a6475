"""Tests decoding: the byte model against live models, greedy tokens against generate, consistent measurements."""

import random
import statistics

import pytest
import torch

from layerboost.cache import cache_bytes
from layerboost.convert import convert
from layerboost.plan import Plan
from layerboost.speed.byte_model import ByteModel, decode_bytes, predicted_speedup
from layerboost.speed.decoding import (
    DecodeMeasurement,
    DecodeSettingError,
    kv_bytes_per_token,
    measure_decode,
    measure_together,
    random_tokens,
    timed_generation,
)
from layerboost.speed.hardware import PeakMemory
from tests.models import tiny_config, tiny_model

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_neox", "olmo2", "mixtral"]


def _random_plan() -> Plan:
    return Plan.parse("".join(random.choices("SLWN", k=3)) + random.choice("LW"), window=random.randint(2, 9))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_byte_model_equals_the_live_cache_and_the_live_parameters(family):
    model, plan = tiny_model(family), _random_plan()
    bytes_of = ByteModel(model.config)
    for variant, its_plan in ((model, None), (convert(model, plan), plan)):
        for n_tokens in (random.randint(20, 40), 60):
            batch = random.randint(1, 3)
            with torch.no_grad():
                cache = variant(torch.randint(3, 90, (batch, n_tokens)), use_cache=True).past_key_values
            condition = {"concurrency": batch, "context_tokens": n_tokens, "dtype_bytes": 4}
            assert bytes_of.cache_bytes(its_plan, **condition) == cache_bytes(cache), (its_plan, n_tokens)
        weights = sum(p.numel() for p in variant.parameters()) * 4
        if not model.config.tie_word_embeddings:
            weights -= model.get_input_embeddings().weight.numel() * 4
        rows = batch * model.config.hidden_size * 4
        assert bytes_of.weight_bytes(its_plan, concurrency=batch, dtype_bytes=4) == weights + rows
        assert bytes_of.decode_bytes(its_plan, **condition) == weights + rows + cache_bytes(cache)


def test_fewer_bytes_predict_more_speed_and_equal_bytes_none():
    config = tiny_config("llama")
    condition = {"concurrency": 8, "context_tokens": 100, "dtype_bytes": 2}
    speedups = [predicted_speedup(config, Plan.parse(p, 8), **condition) for p in ("SSSS", "SSSW", "SSSN", "NNNN")]
    assert speedups[0] == 1.0 and speedups == sorted(speedups) and speedups[3] > speedups[2] > speedups[1] > 1
    short = predicted_speedup(config, Plan.parse("SSSW", 8), concurrency=8, context_tokens=7, dtype_bytes=2)
    assert short == 1.0
    assert (
        decode_bytes(config, None, **condition) / decode_bytes(config, Plan.parse("SSSN"), **condition) == speedups[2]
    )


def test_a_byte_of_a_wider_number_counts_twice_but_the_state_stays_fp32():
    bytes_of = ByteModel(tiny_config("llama"))
    condition = {"concurrency": 3, "context_tokens": 50}
    for text, state in (("SWNS", 0), ("LLLL", 4 * 2 * 16 * 9 * 4)):
        plan = Plan.parse(text, 6)
        narrow, wide = (bytes_of.cache_bytes(plan, **condition, dtype_bytes=n) for n in (2, 4))
        assert wide == 2 * narrow - 3 * state


def test_a_plan_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="4 layers"):
        decode_bytes(tiny_config("llama"), Plan.parse("SS"), concurrency=1, context_tokens=1, dtype_bytes=4)


@pytest.mark.parametrize("plan", [None, "SSSS", "SNWL", "NLWS", "NNNN"])
def test_kv_bytes_per_token_count_the_softmax_layers_alone(plan):
    model = tiny_model("llama")
    variant = model if plan is None else convert(model, Plan.parse(plan, window=random.randint(2, 20)))
    token_bytes = 2 * 2 * 8 * 4
    assert kv_bytes_per_token(variant) == (plan or "SSSS").count("S") * token_bytes


def test_natively_sliding_layers_count_nothing_either():
    assert kv_bytes_per_token(tiny_model("mistral")) == 0
    n_full = tiny_config("gemma3_text").layer_types.count("full_attention")
    assert kv_bytes_per_token(tiny_model("gemma3_text")) == n_full * 2 * 2 * 8 * 4


@pytest.mark.parametrize("plan", [None, "SLWN", "NNNN"])
def test_the_timed_loop_generates_the_greedy_tokens(plan):
    model = tiny_model("llama")
    model = model if plan is None else convert(model, Plan.parse(plan, window=5))
    prompts = torch.randint(3, 90, (3, 12))
    with torch.inference_mode():
        _, steps_s, tokens = timed_generation(model, prompts, 9)
        expected = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=9, do_sample=False, eos_token_id=None
        )
    assert torch.equal(tokens, expected[:, 12:]) and len(steps_s) == 8


def test_a_measurement_adds_up_and_survives_json():
    model = tiny_model("llama")
    measured = measure_decode(model, concurrency=4, prompt_tokens=16, new_tokens=6, repeats=3)
    assert len(measured.prefill_s) == len(measured.decode_s) == len(measured.repeats_tok_per_s) == 3
    # The sum of the steps' medians is near the time of a pass, although single steps scatter.
    assert 0.3 * min(measured.repeats_tok_per_s) < measured.output_throughput_tok_per_s
    assert measured.output_throughput_tok_per_s < 3 * max(measured.repeats_tok_per_s)
    assert measured.repeats_tok_per_s == pytest.approx([4 * 5 / s for s in measured.decode_s])
    assert measured.output_throughput_stderr == pytest.approx(
        statistics.stdev(measured.repeats_tok_per_s) / 3**0.5
    )  # fmt: skip
    assert measured.ttft_ms_p50 == pytest.approx(1e3 * statistics.median(measured.prefill_s))
    assert min(measured.decode_s) / 5 * 1e3 * 0.3 < measured.tpot_ms_p50 < max(measured.decode_s) * 1e3
    assert measured.kv_bytes_per_token == 4 * 2 * 2 * 8 * 4
    assert measured.peak_memory_mib > 0 and measured.hardware and measured.dtype == "float32"
    assert DecodeMeasurement.from_dict(measured.to_dict()) == measured
    twice = measured.scaled(2.0)
    assert twice.output_throughput_tok_per_s == 2 * measured.output_throughput_tok_per_s
    assert twice.tpot_ms_p50 == measured.tpot_ms_p50 / 2 and twice.peak_memory_mib == measured.peak_memory_mib


def _timed(monkeypatch, step_s):
    """Replaces the timing of generation: a step takes `step_s(model, pass, step)` seconds."""
    passes: dict = {}

    def generate(model, prompts, new_tokens, n_filled=None, *, room_tokens=0):
        if n_filled is None or room_tokens:  # this is a warm-up
            return None
        n = passes[id(model)] = passes.get(id(model), -1) + 1
        return step_s(model, n, 0), [step_s(model, n, step) for step in range(new_tokens - 1)], None

    monkeypatch.setattr("layerboost.speed.decoding.timed_generation", generate)


def test_a_round_in_which_the_machine_is_slow_changes_no_ratio_and_a_disturbed_step_no_throughput(monkeypatch):
    models = [tiny_model("llama"), convert(tiny_model("llama"), Plan.parse("SNSN")), tiny_model("llama")]
    speed = {id(model): speed for model, speed in zip(models, (1.0, 0.5, 0.8), strict=True)}
    drift = [1.0, 2.5, 1.7]

    def step_s(model, n, step):
        disturbed = 5.0 if (model is models[0] and n == 2 and step == 1) else 1.0
        return speed[id(model)] * drift[n] * (1 + step) * disturbed

    _timed(monkeypatch, step_s)
    timed = measure_together(models, concurrency=2, prompt_tokens=4, new_tokens=4, repeats=3)
    middle = 2 * 3 / (1.7 * (1 + 2 + 3))
    assert [t.output_throughput_tok_per_s for t in timed] == pytest.approx([middle, 2 * middle, middle / 0.8])
    assert timed[1].output_throughput_stderr < 1e-9 < timed[0].output_throughput_stderr
    assert timed[1].ttft_ms_p50 == pytest.approx(500 * 1.7)


def test_a_model_alone_keeps_its_scatter(monkeypatch):
    _timed(monkeypatch, lambda model, n, step: (1.0, 2.0, 4.0)[n])
    timed = measure_decode(tiny_model("llama"), concurrency=1, prompt_tokens=4, new_tokens=3)
    assert timed.repeats_tok_per_s == [1.0, 0.5, 0.25] and timed.output_throughput_stderr > 0.2


def test_peak_memory_sees_what_a_larger_batch_holds():
    # Keys and values take 16 MB for each sequence of 256 tokens, far above the noise of an allocator.
    model = tiny_model("llama", num_key_value_heads=4, head_dim=512, initializer_range=0.02)
    small, large = (
        measure_decode(model, concurrency=n, prompt_tokens=200, new_tokens=2).peak_memory_mib for n in (1, 6)
    )
    kv_mib = 5 * 200 * 4 * 2 * 4 * 512 * 4 / 2**20
    assert kv_mib * 0.8 < large - small < kv_mib * 6


@pytest.mark.parametrize(
    ("family", "letters"), [("llama", "SSSS"), ("llama", "SLWN"), ("llama", "WWWW"), ("gemma3_text", "SSSS")]
)
@torch.inference_mode()
def test_the_end_of_a_pass_has_the_peak_of_the_whole_pass(family, letters):
    model = tiny_model(family, num_key_value_heads=4, head_dim=512, initializer_range=0.02)
    model = convert(model, Plan.parse(letters, 16)).eval()
    prompts = random_tokens(model, 4, 230, seed=0)
    with PeakMemory(model) as whole:
        timed_generation(model, prompts, 20)
    measured = measure_decode(model, concurrency=4, prompt_tokens=230, new_tokens=20)
    assert measured.peak_memory_mib == pytest.approx(whole.peak_mib, rel=0.1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"concurrency": 0}, "concurrency: 0"),
        ({"new_tokens": 1}, "new_tokens: 1"),
        ({"repeats": 2}, "repeats: 2"),
        ({"prompt_tokens": 250}, "prompt_tokens: 250 .* at most 248"),
    ],
)
def test_settings_that_measure_nothing_are_refused(settings, message):
    settings = {"concurrency": 2, "prompt_tokens": 8, "new_tokens": 8} | settings
    with pytest.raises(DecodeSettingError, match=message):
        measure_decode(tiny_model("llama"), **settings)


@pytest.mark.gpu
def test_on_a_gpu_memory_is_the_allocators_peak():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    measured = measure_decode(model, concurrency=4, prompt_tokens=16, new_tokens=6)
    weights_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    assert measured.peak_memory_mib > weights_mib and measured.hardware == torch.cuda.get_device_name()
