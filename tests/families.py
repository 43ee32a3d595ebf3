"""A tiny random model of every text decoder that transformers registers for causal language modelling.

`python -m tests.families` prints the table of docs/models.md.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from latro.model import TreeModel, verify_tree

VOCABULARY = 67

SUPPORTED = """
    afmoe apertus arcee aria_text axk1 beam bert bert-generation biogpt bitnet cohere cohere2 cohere2_moe
    cohere_compass_text ctrl cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1 electra emu3 ernie ernie4_5
    ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text
    gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss granite
    granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama longcat_flash mellum mimo_v2_flash
    minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi nanochat
    nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe roc_bert
    seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
""".split()  # noqa: SIM905

# The layer, by its kind in the configuration or by its class, that keeps a family from running over a tree. Where there
# are two names, the second is that of an earlier transformers.
REFUSED = {
    "bailing_hybrid": "linear_attention",
    "bamba": "linear_attention",
    "falcon_mamba": "linear_attention",
    "granitemoehybrid": "linear_attention",
    "jamba": "linear_attention",
    "kimi_linear": "linear_attention",
    "mamba": "linear_attention",
    "mamba2": "linear_attention",
    "minimax": "linear_attention",
    "nemotron_h": "linear_attention",
    "olmo_hybrid": "linear_attention",
    "qwen3_5": "linear_attention",
    "qwen3_5_moe": "linear_attention",
    "qwen3_5_moe_text": "linear_attention",
    "qwen3_5_text": "linear_attention",
    "qwen3_next": "linear_attention",
    "qwen4_exp": "linear_attention",
    "qwen4_exp_text": "linear_attention",
    "recurrent_gemma": "linear_attention|RecurrentGemmaRecurrentBlock",
    "zamba": "linear_attention",
    "zamba2": "linear_attention",
    "axk2": "indexed_attention|deepseek_sparse_attention",
    "deepseek_v32": "indexed_attention|deepseek_sparse_attention",
    "dots3_note_text": "indexed_attention|deepseek_sparse_attention",
    "glm_moe_dsa": "indexed_attention|deepseek_sparse_attention",
    "hy_v4": "indexed_attention|deepseek_sparse_attention",
    "lfm2": "conv",
    "lfm2_moe": "conv",
    "lfm3": "conv",
    "llama4": "chunked_attention",
    "llama4_text": "chunked_attention",
    "falcon_h1": "hybrid",
    "zaya": "hybrid",
    "inkling2_text": "hybrid_sliding",
    "inkling_text": "hybrid_sliding",
    "openai-gpt": "Attention",
    "bart": "BartDecoderLayer",
    "big_bird": "BigBirdAttention",
    "bigbird_pegasus": "BigBirdPegasusDecoderLayer",
    "blenderbot": "BlenderbotDecoderLayer",
    "blenderbot-small": "BlenderbotSmallDecoderLayer",
    "bloom": "BloomAttention",
    "blt": "BltCrossAttention",
    "camembert": "CamembertEmbeddings",
    "codegen": "CodeGenAttention",
    "cpmant": "CpmAntSelfAttentionBlock",
    "data2vec-text": "Data2VecTextEmbeddings",
    "doge": "DogeAttention",
    "falcon": "FalconAttention",
    "gptj": "GPTJAttention",
    "gpt_neo": "GPTNeoAttention",
    "gpt_neox_japanese": "GPTNeoXJapaneseAttention",
    "gemma3": "Gemma3TextModel",
    "gemma4": "Gemma4TextModel",
    "gemma4_unified": "Gemma4UnifiedTextModel",
    "git": "GitLayer",
    "mbart": "MBartDecoderLayer",
    "marian": "MarianDecoderLayer",
    "megatron-bert": "MegatronBertAttention",
    "mllama": "MllamaCrossAttentionDecoderLayer",
    "mpt": "MptAttention",
    "xlm": "MultiHeadAttention",
    "mvp": "MvpDecoderLayer",
    "plbart": "PLBartDecoderLayer",
    "pegasus": "PegasusDecoderLayer",
    "fuyu": "PersimmonModel",
    "phi4_multimodal": "Phi4MultimodalAudioGluPointWiseConv",
    "prophetnet": "ProphetNetDecoderLayer",
    "got_ocr2": "Qwen2Model",
    "moss_transcribe_diarize": "Qwen3Model",
    "reformer": "ReformerAttention",
    "rembert": "RemBertAttention",
    "roformer": "RoFormerAttention",
    "roberta": "RobertaEmbeddings",
    "roberta-prelayernorm": "RobertaPreLayerNormEmbeddings",
    "rwkv": "RwkvSelfAttention",
    "trocr": "TrOCRDecoderLayer",
    "whisper": "WhisperDecoderLayer",
    "xglm": "XGLMAttention",
    "xlm-roberta": "XLMRobertaEmbeddings",
    "xlm-roberta-xl": "XLMRobertaXLEmbeddings",
    "xlnet": "XLNetRelativeAttention",
    "xmod": "XmodEmbeddings",
    "deepseek_v4": "heavily_compressed_attention",
    "xlstm": "xLSTMBlock",
}

# Not built here: of several parts, or drafters that run beside another model.
NOT_BUILT = {
    "dots3_note": "text, image and sound; its text model is dots3_note_text",
    "gemma3n": "text, image and sound; its text model is gemma3n_text",
    "gemma4_assistant": "drafts for gemma4, on its hidden states",
    "gemma4_unified_assistant": "drafts for gemma4_unified, on its hidden states",
    "musicgen": "decodes sound; not a text model",
    "musicgen_melody": "decodes sound; not a text model",
}

# Whatever a configuration calls its sizes. Windows are shorter than the test sequences, so that they matter.
SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "emb_dim": 32,
    "embedding_size": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "prefix_dense_intermediate_size": 24,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dff": 48,
    "dim_ff": 48,
    "d_inner": 48,
    "num_hidden_layers": 3,
    "num_layers": 3,
    "decoder_layers": 3,
    "num_decoder_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_head_dim": 8,
    "dim_head": 8,
    "rotary_dim": 8,
    "kv_lora_rank": 12,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "sliding_window": 7,
    "attention_window_size": 4,
    "attention_chunk_size": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "zero_expert_num": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "mamba_n_heads": 4,
    "mamba_d_state": 4,
    "mamba_d_ssm": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 4,
    "n_mamba_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    # Everything that changes what is computed, at a value that shows.
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
    "qk_layernorm": True,
    "use_qk_norm": True,
    "norm_topk_prob": True,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 3.0,
    "logit_scale": 0.25,
    "logits_scaling": 4.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    # Random numbers would differ between the two sides of a comparison.
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "router_jitter_noise": 0.0,
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]

LATENT_ATTENTION = [
    "axk1",
    "axk2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots3_note_text",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_linear",
    "minicpm3",
    "youtu",
]
ENCODERS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]

# What a family needs besides: latent attention without groups, encoders told to decode, sizes that hang together.
CHANGES: dict[str, dict[str, object]] = {
    **{family: {"num_key_value_heads": 4} for family in LATENT_ATTENTION},
    **{family: {"is_decoder": True} for family in ENCODERS},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(WINDOWED, ROPE | {"mrope_section": [1, 1, 2]}),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 3.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama": {"text_config": {}},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "is_decoder": True,
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 8,
        "shape_embed_dim": 8,
    },
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[family]
    changes = CHANGES.get(family, {}) | changes
    sizes = _sizes(config_class)
    if {"layer_types", "sliding_window"} <= sizes.keys() | config_class.__dataclass_fields__.keys():
        kinds = set(config_class(**sizes | changes).layer_types or ())
        if kinds and kinds <= set(WINDOWED):
            sizes["layer_types"] = list(WINDOWED)  # gemma4 changes its own
    return config_class(**sizes | changes)


def _sizes(config_class: type) -> dict[str, object]:
    fields = config_class.__dataclass_fields__
    sizes = {name: size for name, size in SIZES.items() if name in fields}
    if sizes.keys().isdisjoint({"hidden_size", "d_model"}):  # a model of several parts
        parts = {name: part for name, part in config_class.sub_configs.items() if hasattr(part, "sub_configs")}
        sizes |= {name: _sizes(part) for name, part in parts.items()}
    return sizes


def tiny_model(family: str, seed: int = 0, **changes: object) -> nn.Module:
    """In float32 and eval mode, with weights large enough for every part to matter."""
    config = tiny_config(family, **changes)
    # sdpa of transformers before 5.20 or so drops the softcap of attention scores.
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if softcapped else None, experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def outcome(family: str) -> str:
    """What becomes of the family, tried."""
    if family in NOT_BUILT:
        return f"not tried: {NOT_BUILT[family]}"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    try:
        TreeModel(model)
    except ValueError as refusal:
        return "refused: " + str(refusal).partition(" alone, but ")[2]
    verify_tree(tiny_model(family), tolerance=1e-5)
    return "works"


def table() -> str:
    lines = ["| family | class | outcome |", "|---|---|---|"]
    for family, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        lines.append(f"| {family} | {name} | {outcome(family)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
