"""Numbers and words as a reader wants them: plain ASCII, which the page later sets with real minus signs."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

NOTHING = "n/a"
Rounding = Literal["nearest", "up", "down"]


def number(value: object) -> float | None:
    """The finite number in a record's field, or None: JSON writes null for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def clean(value: object) -> str:
    """A field as one line of text: control and direction-override characters become visible escapes."""
    text = "" if value is None else str(value)
    return "".join(c if unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} else _escape(c) for c in text)


def block(value: object) -> str:
    """A field as a text of several lines: as `clean`, with line breaks and tabs kept."""
    text = "" if value is None else str(value).replace("\r\n", "\n")
    return "".join(c if c in "\n\t" else clean(c) for c in text)


def _escape(character: str) -> str:
    return " " if character in "\n\t\r" else f"\\u{ord(character):04x}"


def rounded(value: float, decimals: int, rounding: Rounding = "nearest") -> float:
    """Round; bounds go outward, so that the printed claim is never stronger than the measured one.

    >>> rounded(3.0411, 2, "up"), rounded(3.0411, 2, "down"), rounded(0.05 * 100, 2, "up")
    (3.05, 3.04, 5.0)
    """
    if rounding == "nearest" or abs(value) >= 1e12:
        return round(value, decimals)
    unit: float = 10.0**decimals
    slack = 1e-9 * max(1.0, abs(value * unit))  # 5 % in nats and back is 5.000000000000004 %
    scaled = math.ceil(value * unit - slack) if rounding == "up" else math.floor(value * unit + slack)
    return scaled / unit


@dataclass(frozen=True)
class Measure:
    """How the loss of one metric is shown: `forward` turns the additive loss into the shown quantity."""

    forward: Callable[[float], float]
    inverse: Callable[[float], float]
    suffix: str
    decimals: int

    def text(self, loss: float | None, rounding: Rounding = "nearest", signed: bool = True) -> str:
        """A loss with its unit, e.g. "+3.05 %"."""
        return NOTHING if loss is None else self.digits(loss, rounding, signed) + self.suffix

    def digits(self, loss: float | None, rounding: Rounding = "nearest", signed: bool = True) -> str:
        """A loss without its unit, for where a heading states it."""
        if loss is None:
            return NOTHING
        shown = rounded(self.forward(loss), self.decimals, rounding) + 0.0  # no "-0.00"
        digits = f"{abs(shown):,.{self.decimals}f}" if abs(shown) < 1e6 else f"{abs(shown):.2e}"
        sign = "-" if shown < 0 else "+" if signed and shown > 0 else ""
        return f"{sign}{digits}"

    def limit(self, margin: float | None) -> str:
        """A margin as the recipe wrote it, e.g. "5 %"."""
        return NOTHING if margin is None else f"{self.forward(margin):.4g}{self.suffix}"


def _percent_change(nats: float) -> float:
    return 100 * math.expm1(min(nats, 700.0))  # e^710 is not a float


def _nats(percent: float) -> float:
    return math.log1p(max(percent, -99.999999) / 100)


def measure(metric: str, unit: str) -> Measure:
    """How to show a metric's losses: log ratios of perplexities and times in percent, shares in percentage points."""
    if metric.partition(":")[0] in {"perplexity", "long_context", "latency"}:
        return Measure(_percent_change, _nats, " %", 2)
    if unit.startswith("of the allowed"):
        return Measure(lambda x: 100 * x, lambda x: x / 100, " %", 1)
    if unit in {"fraction", "proportion", "share", "share of tokens"}:
        return Measure(lambda x: 100 * x, lambda x: x / 100, " pp", 2)
    if "point" in unit:
        return Measure(float, float, " pp", 2)
    if unit == "MB":
        return Measure(float, float, " MB", 1)
    if unit == "bytes":
        return Measure(lambda x: x / 1e6, lambda x: x * 1e6, " MB", 1)
    if unit == "standard deviations of a row of logits":
        return Measure(float, float, " sd", 5)
    short = {"nats per token": "nats", "bits per weight": "bits"}.get(unit, unit)
    return Measure(float, float, f" {short}" if short else "", 4)


def value_text(metric: str, value: float | None) -> str:
    """The metric itself, e.g. a perplexity of "16.21"."""
    if value is None:
        return NOTHING
    if abs(value) >= 1e6 and metric.partition(":")[0] in {"perplexity", "divergence", "accuracy"}:
        return f"{value:.3e}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4f}"


def size(value: float | None) -> str:
    """Decimal bytes: 91.9 MB."""
    if value is None:
        return NOTHING
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.{2 if unit in {'GB', 'TB'} else 1}f} {unit}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    """A duration: 4.2 s, 125 s, 12 min 5 s."""
    if value is None:
        return NOTHING
    if value < 600:
        return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def share(value: float | None) -> str:
    """A small ratio with two digits.

    >>> share(0.0234), share(250.0), share(0.0), share(None)
    ('0.023', '250', '0', 'n/a')
    """
    if value is None or value == 0 or 0.001 <= abs(value) < 1e4:
        return NOTHING if value is None else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}\u202f\u00d7\u202f10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def tiny(value: float) -> str:
    """A signed figure of any size with two digits, in ASCII.

    >>> tiny(-3.21e-7), tiny(0.0), tiny(1.25)
    ('-3.2e-07', '0', '+1.2')
    """
    return f"{value:+.2g}" if value else "0"


def power(value: float) -> str:
    """A power of ten.

    >>> power(0.01), power(1e-5)
    ('0.01', '10⁻⁵')
    """
    exponent = round(math.log10(value))
    return f"{value:g}" if -3 <= exponent < 4 else f"10{str(exponent).translate(_SUPERSCRIPT)}"


_SUPERSCRIPT = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def count(value: float | None, noun: str = "") -> str:
    """A count with its noun: 9,204 tokens."""
    if value is None:
        return f"{NOTHING} {noun}".strip()
    word = noun[:-1] if noun.endswith("s") and value == 1 else noun
    return f"{value:,.0f} {word}".strip()


def bits(value: float | None) -> str:
    """Bits per weight: 4.63."""
    return NOTHING if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A confidence: 95 %, 98.33 %."""
    return NOTHING if value is None else f"{100 * value:.4g} %"


def parameters(params: Mapping[str, Any]) -> str:
    """A method's fields in one line, as a recipe writes them."""
    return ", ".join(f"{clean(key)}: {plain(value)}" for key, value in params.items())


DETAIL_NAMES = {
    "js": "mean Jensen-Shannon divergence (nats)",
    "top1": "top-1 agreement",
    "kl": "mean KL from the gated model (nats)",
    "p50": "median of KL over tokens (nats)",
    "p90": "90th percentile of KL over tokens (nats)",
    "p99": "99th percentile of KL over tokens (nats)",
    "p999": "99.9th percentile of KL over tokens (nats)",
    "size_bytes": "size",
    "bits_per_weight": "bits per weight",
}


def detail(key: str, value: object) -> str:
    """A further figure of a check in words."""
    amount = number(value)
    name = DETAIL_NAMES.get(key, clean(key))
    if amount is None:
        return f"{name} {NOTHING if value is None or isinstance(value, float) else plain(value)}"
    return f"{name} {size(amount) if key.endswith('_bytes') else f'{amount:.4g}'}"


def plain(value: object) -> str:
    """A field's value: text bare, anything nested as JSON."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return clean(json.dumps(value, ensure_ascii=False, sort_keys=True, default=str))


def listed(items: list[str]) -> str:
    """Items in prose: "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
