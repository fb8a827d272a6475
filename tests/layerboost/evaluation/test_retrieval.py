"""Tests retrieval at a distance: which sequences are built, and which models can answer them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerboost.convert import convert
from layerboost.evaluation.evaluate import evaluate
from layerboost.evaluation.plan_evaluation import PlanEvaluation
from layerboost.evaluation.retrieval import (
    CUE_TOKENS,
    SEGMENT_TOKENS,
    retrieval_items,
    retrieval_scores,
    retrieval_tokens,
)
from layerboost.evaluation.scores import QualityError, QualitySpec
from layerboost.plan import Plan, Treatment
from layerboost.smallworld.train import MODEL_DIR
from layerboost.smallworld.write import DATA_DIR

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = QualitySpec(text=str(DATA_DIR / "val.txt"), n_sequences=16, sequence_tokens=64, retrieval=(32,))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


class Copying(nn.Module):
    """Predicts what followed the present token when it last occurred in the last `reach` tokens, else token 5."""

    def __init__(self, reach: int):
        super().__init__()
        self.reach, self.weight = reach, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, **_):
        logits = torch.zeros(*input_ids.shape, 800)
        for row, tokens in zip(logits, input_ids.tolist(), strict=True):
            for i, token in enumerate(tokens):
                seen = [j for j in range(max(0, i - self.reach), i) if tokens[j] == token]
                row[i, tokens[seen[-1] + 1] if seen else 5] = 1.0
        return SimpleNamespace(logits=logits)


def test_scored_tokens_are_known_from_the_segment_alone(tokenizer):
    items = retrieval_items(tokenizer, replace(SPEC, retrieval=(0, 32, 90)))
    for asked, distance in zip(items, (0, 32, 90), strict=True):
        assert asked.tokens.shape == (16, retrieval_tokens(distance))
        for row, scored in zip(asked.tokens, asked.scored, strict=True):
            first, between, again = row[1:].split([SEGMENT_TOKENS, distance, SEGMENT_TOKENS])
            assert torch.equal(first, again) and row[0] == tokenizer.bos_token_id
            wanted = again[scored].tolist()
            assert wanted and not scored[:CUE_TOKENS].any()
            assert not set(wanted) & set(between.tolist()) and len(set(wanted)) == len(wanted)
    assert torch.equal(items[1].tokens, retrieval_items(tokenizer, SPEC)[0].tokens)


def test_who_reaches_back_copies_and_who_does_not_cannot(tokenizer):
    asked = retrieval_items(tokenizer, SPEC)
    (far,), (near,) = (retrieval_scores(Copying(reach), asked, batch_tokens=300) for reach in (60, 20))
    assert far.metric == "retrieval@32" and far.higher_is_better and not far.primary and far.n_items == 16
    assert far.value > 0.2 and near.value == 0.0


def test_a_window_shorter_than_the_distance_loses_what_softmax_holds_on_both_paths(model, tokenizer):
    plans = [Plan.uniform(t, 12, w) for t, w in ((Treatment.SOFTMAX, None), (Treatment.WINDOW, 16))]
    found = [s.get("text", "retrieval@32") for s in PlanEvaluation(model, tokenizer, SPEC).run(plans)]
    assert found[0].value > 1.5 * found[1].value
    for plan, score in zip(plans, found, strict=True):
        variant = model if plan is plans[0] else convert(model, plan)
        for batch_size in (1, 8):
            alone = evaluate(variant, tokenizer, replace(SPEC, n_sequences=16, batch_size=batch_size))
            assert alone.get("text", "retrieval@32").items == score.items


def test_what_does_not_fit_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(QualityError, match=r"distance of 480 needs 513 tokens.*context of 512; give at most 479"):
        evaluate(model, tokenizer, replace(SPEC, retrieval=(480,)))
    short = tmp_path / "short.txt"
    short.write_text("\n\n".join(["The lamp of Tom Hill is in the barn. Mia Reed saw Tom Hill. The ball is new."] * 3))
    with pytest.raises(QualityError, match="distance of 200 the text gives 0 sequences, from 3 documents"):
        retrieval_items(tokenizer, replace(SPEC, text=str(short), retrieval=(200,)))
    with pytest.raises(QualityError, match="give a text"):
        retrieval_items(tokenizer, QualitySpec(tasks=("a",), retrieval=(8,)))
