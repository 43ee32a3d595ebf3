"""Models by name, at the sizes of their published configurations; and the random ones of bench/."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import LlamaConfig, MistralConfig, Phi3Config, PreTrainedConfig, Qwen3Config


def _sized(
    kind: Callable[..., PreTrainedConfig],
    D: int,
    inner: int,
    layers: int,
    heads: int,
    key_heads: int,
    V: int,
    **others: Any,
) -> Callable[[], PreTrainedConfig]:
    return partial(
        kind,
        hidden_size=D,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=V,
        **others,
    )


def _qwen3(D: int, inner: int, layers: int, heads: int, tied: bool) -> Callable[[], PreTrainedConfig]:
    return _sized(Qwen3Config, D, inner, layers, heads, 8, 151936, head_dim=128, tie_word_embeddings=tied)


MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-3.1-8b": _sized(LlamaConfig, 4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _sized(LlamaConfig, 8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": _sized(MistralConfig, 4096, 14336, 32, 32, 8, 32768, sliding_window=None),
    "phi-3.5-mini": _sized(Phi3Config, 3072, 8192, 32, 32, 32, 32064, pad_token_id=None),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "bench-step": _sized(Qwen3Config, 512, 1536, 6, 8, 4, 32000, head_dim=64, tie_word_embeddings=False),
    "bench-scaling": _sized(Qwen3Config, 256, 768, 2, 4, 2, 8000, head_dim=64, tie_word_embeddings=False),
}
