"""Checkpoints opened by transformers itself, or decoded for it, as a language model to gate."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import compressed_tensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from compress.architectures import classifies
from compress.classifier import Classifier, auto_class
from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt
from compress.model import Model


class _Decompressed(Model):
    """What models have in common whose weights compressed-tensors has decompressed."""

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


class TransformersModel(_Decompressed):
    """A language model of this kind."""


class TransformersClassifier(_Decompressed, Classifier):
    """One with a head for classes."""


def open_checkpoint(path: Path) -> _Decompressed:
    """Open a folder with `from_pretrained`, and let compressed-tensors decompress it; raises Corrupt."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        with contextlib.redirect_stderr(io.StringIO()), torch.inference_mode():  # progress bars of both libraries
            module, report = auto_class(config).from_pretrained(
                path, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
            if wrong := [name for kind in ("missing_keys", "mismatched_keys") for name in report[kind]]:
                raise ValueError(f"{wrong[0]} does not fit")  # transformers would go on with random numbers
            module.eval()(torch.zeros(1, 1, dtype=torch.long))  # the first forward pass decompresses
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Corrupt(f"{path}: transformers cannot open it ({str(error).splitlines()[0]})") from error
    kind = TransformersClassifier if classifies(config) else TransformersModel
    model = kind(module, tokenizer, name=path.name)
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    kinds = sorted({f"int{g['weights']['num_bits']}" for g in groups})
    model.kinds = " + ".join([*kinds, "float32"])
    return model


class DecodedModel(Model):
    """A model in torch whose weights were decoded from the words of a GPTQ checkpoint."""

    @property
    def runtime(self) -> str:
        """torch; the kernels of GPTQModel or vLLM have not run."""
        return f"torch {torch.__version__} (gptq's layout decoded by compress; no kernel of GPTQModel's)"


def open_decoded(path: Path, tensors: Mapping[str, EncodedTensor | torch.Tensor]) -> DecodedModel:
    """A model of a folder's config, with these tensors; raises Corrupt where they are not just its own."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        del config.quantization_config
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        module.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model = DecodedModel(module, tokenizer, name=path.name)
        if odd := dict(module.named_parameters()).keys() ^ tensors.keys():
            raise ValueError(f"{min(odd)} is not in both file and model")
        for name, tensor in tensors.items():
            held = tensor if isinstance(tensor, EncodedTensor) else EncodedTensor(Encoding("fp32"), tensor)
            model.store(name, held)
            if not isinstance(tensor, EncodedTensor):
                del model.encoded[name]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Corrupt(f"{path}: it cannot be opened ({str(error).splitlines()[0]})") from error
    return model
