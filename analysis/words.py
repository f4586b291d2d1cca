"""Numbers as a reader wants them: sensible digits, a true minus sign, units."""

from __future__ import annotations

import math

MINUS = "−"
SPACE = "\u00a0"
"""Between a number and its unit: a line does not break there."""


def percent(value: float, *, signed: bool = True, digits: int | None = None) -> str:
    """`+1.0 %`, `−3.0 %`; more digits where one would show nothing: `−0.02 %`."""
    digits = _places(value) if digits is None else digits
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    # A rounded zero has no sign.
    text = text.lstrip("+-") if float(text) == 0 else text
    return text.replace("-", MINUS) + f"{SPACE}%"


def _places(size: float) -> int:
    """Decimal places in which a size can be seen: one from 0.1 on, up to four below."""
    size = abs(size)
    return next((places for places, least in ((1, 0.1), (2, 0.01), (3, 0.001)) if size >= least), 4 if size else 1)


def declared_percent(value: float, *, signed: bool = False) -> str:
    """A percentage as it was declared: `3 %`, `+1 %`."""
    return (f"{value:+g}" if signed else f"{value:g}").replace("-", MINUS) + f"{SPACE}%"


def share(value: float) -> str:
    """A share as percent: `95 %`."""
    return f"{100 * value:.3g}{SPACE}%"


def share_of_one(value: float) -> str:
    """A probability: `.62`, `> .99`."""
    text = f"{value:.2f}"
    return "> .99" if text == "1.00" else "< .01" if text == "0.00" else text.removeprefix("0")


def percent_interval(low: float, high: float) -> str:
    """`−4.1 to −1.9 %`, with as many places as its width needs."""
    digits = _places(high - low)
    return f"{percent(low, digits=digits)[:-2]} to {percent(high, digits=digits)}"


def effect(mean: float, metric: str) -> str:
    """A difference in a metric as a reader takes it: perplexity in percent, exact match in points, else as it is."""
    if metric == "validation_loss":
        return percent(100 * math.expm1(mean))
    return f"{number(100 * mean, 2, signed=True)} points" if metric == "exact_match" else number(mean, 2, signed=True)


def metric_name(metric: str) -> str:
    """What a metric of the criteria is called in a sentence."""
    return {
        "validation_loss": "perplexity",
        "training_area": "area under the training loss",
        "probe_r2": "probe R²",
    }.get(metric, metric.replace("_", " "))


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """A number to so many significant digits; an en dash where there is none, and no powers of ten for the small."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{'> ' + MINUS if value < 0 else '< '}0.0001"
    if size > 6:
        text = f"{value:+.{digits - 1}e}" if signed else f"{value:.{digits - 1}e}"
    else:
        places = max(0, digits - 1 - size)
        text = f"{value:+,.{places}f}" if signed else f"{value:,.{places}f}"
    return text.replace("-", MINUS)


def p_number(value: float) -> str:
    """`0.0078`, `< 0.0001`, and `0.0497` rather than `0.050`."""
    if value < 1e-4:
        return "< 0.0001"
    places = 2 if value >= 0.1 else 3 if value >= 0.01 else 4
    # Rounded to a usual level, it would not say on which side of that it is.
    while round(value, places) in (0.01, 0.05, 0.1) and abs(value - round(value, places)) > 1e-9 and places < 9:
        places += 1
    return f"{value:.{places}f}"


def p_text(value: float, name: str = "p") -> str:
    """`p = 0.0078`, `p < 0.0001`."""
    text = p_number(value)
    return f"{name} {text}" if text.startswith("<") else f"{name} = {text}"


def count(many: int, what: str, plural: str | None = None) -> str:
    """`1 seed`, `8 seeds`."""
    return f"{many:,} {what if many == 1 else plural or what + 's'}"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def amount(value: float | None) -> str:
    """A count in thousands, millions and so on: `325 k`, `1.83 M`, `4.2e+15`."""
    if value is None or not math.isfinite(value):
        return "–"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit and abs(value) < 1000 * limit:
            return f"{number(value / limit)}{SPACE}{unit}"
    return f"{value:,.0f}" if abs(value) < 1e3 else f"{value:.2e}"


def seconds(value: float | None) -> str:
    """A duration in the unit that suits it."""
    if value is None or not math.isfinite(value):
        return "–"
    for limit, unit in ((3600.0, "h"), (60.0, "min")):
        if value >= limit:
            return f"{number(value / limit)}{SPACE}{unit}"
    return f"{number(value)}{SPACE}s"
