"""One-sided asymptotic confidence sequences: bounds on a mean that hold at every look, not at one."""

from __future__ import annotations

import math
from statistics import NormalDist


def mixture_variance(alpha: float, planned: int) -> float:
    """ρ² = (−2 ln α + ln(−2 ln α) + 1) / n*: makes the sequence nearly tightest at n* = `planned` examples.

    Every ρ² > 0 fixed beforehand is valid; the choice only says where the bound is tight. Choosing n* = 200
    costs little far away: at 10,000 examples the bound is 18 % wider than the one planned for 10,000.
    """
    if not 0 < alpha <= 0.5:
        raise ValueError(f"alpha is {alpha}, expected 0 < alpha <= 0.5")
    if planned < 1:
        raise ValueError(f"planned is {planned}, expected at least one example")
    log_term = -2 * math.log(alpha)
    return (log_term + math.log(log_term) + 1) / planned


def width(n: int, sd: float, alpha: float, rho2: float, skewness: float = 0.0) -> float:
    """Distance w such that mean_n + w (or mean_n − w) bounds the true mean at all n together.

    The chance that the bound is ever wrong tends to at most `alpha` as the first look moves to larger n; it
    is asymptotic, so looks start after a burn-in. n: examples so far. sd: their sample standard deviation.

        w = sd · sqrt( 2 (nρ² + 1) / (n² ρ²) · ln(1 + sqrt(nρ² + 1) / (2α)) )

    Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, arXiv:2103.06476 (one-sided form).

    skewness: of the examples for an upper bound, its negative for a lower one. Where it is positive, few examples hold
    most of the mean, and as long as they are missing from the sample the mean and its deviation are both too small. The
    studentized mean then falls below −z with a chance of Φ(−z) + skewness · (2z² + 1) · φ(z) / (6√n) to first order, so
    that z = w√n / sd grows by skewness · (2z² + 1) / (6√n); it never shrinks. Johnson 1978,
    doi:10.1080/01621459.1978.10480051; Hall 1992, The Bootstrap and Edgeworth Expansion, section 3.10.
    """
    if n < 1 or not rho2 > 0 or not 0 < alpha <= 0.5:
        raise ValueError(f"n={n}, rho2={rho2}, alpha={alpha}: expected n >= 1, rho2 > 0, 0 < alpha <= 0.5")
    spread = n * rho2 + 1
    plain = math.sqrt(2 * spread / (n * n * rho2) * math.log1p(math.sqrt(spread) / (2 * alpha)))
    return sd * (plain + max(0.0, skewness) * (2 * n * plain * plain + 1) / (6 * n))


def detectable(n: int, sd: float, alpha: float, rho2: float, power: float = 0.8) -> float:
    """Smallest distance between the true mean and the margin that n examples resolve with `power`.

    The bound clears the margin when mean_n + w ≤ margin. With mean_n ~ N(mean, sd²/n) that happens with
    probability `power` at a distance of w + z_power · sd/√n. One look at n is counted; the earlier looks
    of a sequence can only add power. A margin below this distance cannot be proven even without any loss.
    """
    if not 0 < power < 1:
        raise ValueError(f"power is {power}, expected 0 < power < 1")
    return width(n, sd, alpha, rho2) + NormalDist().inv_cdf(power) * sd / math.sqrt(n)
