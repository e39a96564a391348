"""How much room the files take, decided by bytes."""

import math

import pytest
from pydantic import ValidationError

from compress.gate import Gate, Sizes
from evaluators.footprint import Footprint
from evaluators.size import Size
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("size", "verdict"),
    [(80_500_000, "PASS"), (80_500_001, "FAIL"), (1, "PASS"), (0, "INVALID"), (math.nan, "INVALID")],
)
def test_a_byte_decides_whatever_the_bits(size, verdict):
    models = tiny_model(), tiny_model()
    (found,) = Gate((Size(max_mb=80.5),)).evaluate(*models, [], sizes=Sizes(size, 32.0)).checks
    (share,) = Gate((Footprint(max_mb=80.5),)).evaluate(*models, [], sizes=Sizes(size, 32.0)).checks
    assert found.verdict == share.verdict == verdict
    if size > 0:
        assert found.value == found.loss == size / 1e6 and found.margin == 80.5 and found.source == "files"
        assert found.details == {"size_bytes": size, "bits_per_weight": 32.0}


@pytest.mark.parametrize("fields", [{}, {"max_mb": 0}, {"max_mb": math.inf}, {"max_mb": 8, "max_bits_per_weight": 5}])
def test_senseless_bounds_are_refused(fields):
    with pytest.raises(ValidationError):
        Size(**fields)


def test_it_is_shown_in_megabytes():
    assert Size(max_mb=1234.5).display(1234.5) == "1,234.5 MB"
