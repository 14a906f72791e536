"""Lists: sorting, smallest and largest, counting, picking the n-th."""

# ruff: noqa: E501 (tables of sentences)

from .. import pools
from ..phrases import Frames, Speaker, listing
from .example import Draft

FAMILY = "sort"
LONGEST = 8  # items

UP = Frames(
    ("Sort {list}", "Sort these numbers: {list}", "Sort {list} in ascending order.", "Put these numbers in order: {list}",
     "Sort from smallest to largest: {list}", "sort {list}"),
    (
        "[Sort|Order|Arrange|Rank] [these|the following|the|my|this list of] numbers[ in ascending order| from smallest to largest| from low to high| ascending|, smallest first|]: {list}.",
        "[Sort|Order|Arrange|Put|Bring] {list} [in ascending order|from smallest to largest|from low to high|from lowest to highest|in increasing order|with the smallest first].",
        "[Put|Bring|Place] [these numbers|these|the numbers|this list|the following numbers] in [order|ascending order|increasing order|the right order]: {list}.",
        "[What is|Give me|Show me|Write] [the sorted list of|the ascending order of|the sorted version of] {list}.",
        "[Can you sort|I need you to sort|Help me sort|I want to sort] [these numbers|this list|these][:|] {list}.",
        "[sorted|sort|ascending|in order]: {list}",
        "[Here are some numbers|My numbers are|I have these numbers]: {list}. [Sort them|Put them in order|Order them|Sort them from smallest to largest].",
    ),
)  # fmt: skip
DOWN = Frames(
    ("Sort {list} in descending order.", "Sort from largest to smallest: {list}", "Sort descending: {list}"),
    (
        "[Sort|Order|Arrange|Rank] [these|the following|the|my|this list of] numbers [in descending order|from largest to smallest|from high to low|descending|largest first]: {list}.",
        "[Sort|Order|Arrange|Put|Bring] {list} [in descending order|from largest to smallest|from high to low|from highest to lowest|in decreasing order|with the largest first|in reverse order].",
        "[Put|Bring|Place] [these numbers|these|the numbers|this list] in [descending|decreasing] order: {list}.",
        "[Give me|Show me|Write] [the descending order of|the numbers largest first:] {list}.",
        "[I have these numbers|My numbers are]: {list}. [Sort them from largest to smallest|Order them descending|Put the largest first].",
    ),
)  # fmt: skip
SMALLEST = Frames(
    ("What is the smallest number in {list}?", "Which number is the smallest: {list}?", "Find the minimum of {list}.", "min {list}"),
    (
        "[What is|What's|Find|Give me|Tell me|Which is|Show me|Pick] the [smallest|lowest|least|minimum] [number|value|one] [in|of|among|from|out of] {list}.",
        "[Which|What] number is [the smallest|the lowest|smallest|lowest] [here|in this list|]: {list}?",
        "[min|minimum|smallest|lowest][:|] {list}",
        "[Find|Tell me|Give me|Calculate|Determine] the [minimum|min|smallest|lowest] of [these numbers: |this list: |]{list}.",
        "[I have these numbers|My numbers are|Look at these numbers]: {list}. Which [one |]is the [smallest|lowest|minimum]?",
    ),
)  # fmt: skip
LARGEST = Frames(
    ("What is the largest number in {list}?", "Which number is the largest: {list}?", "Find the maximum of {list}.", "max {list}",
     "Which number is the biggest: {list}?"),
    (
        "[What is|What's|Find|Give me|Tell me|Which is|Show me|Pick] the [largest|highest|greatest|biggest|maximum] [number|value|one] [in|of|among|from|out of] {list}.",
        "[Which|What] number is [the largest|the highest|the biggest|largest|biggest|greatest] [here|in this list|]: {list}?",
        "[max|maximum|largest|biggest|highest][:|] {list}",
        "[Find|Tell me|Give me|Calculate|Determine] the [maximum|max|largest|highest|biggest] of [these numbers: |this list: |]{list}.",
        "[I have these numbers|My numbers are|Look at these numbers]: {list}. Which [one |]is the [largest|biggest|highest|maximum]?",
    ),
)  # fmt: skip
COMPARE = Frames(
    ("Which is {word}, {a} or {b}?", "What is {word}: {a} or {b}?", "Is {a} or {b} {word}?"),
    (
        "[Which number|Which one|What|Which of the two] is {word}[,|:] {a} or {b}?",
        "[Tell me|Say] which [is|number is|one is] {word}[,|:] {a} or {b}.",
        "[Compare {a} and {b}|Look at {a} and {b}|Take {a} and {b}][.|:] Which [one |]is {word}?",
        "Of {a} and {b}, which [one |]is {word}?",
    ),
)  # fmt: skip
ABOVE = Frames(
    ("How many of these numbers are greater than {t}: {list}?", "Count the numbers above {t}: {list}"),
    (
        "How many [numbers|values|of them|of these] [in {list}|of {list}|among {list}] are [greater|larger|bigger|more|higher] than {t}?",
        "[Count|Tell me how many of] [the numbers|these numbers] [are |]above {t}[ in this list|]: {list}.",
        "[In this list|Among these numbers|Of these numbers], how many are [above|over|greater than|larger than] {t}[:|?] {list}",
        "[Here are some numbers|My numbers are]: {list}. How many are [above|over|greater than|bigger than] {t}?",
    ),
)  # fmt: skip
COUNT = Frames(
    ("How many words are in this list: {list}?", "Count the items: {list}", "How many items: {list}?", "Count the words: {list}"),
    (
        "[How many|What number of] [words|items|things|elements|entries] [are in this list|are there|do you see|does this list have|are here][:|?] {list}",
        "[Count|Count up|Please count|Tell me the number of] [the items|the words|the elements|these items|these words|these][:|] {list}.",
        "[What is the length of|How long is] [this list|the list|my list][:|?] {list}",
        "[Here is my list|My list]: {list}. How many [items|words|things] [are there|does it have|is that]?",
    ),
)  # fmt: skip
NTH = Frames(
    ("What is the {nth} word in this list: {list}?", "Which item is the {nth} one: {list}?", "What is the {nth} item of {list}?"),
    (
        "[What is|What's|Give me|Tell me|Find|Show me|Name|Pick] the {nth} [word|item|one|element|entry] [of|in|from] [this list: |the list |these: |]{list}.",
        "[Which|What] [word|item|one] [comes|is|stands] {nth} [in|in this list:|in the list] {list}?",
        "[My list|Here is my list|The list]: {list}. [What is|Which is|Give me] the {nth} [one|item|word]?",
    ),
)  # fmt: skip
ALPHABET = Frames(
    ("Sort these words alphabetically: {list}", "Put these words in alphabetical order: {list}", "Sort {list} alphabetically."),
    (
        "[Sort|Order|Arrange|Rank] [these|the following|my|the] words [alphabetically|in alphabetical order|from a to z|by the alphabet]: {list}.",
        "[Sort|Order|Arrange|Put|Bring] {list} [in alphabetical order|alphabetically|from a to z|into alphabetical order].",
        "[Alphabetize|Alphabetical order|alphabetically|Order by letter][:|] {list}",
        "[My words are|I have these words]: {list}. [Sort them alphabetically|Put them in alphabetical order].",
    ),
)  # fmt: skip


def some_numbers(speaker: Speaker) -> list[int]:
    """Two to ten numbers of similar length."""
    rng = speaker.rng
    longest = rng.choice((1, 2, 2, 3, 3, 4))
    return [pools.number(rng, rng.randint(max(1, longest - 1), longest)) for _ in range(rng.randint(2, LONGEST))]


def text_of(speaker: Speaker, items: list) -> str:
    """The items as a person may write them."""
    return listing(speaker.rng, list(map(str, items)))


def selection_steps(items: list, ordered: list) -> str:
    """Selection sort: the next item, and what is left."""
    rest, lines = list(items), []
    for item in ordered:
        rest.remove(item)
        lines.append(f"{item}; left " + (" ".join(map(str, rest)) or "none"))
    return "\n".join(lines)


def sort(speaker: Speaker) -> Draft:
    """Numbers up or down."""
    numbers = some_numbers(speaker)
    down = speaker.rng.random() < 0.33
    ordered = sorted(numbers, reverse=down)
    question = speaker.say(DOWN if down else UP, list=text_of(speaker, numbers))
    thought = " ".join(map(str, numbers)) + "\n" + selection_steps(numbers, ordered)
    return Draft(f"sort{down}{numbers}", question, thought, ", ".join(map(str, ordered)), is_hard=True)


def extreme(speaker: Speaker) -> Draft:
    """The smallest or the largest number, kept while reading."""
    numbers = some_numbers(speaker)
    smallest = speaker.rng.random() < 0.5
    best, lines = numbers[0], []
    for number in numbers:
        best = (min if smallest else max)(best, number)
        lines.append(f"{number} best {best}")
    question = speaker.say(SMALLEST if smallest else LARGEST, list=text_of(speaker, numbers))
    return Draft(f"extreme{smallest}{numbers}", question, "\n".join(lines), str(best), is_hard=True)


def compare(speaker: Speaker) -> Draft:
    """Two numbers: which is larger."""
    rng = speaker.rng
    digits = rng.randint(1, 5)
    a, b = rng.sample(range(10 ** (digits - 1), 10**digits), 2)
    smaller = rng.random() < 0.5
    word = rng.choice(("smaller", "less", "lower") if smaller else ("larger", "bigger", "greater", "more", "higher"))
    best = (min if smaller else max)(a, b)
    return Draft(
        f"compare{smaller}{a},{b}",
        speaker.say(COMPARE, a=a, b=b, word=word),
        f"{a} best {a}\n{b} best {best}",
        str(best),
    )


def count_above(speaker: Speaker) -> Draft:
    """How many numbers are above a bound."""
    numbers = some_numbers(speaker)
    bound = speaker.rng.choice([*numbers, 50, 10, 100])
    count, lines = 0, []
    for number in numbers:
        count += number > bound
        lines.append(f"{number} {'yes' if number > bound else 'no'} {count}")
    question = speaker.say(ABOVE, t=bound, list=text_of(speaker, numbers))
    return Draft(f"above{bound}{numbers}", question, "\n".join(lines), str(count), is_hard=True)


def some_words(speaker: Speaker) -> list[str]:
    """Two to ten different words."""
    pool = speaker.rng.choice((pools.words(), pools.OBJECTS + pools.ANIMALS, pools.NAMES, pools.FOODS))
    return speaker.rng.sample(sorted(set(pool)), speaker.rng.randint(2, LONGEST))


def count_words(speaker: Speaker) -> Draft:
    """How many items a list has."""
    items = some_words(speaker)
    thought = "\n".join(f"{i} {item}" for i, item in enumerate(items, 1))
    return Draft(
        f"count{items}", speaker.say(COUNT, list=text_of(speaker, items)), thought, str(len(items)), is_hard=True
    )


def nth(speaker: Speaker) -> Draft:
    """The n-th or the last item."""
    items = some_words(speaker)
    index = speaker.rng.randrange(len(items))
    is_last = index == len(items) - 1 and speaker.rng.random() < 0.7
    name = "last" if is_last else pools.ORDINALS[index]
    if not is_last and speaker.rng.random() < 0.2:
        name = f"{index + 1}{('st', 'nd', 'rd')[index] if index < 3 else 'th'}"
    thought = "\n".join(f"{i} {item}" for i, item in enumerate(items[: index + 1], 1))
    return Draft(f"nth{index}{items}", speaker.say(NTH, nth=name, list=text_of(speaker, items)), thought, items[index])


def alphabet(speaker: Speaker) -> Draft:
    """Words with different first letters, sorted."""
    by_letter = {word[0].lower(): word for word in some_words(speaker)}
    items = list(by_letter.values())[:6]
    speaker.rng.shuffle(items)
    ordered = sorted(items, key=str.lower)
    letters = "\n".join(f"{item} {item[0].lower()}" for item in items)
    question = speaker.say(ALPHABET, list=text_of(speaker, items))
    return Draft(
        f"abc{items}", question, f"{letters}\n{selection_steps(items, ordered)}", ", ".join(ordered), is_hard=True
    )


def draft(speaker: Speaker) -> Draft:
    """A question about a list."""
    kinds = (sort, extreme, compare, count_above, count_words, nth, alphabet)
    return speaker.rng.choices(kinds, (34, 20, 8, 8, 9, 9, 12))[0](speaker)
