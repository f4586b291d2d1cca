"""Numbers as people write them, by value; what is no number; and where the answer stands in a text."""

import time
from fractions import Fraction

import pytest

from kv_align.evaluation.answers import after_marker, gold_answer, read_number, written_answer, written_number

HALF = Fraction(1, 2)
NUMBERS = {
    # plain
    "72": 72,
    " 72. ": 72,
    "0": 0,
    "007": 7,
    "12345678901234567890123": 12345678901234567890123,
    "٧٢": 72,
    "７２": 72,
    # signs
    "+5": 5,
    "-5": -5,
    "- 5": -5,
    "\u22125": -5,
    "\u20135": -5,
    "\uff0d5": -5,
    "-0": 0,
    # decimals
    "0.5": HALF,
    ".5": HALF,
    "-0.25": Fraction(-1, 4),
    "5.": 5,
    "5.0": 5,
    "0.1": Fraction(1, 10),
    "1.234": Fraction(1234, 1000),
    "1,5": Fraction(3, 2),
    "0,125": Fraction(1, 8),
    "3,1416": Fraction(31416, 10000),
    "1000,500": Fraction(2001, 2),
    "٧٫٥": Fraction(15, 2),
    # thousands
    "1,234": 1234,
    "1,234.": 1234,
    "1,234,567.50": Fraction("1234567.5"),
    "1 234 567": 1234567,
    "1\u00a0234": 1234,
    "1\u202f234\u202f567,5": Fraction("1234567.5"),
    "1'234'567.5": Fraction("1234567.5"),
    "1\u2019234": 1234,
    "1_000_000": 1000000,
    "12,34,567": 1234567,
    "12,34,56,789.5": Fraction("123456789.5"),
    "12 34 567": 1234567,
    "1,2345,6789": 123456789,
    "1.234.567": 1234567,
    "1.234,56": Fraction("1234.56"),
    "1.234.567,89": Fraction("1234567.89"),
    # fractions and mixed numbers
    "1/3": Fraction(1, 3),
    "-1/3": Fraction(-1, 3),
    "1 / 3": Fraction(1, 3),
    "1\u20443": Fraction(1, 3),
    "2/4": HALF,
    "1,000/3": Fraction(1000, 3),
    "½": HALF,
    "1½": Fraction(3, 2),
    "-1 1/2": Fraction(-3, 2),
    "2 and 1/2": Fraction(5, 2),
    # currencies and percent
    "$18": 18,
    "$ 1,000": 1000,
    "-$5": -5,
    "$-5": -5,
    "€5": 5,
    "5 €": 5,
    "£1,234.50": Fraction("1234.5"),
    "₹12,34,567": 1234567,
    "US$5": 5,
    "USD 5": 5,
    "5 EUR": 5,
    "Rs. 500": 500,
    "50%": 50,
    "12.5 %": Fraction(25, 2),
    "50 percent": 50,
    # powers of ten
    "1e3": 1000,
    "1.2E+3": 1200,
    "5e-1": HALF,
    "1.2 × 10^3": 1200,
    "1.2x10^3": 1200,
    "2*10**3": 2000,
    "5·10³": 5000,
    "5×10⁻¹": HALF,
    "10^6": 1000000,
    "10²": 100,
    # LaTeX
    r"\boxed{72}": 72,
    r"$\boxed{72}$.": 72,
    r"\boxed{\text{72}}": 72,
    r"\boxed{\frac{1}{2}}": HALF,
    r"-\dfrac{3}{4}": Fraction(-3, 4),
    r"1\frac{1}{2}": Fraction(3, 2),
    r"\(72\)": 72,
    r"$72$": 72,
    r"$\$5$": 5,
    r"50\%": 50,
    "1{,}234": 1234,
    r"1\,234": 1234,
    r"1.2 \times 10^{3}": 1200,
    # Markdown
    "**72**": 72,
    "**$1,234.**": 1234,
    "*72*": 72,
    "__72__": 72,
    "`72`": 72,
    "***72***": 72,
}
NO_NUMBERS = (
    *(
        "",
        "-",
        "$",
        "%",
        ".",
        ",",
        "/",
        "none",
        "twelve",
        "A",
        "(A)",
        "x",
        "5x",
        "about 5",
        "±5",
        "≈5",
        "5!",
        "5²",
        "∞",
    ),
    *(
        "nan",
        "5 apples",
        "2 hours",
        "5 million",
        "5k",
        "3 dozen",
        "10:30",
        "3:4",
        "1-2",
        "3 or 4",
        "3, 4",
        "1, 234",
        "5 5",
    ),
    *("1,234,56", "12,345,67", "1 2345", "12 34", "0 123", "1'23", "1.2.3", "1..2", "1,,2", "1/2/2023", "2023-01-01"),
    *("1/0", "1 1/0", "1/", "/2", "1/2/3", "1/-2", "--5", "+-5", "-$-5", "0x10", "1e", "10^", "$5 and $6", r"\boxed{}"),
    *(r"\frac{1}{0}", "1e999999999999", "10^99999", "9" * 5000, "(5)", "72\n73"),
)


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_as_people_write_them(text, value):
    assert read_number(text) == value
    assert written_number(f"Some steps.\n#### {text}") == value


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number_is_none_and_not_its_first_digits(text):
    assert read_number(text) is None


def test_numbers_are_compared_exactly():
    assert len({read_number(text) for text in ("1/3", "1/4", "1/5", "0.333333", "1")}) == 5
    assert read_number("1/3") != read_number("0.3333333333333333")
    assert read_number("5.0") == read_number("5") == read_number("$5.00") == read_number("10/2")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 72", 72),
        ("She sold 48 + 24 = 72 clips.\n#### 72", 72),
        ("####72", 72),
        ("####\n72", 72),
        ("##### 72", 72),
        # The last marker counts: those before it are headings.
        ("#### 1. Read\nAna has pens.\n#### 2. Add\n#### 72", 72),
        ("#### 3 #### 4", 4),
        ("#### 72\n####", None),
        # A line is an answer, and words may follow the number; more numbers may not.
        ("#### 72\nQuestion: how many of 5?", 72),
        ("#### 72 clips", 72),
        ("#### 72, since she sold them", 72),
        ("#### $18 in total.", 18),
        ("#### 72 (all of them)", 72),
        ("#### 72 \u2013 as she said", 72),
        ("#### 72 Äpfel", 72),
        ("#### 1/2 of them", HALF),
        ("#### 50 percent of them", 50),
        ("#### 72 of 80", None),
        ("#### 3 or four", None),
        ("#### 5 or 6", None),
        ("#### 5 to 6", None),
        ("#### 5 point 5", None),
        ("#### 5 oranges", 5),
        ("#### 5 million", None),
        ("#### 2 and a half", None),
        ("#### 3 dozen eggs", None),
        ("#### 72clips", None),
        ("#### about 5", None),
        ("#### none", None),
        ("#### ", None),
        ("### 72", None),
        ("72", None),
        ("", None),
    ],
)
def test_the_answer_stands_after_the_last_marker(text, value):
    assert written_number(text) == value


@pytest.mark.parametrize(
    "words",
    [
        *("oranges", "orders", "total", "toys", "tomatoes", "tons", "points", "pointers", "androids", "overalls"),
        *("timestamps", "halfpennies", "hundredweight", "millionaires", "quarterbacks", "scorers", "bananas", "pluses"),
    ],
)
def test_a_number_counts_the_thing_after_it_whatever_word_that_begins_like(words):
    assert written_number(f"#### 7 {words}") == 7
    assert written_number(f"#### 7 {words.capitalize()} in all.") == 7


@pytest.mark.parametrize(
    "words",
    [
        *("or six", "to nine", "and", "over two", "point five", "plus one", "minus one", "times two", "Or six"),
        *("hundred", "hundreds", "hundredths", "thousand", "thousandth", "million", "Millions", "billion", "trillion"),
        *("millionths", "milliards", "lakh", "crores", "dozen", "dozens", "score", "scores", "half", "halves", "third"),
        *("thirds", "quarter", "quarters", "tenth", "tenths of it", "k", "m", "bn", "mn", "million-dollar bills"),
    ],
)
def test_a_word_that_makes_another_number_leaves_none(words):
    assert written_number(f"#### 5 {words}") is None
    assert written_number(f"#### 5 {words}.") is None


def test_texts_are_compared_without_regard_to_spaces_and_ways_to_write_a_character():
    assert gold_answer(" New\n York ", "text") == "New York" == written_answer("He goes.\n#### New  York", "text")
    assert gold_answer("Caf\u00e9", "text") == written_answer("#### Cafe\u0301", "text")
    assert gold_answer("paris", "text") != written_answer("#### Paris", "text")
    assert written_answer("New York", "text") is None
    assert gold_answer("1/2", "text") == "1/2" != written_answer("#### 0.5", "text")
    assert after_marker("#### one\ntwo ") == "one\ntwo"


@pytest.mark.parametrize(
    "text", ["*" * 900, "$" * 900, r"\boxed{" * 100, "1," * 450, "1 " * 450, "9" * 900 + "x", " " * 990 + "5"]
)
def test_no_text_takes_long(text):
    start = time.process_time()
    written_number(f"#### {text}")
    assert time.process_time() - start < 0.5
