"""Our GPTQ checkpoints in GPTQModel itself: its logits on a text against those of the codes that compress decodes.

Usage: .venv/bin/python scripts/interop_gptq.py FOLDER --peer PYTHON --text FILE [--windows 4] [--length 256]
FOLDER: written by `compress export MODEL checkpoint --set format=gptq --out FOLDER`. --peer: the interpreter of an
environment with gptqmodel (7.7 was tried), which loads the folder with its kernel in plain torch. One JSON object:
perplexity of both, mean KL in nats per token, largest difference of logits in standard deviations of their row, and
whether the weights that GPTQModel unpacks are ours in its dtype; exit 1 where they are not, or where the KL exceeds
--max-kl.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from compress.measure import open_model
from compress.numerics.divergence import divergence, token_nll

PEER = """
import json, sys, torch
from gptqmodel import BACKEND, GPTQModel
folder, windows, out, dtype = sys.argv[1:]
model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=getattr(torch, dtype))
inner = model.model
weights = {n: m.dequantize_weight().T.contiguous().clone() for n, m in inner.named_modules() if hasattr(m, "qweight")}
with torch.inference_mode():
    rows = [inner(input_ids=torch.tensor([w])).logits[0].float() for w in json.load(open(windows))]
import gptqmodel
torch.save({"version": gptqmodel.__version__, "dtype": str(inner.dtype), "weights": weights, "logits": rows}, out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", required=True, help="interpreter of an environment with gptqmodel")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float16", help="of GPTQModel's scales and products; bfloat16 rounds scales")
    parser.add_argument("--max-kl", type=float, default=0.005)
    options = parser.parse_args()
    ours = open_model(str(options.folder))
    ids = ours.encode(options.text.read_text(encoding="utf-8"))
    starts = range(0, min(len(ids), options.windows * options.length), options.length)
    windows = [w for i in starts if len(w := ids[i : i + options.length]) > 1]
    if not windows:
        raise SystemExit(f"{options.text} holds no window of two tokens")
    theirs = peer(options.peer, options.folder, windows, options.dtype)
    found = compared(ours, theirs, windows)
    print(json.dumps(found, indent=2))
    if not found["weights_equal"] or not found["mean_kl"] <= options.max_kl:
        raise SystemExit(1)


def peer(python: str, folder: Path, windows: list[list[int]], dtype: str) -> dict:
    """What GPTQModel makes of the folder, in a process of the other environment."""
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary) / "windows.json", Path(temporary) / "out.pt"
        given.write_text(json.dumps(windows), encoding="utf-8")
        command = [python, "-c", PEER, str(folder), str(given), str(out), dtype]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        if done.returncode:
            raise SystemExit(f"gptqmodel failed with code {done.returncode}")
        return dict(torch.load(out, weights_only=True))


def compared(ours, theirs: dict, windows: list[list[int]]) -> dict:
    """Weights, perplexities and divergence."""
    kl, nll, tokens, largest = 0.0, [0.0, 0.0], 0, 0.0
    for window, expected, found in zip(windows, ours.logits(windows), theirs["logits"], strict=True):
        kl += float(divergence(expected, found).kl.sum())
        targets = torch.tensor(window[1:])
        nll = [total + float(token_nll(x[:-1], targets).sum()) for total, x in zip(nll, (expected, found))]
        tokens += len(window)
        largest = max(largest, float(((found - expected).abs() / expected.std(1, keepdim=True)).max()))
    coded = {name.removesuffix(".weight"): e for name, e in ours.encoded.items() if e.encoding.is_coded}
    same = coded.keys() == theirs["weights"].keys() and all(
        torch.equal(theirs["weights"][name], e.decode().to(theirs["weights"][name].dtype)) for name, e in coded.items()
    )
    scored = tokens - len(windows)
    return {
        "gptqmodel": theirs["version"],
        "dtype": theirs["dtype"],
        "weights_equal": same,
        "matrices": len(coded),
        "tokens": tokens,
        "perplexity": {"compress": math.exp(nll[0] / scored), "gptqmodel": math.exp(nll[1] / scored)},
        "mean_kl": kl / tokens,
        "largest_difference": largest,
    }


if __name__ == "__main__":
    main()
