from __future__ import annotations

import math

import pytest
import torch

from layerboost.healing.divergences import Divergence
from layerboost.healing.losses import distillation_loss, positions_at_once, relative_error


def naive_divergence(kind, student, teacher):
    """Computes the divergence by its definition, from probabilities (N, V) to nats (N,)."""

    def kl(p, q):
        return (p * (p.log() - q.log())).sum(-1)

    if kind is Divergence.FORWARD_KL:
        return kl(teacher, student)
    if kind is Divergence.REVERSE_KL:
        return kl(student, teacher)
    mixed = 0.5 * (student + teacher)
    return 0.5 * kl(student, mixed) + 0.5 * kl(teacher, mixed)


def naive_loss(
    student_logits, teacher_logits, input_ids, targets, divergence, temperature, divergence_weight, cross_entropy_weight
):
    """Computes the loss by its definition on whole logits, position by position."""
    total, n = 0.0, 0
    for row in range(input_ids.shape[0]):
        for position in range(input_ids.shape[1] - 1):
            if targets is not None and not targets[row, position + 1]:
                continue
            n += 1
            student, teacher = ((x[row, position] / temperature).softmax(-1) for x in (student_logits, teacher_logits))
            total = total + divergence_weight * temperature**2 * naive_divergence(divergence, student, teacher)
            target = input_ids[row, position + 1]
            total = total - cross_entropy_weight * student_logits[row, position].log_softmax(-1)[target]
    return total / max(n, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("divergence", list(Divergence))
@pytest.mark.parametrize(("chunk_tokens", "block_tokens"), [(1, None), (5, 2), (1000, None), (1000, 3)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(
    ("temperature", "divergence_weight", "cross_entropy_weight"), [(1, 1, 0), (2.5, 0.7, 0.3), (1, 0, 1)]
)
def test_value_and_gradient_are_those_of_the_definition(
    dtype,
    tolerance,
    divergence,
    chunk_tokens,
    block_tokens,
    masked,
    head_trains,
    temperature,
    divergence_weight,
    cross_entropy_weight,
):
    seed = torch.seed()
    student_states, teacher_states = torch.randn(2, 2, 9, 6)
    weights = 0.5 * torch.randn(2, 11, 6)
    input_ids = torch.randint(0, 11, (2, 9))
    targets = None
    if masked:
        targets = torch.rand(2, 9) < 0.6
        targets[0, 1], targets[1, 1:3] = True, False
    settings = {
        "divergence": divergence,
        "temperature": temperature,
        "divergence_weight": divergence_weight,
        "cross_entropy_weight": cross_entropy_weight,
    }
    results = []
    for chunked in (True, False):
        precise = dtype if chunked else torch.float64
        states = student_states.to(precise, copy=True).requires_grad_()
        head = weights[0].to(precise, copy=True).requires_grad_(head_trains)
        teacher_head = weights[1].to(precise)
        if chunked:
            loss = distillation_loss(
                states,
                teacher_states.to(precise),
                lambda x, head=head: x @ head.T,
                lambda x, head=teacher_head: x @ head.T,
                input_ids,
                targets=targets,
                head_trains=head_trains,
                chunk_tokens=chunk_tokens,
                block_tokens=block_tokens,
                **settings,
            )
        else:
            teacher_logits = teacher_states.to(precise) @ teacher_head.T
            loss = naive_loss(states @ head.T, teacher_logits, input_ids, targets, **settings)
        (3.0 * loss).backward()
        results.append([loss.detach(), states.grad] + ([head.grad] if head_trains else []))
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), naive.double(), rtol=tolerance, atol=tolerance, msg=f"seed {seed}")


@pytest.mark.parametrize("divergence", list(Divergence))
def test_chunks_are_as_close_as_the_plain_form_in_fp32(divergence):
    student, teacher = (2 * torch.randn(1, 33, 2048) for _ in range(2))
    input_ids = torch.randint(2048, (1, 33))
    results = []
    for chunked in (True, False):
        states = student.clone().requires_grad_()
        if chunked:
            settings = {"divergence": divergence, "chunk_tokens": 10, "block_tokens": 4}
            loss = distillation_loss(states, teacher, lambda x: x, lambda x: x, input_ids, **settings)
        else:
            probabilities = (x[0, :-1].softmax(-1) for x in (states, teacher))
            loss = naive_divergence(divergence, *probabilities).mean()
        loss.backward()
        results.append((loss.detach(), states.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)


def test_only_chunks_of_logits_exist_and_the_students_are_worked_out_once():
    seen = []

    def head(x):
        seen.append(len(x))
        return x

    states = torch.randn(4, 17, 8, requires_grad=True)
    input_ids = torch.randint(8, (4, 17))
    loss = distillation_loss(states, torch.randn(4, 17, 8), head, lambda x: x, input_ids, chunk_tokens=10)
    loss.backward()
    assert max(seen) == 10
    assert sum(seen) == 4 * 16


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("vocabulary", [7, 2048, 49_152, 10**9])
def test_what_exists_at_once_does_not_grow_with_the_vocabulary(vocabulary, head_trains):
    chunk_tokens, block_tokens = positions_at_once(vocabulary, torch.device("cpu"), head_trains=head_trains)
    assert 1 <= block_tokens <= chunk_tokens
    assert chunk_tokens == 1 or chunk_tokens * vocabulary <= 2**25


@pytest.mark.parametrize("divergence", list(Divergence))
def test_divergences_between_far_apart_distributions_stay_finite(divergence):
    logits = torch.tensor([[[80.0, -80.0, 0.0]]]).expand(1, 2, 3).clone().requires_grad_()
    loss = distillation_loss(
        logits, -logits.detach(), lambda x: x, lambda x: x, torch.zeros(1, 2, dtype=torch.long), divergence=divergence
    )
    loss.backward()
    assert loss > (0.69 if divergence is Divergence.JENSEN_SHANNON else 100)
    assert loss < 200
    if divergence is Divergence.JENSEN_SHANNON:
        assert loss <= math.log(2) + 1e-6
    assert logits.grad.isfinite().all()


def test_a_slice_without_targets_costs_nothing():
    states = torch.randn(1, 4, 5, requires_grad=True)
    loss = distillation_loss(
        states,
        torch.randn(1, 4, 5),
        lambda x: x,
        lambda x: x,
        torch.zeros(1, 4, dtype=torch.long),
        targets=torch.zeros(1, 4, dtype=torch.bool),
    )
    loss.backward()
    assert loss == 0
    assert not states.grad.any()


def test_relative_error_is_that_of_each_sequence():
    student, teacher = torch.randn(2, 3, 5, 4)
    each = torch.stack([((s - t) ** 2).mean() / t.var(correction=0) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(relative_error(student, teacher), each.mean())
    weights = torch.tensor([2, 0, 3])
    torch.testing.assert_close(relative_error(student, teacher, weights), (2 * each[0] + 3 * each[2]) / 5)
    assert relative_error(teacher, teacher) == 0
