"""What pruned zeros bring an exported file, in a sentence: the measurement decides, not the format's name."""

from __future__ import annotations

from pydantic import ValidationError

from compress.report import figures
from compress.zeros import Zeros

_GAINS = {"bytes": "fewer bytes", "prefill": "a faster prefill", "decode": "faster decoding"}


def sentence(zeros: Zeros, lasting: bool = False) -> str:
    """The finding, in ASCII. lasting: without figures of the clock, of which only a gain is told, for what ships."""
    of_linears = f", {_percent(zeros.pruned_linear, zeros.linear)} of all linears" if zeros.linear else ""
    share = f"{_percent(zeros.pruned, zeros.masked)} of {figures.count(zeros.tensors, 'masked tensors')}{of_linears}"
    details = [_bytes(zeros)] if zeros.size_bytes_without is not None else []
    if lasting and zeros.speeds:
        faster = [part for part in zeros.gains if part in zeros.speeds]
        details.append(f"timed: {figures.listed([*zeros.speeds])}, {_faster(faster)}")
    elif zeros.speeds:
        ratios = [
            f"{part} {figures.rounded(s.lower, 2, 'down'):.2f} to {figures.rounded(s.upper, 2, 'up'):.2f} times as fast"
            for part, s in zeros.speeds.items()
        ]
        rounds = next(iter(zeros.speeds.values())).rounds
        details.append(f"{', '.join(ratios)} (95 % intervals over {rounds} interleaved rounds)")
    details += [f"not measured: {figures.clean(zeros.not_measured)}"] if zeros.not_measured else []
    return f"pruned zeros ({share}) bring this file {_brought(zeros, lasting)}: {'; '.join(details)}"


def notes(record: object) -> list[str]:
    """The sentence of a record's field, if it holds one."""
    try:
        return [sentence(Zeros.model_validate(record))]
    except ValidationError:
        return []


def _brought(zeros: Zeros, lasting: bool) -> str:
    if zeros.gains:
        return figures.listed([_GAINS[part] for part in zeros.gains])
    if not zeros.speeds:
        return "no fewer bytes" if zeros.size_bytes_without is not None else "an unknown gain"
    # An interval that holds a gain and none is narrower or wider in the next run: what ships must not change with it.
    return "no gain that was shown" if lasting or zeros.unclear else "nothing"


def _faster(parts: list[str]) -> str:
    return f"{figures.listed(parts)} faster than without them" if parts else "not shown to be faster"


def _bytes(zeros: Zeros) -> str:
    assert zeros.size_bytes_without is not None
    saved = zeros.size_bytes_without - zeros.size_bytes
    change = f"{abs(saved):,} bytes {'fewer' if saved > 0 else 'more'} than" if saved else "as many bytes as"
    return f"{figures.size(zeros.size_bytes)}, {change} without them"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
