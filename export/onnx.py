"""ONNX: a folder for onnxruntime, holding a model's very codes, in two flavours.

genai, for onnxruntime-genai too, with a key-value cache: the graph is onnxruntime-genai's, and every weight in it is
replaced by ours (see `_onnx_graph`). int8 to int2 become MatMulNBits and GatherBlockQuantized (int5 in 8 bits, int3
in 4; groups that are no kernel block by repeating scales).
portable, for any runtime of ONNX: our own graph of standard operators (see `_onnx_portable`), without a cache. Codes
stand before DequantizeLinear (int5 in 8 bits, int3 and int2 in 4, groups of any size).
In both, fp16 and bf16 are stored as such and widened when the file is loaded.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from compress.encodings import EncodedTensor, Encoding
from compress.errors import CompressError, RecipeError, ResourceExhausted, disk_full
from compress.families import Encoder
from compress.interfaces import Exporter, LanguageModel
from compress.requirements import outdated
from compress.rounding import CacheRounding, InputRounding

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architectures import Facts
    from compress.model import Model

log = logging.getLogger(__name__)

GENAI = ("llama", "mistral", "qwen2", "qwen3")  # architectures whose built graphs we know tensor by tensor
PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
_SEQ2SEQ_USAGE = {
    "onnxruntime": '[onnxruntime.InferenceSession(f"FOLDER/{half}_model.onnx") for half in ("encoder", "decoder")]',
    "optimum": 'optimum.onnxruntime.ORTModelForSeq2SeqLM.from_pretrained("FOLDER", use_cache=False)',
}


class Onnx(Exporter):
    """Export to ONNX. flavour: "genai" (onnxruntime's own operators, with a cache) or "portable" (standard ones).

    activations: precision of the inputs of weight products in the shipped graph. "float32" reproduces the model's
    logits up to rounding; "int8" (genai alone) decodes faster and differs measurably.
    """

    name: ClassVar[str] = "onnx"
    runtime: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = "onnx"
    usage: ClassVar[Mapping[str, str]] = {
        "onnxruntime-genai": 'onnxruntime_genai.Model("FOLDER")',
        "onnxruntime": 'onnxruntime.InferenceSession("FOLDER/model.onnx")',
    }

    flavour: Literal["genai", "portable"] = "genai"
    activations: Literal["float32", "int8"] = "float32"

    @model_validator(mode="after")
    def _no_operator(self) -> Onnx:
        if self.flavour == "portable" and self.activations == "int8":
            raise ValueError("no standard operator rounds activations to 8 bits by itself; use flavour: genai")
        return self

    def usage_of(self, cache: CacheRounding | None = None, paired: bool = False) -> Mapping[str, str]:
        """onnxruntime-genai wants its own operators, and a cache; an encoder-decoder is two graphs."""
        if paired:
            return dict(_SEQ2SEQ_USAGE)
        return {"onnxruntime": self.usage["onnxruntime"]} if self.flavour == "portable" else self.usage

    def refuses(self, encoding: Encoding, tensor: str) -> str | None:
        """Codebooks; for genai, groups that no kernel block of 16 to 128 channels divides, too."""
        from export._onnx_packing import BLOCKS, block_size

        if self.flavour == "portable":
            if encoding.is_codebook or encoding.is_block:
                return f"{tensor}: DequantizeLinear takes integer codes, not {encoding.name}; use int4"
            return None
        if encoding.is_codebook or encoding.is_block:
            # There is MatMulBnb4 for nf4, with float32 scales, and nothing to gather an embedding with.
            return f"{tensor}: MatMulNBits and GatherBlockQuantized hold integer codes, not {encoding.name}; use int4"
        if encoding.is_affine and encoding.group_size is not None and block_size(encoding) is None:
            return (
                f"{tensor}: {encoding} has no exact ONNX form: group_size={encoding.group_size} "
                f"is no multiple of {min(BLOCKS)}; use group_size=16 or 32"
            )
        return None

    def refuses_inputs(self, rounding: InputRounding, encoding: Encoding, linear: str) -> str | None:
        """Rounding within blocks, and weights without one scale per row: products of integers need both.

        Of the portable flavour all: it computes with floats.
        """
        if self.flavour == "portable":
            return f"{linear}: standard operators compute with floats, and the gated model has {rounding}; use genai"
        if rounding.scheme == "block":
            return (
                f"{linear}: onnxruntime keeps float32 scales of blocks of inputs, and the gated model float16 ones; "
                "use activations: dynamic or static"
            )
        if encoding.name != "int8" or not encoding.symmetric or encoding.group_size is not None:
            return (
                f"{linear}: onnxruntime multiplies int8 with one scale per row, not {encoding}; use group_size: channel"
            )
        return None

    def check(self, facts: Facts) -> None:
        """Refuse what the builder, the runtime or our graph gets wrong, and a missing runtime."""
        _require_packages(self.flavour)
        if facts.labels and not isinstance(facts.architecture, Encoder):
            kind = facts.architecture.model_type
            raise RecipeError(f"onnx has no graph of a {kind} that tells classes apart; export to checkpoint")
        if self.flavour == "portable":
            _check_portable(facts)
            return
        if facts.architecture.model_type not in GENAI:
            raise RecipeError(
                f"onnx genai carries exact weights into graphs of {', '.join(GENAI)}, not of "
                f"{facts.architecture.model_type}; use flavour: portable"
            )
        if alike := [name for name, (n, _) in facts.linears.items() if n == facts.vocabulary]:
            # The builder recognizes the head by its outputs alone, and would build a wrong graph silently.
            raise RecipeError(
                f"onnx: {alike[0]} has as many outputs as the vocabulary has tokens ({facts.vocabulary}); "
                "onnxruntime-genai's builder takes it for the output head"
            )
        if facts.head_size % 16:
            raise RecipeError(
                f"onnx: onnxruntime's attention needs a head size that is a multiple of 16, "
                f"this {facts.architecture.model_type} has {facts.head_size}"
            )

    def write(self, model: Model, out: Path) -> None:
        """Write graph and data, configs and the tokenizer into the empty folder `out`."""
        self.check(model.facts)
        for name, tensor in model.tensors():
            if isinstance(tensor, EncodedTensor) and (reason := self.refuses(tensor.encoding, name)):
                raise RecipeError(f"onnx: {reason}")
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise RecipeError(f"{out} is not empty")
        if self.flavour == "portable":
            _write_portable(model, out)
            return
        with tempfile.TemporaryDirectory(prefix="compress-onnx-") as temporary:
            skeleton, built = Path(temporary) / "skeleton", Path(temporary) / "built"
            save_skeleton(model, skeleton)
            build(skeleton, built, "fp32", "fuse_qkv=false", "shared_embeddings=false")
            self._write_graph(model, built, out)
            _write_genai_config(model, built, out)
        _write_model_config(model, out)
        _write_tokenizer(model, out)

    def _write_graph(self, model: Model, built: Path, out: Path) -> None:
        import onnx
        import onnx_ir as ir

        from export._onnx_file import DATA, GRAPH, record
        from export._onnx_graph import Surgeon, standardize
        from export._onnx_packing import FLOAT_ACTIVATIONS, INT8_ACTIVATIONS

        graph = ir.load(built / GRAPH)
        tensors = dict(model.tensors())
        head = f"{model.facts.architecture.head}.weight"
        aliases = {head: model.facts.embedding_tensor} if model.facts.tied else {}
        level = INT8_ACTIVATIONS if self.activations == "int8" else FLOAT_ACTIVATIONS
        Surgeon(graph.graph, tensors, aliases, level, model.inputs).replace_all()
        standardize(graph)
        record(graph, tensors, self.flavour, model.inputs)
        ir.save(graph, out / GRAPH, external_data=DATA, size_threshold_bytes=0)
        onnx.checker.check_model(str(out / GRAPH), full_check=True)

    def open(self, path: Path) -> LanguageModel:
        """Open an exported folder of either flavour in onnxruntime."""
        _require_packages("portable")
        from export import _onnx_file
        from export._onnxruntime import OnnxModel
        from export._onnxruntime_classifier import OnnxClassifier
        from export._onnxruntime_portable import PortableModel
        from export._onnxruntime_seq2seq import OnnxSeq2Seq

        graph, *second = _onnx_file.graphs(path)
        if second:
            return OnnxSeq2Seq(path, graph, *second)
        if graph.metadata_props.get(_onnx_file.FLAVOUR) != "portable":
            return OnnxModel(path, graph)
        per_text = len(graph.graph.outputs[0].shape or ()) == 2  # rather than per token
        return OnnxClassifier(path, graph) if per_text else PortableModel(path, graph)

    def stored(self, path: Path) -> Iterator[tuple[str, EncodedTensor | Tensor]]:
        """Every tensor read back from model.onnx and its data."""
        _require_packages("portable")
        from export import _onnx_file

        yield from _onnx_file.stored_together(_onnx_file.graphs(path))

    def stored_inputs(self, path: Path) -> Mapping[str, InputRounding]:
        """The rounding that the graph computes, its scales read from the nodes themselves."""
        from export import _onnx_file

        return _onnx_file.inputs(_onnx_file.graphs(path)[-1])


def _require_packages(flavour: str) -> None:
    needed = PACKAGES if flavour == "genai" else PACKAGES[:3]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"onnx needs {', '.join(missing)}: pip install 'compress-toolkit[onnx]'")
    if old := outdated([name.replace("_", "-") for name in needed]):
        raise RecipeError(f"onnx: {old}: pip install --upgrade 'compress-toolkit[onnx]'")


def _check_portable(facts: Facts) -> None:
    """Refuse what our graphs do not compute; raises RecipeError."""
    from export._onnx_portable import ACTIVATIONS, ROPES

    if facts.rope not in ROPES:
        raise RecipeError(
            f"onnx portable: rope scaling {facts.rope!r} depends on the length; known: {', '.join(ROPES)}"
        )
    if facts.activation not in ACTIVATIONS:
        remedy = "; use flavour: genai" if facts.architecture.model_type in GENAI else ""
        raise RecipeError(f"onnx portable computes {', '.join(ACTIVATIONS)}, not {facts.activation!r}{remedy}")
    if facts.window is not None and not facts.architecture.sliding_period:
        raise RecipeError(f"onnx portable has no sliding window, and here it is {facts.window}; use flavour: genai")


def _write_portable(model: Model, out: Path) -> None:
    """Our own graph, or two, checked with all their shapes."""
    import onnx
    import onnx_ir as ir

    from export import _onnx_encoder, _onnx_portable, _onnx_seq2seq
    from export._onnx_file import DATA, DECODER, ENCODER, GRAPH, record, save_together

    tensors = dict(model.tensors())
    if model.facts.paired:
        graphs = dict(zip((ENCODER, DECODER), _onnx_seq2seq.build(model), strict=True))
        for graph in graphs.values():
            record(graph, _onnx_seq2seq.tensors_of(graph, tensors), "portable")
        save_together(graphs, out)
    else:
        graphs = {GRAPH: (_onnx_encoder if model.labels else _onnx_portable).build(model)}
        record(graphs[GRAPH], tensors, "portable")
        ir.save(graphs[GRAPH], out / GRAPH, external_data=DATA, size_threshold_bytes=0)
    for file in graphs:
        onnx.checker.check_model(str(out / file), full_check=True)
    _write_model_config(model, out)
    _write_tokenizer(model, out)


def _write_model_config(model: Model, out: Path) -> None:
    """What transformers, and optimum, call the model's configs."""
    from compress.model import config_of
    from compress.seq2seq import Seq2Seq

    text = json.dumps(config_of(model.module), indent=2, sort_keys=True)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    if not model.labels:
        generation = copy.deepcopy(model.module.generation_config)
        if isinstance(model, Seq2Seq):
            generation.decoder_start_token_id = model.start
        generation.to_json_file(out / "generation_config.json")


def save_skeleton(model: Model, folder: Path) -> None:
    """The model in transformers' format, for the builder to read its shape from.

    Its values are all replaced later. Biases are ones, because the builder leaves out biases of zeros.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    weights = {
        name: torch.ones_like(p) if name.endswith(".bias") else p.detach().contiguous()
        for name, p in model.module.named_parameters()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.module.config.to_dict(), "architectures": [type(model.module).__name__]}
    if not model.eos_ids:
        config["eos_token_id"] = 0  # the builder insists on one; genai_config.json gets the model's own
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model.module.generation_config.to_json_file(folder / "generation_config.json")
    model.save_tokenizer(folder)


def build(skeleton: Path, built: Path, precision: str, *options: str) -> None:
    """Run onnxruntime-genai's builder for the CPU, with its extra options NAME=VALUE.

    In a process of its own: it prints, extends sys.path by generic names, and holds the weights twice.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(skeleton),
        "-o",
        str(built),
    ]
    command += ["-p", precision, "-e", "cpu", "-c", str(skeleton / "cache")]
    command += ["--extra_options", "hf_token=false", *options]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    log.debug("onnxruntime-genai builder: %s%s", done.stdout, done.stderr)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        kind = ResourceExhausted if disk_full(done.stderr) else CompressError
        raise kind(f"onnxruntime-genai's builder failed with code {done.returncode}: {''.join(last)}")


def _write_genai_config(model: Model, built: Path, out: Path) -> None:
    """genai_config.json with the model's own end-of-sequence ids."""
    config: dict[str, Any] = json.loads((built / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = sorted(model.eos_ids)
    (out / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(model: Model, out: Path) -> None:
    """The tokenizer's files; onnxruntime-genai needs a length limit that fits an integer."""
    model.save_tokenizer(out)
    if not (out / "tokenizer.json").is_file():
        raise RecipeError(f"onnx: {type(model.tokenizer).__name__} has no tokenizer.json form")
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model_max_length"] = model.context_length
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
