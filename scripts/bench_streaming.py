"""Peak memory of quantizing a model that is streamed from disk, against its depth.

Makes random Llamas shard by shard (bfloat16), quantizes each in a process of its own, block by block, and prints the
peak resident memory of that process. Nothing of a model is kept afterwards.

    scripts/bench_streaming.py --hidden 3072 --layers 12 24 --method rtn --encoding int4
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Make, quantize and measure each depth; one JSON line per depth."""
    options = _options()
    if options.child:
        _quantize(Path(options.child), options)
        return
    for layers in options.layers:
        with tempfile.TemporaryDirectory(prefix="compress-bench-", dir=options.folder) as folder:
            made = Path(folder) / "model"
            parameters = _make(made, layers, options)
            size = sum(p.stat().st_size for p in made.glob("*.safetensors"))
            command = [sys.executable, __file__, "--child", str(made), *sys.argv[1:]]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(json.dumps({"layers": layers, "parameters": parameters, "model_bytes": size, **found}), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24], help="depths to measure")
    parser.add_argument("--hidden", type=int, default=3072, help="width of the residual stream; the MLP has 8/3 of it")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--method", default="rtn", help="a quantization step that can be streamed: rtn, gptq, awq, …")
    parser.add_argument("--encoding", default="int4")
    parser.add_argument("--windows", type=int, default=4, help="of calibration, 128 tokens each")
    parser.add_argument("--folder", help="where models are made; the system's folder for temporary files by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _make(folder: Path, layers: int, options: argparse.Namespace) -> int:
    """Write a random model, one block to a shard; the number of its parameters."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 128 * 128,
        num_hidden_layers=layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=options.hidden // 128,
        vocab_size=options.vocabulary,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        module = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    for shard, names in shards.items():
        tensors = {}
        for name in names:
            shape = module.get_parameter(name).shape
            W = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
            tensors[name] = W.bfloat16()
        save_file(tensors, folder / f"model-{shard}.safetensors", metadata={"format": "pt"})
    return sum(p.numel() for p in module.parameters())


def _quantize(folder: Path, options: argparse.Namespace) -> None:
    """Quantize and save a model; prints seconds and the peaks of memory, after opening and in all."""
    import torch

    from compress import artifact, source
    from compress.interfaces import Context
    from compress.machine import keep_freed_memory, peak_memory
    from compress.plugin import step

    keep_freed_memory(False)  # as the command does
    model = source.load(str(folder), streaming=True)
    opened = _resident()
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randint(0, 256, (128,), generator=generator) for _ in range(options.windows)]
    chosen = step(f"quantize.{options.method}")(encoding=options.encoding, group_size=32)
    started = time.monotonic()
    chosen.apply(model, Context(seed=0, calibration=windows))
    seconds = time.monotonic() - started
    artifact.save(model, folder.parent / "quantized")
    print(
        json.dumps(
            {
                "method": options.method,
                "encoding": options.encoding,
                "seconds": round(seconds, 1),
                "opened_bytes": opened,
                "peak_rss_bytes": peak_memory(),
                "artifact_bytes": artifact.manifest(folder.parent / "quantized")["size_bytes"],
            }
        )
    )


def _resident() -> int:
    """Resident memory by now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
