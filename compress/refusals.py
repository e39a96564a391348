"""What of a recipe cannot work on a model, said before weights load: one line with the place and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress import plugin
from compress.architectures import Facts
from compress.data import Split
from compress.encodings import Encoding
from compress.errors import RecipeError
from compress.interfaces import Evaluator, Exporter, Step
from compress.pairs import mismatch, require
from compress.recipe import Recipe, StepEntry
from compress.recipe_data import requests
from compress.validation import titled


def check(recipe: Recipe, facts: Facts) -> list[str]:
    """Warnings about the recipe on a model of these facts; raises RecipeError for what cannot work.

    Every attempt is judged, since any of them may be the one that ships.
    """
    shapes = [[facts]]  # before each step, and after the last, what the model may be by then
    for i, entry in enumerate(recipe.steps):
        for path, step in _attempts(entry, i):
            for before in shapes[i]:
                _check_step(recipe, before, path, step)
            _check_order(recipe, shapes, i, path, step)
        _check_margins(recipe, i, entry)
        shapes.append(_shapes_after(entry, shapes[i]))
    if recipe.streaming:
        _check_streaming(recipe, facts)
    _check_measurements(recipe, facts)
    _check_rounded_once(recipe, shapes)
    _check_cached_once(recipe)
    _check_refined(recipe, shapes)
    _check_exports(recipe, shapes)
    return [*_loosened(recipe), *_ungated(recipe)]


def check_documents(recipe: Recipe, facts: Facts, parts: Sequence[Split]) -> None:
    """Raise RecipeError where documents that will be read are pairs, and the model takes none, or the reverse."""
    read = _read(recipe)
    for part in parts:
        if part.request.role not in read:
            continue
        if problem := mismatch(facts.paired, (document.text for document in part.documents)):
            role = part.request.role
            raise RecipeError(f"{recipe.place('data', role)}  data.{role}: {part.request.source}: {problem}")


def _read(recipe: Recipe) -> set[str]:
    """The roles of data that something in the recipe looks at."""
    attempts = [step for entry in recipe.steps for step in entry.attempts]
    read = {"evaluation", "holdout"}
    read |= {"calibration"} if any(step.uses_calibration for step in attempts) else set()
    read |= {"selection"} if any(step.uses_selection for step in attempts) else set()
    return read


def _attempts(entry: StepEntry, i: int) -> Iterator[tuple[tuple[str | int, ...], Step]]:
    """Each attempt with its path in the recipe, up to the step's name."""
    yield ("steps", i, entry.step.name), entry.step
    for j, step in enumerate(entry.otherwise):
        yield ("steps", i, "otherwise", j, step.name), step


def _shapes_after(entry: StepEntry, shapes: Sequence[Facts]) -> list[Facts]:
    """The facts that a model of any of these may have after a step that passed its checks: any attempt may be taken."""
    after: list[Facts] = []
    for before in shapes:
        for step in entry.attempts:
            left = step.facts_after(before)
            after += [left] if left not in after else []
    return after


def _encodings(step: Step, shapes: Sequence[Facts]) -> dict[str, Encoding]:
    """What the step stores on a model of any of these facts."""
    return {name: encoding for facts in shapes for name, encoding in step.encodings(facts).items()}


def _masked(step: Step, shapes: Sequence[Facts]) -> set[str]:
    """The tensors that may have a mask after the step, on a model of any of these facts."""
    return {name for facts in shapes for name in step.masked(facts)}


def _title(path: Sequence[str | int]) -> str:
    """("steps", 1, "otherwise", 0, "quantize.rtn") as `steps[1] otherwise[0] quantize.rtn`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f" {part}" for part in path).lstrip()


def _refusal(recipe: Recipe, path: Sequence[str | int], message: str) -> RecipeError:
    return RecipeError(f"{recipe.place(*path)}  {titled(_title(path), message)}")


def _check_step(recipe: Recipe, facts: Facts, path: tuple[str | int, ...], step: Step) -> None:
    """The step's own judgement, and group sizes that must divide the input channels."""
    if facts.labels and not step.classifiers:
        kind = facts.architecture.model_type
        known = ", ".join(name for name in plugin.names("step") if plugin.step(name).classifiers)
        raise _refusal(recipe, path, f"takes language models, and {kind} here tells classes apart; use {known}")
    if facts.paired and not step.takes_pairs:
        kind = facts.architecture.model_type
        known = ", ".join(name for name in plugin.names("step") if plugin.step(name).takes_pairs)
        message = f"takes models that go on with a text, and {kind} reads one and writes another; use {known}"
        raise _refusal(recipe, path, message)
    try:
        step.check(facts)
        if step.packs and not step.refines and not step.encodings(facts):
            raise RecipeError("stores no matrix in an encoding, so that nothing would change; leave the step out")
        for name, encodings in step.possible(facts).items():
            for encoding in encodings:
                encoding.groups(facts.matrices[name][1])
    except RecipeError as error:
        raise _refusal(recipe, path, str(error)) from None


def _check_order(
    recipe: Recipe, shapes: Sequence[Sequence[Facts]], i: int, path: tuple[str | int, ...], step: Step
) -> None:
    """Codes are final: nothing may train, prune or round them again. Masks and codes fix the shapes."""
    now = shapes[i]
    for k, earlier in enumerate(recipe.steps[:i]):
        holding = next((attempt for attempt in earlier.attempts if attempt.packs or _masked(attempt, shapes[k])), None)
        if step.reshapes and holding is not None:
            held = "stored the weights in an encoding" if holding.packs else "pruned single weights"
            message = f"changes shapes after steps[{k}] {holding.name} has {held}; move it before steps[{k}]"
            raise _refusal(recipe, path, message)
        rounding = next((a for a in earlier.attempts if a.cache() or any(a.inputs(facts) for facts in now)), None)
        if step.recovers and rounding is not None:
            message = f"trains after steps[{k}] {rounding.name} rounds what the model computes, which has no gradient"
            raise _refusal(recipe, path, f"{message}; move it before steps[{k}]")
        if rounding is not None and any(step.gradient_bytes(facts) for facts in now):
            message = f"takes gradients after steps[{k}] {rounding.name} rounds what the model computes, which has none"
            other = " or choose another criterion" if "criterion" in type(step).model_fields else ""
            raise _refusal(recipe, path, f"{message}; move it before steps[{k}]{other}")
        for pruning in earlier.attempts:
            _check_zeros(recipe, path, step, now, _masked(pruning, shapes[k]), f"steps[{k}] {pruning.name}")
        packing = next((attempt for attempt in earlier.attempts if attempt.packs), None)
        if packing is None:
            continue
        before = f"steps[{k}] {packing.name} has stored the weights in an encoding"
        # A step that both trains and packs knows how to train around codes.
        if step.recovers and not step.packs:
            raise _refusal(recipe, path, f"trains after {before}; move it before steps[{k}]")
        if step.masks:
            raise _refusal(recipe, path, f"prunes after {before}; move it before steps[{k}]")


def _check_zeros(
    recipe: Recipe, path: tuple[str | int, ...], step: Step, shapes: Sequence[Facts], masked: set[str], pruning: str
) -> None:
    """An encoding without a zero would resurrect the pruned weights of a masked tensor."""
    chosen = ((name, e) for facts in shapes for name, some in step.possible(facts).items() for e in some)
    for name, encoding in chosen:
        if name in masked and not encoding.holds_zero:
            message = f"{name}: {encoding} holds no zero, and {pruning} has pruned weights; use int4 or mxfp4"
            raise _refusal(recipe, path, message)


def _check_rounded_once(recipe: Recipe, shapes: Sequence[Sequence[Facts]]) -> None:
    """Tensors in codes cannot be rounded again."""
    coded: dict[str, int] = {}
    for i, entry in enumerate(recipe.steps):
        for path, step in _attempts(entry, i):
            twice = [name for name in _encodings(step, shapes[i]) if name in coded]
            if twice:
                first = f"stored as codes by steps[{coded[twice[0]]}] already"
                remedy = "leave them to one step (layers, keep: fp32, embeddings: null)"
                raise _refusal(recipe, path, f"{twice[0]} and {len(twice) - 1} more are {first}; {remedy}")
        for step in entry.attempts:
            coded |= {name: i for name, e in _encodings(step, shapes[i]).items() if e.is_coded}


def _check_cached_once(recipe: Recipe) -> None:
    """One type of keys and one of values are all that a cache has."""
    for i, entry in enumerate(recipe.steps):
        for path, step in _attempts(entry, i):
            earlier = (k for k, e in enumerate(recipe.steps[:i]) if any(attempt.cache() for attempt in e.attempts))
            if step.cache() and (k := next(earlier, None)) is not None:
                raise _refusal(recipe, path, f"steps[{k}] rounds keys and values already; leave one of the two out")


def _check_refined(recipe: Recipe, shapes: Sequence[Sequence[Facts]]) -> None:
    """What refines codes needs linears of the blocks with float16 scales, whichever attempts are accepted before it."""

    def refinable(step: Step, facts: Facts) -> bool:
        stored = step.encodings(facts)
        return any(f"{n}.weight" in stored and stored[f"{n}.weight"].has_float_scales for n in facts.linears)

    def stores(entry: StepEntry, shapes: Sequence[Facts]) -> bool:
        return all(refinable(step, facts) for step in entry.attempts for facts in shapes)

    for i, entry in enumerate(recipe.steps):
        stored = any(stores(*pair) for pair in zip(recipe.steps[:i], shapes))
        for path, step in _attempts(entry, i):
            if step.refines and not stored:
                message = "refines weights stored in codes, and no earlier step stores linears with float16 scales"
                raise _refusal(recipe, path, f"{message} in every attempt; quantize before it, to int4 for example")


def _check_margins(recipe: Recipe, i: int, entry: StepEntry) -> None:
    """A loss that a step may have and the release may not must be won back by a later step."""
    if any(step.recovers for later in recipe.steps[i + 1 :] for step in later.attempts):
        return
    release = {c.name: c for c in recipe.release}
    for c in entry.gate:
        final = release.get(c.name)
        # An exact quantity, a size, may still shrink; a parent's margin is another quantity after step 0.
        if final is None or c.statistic == "exact" or (c.against == "parent" and i > 0):
            continue
        if c.margin > final.margin:
            margins = f"its gate lets {c.name} lose {c.display(c.margin)}, release {c.display(final.margin)}"
            remedy = "tighten the gate, or add a step that trains after this one"
            message = f"{margins}, and no later step recovers quality; {remedy}"
            raise _refusal(recipe, ("steps", i, entry.step.name), message)


def _check_streaming(recipe: Recipe, facts: Facts) -> None:
    """What reads a model out of order, or holds all of it, has no place where one block is in memory."""
    if reason := facts.refuses_streaming:
        raise _refusal(recipe, ("streaming",), f"{reason}; leave it out")
    for i, entry in enumerate(recipe.steps):
        for path, step in _attempts(entry, i):
            if not step.streams:
                others = ", ".join(name for name in plugin.names("step") if plugin.step(name).streams)
                message = f"streaming: this step needs the whole model in memory; these do not: {others}"
                raise _refusal(recipe, path, message)
    for i, export in enumerate(recipe.export):
        if not export.exporter.streams:
            message = "streaming: this format is written from the whole model in memory; export to gguf"
            raise _refusal(recipe, ("export", i, export.exporter.name), message)
    for path, gate in _gates(recipe):
        if writing := next((c for c in gate if c.written and path[0] != "export"), None):
            message = f"streaming: {writing.name} writes token by token, and each would read every block from disk"
            raise _refusal(recipe, path, f"{message}; move it to the gate of an export")


def _check_measurements(recipe: Recipe, facts: Facts) -> None:
    for request in requests(recipe):
        if request.length > facts.context_length:
            problem = f"length={request.length} exceeds the model's context of {facts.context_length} tokens"
            place = recipe.place("data", request.role)
            raise RecipeError(f"{place}  data.{request.role}: {problem}")
        # Pairs are read whole, and text that nothing reads is never cut into windows.
        short = request.tokens is not None and request.tokens < request.length
        if short and not facts.paired and request.role in _read(recipe):
            problem = f"tokens={request.tokens} fill no window of length={request.length}; raise tokens or lower length"
            place = recipe.place("data", request.role, "tokens")
            raise RecipeError(f"{place}  data.{request.role}: {problem}")
    for path, gate in _gates(recipe):
        for c in gate:
            try:
                c.check()
                c.check_labels(facts.labels)
                require(c.takes_pairs, facts.paired)
            except RecipeError as error:
                raise _refusal(recipe, path, f"{c.name}: {error}") from None
            if c.timed and path[0] != "export":
                problem = "times artifacts in their runtimes, and this gate sees a model in torch"
                raise _refusal(recipe, path, f"{c.name}: {problem}; move it to the gate of an export")
            if c.window > facts.context_length:
                problem = f"windows of {c.window} tokens exceed the model's context of {facts.context_length} tokens"
                raise _refusal(recipe, path, f"{c.name}: {problem}")


def _gates(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], Sequence[Evaluator]]]:
    """Every gate with its path in the recipe."""
    yield ("release",), recipe.release
    yield from ((("steps", i), entry.gate) for i, entry in enumerate(recipe.steps))
    yield from ((("export", i), entry.gate) for i, entry in enumerate(recipe.export))


def _possible(recipe: Recipe, shapes: Sequence[Sequence[Facts]]) -> dict[str, dict[Encoding, str]]:
    """Tensor name → every encoding that it may end in, with the attempt that would store it."""
    found = {name: {Encoding("fp32"): "no step"} for facts in shapes[0] for name in facts.matrices}
    for i, entry in enumerate(recipe.steps):
        after: dict[str, dict[Encoding, str]] = {name: {} for name in found}
        for path, step in _attempts(entry, i):
            stored: dict[str, dict[Encoding, str]] = {}
            for facts in shapes[i]:
                for name, encodings in step.possible(facts).items():
                    stored.setdefault(name, {}).update(dict.fromkeys(encodings, _title(path)))
            for name, before in found.items():
                after[name].update(stored.get(name, before))
        found = after
    return {name: found[name] for facts in shapes[-1] for name in facts.matrices}


def _check_exports(recipe: Recipe, shapes: Sequence[Sequence[Facts]]) -> None:
    possible = _possible(recipe, shapes)
    for i, entry in enumerate(recipe.export):
        path = ("export", i, entry.exporter.name)
        try:
            for facts in shapes[-1]:
                entry.exporter.check(facts)
        except RecipeError as error:
            raise _refusal(recipe, path, str(error)) from None
        for name, encodings in possible.items():
            for encoding, origin in encodings.items():
                if reason := entry.exporter.refuses(encoding, name):
                    raise _refusal(recipe, path, f"{reason} (stored by {origin})")
        # Where a tensor may end in several encodings, some attempt's may go together: writing judges those.
        sure = {name: next(iter(found)) for name, found in possible.items() if len(found) == 1}
        if reason := entry.exporter.refuses_together(sure):
            raise _refusal(recipe, path, reason)
        for reason in _unrounded(recipe, shapes, entry.exporter):
            raise _refusal(recipe, path, reason)


def _unrounded(recipe: Recipe, shapes: Sequence[Sequence[Facts]], exporter: Exporter) -> Iterator[str]:
    """What some attempt lets the gated model round while it runs, and the exporter's runtime would not."""
    for i, entry in enumerate(recipe.steps):
        for path, step in _attempts(entry, i):
            if (cache := step.cache()) and (reason := exporter.refuses_cache(cache)):
                yield f"{reason} (by {_title(path)})"
            for facts in shapes[i]:
                stored = step.encodings(facts)
                for linear, rounding in step.inputs(facts).items():
                    if reason := exporter.refuses_inputs(rounding, stored[f"{linear}.weight"], linear):
                        yield f"{reason} (by {_title(path)})"


def _loosened(recipe: Recipe) -> Iterator[str]:
    """Exports whose own margins are wider than the release's, or that leave a release check out."""
    release = {c.name: c for c in recipe.release}
    for i, entry in enumerate(recipe.export):
        label = f"export[{i}] {entry.exporter.name}"
        for c in entry.gate:
            if c.name in release and c.statistic != "exact" and c.margin > release[c.name].margin:
                wider = f"{c.display(c.margin)}, release {c.display(release[c.name].margin)}"
                yield f"{label}: {c.name} may lose {wider}"
        yield from (f"{label}: {name} is off" for name in entry.gate_off)


def _ungated(recipe: Recipe) -> Iterator[str]:
    for i, entry in enumerate(recipe.steps):
        label = f"steps[{i}] {entry.step.name}"
        yield from (f"{label}: {name} is off" for name in entry.gate_off)
        if not entry.gate:
            yield f"{label}: no check judges this step alone, and its alternatives can never be tried"
