"""Checkpoints opened by transformers itself, as a language model to gate."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import compressed_tensors
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.errors import Corrupt
from compress.model import Model


class TransformersModel(Model):
    """A model whose weights compressed-tensors has decompressed."""

    kinds: str = "float32"

    @property
    def runtime(self) -> str:
        """transformers, compressed-tensors and torch, with their versions."""
        return (
            f"transformers {transformers.__version__} (compressed-tensors {compressed_tensors.__version__}, "
            f"torch {torch.__version__})"
        )

    @property
    def compute(self) -> str:
        """How weights are stored, and the precision of matrix products."""
        return f"{self.kinds} weights, {self.dtype} products"


def open_checkpoint(path: Path) -> TransformersModel:
    """Open a folder with `from_pretrained`, and let compressed-tensors decompress it; raises Corrupt."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        with contextlib.redirect_stderr(io.StringIO()), torch.inference_mode():  # progress bars of both libraries
            module, report = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
            if wrong := [name for kind in ("missing_keys", "mismatched_keys") for name in report[kind]]:
                raise ValueError(f"{wrong[0]} does not fit")  # transformers would go on with random numbers
            module.eval()(torch.zeros(1, 1, dtype=torch.long))  # the first forward pass decompresses
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Corrupt(f"{path}: transformers cannot open it ({str(error).splitlines()[0]})") from error
    model = TransformersModel(module, tokenizer, name=path.name)
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    kinds = sorted({f"int{g['weights']['num_bits']}" for g in groups})
    model.kinds = " + ".join([*kinds, "float32"])
    return model
