"""Programming problems with unit tests: the layouts of HumanEval and MBPP, prompts, and the program that is judged."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.errors import RecipeError
from evaluators import _rows

_WANTED = (
    'expected a JSON object in the layout of HumanEval (texts "prompt", "test", "entry_point") or of MBPP (a text '
    '"text" and a list "test_list")'
)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """What is asked, and how an answer is judged.

    prompt: a beginning of Python that a model continues. stub: what of it belongs into the program. setup and tests
    stand before and after; tests raise where the program is wrong. until: texts that end a continuation.
    """

    prompt: str
    stub: str
    setup: str
    tests: str
    until: tuple[str, ...]

    @property
    def message(self) -> str:
        """The same for a model that answers messages."""
        return f"Complete this Python code. Answer with the complete code in one block.\n\n```python\n{self.prompt}```"

    def program(self, answer: str, until: Sequence[str] | None) -> str:
        """What is run of a continuation, cut at the first of `until` (None: the layout's own)."""
        ends = [at for at in map(answer.find, self.until if until is None else until) if at >= 0]
        return self._judged(self.stub + answer[: min(ends, default=len(answer))])

    def program_of_message(self, answer: str) -> str:
        """What is run of an answer to `message`: its first block of code, or all of it where there is none.

        The stub stands before: it may import what the answer takes for granted, and the answer replaces its function.
        """
        block = _FENCE.search(answer)
        return self._judged(f"{self.stub}\n{block[1] if block else answer}")

    def _judged(self, code: str) -> str:
        return f"{self.setup}\n{code}\n{self.tests}\n"

    def to_json(self) -> str:
        """As a document's text."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """The inverse."""
        fields = json.loads(text)
        return cls(**{**fields, "until": tuple(fields["until"])})


def read(path: Path) -> dict[str, str]:
    """Id → problem as JSON, row by row; raises RecipeError with file and line."""
    found: dict[str, str] = {}
    prompts: dict[str, str] = {}
    for where, name, row in _rows.rows(path, _WANTED, key="task_id"):
        problem = _humaneval(where, row) if "entry_point" in row else _mbpp(where, row)
        _rows.once(where, problem.prompt, prompts, "prompt", "examples must be different")
        found[name] = problem.to_json()
    return found


def _humaneval(where: str, row: dict[str, Any]) -> Problem:
    prompt, test, entry = (_text(where, row, field) for field in ("prompt", "test", "entry_point"))
    if not entry.isidentifier():
        raise RecipeError(f"{where}: entry_point {entry!r} is no name of a function")
    if not re.search(r"^def check\(", test, re.MULTILINE):
        raise RecipeError(f"{where}: test defines no function `check`; without it nothing would be tested")
    # A continuation ends where the function does: Chen et al. 2021, arXiv:2107.03374, section 2.1.
    until = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    return Problem(prompt, prompt, "", f"{test}\ncheck({entry})", until)


def _mbpp(where: str, row: dict[str, Any]) -> Problem:
    text, tests = _text(where, row, "text"), row.get("test_list")
    if not (isinstance(tests, list) and tests and all(isinstance(t, str) and t.strip() for t in tests)):
        raise RecipeError(f"{where}: {_WANTED}; test_list is empty, or holds what is no text")
    setup = row.get("test_setup_code", "")
    if not isinstance(setup, str):
        raise RecipeError(f"{where}: test_setup_code is no text")
    asked = "\n".join([text, *tests]).replace('"""', "'''")  # the prompt is one docstring
    return Problem(
        f'"""\n{asked}\n"""\n', "", setup, "\n".join(tests), ("\nassert", '\n"""', "\nprint", "\nif __name__")
    )


def _text(where: str, row: dict[str, Any], field: str) -> str:
    found = row.get(field)
    if not isinstance(found, str) or not found.strip():
        raise RecipeError(f"{where}: {_WANTED}, none of them empty; found {field}={str(found)[:40]!r}")
    return found
