"""A model that was trained by LoRA, pruned and stored in mixed precision leaves through every path like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.exporting import weights_exact
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import exporter, step
from tests.tiny_gguf import kl, tiny, trained_tokenizer, windows

pytestmark = pytest.mark.usefixtures("one_thread")
CHAIN: list[tuple[str, dict[str, Any]]] = [
    (
        "distill.logits",
        {"train": "lora", "lora_rank": 4, "tokens": 128, "selection_tokens": 64, "batch": 1, "checks": 1},
    ),
    ("prune.wanda", {"pattern": "2:4"}),
    (
        "quantize.rtn",
        {
            "group_size": 32,
            "keep": {"*.down_proj": "int8", "*.v_proj": "fp16", "*.o_proj": "fp32", "*.1.*": "int5", "lm_head": "int5"},
        },
    ),
]
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "gguf": ("gguf", {}),
    "onnx genai": ("onnx", {}),
    "onnx portable": ("onnx", {"flavour": "portable"}),
}


@pytest.fixture(scope="module")
def chained() -> Model:
    """A model that has gone through all of them."""
    tokenizer = trained_tokenizer()
    model, teacher = tiny(tokenizer=tokenizer), tiny(tokenizer=tokenizer, seed=1)
    generator = torch.Generator().manual_seed(2)
    some = [torch.randint(0, 1000, (32,), generator=generator) for _ in range(8)]
    for name, fields in CHAIN:
        before = model.digest
        step(name)(**fields).apply(
            model, Context(seed=0, calibration=some, selection=some[:4], teacher=lambda: teacher)
        )
        model.touch()
        assert model.digest != before, name
    assert {str(e.encoding) for e in model.encoded.values()} == {"int4 g32", "int5 g32", "int8 g32", "fp16"}
    return model


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_holds_what_the_chain_left_and_computes_it(chained: Model, format: str, tmp_path: Path) -> None:
    kind, fields = FORMATS[format]
    made = exporter(kind)(**fields)
    made.check(chained.facts)
    made.write(chained, tmp_path)
    assert weights_exact(chained, made, tmp_path)
    stored = dict(made.stored(tmp_path))
    assert chained.masks.keys() == {f"{name}.weight" for name in chained.facts.linears}
    for name, mask in chained.masks.items():
        held = stored[name]
        weights = held if isinstance(held, torch.Tensor) else held.decode()
        assert not weights[~mask].any() and int(mask.sum()) == mask.numel() // 2
    opened = made.open(tmp_path)
    (window,) = windows(chained, 60)
    # llama.cpp rounds activations to 8 bits where codes are multiplied
    limit = 0.03 if format == "gguf" else 1e-7
    assert kl(next(chained.logits([window])), next(opened.logits([window]))) < limit
    opened.close()
