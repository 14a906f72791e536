"""Copying, reversing, spelling, counting letters."""

# ruff: noqa: E501 (tables of sentences)

import string

from .. import pools
from ..phrases import Frames, Speaker
from .example import Draft

FAMILY = "copy"
MARKS = ("{}", "{}", '"{}"', "'{}'")

REPEAT = Frames(
    ("Repeat this exactly: {text}", "Copy this text: {text}", "Say this again: {text}", "Repeat after me: {text}", "Repeat: {text}"),
    (
        "[Repeat|Copy|Echo|Write out|Type] [this|the following|the text|this text|this sentence|what I say|these words|my text][ exactly| word for word| as it is| without changes|]: {text}",
        "[Say|Write|Print|Output|Return|Give me back] [exactly|just|only] [this|the following|this text|these words]: {text}",
        "[Echo|Copy|Repeat][:|] {text}",
        "[What did I just write|What does this say|Read this back to me]: {text}",
        "[Say it back to me|Repeat it|Copy it|Send it back]: {text}",
    ),
)  # fmt: skip
REVERSE_WORDS = Frames(
    ("Reverse the order of these words: {text}", "Write these words backwards, last word first: {text}"),
    (
        "[Reverse|Turn around|Flip|Invert] the [word order|order of the words|order of these words|order of the words in this sentence][ of this| here|]: {text}",
        "[Write|Say|Give me|List] [these words|the words|this list of words] in [reverse|reversed|opposite|backward] order: {text}",
        "[Start with the last word|Last word first|From the last word to the first]: {text}",
        "[Put|Bring] these words in [reverse|the opposite] order: {text}",
    ),
)  # fmt: skip
SPELL = Frames(
    ("Spell the word {word}.", "Spell {word}.", "How do you spell {word}?", "Spell {word} letter by letter."),
    (
        "[Spell|Spell out|Please spell] [the word |]{word}[ for me| letter by letter| with dashes| slowly|].",
        "[What is|Tell me|Give me|Show me] the spelling of [the word |]{word}.",
        "[How is|How would you spell|How does one spell|How do I spell] [the word |]{word}[ spelled|]?",
        "[Write|Say|Give me|List|Show me] the letters of [the word |]{word}[ one by one| separately| one at a time|].",
        "[Which letters are in|What letters make up|What are the letters of] [the word |]{word}?",
        "[spell|spelling|letters][:|] {word}",
    ),
)  # fmt: skip
REVERSE = Frames(
    ("Reverse the letters of the word {word}.", "Write {word} backwards.", "Reverse {word}.", "Reverse the word {word}."),
    (
        "[Reverse|Flip|Turn around|Invert] [the word |the letters of |the string |the letters in |]{word}[ please| for me|].",
        "[Write|Say|Spell|Type|Give me|Print] [the word |]{word} [backwards|backward|in reverse|from back to front|the other way round|reversed].",
        "[What is|What's] [the word |]{word} [backwards|spelled backwards|in reverse|reversed|written backwards|from right to left]?",
        "[How do you write|How would you write|How does one spell] {word} [backwards|in reverse]?",
        "[reverse|backwards|reversed][:|] {word}",
        "[What do you get if you|What happens when you] [reverse|flip|read] {word}[ backwards|]?",
    ),
)  # fmt: skip
LENGTH = Frames(
    ("How many letters are in {word}?", "How many letters does {word} have?", "Count the letters of {word}."),
    (
        "[Count|Tell me the number of|Find the number of] [the |]letters [in|of] [the word |]{word}.",
        "[How long is|What is the length of|What is the number of letters in] [the word |]{word}?",
        "How many [letters|characters] [are there in|has|are in|does one need for|make up] [the word |]{word}?",
        "[length|number of letters][:| of] {word}",
    ),
)  # fmt: skip
OCCURRENCES = Frames(
    ("How many {letter} are in {word}?", "How many times does the letter {letter} occur in {word}?", "How many {letter}'s are in {word}?",
     "How many {letter}s in {word}?"),
    (
        "[Count|Tell me the number of|Count up] the [letter |]{letter}[s|'s|] in [the word |]{word}.",
        "[How often|How many times] [does|is] [the letter |]{letter} [appear|occur|found|come up|used] in [the word |]{word}?",
        "How many [letters |times |]{letter}[s|'s|] [are there in|does|has|can you find in|are in] [the word |]{word}[ have|]?",
        "[In the word|In] {word}, how many {letter}[s|'s] are there?",
    ),
)  # fmt: skip
EDGE = Frames(
    ("What is the {edge} letter of {word}?", "Which letter does {word} {verb} with?"),
    (
        "[Tell me|Give me|Say|Show me|Find|Name] the {edge} letter [of|in] [the word |]{word}.",
        "[What|Which] letter [is|comes|stands] {edge} in [the word |]{word}?",
        "[What|Which] letter does [the word |]{word} {verb} with?",
        "[The word |]{word} {verb}s with [which|what] letter?",
    ),
)  # fmt: skip
CAPITALS = Frames(
    ("Write {word} in capital letters.", "Write {word} in uppercase.", "Convert {word} to uppercase."),
    (
        "[Write|Print|Say|Give me|Type|Put] [the word |]{word} in [capital letters|capitals|uppercase|upper case|big letters|all caps].",
        "[Convert|Change|Turn|Transform] [the word |]{word} [to|into] [uppercase|upper case|capital letters|capitals|all caps].",
        "[What is|How do you write] {word} in [capital letters|uppercase|capitals]?",
        "[uppercase|upper|capitals][:|] {word}",
        "[Capitalize all letters of|Make all letters big in|Uppercase] {word}.",
    ),
)  # fmt: skip


def some_text(speaker: Speaker) -> str:
    """Something to copy: words, a sentence, a code, a mixture."""
    rng = speaker.rng
    choice = rng.random()
    if choice < 0.35:
        return " ".join(pools.word(rng) for _ in range(rng.randint(1, 12)))
    if choice < 0.7:
        return " ".join(pools.sentence(rng) for _ in range(rng.randint(1, 2)))
    if choice < 0.85:
        return pools.scramble(rng, 2, 14, string.ascii_letters + string.digits)
    makers = (
        lambda: pools.word(rng),
        lambda: pools.scramble(rng, 2, 6),
        lambda: str(pools.number(rng, 3)),
        lambda: pools.proper(rng, pools.NAMES, 0.5),
    )
    return " ".join(rng.choice(makers)() for _ in range(rng.randint(2, 8)))


def some_word(speaker: Speaker) -> tuple[str, str]:
    """A word to take apart, and the word as the question shows it."""
    rng = speaker.rng
    choice = rng.random()
    if choice < 0.6:
        word = pools.word(rng)
    elif choice < 0.72:
        word = rng.choice(pools.OBJECTS + pools.ANIMALS + pools.FOODS)
    elif choice < 0.8:
        word = pools.proper(rng, rng.choice((pools.NAMES, pools.CITIES)))
    else:
        word = pools.scramble(rng, 2, 9) if choice < 0.9 else pools.syllables(rng, rng.randint(1, 4))
    return word, rng.choice(MARKS).format(word)


def repeat(speaker: Speaker) -> Draft:
    """The same text again."""
    text = some_text(speaker)
    shown = speaker.rng.choice(MARKS).format(text) if speaker.rng.random() < 0.3 else text
    return Draft(f"repeat {text}", speaker.say(REPEAT, text=shown), "copy the text", text)


def reverse_words(speaker: Speaker) -> Draft:
    """The words, last one first."""
    items = speaker.rng.sample(pools.words(), speaker.rng.randint(2, 9))
    thought = "\n".join(f"{i} {item}" for i, item in enumerate(items, 1))
    return Draft(f"words {items}", speaker.say(REVERSE_WORDS, text=" ".join(items)), thought, " ".join(reversed(items)))


def spell(speaker: Speaker) -> Draft:
    """The letters with dashes."""
    word, shown = some_word(speaker)
    return Draft(f"spell {word}", speaker.say(SPELL, word=shown), " ".join(word), "-".join(word), by_letters=True)


def reverse(speaker: Speaker) -> Draft:
    """The letters from the back."""
    word, shown = some_word(speaker)
    thought = " ".join(word) + "\n" + " ".join(reversed(word))
    return Draft(
        f"reverse {word}", speaker.say(REVERSE, word=shown), thought, word[::-1], by_letters=True, is_hard=True
    )


def length(speaker: Speaker) -> Draft:
    """How many letters."""
    word, shown = some_word(speaker)
    thought = " ".join(word) + "\n" + " ".join(f"{letter} {i}" for i, letter in enumerate(word, 1))
    return Draft(f"length {word}", speaker.say(LENGTH, word=shown), thought, str(len(word)), is_hard=True)


def occurrences(speaker: Speaker) -> Draft:
    """How often a letter occurs."""
    word, shown = some_word(speaker)
    word, shown = word.lower(), shown.lower()
    letter = speaker.rng.choice(word) if speaker.rng.random() < 0.8 else speaker.rng.choice(string.ascii_lowercase)
    count, parts = 0, []
    for char in word:
        count += char == letter
        parts.append(f"{char} {count}")
    question = speaker.say(
        OCCURRENCES, word=shown, letter=speaker.rng.choice((letter, letter, f'"{letter}"', f"'{letter}'"))
    )
    return Draft(f"occurs {letter} {word}", question, " ".join(word) + "\n" + " ".join(parts), str(count), is_hard=True)


def edge(speaker: Speaker) -> Draft:
    """The first or the last letter."""
    word, shown = some_word(speaker)
    is_first = speaker.rng.random() < 0.5
    slots = {"edge": "first", "verb": "start"} if is_first else {"edge": "last", "verb": "end"}
    question = speaker.say(EDGE, word=shown, **slots)
    return Draft(f"edge {is_first} {word}", question, " ".join(word), word[0] if is_first else word[-1])


def capitals(speaker: Speaker) -> Draft:
    """The word in capitals."""
    word, shown = some_word(speaker)
    return Draft(f"capitals {word}", speaker.say(CAPITALS, word=shown), " ".join(word), word.upper(), by_letters=True)


def draft(speaker: Speaker) -> Draft:
    """A task on the letters or words of a text."""
    kinds = (repeat, reverse_words, spell, reverse, length, occurrences, edge, capitals)
    return speaker.rng.choices(kinds, (20, 9, 18, 18, 8, 14, 5, 8))[0](speaker)
