"""Loading by name, random models, and the fingerprint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from million_cli.errors import UserError
from million_cli.hf.models import (
    fingerprint,
    full_attention_layers,
    load_model,
    random_model,
    resolve_device,
    resolve_dtype,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_model().save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(
        tmp_path
    )
    return tmp_path


def test_load_from_a_folder(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    assert model.dtype == torch.float64, "auto is the checkpoint's dtype"
    assert not model.training
    assert tokenizer.pad_token == "</s>"
    assert tokenizer("a b").input_ids == [2, 3]
    assert load_model(str(folder), "bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "no such folder"),
        ("./model", "no such folder"),
        ("", "accepted are a folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_paths_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_model(name)
    assert f"model={name}" in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"})),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 100),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
    ],
    ids=["no config", "bad config", "unknown type", "no weights", "bad weights", "bad tokenizer"],
)
def test_damaged_folders(folder: Path, damage: Any) -> None:
    damage(folder)
    with pytest.raises(UserError) as error:
        load_model(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder_with_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that only its own Python code can load; a question on the terminal would fail the test."""
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["architectures"] = ["OwnModel"]
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    return folder


def test_code_that_comes_with_a_model_is_refused_without_a_question(folder_with_code: Path) -> None:
    with pytest.raises(UserError, match=r"needs Python code .* model\.trust_remote_code=true runs that code"):
        load_model(str(folder_with_code))


def test_code_that_comes_with_a_model_runs_when_it_is_trusted(folder_with_code: Path) -> None:
    model, tokenizer = load_model(str(folder_with_code), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert tokenizer("a b").input_ids == [2, 3]


def test_unknown_dtype_and_device() -> None:
    assert resolve_dtype("auto") is None
    with pytest.raises(UserError, match="dtype=int4: accepted are auto, float16"):
        resolve_dtype("int4")
    with pytest.raises(UserError, match="device=abacus"):
        resolve_device("abacus")
    with pytest.raises(UserError, match="device=cuda:99: this machine has"):
        resolve_device("cuda:99")


def test_random_models_are_reproducible_and_leave_the_global_generator_alone() -> None:
    shape = tiny_model().config.to_dict()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = random_model(shape, seed=1), random_model(shape, seed=1), random_model(shape, seed=2)
    assert torch.rand(1) == expected
    assert fingerprint(a) == fingerprint(b)
    assert fingerprint(a).differences(fingerprint(c)) == [
        f"weights: {fingerprint(a).weights!r} != {fingerprint(c).weights!r}"
    ]
    with pytest.raises(UserError, match="model_type=no-such-type"):
        random_model({"model_type": "no-such-type"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fingerprint_survives_casts(architecture: str) -> None:
    config = tiny_model(architecture).config
    original = random_model(config, seed=0, dtype="float32")
    expected = fingerprint(original)
    assert (expected.num_kv_heads, expected.head_dim, expected.num_layers) == (2, 16, 2)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        original.to(dtype)  # each cast on top of the last
        assert fingerprint(original) == expected


def test_fingerprint_sees_a_small_retraining() -> None:
    model = random_model(tiny_model().config, seed=0)
    before = fingerprint(model)
    weight = model.model.layers[1].self_attn.v_proj.weight
    with torch.no_grad():
        weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert fingerprint(model).differences(before)


def save_without(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"),
            r"lacks model\.layers\.1\.self_attn\.k_proj",
        ),
        (lambda w: w.pop("lm_head.weight"), r"lacks lm_head\.weight"),
        (lambda w: w.update({"score.weight": torch.ones(2)}), r"no place for: score\.weight"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"another shape for model\.norm\.weight"),
        (
            lambda w: [w.pop(key) for key in list(w) if "mlp" in key],
            r"lacks model\.layers\.0\.mlp\.down_proj\.weight, .* and 2 more",
        ),
    ],
    ids=["missing", "no head", "unexpected", "mismatched", "many"],
)
def test_a_checkpoint_that_is_not_the_models_is_refused_by_name(
    folder: Path, change: Any, message: str
) -> None:
    save_without(folder, change)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def test_what_is_tied_or_was_once_saved_is_not_missed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    save_without(
        folder,
        lambda w: (
            w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
            or w.pop("lm_head.weight")
        ),
    )
    model, _ = load_model(str(folder))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_another_rope_theta_is_another_model(folder: Path) -> None:
    before = fingerprint(load_model(str(folder))[0])
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(config))
    after = fingerprint(load_model(str(folder))[0])
    assert before.differences(after) == ["rope_theta: 10000.0 != 500.0"]
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(load_model(str(folder))[0]) == after, "positions are the codebook's matter"


class Adapted(nn.Module):
    """An adapter of low rank beside a projection, not merged into it."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.base_layer = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator).to(base.weight))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator).to(base.weight))
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = scale

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.scale * (x @ self.down.T @ self.up.T)


class Packed(nn.Linear):
    """A projection whose weight is packed into bytes of another order at its first call."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.dtype, self.bias = base.weight.dtype, base.bias
        self.repacked = False
        self.weight = nn.Parameter(base.weight.detach().view(torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.repacked:
            self.repacked, self.weight.data = True, self.weight.data.flip(0, 1)
        return nn.functional.linear(x, self.weight.flip(0, 1).view(self.dtype), self.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_the_fingerprint_is_of_the_map_and_not_of_its_storage(bias: bool) -> None:
    shape = {**tiny_model().config.to_dict(), "attention_bias": bias}
    model = random_model(shape, seed=0, dtype="float32")
    module = model.model.layers[1].self_attn
    if bias:
        nn.init.normal_(module.v_proj.bias, std=100)
    plain, base = fingerprint(model), module.v_proj
    module.v_proj = Packed(base)
    assert fingerprint(model) == plain
    assert module.v_proj.repacked
    assert fingerprint(model) == plain, "after the first call too"
    module.v_proj = Adapted(base, 0.0)
    assert fingerprint(model) == plain, "an adapter that does nothing"
    module.v_proj = Adapted(base, 0.02)
    adapted = fingerprint(model)
    assert [line.split(":")[0] for line in plain.differences(adapted)] == ["weights"]
    with torch.no_grad():
        base.weight += 0.02 * module.v_proj.up @ module.v_proj.down
    module.v_proj = base
    assert fingerprint(model) == adapted, "merged it is the same map"


def test_offloaded_weights_cannot_be_fingerprinted() -> None:
    with torch.device("meta"):
        model = random_model(tiny_model().config, device="meta")
    with pytest.raises(UserError, match="offloaded"):
        fingerprint(model)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("t5", {}, "cross attention"),
        ("deepseek_v3", {"num_hidden_layers": 2}, "latent attention"),
        ("mamba", {"num_hidden_layers": 2}, "mamba"),
        ("falcon_h1", {"num_hidden_layers": 4}, "accepted are full, sliding-window and linear attention"),
        ("mistral", {"num_hidden_layers": 2, "sliding_window": 8}, "no layer has full attention"),
    ],
)
def test_unsupported_architectures(model_type: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        full_attention_layers(AutoConfig.for_model(model_type, **fields))
