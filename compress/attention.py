"""Attention as our models compute it: in transformers' register, by name, beside torch's own kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from compress.numerics.causal_attention import causal_attention
from compress.rounding import CacheRounding

CAUSAL = "compress_causal"
ROUNDED = "compress_rounded_cache"
IMPLEMENTATIONS = frozenset({"sdpa", CAUSAL, ROUNDED})  # that take a mask of ours
SHORTEST = 64  # positions; for fewer torch's kernel is as fast


def speed_up(module: Any) -> None:
    """Let a transformers model that would ask torch's kernel compute plain causal attention by our own."""
    _register()
    if module.config._attn_implementation == "sdpa":
        module.config._attn_implementation = CAUSAL


def round_cache(module: Any, attentions: list[nn.Module], rounding: CacheRounding) -> None:
    """Let the attention modules of a transformers model round every key and value before they read it.

    The cache itself keeps floats: rounding depends on a token's own values alone, so that reading rounds the same
    in each step, and as a cache of codes would.
    """
    _register()
    for attention in attentions:
        attention.cache_rounding = rounding  # type: ignore[assignment]
    module.config._attn_implementation = ROUNDED


def _register() -> None:
    for name, function in ((CAUSAL, _attend), (ROUNDED, _attend_rounded)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Our own attention where every position sees itself and all before it, and torch's kernel elsewhere."""
    if attention_mask is None and _is_plain(module, query, key, **kwargs):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        with torch.autocast("cpu", enabled=False):
            return causal_attention(query, key, value, scale).transpose(1, 2).contiguous(), None
    found: tuple[Tensor, Tensor | None] = AttentionInterface()["sdpa"](
        module, query, key, value, attention_mask, **kwargs
    )
    return found


def _is_plain(
    module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None = None, dropout: float = 0.0, **others: Any
) -> bool:
    """Whether, without a mask, attention is causal over a whole text, long enough and on a processor."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = query.shape[2] == key.shape[2] >= SHORTEST
    changed = any(others.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    return causal and whole and not changed and dropout == 0.0 and query.device.type == "cpu"


def _attend_rounded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    rounding = module.cache_rounding
    assert isinstance(rounding, CacheRounding)
    key, value = rounding(key, value)
    return _attend(module, query, key, value, attention_mask, **kwargs)
