"""Artifacts: a model's very codes, scales, masks and floats in an immutable folder, named by its digest.

model.safetensors   <module>.codes .scales .zero_points .mask; other tensors under their own names
config.json, tokenizer files; generation_config.json of a language model
compression.json    encodings and shapes, rounding of inputs and cache, what importances were measured on, sizes, sha256
                    of every other file and of itself (see `compress.sealing`)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import sealing
from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt, UnsafeInput
from compress.ggml_mixes import Importance
from compress.publishing import publish, staging
from compress.rounding import from_json, to_json

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model
    from compress.streaming import Shelf

MANIFEST = sealing.FILE
WEIGHTS = "model.safetensors"
SCHEMA = "compress.artifact/2"


def save(model: Model, folder: Path, keep: bool = False) -> str:
    """Write the model into `folder` (created, atomically: complete or absent); returns the artifact's digest.

    keep: where the folder exists already, as another process made the same, that one stays.
    """
    with staging(folder) as temporary:
        _fill(model, temporary)
        publish(temporary, folder, keep)
    return digest(folder)


def _fill(model: Model, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from compress.model import config_of
    from compress.numerics.packing import pack
    from compress.storage import flatten

    encodings: dict[str, Any] = {}
    for file, tensors in _files(model):
        entries, specs = flatten(tensors)
        if file == WEIGHTS:
            entries |= {f"{n.removesuffix('.weight')}.mask": pack(m.to(torch.uint8), 1) for n, m in model.masks.items()}
        save_file(entries, folder / file, metadata={"format": "pt"})
        encodings |= specs
    config = {**config_of(model.module), "dtype": "float32"}
    config.pop("_name_or_path", None)  # where it was loaded from is no part of it
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str))
    if not model.labels:
        model.module.generation_config.save_pretrained(folder)
    _save_tokenizer(model, folder)
    facts = {
        "schema": SCHEMA,
        "name": model.name,
        "model_digest": model.digest,
        "encodings": encodings,
        **({"rounding": rounding} if (rounding := to_json(model.inputs, model.cache)) else {}),
        **({"importance": asdict(model.importance)} if model.importance is not None else {}),
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "bits_per_weight": bits_per_weight(model),
        **({"streamed": True} if model.shelf is not None else {}),
        "size_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
        "files": {p.name: file_sha256(p) for p in sorted(folder.iterdir())},
    }
    sealing.write(folder, facts)


def _files(model: Model) -> Iterator[tuple[str, Iterator[tuple[str, EncodedTensor | Tensor]]]]:
    """The weights file and its tensors; of a model that is streamed, one more per block."""
    shelf = model.shelf
    if shelf is None:
        yield WEIGHTS, model.tensors()
        return
    names = [name for name, _ in model.module.named_parameters()]
    yield WEIGHTS, ((name, model.tensor(name)) for name in names if shelf.index(name) is None)
    for index in range(model.facts.layers):
        yield _block_file(index), ((name, model.tensor(name)) for name in shelf.names(index))


def _block_file(index: int) -> str:
    return f"block-{index:05}.safetensors"


def manifest(folder: Path) -> dict[str, Any]:
    """The artifact's manifest; raises Corrupt where it is missing or not ours."""
    loaded = sealing.read(folder)
    if loaded.get("schema") != SCHEMA:
        raise Corrupt(f"{folder}: schema {loaded.get('schema')!r}, expected {SCHEMA!r}")
    return loaded


def encodings(folder: Path) -> dict[str, str]:
    """The encoding of every module whose weight is stored in one, as text, and how its inputs are rounded, if so."""
    facts = manifest(folder)
    inputs, _ = from_json(facts.get("rounding", {}))
    found = {}
    for name, spec in facts["encodings"].items():
        module = name.removesuffix(".weight")
        stored = str(encoding_of(spec))
        found[module] = f"{stored}, {inputs[module]}" if module in inputs else stored
    return found


def encoding_of(spec: Mapping[str, Any]) -> Encoding:
    """The encoding that a manifest says of a tensor."""
    return Encoding(spec["name"], spec["group_size"], spec["symmetric"])


def digest(folder: Path) -> str:
    """The artifact's digest: sha256 of its manifest, which holds the digest of every other file."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def verify(folder: Path) -> None:
    """Re-check every file against the manifest; raises Corrupt naming the first that differs."""
    for name, expected in manifest(folder)["files"].items():
        check_file(folder, name, expected)


def check_file(folder: Path, name: str, expected: str) -> None:
    """Compare a file with its digest on record; raises Corrupt, or UnsafeInput for a name that leaves the folder."""
    file = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnsafeInput(f"{folder}: its record names {name!r}, which lies outside the folder; do not trust it")
    if not file.is_file():
        raise Corrupt(f"{file}: missing (expected sha256 {expected[:12]}…)")
    if (found := file_sha256(file)) != expected:
        raise Corrupt(f"{file}: sha256 {found[:12]}…, expected {expected[:12]}…")


def load(folder: Path, dtype: str = "float32") -> Model:
    """Open an artifact exactly as it was saved: encodings, masks and float tensors, config and tokenizer.

    Raises Corrupt where it is not: weights are compared by the model's digest, all else by that of the file.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from compress.architectures import classifies
    from compress.classifier import auto_class, model_of
    from compress.conv1d import as_linears
    from compress.families import SEQ2SEQ
    from compress.seq2seq import settle_head
    from compress.storage import materialize, unflatten

    facts = manifest(folder)
    for name, expected in facts["files"].items():
        if not name.endswith(".safetensors"):
            check_file(folder, name, expected)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        module = auto_class(config.to_dict()).from_config(config, dtype=torch.float32)
    if config.model_type in SEQ2SEQ:
        settle_head(module, json.loads((folder / "config.json").read_text())["tie_word_embeddings"])
    as_linears(module)  # as the tensors were saved
    tensors, specs = load_file(folder / WEIGHTS), facts["encodings"]
    shelf = _shelf(folder, module, specs) if facts.get("streamed") else None
    held = set() if shelf is None else {name for name in {*tensors, *specs} if shelf.holds(name)}
    state, encoded = unflatten(tensors, {name: spec for name, spec in specs.items() if name not in held})
    state = {name: tensor for name, tensor in state.items() if name not in held}
    masks = _read_masks(tensors, module)
    materialize(module, {**state, **{name: tensor.decode() for name, tensor in encoded.items()}}, shelf)
    if not classifies(config.to_dict()):
        module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = model_of(module, tokenizer, dtype, name=facts["name"], shelf=shelf)
    model.encoded.update(encoded)
    model.masks = masks
    _round(model, facts.get("rounding", {}))
    model.importance = Importance(**facts["importance"]) if "importance" in facts else None
    if model.digest != facts["model_digest"]:
        raise Corrupt(f"{folder}: its tensors are not those that were saved")
    return model


def _shelf(folder: Path, module: Any, specs: Mapping[str, Any]) -> Shelf:
    """The blocks and other matrices of a streamed artifact, on disk until they are needed."""
    from safetensors.torch import load_file

    from compress.architectures import Facts
    from compress.storage import unflatten
    from compress.streaming import Shelf

    blocks = Facts.from_config(module.config.to_dict()).architecture.blocks

    def read(names: Sequence[str]) -> Any:
        index = shelf.index(names[0])
        file = folder / (WEIGHTS if index is None else _block_file(index))
        floats, encoded = unflatten(load_file(file), {name: specs[name] for name in names if name in specs})
        return {name: floats[name] for name in names if name in floats}, encoded

    shelf = Shelf(module, blocks, read)
    shelf.encoded.announce({name: encoding_of(spec) for name, spec in specs.items()})
    return shelf


def bits_per_weight(model: Model) -> float:
    """Stored bits per weight over every tensor: codes, scales, zero points, embeddings and norms, but no masks.

    A mask is for later steps: it is a part of the artifact's bytes, and of no export's.
    """
    import torch

    bits = weights = 0.0
    for _, tensor in model.tensors():
        if isinstance(tensor, torch.Tensor):
            bits, weights = bits + 32 * tensor.numel(), weights + tensor.numel()
        else:
            bits, weights = bits + 8 * tensor.nominal_bytes, weights + math.prod(tensor.shape)
    return bits / weights


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_tokenizer(model: Model, folder: Path) -> None:
    """The tokenizer's files, without transformers' notes on how it was opened this time."""
    model.save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for note in ("is_local", "local_files_only", "name_or_path"):
        config.pop(note, None)
    path.write_text(json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8")


def _round(model: Model, found: Mapping[str, Any]) -> None:
    """Let the model round what its manifest says; raises Corrupt for a linear that it does not have."""
    inputs, cache = from_json(found)
    if unknown := inputs.keys() - model.facts.linears.keys():
        raise Corrupt(f"the inputs of {min(unknown)} are to be rounded, and the model has no such linear")
    for name, rounding in inputs.items():
        model.round_inputs(name, rounding)
    if cache is not None:
        model.round_cache(cache)


def _read_masks(tensors: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:
    from compress.numerics.packing import unpack

    masks = {}
    for key in (k for k in tensors if k.endswith(".mask")):
        name = key.removesuffix(".mask") + ".weight"
        masks[name] = unpack(tensors[key], 1, tuple(module.get_parameter(name).shape), signed=False).bool()
    return masks
