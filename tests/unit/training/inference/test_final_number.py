"""The final number of a generated answer."""

import pytest

from training.inference.evaluate import final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 15 = 18 apples.\n#### 18", "18"),
        ("#### 18\nQ: Another one?\nA: 5 and 6", "18"),
        ("####18", "18"),
        ("#### $1,234.50", "1234.5"),
        ("#### -7", "-7"),
        ("#### none, but 4 are left", "4"),
        ("It costs $1,000.", "1000"),
        ("It costs 1000.00 dollars", "1000"),
        ("from 3-5 to 12-9", "9"),
        ("minus -$5", "-5"),
        ("\u22123 degrees", "-3"),
        ("x=-7", "-7"),
        ("1/2", "2"),
        ("007", "7"),
        ("-0.0", "0"),
        ("1,000,000 and 12,34", "34"),
        ("3.14", "3.14"),
        ("Exactly 20%.", "20"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_final_number_follows_the_marker_or_is_the_last_one(text: str, number: str | None):
    assert final_number(text) == number
