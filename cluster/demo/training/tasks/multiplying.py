"""Multiplication and division: plain and in stories."""

# ruff: noqa: E501 (tables of sentences)

from .. import pools
from ..phrases import Frames, Speaker
from . import steps
from .adding import shown
from .example import Draft

FAMILY = "mul"

MULTIPLY = Frames(
    ("What is {a} * {b}?", "{a} * {b}", "{a}*{b}", "{a} x {b}", "{a} * {b} = ?", "Multiply {a} by {b}.", "What is {a} times {b}?",
     "What's {a} times {b}?", "Calculate {a} * {b}.", "{a} x {b} = ?"),
    (
        "[Compute|Calculate|Work out|Evaluate|Find|Give me|Tell me|Solve|Determine] [{a} * {b}|{a} times {b}|{a} x {b}|{a}*{b}|{a} multiplied by {b}].",
        "[What is|What's|Find|Give me|Tell me|Calculate|I need] the product of {a} and {b}.",
        "How much [is|are|do you get for] {a} [times|*|x|multiplied by] {b}?",
        "[Multiply|Please multiply] {a} [with|by|and|times] {b}.",
        "[Multiply|Take the product of] [these|the numbers|the two numbers|these two numbers][:|] {a} [and|,|] {b}.",
        "What [do you get|do I get|is the result|comes out] [if|when] [you|I|we] multiply {a} [by|with|and] {b}?",
        "If [I|you|we] multiply {a} by {b}, what [do I get|is the result|comes out]?",
        "[What does|What will] print({a} * {b}) [print|show|output|give|return]?",
        "[{a} times {b} equals|{a} x {b} equals|{a} times {b} is|{a} * {b} makes] [what|how much]?",
        "[Do you know|Can you tell me|Any idea|Could you tell me] [what|how much] {a} [times|x|*] {b} is?",
        "[My homework|The exercise|The question] is {a} x {b}. [What is the answer|What do I write|Help me]?",
        "[multiply|times|product][:| ] {a} {b}",
        "Let x = {a} and y = {b}. What is x * y?",
    ),
)  # fmt: skip
DIVIDE = Frames(
    ("What is {a} / {b}?", "{a} / {b}", "{a}/{b}", "{a} / {b} = ?", "Divide {a} by {b}.", "What is {a} divided by {b}?", "{a} : {b}",
     "Calculate {a} / {b}."),
    (
        "[Compute|Calculate|Work out|Evaluate|Find|Give me|Tell me|Solve|Determine] [{a} / {b}|{a} divided by {b}|{a}/{b}|{a} over {b}].",
        "How much [is|are|do you get for] {a} [divided by|/|over] {b}?",
        "[Divide|Split|Share] {a} [by|into|among] {b}.",
        "[How many times|How often] does {b} [go|fit] into {a}?",
        "What [do you get|do I get|is the result|comes out] [if|when] [you|I|we] divide {a} by {b}?",
        "If [I|you|we] divide {a} by {b}, what [do I get|is the result|comes out]?",
        "[{a} divided by {b} equals|{a} / {b} equals|{a} divided by {b} is] [what|how much]?",
        "[Do you know|Can you tell me|Any idea|Could you tell me] [what|how much] {a} [divided by|/] {b} is?",
        "[What is|What's|Find|Give me|Tell me] the quotient of {a} and {b}.",
        "[My homework|The exercise|The question] is {a} / {b}. [What is the answer|What do I write|Help me]?",
    ),
)  # fmt: skip
DOUBLE = Frames(
    ("What is {verb} {a}?", "{verb} {a}"),
    (
        "[What is|What's|Give me|Tell me|Calculate|Find] the {verb} of {a}.",
        "[How much is|Compute|What do you get for] {verb} {a}?",
    ),
)
TOTAL = Frames(
    ("There are {a} boxes with {b} {things} each. How many {things} are there?",
     "{name} buys {a} {things} for {b} dollars each. How much does {name} pay?"),
    (
        "There are {a} [boxes|bags|baskets|shelves|rows|tables] [and each has|with|and each holds] {b} {things}[ each|]. How many {things} [are there|is that|are there in total|altogether]?",
        "{name} has {a} [boxes|bags|baskets] [of|with] {b} {things} each. How many {things} does {name} have?",
        "One [ticket|box|book|pizza|card] costs {b} [dollars|euros|coins]. [How much do|What do] {a} [tickets|boxes|books|pizzas|cards] cost?",
        "[If one|When one] [ticket|box|book|pizza] costs {b} [dollars|euros|coins], [how much do {a} cost|what is the price of {a}]?",
        "{name} [reads|writes|walks|runs|makes] {b} [pages|letters|miles|{things}] [a|every|each|per] day. How many is that in {a} days?",
        "Each of {a} [children|friends|workers|players] [gets|has|brings] {b} {things}. How many {things} [is that|are there in total|do they have together]?",
    ),
)  # fmt: skip
SHARE = Frames(
    ("{name} shares {a} {things} among {b} friends. How many does each friend get?",
     "{a} {things} are put into {b} boxes equally. How many are in each box?"),
    (
        "{name} [divides|splits|shares|distributes] {a} {things} [equally |evenly |]among {b} [friends|children|people|teams]. How many [{things} |]does each [get|receive|one get]?",
        "If {b} [friends|children|people|players] share {a} {things}[ equally| evenly|], how many [does each get|{things} does each one get]?",
        "{a} {things} are [packed|put|sorted] into {b} [boxes|bags|baskets|rows]. How many [{things} |]are in each [one|]?",
        "{b} [tickets|books|pizzas|boxes] cost {a} [dollars|euros|coins]. How much does one cost?",
    ),
)  # fmt: skip


def factors(speaker: Speaker) -> tuple[int, int]:
    """Up to 5 digits by 1, or 3 by 2, in either order; small tables often."""
    rng = speaker.rng
    choice = rng.random()
    if choice < 0.25:
        return rng.randint(0, 12), rng.randint(0, 12)
    if choice < 0.6:
        a, b = pools.number(rng, rng.randint(1, 5)), rng.randint(2, 9)
    else:
        a, b = pools.number(rng, rng.randint(2, 3)), rng.randint(10, 99)
    return (a, b) if rng.random() < 0.65 else (b, a)


def key_of(a: int, sign: str, b: int) -> str:
    """The operands' key; the times tables are facts to learn, never held out."""
    return "" if a < 13 and b < 13 else f"{a}{sign}{b}"


def product(speaker: Speaker) -> Draft:
    """Two factors."""
    a, b = factors(speaker)
    in_words = speaker.rng.random() < 0.06
    question = speaker.say(MULTIPLY, a=shown(speaker, a, in_words), b=shown(speaker, b, in_words))
    return Draft(key_of(a, "*", b), question, steps.multiplication(a, b), str(a * b), is_hard=True)


def quotient_text(a: int, b: int) -> str:
    """The quotient, with a remainder where there is one."""
    return str(a // b) if a % b == 0 else f"{a // b} remainder {a % b}"


def quotient(speaker: Speaker) -> Draft:
    """Division by 2 to 12, often without a remainder."""
    rng = speaker.rng
    b = rng.choice((2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11, 12))
    a = pools.number(rng, rng.randint(1, 4))
    if rng.random() < 0.6:
        a = max(1, a // b) * b
    question = speaker.say(DIVIDE, a=shown(speaker, a, False), b=b)
    return Draft(key_of(a, "/", b), question, steps.division(a, b), quotient_text(a, b), is_hard=True)


def doubled(speaker: Speaker) -> Draft:
    """Twice, the double, the half."""
    rng = speaker.rng
    verb = rng.choice(("double", "triple", "half"))
    a = pools.number(rng, rng.randint(1, 4))
    a += a % 2 if verb == "half" else 0
    question = speaker.say(DOUBLE, verb=verb, a=a)
    if verb == "half":
        return Draft(key_of(a, verb, 99), question, steps.division(a, 2), str(a // 2), is_hard=True)
    by = 2 if verb == "double" else 3
    return Draft(key_of(a, verb, 99), question, steps.by_digit(a, by), str(a * by), is_hard=True)


def story(speaker: Speaker) -> Draft:
    """A product or a division in a story."""
    rng = speaker.rng
    slots = {"name": pools.proper(rng, pools.NAMES), "things": rng.choice(pools.THINGS)}
    small = rng.randint(2, 9)
    other = pools.number(rng, rng.randint(1, 2)) or 4
    if rng.random() < 0.6:
        a, b = (small, other) if rng.random() < 0.5 else (other, small)
        thought = f"{a} * {b}\n" + steps.multiplication(a, b)
        return Draft(key_of(a, "*", b), speaker.say(TOTAL, a=a, b=b, **slots), thought, str(a * b), is_hard=True)
    a = small * other
    thought = f"{a} / {small}\n" + steps.division(a, small)
    return Draft(key_of(a, "/", small), speaker.say(SHARE, a=a, b=small, **slots), thought, str(other), is_hard=True)


def draft(speaker: Speaker) -> Draft:
    """A multiplication or division."""
    return speaker.rng.choices((product, quotient, doubled, story), (45, 28, 7, 20))[0](speaker)
