"""An exported ONNX folder in optimum: its logits and its greedy tokens against those of our own runtime.

Usage: .venv/bin/python scripts/interop_optimum.py FOLDER --peer PYTHON [--text TEXT] [--tokens 48] [--new-tokens 32]
       [--max-difference 1e-3]
FOLDER: written by `compress export MODEL onnx --out FOLDER`, in either flavour. --peer: the interpreter of
an environment with `optimum-onnx[onnxruntime]` (0.1.0 was tried). A language model opens as ORTModelForCausalLM (genai
with its cache, portable without), an encoder classifier as ORTModelForSequenceClassification, an encoder-decoder as
ORTModelForSeq2SeqLM, which writes the text itself. One JSON object: the largest difference of logits in standard
deviations of our rows, and how many of the tokens are the same; exit 1 above --max-difference or where a token differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from compress import pairs
from compress.labels import labels_of
from compress.measure import open_model

TEXT = "Compression is worth what can be proven about it: a model is pruned, rounded and measured, step by step."
PEER = """
import importlib.metadata, json, sys
import numpy as np, torch
from optimum import onnxruntime as optimum
folder, asked, out = sys.argv[1:]
asked = json.load(open(asked))
options = {} if asked["cache"] is None else {"use_cache": asked["cache"]}
model = getattr(optimum, asked["class"]).from_pretrained(folder, **options)
tensor = lambda ids: torch.tensor([ids])
found = {}
inputs = {"input_ids": tensor(asked["ids"]), "attention_mask": torch.ones(1, len(asked["ids"]), dtype=torch.long)}
target = {"decoder_input_ids": tensor(asked["target"])} if asked["target"] else {}
cache = {} if asked["cache"] is None else {"use_cache": asked["cache"]}
with torch.inference_mode():
    found["logits"] = model(**inputs, **target, **cache).logits[0].float().numpy()
    if asked["new_tokens"]:
        written = model.generate(
            **inputs, max_new_tokens=asked["new_tokens"], do_sample=False, num_beams=1, use_cache=asked["cache"],
            pad_token_id=asked["pad"], eos_token_id=asked["eos"] or None, repetition_penalty=1.0,
        )[0]
        found["tokens"] = written[1 if asked["target"] else len(asked["ids"]) :].numpy()
np.savez(out, **found)
print(json.dumps({n: importlib.metadata.version(n) for n in ("optimum-onnx", "transformers", "onnxruntime")}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", required=True, help="interpreter of an environment with optimum-onnx")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--max-difference", type=float, default=1e-3)
    options = parser.parse_args()
    found = compared(options)
    print(json.dumps(found))
    if not found["largest_difference"] <= options.max_difference or found["same_tokens"] != found["tokens"]:
        sys.exit(1)


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """Logits and greedy tokens of both runtimes."""
    model = open_model(str(options.folder))
    question, window = asked(model, options)
    versions, theirs = in_optimum(options, question)
    rows = next(iter(model.logits([window]))).numpy()
    difference = np.abs(theirs["logits"].reshape(rows.shape) - rows).max(axis=1) / rows.std(axis=1)
    ours: list[int] = []
    if question["new_tokens"]:
        prompt = pairs.prompt_of(model, window) if question["target"] else window
        ours = model.generate(prompt, question["new_tokens"])
    same = sum(a == b for a, b in zip(ours, theirs.get("tokens", np.zeros(0)).tolist()))
    return {
        "class": question["class"],
        **versions,
        "positions": len(rows),
        "largest_difference": float(difference.max()),
        "tokens": len(ours),
        "same_tokens": same,
    }


def asked(model: Any, options: argparse.Namespace) -> tuple[dict[str, Any], list[int]]:
    """What the other environment is asked, and the same as a window for ours."""
    question: dict[str, Any] = {"target": [], "cache": None, "new_tokens": 0, "pad": 0, "eos": sorted(model.eos_ids)}
    if pairs.paired(model):
        window = model.encode(pairs.joined(options.text, options.text))
        ids, target = pairs.split(window, model.start)
        own = {"class": "ORTModelForSeq2SeqLM", "target": target, "cache": False, "new_tokens": options.new_tokens}
        return {**question, **own, "ids": ids}, window
    window = model.encode(options.text)[: options.tokens]
    if labels_of(model):
        return {**question, "class": "ORTModelForSequenceClassification", "ids": window}, window
    own = {"class": "ORTModelForCausalLM", "cache": "no cache" not in model.compute, "new_tokens": options.new_tokens}
    return {**question, **own, "ids": window}, window


def in_optimum(options: argparse.Namespace, question: dict[str, Any]) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Versions, and what optimum answers, from a process of the other environment."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "asked.json", Path(folder) / "out.npz"
        given.write_text(json.dumps(question), encoding="utf-8")
        command = [options.peer, "-c", PEER, str(options.folder), str(given), str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"optimum failed with code {done.returncode}")
        with np.load(out) as held:
            return json.loads(done.stdout.splitlines()[-1]), dict(held)


if __name__ == "__main__":
    main()
