"""Finding a value in a list of pairs or in sentences, also when it is not there; ``recall``: in long texts."""

from collections.abc import Callable

from .. import pools
from ..phrases import Frames, Speaker
from .example import Draft
from .lists import PAIRS, PEOPLE, SENTENCE_GAPS, SENTENCES, Kind

FAMILY = "lookup"
RECALL = "recall"
ABSENT = "That is not in the list."
ABSENT_SHARE = 0.25
MIXED_SHARE = 0.3
SCANNED = 24  # lists up to this long are scanned key by key


def distinct(make: Callable[[], str], count: int) -> list[str]:
    """So many different strings from a maker."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
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
