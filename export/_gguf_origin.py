"""What a GGUF file says of its model besides the network: its name, the base model, its licence, the importances."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.ggml_mixes import Importance
    from compress.model import Model

HUB = "https://huggingface.co"
STEM_BYTES = 200  # file systems take names of 255


def add(writer: Any, model: Model) -> None:
    """Write the general.* keys of GGUF's naming convention; what nobody knows is left out.

    The name is taken apart as gguf-py does it; the size is that of the weights as they are. The base model is what
    `model.described` says.
    """
    known, (basename, finetune, version, size) = model.described, _parts(model)
    writer.add_name(model.name)
    named = {writer.add_basename: basename, writer.add_finetune: finetune, writer.add_version: version}
    for entry, value in named.items():
        if value:
            entry(value)
    writer.add_size_label(size)
    held = (model.encoding(name) for name in model.facts.matrices)
    if any(encoding is not None and encoding.is_coded for encoding in held):
        writer.add_quantized_by("compress-toolkit")
    if known.get("license"):
        writer.add_license(known["license"])
    if known.get("languages"):
        writer.add_languages(list(known["languages"]))
    if known.get("name"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, known["name"])
        if repository := known.get("repository"):
            writer.add_base_model_organization(0, repository.partition("/")[0])
            writer.add_base_model_repo_url(0, f"{HUB}/{repository}")
    if model.importance is not None:
        _add_importance(writer, model.importance)


def file_name(model: Model, encoding: str) -> str:
    """A file's name by GGUF's naming convention, e.g. SmolLM2-135M-Instruct-Q4_0.gguf.

    Of the same parts as the general.* keys; what shells or other systems might take for more than a name becomes a
    hyphen.
    """
    import gguf

    basename, finetune, version, size = _parts(model)
    stem = gguf.naming_convention(model.name, basename, finetune, version, size, output_type=None)
    stem = re.sub(r"[^\w.+]+", "-", stem).strip("-.").encode()[:STEM_BYTES].decode(errors="ignore")
    return f"{stem}-{encoding}.gguf"


def _parts(model: Model) -> tuple[str | None, str | None, str | None, str]:
    """Base name, fine-tune and version, each None where the model's name does not tell, and a label of its size."""
    import gguf

    size = model.facts.parameters + model.facts.floats
    _, _, basename, finetune, version, _ = gguf.Metadata.get_model_id_components(model.name, size)
    return basename, finetune, version, gguf.size_label(size, 0, 0, 0)


def _add_importance(writer: Any, found: Importance) -> None:
    """The keys that llama.cpp's own tool writes, in its types; it has a file of importances, and we none."""
    writer.add_string("quantize.imatrix.file", "none: measured by quantize.ggml of compress-toolkit")
    if found.dataset:
        writer.add_string("quantize.imatrix.dataset", found.dataset)
    writer.add_uint32("quantize.imatrix.entries_count", found.tensors)
    writer.add_uint32("quantize.imatrix.chunks_count", found.windows)
