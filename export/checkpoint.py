"""Checkpoints for transformers and vLLM: codes and scales as compressed-tensors or GPTQ pack them, never rounded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.architectures import Facts
from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt, RecipeError
from compress.families import ARCHITECTURES, Encoder
from compress.interfaces import Exporter, LanguageModel
from compress.requirements import outdated
from export import _gptq

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model
    from compress.rounding import CacheRounding

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_GPTQ_USAGE = {
    "transformers": 'transformers.AutoModelForCausalLM.from_pretrained("FOLDER")  # with gptqmodel and optimum',
    "GPTQModel": 'gptqmodel.GPTQModel.load("FOLDER")',
}
_TURNED = tuple(f"{a.blocks}." for a in ARCHITECTURES.values() if a.transposed)
_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


class Checkpoint(Exporter):
    """A folder for `AutoModelForCausalLM.from_pretrained`; format: whose packing it has.

    Linears hold symmetric integer codes, per group or channel; embeddings are floats: transformers opens no coded ones.
    compressed-tensors (opened with that package): 2 to 8 bits, also mixed; scales are kept as float32, of which our
    float16 scales are exact members, because the library multiplies in the scales' type.
    gptq (for GPTQModel, vLLM and others): 2, 4 or 8 bits, one encoding for all linears. The gate decodes the file's own
    words and computes in torch; GPTQModel is not asked.
    """

    name: ClassVar[str] = "checkpoint"
    runtime: ClassVar[str] = "transformers"
    extra: ClassVar[str] = "checkpoint"
    usage: ClassVar[Mapping[str, str]] = {
        "transformers": 'transformers.AutoModelForCausalLM.from_pretrained("FOLDER")',
        "vLLM": "vllm serve FOLDER",
    }

    format: Literal["compressed-tensors", "gptq"] = "compressed-tensors"

    def usage_of(self, cache: CacheRounding | None = None, paired: bool = False) -> Mapping[str, str]:
        """GPTQ's layout is opened by transformers with gptqmodel and optimum."""
        return {**self.usage, **_GPTQ_USAGE} if self.format == "gptq" else self.usage

    def refuses(self, encoding: Encoding, tensor: str) -> str | None:
        """Codebooks, llama.cpp's blocks, zero points, and codes of anything but the linears of the blocks."""
        if encoding.is_coded and not encoding.is_affine:
            return f"{tensor}: {self.format} packs integer codes, not {encoding.name}; use int4"
        if self.format == "gptq" and ".layers." in tensor and tensor.endswith("_proj.weight"):
            if not encoding.is_coded or encoding.bits not in _gptq.WIDTHS:
                return f"{tensor}: gptq stores every linear in 2, 4 or 8 bits, not {encoding}; use int4 or int8"
            if not encoding.symmetric:
                return f"{tensor}: gptq stores zero points less one, and has no place for 0; use symmetric: true"
        if not encoding.symmetric:
            # Its layout for loading has unpacked zero points; transformers puts random ones there.
            return f"{tensor}: transformers cannot open compressed-tensors' packed zero points; use symmetric: true"
        if encoding.is_coded and tensor.startswith(_TURNED):
            return f"{tensor}: transformers keeps this linear as (in, out), where it opens no codes; use fp16, or gguf"
        if encoding.is_coded and ".layers." not in tensor:
            return f"{tensor}: transformers opens no coded embedding or head; use embeddings: fp16"
        return None

    def refuses_together(self, encodings: Mapping[str, Encoding]) -> str | None:
        """More than one encoding of linears, in gptq's layout."""
        coded = {encoding: name for name, encoding in encodings.items() if encoding.is_coded}
        if self.format != "gptq" or len(coded) < 2:
            return None
        (one, a), (other, b) = list(coded.items())[:2]
        return f"gptq has one encoding for all linears, and {a} is {one}, {b} {other}; use format: compressed-tensors"

    def check(self, facts: Facts) -> None:
        """Refuse encoders, a missing compressed-tensors, and what gptq's layout has no words for."""
        kind = facts.architecture.model_type
        if facts.paired:
            raise RecipeError(
                f"checkpoint holds decoders, and {kind} here writes a target given a source; export to onnx"
            )
        if isinstance(facts.architecture, Encoder):
            raise RecipeError(f"checkpoint holds decoders, and {kind} here tells classes apart; export to onnx")
        if facts.labels and self.format == "gptq":
            problem = f"is for language models, and {kind} here tells classes apart; use format: compressed-tensors"
            raise RecipeError(f"checkpoint: gptq {problem}")
        if self.format == "compressed-tensors":
            _require_package()
            return
        if facts.architecture.transposed:
            raise RecipeError(f"checkpoint: gptq has no layout for the linears of a {kind}; export to gguf or onnx")
        for name, (n, m) in facts.linears.items():
            if n % _gptq.WORDS or m % _gptq.WORDS:
                raise RecipeError(
                    f"checkpoint: gptq packs multiples of {_gptq.WORDS} channels, and {name} has {m} inputs and {n} "
                    "outputs; use format: compressed-tensors"
                )

    def write(self, model: Model, out: Path) -> None:
        """Write model.safetensors, config.json and the tokenizer into the empty folder `out`."""
        from safetensors.torch import save_file

        from compress.conv1d import flipped

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
                tensors |= {f"{module}{suffix}": part for suffix, part in self._packed(tensor).items()}
        if reason := self.refuses_together({modules[0]: encoding for encoding, modules in schemes.items()}):
            raise RecipeError(f"checkpoint: {reason}")
        out.mkdir(parents=True, exist_ok=True)
        tensors = dict(flipped(tensors.items(), model.facts))
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
        config = {**model.module.config.to_dict(), "architectures": [type(model.module).__name__], "dtype": "float32"}
        if schemes and self.format == "gptq":
            config["quantization_config"] = _gptq.config(next(iter(schemes)))
            text = json.dumps(config["quantization_config"], indent=2, sort_keys=True) + "\n"
            (out / _gptq.CONFIG).write_text(text, encoding="utf-8")
        elif schemes:
            config["quantization_config"] = _quantization_config(schemes)
        (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if not model.labels:
            model.module.generation_config.to_json_file(out / "generation_config.json")
        model.save_tokenizer(out)

    def open(self, path: Path) -> LanguageModel:
        """Open a folder through transformers and compressed-tensors, or decode gptq's layout for torch."""
        from export._transformers import open_checkpoint, open_decoded

        if _is_gptq(path):
            return open_decoded(path, dict(self.stored(path)))
        _require_package()
        return open_checkpoint(path)

    def stored(self, path: Path) -> Iterator[tuple[str, EncodedTensor | Tensor]]:
        """Every tensor, read back from the file's bytes."""
        from safetensors.torch import load_file

        from compress.conv1d import flipped

        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS)
        if _is_gptq(path):
            for name, held in _gptq.stored(tensors, _gptq.encoding_of(path, config)):
                yield name, held if isinstance(held, EncodedTensor) else _float(held)
            return
        encodings = {module: e for e, modules in _encodings(config).items() for module in modules}
        for name, tensor in flipped(tensors.items(), Facts.from_config(config)):
            module = name.rpartition(".")[0]
            if name.endswith(_PACKED):
                if module not in encodings:
                    raise Corrupt(f"{path}: {module} is packed, and {CONFIG} does not say how")
                yield f"{module}.weight", _unpacked(tensors, module, encodings[module])
            elif not name.endswith((_SCALE, _SHAPE)):
                yield name, _float(tensor)

    def _packed(self, tensor: EncodedTensor) -> dict[str, Tensor]:
        if self.format == "gptq":
            return {f".{part}": value for part, value in _gptq.pack(tensor).items()}
        return _packed(tensor)


def _float(tensor: Tensor) -> EncodedTensor | Tensor:
    """A stored float tensor under the encoding that its type stands for."""
    import torch

    half = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(tensor.dtype)
    return EncodedTensor(Encoding(half), tensor) if half else tensor


def _is_gptq(path: Path) -> bool:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        return bool(config.get("quantization_config", {}).get("quant_method") == "gptq")
    except (OSError, ValueError, AttributeError):
        return False  # whoever opens it says what is wrong


def _require_package() -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        raise RecipeError("checkpoint needs compressed-tensors: pip install 'compress-toolkit[checkpoint]'")
    if old := outdated(["compressed-tensors"]):
        raise RecipeError(f"checkpoint: {old}: pip install --upgrade 'compress-toolkit[checkpoint]'")


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
