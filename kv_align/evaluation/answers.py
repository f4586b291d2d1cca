"""What an answer says: where it stands in a text, which number it is, and whether it is the right one.

A text's answer stands after its last `####`, in the gold solution and in what a model wrote alike. Numbers are read as
people write them and compared exactly, as fractions. What is no number is never read as its first digits. Imports no torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

AnswerKind = Literal["number", "text"]
MARKER = "####"

_LONGEST = 1000  # characters: of a longer text, not even its length says a number that somebody means
_LARGEST_EXPONENT = 1000

# One way to write what Unicode has several of. Superscripts become a power, vulgar fractions a sum of their own below.
_SAME = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\ufe62\uff0b", "+"),
        **dict.fromkeys("\u00a0\u1680\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t", " "),
        **dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff\u2061\u2062", ""),
        **dict.fromkeys("\u2019\u02bc\uff07", "'"),
        **dict.fromkeys("\u066c\uff0c", ","),
        **dict.fromkeys("\u066b\uff0e", "."),
        **dict.fromkeys("\u2044\u2215\uff0f", "/"),
        **dict.fromkeys("\u00d7\u22c5\u00b7", "*"),
        "\uff05": "%",
        "\u066a": "%",
    }
)
_SUPERSCRIPT = dict(
    zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+", strict=True)
)

# What stands around a number without changing it: Markdown's emphasis and code, LaTeX's mathematics and boxes.
_AROUND = [
    re.compile(pattern)
    for pattern in (
        r"(\*\*|__|\*|_|`|\$\$)(.+)\1",
        r"(\$)((?:\\.|[^$\\])+)\$",
        r"(\\\()(.+)\\\)",
        r"(\\\[)(.+)\\\]",
        r"(\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{)(.+)\}",
    )
]
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)\\[,;:! ](?=\d)"), " "),
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\\(?:left|right)\b|\\[,;:! ]"), ""),
    (re.compile(r"\^\s*\{([^{}]*)\}"), r"^\1"),
)

_CODES = "USD|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD|NZD|SEK|NOK|DKK|PLN|BRL|MXN|KRW|Rs"
_SYMBOLS = r"\u0024\u00a2-\u00a5\u058f\u060b\u09f2\u09f3\u0e3f\u20a0-\u20cf"
_CURRENCY = rf"(?:(?:{_CODES})(?![A-Za-z])\.?|[A-Z]{{0,3}}[{_SYMBOLS}])"
_LEAD = re.compile(rf"(?:[-+]\s*)?(?:{_CURRENCY}\s*(?:[-+]\s*)?)?")
_TAIL = re.compile(rf"\s*(?:%|percent|per cent|{_CURRENCY})?\s*\.?")

_DECIMAL = re.compile(
    r"""(?:
        (?P<point> [1-9]\d{0,2} (?: (?P<sign>[ ,'_])\d{3} (?:(?P=sign)\d{3})*      # 1,234,567
                                  | (?P<indian>[ ,])\d\d (?:(?P=indian)\d\d)* (?P=indian)\d{3}  # 12,34,567
                                  | \d?(?:,\d{4}){2,} )                            # 1,2345,6789
                   (?:[.]\d*)?
          | \d+(?:[.]\d*)? | [.]\d+ )
      | (?P<comma> [1-9]\d{0,2}(?:(?P<other>[. '])\d{3}(?:(?P=other)\d{3})*),\d+   # 1.234.567,89
          | \d+,(?:\d{1,2}|\d{4,}) | (?:0+|\d{4,}),\d+ )                              # 1,5
      | (?P<points> [1-9]\d{0,2}(?:[.]\d{3}){2,} )                                 # 1.234.567
    )(?![.,' _]?\d)""",
    re.VERBOSE,
)
_POWER = re.compile(r"(?:[eE]|\s*[*xX]\s*10\s*(?:\^|\*\*))\s*\(?([-+]?\d+)\)?")
_POWER_OF_TEN = re.compile(r"10\s*(?:\^|\*\*)\s*\(?([-+]?\d+)\)?")
_MIXED = re.compile(r"(\d+)(?:\s+|\s+and\s+)(\d+)\s*/\s*(\d+)")
_OVER = re.compile(r"\s*/\s*")

_BEFORE_WORDS = re.compile(r"(.*?)\s*[-–—,;:!]?\s+[(\"']?([^\W\d_].*)")
# Words after a number that make it another one: whole words, for oranges, toys and millionaires are only counted by it.
_CHANGING = re.compile(
    r"(?:(?:and|or|to|over|point|plus|minus|times|half|halves|[kmb]n?)"
    r"|(?:hundred|thousand|[mbt]r?illion|milliard|lakh|crore)(?:s|ths?)?"
    r"|(?:dozen|score|third|quarter|tenth)s?)\b",
    re.IGNORECASE,
)


def read_number(text: str) -> Fraction | None:
    """Return the number that a whole text is; None where it is not one number and nothing else.

    Read are signs, thousands in any grouping, decimals, fractions, mixed numbers, powers of ten, a currency or a percent
    sign (both are units: 50 % is 50), and what Markdown or LaTeX puts around them. A single comma or point that could
    part thousands or decimals is read as in English: 1,234 is above a thousand, 1.234 is not; 1,5 is one and a half.
    """
    if len(text) > _LONGEST:
        return None
    text = _unwrapped(_in_one_way(text))
    lead = _LEAD.match(text)
    assert lead is not None
    signs = re.findall(r"[-+]", lead.group())
    if len(signs) > 1:
        return None
    value, end = _magnitude(text, lead.end())
    if value is None or _TAIL.fullmatch(text, end) is None:
        return None
    return -value if signs == ["-"] else value


def written_number(text: str) -> Fraction | None:
    """Return the number in the first line after a text's last `####`; words without digits may follow it (72 clips)."""
    lines = [line.strip() for line in (after_marker(text) or "").splitlines()]
    line = next(filter(None, lines), "")
    value = read_number(line)
    parted = _BEFORE_WORDS.fullmatch(line)
    if value is None and parted is not None:
        number, words = parted.groups()
        if not _CHANGING.match(words) and not re.search(r"\d", words):
            value = read_number(number)
    return value


def after_marker(text: str) -> str | None:
    """Return what stands after a text's last `####`, without the spaces around it; None where it has none."""
    _, marker, answer = text.rpartition(MARKER)
    return answer.strip() if marker else None


def gold_answer(answer: str, kind: AnswerKind) -> Fraction | str | None:
    """Return what a written answer is compared with; None where it is to be a number and is none."""
    return read_number(answer) if kind == "number" else _words(answer)


def written_answer(text: str, kind: AnswerKind) -> Fraction | str | None:
    """Return the answer in what a model wrote, to be compared with a `gold_answer`; None where it wrote none."""
    if kind == "number":
        return written_number(text)
    answer = after_marker(text)
    return None if answer is None else _words(answer)


def no_numbers(answers: Iterable[str]) -> list[str]:
    """Return those of these gold answers that are no numbers."""
    return [answer for answer in answers if read_number(answer) is None]


def _words(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _in_one_way(text: str) -> str:
    text = text.translate(_SAME)
    text = re.sub(r"(?<=10)[{}]+".format("".join(_SUPERSCRIPT)), lambda power: "^" + _digits(power.group()), text)
    return "".join(map(_digit, text)).strip()


def _digits(superscripts: str) -> str:
    return "".join(_SUPERSCRIPT[each] for each in superscripts)


def _digit(character: str) -> str:
    """Write a digit of any script as ours, and a fraction in one character as two numbers."""
    if character.isascii():
        return character
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    digit = unicodedata.decimal(character, None)
    return character if digit is None else str(digit)


def _unwrapped(text: str) -> str:
    """Take off what stands around a number, from the outside in."""
    while True:
        before = text
        text = text.strip()
        for around in _AROUND:
            inside = around.fullmatch(text.removesuffix("."))
            if inside is not None:
                text = inside.group(2)
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
        if text == before:
            return text


def _magnitude(text: str, start: int) -> tuple[Fraction | None, int]:
    """Read an unsigned number from a place in a text; return it and where it ends."""
    mixed = _MIXED.match(text, start)
    if mixed is not None:
        whole, above, below = map(int, mixed.groups())
        return (whole + Fraction(above, below) if below else None), mixed.end()
    power = _POWER_OF_TEN.match(text, start)
    value, end = (Fraction(1), start) if power is not None else _decimal(text, start)
    power = power or _POWER.match(text, end)
    over = _OVER.match(text, end)
    if value is not None and power is not None:
        exponent = int(power.group(1))
        return (value * Fraction(10) ** exponent if abs(exponent) <= _LARGEST_EXPONENT else None), power.end()
    if value is not None and over is not None:
        below_value, below_end = _decimal(text, over.end())
        return (value / below_value if below_value else None), below_end
    return value, end


def _decimal(text: str, start: int) -> tuple[Fraction | None, int]:
    number = _DECIMAL.match(text, start)
    if number is None:
        return None, start
    if number["comma"] is not None:
        whole, _, rest = number["comma"].partition(",")
    elif number["points"] is not None:
        whole, rest = number["points"], ""
    else:
        whole, _, rest = number["point"].partition(".")
    return Fraction(f"{re.sub(r'[^0-9]', '', whole)}.{rest}0"), number.end()
