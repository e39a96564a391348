"""Programs run confined, or not at all, whatever the machine."""

import pytest

from compress import permission
from compress.errors import RecipeError
from evaluators import _sandbox
from tests.evaluators.sandboxed import PROBLEM


def test_this_machine_confines_programs_or_refuses_them(tmp_path):
    with permission.code_execution():
        if PROBLEM:
            with pytest.raises(RecipeError, match="never run unconfined"):
                _sandbox.run(f"open({str(tmp_path / 'ran')!r}, 'w')")
        else:
            assert _sandbox.run("pass") == "passed"
            assert _sandbox.run(f"open({str(tmp_path / 'ran')!r}, 'w')") == "failed"
    assert not list(tmp_path.iterdir())
