"""Upload generated conversations with function calls to the embedded bucket.

    python cookbooks/function_calling/prepare.py

It uses the quickstart's model: run `make quickstart` first.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.quickstart.prepare import put_rows

HOME = "s3://anneal/function_calling"
TRAIN_ROWS, VALID_ROWS = 144, 24

TRAIN_CITIES = ["Lisbon", "Oslo", "Kyoto", "Quito", "Accra", "Tallinn", "Perth", "Cusco"]
VALID_CITIES = ["Porto", "Bergen", "Nara", "Lima"]
_SKIES = ["clear", "cloudy", "rainy", "windy"]
_UNITS = {
    ("kilometres", "miles"): 0.621371,
    ("kilograms", "pounds"): 2.204623,
    ("litres", "gallons"): 0.264172,
}


def _function(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }


TOOLS = [
    _function("weather", "The weather in a city now", city="string"),
    _function("convert", "An amount in another unit", amount="number", unit="string", to="string"),
    _function("multiply", "The product of two numbers", a="number", b="number"),
]

Call = tuple[str, str, dict[str, Any], Any, str]
"""(question, function, arguments, result, answer)"""


def _weather(generator: random.Random, cities: list[str]) -> Call:
    city, sky, degrees = generator.choice(cities), generator.choice(_SKIES), generator.randint(-5, 35)
    question = generator.choice(
        ["What is the weather like in {}?", "Do I need a coat in {}?", "How warm is it in {}?"]
    )
    returned = {"sky": sky, "celsius": degrees}
    return (
        question.format(city),
        "weather",
        {"city": city},
        returned,
        f"In {city} it is {sky}, at {degrees} °C.",
    )


def _conversion(generator: random.Random, _: list[str]) -> Call:
    (unit, to), factor = generator.choice(list(_UNITS.items()))
    amount = generator.randint(2, 400)
    result = round(amount * factor, 2)
    question = generator.choice(["How many {to} are {amount} {unit}?", "What is {amount} {unit} in {to}?"])
    arguments = {"amount": amount, "unit": unit, "to": to}
    return question.format(**arguments), "convert", arguments, result, f"{amount} {unit} are {result} {to}."


def _product(generator: random.Random, _: list[str]) -> Call:
    a, b = generator.randint(12, 999), generator.randint(12, 99)
    question = generator.choice(["What is {} times {}?", "Multiply {} by {}."]).format(a, b)
    return question, "multiply", {"a": a, "b": b}, a * b, f"{a} times {b} is {a * b}."


def write_calls(cities: list[str], count: int, seed: int) -> str:
    """Return `count` JSONL rows, cycling through the functions: a question, a call, its result and the answer."""
    kinds: list[Callable[[random.Random, list[str]], Call]] = [_weather, _conversion, _product]
    generator = random.Random(seed)
    rows: dict[str, None] = {}
    while len(rows) < count:
        question, name, arguments, returned, answer = kinds[len(rows) % len(kinds)](generator, cities)
        messages = [
            {"role": "user", "content": question},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
            },
            {"role": "tool", "name": name, "content": json.dumps(returned)},
            {"role": "assistant", "content": answer},
        ]
        rows[json.dumps({"tools": TOOLS, "messages": messages}, ensure_ascii=False)] = None
    return "".join(row + "\n" for row in rows)


def main() -> None:
    """Upload the rows."""
    put_rows(
        HOME,
        train=write_calls(TRAIN_CITIES, TRAIN_ROWS, 1),
        valid=write_calls(VALID_CITIES, VALID_ROWS, 2),
    )
    print(f"function_calling: stored the rows in {HOME}", file=sys.stderr)


if __name__ == "__main__":
    main()
