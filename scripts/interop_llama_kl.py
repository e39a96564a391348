"""Our divergence and top-1 agreement, through llama.cpp, against what llama.cpp's own tool says of the same positions.

Usage: .venv/bin/python scripts/interop_llama_kl.py --tool PATH --reference F16.gguf --model Q8_0.gguf --text FILE
       [--windows 8] [--length 512]
--tool: llama-perplexity, of the same version as llama-cpp-python's library. It cuts the text into windows, scores the
second half of each and compares the two models (`--kl-divergence`); the same windows and positions go through
compress' runtime and arithmetic. One JSON object; exit 1 where mean KL (nats per token) or top-1 agreement (a share)
differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from compress.interfaces import LanguageModel
from compress.measure import open_model
from compress.numerics.divergence import divergence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args()
    report, kept = run_tool(options)
    theirs = said(report)
    reference, model = open_model(str(options.reference)), open_model(str(options.model))
    text = options.text.read_bytes().decode("utf-8")  # line ends as they are: the tool reads bytes
    cut = windows(reference, text, options.windows, options.length)
    if cut != kept:
        sys.exit("the tool cuts other windows than compress: another version, or another tokenizer")
    ours = own(reference, model, cut)
    found = {
        "windows": len(cut),
        "positions": len(cut) * (options.length - 1 - options.length // 2),
        "mean_kl": {"compress": ours[0], "llama.cpp": theirs[0]},
        "same_top": {"compress": ours[1], "llama.cpp": theirs[1]},
    }
    print(json.dumps(found, indent=2))
    if not all(abs(a - b) <= options.tolerance for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit(1)


def run_tool(options: argparse.Namespace) -> tuple[str, list[list[int]]]:
    """The tool's report on the model, and the windows with which it has kept the reference's distributions."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["-c", str(options.length), "-b", str(options.length)]  # one window at a time, as compress reads them
        common = ["--kl-divergence-base", f"{folder}/base", *sizes, "-ngl", "0"]
        first = ["-m", options.reference, "-f", options.text, "--chunks", str(options.windows), *common]
        second = ["-m", options.model, "--kl-divergence", *common]
        for arguments in (first, second):
            done = subprocess.run([options.tool, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{options.tool} failed with code {done.returncode}: {done.stderr[-500:]}")
        return done.stdout, windows_of(Path(folder, "base"))


def windows_of(base: Path) -> list[list[int]]:
    """Tokens of the windows in the file of the reference's distributions: behind a mark, their length and number."""
    with base.open("rb") as file:
        mark, (length, _, count) = file.read(8), struct.unpack("<3i", file.read(12))
        if mark != b"_logits_":
            sys.exit(f"{base} does not begin as the tool's distributions do: another version")
        return [list(struct.unpack(f"<{length}i", file.read(4 * length))) for _ in range(count)]


def said(report: str) -> tuple[float, float]:
    """Mean KL in nats per token, and the share of positions with the same likeliest token, of the tool's report."""
    kl, top = (re.search(rf"{name}:\s+(-?[\d.]+)", report) for name in (r"Mean\s+KLD", "Same top p"))
    if kl is None or top is None:
        sys.exit(f"no mean KLD or same top p in what the tool says: {report[-500:]!r}")
    return float(kl[1]), round(float(top[1]) / 100, 9)


def windows(model: LanguageModel, text: str, count: int, length: int) -> list[list[int]]:
    """The first windows of a text as the tool cuts them; each begins with the model's first token, if it has one."""
    ids, bos = model.encode(text), begins_with(model)
    ids = ids if bos is None else [bos, *ids]
    if len(ids) < count * length:
        sys.exit(f"the text has {len(ids)} tokens; {count * length} are needed")
    cut = [ids[start : start + length] for start in range(0, count * length, length)]
    return cut if bos is None else [[bos, *window[1:]] for window in cut]


def begins_with(model: LanguageModel) -> int | None:
    """The token that the file asks to put before a text."""
    from export._llama_cpp import read

    field = read(model.path).fields.get("tokenizer.ggml.add_bos_token")  # type: ignore[attr-defined]
    return model.bos_id if field is not None and field.contents() else None


def own(reference: LanguageModel, model: LanguageModel, cut: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Mean KL and top-1 agreement over the second half of each window, its last row left out."""
    kl, agree, positions = 0.0, 0, 0
    for window in cut:
        half = slice(len(window) // 2, len(window) - 1)
        p, q = (next(iter(m.logits([window])))[half].clone() for m in (reference, model))
        found = divergence(p, q)
        kl, agree, positions = kl + float(found.kl.sum()), agree + int(found.agree.sum()), positions + len(p)
    return kl / positions, agree / positions


if __name__ == "__main__":
    main()
