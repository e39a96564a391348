"""Whether this machine can confine programs; where it cannot, the tests of what happens inside mean nothing."""

import pytest

from evaluators import _sandbox

PROBLEM = _sandbox._problem()
needs_sandbox = pytest.mark.skipif(bool(PROBLEM), reason=f"no sandbox on this machine: {PROBLEM}")
