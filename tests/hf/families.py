"""Tiny random models of the families in the README's table of models, served and refused."""

from __future__ import annotations

from typing import Any

from tiny_models import VOCABULARY
from transformers import PreTrainedModel

from million_cli.hf.models import random_model

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_PLAIN = {**_SMALL, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
_MIXTRAL = {**_PLAIN, **_EXPERTS, "num_local_experts": 2}
_QWEN_MOE = {**_PLAIN, **_EXPERTS, "num_experts": 2, "shared_expert_intermediate_size": 16}
_DEEPSEEK = {**_PLAIN, **_EXPERTS, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}
_MLA = {**_DEEPSEEK, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
_SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}

FULL: dict[str, dict[str, Any]] = {
    "llama": _PLAIN,
    "mistral": {**_PLAIN, "sliding_window": None},
    "mixtral": {**_MIXTRAL, "sliding_window": None},
    "ministral3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2_moe": _QWEN_MOE,
    "qwen3": _PLAIN,
    "qwen3_moe": _QWEN_MOE,
    "phi": _PLAIN,
    "phi3": _PLAIN,
    "gemma": _PLAIN,
    "olmo2": _PLAIN,
    "granite": _PLAIN,
    "cohere": _PLAIN,
    "glm4": _PLAIN,
    "glm4_moe": _DEEPSEEK,
    "smollm3": _PLAIN,
    "starcoder2": {**_PLAIN, "sliding_window": None},
    "stablelm": {**_SMALL, "num_key_value_heads": 4},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": _SMALL,
    "persimmon": _SMALL,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
    },
    **dict.fromkeys(
        ("apertus", "arcee", "biogpt", "ernie4_5", "hunyuan_v1_dense", "internlm3", "jais2"),
        _PLAIN,
    ),
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 1024},
}
"""Full attention in every layer."""

WINDOWS: dict[str, dict[str, Any]] = {
    "gemma2": {**_PLAIN, **_SLIDING, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_PLAIN, **_SLIDING},
    "cohere2": {**_PLAIN, **_SLIDING},
    "gpt_oss": {**_MIXTRAL, **_SLIDING},
    "granite_swa": {**_PLAIN, **_SLIDING},
    "granitemoe_swa": {**_MIXTRAL, **_SLIDING},
}
"""Sliding windows in some layers; the last three have attention sinks."""

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_QWEN_MOE, **_LINEAR},
    "qwen3_5_text": {**_PLAIN, **_LINEAR},
    "qwen3_5_moe_text": {**_QWEN_MOE, **_LINEAR},
    "olmo_hybrid": {**_PLAIN, **_LINEAR},
    "granitemoehybrid": {
        **_MIXTRAL, **_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16,
        "mamba_expand": 2,
    },
    "nemotron_h": {
        **_PLAIN, **_EXPERTS, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "n_routed_experts": 2,
        "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    },
    "jamba": {
        **_PLAIN, **_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "lfm2": {**_PLAIN, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {**_QWEN_MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
}  # fmt: skip
"""Linear attention or convolutions in some layers."""

FAMILIES = {**FULL, **WINDOWS, **HYBRIDS}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v3": (_MLA, "latent attention"),
    "mimo_v2_flash": ({**_PLAIN, **_EXPERTS, "v_head_dim": 8}, "head_dim of keys and values"),
    "diffllama": (_PLAIN, "attention cannot read a PQ cache"),
    "bloom": (_SMALL, "attention cannot be replaced"),
    "falcon_h1": ({**_PLAIN, **_MAMBA, "mamba_d_ssm": 64}, "LinearAttentionAndFullAttentionLayer"),
    "bamba": ({**_PLAIN, **_MAMBA, "attn_layer_indices": [1], "mamba_expand": 2}, "other logits"),
    "mamba": ({**_SMALL, "state_size": 8}, "nothing to quantise"),
}
"""Families of models that are refused, and a part of the sentence that says why."""


def family_config(model_type: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration of a tiny model."""
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"model_type": model_type, **tokens, "initializer_range": 0.25, **settings}


def family_model(model_type: str, settings: dict[str, Any] | None = None) -> PreTrainedModel:
    """A tiny random float64 model."""
    settings = FAMILIES[model_type] if settings is None else settings
    model = random_model(family_config(model_type, settings), dtype="float64")
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config._experts_implementation = "eager"  # torch's grouped products lack float64
    return model
