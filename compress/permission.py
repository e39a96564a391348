"""What only the user may permit, for one call: no recipe, no file and no variable of the environment can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from compress.errors import RecipeError

_CODE_EXECUTION = ContextVar("code_execution", default=False)


@contextmanager
def code_execution(allowed: bool = True) -> Iterator[None]:
    """Within it, evaluators may run programs that a model wrote, in their sandbox."""
    token = _CODE_EXECUTION.set(allowed)
    try:
        yield
    finally:
        _CODE_EXECUTION.reset(token)


def require_code_execution() -> None:
    """Raises RecipeError with the remedy where running programs was not permitted."""
    if not _CODE_EXECUTION.get():
        raise RecipeError(
            "runs programs that the model writes, in a sandbox, which only you can permit: add --allow-code-execution "
            "(in Python: `with code_execution():`, from compress.permission)"
        )
