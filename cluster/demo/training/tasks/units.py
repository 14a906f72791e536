"""Converting units, and days and months."""

# ruff: noqa: E501 (tables of sentences)

from .. import pools
from ..phrases import Frames, Speaker
from . import steps
from .example import Draft

FAMILY = "unit"
CALENDAR = "calendar"

# large unit's names, small unit's names, how many small ones make a large one
UNITS = (
    (("kilometers", "km"), ("meters", "m"), 1000),
    (("meters", "m"), ("centimeters", "cm"), 100),
    (("meters", "m"), ("millimeters", "mm"), 1000),
    (("centimeters", "cm"), ("millimeters", "mm"), 10),
    (("kilograms", "kg", "kilos"), ("grams", "g"), 1000),
    (("grams", "g"), ("milligrams", "mg"), 1000),
    (("tons", "t"), ("kilograms", "kg"), 1000),
    (("liters", "l"), ("milliliters", "ml"), 1000),
    (("weeks",), ("days",), 7),
    (("days",), ("hours", "h"), 24),
    (("hours", "h"), ("minutes", "min"), 60),
    (("minutes", "min"), ("seconds", "s", "sec"), 60),
    (("dollars",), ("cents",), 100),
    (("euros",), ("cents",), 100),
    (("decades",), ("years",), 10),
    (("centuries",), ("years",), 100),
    (("years",), ("months",), 12),
    (("feet", "ft"), ("inches", "in"), 12),
    (("yards",), ("feet",), 3),
    (("dozen",), ("pieces",), 12),
    (("kilobytes", "KB"), ("bytes",), 1000),
    (("megabytes", "MB"), ("kilobytes", "KB"), 1000),
    (("gigabytes", "GB"), ("megabytes", "MB"), 1000),
)
TO_SMALL = Frames(
    ("How many {to} are {n} {frm}?", "Convert {n} {frm} to {to}.", "{n} {frm} in {to}?", "{n} {frm} to {to}", "How many {to} are in {n} {frm}?",
     "What is {n} {frm} in {to}?"),
    (
        "[Convert|Change|Turn|Transform|Translate] {n} {frm} [to|into] {to}.",
        "How many {to} [are there in|do you get from|make|does one have in|equal|are] {n} {frm}?",
        "[What is|What's|How much is|How much are|What are] {n} {frm} [in|as|expressed in|converted to|when written in] {to}?",
        "[Express|Write|Give|Show|Tell me] {n} {frm} in {to}.",
        "{n} {frm} [is|are|equals|=|makes] how many {to}?",
        "[I have|There are|It takes|I need] {n} {frm}. [How many {to} is that|How much is that in {to}|What is that in {to}]?",
        "[Do you know|Can you tell me|Tell me] how many {to} {n} {frm} [are|is|make].",
        "[convert|change|unit conversion|conversion][:|] {n} {frm} [to|in|->] {to}",
        "If [something|it] [is|takes|measures] {n} {frm}, how many {to} is [that|it]?",
    ),
)  # fmt: skip
AFTER = Frames(
    ("Which day comes after {day}?", "What is {day} plus {n} days?", "{day} + {n} days", "What day is {n} days after {day}?", "What day is it {n} days after {day}?"),
    (
        "[Today is|It is] {day}. [What day is it|Which day is it|What day will it be] [in|after] {n} days?",
        "[If today is|If it is] {day}, [what|which] day [is it|will it be|comes] in {n} days?",
        "[Tell me|Name|Give me|Say] the day {n} days after {day}.",
        "[Count|Go] {n} days [forward|on|ahead] from {day}. Which day is it?",
        "{day} plus {n} days is [which|what] day?",
    ),
)  # fmt: skip
BEFORE = Frames(
    ("What is {day} minus {n} days?", "{day} - {n} days", "What day is {n} days before {day}?", "What day was it {n} days before {day}?"),
    (
        "[Today is|It is] {day}. [What day was it|Which day was it] {n} days ago?",
        "[If today is|If it is] {day}, [what|which] day [was it|was] {n} days ago?",
        "[Tell me|Name|Give me|Say] the day {n} days before {day}.",
        "[Count|Go] {n} days back from {day}. Which day is it?",
        "{day} minus {n} days is [which|what] day?",
    ),
)  # fmt: skip
NEXT = Frames(
    ("Which {unit} comes after {item}?", "What is the {unit} after {item}?", "What {unit} follows {item}?"),
    (
        "[Tell me|Name|Give me|Say] the {unit} [after|following|that comes after|that follows] {item}.",
        "[Which|What] {unit} [is|comes] [right after|directly after|next after|after] {item}?",
        "After {item} comes which {unit}?",
        "[Which|What] is the next {unit} after {item}?",
    ),
)  # fmt: skip
PREVIOUS = Frames(
    ("Which {unit} comes before {item}?", "What is the {unit} before {item}?", "What {unit} is before {item}?"),
    (
        "[Tell me|Name|Give me|Say] the {unit} [before|that comes before|that precedes] {item}.",
        "[Which|What] {unit} [is|comes] [right before|directly before|just before|before] {item}?",
        "Before {item} comes which {unit}?",
        "[Which|What] is the previous {unit} before {item}?",
    ),
)  # fmt: skip
ORDER = Frames(
    ("What is the {nth} {unit} of the {whole}?", "Which {unit} is the {nth} of the {whole}?"),
    (
        "[Tell me|Name|Give me|Say] the {nth} {unit} of the {whole}.",
        "[Which|What] {unit} [is|comes] {nth} in the {whole}?",
        "The {nth} {unit} of the {whole} is [which|what] {unit}?",
    ),
)  # fmt: skip


def enlarge(n: int, factor: int) -> str:
    """The steps of ``n * factor``."""
    zeros = len(str(factor)) - 1
    if factor == 10**zeros:
        return f"{n} with {zeros} {'zero' if zeros == 1 else 'zeros'} is {n * factor}"
    if factor == 60:
        return f"{steps.by_digit(n, 6)}, with a zero {n * factor}"
    return steps.by_digit(n, factor) if factor < 10 else steps.by_two_digits(n, factor)


def reduce(value: int, factor: int) -> str:
    """The steps of ``value / factor``."""
    zeros = len(str(factor)) - 1
    if factor == 10**zeros:
        return f"{value} without {zeros} {'zero' if zeros == 1 else 'zeros'} is {value // factor}"
    if factor == 60:
        return f"{value} without 1 zero is {value // 10}\n{steps.division(value // 10, 6)}"
    return steps.division(value, factor)


def draft(speaker: Speaker) -> Draft:
    """A conversion between two units, answered in the words asked."""
    rng = speaker.rng
    large, small, factor = rng.choice(UNITS)
    is_decimal = factor in (10, 100, 1000)
    n = max(1, pools.number(rng, rng.randint(1, 4 if is_decimal else 2)))
    big, little = rng.choice((large[0], rng.choice(large))), rng.choice((small[0], rng.choice(small)))
    gap_free = rng.random() < 0.15
    known = f"1 {big} is {factor} {little}\n"
    if rng.random() < 0.4 and factor not in (24,):
        value = n * factor
        question = speaker.say(TO_SMALL, n=value, frm=little, to=big)
        thought, answer, key = known + reduce(value, factor), f"{n} {big}", f"{value}{small[0]}{large[0]}"
        shown = f"{value} {little}", f"{value}{little}"
    else:
        question = speaker.say(TO_SMALL, n=n, frm=big, to=little)
        thought, answer, key = known + enlarge(n, factor), f"{n * factor} {little}", f"{n}{large[0]}{small[0]}"
        shown = f"{n} {big}", f"{n}{big}"
    return Draft(
        key if n > 9 else "", question.replace(*shown) if gap_free else question, thought, answer, is_hard=True
    )


def days_away(speaker: Speaker) -> Draft:
    """The day some days before or after another."""
    rng = speaker.rng
    start, n, is_after = rng.randrange(7), rng.randint(2, 40), rng.random() < 0.6
    rest = n % 7
    walk = [pools.DAYS[(start + (i if is_after else -i)) % 7] for i in range(rest + 1)]
    thought = f"{n}/7={n // 7} rest {rest}\n" + ", ".join(f"{i} {day}" for i, day in enumerate(walk))
    question = speaker.say(AFTER if is_after else BEFORE, n=n, day=pools.DAYS[start])
    if str(n) not in question:  # the frame without a number asks for the next day
        thought, walk = "the next day", [pools.DAYS[(start + 1) % 7]]
        return Draft("", question, thought, walk[-1])
    return Draft(f"{n}{is_after}{start}", question, thought, walk[-1])


def neighbours(speaker: Speaker) -> Draft:
    """The next, previous or n-th day or month."""
    rng = speaker.rng
    unit, whole, items = rng.choice((("day", "week", pools.DAYS), ("month", "year", pools.MONTHS)))
    index, kind = rng.randrange(len(items)), rng.random()
    if kind < 0.4:
        return Draft(
            "", speaker.say(NEXT, unit=unit, item=items[index]), "the next one", items[(index + 1) % len(items)]
        )
    if kind < 0.75:
        return Draft("", speaker.say(PREVIOUS, unit=unit, item=items[index]), "the one before", items[index - 1])
    index = min(index, 9)
    question = speaker.say(ORDER, nth=pools.ORDINALS[index], unit=unit, whole=whole)
    thought = ", ".join(f"{i} {item}" for i, item in enumerate(items[: index + 1], 1))
    return Draft("", question, thought, items[index])


def calendar(speaker: Speaker) -> Draft:
    """A question on days and months."""
    return (days_away if speaker.rng.random() < 0.6 else neighbours)(speaker)
