"""GGUF files: the converted model is the one in the file, made once; SmolLM2 comes from either source."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from million_cli.errors import UserError
from million_cli.hf.gguf import (
    SMOLLM2_FILE,
    SMOLLM2_HUB,
    SMOLLM2_PACKAGE,
    converted,
    hub_folder,
    packaged_file,
    smollm2,
)
from million_cli.hf.models import load_model, random_model

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
ALPHABET = sorted({chr(c) for c in range(33, 127)} | {"Ġ", "Ċ"})
TOKENS = [*ALPHABET, "ĊĊ", "xy", "<|end|>"]
SHAPE = {
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MILLION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "million" / "gguf"


@pytest.fixture
def model() -> PreTrainedModel:
    return random_model(SHAPE, seed=1, dtype="float16").float()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as GGUF orders them: rotary pairs side by side."""
    halves = weight.reshape(heads, 2, HEAD_DIM // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: PreTrainedModel,
    split: str = "smollm",
    dtype: torch.dtype = torch.float16,
    change: Change | None = None,
    scaling: str | None = None,
) -> Path:
    """A GGUF file of a tiny Llama, as llama.cpp's converter writes them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(SHAPE["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    if scaling is not None:
        writer.add_string("llama.rope.scaling.type", scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["Ċ Ċ", "x y"])
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_bos_token_id(len(TOKENS) - 1)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            weight = interleaved(weight, HEADS)
        if name.endswith("k_proj.weight"):
            weight = interleaved(weight, KV_HEADS)
        name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        name = name.replace("model.layers", "blk")
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if name != "lm_head.weight":  # tied
            tensors[name] = weight
    if change is not None:
        change(tensors)
    for name, weight in tensors.items():
        if weight.dim() == 1:
            writer.add_tensor(name, weight.float().numpy())
        elif dtype is torch.bfloat16:
            raw = weight.to(dtype).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, weight.to(dtype).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] % len(TOKENS)).logits


def test_the_model_in_the_file_is_the_one_that_is_loaded(tmp_path: Path, model: PreTrainedModel) -> None:
    path = write(tmp_path / "tiny.gguf", model)
    loaded, tokenizer = load_model(str(path), "float32")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert load_model(str(path))[0].dtype == torch.float16
    assert loaded.config.max_position_embeddings == tokenizer.model_max_length == 256
    assert not hasattr(loaded.config, "quantization_config")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|end|>")
    assert tokenizer.chat_template


def test_bfloat16_stays_bfloat16(tmp_path: Path, model: PreTrainedModel) -> None:
    path = write(tmp_path / "tiny.gguf", model, dtype=torch.bfloat16)
    loaded, _ = load_model(str(path))
    assert loaded.dtype == torch.bfloat16
    expected = model.get_input_embeddings().weight.to(torch.bfloat16)
    assert torch.equal(loaded.get_input_embeddings().weight, expected)


def test_a_file_is_converted_once_whatever_its_name(
    tmp_path: Path, model: PreTrainedModel, cache: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", model)
    stale = cache / f".0123abcd.{converted(path).name}"  # of a conversion that was killed
    marks = {file: file.stat().st_mtime_ns for file in converted(path).iterdir()}
    assert len(marks) >= 5
    stale.mkdir()
    other = path.rename(tmp_path / "other.gguf")
    assert converted(other) == next(iter(marks)).parent
    assert {file: file.stat().st_mtime_ns for file in converted(other).iterdir()} == marks

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors["output_norm.weight"] = tensors["output_norm.weight"] * 2

    edited = write(tmp_path / "other.gguf", model, change=double)
    assert converted(edited) != next(iter(marks)).parent
    assert len([entry for entry in cache.iterdir() if entry.is_dir() and entry != stale]) == 2


def test_what_a_killed_conversion_left_is_removed(
    tmp_path: Path, model: PreTrainedModel, cache: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", model)
    folder = converted(path)
    stale = folder.rename(folder.with_name(f".0123abcd.{folder.name}"))
    assert converted(path) == folder
    assert not stale.exists()
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("split", "text", "tokens", "warned"),
    [
        ("smollm", "a\n\n1  23", ["a", "ĊĊ", "1", "Ġ", "Ġ", "2", "3"], False),
        ("gpt-2", "a\n\n1", ["a", "Ċ", "Ċ", "1"], False),
        ("llama-bpe", "a\n\n1", ["a", "ĊĊ", "1"], None),
        ("no-such-rule", "a\n\n1", ["a", "Ċ", "Ċ", "1"], True),
    ],
)
def test_text_is_split_as_the_file_says(
    tmp_path: Path,
    model: PreTrainedModel,
    caplog: pytest.LogCaptureFixture,
    split: str,
    text: str,
    tokens: list[str],
    warned: bool | None,
) -> None:
    path = write(tmp_path / "tiny.gguf", model, split)
    for _ in range(2):  # said when it is converted, and when it is found
        caplog.clear()
        with caplog.at_level(logging.WARNING, "million"):
            _, tokenizer = load_model(str(path))
        said = f"tokenizer.ggml.pre={split} is not known" in caplog.text
        if warned is None and said:
            pytest.skip(f"this version of transformers does not know {split}")
        assert said is bool(warned)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["blk.1.attn_k.weight"]


def enlarge(tensors: dict[str, torch.Tensor]) -> None:
    tensors["output_norm.weight"] = tensors["output_norm.weight"] * 1e6


def add_scaling(tensors: dict[str, torch.Tensor]) -> None:
    tensors["rope_freqs.weight"] = torch.linspace(1, 8, HEAD_DIM // 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"change": drop}, r"the checkpoint lacks model\.layers\.1\.self_attn\.k_proj\.weight"),
        ({"change": enlarge}, r"model\.norm\.weight is not finite in torch\.float16"),
        ({"change": add_scaling}, r"rotary scaling \(rope_freqs\.weight\)"),
        ({"scaling": "yarn"}, r"rotary scaling \(rope\.scaling\.type=yarn\)"),
    ],
)
def test_a_model_that_would_be_another_one_is_refused(
    tmp_path: Path, model: PreTrainedModel, cache: Path, settings: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "tiny.gguf", model, **settings)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(path))
    assert str(path) in str(error.value)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()], "nothing is left of it"


def test_damaged_files_end_in_one_line(tmp_path: Path, model: PreTrainedModel) -> None:
    whole = write(tmp_path / "whole.gguf", model).read_bytes()
    for size in (4, 20, 1000, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.gguf: cannot be read") as error:
            load_model(str(path))
        assert "\n" not in str(error.value)
    other = tmp_path / "model.bin"
    other.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"model\.bin: not a GGUF file; accepted are a folder, a GGUF file"):
        load_model(str(other))
    part = tmp_path / "big-00001-of-00003.gguf"
    part.write_bytes(whole)
    with pytest.raises(UserError, match="one part of a split model; accepted is a whole file"):
        load_model(str(part))
    with pytest.raises(UserError, match=r"nowhere\.gguf: no such folder or file"):
        load_model("nowhere.gguf")


def test_smollm2_comes_from_the_hub_where_it_answers(tmp_path: Path) -> None:
    asked = []

    def fetch(name: str) -> Path:
        asked.append(name)
        return tmp_path

    assert smollm2(fetch) == tmp_path
    assert asked == [SMOLLM2_HUB]


def test_smollm2_is_refused_by_what_is_missing_or_wrong(
    tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(name: str) -> Path:
        raise ConnectionError("no route\nto host")

    wrong = write(tmp_path / "tiny.gguf", model)
    with pytest.raises(UserError, match=r"its SHA-256 is [0-9a-f]{64}; accepted is b179c952"):
        smollm2(fetch, wrong)
    monkeypatch.setattr("million_cli.hf.gguf.SMOLLM2_PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"out of reach \(no route\), and the package no-such-package is not"):
        smollm2(fetch)


def test_the_hub_is_not_asked_where_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode"):
        hub_folder("nobody/nothing")


def test_packaged_files_are_found_without_an_import() -> None:
    assert packaged_file("no-such-package", "x") is None
    assert packaged_file("torch", "torch/no-such-file") is None
    assert packaged_file("torch", "torch/version.py").is_file()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_smollm2_from_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    file = packaged_file(SMOLLM2_PACKAGE, SMOLLM2_FILE)
    if file is None:
        pytest.skip(f"{SMOLLM2_PACKAGE} is not installed")
    monkeypatch.delenv("XDG_CACHE_HOME")  # converted once for all runs
    model, tokenizer = load_model(str(file), "float32")
    assert tokenizer.special_tokens_map == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == model.config.vocab_size == 49152
    for text, ids in (  # of the published tokenizer
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
    ):
        assert tokenizer(text).input_ids == ids
    for text in (
        "def f(x):\n\treturn x\r\n\n\n1.  2",
        "日本語 🙂\u200d\x00",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    for prompt, end in (("The capital of France is", ""), (chat, "<|im_end|>")):
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
        assert "Paris" in answer
        assert answer.endswith(end)
