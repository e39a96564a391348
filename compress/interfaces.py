"""What the parts of `compress` promise one another: language models, steps, evaluators and exporters.

A plug-in is one class in one file; its pydantic fields *are* its YAML. Importing a plug-in must not import
torch, so that recipes are validated, and cached runs answered, without it: heavy imports stand inside methods.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import RecipeError
from compress.numerics.sampling import Pick, greedy

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architectures import Facts
    from compress.encodings import EncodedTensor, Encoding
    from compress.model import Model
    from compress.rounding import CacheRounding, InputRounding

P_VALUE = "p of no change (exact McNemar)"
"""Among the details of a check: the p-value of a fixed sample, which a gate corrects for the number of its checks."""
P_REGRESSION = "p of no regression (at every look)"
"""The same, valid although the gate stops when it likes: what `Evaluator.forbids_any_loss` is decided by."""

Aspect = Literal["quality", "safety", "robustness", "efficiency"]
"""What a metric says about a model; a scorecard has a part for each, and never sums them up."""

Progress = Callable[[str, float], None]
"""Called with a label and the finished fraction in [0, 1]."""


class LanguageModel(Protocol):
    """A causal language model in whatever runtime executes it: torch, llama.cpp or onnxruntime."""

    @property
    def digest(self) -> str:
        """sha256 of what is executed: weights and config."""

    @property
    def runtime(self) -> str:
        """Runtime, version and what else decides its numbers, e.g. "llama.cpp (llama-cpp-python 0.3.36)"."""

    @property
    def compute(self) -> str:
        """Weight dtype and activation precision, e.g. "int4 g32 weights, int8 activations"."""

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""

    @property
    def context_length(self) -> int:
        """Longest window."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a generation."""

    @property
    def bos_id(self) -> int | None:
        """The id that begins a sequence, or None where the tokenizer has none; `encode` does not add it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as this runtime tokenizes it, without special tokens added."""

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of a user's message in the chat template that ships with the model, up to the answer.

        The plain text's where it ships none. Raises Corrupt or RecipeError where the template cannot be rendered.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written out; bytes that are no UTF-8 become U+FFFD."""

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """One float32 tensor (len(window), vocabulary) per window, in order; row t predicts token t + 1.

        Consume each before asking for the next: implementations may re-use memory. Of pairs fewer: `compress.pairs`.
        """

    def decode_logits(self, window: Sequence[int]) -> Tensor:
        """The same as `logits` for one window, computed token by token through the key-value cache."""

    def generate(self, prompt: Sequence[int], max_new_tokens: int, pick: Pick = greedy) -> list[int]:
        """Continuation of the prompt, up to and including the first end-of-sequence token.

        pick: called with the logits (vocabulary,) float32 of each new token, of torch or numpy; greedy by default.
        """

    def close(self) -> None:
        """Release the runtime's memory."""


@runtime_checkable
class Streaming(Protocol):
    """A language model that can be timed token by token; `compress bench` asks for it.

    An object that also has `load_seconds` says how long the runtime itself took to load the weights, checks aside.
    """

    def stream(self, window: Sequence[int], prefill: int) -> Iterator[Tensor]:
        """Logits, (vocabulary,) each, after the first `prefill` tokens were read at once, and after each further one.

        What a generation computes, on given tokens: one pass over a prompt, then single tokens through the cache.
        """


@runtime_checkable
class Inspectable(Protocol):
    """A language model that shows what its norms compute; asked for only where an artifact differs from its model."""

    def norm_outputs(self, norms: Sequence[str], window: Sequence[int]) -> Sequence[Tensor]:
        """Output of each norm, by its module's name, on one window: (len(window), width) float32 each."""


class Plugin(BaseModel):
    """Base of every plug-in: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str]
    version: ClassVar[int] = 1  # raised when results change: it is part of every cache key

    def reads(self) -> str:
        """Digest of what it reads besides the models and data at hand: a part of every cache key. Empty for nothing."""
        return ""


@dataclass(frozen=True)
class Context:
    """What a step may use besides the model.

    calibration, selection: windows of token ids, each (length,) int64. dataset: names the calibration in files; empty
    where nobody did. teacher opens the recipe's baseline, dismiss releases its memory; asked again, it opens anew.
    work: for unfinished work; it outlives a killed process, and the same step finds it again on the same inputs.
    """

    seed: int
    calibration: Sequence[Tensor] = ()
    selection: Sequence[Tensor] = ()
    teacher: Callable[[], Model] | None = None
    dismiss: Callable[[], None] = lambda: None
    progress: Progress = lambda label, fraction: None
    work: Path | None = None
    notes: list[str] = field(default_factory=list)  # what the report must say about this step
    dataset: str = ""


class Step(Plugin, ABC):
    """One compression method. `apply` changes the model in place."""

    recovers: ClassVar[bool] = False  # can win back quality that an earlier step lost
    packs: ClassVar[bool] = False  # stores weights in an encoding: nothing may train them afterwards
    masks: ClassVar[bool] = False  # leaves masks that later steps must keep
    refines: ClassVar[bool] = False  # changes what an earlier step has stored in codes, and can do nothing without
    reshapes: ClassVar[bool] = False  # leaves smaller tensors: no mask or code may stand for the old ones
    streams: ClassVar[bool] = False  # takes block by block, each once, so that a model larger than memory will do
    classifiers: ClassVar[bool] = False  # takes models with a classification head, too
    takes_pairs: ClassVar[bool] = False  # takes models that read one text and write another, too
    twins: ClassVar[bool] = False  # keeps a copy of the model as it was; where fields decide, a property
    uses_calibration: ClassVar[bool] = False  # where fields decide, a property
    uses_selection: ClassVar[bool] = False

    def check(self, facts: Facts) -> None:
        """Refuse, before weights load, what cannot work on this model; raises RecipeError."""

    def encodings(self, facts: Facts) -> Mapping[str, Encoding]:
        """Encoding per tensor name that this step will store, as far as shapes tell; empty if it packs none."""
        return {}

    def possible(self, facts: Facts) -> Mapping[str, Sequence[Encoding]]:
        """Every encoding that a tensor may end in, where weights decide; by default what `encodings` says."""
        return {name: [encoding] for name, encoding in self.encodings(facts).items()}

    def masked(self, facts: Facts) -> set[str]:
        """Names of the tensors that may have a mask once a step that `masks` is done; by default every linear's."""
        return {f"{name}.weight" for name in facts.linears} if self.masks else set()

    def inputs(self, facts: Facts) -> Mapping[str, InputRounding]:
        """How the inputs of linears will be rounded in every forward pass, by name; empty for most steps."""
        return {}

    def cache(self) -> CacheRounding | None:
        """How keys and values will be rounded in every forward pass; None for most steps."""
        return None

    def gradient_bytes(self, facts: Facts) -> int:
        """What a step that trains nothing keeps of the loss's gradients; 0 for most, which take none."""
        return 0

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """Second moments between input channels that are held at once: reader → channels; mostly none."""
        return {}

    def solved(self, facts: Facts) -> Mapping[str, int]:
        """Inputs that weights are fitted to, of which more tokens are needed than channels; by default `hessians`."""
        return self.hessians(facts)

    def tokens_read(self, tokens: float) -> float:
        """Of so many calibration tokens, with those that the step adds to them."""
        return tokens

    def state_bytes(self, facts: Facts, tokens: float) -> float:
        """What is held at once of so many calibration tokens: by default the states that enter a block and leave it."""
        copies = 3.3 if self.uses_calibration and not self.recovers else 0.0  # 2.8 to 3.3 measured: some lies free
        return copies * 4 * facts.sizes["residual"] * self.tokens_read(tokens)

    def facts_after(self, facts: Facts) -> Facts:
        """What will be known of the model once this step has changed its shapes."""
        return facts

    @abstractmethod
    def apply(self, model: Model, context: Context) -> None:
        """Compress the model in place; raises NumericalError naming the layer on non-finite numbers."""


@dataclass(frozen=True)
class Example:
    """One unit of evaluation. Units of one cluster are not independent of each other."""

    id: str
    cluster: str
    payload: Any


@dataclass(frozen=True)
class Score:
    """An example's measured total over `weight` scored positions, with further totals by name."""

    id: str
    total: float
    weight: float
    extra: Mapping[str, float] = field(default_factory=dict)
    positions: Sequence[float] = ()  # the value per scored position, where percentiles over them are reported


@dataclass(frozen=True)
class Sample:
    """An example worth showing to people: what was asked, and what the reference and the model answer."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # it is a part of run.json, too

    id: str
    prompt: str
    reference: str
    model: str
    note: str = ""  # what makes it worth showing, e.g. "right to wrong"


@dataclass(frozen=True)
class Documents:
    """One evaluation source: its name, its documents in gate order as (id, text), and its digest."""

    source: str
    documents: Sequence[tuple[str, str]]
    digest: str
    length: int = 512  # tokens per window


class Evaluator(Plugin, ABC):
    """A measurement that a gate can check; the fields are the check's YAML.

    `statistic` names the decision rule: "mean" (paired asymptotic confidence sequence over
    sum(loss) - margin * weight per cluster), "betting" (exact sequence over the mean loss of each cluster,
    which lies in [-1, 1]), "census" (a fixed set, read whole, that stands for nothing else: its loss is known
    without error) or "exact" (a deterministic quantity of the files, compared directly).
    """

    against: Literal["baseline", "parent"] = "baseline"
    confidence: float = Field(0.95, gt=0.5, lt=1.0, allow_inf_nan=False)
    max_documents: int | None = Field(None, ge=1)

    unit: ClassVar[str]  # of the additive loss, e.g. "nats per token"
    definition: ClassVar[str]  # one sentence, printed in reports
    statistic: ClassVar[Literal["mean", "betting", "census", "exact"]] = "mean"
    minimum_examples: ClassVar[int] = 50  # clusters, where examples share one
    aspect: ClassVar[Aspect] = "quality"  # of a scorecard, where what it measures is listed
    timed: ClassVar[bool] = False  # depends on the clock: it judges exports alone, and no artifact carries its figures
    whole: ClassVar[bool] = False  # weighs documents: their windows have no score of their own
    relative: ClassVar[bool] = False  # score() needs the reference model too (divergences)
    classifiers: ClassVar[bool] = False  # can be asked of a model with a classification head, see `compress.labels`
    takes_pairs: ClassVar[bool] = False  # can be asked of one that writes a target given a source: `compress.pairs`
    margin_fields: ClassVar[frozenset[str]] = frozenset()  # fields that move the margin but no score
    # What the loss is, so that one can be planted without asking `score`: the mean increase of −ln p(token),
    # the mean KL(reference‖model), or the share of clusters answered wrong (a payload holds the tokens of each
    # choice, the right one first). Windows are those of `Documents.length`, every token but the first scored.
    planted: ClassVar[Literal["nll", "kl", "answers"] | None] = None

    def check(self) -> None:
        """Refuse, before weights load, what cannot work here or was not permitted; raises RecipeError."""

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuse what cannot be asked of a model that tells these classes apart (none: of text); raises RecipeError."""
        if labels and not self.classifiers:
            raise RecipeError("is for models of text, and this one tells classes apart; use classification")

    @property
    @abstractmethod
    def margin(self) -> float:
        """Largest loss that passes, in the additive unit per unit of weight."""

    @property
    def plausible_gain(self) -> float:
        """Largest gain over the baseline that passes without question, as a negative loss; infinite by default.

        Compression adds no knowledge: a larger gain, once proven, has another cause that somebody must look at.
        """
        return math.inf

    @property
    def forbids_any_loss(self) -> bool:
        """Whether a proven loss fails it on any source, however small, corrected for their number; "betting" only."""
        return False

    @property
    def window(self) -> int:
        """Tokens of the longest window that it makes itself; 0 where the data set their length."""
        return 0

    @property
    def written(self) -> int:
        """Most tokens that it lets a model write per document; 0 where models only read."""
        return 0

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """What is looked at, source by source: the evaluation sources, or items made from or beside them."""
        return list(datasets)

    def foreseen(self, datasets: Sequence[Documents]) -> list[Documents | str]:
        """`sources` as far as they are known without network; the name of one whose documents are not."""
        return [*self.sources(datasets)]

    def untestable(self, data: Documents) -> str:
        """Why no loss can be planted in one of its sources, or an empty text."""
        return "" if self.planted else "no loss is known that could be planted for this metric"

    def choices(self, example: Example) -> Sequence[Sequence[int]]:
        """Where `planted` is "answers": tokens of the choices, the right one first; see `compress.planting`."""
        choices: Sequence[Sequence[int]] = example.payload
        return choices

    def comparable(
        self, data: Documents, reference: Callable[[Documents], list[Score]]
    ) -> tuple[Documents, dict[str, float]]:
        """The part of a source on which losses against the reference mean something, and figures that say why.

        reference: scores of the reference model on a part of `data`. Whatever it was asked for must not be in
        the part returned, lest the choice bias the comparison. Raises GateInconclusive where nothing remains.
        """
        return data, {}

    def encoder(self, model: LanguageModel) -> Callable[[str], list[int]]:
        """How the model turns a document into tokens: as it stands, or as a message to answer."""
        return model.encode

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """The examples of one source, in the given order; called with consecutive slices of its documents.

        encode: see `encoder`. Raises GateInconclusive where the data cannot give what is to be looked at.
        """
        raise TypeError(f"{self.name} looks at no documents")

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """Scores of a batch, in its order. The loss of an example is its total minus the reference's total;
        a `relative` evaluator is given the reference and returns the loss itself; a census is given it to judge
        what the model writes, and judges the reference's own scores without. Raises GateInconclusive where the
        model cannot be asked.
        """  # noqa: D205
        raise TypeError(f"{self.name} scores no examples")

    def measure(self, size_bytes: int, bits_per_weight: float) -> float:
        """The quantity of an "exact" evaluator, from the real files of the model."""
        raise TypeError(f"{self.name} is not an exact measurement")

    def display(self, loss: float) -> str:
        """A loss per unit of weight as a reader wants it, e.g. "+3.2 % perplexity"."""
        return f"{loss:+.4f} {self.unit}"

    def value(self, scores: Sequence[Score]) -> float:
        """The metric itself over scores of one model, e.g. perplexity; the mean per unit of weight by default."""
        return sum(s.total for s in scores) / sum(s.weight for s in scores)

    def doubt(self, scores: Sequence[Score], reference: Sequence[Score]) -> str:
        """Why a loss within the margin would prove nothing on these scores, or an empty text."""
        return ""

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Further figures for the report, by name. reference: its scores of the same examples, if it has any."""
        return {}

    def samples(
        self,
        examples: Sequence[Example],
        new: Sequence[Score],
        old: Sequence[Score],
        decode: Callable[[Sequence[int]], str],
    ) -> list[Sample]:
        """At most some 8 examples worth showing, with the answers of the reference and of the model.

        new, old: scores of the model and of its reference, in the examples' order; those of the reference may
        come from a cache, and there are none where the evaluator is `relative`. decode: token ids → text.
        """
        return []


class Exporter(Plugin, ABC):
    """A file format with its runtime."""

    runtime: ClassVar[str]
    extra: ClassVar[str]  # the optional dependency group that provides the runtime
    streams: ClassVar[bool] = False  # writes tensor by tensor, so that a model larger than memory will do
    # For the model card: runtime → the line that loads the artifact; "{file}" stands for its largest file.
    usage: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def refuses(self, encoding: Encoding, tensor: str) -> str | None:
        """Why this format cannot hold the tensor's encoding exactly, or None."""

    def refuses_inputs(self, rounding: InputRounding, encoding: Encoding, linear: str) -> str | None:
        """Why the runtime does not round the inputs of a linear, held in `encoding`, in this way; None where it does.

        Models whose inputs are not rounded are never asked about.
        """
        return f"{linear}: {self.runtime} would not round its inputs ({rounding}) as the gated model does"

    def refuses_cache(self, rounding: CacheRounding) -> str | None:
        """Why the runtime keeps no key-value cache of these codes, or None where it does."""
        return f"{self.runtime} would keep keys and values in floats, and the gated model has a {rounding}"

    def stored_inputs(self, path: Path) -> Mapping[str, InputRounding] | None:
        """The rounding of inputs, read back from the files; None where the runtime rounds without being told."""
        return {}

    def stored_cache(self, path: Path) -> CacheRounding | None:
        """The types of the key-value cache that the files ask for; None for floats."""
        return None

    def usage_of(self, cache: CacheRounding | None = None, paired: bool = False) -> Mapping[str, str]:
        """`usage` as far as these fields allow it. cache: of the model, where rounded; paired: if it takes pairs."""
        return self.usage

    def refuses_together(self, encodings: Mapping[str, Encoding]) -> str | None:
        """Why this format cannot hold tensors in these encodings, by name, in one model, or None."""
        return None

    def check(self, facts: Facts) -> None:
        """Refuse, before weights load, an architecture this exporter cannot write; raises RecipeError."""

    @abstractmethod
    def write(self, model: Model, out: Path) -> None:
        """Write the model's very codes, scales and floats into the empty folder `out`."""

    @abstractmethod
    def open(self, path: Path) -> LanguageModel:
        """Open what `write` wrote in the runtime that will execute it, at the shipped settings."""

    @abstractmethod
    def stored(self, path: Path) -> Iterator[tuple[str, EncodedTensor | Tensor]]:
        """Every tensor read back from the files, under the model's own names and in its own layout."""
