"""Finding a value in a list of pairs or in sentences, also when it is not there; ``recall`` is the same in long texts."""

# ruff: noqa: E501 (tables of sentences)

from dataclasses import dataclass

from .. import pools
from ..phrases import Frames, Speaker
from .example import Draft

FAMILY = "lookup"
RECALL = "recall"
ABSENT = "That is not in the list."
ABSENT_SHARE = 0.25
MIXED_SHARE = 0.3
SCANNED = 24  # lists up to this long are scanned key by key


@dataclass(frozen=True)
class Kind:
    """A kind of list: how a pair is written, and how its value and its key are asked for."""

    line: str
    gap: tuple[str, ...]
    forward: Frames
    backward: Frames | None = None


VALUE = Frames(
    ("What is the value for {key}?", "Look up {key}.", "What is the value of {key}?", "What is {key}?", "Give me the value of {key}."),
    (
        "[Look up|Find|Give me|Tell me|Show me|Return|Get|Read] [the value for|the value of|the entry for|the entry of|what belongs to] {key}.",
        "[What|Which] [value|entry] [belongs to|is stored under|does one find under|is listed for|goes with|is next to] {key}?",
        "[What|Which value] does {key} have[ here| in this list|]?",
        "[What does it say|What is listed|What is given|What stands] [for|under|at|next to] {key}?",
        "[I need|I want|I am looking for] the value [of|for] {key}.",
        "[What did|What has] {key} [get|got]?",
        "{key}?",
    ),
)  # fmt: skip
LIVES = Frames(
    ("Where does {key} live?", "In which city does {key} live?", "Which city does {key} live in?"),
    (
        "[Tell me|Say|Find out|Do you know] where {key} lives.",
        "[What|Which] [city|place|town] [is {key} in|is home to {key}|does {key} call home|does {key} live in]?",
        "[What is|Tell me|Give me] the [city|home|home town] of {key}.",
        "In [what|which] [city|town|place] [is {key}|does {key} live|can I find {key}|would I find {key}]?",
    ),
)  # fmt: skip
LIVES_BACK = Frames(
    ("Who lives in {value}?", "Who is from {value}?"),
    (
        "[Tell me|Find out|Say] who lives in {value}.",
        "[Which person|Which one of them|What person] lives in {value}?",
        "[Name|Find] the person [who lives in|in|from] {value}.",
    ),
)
COLOR = Frames(
    ("What color is the {key}?", "Which color does the {key} have?", "What is the color of the {key}?", "What colour is the {key}?"),
    (
        "[Tell me|Give me|Name|Say|Find] the [color|colour] of the {key}.",
        "[What|Which] [color|colour] [has the {key}|does the {key} have|is on the {key}|is the {key}]?",
        "The {key} [is|has] [what|which] [color|colour]?",
        "[How is|How was] the {key} [colored|painted]?",
    ),
)  # fmt: skip
COLOR_BACK = Frames(
    ("What is {value}?", "Which thing is {value}?"),
    (
        "[Tell me|Say|Find] what is {value}.",
        "[Which object|Which one|Which of them] is {value}?",
        "[Name|Give me] the {value} [thing|object|one].",
    ),
)
AGE = Frames(
    ("How old is {key}?", "What is the age of {key}?", "What age is {key}?"),
    (
        "[Tell me|Give me|Say|Find|Find out] the age of {key}.",
        "[Tell me|Say|Find out|Do you know] how old {key} is.",
        "How many years old is {key}?",
        "[Which|What] age does {key} have?",
    ),
)  # fmt: skip
AGE_BACK = Frames(
    ("Who is {value}?", "Who is {value} years old?"),
    (
        "[Tell me|Find out|Say] who is {value}[ years old|].",
        "[Which person|Which one|Which of them] is {value}[ years old|]?",
        "[Name|Find] the person [who is|of age|aged] {value}.",
    ),
)
PRICE = Frames(
    ("How much is the {key}?", "What does the {key} cost?", "What is the price of the {key}?", "How much does the {key} cost?"),
    (
        "[Tell me|Give me|Find|Show me] the [price|cost] of the {key}.",
        "[How much|How many dollars] [do I pay|must I pay|do I need|does one pay] for the {key}?",
        "[What is|How much is] [the cost of|the price for|the price tag of] the {key}?",
        "I want to buy the {key}. [How much is it|What does it cost|What is the price]?",
    ),
)  # fmt: skip
JOB = Frames(
    ("What is the job of {key}?", "What does {key} do for work?", "What does {key} work as?"),
    (
        "[Tell me|Give me|Say|Find] the [job|profession|work|occupation] of {key}.",
        "[What|Which] [job|profession|occupation] does {key} have?",
        "[What does {key} do|How does {key} earn money|What is {key} by profession]?",
    ),
)  # fmt: skip
JOB_BACK = Frames(
    ("Who is the {value}?", "Who works as a {value}?"),
    (
        "[Tell me|Find out|Say] who [is the|works as a] {value}.",
        "[Which person|Which one|Which of them] is [the|a] {value}?",
    ),
)
PLACE = Frames(
    ("Where is the {key}?", "In which room is the {key}?", "Where can I find the {key}?"),
    (
        "[Tell me|Say|Find out|Do you know] where the {key} is.",
        "[Which|What] room is the {key} in?",
        "[Where|In which room] [did I put|did I leave|do I find|should I look for|should I search for] the {key}?",
        "[I am looking for|I need|I cannot find] the {key}. Where is it?",
    ),
)  # fmt: skip
PLACES = Frames(
    ("Where are the {key}?", "In which room are the {key}?", "Where can I find the {key}?"),
    (
        "[Tell me|Say|Find out|Do you know] where the {key} are.",
        "[Which|What] room are the {key} in?",
        "[Where|In which room] [did I put|did I leave|do I find|should I look for] the {key}?",
        "[I am looking for|I need|I cannot find] the {key}. Where are they?",
    ),
)  # fmt: skip
DAY = Frames(
    ("When is the {key}?", "On which day is the {key}?", "What day is the {key}?"),
    (
        "[Tell me|Say|Find out|Do you know] when the {key} is.",
        "[Which|What] day is the {key}[ on|]?",
        "[When|On which day] [does the {key} take place|do we have the {key}|is the {key} planned|will the {key} be]?",
    ),
)  # fmt: skip

COLON_GAPS = ("\n", "\n", "; ", ", ", " ")
SENTENCE_GAPS = (" ", " ", "\n")
PAIRS = (
    Kind("{key}: {value}", COLON_GAPS, VALUE),
    Kind("{key}={value}", COLON_GAPS, VALUE),
    Kind("{key} = {value}", ("\n", "; ", ", "), VALUE),
    Kind("{key} - {value}", ("\n", "; ", ", "), VALUE),
    Kind("{key} -> {value}", ("\n", "; ", ", "), VALUE),
    Kind('"{key}": "{value}"', (", ", ",\n"), VALUE),
    Kind("{key},{value}", ("\n",), VALUE),
    Kind("| {key} | {value} |", ("\n",), VALUE),
)
SENTENCES = {
    "lives": (Kind("{key} lives in {value}.", SENTENCE_GAPS, LIVES, LIVES_BACK), Kind("{key} is from {value}.", SENTENCE_GAPS, LIVES, LIVES_BACK),
              Kind("{value} is where {key} lives.", SENTENCE_GAPS, LIVES, LIVES_BACK)),
    "color": (Kind("The {key} is {value}.", SENTENCE_GAPS, COLOR, COLOR_BACK), Kind("the {key} is {value}", (", ", " and "), COLOR, COLOR_BACK)),
    "age": (Kind("{key} is {value}.", SENTENCE_GAPS, AGE, AGE_BACK), Kind("{key} is {value} years old.", SENTENCE_GAPS, AGE, AGE_BACK),
            Kind("{key} is {value}", (", ", " and "), AGE, AGE_BACK)),
    "price": (Kind("The {key} costs {value} dollars.", SENTENCE_GAPS, PRICE), Kind("{key}: {value} dollars", ("\n", ", ", "; "), PRICE),
              Kind("A {key} is {value} dollars.", SENTENCE_GAPS, PRICE)),
    "job": (Kind("{key} is a {value}.", SENTENCE_GAPS, JOB, JOB_BACK), Kind("{key} works as a {value}.", SENTENCE_GAPS, JOB, JOB_BACK)),
    "place": (Kind("The {key} is in the {value}.", SENTENCE_GAPS, PLACE), Kind("I put the {key} in the {value}.", SENTENCE_GAPS, PLACE)),
    "places": (
        Kind("The {key} are in the {value}.", SENTENCE_GAPS, PLACES),
        Kind("I put the {key} in the {value}.", SENTENCE_GAPS, PLACES),
    ),
    "day": (Kind("The {key} is on {value}.", SENTENCE_GAPS, DAY), Kind("{value}: {key}", ("\n", ", ", "; "), DAY)),
}  # fmt: skip
PEOPLE = ("lives", "age", "job")


def distinct(make: object, count: int) -> list[str]:
    """So many different strings from a maker."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None  # type: ignore[operator]
    return list(found)


def pair_items(speaker: Speaker, count: int) -> tuple[Kind, list[str], list[str], str]:
    """A list of pairs of any two kinds of things."""
    rng = speaker.rng
    people = rng.random()
    key_maker = (
        (lambda: pools.proper(rng, pools.NAMES, 0.35))
        if people < 0.4
        else (lambda: pools.scramble(rng, 2, 4) + str(rng.randrange(100)))
        if people < 0.6
        else (lambda: pools.word(rng))
    )
    value_makers = (
        lambda: str(pools.number(rng, rng.randint(1, 5))),
        lambda: pools.word(rng),
        lambda: pools.proper(rng, pools.CITIES),
        lambda: pools.scramble(rng, 3, 7),
        lambda: rng.choice(pools.COLORS),
    )
    maker = rng.choice(value_makers)
    return rng.choice(PAIRS), distinct(key_maker, count), [maker() for _ in range(count)], ""


def sentence_items(speaker: Speaker, count: int) -> tuple[Kind, list[str], list[str], str]:
    """A list of sentences of one kind."""
    rng = speaker.rng
    topic = rng.choice(tuple(SENTENCES))
    made_up = 0.3 if count < 20 else 0.6
    if topic in PEOPLE:
        keys = distinct(lambda: pools.proper(rng, pools.NAMES, made_up), count)
    elif topic == "places":
        keys = distinct(lambda: rng.choice(pools.THINGS) if count < 20 else pools.word(rng) + "s", count)
    elif topic == "day":
        keys = distinct(
            lambda: rng.choice(
                ("meeting", "party", "exam", "concert", pools.word(rng) + " class", pools.word(rng) + " trip")
            ),
            count,
        )
    else:
        keys = distinct(
            lambda: rng.choice(pools.OBJECTS) if rng.random() < 0.6 and count < 20 else pools.word(rng), count
        )
    makers = {
        "lives": lambda: pools.proper(rng, pools.CITIES),
        "color": lambda: rng.choice(pools.COLORS),
        "age": lambda: str(rng.randint(1, 99)),
        "price": lambda: str(pools.number(rng, rng.randint(1, 4))),
        "job": lambda: rng.choice(pools.JOBS),
        "place": lambda: rng.choice(pools.ROOMS),
        "places": lambda: rng.choice(pools.ROOMS),
        "day": lambda: rng.choice(pools.DAYS),
    }
    return rng.choice(SENTENCES[topic]), keys, [makers[topic]() for _ in range(count)], topic


def mix_in(speaker: Speaker, lines: list[str], keys: set[str]) -> None:
    """Puts one to four sentences on other matters among the lines."""
    rng = speaker.rng
    for _ in range(rng.randint(1, 4)):
        name, thing = pools.proper(rng, pools.NAMES), rng.choice(pools.OBJECTS)
        others = (
            f"{name} likes {rng.choice(pools.FOODS)}.",
            f"{name} has a {rng.choice(pools.ANIMALS)}.",
            f"The {thing} is {rng.choice(('old', 'new', 'big', 'small', 'heavy', 'broken'))}.",
            f"{name} is my {rng.choice(('friend', 'brother', 'sister', 'neighbor'))}.",
            pools.sentence(rng),
            f"{name} wants the {thing}.",
        )
        if not {name, thing} & keys:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(others))


def scan(keys: list[str], wanted: str) -> str:
    """Reads the keys up to the wanted one, or all of them."""
    seen = keys[: keys.index(wanted) + 1] if wanted in keys else keys
    return ", ".join(seen)


def make(speaker: Speaker, count: int) -> Draft:
    """A look-up among ``count`` entries."""
    rng = speaker.rng
    kind, keys, values, topic = (pair_items if rng.random() < 0.5 else sentence_items)(speaker, count + 1)
    missing, keys, values = keys[-1], keys[:-1], values[:-1]
    gap = rng.choice(kind.gap)
    lines = [kind.line.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    if topic and gap in SENTENCE_GAPS and rng.random() < MIXED_SHARE:
        mix_in(speaker, lines, {*keys, missing})
    body = gap.join(lines)
    if gap in (", ", " and ") and topic:
        body = body[0].upper() + body[1:] + "."
    name = f"{topic}{keys}{values}"
    if kind.backward and rng.random() < 0.3:
        return backward(speaker, kind, keys, values, body)
    if rng.random() < ABSENT_SHARE and count <= SCANNED:
        question = speaker.ask_about(body, kind.forward, key=missing)
        return Draft(f"{name}{missing}", question, f"{scan(keys, missing)}: no {missing}", ABSENT)
    index = rng.randrange(count)
    found = kind.line.format(key=keys[index], value=values[index])
    thought = f"{scan(keys, keys[index])}: yes\n{found}" if count <= SCANNED else found
    question = speaker.ask_about(body, kind.forward, key=keys[index])
    return Draft(f"{name}{index}", question, thought, values[index])


def backward(speaker: Speaker, kind: Kind, keys: list[str], values: list[str], body: str) -> Draft:
    """The key of a value that occurs once."""
    once = [i for i, value in enumerate(values) if values.count(value) == 1]
    if not once or kind.backward is None:
        return make(speaker, len(keys))
    index = speaker.rng.choice(once)
    found = kind.line.format(key=keys[index], value=values[index])
    thought = f"{scan(values, values[index])}: yes\n{found}" if len(keys) <= SCANNED else found
    question = speaker.ask_about(body, kind.backward, value=values[index])
    return Draft(f"back{keys}{values}{index}", question, thought, keys[index])


def draft(speaker: Speaker) -> Draft:
    """A look-up among two to fifteen entries."""
    return make(speaker, speaker.rng.randint(2, 15))


SECRET = Frames(
    ("What is the secret {what}?", "Which secret {what} does the text mention?"),
    (
        "[Tell me|Give me|Find|Look up|Return] the secret {what}[ in this text| from the text|].",
        "[What|Which] secret {what} [is in the text|did you read|is hidden in the text|is mentioned]?",
        "[There is|The text has] a secret {what}. [What is it|Find it|Tell me]?",
    ),
)  # fmt: skip


def needle(speaker: Speaker, sentences: int) -> Draft:
    """One sentence with a secret among many others."""
    rng = speaker.rng
    what = rng.choice(("code", "number", "word", "name", "password"))
    secret = {
        "code": lambda: pools.scramble(rng, 4, 8, "abcdefghjkmnpqrstuvwxyz23456789"),
        "number": lambda: str(pools.number(rng, rng.randint(2, 6))),
        "word": lambda: pools.word(rng),
        "name": lambda: pools.proper(rng, pools.NAMES, 0.5),
        "password": lambda: pools.word(rng) + str(rng.randrange(1000)),
    }[what]()
    lines = [pools.sentence(rng) for _ in range(sentences)]
    found = f"The secret {what} is {secret}."
    lines.insert(rng.randrange(sentences + 1), found)
    return Draft(f"needle {what} {secret}", speaker.ask_about(" ".join(lines), SECRET, what=what), found, secret)


def recall(speaker: Speaker, longest: int = 70) -> Draft:
    """A look-up in a text of up to ``longest`` entries (about ten tokens each)."""
    count = speaker.rng.randint(SCANNED + 1, longest)
    return needle(speaker, count * 2 // 3) if speaker.rng.random() < 0.35 else make(speaker, count)
