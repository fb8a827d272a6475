"""Tests a model's own text: it follows the whole distribution, and is the same whoever draws it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from layerboost.convert import convert
from layerboost.plan import Plan
from layerboost.text.sampling import sample_documents
from tests.models import tiny_model

BOS, EOS, OTHER_END = 1, 2, 3


def _tokenizer(bos: str | None = "w1", eos: str | None = "w2") -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(97)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), bos_token=bos, eos_token=eos
    )


def _model(**changes):
    # The distribution is soft enough for documents of several tokens in which every token can occur.
    return tiny_model("llama", seed=11, initializer_range=0.1, **changes)


@pytest.mark.usefixtures("one_thread")
def test_a_document_is_the_same_whichever_unit_and_batch_it_is_sampled_in():
    model, tokenizer = _model(), _tokenizer()
    whole = sample_documents(model, tokenizer, 12, 30, seed=5, batch_size=12)
    for first, n, batch_size in ((0, 12, 5), (4, 3, 1), (9, 3, 8)):
        part = sample_documents(model, tokenizer, n, 30, seed=5, first=first, batch_size=batch_size)
        assert part == whole[first : first + n]
    assert len(set(map(tuple, whole))) == 12
    assert not set(map(tuple, whole)) & set(map(tuple, sample_documents(model, tokenizer, 12, 30, seed=6)))


def test_documents_begin_with_bos_and_end_where_the_model_or_the_tokenizer_ends_them():
    model = _model()
    model.generation_config.eos_token_id = [EOS, OTHER_END]
    documents = sample_documents(model, _tokenizer(), 60, 40, seed=0, batch_size=30, temperature=2.0)
    ended = [document for document in documents if len(document) < 40]
    assert len(ended) > 10 and {document[-1] for document in ended} == {EOS, OTHER_END}
    for document in documents:
        assert document[0] == BOS and 2 <= len(document) <= 40
        assert not {EOS, OTHER_END} & set(document[:-1])
    without_bos = sample_documents(model, _tokenizer(bos=None), 3, 10, seed=0)
    assert [document[0] for document in without_bos] == [EOS] * 3
    model.generation_config.eos_token_id = None
    endless = sample_documents(model, _tokenizer(eos=None), 3, 10, seed=0)
    assert [len(document) for document in endless] == [10] * 3


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_every_token_is_drawn_as_often_as_the_model_says(temperature):
    n = 4000
    model = _model()
    drawn = sample_documents(model, _tokenizer(), n, 2, seed=1, temperature=temperature, batch_size=1000)
    observed = torch.bincount(torch.tensor(drawn)[:, 1], minlength=97).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[BOS]])).logits[0, -1].double()
    expected = n * torch.softmax(logits / temperature, dim=-1)
    common = expected >= 5  # a chi-square statistic needs at least 5 expected counts
    statistic = float(((observed - expected) ** 2 / expected)[common].sum())
    assert statistic < int(common.sum()) + 5 * (2 * int(common.sum())) ** 0.5
    assert (observed > 0).sum() > 60 * min(temperature, 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 2, "top_p": 0.1, "temperature": 0.1},
        {"repetition_penalty": 5.0},
        {"suppress_tokens": list(range(10, 90))},
        {"min_new_tokens": 19},
    ],
)
def test_how_the_model_is_set_to_generate_has_no_part(settings):
    model = _model()
    expected = sample_documents(model, _tokenizer(), 12, 20, seed=1)
    assert any(len(document) < 20 for document in expected)
    model.generation_config.update(**settings)
    assert sample_documents(model, _tokenizer(), 12, 20, seed=1) == expected


def test_sampling_goes_on_from_what_was_sampled():
    model = _model()
    documents = sample_documents(model, _tokenizer(), 800, 3, seed=2, batch_size=400)
    with torch.no_grad():
        follow = model(input_ids=torch.tensor([[BOS, d[1]] for d in documents])).logits[:, -1].log_softmax(-1)
        shuffled = model(input_ids=torch.tensor([[BOS, d[1]] for d in documents[::-1]])).logits[:, -1].log_softmax(-1)
    long = [i for i, document in enumerate(documents) if len(document) == 3]
    last = torch.tensor([documents[i][2] for i in long])
    assert follow[long, last].mean() > shuffled[long, last].mean() + 0.05


def test_nothing_is_left_changed():
    model = _model(attention_dropout=0.5).train()
    own = model.generation_config
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    first = sample_documents(model, _tokenizer(), 4, 12, seed=3)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert model.generation_config is own and model.training
    torch.manual_seed(2)
    assert sample_documents(model, _tokenizer(), 4, 12, seed=3) == first, "dropout or the global state had a part"


def test_converted_models_sample_too():
    model = convert(_model(), Plan.parse("LNSW", 4)).eval()
    documents = sample_documents(model, _tokenizer(), 3, 12, seed=0, batch_size=2)
    assert documents == sample_documents(model, _tokenizer(), 3, 12, seed=0, batch_size=3)
    assert documents != sample_documents(_model(), _tokenizer(), 3, 12, seed=0)


def test_what_cannot_be_sampled_says_so():
    model = _model()
    for changes, message in [
        ({"max_tokens": 1}, "max_tokens: 1 leaves nothing"),
        ({"max_tokens": 257}, "max_tokens: 257 is more than the model's 256 positions"),
        ({"temperature": 0.0}, r"temperature: 0\.0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"n_documents": 0}, "n_documents: 0"),
        ({"first": -1}, "from number -1"),
        ({"tokenizer": _tokenizer(None, None)}, "neither BOS nor EOS"),
    ]:
        arguments = {"tokenizer": _tokenizer(), "n_documents": 1, "max_tokens": 4, "seed": 0} | changes
        with pytest.raises(ValueError, match=message):
            sample_documents(model, **arguments)
