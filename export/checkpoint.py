"""Checkpoints for transformers and vLLM: codes and scales packed as compressed-tensors defines, never rounded again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.architectures import Facts
from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt, RecipeError
from compress.interfaces import Exporter, LanguageModel

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


class Checkpoint(Exporter):
    """A folder for `AutoModelForCausalLM.from_pretrained`, with compressed-tensors installed.

    Linears hold symmetric integer codes of 2 to 8 bits, per group or channel; scales are kept as float32, of
    which our float16 scales are exact members, because the library multiplies in the scales' type. Embeddings are
    floats: transformers opens no coded ones.
    """

    name: ClassVar[str] = "checkpoint"
    runtime: ClassVar[str] = "transformers"
    extra: ClassVar[str] = "checkpoint"
    usage: ClassVar[Mapping[str, str]] = {
        "transformers": 'transformers.AutoModelForCausalLM.from_pretrained("FOLDER")',
        "vLLM": "vllm serve FOLDER",
    }

    format: Literal["compressed-tensors"] = "compressed-tensors"

    def refuses(self, encoding: Encoding, tensor: str) -> str | None:
        """Codebooks, llama.cpp's blocks, zero points, and codes of anything but the linears of the blocks."""
        if encoding.is_coded and not encoding.is_affine:
            return f"{tensor}: compressed-tensors packs integer codes, not {encoding.name}; use int4"
        if not encoding.symmetric:
            # Its layout for loading has unpacked zero points; transformers puts random ones there.
            return f"{tensor}: transformers cannot open compressed-tensors' packed zero points; use symmetric: true"
        if encoding.is_coded and ".layers." not in tensor:
            return f"{tensor}: transformers opens no coded embedding or head; use embeddings: fp16"
        return None

    def check(self, facts: Facts) -> None:
        """Refuse where compressed-tensors is missing."""
        _require_package()

    def write(self, model: Model, out: Path) -> None:
        """Write model.safetensors, config.json and the tokenizer into the empty folder `out`."""
        from safetensors.torch import save_file

        self.check(model.facts)
        tensors: dict[str, Tensor] = {}
        schemes: dict[Encoding, list[str]] = {}
        for name, tensor in model.tensors():
            if not isinstance(tensor, EncodedTensor):
                tensors[name] = tensor.contiguous()
            elif reason := self.refuses(tensor.encoding, name):
                raise RecipeError(f"checkpoint: {reason}")
            elif not tensor.encoding.is_coded:
                tensors[name] = tensor.codes.contiguous()
            else:
                module = name.removesuffix(".weight")
                schemes.setdefault(tensor.encoding, []).append(module)
                tensors |= {f"{module}{suffix}": part for suffix, part in _packed(tensor).items()}
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
        config = {**model.module.config.to_dict(), "architectures": [type(model.module).__name__], "dtype": "float32"}
        if schemes:
            config["quantization_config"] = _quantization_config(schemes)
        (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        model.module.generation_config.to_json_file(out / "generation_config.json")
        model.tokenizer.save_pretrained(out)

    def open(self, path: Path) -> LanguageModel:
        """Open a folder as its users do, through transformers and compressed-tensors."""
        _require_package()
        from export._transformers import open_checkpoint

        return open_checkpoint(path)

    def stored(self, path: Path) -> Iterator[tuple[str, EncodedTensor | Tensor]]:
        """Every tensor, read back from the file's bytes."""
        import torch
        from safetensors.torch import load_file

        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        encodings = {module: e for e, modules in _encodings(config).items() for module in modules}
        tensors = load_file(path / WEIGHTS)
        for name, tensor in tensors.items():
            module = name.rpartition(".")[0]
            if name.endswith(_PACKED):
                if module not in encodings:
                    raise Corrupt(f"{path}: {module} is packed, and {CONFIG} does not say how")
                yield f"{module}.weight", _unpacked(tensors, module, encodings[module])
            elif not name.endswith((_SCALE, _SHAPE)):
                half = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(tensor.dtype)
                yield name, EncodedTensor(Encoding(half), tensor) if half else tensor


def _require_package() -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        raise RecipeError("checkpoint needs compressed-tensors: pip install 'compress-toolkit[checkpoint]'")


def _packed(tensor: EncodedTensor) -> dict[str, Tensor]:
    """The parts that compressed-tensors keeps of a matrix, by suffix."""
    import torch
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    assert tensor.scales is not None
    return {
        _PACKED: pack_to_int32(tensor.codes, tensor.encoding.bits),
        _SCALE: tensor.scales.float().contiguous(),
        _SHAPE: torch.tensor(tensor.shape),
    }


def _unpacked(tensors: Mapping[str, Tensor], module: str, encoding: Encoding) -> EncodedTensor:
    """The inverse of `_packed`; raises Corrupt where the parts do not fit each other."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    try:
        scales = tensors[f"{module}{_SCALE}"]
        shape = tensors[f"{module}{_SHAPE}"].tolist()
        codes = unpack_from_int32(tensors[f"{module}{_PACKED}"], encoding.bits, shape)
    except (KeyError, RuntimeError, ValueError) as error:
        raise Corrupt(f"{module}: its packed parts cannot be read ({error})") from None
    if not bool((scales.half().float() == scales).all()):
        raise Corrupt(f"{module}: a scale is no float16 number")
    return EncodedTensor(encoding, codes, scales.half())


def _quantization_config(schemes: Mapping[Encoding, list[str]]) -> dict[str, Any]:
    """What transformers reads from config.json: one group of modules per encoding."""
    groups = {}
    for i, (encoding, modules) in enumerate(schemes.items()):
        weights = {
            "num_bits": encoding.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if encoding.group_size is None else "group",
            "group_size": encoding.group_size,
            "dynamic": False,
        }
        groups[f"group_{i}"] = {"targets": modules, "weights": weights, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def _encodings(config: Mapping[str, Any]) -> dict[Encoding, list[str]]:
    """The inverse of `_quantization_config`."""
    groups = config.get("quantization_config", {}).get("config_groups", {})
    found: dict[Encoding, list[str]] = {}
    for group in groups.values():
        weights = group["weights"]
        encoding = Encoding(f"int{weights['num_bits']}", weights["group_size"])
        found.setdefault(encoding, []).extend(group["targets"])
    return found
