"""The lists that look-ups search: how their entries are written and how they are asked for."""

# ruff: noqa: E501 (tables of sentences)

from dataclasses import dataclass

from ..phrases import Frames


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
