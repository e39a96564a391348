"""GGUF files for llama.cpp: our codes and scales in its blocks, and its own blocks, never quantized again."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import ggml_mixes
from compress.architectures import Facts
from compress.encodings import GGML_BLOCKS, EncodedTensor, Encoding
from compress.errors import Corrupt, RecipeError
from compress.families import ARCHITECTURES, FULL, SLIDING
from compress.interfaces import Exporter, LanguageModel
from compress.requirements import outdated
from compress.rounding import CacheRounding, InputRounding
from export import _gguf_cache

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from compress.model import Model

BLOCK = 32


@dataclass(frozen=True)
class Dialect:
    """How GGUF holds an architecture.

    name: its general.architecture. interleaved: llama.cpp rotates neighbouring channels of a head, where
    transformers rotates channel j with j + head_size / 2, so that rows of Q and K change places. square: llama.cpp
    takes all query heads together to be as wide as the hidden state, and refuses the file otherwise. activation: the
    only one that llama.cpp computes there. tied: it knows no other head than the embedding. layers_of_27b: by this
    number of blocks it takes the model for one whose queries are scaled otherwise. local_base: of rotary frequencies in
    blocks with a window, where it is fixed. A norm's gain is stored as what it multiplies by, so with what the
    architecture adds to it.
    """

    name: str
    interleaved: bool = False
    square: bool = False
    activation: str = "silu"
    tied: bool = False
    layers_of_27b: int | None = None
    local_base: float | None = None


DIALECTS = {
    "llama": Dialect("llama", interleaved=True),
    "mistral": Dialect("llama", interleaved=True),
    "qwen2": Dialect("qwen2", square=True),
    "qwen3": Dialect("qwen3"),
    "phi3": Dialect("phi3", square=True),
    "gemma": Dialect("gemma", activation="gelu_tanh", tied=True),
    "gemma2": Dialect("gemma2", activation="gelu_tanh", tied=True, layers_of_27b=46),
    "gemma3_text": Dialect("gemma3", activation="gelu_tanh", layers_of_27b=62, local_base=10_000.0),
    "gpt2": Dialect("gpt2", activation="gelu_tanh"),
}
_MODEL_TYPES = {dialect.name: kind for kind, dialect in DIALECTS.items() if kind != "mistral"}  # the way back
_FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_FILE_TYPES = {
    "F32": "ALL_F32",
    "MXFP4": "MOSTLY_MXFP4_MOE",  # llama.cpp knows it from mixtures of experts
    **{f"Q{bits}_K": f"MOSTLY_Q{bits}_K_S" for bits in (3, 4, 5)},  # S: no tensor gets a larger type than asked for
}
_QUERY, _KEY = ".self_attn.q_proj.", ".self_attn.k_proj."


class Gguf(Exporter):
    """One .gguf file: float32, F16 and BF16 tensors, and int8, int5, int4, iq4_nl, mxfp4 and llama.cpp's own blocks."""

    name = "gguf"
    runtime = "llama.cpp"
    extra = "gguf"
    streams = True
    usage = {
        "llama.cpp": "llama-cli -m {file} -cnv",
        "llama-cpp-python": 'llama_cpp.Llama("{file}")',
    }

    def refuses(self, encoding: Encoding, tensor: str) -> str | None:
        """Why no GGUF block holds these codes and scales exactly, or None."""
        if encoding.name == "nf4":
            return f"{tensor}: GGUF has no block of nf4's 16 levels; use iq4_nl, mxfp4 or int4"
        if not encoding.is_affine:
            return None
        if encoding.name not in ("int4", "int5", "int8"):
            return f"{tensor}: GGUF has no block of {encoding.name} codes with one scale; use int4, int5 or int8"
        if not encoding.symmetric:
            return f"{tensor}: {encoding} does not fit q4_1 (scale * zero point is not a float16); use symmetric"
        if encoding.group_size is not None and encoding.group_size % BLOCK:
            return f"{tensor}: group_size={encoding.group_size} is no multiple of GGUF's 32; use group_size=32"
        return None

    def refuses_inputs(self, rounding: InputRounding, encoding: Encoding, linear: str) -> str | None:
        """Any scales but those of blocks: llama.cpp always rounds what products with Q8_0 read, in blocks of 32."""
        if rounding.scheme != "block":
            return f"{linear}: llama.cpp rounds inputs in blocks of 32, not {rounding}; use activations: block"
        return None

    def refuses_cache(self, rounding: CacheRounding) -> None:
        """None of them: the file names the types, and `open` takes them; other programs need an option."""

    def stored_cache(self, path: Path) -> CacheRounding | None:
        """The types that the file names."""
        from export import _llama_cpp

        return _gguf_cache.types(_gguf_cache.asked(_llama_cpp.read(path)))

    def usage_of(self, cache: CacheRounding | None = None, paired: bool = False) -> Mapping[str, str]:
        """The lines that load the file, with the options for its cache."""
        return self.usage if cache is None else _gguf_cache.usage(cache)

    def stored_inputs(self, path: Path) -> None:
        """Nothing that a file would say: llama.cpp rounds every input."""
        return None

    def check(self, facts: Facts) -> None:
        """Refuse what llama.cpp would compute differently, and a missing runtime; raises RecipeError."""
        kind = facts.architecture.model_type
        if kind not in DIALECTS:
            raise RecipeError(f"gguf cannot write architecture {kind!r}; known: {', '.join(DIALECTS)}")
        if facts.labels:
            raise RecipeError(f"gguf holds language models, and {kind} here tells classes apart; export to checkpoint")
        if facts.rope != "default":
            raise RecipeError(f"gguf: rope scaling {facts.rope!r} is not written yet; export to onnx instead")
        dialect = DIALECTS[kind]
        if facts.activation != dialect.activation:
            computed = dialect.activation
            raise RecipeError(f"gguf: llama.cpp computes {computed} here, not {facts.activation!r}; export to onnx")
        if facts.architecture.sliding_period:
            _check_kinds(facts)
        elif facts.window is not None:
            raise RecipeError(
                f"gguf: a sliding window of {facts.window} tokens is not written yet; export to onnx instead"
            )
        if dialect.tied and not facts.tied:
            raise RecipeError(f"gguf: llama.cpp gives a {kind} no head but its embedding; export to onnx")
        if facts.logit_cap is not None and kind != "gemma2":
            raise RecipeError(f"gguf: llama.cpp does not cap the logits of a {kind}; export to onnx")
        if facts.query_scale != _query_scale(facts, dialect):
            raise RecipeError(
                f"gguf: llama.cpp scales the queries of this {kind} by {_query_scale(facts, dialect):g}, not by "
                f"{facts.query_scale:g}; export to onnx"
            )
        queries, hidden = facts.sizes["q"], facts.sizes["residual"]
        if dialect.square and queries != hidden:
            raise RecipeError(
                f"gguf: llama.cpp needs {kind}'s query heads together as wide as its hidden state, and here "
                f"{facts.heads} heads of {facts.head_size} make {queries}, not {hidden}; export to onnx, or prune "
                "neurons or layers instead of heads or hidden channels"
            )
        if importlib.util.find_spec("llama_cpp") is None:
            raise RecipeError("gguf needs llama-cpp-python; pip install 'compress-toolkit[gguf]'")
        if old := outdated(["llama-cpp-python"]):
            raise RecipeError(f"gguf: {old}; pip install --upgrade 'compress-toolkit[gguf]'")

    def write(self, model: Model, out: Path) -> None:
        """Write one file into `out`, named as `_gguf_origin.file_name` says.

        Raises RecipeError for what the format or llama.cpp cannot express, CompressError where llama.cpp reads other
        token ids from the file than the model's tokenizer.
        """
        from gguf import GGUFWriter

        from export import _gguf_origin, _gguf_vocabulary, _llama_cpp

        self.check(model.facts)
        dialect = DIALECTS[model.facts.architecture.model_type]
        writer = GGUFWriter(None, dialect.name, use_temp_file=model.shelf is not None)
        try:
            config = model.module.config
            _add_shape(writer, config.to_dict(), model.facts)
            _gguf_origin.add(writer, model)
            _gguf_vocabulary.add(writer, model.tokenizer, model.vocabulary_size, model.eos_ids)
            file = out / _gguf_origin.file_name(model, self._add_tensors(writer, model, dialect))
            if model.cache is not None:
                writer.add_string(_gguf_cache.KEYS, model.cache.keys)
                writer.add_string(_gguf_cache.VALUES, model.cache.values)
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        opened = _llama_cpp.LlamaCpp(file, vocabulary_only=True)
        try:
            _gguf_vocabulary.check(model.tokenizer, model.eos_ids, opened.encode, opened.eos_ids)
        finally:
            opened.close()

    def open(self, path: Path) -> LanguageModel:
        """Any GGUF file, or a folder with one, in llama.cpp."""
        from export._llama_cpp import LlamaCpp

        return LlamaCpp(path)

    def stored(self, path: Path) -> Iterator[tuple[str, EncodedTensor | Tensor]]:
        """Every tensor, decoded from the file's bytes, under transformers' names and in its row order.

        A vector is always float32 in the file, whatever float encoding the model held it in.
        """
        from export import _llama_cpp

        reader = _llama_cpp.read(path)
        fields = reader.fields
        kind = str(fields["general.architecture"].contents())
        if kind not in _MODEL_TYPES:
            raise RecipeError(f"{path}: architecture {kind!r} was not written by compress")
        architecture, dialect = ARCHITECTURES[_MODEL_TYPES[kind]], DIALECTS[_MODEL_TYPES[kind]]
        layers = int(fields[f"{kind}.block_count"].contents())
        heads = int(fields[f"{kind}.attention.head_count"].contents())
        kv_heads = int(fields[f"{kind}.attention.head_count_kv"].contents())
        names = {new: old for old, new in _names(_MODEL_TYPES[kind], layers).items()}
        for tensor in reader.tensors:
            if tensor.name not in names:
                raise Corrupt(f"{path}: tensor {tensor.name!r} has no name in a {kind} model")
            name = names[tensor.name]
            held = _from_file(tensor.tensor_type.name, tensor.data, f"{path}: {tensor.name}")
            if not isinstance(held, EncodedTensor):
                held = held - architecture.offset(name)
            yield name, _reordered(name, held, dialect, heads, kv_heads, back=True)

    def _add_tensors(self, writer: Any, model: Model, dialect: Dialect) -> str:
        """Add every tensor in its block type; llama.cpp's name of the mix, or of the type that most weights have."""
        import gguf

        facts = model.facts
        names = _names(facts.architecture.model_type, facts.layers)
        weights: Counter[str] = Counter()
        kinds: dict[str, str] = {}
        for name, tensor in model.tensors():
            if name not in names:
                raise RecipeError(f"gguf: {dialect.name} has no tensor for {name}; export to onnx instead")
            if isinstance(tensor, EncodedTensor) and (reason := self.refuses(tensor.encoding, name)):
                raise RecipeError(f"gguf: {reason}")
            tensor = _reordered(name, tensor, dialect, facts.heads, facts.kv_heads, back=False)
            if offset := facts.architecture.offset(name):
                tensor = (tensor.decode() if isinstance(tensor, EncodedTensor) else tensor).float() + offset
            kind, data = _to_file(tensor, name)
            weights[kind] += tensor.numel() if not isinstance(tensor, EncodedTensor) else math.prod(tensor.shape)
            if name in facts.matrices:
                kinds[name] = _FLOATS.get(kind, kind.lower())
            writer.add_tensor(names[name], data, raw_dtype=gguf.GGMLQuantizationType[kind])
        majority = weights.most_common(1)[0][0]
        preset = ggml_mixes.recognized(kinds, facts)
        named = f"MOSTLY_{preset}" if preset else _FILE_TYPES.get(majority, f"MOSTLY_{majority}")
        writer.add_file_type(gguf.LlamaFileType[named])
        if weights.keys() - _FLOATS.keys():
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        return named.removeprefix("MOSTLY_").removeprefix("ALL_").removesuffix("_MOE")


def _add_shape(writer: Any, config: Mapping[str, Any], facts: Facts) -> None:
    """The keys from which llama.cpp builds the network."""
    arch = facts.architecture
    writer.add_context_length(facts.context_length)
    writer.add_embedding_length(facts.sizes["residual"])
    writer.add_block_count(facts.layers)
    writer.add_feed_forward_length(facts.sizes["mlp"])
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_key_length(facts.head_size)
    writer.add_value_length(facts.head_size)
    epsilon = float(config[arch.keys["epsilon"]])
    (writer.add_layer_norm_eps if arch.centred else writer.add_layer_norm_rms_eps)(epsilon)
    writer.add_vocab_size(facts.vocabulary)
    if arch.positions is None:
        _add_rotation(writer, config["rope_parameters"], facts)
    if arch.sliding_period:
        writer.add_sliding_window(config["sliding_window"])
    if facts.attention_cap is not None:
        writer.add_attn_logit_softcapping(facts.attention_cap)
    if facts.logit_cap is not None:
        writer.add_final_logit_softcapping(facts.logit_cap)


def _add_rotation(writer: Any, rope: Mapping[str, Any], facts: Facts) -> None:
    """How positions turn queries and keys; raises RecipeError where blocks with a window turn them by other angles."""
    fixed = DIALECTS[facts.architecture.model_type].local_base
    if fixed is not None:
        local, rope = float(rope[SLIDING]["rope_theta"]), rope[FULL]
        if local != fixed:
            raise RecipeError(
                f"gguf: llama.cpp turns blocks with a window by a base of {fixed:g}, not {local:g}; export to onnx"
            )
    writer.add_rope_dimension_count(int(facts.head_size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))


def _check_kinds(facts: Facts) -> None:
    """Refuse blocks in another order than llama.cpp has them: it knows by its number whether one has a window."""
    period, kind = facts.architecture.sliding_period, facts.architecture.model_type
    if facts.kinds is None:
        problem = "which of them are left is known only once they are removed"
    elif facts.kinds != tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(facts.layers)):
        problem = "here another has"
    else:
        return
    raise RecipeError(
        f"gguf: llama.cpp gives all blocks of a {kind} a window but every one in {period}, and {problem}; export to "
        "onnx, or remove no blocks"
    )


def _query_scale(facts: Facts, dialect: Dialect) -> float:
    """What llama.cpp multiplies products of queries and keys by; it knows some models by their number of blocks."""
    taken = facts.sizes["residual"] // facts.heads if facts.layers == dialect.layers_of_27b else facts.head_size
    return 1 / math.sqrt(taken)


def _names(model_type: str, layers: int) -> dict[str, str]:
    """Tensor name in transformers → in GGUF, for all that the architecture may have."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == DIALECTS[model_type].name)
    table = get_tensor_name_map(arch, layers)
    parts = ARCHITECTURES[model_type]
    inner = (*parts.linears, *parts.norms, "self_attn.q_norm", "self_attn.k_norm")
    modules = [f"{parts.blocks}.{i}.{name}" for i in range(layers) for name in inner]
    found = {}
    for module in (parts.embedding, *filter(None, (parts.positions,)), *modules, parts.final_norm, parts.head):
        if (new := table.get_name(module)) is not None:
            found.update({f"{module}.{suffix}": f"{new}.{suffix}" for suffix in ("weight", "bias")})
    return found


def _reordered(
    name: str, tensor: EncodedTensor | Tensor, dialect: Dialect, heads: int, kv_heads: int, back: bool
) -> EncodedTensor | Tensor:
    """A tensor with its rows in llama.cpp's order, or `back` in transformers'; only Q and K differ."""
    if not dialect.interleaved or not (_QUERY in name or _KEY in name):
        return tensor
    codes = tensor.codes if isinstance(tensor, EncodedTensor) else tensor
    rows = rotary_rows(codes.shape[0], heads if _QUERY in name else kv_heads)
    if back:
        rows = rows.argsort()
    if not isinstance(tensor, EncodedTensor):
        return tensor[rows]
    return replace(tensor, codes=tensor.codes[rows], scales=None if tensor.scales is None else tensor.scales[rows])


def rotary_rows(n: int, heads: int) -> Tensor:
    """Row of the halves layout that each of n rows of the interleaved layout comes from, head by head.

    >>> rotary_rows(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    import torch

    return torch.arange(n).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _to_file(tensor: EncodedTensor | Tensor, name: str) -> tuple[str, np.ndarray[Any, Any]]:
    """GGUF's type and the bytes or floats of a tensor; a vector is float32, as llama.cpp demands."""
    import torch

    from compress.numerics.ggml_blocks import pack_iq4_nl, pack_mxfp4, pack_q4_0, pack_q5_0, pack_q8_0

    if not isinstance(tensor, EncodedTensor):
        return "F32", tensor.float().contiguous().numpy()
    codes, scales = tensor.codes, tensor.scales
    if not tensor.encoding.is_coded:
        if codes.dim() == 1 or codes.dtype == torch.float32:
            return "F32", codes.float().contiguous().numpy()
        kind = {torch.float16: "F16", torch.bfloat16: "BF16"}[codes.dtype]
        return kind, codes.contiguous().view(torch.uint8).numpy()
    if tensor.encoding.is_block:
        return tensor.encoding.name.upper(), codes.contiguous().numpy()
    assert scales is not None
    if codes.shape[1] % BLOCK:
        raise RecipeError(f"gguf: {name} has {codes.shape[1]} input channels, not a multiple of 32; keep it fp16")
    if tensor.encoding.name == "mxfp4":
        return "MXFP4", pack_mxfp4(codes, scales).numpy()
    if tensor.encoding.name == "iq4_nl":
        return "IQ4_NL", pack_iq4_nl(codes, scales).numpy()
    if tensor.encoding.bits == 4:
        return "Q4_0", pack_q4_0(codes, scales).numpy()
    if tensor.encoding.bits == 5:
        return "Q5_0", pack_q5_0(codes, scales).numpy()
    return "Q8_0", pack_q8_0(codes, scales).numpy()


def _from_file(kind: str, data: np.ndarray[Any, Any], where: str) -> EncodedTensor | Tensor:
    """The inverse of `_to_file`, with one scale per block of 32."""
    import torch

    from compress.numerics.ggml_blocks import unpack_iq4_nl, unpack_mxfp4, unpack_q4_0, unpack_q5_0, unpack_q8_0

    raw = torch.from_numpy(data.copy())  # the file is mapped read-only
    if kind == "F32":
        return raw
    if kind == "F16":
        return EncodedTensor(Encoding("fp16"), raw)
    if kind == "BF16":
        return EncodedTensor(Encoding("bf16"), raw.view(torch.bfloat16))
    if kind == "MXFP4":
        return EncodedTensor(Encoding("mxfp4", BLOCK), *unpack_mxfp4(raw))
    if kind == "IQ4_NL":
        return EncodedTensor(Encoding("iq4_nl", BLOCK), *unpack_iq4_nl(raw))
    if kind.lower() in GGML_BLOCKS:
        return EncodedTensor(Encoding(kind.lower()), raw)
    blocks = {"Q4_0": ("int4", unpack_q4_0), "Q5_0": ("int5", unpack_q5_0), "Q8_0": ("int8", unpack_q8_0)}
    if kind not in blocks:
        raise RecipeError(f"{where} is {kind}, which compress does not write")
    name, unpack = blocks[kind]
    return EncodedTensor(Encoding(name, BLOCK), *unpack(raw))
