"""Extracting fields of a text as JSON."""

# ruff: noqa: E501 (tables of sentences)

from .. import pools
from ..chat import compact
from ..phrases import Frames, Speaker
from .example import Draft

FAMILY = "json"

EXTRACT = Frames(
    ("Extract {fields} as JSON from this text: {text}", "{text}\nReturn a JSON object with the keys {fields}.",
     "Text: {text}\nGive {fields} as JSON.", "Extract {fields} as JSON: {text}"),
    (
        "[Extract|Get|Pull out|Find|Take|Read] [the |]{fields} [from|out of] [this text|the text|this sentence|the following text|this] [as JSON|in JSON|as a JSON object|and answer in JSON]: {text}",
        "{text}\n[Extract|Give me|Return|Get|List|Write|Output] [the |]{fields} [as JSON|in JSON|in JSON format|as a JSON object].",
        "[Turn|Convert|Transform] this [text|sentence] [into|to] JSON with [the keys|the fields|keys|fields] {fields}: {text}",
        "[Return|Make|Build|Write|Create|Produce|Give me] [JSON|a JSON object|a JSON] with [the keys|the fields|keys|fields|] {fields} [from|for|for this text|from this text]: {text}",
        "[JSON with|JSON keys|Keys|Fields][:|] {fields}\n[Text: |]{text}",
        "{text}\n[JSON with|What are|I need] [the |]{fields}[ as JSON| in JSON]?",
        "[I need|I want|Fill in] [the fields |the keys |]{fields} as JSON. [Text: |The text: |Here is the text: ]{text}",
        "Parse this [text|sentence] into JSON ({fields}): {text}",
    ),
)  # fmt: skip
SENTENCES = {
    "city": ("lives in {}", "is from {}", "moved to {}", "comes from {}"),
    "job": ("works as a {}", "is a {}", "has a job as a {}"),
    "age": ("is {} years old", "turned {} this year", "is {}"),
    "color": ("likes the color {}", "always wears {}", "prefers {}"),
    "animal": ("has a {}", "owns a {}", "keeps a {}"),
    "food": ("likes to eat {}", "loves {}", "often eats {}"),
    "company": ("works for {}", "works at {}", "runs the company {}"),
    "country": ("was born in {}", "travels to {}", "has family in {}"),
    "language": ("speaks {}", "is learning {}"),
    "phone": ("can be reached at {}", "has the phone number {}"),
    "email": ("has the email {}", "writes from {}"),
}


def person_values(speaker: Speaker) -> dict[str, object]:
    """A person's fields."""
    rng = speaker.rng
    name = pools.proper(rng, pools.NAMES, 0.35)
    if rng.random() < 0.2:
        name += " " + pools.syllables(rng, 2).capitalize()
    return {
        "name": name,
        "city": pools.proper(rng, pools.CITIES, 0.35),
        "job": rng.choice(pools.JOBS),
        "age": rng.randint(1, 99),
        "color": rng.choice(pools.COLORS),
        "animal": rng.choice(pools.ANIMALS),
        "food": rng.choice(pools.FOODS),
        "company": pools.proper(rng, pools.COMPANIES, 0.5),
        "country": rng.choice(pools.COUNTRIES),
        "language": rng.choice(pools.LANGUAGES),
        "phone": f"555-{rng.randrange(10000):04d}",
        "email": f"{name.split()[0].lower()}@{rng.choice(('mail', 'post', pools.syllables(rng, 2)))}.{rng.choice(('com', 'org', 'net'))}",
    }


def person(speaker: Speaker) -> tuple[str, dict[str, object]]:
    """Sentences on a person, and the fields they tell."""
    rng = speaker.rng
    values = person_values(speaker)
    keys = rng.sample(list(SENTENCES), rng.randint(1, 5))
    clauses = [rng.choice(SENTENCES[key]).format(values[key]) for key in keys]
    pronoun = rng.choice(("He", "She"))
    style = rng.random()
    if style < 0.35:
        text = f"{values['name']} " + (", ".join(clauses[:-1]) + " and " if clauses[1:] else "") + clauses[-1] + "."
    elif style < 0.6:
        text = f"My name is {values['name']}. " + " ".join(f"{pronoun} {clause}." for clause in clauses)
        text = text if style < 0.45 else text.replace("My name is", rng.choice(("This is", "Meet", "The name is")))
    else:
        text = f"{values['name']} {clauses[0]}. " + " ".join(f"{pronoun} {clause}." for clause in clauses[1:])
    return text.strip(), {key: values[key] for key in ["name", *keys]}


def record(speaker: Speaker) -> tuple[str, dict[str, object]]:
    """An order, an event or any record of named fields."""
    rng = speaker.rng
    makers = {
        "product": lambda: rng.choice(pools.OBJECTS),
        "price": lambda: rng.randint(1, 999),
        "quantity": lambda: rng.randint(1, 99),
        "date": lambda: f"{rng.randint(2020, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "customer": lambda: pools.proper(rng, pools.NAMES, 0.4),
        "day": lambda: rng.choice(pools.DAYS),
        "time": lambda: f"{rng.randrange(24)}:{rng.randrange(60):02d}",
        "room": lambda: rng.randint(1, 500),
        "floor": lambda: rng.randint(1, 30),
        "title": lambda: rng.choice(pools.TITLES),
        "author": lambda: pools.proper(rng, pools.NAMES, 0.4),
        "year": lambda: rng.randint(1900, 2030),
        "status": lambda: rng.choice(("open", "closed", "paid", "pending", "shipped", "late")),
        "id": lambda: rng.randint(100, 99999),
        "color": lambda: rng.choice(pools.COLORS),
        "city": lambda: pools.proper(rng, pools.CITIES),
        "model": lambda: pools.scramble(rng, 2, 4).upper() + str(rng.randrange(100)),
    }
    keys = rng.sample(list(makers), rng.randint(2, 5))
    if rng.random() < 0.3:
        keys[0] = pools.word(rng)
        makers[keys[0]] = lambda: pools.word(rng)
    values: dict[str, object] = {key: makers[key]() for key in dict.fromkeys(keys)}
    form, gap = rng.choice(
        (
            ("{}: {}", ", "),
            ("{} {}", ", "),
            ("the {} is {}", ", "),
            ("{}: {}", "\n"),
            ("{}={}", " "),
            ("{} is {}", "; "),
        )
    )
    lead = rng.choice(("", "", "Order: ", "Record: ", "Note: ")) if gap != "\n" else ""
    text = lead + gap.join(form.format(key, value) for key, value in values.items())
    return (text[0].upper() + text[1:] if form.startswith("the") and not lead else text), values


def field_list(speaker: Speaker, fields: list[str]) -> str:
    """The wanted keys as a person lists them."""
    rng = speaker.rng
    if len(fields) > 1 and rng.random() < 0.45:
        return ", ".join(fields[:-1]) + rng.choice((" and ", ", and ")) + fields[-1]
    return rng.choice((", ", ", ", ",", " ")).join(fields)


def draft(speaker: Speaker) -> Draft:
    """Some fields of a text as compact JSON, in the order asked."""
    text, values = (person if speaker.rng.random() < 0.6 else record)(speaker)
    fields = speaker.rng.sample(list(values), speaker.rng.randint(1, len(values)))
    question = speaker.say(EXTRACT, fields=field_list(speaker, fields), text=text)
    thought = "\n".join(f"{field}: {values[field]}" for field in fields)
    return Draft(text + str(fields), question, thought, compact({field: values[field] for field in fields}))
