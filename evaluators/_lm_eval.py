"""Tasks of lm-evaluation-harness as items: its prompts, answers, filters and metrics, and a model of ours.

The harness (Gao et al., doi:10.5281/zenodo.12608602) says what is asked and what counts as right; nothing of it
runs a model. Requests are encoded as its `hf` model encodes them, yet no special token is ever added, except
before an answer without a prompt.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os.path
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.branching import branch_logits
from compress.errors import GateInconclusive, RecipeError, one_line
from compress.interfaces import Documents, LanguageModel, Score
from evaluators import _lm_eval_tasks
from evaluators._choices import Tokens

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "lm_eval:"
_LENGTH = 512  # of `Documents`; nothing is cut here
_RIGHT_OR_WRONG = ("acc", "exact_match", "acc_norm", "acc_bytes", "acc_mutual_info")
_MOST_TOKENS = 256  # written where the task does not say, as the harness' `hf` model has it
_FIRST_STRETCH = 32  # tokens written before looking for a stop; then twice as many


class Question(NamedTuple):
    """One document of a task as a model is asked it. A tuple of plain values: it is a part of cache keys.

    place: among the task's documents. document: the harness' hash of it. requests: context and continuation, or the
    prompt and nothing. right: the request that is the right answer, -1 where that is unknown or there are several.
    """

    task: str
    place: int
    document: str
    requests: tuple[tuple[Tokens, Tokens], ...]
    right: int
    until: tuple[str, ...] = ()
    most_tokens: int = 0


@dataclass(frozen=True)
class Part:
    """A task of the harness within what a name stands for: its requests by document, and the metric that decides."""

    task: Any
    metric: str
    filter: str
    requests: Sequence[Sequence[Any]]
    hashes: Sequence[str]
    right: Sequence[int]
    chance: float


@dataclass(frozen=True)
class Loaded:
    """What a name stands for. untestable: why no loss can be planted in it, or an empty text."""

    documents: Documents
    parts: Mapping[str, Part]
    untestable: str


@dataclass(frozen=True)
class Encoder:
    """A model's tokens of a text, and the token that stands before an answer without a prompt."""

    model: LanguageModel

    def __call__(self, text: str) -> list[int]:
        """Token ids, nothing added."""
        return self.model.encode(text)

    @property
    def start(self) -> int:
        """Begin-of-sequence, else the first end-of-sequence; raises GateInconclusive where there is neither."""
        if self.model.bos_id is not None:
            return self.model.bos_id
        if not self.model.eos_ids:
            raise GateInconclusive("the tokenizer has no token to stand before an answer without a prompt")
        return min(self.model.eos_ids)


# --- loading -----------------------------------------------------------------------------------------------------


def load(name: str, path: str | None, metric: str | None, offline: bool = False) -> Loaded:
    """The documents of a task, group or tag, in a random order that depends on them alone; see `_lm_eval_tasks`.

    metric: one of the task's, or "METRIC,FILTER"; without one the first that says right or wrong. Kept until a
    file of the task changes. Raises RecipeError, Corrupt, UnsafeInput, NetworkError.
    """
    return _load(name, path, metric, offline, _lm_eval_tasks.fingerprint(name, path))


@cache
def _load(name: str, path: str | None, metric: str | None, offline: bool, fingerprint: str) -> Loaded:
    made = _lm_eval_tasks.load(name, path, offline)
    # An id is led by its group, up to a colon: the harness writes "group::task" for tasks within a group's file.
    parts = {task.replace("::", "."): _part(task, found, metric) for task, found in made.items()}
    pairs = sorted(
        (pair for task, part in parts.items() for pair in _documents(task, part)),
        key=lambda pair: hashlib.sha256(pair[0].encode()).digest(),
    )
    sha = hashlib.sha256(json.dumps([_lm_eval_tasks.version(), pairs]).encode())
    for task, part in parts.items():
        config = json.dumps(part.task.dump_config(), default=str, sort_keys=True)
        # Where a function has no source to show, it shows its place in memory.
        config = re.sub(r" at 0x[0-9a-f]+", "", config)
        sha.update(json.dumps([task, part.metric, part.filter, part.right, config]).encode())
    decided = ", ".join(sorted({f"{p.metric},{p.filter}" if p.filter != "none" else p.metric for p in parts.values()}))
    short = name.rsplit("/", 1)[-1].removesuffix(".yaml")
    source = f"{PREFIX}{short} by {decided}"
    untestable = [t for t, part in parts.items() if any(r < 0 for r in part.right)]
    why = f"the right answer of {untestable[0]} is not one of its choices alone" if untestable else ""
    return Loaded(Documents(source, pairs, sha.hexdigest(), _LENGTH), parts, why)


def _part(name: str, task: Any, metric: str | None) -> Part:
    """Settle the metric, build every request, and find the right answers; raises RecipeError."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise RecipeError(f"task {name} has no answers but whole texts; gate it by perplexity, with source file:PATH")
    known = [*task.aggregation()]
    wanted, _, chosen = (metric or next((m for m in known if m in _RIGHT_OR_WRONG), "")).partition(",")
    filters = [ensemble.name for ensemble in task._filters]
    if wanted not in known or not task.higher_is_better().get(wanted, True):
        raise RecipeError(f"task {name} has no metric {wanted!r} that says right or wrong; it has {', '.join(known)}")
    if (chosen or filters[0]) not in filters:
        raise RecipeError(f"task {name} has no filter {chosen!r}; it has {', '.join(filters)}")
    by_document: dict[int, list[Any]] = {}
    for request in _lm_eval_tasks.requests(task):
        by_document.setdefault(request.doc_id, []).append(request)
    asked = [sorted(found, key=lambda r: int(r.idx)) for _, found in sorted(by_document.items())]
    if task.OUTPUT_TYPE == "generate_until":
        _check_greedy(name, asked)
    answers = [_answer(task, found) for found in asked]
    return Part(
        task=task,
        metric=wanted,
        filter=chosen or filters[0],
        requests=asked,
        hashes=[_hash(found[0].doc) for found in asked],
        right=[right for right, _, _ in answers],
        chance=_chance(answers),
    )


def _check_greedy(name: str, asked: Sequence[Sequence[Any]]) -> None:
    options = asked[0][0].args[1]
    sampled = options.get("do_sample", (options.get("temperature") or 0) > 0)
    if sampled or (options.get("num_beams") or 1) > 1:
        raise RecipeError(f"task {name} samples its answers ({options}); only greedy ones repeat: set do_sample: false")


def _answer(task: Any, found: Sequence[Any]) -> tuple[int, str, float]:
    """Which request is the right answer (-1: unknown), its text, and how often a blind choice is right.

    Unknown, too, where the task decides by code of its own.
    """
    doc, own = found[0].doc, callable(getattr(task.config, "process_results", None))
    target = task.doc_to_target(doc)
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "doc_to_choice"):
        right = 0 if task.OUTPUT_TYPE == "loglikelihood" and len(found) == 1 and not own else -1
        return right, str(target), 0.0 if len(found) == 1 else 1 / len(found)
    choices = list(task.doc_to_choice(doc))
    if getattr(task, "multiple_input", 0):
        target = task.doc_to_text(doc)
    several = target if isinstance(target, list) else [target]
    places = [choices.index(t) if isinstance(t, str) and t in choices else t for t in several]
    valid = [p for p in places if isinstance(p, int) and 0 <= p < len(choices)]
    right = valid[0] if len(places) == 1 and valid and not own else -1
    return right, choices[valid[0]] if valid else "", max(1, len(valid)) / len(choices)


def _chance(answers: Sequence[tuple[int, str, float]]) -> float:
    """How often guessing is right: the better of blind choice and of always giving the commonest answer."""
    if not answers:
        return 0.0
    commonest = Counter(text for _, text, _ in answers).most_common(1)[0][1] / len(answers)
    return max(commonest, sum(blind for _, _, blind in answers) / len(answers))


def _hash(document: Any) -> str:
    """As the harness computes `doc_hash`."""
    from lm_eval.utils import handle_non_serializable, hash_string

    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))


def _documents(name: str, part: Part) -> Iterator[tuple[str, str]]:
    """Clusters: documents by their hash, or by the field that the task's `metadata: {cluster: FIELD}` names."""
    field = (getattr(part.task.config, "metadata", None) or {}).get("cluster")
    clusters: dict[str, list[Any]] = {}
    for i, (found, digest) in enumerate(zip(part.requests, part.hashes, strict=True)):
        if field is not None and field not in found[0].doc:
            raise RecipeError(f"task {name}: metadata.cluster names {field!r}, which document {i} does not have")
        cluster = digest if field is None else hashlib.sha256(str(found[0].doc[field]).encode()).hexdigest()
        clusters.setdefault(cluster, []).append([name, i, digest, part.right[i], *_texts(found)])
    for cluster, items in clusters.items():
        yield f"{name}:{cluster}", json.dumps(items, ensure_ascii=False)


def _texts(found: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Requests with each context once, as [context, [continuation, …]], and how to write where there is none."""
    if found[0].request_type == "generate_until":
        prompt, options = found[0].args
        until = options.get("until") or []
        aliases = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = next((int(options[a]) for a in aliases if options.get(a)), _MOST_TOKENS)
        return [[prompt, [""]]], {"until": [until] if isinstance(until, str) else until, "most_tokens": most}
    grouped = itertools.groupby((r.args for r in found), key=lambda pair: pair[0])
    return [[context, [c for _, c in pairs]] for context, pairs in grouped], {}


# --- asking ------------------------------------------------------------------------------------------------------


def questions(text: str, encode: Callable[[str], list[int]]) -> Iterator[Question]:
    """The questions of one document of `Loaded`, in tokens. encode: an `Encoder`."""
    for task, index, digest, right, asked, writing in json.loads(text):
        pairs = [(context, c) for context, continuations in asked for c in continuations]
        if writing:
            nothing: Tokens = ()
            prompts = tuple((tuple(encode(prompt)), nothing) for prompt, _ in pairs)
            yield Question(task, index, digest, prompts, right, tuple(writing["until"]), writing["most_tokens"])
            continue
        requests = tuple(_pair(context, continuation, encode) for context, continuation in pairs)
        if not all(continuation for _, continuation in requests):
            raise GateInconclusive(f"document {digest[:12]} of {task} has an answer without a token")
        yield Question(task, index, digest, requests, right)


def _pair(context: str, continuation: str, encode: Callable[[str], list[int]]) -> tuple[Tokens, Tokens]:
    """Tokens of a prompt and its answer; spaces that end a prompt go with the answer, as words begin with theirs."""
    if not context:
        found = tuple(encode(continuation))
        start: int = encode.start  # type: ignore[attr-defined]
        return ((start,), found) if found[:1] != (start,) else (found[:1], found[1:])
    prompt = context.rstrip() or context
    before = encode(prompt)
    return tuple(before), tuple(encode(context + continuation)[len(before) :])


def score(model: LanguageModel, parts: Mapping[str, Part], asked: Sequence[tuple[str, Question]]) -> list[Score]:
    """1 for a wrong answer and 0 for a right one, by the metric of the task, for each (example id, question).

    `nats` is the log-probability of all answers, or of what was written: it tells models apart that give the same
    answers. `chosen` is the request that the model is taken to choose. Raises GateInconclusive where a document is
    not the one that was asked for, or where the metric says neither right nor wrong.
    """
    for name, question in asked:
        part = parts.get(question.task)
        known = part.hashes[question.place] if part and question.place < len(part.hashes) else None
        if known != question.document:
            raise GateInconclusive(f"{name} is not the document that the task has there now: its hash differs")
    written = {name: _write(model, question) for name, question in asked if question.most_tokens}
    read = [
        question._replace(requests=(written[name][1],)) if name in written else question for name, question in asked
    ]
    scores = []
    for (name, question), found in zip(asked, _likelihoods(model, read), strict=True):
        total = sum(nats for nats, _ in found)
        if not math.isfinite(total):
            scores.append(Score(name, math.nan, 1.0))
            continue
        part = parts[question.task]
        if name in written:
            wrong, chosen = 1.0 - _judged(part, question, [written[name][0]]), {}
        else:
            wrong, chosen = 1.0 - _judged(part, question, found), {"chosen": float(_chosen(part, question, found))}
        scores.append(Score(name, wrong, 1.0, {"nats": total, **chosen}))
    return scores


def _judged(part: Part, question: Question, answers: Sequence[Any]) -> float:
    """1 where the task's own metric, after the task's own filter, says right, and 0 where it says wrong."""
    asked = zip(part.requests[question.place], answers, strict=True)
    requests = [replace(r, resps=[answer] * (r.repeats or 1), filtered_resps={}) for r, answer in asked]
    try:
        next(f for f in part.task._filters if f.name == part.filter).apply(requests)
        found = part.task.process_results(requests[0].doc, [r.filtered_resps[part.filter] for r in requests])
    except Exception as error:  # the task's own code
        problem = f"{question.task} cannot judge document {question.document[:12]} ({one_line(error)})"
        raise GateInconclusive(problem) from error
    value = found.get(part.metric)
    if not isinstance(value, int | float) or value not in (0, 1):
        raise GateInconclusive(
            f"{part.metric} of {question.task} is {value!r:.60} on document {question.document[:12]}; expected 1 "
            "(right) or 0 (wrong): name another metric of the task"
        )
    return float(value)


def _chosen(part: Part, question: Question, answers: Sequence[tuple[float, bool]]) -> int:
    """The answer that the metric takes for the model's; for showing it alone."""
    texts = [str(r.args[1]) for r in part.requests[question.place]]
    if part.metric == "acc_mutual_info":
        half = len(answers) // 2
        return max(range(half), key=lambda i: answers[i][0] - answers[half + i][0])
    lengths = {"acc_norm": [len(t.strip()) for t in texts], "acc_bytes": [len(t.strip().encode()) for t in texts]}
    divisors = lengths.get(part.metric, [1] * len(texts))
    return max(range(len(answers)), key=lambda i: answers[i][0] / max(1, divisors[i]))


def _likelihoods(model: LanguageModel, asked: Sequence[Question]) -> list[list[tuple[float, bool]]]:
    """Log-probability of every continuation in nats, and whether greedy writing would give it.

    From the left, contexts lose what exceeds the model's context, as in the harness. Contexts that continuations
    share are read once.
    """
    import torch

    from compress.numerics.divergence import token_nll

    cut = [[_fitting(model, *request) for request in question.requests] for question in asked]
    grouped = [[(c, [x for _, x in pairs]) for c, pairs in itertools.groupby(r, key=lambda p: p[0])] for r in cut]
    rows = iter(branch_logits(model, [group for groups in grouped for group in groups]))

    def answer(found: Tensor, continuation: Tokens) -> tuple[float, bool]:
        target = torch.tensor(continuation)
        return -float(token_nll(found, target).sum()), bool((found.argmax(1) == target).all())

    return [
        [answer(r, c) for _, continuations in groups for r, c in zip(next(rows), continuations, strict=True)]
        for groups in grouped
    ]


def _fitting(model: LanguageModel, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
    room = model.context_length + 1 - len(continuation)
    if room < 1:
        raise RecipeError(f"an answer of {len(continuation)} tokens exceeds the context of {model.context_length}")
    return context[-room:], continuation


def _write(model: LanguageModel, question: Question) -> tuple[str, tuple[Tokens, Tokens]]:
    """What the model writes, greedily, up to the first of the task's stops; and the prompt with all tokens written.

    It writes in stretches that double, each from the whole text so far: most answers stop early.
    """
    ((prompt, _),) = question.requests
    room = model.context_length - question.most_tokens
    if room < 1:
        raise RecipeError(f"{question.task} writes {question.most_tokens} tokens, more than {model.context_length}")
    prompt, tokens, stretch = prompt[-room:] or (Encoder(model).start,), list[int](), _FIRST_STRETCH
    while True:
        most = min(stretch, question.most_tokens - len(tokens))
        tokens += model.generate([*prompt, *tokens], most)
        ended = tokens[-1] in model.eos_ids
        text = model.decode(tokens[:-1] if ended else tokens)
        stops = [place for stop in question.until if stop and (place := text.find(stop)) >= 0]
        if stops or ended or len(tokens) >= question.most_tokens:
            return text[: min(stops, default=len(text))], (prompt, tuple(tokens))
        stretch *= 2


def shown(question: Question, chosen: Sequence[int]) -> tuple[Tokens, list[Tokens]]:
    """The prompt that the chosen requests have in common, and what each goes on with."""
    whole = [context + continuation for context, continuation in (question.requests[i] for i in chosen)]
    shared = len(os.path.commonprefix(whole))
    shared = min(shared, *(len(question.requests[i][0]) for i in chosen))
    return whole[0][:shared], [tokens[shared:] for tokens in whole]


def choices(question: Question) -> list[Tokens]:
    """Tokens of every answer, the right one first, such that its first token apart from the others is scored.

    Answers to other prompts are no choices where this one leads: the prompt stands for them. Without a prompt all
    items begin in one context, so that the right answer is told apart by its last token alone.
    """
    context, continuation = question.requests[question.right]
    right = context + continuation
    same = [c + x for i, (c, x) in enumerate(question.requests) if i != question.right and c == context]
    if len(context) == 1 and all(other[: len(right)] != right for other in same):
        return [right, right[:-1]]
    return [right, *(same or [context])]
