from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from layerboost.healing import fused_loss
from layerboost.healing.distillation import Distillation
from layerboost.healing.divergences import Divergence
from layerboost.healing.fused_loss import fused_divergence, fused_heads, plain_head
from layerboost.healing.losses import distillation_loss
from tests.layerboost.healing.test_distillation import VOCABULARY, spec_of, tiny_model


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", list(Divergence))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("with_targets", [False, True])
def test_the_kernel_gives_the_value_and_gradient_of_the_chunks(divergence, temperature, with_targets):
    pytest.importorskip("liger_kernel")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    heads = [nn.Linear(width, 1000, bias=False, device="cuda") for width in (64, 96)]
    student, teacher = (torch.randn(2, 33, head.in_features, device="cuda") for head in heads)
    input_ids = torch.randint(1000, (2, 33), device="cuda")
    targets = torch.rand(2, 33, device="cuda") < 0.5 if with_targets else None
    settings = {"targets": targets, "divergence": divergence, "temperature": temperature, "divergence_weight": 0.7}
    results = []
    for loss in (fused_divergence, distillation_loss):
        states = student.clone().requires_grad_()
        value = loss(states, teacher, *heads, input_ids, **settings)
        value.backward()
        results.append((value.detach(), states.grad))
    for fused, chunked in zip(*results, strict=True):
        torch.testing.assert_close(fused, chunked, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "settings", "is_plain"),
    [
        ("llama", {}, True),
        ("gemma2", {"final_logit_softcapping": 3.0}, False),
        ("granite", {"logits_scaling": 4.0}, False),
    ],
)
def test_only_plain_heads_are_fused(model_type, settings, is_plain):
    assert (plain_head(tiny_model(model_type, **settings)) is not None) == is_plain


def test_without_a_gpu_the_chunks_are_used():
    model = tiny_model()
    assert fused_heads(model, model, Divergence.FORWARD_KL, 1.0) is None
    trainee = Distillation(model, model, spec_of(1))
    assert trainee.fused_heads is None
    assert trainee(torch.randint(3, VOCABULARY, (2, 16))) < 1e-6


@pytest.mark.parametrize(("factor", "is_used"), [(1.0, True), (1.1, False), (float("nan"), False), (None, False)])
def test_a_kernel_that_gives_anything_else_is_said_and_not_used(monkeypatch, caplog, factor, is_used):
    """The library is replaced by the plain form, which is made right, wrong or broken."""

    class Kernel:
        def __init__(self, jsd_beta, temperature):
            assert (jsd_beta, temperature) == (0.0, 2.0)

        def __call__(self, student, student_weight, teacher, teacher_weight):
            if factor is None:
                raise RuntimeError
            logs = [(x @ w.T / 2.0).log_softmax(-1) for x, w in ((student, student_weight), (teacher, teacher_weight))]
            return factor * nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")

    module = ModuleType("liger_kernel.transformers.fused_linear_jsd")
    module.LigerFusedLinearJSD = Kernel
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fused_loss, "is_installed", lambda: True)

    model = tiny_model()
    head = plain_head(model)
    monkeypatch.setattr(fused_loss, "_DEVICES", ("cpu",))
    with caplog.at_level(logging.WARNING):
        found = fused_heads(model, model, Divergence.FORWARD_KL, 2.0)
    assert (found is not None) == is_used
    if is_used:
        assert found[0] is found[1] is head
        assert not caplog.text
    else:
        assert "fused loss: not used" in caplog.text
