"""Models that judge what a language model wrote: encoders and sequence classifiers, from safetensors alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from compress import source
from compress.errors import Corrupt, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["encoder", "classifier"]
_CLASSES: dict[Kind, str] = {"encoder": "AutoModel", "classifier": "AutoModelForSequenceClassification"}
# Tensors that may be missing, since nothing here reads what they compute.
_UNUSED: dict[Kind, tuple[str, ...]] = {"encoder": ("pooler.",), "classifier": ()}


@dataclass(frozen=True, eq=False)
class Judge:
    """An opened judge. limit: most tokens of a text, special ones counted; what exceeds it is cut off."""

    module: Any
    tokenizer: Any
    limit: int

    def tokens(self, text: str) -> Tensor:
        """(1, n) int64: the ids of a text between the special tokens of the judge."""
        ids: Tensor = self.tokenizer(text, truncation=True, max_length=self.limit, return_tensors="pt")["input_ids"]
        return ids


def known_config(spec: str) -> dict[str, Any] | None:
    """The config of a judge before it loads; None of one on the hub, which would have to be downloaded.

    Raises RecipeError where `spec` is neither a folder nor a hub id, UnsafeInput where its config asks for remote
    code, Corrupt where that is no JSON.
    """
    found = source.resolve(spec)
    if found.kind == "gguf":
        raise RecipeError(f"{spec}: a GGUF file holds a language model; expected a folder of safetensors or org/name")
    return None if found.kind == "hub" else source.plain_config(found)


def digest(spec: str) -> str:
    """sha256 of a judge's files; downloads one of the hub. Raises as `opened` does."""
    return source.digest(source.download(source.resolve(spec)))


def opened(kind: Kind, spec: str) -> Judge:
    """A judge in float32, kept open. spec: a folder or org/name@revision.

    Raises RecipeError where nothing is there, NetworkError where a download fails, UnsafeInput for pickled weights,
    links and remote code, and Corrupt where tensors are missing: a head that transformers would draw at random.
    """
    known_config(spec)
    found = source.download(source.resolve(spec))
    return _open(kind, found, source.digest(found))


@lru_cache(maxsize=2)  # a digest tells files that have changed
def _open(kind: Kind, found: source.Source, digest: str) -> Judge:
    import transformers

    assert found.path is not None
    source.plain_config(found)
    module, tokenizer, loaded = source.open_folder(found.path, getattr(transformers, _CLASSES[kind]), f" as {kind}")
    if missing := sorted(name for name in loaded["missing_keys"] if not name.startswith(_UNUSED[kind])):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise Corrupt(f"{found.path}: no {kind}: tensor {missing[0]} is missing{more}, and would be drawn at random")
    if module.config.is_encoder_decoder:
        raise RecipeError(f"{found.spec}: an encoder-decoder; expected a model that reads a text in one pass")
    places = getattr(module.config, "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, places or tokenizer.model_max_length)
    return Judge(module.eval(), tokenizer, limit)
