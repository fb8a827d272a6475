"""Tests models that come as GGUF files: their weights, their tokenizer, and files that are no good."""

from __future__ import annotations

import builtins
import threading
from pathlib import Path

import pytest
import torch

from layerboost import gguf
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.convert import convert
from layerboost.plan import Plan
from tests.gguf_files import CHAT_TEMPLATE, TOKENS, write_gguf
from tests.models import tiny_model


@pytest.fixture
def model():
    # Q8_0 quantizes blocks of 32 numbers.
    return tiny_model("llama", vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, head_dim=16)


def unpacked(file: Path, cache: Path) -> Path:
    folder = gguf.folder_for(file, cache, gguf.content_of(file))
    gguf.unpack(file, folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [("F32", torch.float32, 0), ("F16", torch.float16, 2e-3), ("Q8_0", torch.bfloat16, 0.02)],
)
def test_the_unpacked_model_is_the_one_in_the_file(model, tmp_path, kind, dtype, error):
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file, kind=kind)
    folder = unpacked(file, tmp_path / "cache")
    found = load_model(str(folder))
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}
    for (name, expected), (same, actual) in zip(model.state_dict().items(), found.state_dict().items(), strict=True):
        assert name == same
        assert (actual.float() - expected).abs().max() <= error * expected.abs().max(), name
    tokens = torch.randint(3, len(TOKENS), (2, 20))
    with torch.inference_mode():
        logits = [each.float()(input_ids=tokens).logits for each in (model, found)]
        assert (logits[0] - logits[1]).std() <= max(1e-5, 10 * error) * logits[0].std()
        assert convert(found, Plan.parse("SWNL", 5))(input_ids=tokens).logits.isfinite().all()


def test_tokenizer_and_chat_template_come_out_of_the_file(model, tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file)
    tokenizer = load_tokenizer(str(unpacked(file, tmp_path / "cache")))
    assert tokenizer("cabc")["input_ids"] == [TOKENS.index(token) for token in ("c", "ab", "c")]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_the_folder_is_named_by_the_content_of_the_file(model, tmp_path):
    write_gguf(model, tmp_path / "a.gguf")
    write_gguf(model, tmp_path / "b.gguf", kind="F16")
    contents = [gguf.content_of(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    assert contents[0] != contents[1]
    assert gguf.folder_for(tmp_path / "a.gguf", tmp_path, contents[0]).name == f"a-{contents[0][:16]}"


def test_processes_that_unpack_at_once_leave_one_whole_folder(model, tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file)
    threads = [threading.Thread(target=unpacked, args=(file, tmp_path / "cache")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (folder,) = (tmp_path / "cache").iterdir()
    assert torch.equal(load_model(str(folder)).lm_head.weight, model.lm_head.weight)


def test_a_file_that_lacks_a_tensor_is_refused(model, tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file, leave_out="blk.1.ffn_up")
    with pytest.raises(gguf.GgufError, match=r"model\.layers\.1\.mlp\.up_proj"):
        unpacked(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("damage", ["empty", "text", "half"])
def test_a_damaged_file_is_refused(model, tmp_path, damage):
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file)
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"these are words" * 9, "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(gguf.GgufError, match="cannot be read"):
        unpacked(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_part_of_a_split_model_is_refused(tmp_path):
    with pytest.raises(gguf.GgufError, match="join the parts"):
        gguf.check_whole(tmp_path / "big-00001-of-00003.gguf")
    gguf.check_whole(tmp_path / "big-7b.gguf")


def test_a_part_that_another_process_swept_away_is_no_loss(model, tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file)
    folder = unpacked(file, tmp_path / "cache")

    def fail(file, part):
        raise OSError("swept away")

    monkeypatch.setattr(gguf, "_write", fail)
    gguf.unpack(file, folder)
    with pytest.raises(OSError, match="swept away"):
        gguf.unpack(file, tmp_path / "cache" / "elsewhere")


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_gguf(name, *arguments, **named):
        if name == "gguf":
            raise ImportError(name)
        return real_import(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(gguf.GgufError, match=r"layerboost\[gguf\]"):
        gguf.read_config(tmp_path / "tiny.gguf")
