import math

import pytest
from pydantic import ValidationError

from evaluators.footprint import Footprint


@pytest.mark.parametrize(
    ("bounds", "size", "bits", "share"),
    [
        ({"max_mb": 80}, 80_000_000, 99.0, 1.0),
        ({"max_mb": 80}, 80_000_001, 1.0, 1.0000000125),
        ({"max_bits_per_weight": 5}, 10**12, 4.5, 0.9),
        ({"max_mb": 80, "max_bits_per_weight": 5}, 8_000_000, 5.5, 1.1),
        ({"max_mb": 80, "max_bits_per_weight": 5}, 160_000_000, 4.5, 2.0),
    ],
)
def test_the_tighter_bound_decides(bounds, size, bits, share):
    footprint = Footprint(**bounds)
    assert footprint.measure(size, bits) == pytest.approx(share, rel=1e-12)
    assert footprint.margin == 1.0


@pytest.mark.parametrize("first", [True, False])
def test_nan_is_not_dropped(first):
    footprint = Footprint(max_mb=80, max_bits_per_weight=5)
    assert math.isnan(footprint.measure(1, math.nan) if first else footprint.measure(math.nan, 1.0))


@pytest.mark.parametrize("bounds", [{}, {"max_mb": 0}, {"max_mb": -1}, {"max_bits_per_weight": math.inf}, {"mb": 3}])
def test_senseless_bounds_are_refused(bounds):
    with pytest.raises(ValidationError):
        Footprint(**bounds)


def test_display():
    assert Footprint(max_mb=80).display(0.9312) == "93.1% of the allowed footprint"
