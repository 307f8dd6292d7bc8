"""Generate grade-school word problems with worked answers, reproducibly from a seed.

The validation rows contain problem types that do not occur in the training rows. A lower eval loss therefore means that
the model learned to write a worked answer; it cannot have memorized these problems.
"""

import json
import random
from collections.abc import Callable, Iterator

Problem = tuple[str, str]

_NAMES = [
    "Ada",
    "Ben",
    "Chloe",
    "Dmitri",
    "Elif",
    "Femi",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Luis",
    "Mei",
    "Noor",
    "Omar",
    "Priya",
]
_THINGS = [
    "apples",
    "marbles",
    "stickers",
    "pencils",
    "shells",
    "cards",
    "buttons",
    "books",
    "coins",
    "seeds",
]


def draw(
    kinds: list[Callable[[random.Random], Problem]], count: int, generator: random.Random
) -> Iterator[Problem]:
    """Yield `count` distinct problems, cycling through the kinds."""
    drawn = set()
    for index in range(count):
        while (problem := kinds[index % len(kinds)](generator)) in drawn:
            pass
        drawn.add(problem)
        yield problem


def write_problems(kinds: list[Callable[[random.Random], Problem]], count: int, seed: int) -> str:
    """Return `count` JSONL rows of chat messages, cycling through the kinds."""
    rows = []
    for question, answer in draw(kinds, count, random.Random(seed)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages}))
    return "\n".join(rows) + "\n"


def _answer(*steps: str, result: int) -> str:
    return " ".join(steps) + f"\n#### {result}"


def buying(r: random.Random) -> Problem:
    """Make a problem with a product: price times count."""
    name, thing, count, price = r.choice(_NAMES), r.choice(_THINGS), r.randint(3, 12), r.randint(2, 9)
    question = f"{name} buys {count} {thing} for ${price} each. How many dollars does {name} pay?"
    return question, _answer(
        f"Each of the {count} {thing} costs ${price}.",
        f"Together they cost {count} * {price} = ${count * price}.",
        result=count * price,
    )


def giving_away(r: random.Random) -> Problem:
    """Make a problem with a difference."""
    name, friend = r.sample(_NAMES, 2)
    thing, has = r.choice(_THINGS), r.randint(20, 60)
    gives = r.randint(3, has - 5)
    question = f"{name} has {has} {thing} and gives {gives} of them to {friend}. How many {thing} does {name} have left?"
    return question, _answer(
        f"{name} starts with {has} {thing}.",
        f"After giving {gives} away, {has} - {gives} = {has - gives} are left.",
        result=has - gives,
    )


def collecting(r: random.Random) -> Problem:
    """Make a problem with a sum of three numbers."""
    name, thing = r.choice(_NAMES), r.choice(_THINGS)
    days = [r.randint(4, 30) for _ in range(3)]
    question = f"{name} collects {days[0]} {thing} on Monday, {days[1]} on Tuesday and {days[2]} on Wednesday. How many {thing} is that in all?"
    first = days[0] + days[1]
    return question, _answer(
        f"On Monday and Tuesday {name} collects {days[0]} + {days[1]} = {first} {thing}.",
        f"With Wednesday it is {first} + {days[2]} = {first + days[2]}.",
        result=first + days[2],
    )


def sharing(r: random.Random) -> Problem:
    """Make a problem with a division without remainder."""
    name, thing, friends, each = r.choice(_NAMES), r.choice(_THINGS), r.randint(2, 9), r.randint(3, 12)
    total = friends * each
    question = f"{name} shares {total} {thing} evenly among {friends} friends. How many {thing} does each friend get?"
    return question, _answer(
        f"There are {total} {thing} for {friends} friends.",
        f"Each gets {total} / {friends} = {each}.",
        result=each,
    )


def change(r: random.Random) -> Problem:
    """Make a problem with a product and the change from a banknote."""
    name, thing, count, price = r.choice(_NAMES), r.choice(_THINGS), r.randint(2, 6), r.randint(2, 8)
    question = f"{name} pays for {count} {thing} at ${price} each with a $50 note. How many dollars of change does {name} get?"
    cost = count * price
    return question, _answer(
        f"The {thing} cost {count} * {price} = ${cost}.",
        f"The change is 50 - {cost} = ${50 - cost}.",
        result=50 - cost,
    )


def saving(r: random.Random) -> Problem:
    """Make a problem with a product and a sum."""
    name, start, weekly, weeks = r.choice(_NAMES), r.randint(5, 40), r.randint(2, 9), r.randint(3, 10)
    question = f"{name} has ${start} and saves ${weekly} every week. How many dollars does {name} have after {weeks} weeks?"
    saved = weekly * weeks
    return question, _answer(
        f"In {weeks} weeks {name} saves {weekly} * {weeks} = ${saved}.",
        f"With the first ${start} it is {start} + {saved} = ${start + saved}.",
        result=start + saved,
    )


def shelves(r: random.Random) -> Problem:
    """Make a problem with a product and a difference."""
    name, thing, rows, each = r.choice(_NAMES), r.choice(_THINGS), r.randint(2, 6), r.randint(5, 12)
    total = rows * each
    taken = r.randint(2, total - 2)
    question = f"{name} has {rows} shelves with {each} {thing} on each shelf and takes {taken} {thing} away. How many {thing} are left?"
    return question, _answer(
        f"The {rows} shelves hold {rows} * {each} = {total} {thing}.",
        f"After taking {taken} away, {total} - {taken} = {total - taken} are left.",
        result=total - taken,
    )


def walking(r: random.Random) -> Problem:
    """Make a problem with a daily rate."""
    name, miles, days = r.choice(_NAMES), r.randint(2, 9), r.randint(3, 12)
    question = f"{name} walks {miles} miles a day. How many miles does {name} walk in {days} days?"
    return question, _answer(
        f"{name} walks {miles} miles on each of {days} days.",
        f"That is {miles} * {days} = {miles * days} miles.",
        result=miles * days,
    )


def two_piles(r: random.Random) -> Problem:
    """Make a problem with the sum of two products."""
    name, thing, other = r.choice(_NAMES), *r.sample(_THINGS, 2)
    first, second, price, other_price = r.randint(2, 6), r.randint(2, 6), r.randint(2, 9), r.randint(2, 9)
    question = f"{name} buys {first} {thing} at ${price} each and {second} {other} at ${other_price} each. How many dollars does {name} pay in all?"
    one, two = first * price, second * other_price
    return question, _answer(
        f"The {thing} cost {first} * {price} = ${one}.",
        f"The {other} cost {second} * {other_price} = ${two}.",
        f"Together they cost {one} + {two} = ${one + two}.",
        result=one + two,
    )


def twice_as_many(r: random.Random) -> Problem:
    """Make a problem with a multiple and a sum."""
    name, friend = r.sample(_NAMES, 2)
    thing, has, times = r.choice(_THINGS), r.randint(3, 15), r.randint(2, 4)
    question = f"{name} has {has} {thing}. {friend} has {times} times as many. How many {thing} do they have together?"
    more = has * times
    return question, _answer(
        f"{friend} has {has} * {times} = {more} {thing}.",
        f"Together they have {has} + {more} = {has + more} {thing}.",
        result=has + more,
    )


def packing_boxes(r: random.Random) -> Problem:
    """Make a validation problem with a product of three numbers."""
    name, thing, boxes, bags, each = (
        r.choice(_NAMES),
        r.choice(_THINGS),
        r.randint(2, 6),
        r.randint(2, 5),
        r.randint(2, 8),
    )
    question = f"{name} packs {boxes} boxes with {bags} bags in each box and {each} {thing} in each bag. How many {thing} does {name} pack?"
    total_bags = boxes * bags
    return question, _answer(
        f"There are {boxes} * {bags} = {total_bags} bags.",
        f"They hold {total_bags} * {each} = {total_bags * each} {thing}.",
        result=total_bags * each,
    )


def reading(r: random.Random) -> Problem:
    """Make a validation problem with a daily rate and a difference."""
    name, pages, days = r.choice(_NAMES), r.randint(6, 15), r.randint(3, 8)
    total = pages * days + r.randint(10, 60)
    question = f"{name} reads {pages} pages a day of a book with {total} pages. How many pages are left after {days} days?"
    read = pages * days
    return question, _answer(
        f"In {days} days {name} reads {pages} * {days} = {read} pages.",
        f"There are {total} - {read} = {total - read} pages left.",
        result=total - read,
    )


TRAIN_KINDS = [
    buying,
    giving_away,
    collecting,
    sharing,
    change,
    saving,
    shelves,
    walking,
    two_piles,
    twice_as_many,
]
VALID_KINDS = [packing_boxes, reading]
