"""The fields of steps that learn what the baseline says, and how they get hold of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.architectures import Facts
    from compress.model import Model
    from compress.steps.distill._lessons import Lesson
    from compress.steps.distill._training import Outcome, Ruler

# Starting points from a few short runs on a 135M model, 30 % pruned; not the result of a search.
LEARNING_RATES = {"norms": 4e-4, "lora": 3e-4, "blocks": 3e-4, "all": 2e-5}


class Distillation(Step):
    """Training for a fixed number of tokens on what the baseline says, and keeping the best of a few states.

    teacher: who says it instead: whatever a recipe's `model` may name, of the same tokenizer. KL is to that one, then.
    The data are the calibration windows in a seeded random order, over and over until `tokens` are read. batch:
    windows per optimizer step, whose gradients are accumulated one window at a time. KL to the baseline is measured on
    the first `selection_tokens` of the selection data before training and `checks` times along it; with `patience`,
    training ends after so many checks in a row without a new best. moments: how Adam keeps its two moments.
    gradient_checkpointing: keep the inputs of blocks only, and compute their insides again for the gradients. A
    killed run goes on from its last checkpoint, written every `save_steps` optimizer steps.
    """

    recovers: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True
    uses_selection: ClassVar[bool] = True

    teacher: str | None = Field(None, min_length=1)
    tokens: int = Field(65536, ge=2)
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch: int = Field(4, ge=1)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    selection_tokens: int = Field(8192, ge=2)
    checks: int = Field(4, ge=1)
    patience: int | None = Field(None, ge=1)
    moments: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    save_steps: int = Field(20, ge=1)

    def check(self, facts: Facts) -> None:
        """Refuse, before weights load, a teacher that is not there or has another vocabulary."""
        from compress import source

        if self.teacher is not None and (found := source.resolve(self.teacher)).path is not None:
            self._refuse_vocabulary(source.facts(found).vocabulary, facts.vocabulary)

    def reads(self) -> str:
        """Digest of the teacher's files."""
        from compress import source

        return source.digest(source.download(source.resolve(self.teacher))) if self.teacher else ""

    def opened(self, model: Model, context: Context) -> Model:
        """The teacher; raises RecipeError where it, or data, is missing or does not fit the student."""
        from compress import source

        if context.teacher is None or not context.calibration or not context.selection:
            raise RecipeError(f"{self.name} needs a baseline, data.calibration and data.selection")
        if self.teacher is None:
            teacher = context.teacher()
            self._refuse_vocabulary(teacher.vocabulary_size, model.vocabulary_size)
            return teacher
        teacher = source.load(self.teacher)
        self._refuse_vocabulary(teacher.vocabulary_size, model.vocabulary_size)
        if teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise RecipeError(
                f"{self.name}: teacher {self.teacher} has other tokens than the model, so that what it says of the "
                "next one means nothing here; give one of the same tokenizer"
            )
        return teacher

    def dismiss(self, teacher: Model, context: Context) -> None:
        """Release the memory of a teacher that has said all."""
        if self.teacher is None:
            context.dismiss()
        else:
            teacher.close()

    def _refuse_vocabulary(self, theirs: int, ours: int) -> None:
        if theirs != ours:
            raise RecipeError(
                f"{self.name}: the teacher has {theirs} tokens, the model {ours}; distillation on logits needs the "
                "same vocabulary"
            )


class WeightDistillation(Distillation):
    """Distillation that trains weights of the model.

    train: `norms` (the gains of the residual stream), `lora` (adapters of rank `lora_rank` on the blocks' linears,
    merged afterwards), `blocks` (every weight but those of the embeddings and the head, whose rare tokens a few steps
    would only shake) or `all`. learning_rate: the peak, by default chosen for `train`. The best of the states measured
    is kept, the starting one included. Masked weights stay zero. Matrix products run in bfloat16, or in float32 where
    the processor multiplies no bfloat16, losses and updates in float32 (Adam, linear warm-up over a tenth of the steps,
    cosine decay, gradients clipped to `clip`).
    """

    train: Literal["all", "blocks", "norms", "lora"] = "norms"
    lora_rank: int = Field(16, ge=1)

    def check(self, facts: Facts) -> None:
        """Refuse a LoRA recipe before weights load where peft is not installed."""
        import importlib.util

        super().check(facts)
        if self.train == "lora" and importlib.util.find_spec("peft") is None:
            raise RecipeError(f"{self.name}: train=lora needs peft: pip install 'compress-toolkit[distill]'")

    def fit(
        self,
        model: Model,
        context: Context,
        lesson: Lesson,
        ruler: Ruler,
        batches: Sequence[Sequence[Tensor]],
        beside: Mapping[str, nn.Parameter] | None = None,
        beside_rate: float = 0.0,
    ) -> Outcome:
        """Train the model in place; on any error its weights are as they were.

        beside: parameters of the lesson's own that learn along, at the peak rate `beside_rate`.
        """
        from compress.steps.distill import _network as net
        from compress.steps.distill._checkpoints import workplace
        from compress.steps.distill._training import Learner, learn

        with ExitStack() as stack:
            folder = stack.enter_context(workplace(context))
            training = net.training(model, self.train, self.lora_rank, context.seed, folder)
            parameters = stack.enter_context(training)
            student = net.Network(model.module, learns=True)
            if self.gradient_checkpointing:
                stack.enter_context(net.recomputing(model, student))
            rates = dict.fromkeys(parameters, self.learning_rate or LEARNING_RATES[self.train])
            rates |= dict.fromkeys(beside or {}, beside_rate)
            learner = Learner(student, {**parameters, **(beside or {})}, rates, model.masks)
            return learn(self, learner, lesson, ruler, batches, context, folder)


class Generation(WeightDistillation):
    """Distillation on sequences that a model writes: prompts are the first `prompt_tokens` of calibration windows.

    new_tokens: written after each, at most; an end of text ends a sequence. sampling_temperature: of the choice of
    each token; at 0 it is the likeliest.
    """

    prompt_tokens: int = Field(32, ge=1)
    new_tokens: int = Field(96, ge=1)
    sampling_temperature: float = Field(1.0, ge=0, allow_inf_nan=False)

    def check(self, facts: Facts) -> None:
        """Refuse sequences that the model cannot hold, or that leave no token to learn from."""
        super().check(facts)
        length = self.prompt_tokens + self.new_tokens
        if length > facts.context_length:
            raise RecipeError(
                f"{self.name}: prompt_tokens={self.prompt_tokens} and new_tokens={self.new_tokens} make {length}, "
                f"and the model holds {facts.context_length} tokens; shorten one of them"
            )
        if self.tokens <= self.prompt_tokens:
            raise RecipeError(
                f"{self.name}: tokens={self.tokens} are used up by one prompt of {self.prompt_tokens}; raise tokens"
            )

    def prompts(self, context: Context) -> list[Tensor]:
        """The beginnings of calibration windows; raises RecipeError where none is long enough."""
        found = [w[: self.prompt_tokens] for w in context.calibration if len(w) >= self.prompt_tokens]
        if not found:
            raise RecipeError(
                f"{self.name}: none of {len(context.calibration)} calibration windows has prompt_tokens="
                f"{self.prompt_tokens} tokens; lower prompt_tokens or raise the length of data.calibration"
            )
        return found
