"""Attention over keys and values that are rounded as a quantized cache would hold them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from compress.rounding import CacheRounding

NAME = "compress_rounded_cache"  # in transformers' register of attention functions
IMPLEMENTATIONS = frozenset({"sdpa", NAME})  # that take a mask of ours


def round_cache(module: Any, attentions: list[nn.Module], rounding: CacheRounding) -> None:
    """Let the attention modules of a transformers model round every key and value before they read it.

    The cache itself keeps floats: rounding depends on a token's own values alone, so that reading rounds the same
    in each step, and as a cache of codes would.
    """
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for attention in attentions:
        attention.cache_rounding = rounding  # type: ignore[assignment]
    module.config._attn_implementation = NAME


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    rounding = module.cache_rounding
    assert isinstance(rounding, CacheRounding)
    key, value = rounding(key, value)
    found: tuple[Tensor, Tensor | None] = AttentionInterface()["sdpa"](
        module, query, key, value, attention_mask, **kwargs
    )
    return found
