"""Code: how many fewer programs that the model writes pass their unit tests."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar, get_args

from pydantic import Field, model_validator

from compress.interfaces import Documents, Example, LanguageModel, Sample, Score
from compress.numerics.sampling import Pick, greedy, gumbel
from evaluators import _problems, _rows, _samples, _sandbox
from evaluators._answers import check_room, ids, nats_per_token
from evaluators._fields import Drop

SHOWN = 6


class Code(Drop):
    """Points of pass@k lost on your own programming problems with unit tests; needs --allow-code-execution.

    Problems are JSON lines in the layout of HumanEval or MBPP. Programs run in a sandbox of Landlock, seccomp and
    resource limits, without network, files and processes; where it cannot be established, nothing is run.
    """

    name: ClassVar[str] = "code"
    definition: ClassVar[str] = (
        "mean over problems of pass@k, the probability that one of k programs that the model writes passes the unit "
        "tests, estimated without bias from `programs` programs each; the loss is the paired mean fall; exact at every "
        "look."
    )

    data: str  # file:PATH, JSON lines in the layout of HumanEval or MBPP
    k: int = Field(1, ge=1)
    programs: int = Field(1, ge=1, le=1000)  # written per problem
    temperature: float = Field(0.0, ge=0, le=10, allow_inf_nan=False)  # 0: greedy
    chat: bool = False  # through the model's chat template, taking the first block of code of its answer
    until: tuple[str, ...] | None = Field(None, strict=False)  # texts that end a continuation; by default the layout's
    max_new_tokens: int = Field(256, ge=1, le=4096)
    seconds: int = Field(_sandbox.SECONDS, ge=1, le=600)  # of processor time per program
    memory_mb: int = Field(_sandbox.MEBIBYTES, ge=64, le=65536)  # MiB of addresses per program

    @model_validator(mode="after")
    def _sensible(self) -> Code:
        _rows.check_source(self.data)
        if self.k > self.programs:
            raise ValueError(f"k={self.k} programs cannot be drawn of programs={self.programs}; raise programs")
        if self.programs > 1 and self.temperature == 0:
            raise ValueError(f"temperature=0 writes the same program {self.programs} times; use e.g. temperature: 0.8")
        if self.until is not None and (self.chat or not all(self.until)):
            raise ValueError("until ends continuations, not messages (chat), and holds no empty text")
        return self

    def check(self) -> None:
        """Refuse without permission, or where there is no sandbox."""
        _sandbox.require()

    @property
    def written(self) -> int:
        """Tokens of all programs of a problem."""
        return self.programs * self.max_new_tokens

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """The problems of the file, in a random order, whatever the evaluation data."""
        found = _problems.read(_rows.path_of(self.data))
        return [_rows.documents(f"{self.data} by pass@{self.k}", found)]

    def reads(self) -> str:
        """The file, and the Python that runs the programs."""
        return f"{_rows.digest(self.data)} {_sandbox.version()}"

    def encoder(self, model: LanguageModel) -> Callable[[str], list[int]]:
        """As a message to answer, or as it stands."""
        return model.encode_chat if self.chat else model.encode

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per problem; its payload is the prompt's tokens and the problem."""
        found = []
        for name, text in data.documents:
            problem = _problems.Problem.from_json(text)
            asked = problem.message if self.chat else problem.prompt
            found.append(Example(name, name, (tuple(encode(asked)), text)))
        return found

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """1 − pass@k. NaN where the model's logits are not finite.

        positions: the tokens of the first program. extra: how the programs ended, and nats per token that the model
        gives the first one, in which different weights differ even where their programs do not.
        """
        check_room(model, [example.payload[0] for example in batch], self.max_new_tokens)
        return [self._score(model, example) for example in batch]

    def _score(self, model: LanguageModel, example: Example) -> Score:
        prompt, problem = example.payload[0], _problems.Problem.from_json(example.payload[1])
        picks = [self._pick(example, i) for i in range(self.programs)]
        answers = [tuple(model.generate(prompt, self.max_new_tokens, pick)) for pick in picks]
        (nats,) = nats_per_token(model, [prompt], answers[:1])
        programs = Counter(self._program(model, problem, prompt, answer) for answer in answers)
        ends: Counter[str] = Counter(dict.fromkeys(get_args(_sandbox.Outcome), 0))
        for program, count in programs.items():
            ends[_sandbox.run(program, self.seconds, self.memory_mb)] += count
        missing = 1 - pass_at_k(self.programs, ends["passed"], self.k) if math.isfinite(nats) else math.nan
        extra = {"nats": nats, **{end: float(count) for end, count in ends.items()}}
        return Score(example.id, missing, 1.0, extra, tuple(map(float, answers[0])))

    def _pick(self, example: Example, sample: int) -> Pick:
        """Both models draw the same noise for the same program."""
        if self.temperature == 0:
            return greedy
        seed = hashlib.sha256(f"{example.id} {sample}".encode()).digest()
        return gumbel(self.temperature, int.from_bytes(seed[:8]))

    def _program(
        self, model: LanguageModel, problem: _problems.Problem, prompt: Sequence[int], answer: Sequence[int]
    ) -> str:
        written = answer[:-1] if answer[-1] in model.eos_ids else answer
        # Decoded together: some tokenizers drop the blank that a text begins with, which is indentation here.
        text = model.decode([*prompt, *written])[len(model.decode(prompt)) :]
        return problem.program_of_message(text) if self.chat else problem.program(text, self.until)

    def doubt(self, scores: Sequence[Score], reference: Sequence[Score]) -> str:
        """A reference that solves little leaves no room for a loss beyond the margin."""
        return self.earned(reference)

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Problems solved less and more often than by the reference, and how programs ended."""
        found: dict[str, float] = {}
        if reference:
            pairs = list(zip(reference, scores))
            found["solved less often"] = float(sum(new.total > old.total for old, new in pairs))
            found["solved more often"] = float(sum(new.total < old.total for old, new in pairs))
        for end in get_args(_sandbox.Outcome):
            found[f"programs: {end}"] = sum(s.extra[end] for s in scores)
        return found

    def samples(
        self,
        examples: Sequence[Example],
        new: Sequence[Score],
        old: Sequence[Score],
        decode: Callable[[Sequence[int]], str],
    ) -> list[Sample]:
        """The first programs of the problems that lost most, and then of the first of those that are left."""
        return [
            Sample(e.id, decode(e.payload[0]), decode(ids(theirs)), decode(ids(ours)), self._note(theirs, ours))
            for e, theirs, ours in _samples.most_changed(examples, new, old, SHOWN)
        ]

    def _note(self, old: Score, new: Score) -> str:
        return f"{old.extra['passed']:.0f} to {new.extra['passed']:.0f} of {self.programs} pass"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that at least one of k programs passes, drawn from `samples` of which `passed` did; unbiased.

    1 − C(n−c, k) / C(n, k), k ≤ n. Chen et al. 2021, arXiv:2107.03374, equation 1.

    >>> pass_at_k(samples=4, passed=1, k=2), pass_at_k(4, 0, 2), pass_at_k(4, 3, 2)
    (0.5, 0.0, 1.0)
    """
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
