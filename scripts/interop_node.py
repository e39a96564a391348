"""A portable ONNX artifact in JavaScript: onnxruntime-node's or onnxruntime-web's logits against those of our runtime.

Usage: .venv/bin/python scripts/interop_node.py FOLDER --modules DIR [--runtime onnxruntime-node] [--text TEXT]
       [--tokens 64] [--max-difference 1e-3]
FOLDER: written by `compress export MODEL onnx --set flavour=portable --out FOLDER`. --modules: a folder in which
`npm install --ignore-scripts onnxruntime-node onnxruntime-web` was run. The tokens are those of a text; the sequence is
sent whole, then in two halves as a batch. One JSON object: the largest difference of logits in standard deviations of
the reference's rows, and on how many positions both name the same token; exit 1 above --max-difference.
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

TEXT = "Compression is worth what can be proven about it: a model is pruned, rounded and measured, step by step. " * 8
PROGRAM = """
import { createRequire } from "node:module";
import { readFileSync, writeFileSync, existsSync } from "node:fs";
const [folder, modules, name, asked, out] = process.argv.slice(2);
const ort = createRequire(modules + "/")(name);
const web = name === "onnxruntime-web";
const graph = folder + "/model.onnx", weights = "model.onnx.data";
const options = { executionProviders: [web ? "wasm" : "cpu"] };
let source = graph;
if (web) {
  ort.env.wasm.numThreads = 1;
  source = new Uint8Array(readFileSync(graph));
  if (existsSync(folder + "/" + weights))
    options.externalData = [{ path: weights, data: new Uint8Array(readFileSync(folder + "/" + weights)) }];
}
const session = await ort.InferenceSession.create(source, options);
const found = [];
for (const { dims, ids } of JSON.parse(readFileSync(asked, "utf-8"))) {
  const tensor = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  const feeds = { input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) };
  const given = Object.fromEntries(session.inputNames.map((input) => [input, feeds[input]]));
  found.push((await session.run(given))[session.outputNames[0]]);
}
const bytes = found.map(({ data }) => Buffer.from(data.buffer, data.byteOffset, data.byteLength));
writeFileSync(out, Buffer.concat(bytes));
console.log(JSON.stringify({ dims: found.map(({ dims }) => dims), inputs: session.inputNames }));
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--modules", type=Path, required=True)
    parser.add_argument("--runtime", choices=["onnxruntime-node", "onnxruntime-web"], default="onnxruntime-node")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--tokens", type=int, default=64, help="even")
    parser.add_argument("--max-difference", type=float, default=1e-3)
    options = parser.parse_args()
    found = compared(options)
    print(json.dumps(found))
    if not found["largest_difference"] <= options.max_difference:
        sys.exit(1)


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """Logits of both runtimes on one sequence, and on its halves as a batch of two."""
    from compress.measure import open_model

    model = open_model(str(options.folder))
    ids = model.encode(options.text)[: options.tokens // 2 * 2]
    half = len(ids) // 2
    windows = [ids, ids[:half], ids[half:]]
    expected = [rows.numpy() for rows in model.logits(windows)]
    shape = expected[0].shape[-1]
    asked = [{"dims": [1, len(ids)], "ids": ids}, {"dims": [2, half], "ids": ids}]
    answer, flat = in_node(options, asked)
    assert answer["dims"] == [[1, len(ids), shape], [2, half, shape]], answer["dims"]
    said = flat.reshape(2, len(ids), shape)
    theirs = np.concatenate([said[0], said[1]])
    ours = np.concatenate(expected)
    difference = np.abs(theirs - ours).max(axis=1) / ours.std(axis=1)
    package = json.loads((options.modules / "node_modules" / options.runtime / "package.json").read_text("utf-8"))
    return {
        "runtime": f"{options.runtime} {package['version']}",
        "positions": len(ours),
        "largest_difference": float(difference.max()),
        "same_token": int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum()),
    }


def in_node(options: argparse.Namespace, asked: list[dict[str, Any]]) -> tuple[dict[str, Any], np.ndarray]:
    """What the JavaScript runtime answers: shapes, and all logits one behind the other."""
    with tempfile.TemporaryDirectory() as folder:
        program, questions, out = (Path(folder) / name for name in ("run.mjs", "asked.json", "logits.bin"))
        program.write_text(PROGRAM, encoding="utf-8")
        questions.write_text(json.dumps(asked), encoding="utf-8")
        places = [options.folder.resolve(), options.modules.resolve(), options.runtime, questions, out]
        done = subprocess.run(["node", str(program), *map(str, places)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"node ended with {done.returncode}; is {options.runtime} installed in {options.modules}?")
        return json.loads(done.stdout.splitlines()[-1]), np.fromfile(out, dtype=np.float32)


if __name__ == "__main__":
    main()
