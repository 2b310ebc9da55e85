"""Numbers for people: three significant digits, a prefix, a unit. Pure functions."""

from __future__ import annotations

import math

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def is_bad(value: float | None) -> bool:
    """True for NaN and infinities."""
    return value is not None and not math.isfinite(value)


def fixed(value: float | None, decimals: int) -> str:
    """``decimals`` digits after the point; "NaN", "inf", "-inf" as such; None is "n/a"."""
    if value is None:
        return "n/a"
    if math.isnan(value):
        return "NaN"
    return f"{value:.{decimals}f}"


def significant(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 12.3, 123, 1235."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value) or value == 0:
        return f"{value:.0f}"
    # Round first: 9.996 has one digit before the point, its rounded form 10.0 has two.
    rounded = float(f"{value:.2e}")
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def si(value: float, separator: str = "") -> str:
    """With a decimal prefix: 512, 48.8k, 1.56M; ``separator`` stands before the prefix, if there is one."""
    scaled, power = value, 0
    # What counts is the rounded value: 999.9 reads 1.00k.
    while abs(float(f"{scaled:.2e}")) >= 1000 and power < len(_PREFIXES) - 1:
        scaled /= 1000
        power += 1
    return significant(scaled) + (separator + _PREFIXES[power] if power else "")


def exponent(value: float, decimals: int = 1) -> str:
    """Short scientific form: 5.9e-4; zero is "0"."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return fixed(value, 0)
    mantissa, _, power = f"{value:.{decimals}e}".partition("e")
    return f"{mantissa}e{int(power)}"


def perplexity(value: float) -> str:
    """31.1, 4,096, 1.3e+7 (written 1.3e7): perplexities span many orders of magnitude."""
    if not math.isfinite(value):
        return fixed(value, 0)
    if value >= 1e6:
        return exponent(value)
    return f"{value:,.0f}" if value >= 999.5 else significant(value)


def flop_rate(tflops: float) -> str:
    """TFLOP/s of a GPU, GFLOP/s of something slower: "418 TF", "52.3 GF"."""
    return f"{significant(tflops)} TF" if tflops >= 1 else f"{significant(tflops * 1000)} GF"


def file_size(num_bytes: float) -> str:
    """Decimal units: 812 MB, 17.4 GB."""
    return si(num_bytes, " ") + ("B" if num_bytes >= 999.5 else " B")


def duration(seconds: float) -> str:
    """42s, 12m05s, 16h51m, 3d04h; "?" for a number that is no duration."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    whole = round(seconds)
    minutes, secs = divmod(whole, 60)
    hours, mins = divmod(minutes, 60)
    days, hrs = divmod(hours, 24)
    if days:
        return f"{days}d{hrs:02d}h"
    if hours:
        return f"{hours}h{mins:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


def elapsed(seconds: float) -> str:
    """A measured time: 0.4 s, 8.1 s, 42 s, 12m05s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 59.5 else duration(seconds)
