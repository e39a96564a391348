"""What a GGUF file says of its model besides the network: the parts of its name, the base model, its licence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.model import Model

HUB = "https://huggingface.co"


def add(writer: Any, model: Model) -> None:
    """Write the general.* keys of GGUF's naming convention; what nobody knows is left out.

    The name is taken apart as gguf-py does it; the size is that of the matrices as they are. The base model is what
    `model.described` says.
    """
    import gguf

    known, size = model.described, model.facts.parameters
    _, _, basename, finetune, version, _ = gguf.Metadata.get_model_id_components(model.name, size)
    writer.add_name(model.name)
    named = {writer.add_basename: basename, writer.add_finetune: finetune, writer.add_version: version}
    for entry, value in named.items():
        if value:
            entry(value)
    writer.add_size_label(gguf.size_label(size, 0, 0, 0))
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
