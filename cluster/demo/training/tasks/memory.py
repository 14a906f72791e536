"""Several turns: the user tells facts, and asks for one later."""

# ruff: noqa: E501 (tables of sentences)

from dataclasses import dataclass

from .. import pools
from ..phrases import Frames, Speaker, expand, lowered
from .example import Draft

FAMILY = "memory"
UNKNOWN = "You have not told me that."


@dataclass(frozen=True)
class Fact:
    """Something a user can tell: its values, how it is told, corrected, asked for and answered."""

    pool: tuple[str, ...]
    made_up: float
    tell: Frames
    ask: Frames
    answer: str


def fact(
    pool: tuple[str, ...],
    made_up: float,
    tell: tuple[str, ...],
    basic: tuple[str, ...],
    more: tuple[str, ...],
    answer: str,
) -> Fact:
    """A fact with its frames."""
    return Fact(pool, made_up, Frames(tell), Frames(basic, more), answer)


NUMBERS = tuple(map(str, range(2, 1000)))
FACTS = {
    "name": fact(pools.NAMES, 0.3, ("[My name is|I am|I'm|You can call me|They call me|My name's] {}[.|]", "[Hi|Hello], [my name is|I am|I'm] {}."),
                 ("What is my name?", "What's my name?", "Who am I?"),
                 ("[Do you remember|Can you tell me|Tell me|Say|Do you still know] my name?", "[What am I called|How am I called|What was my name|What was my name again]?", "[Which name did I tell you|What name did I give you]?"),
                 "Your name is {}."),
    "color": fact(pools.COLORS, 0, ("My favorite color is {}.", "I like {} best.", "[I love|I really like] the color {}.", "My favourite colour is {}."),
                  ("What is my favorite color?", "Which color do I like?", "What's my favorite color?"),
                  ("[Do you remember|Can you tell me|Tell me|Say|Do you still know] my [favorite color|favourite colour]?", "[Which|What] [color|colour] do I [like|love|like best|prefer]?", "[Which|What] is the [color|colour] I [like|love]?"),
                  "Your favorite color is {}."),
    "city": fact(pools.CITIES, 0.3, ("I live in {}.", "My home is in {}.", "[I moved to|I come from|I am from|I'm from] {}."),
                 ("Where do I live?", "Which city do I live in?", "Where am I from?"),
                 ("[Do you remember|Can you tell me|Tell me|Say|Do you still know] where I live?", "[Which|What] [city|place|town] [do I live in|is my home|did I tell you]?", "In [which|what] city [do I live|is my home]?"),
                 "You live in {}."),
    "pet": fact(pools.ANIMALS, 0, ("I have a {}.", "My pet is a {}.", "I own a {}.", "[I keep|At home I have|I just got] a {}."),
                ("What pet do I have?", "Which animal do I have?", "What is my pet?"),
                ("[Do you remember|Can you tell me|Tell me|Say|Do you still know] [which pet|what pet|which animal] I have?", "[Which|What] [animal|pet] [do I own|do I keep|lives with me|is mine]?", "[What kind of|Which kind of] [pet|animal] do I have?"),
                "You have a {}."),
    "job": fact(pools.JOBS, 0, ("I work as a {}.", "My job is {}.", "[I am a|I'm a] {}.", "I earn my money as a {}."),
                ("What is my job?", "What do I do for work?", "What's my job?"),
                ("[Do you remember|Can you tell me|Tell me|Say|Do you still know] my job?", "[Which|What] [job|profession|work] do I [have|do]?", "[What do I work as|What am I by profession|How do I earn my money]?"),
                "You work as a {}."),
    "food": fact(pools.FOODS, 0, ("I love {}.", "My favorite food is {}.", "[I like to eat|I always eat|I really like] {}."),
                 ("What is my favorite food?", "What do I like to eat?", "What food do I like?"),
                 ("[Do you remember|Can you tell me|Tell me|Say|Do you still know] my favorite food?", "[Which|What] food do I [like|love|prefer|like best]?", "What do I [love|like|want] to eat?"),
                 "Your favorite food is {}."),
    "number": fact(NUMBERS, 0, ("My lucky number is {}.", "Remember the number {}.", "[Keep in mind|Note|Please remember] the number {}."),
                   ("What is my lucky number?", "Which number should you remember?", "What was the number?"),
                   ("[Do you remember|Can you tell me|Tell me|Say|Do you still know] my number?", "[Which|What] number [did I tell you|did I say|did I give you|was it]?", "[What is|What was] [my number|the number I told you]?"),
                   "Your number is {}."),
    "friend": fact(pools.NAMES, 0.3, ("My best friend is {}.", "[My friend is called|My best friend's name is|I have a friend named] {}."),
                   ("Who is my best friend?", "What is the name of my friend?", "Who is my friend?"),
                   ("[Do you remember|Can you tell me|Tell me|Say|Do you still know] the name of my friend?", "[What is my friend called|How is my friend called|What's my friend's name]?", "[Which friend did I mention|Who did I say is my friend]?"),
                   "Your friend is {}."),
    "word": fact((), 1, ("Remember the word {}.", "[The secret word is|The password is|The code word is|Keep in mind the word] {}."),
                 ("What is the word?", "Which word should you remember?", "What was the secret word?"),
                 ("[Do you remember|Can you tell me|Tell me|Say|Do you still know] the word?", "[Which|What] word [did I tell you|did I say|did I give you|was it]?", "[What is|What was] the [password|code word|secret word]?"),
                 "The word is {}."),
}  # fmt: skip
NOTED = "Okay, I will remember that."
TELL_SHARE = 0.2
CORRECTION = Frames(("No, {said}", "Sorry, {said}", "Correction: {said}", "Wait, {said}", "Actually, {said}"))


def value_of(speaker: Speaker, name: str) -> str:
    """A value of a fact."""
    known = FACTS[name]
    return pools.proper(speaker.rng, known.pool, known.made_up) if known.pool else pools.word(speaker.rng)


def turn(user: str, assistant: str) -> list[dict[str, str]]:
    """An exchange that lies in the past."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def noted(name: str, value: str) -> str:
    """What the assistant says when it is told a fact."""
    return f"Nice to meet you, {value}!" if name == "name" else NOTED


def words_for(speaker: Speaker, name: str, value: str) -> str:
    """The fact as the user tells it."""
    frame = speaker.rng.choice(FACTS[name].tell.basic)
    return expand(speaker.rng, frame).format(value)


def tell(speaker: Speaker, name: str, value: str) -> list[dict[str, str]]:
    """The exchange in which a fact is told."""
    return turn(words_for(speaker, name, value), noted(name, value))


def correct(speaker: Speaker, name: str, value: str) -> list[dict[str, str]]:
    """The exchange in which a fact is corrected."""
    said = lowered(expand(speaker.rng, FACTS[name].tell.basic[0])).format(value)
    return turn(expand(speaker.rng, speaker.rng.choice(CORRECTION.basic)).format(said=said), noted(name, value))


def told_last(speaker: Speaker, past: list[dict[str, str]], values: dict[str, str]) -> Draft:
    """A conversation that ends with one more fact told."""
    name = speaker.rng.choice(list(FACTS))
    value = value_of(speaker, name)
    said = words_for(speaker, name, value)
    past = past if speaker.rng.random() < 0.5 else []
    key = f"tell {value} {values}" if past else ""
    return Draft(
        key, said, f"remember {name}: {value}", noted(name, value), messages=(*past, {"role": "user", "content": said})
    )


def draft(speaker: Speaker) -> Draft:
    """One to five facts told, perhaps one corrected, one asked for."""
    rng = speaker.rng
    names = rng.sample(list(FACTS), rng.randint(1, 5))
    values: dict[str, str] = {}
    past: list[dict[str, str]] = []
    for name in names:
        values[name] = value_of(speaker, name)
        past += tell(speaker, name, values[name])
        if rng.random() < 0.15:
            asked = rng.choice(list(values))
            past += turn(rng.choice(FACTS[asked].ask.basic), FACTS[asked].answer.format(values[asked]))
    if rng.random() < 0.2:
        changed = rng.choice(names)
        values[changed] = value_of(speaker, changed)
        past += correct(speaker, changed, values[changed])
    if rng.random() < TELL_SHARE and not speaker.heldout:
        return told_last(speaker, past, values)
    if rng.random() < 0.15:
        asked = rng.choice([name for name in FACTS if name not in values])
        thought, answer = f"told: {', '.join(values)}. not {asked}", UNKNOWN
    else:
        asked = rng.choice(names)
        thought, answer = f"{asked}: {values[asked]}", FACTS[asked].answer.format(values[asked])
    question = speaker.say(FACTS[asked].ask)
    key = asked + str(values)
    return Draft(key, question, thought, answer, messages=(*past, {"role": "user", "content": question}))
