"""Addition and subtraction: plain, in words, in stories, of several numbers."""

# ruff: noqa: E501 (tables of sentences)

from .. import pools
from ..phrases import Frames, Speaker, listing
from . import steps
from .example import Draft

FAMILY = "add"
LONGEST = 8  # digits
WORDS_SHARE = 0.06
ROUND_SHARE = 0.12

ADD = Frames(
    ("What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?", "Add {a} and {b}.", "What's {a} plus {b}?", "What is {a} plus {b}?",
     "Calculate {a} + {b}.", "{a}+{b}=", "{a} + {b} =", "Compute {a}+{b}."),
    (
        "[Compute|Calculate|Work out|Evaluate|Find|Give me|Tell me|Solve|Determine|Figure out] [{a} + {b}|{a} plus {b}|{a}+{b}|{a} and {b} together].",
        "[What is|What's|Find|Give me|Tell me|Calculate|I need|Compute|Determine] the [sum|total] of {a} and {b}.",
        "[What is|What's] the [sum|total|result|value|answer] [of|when you add|if you add] {a} and {b}?",
        "How much [is|are|do you get for|makes] {a} [plus|and|+|added to] {b}?",
        "[Add|Sum|Add up|Sum up|Total|Combine] {a} [and|with|to|plus] {b}.",
        "[Add|Sum|Sum up|Add up|Total] [these|the numbers|the two numbers|these two numbers][:|] {a} [and|,|+|] {b}.",
        "What [do you get|do I get|is the result|comes out|results] [if|when] [you|I|we] [add|sum|put together] {a} and {b}?",
        "If [I|you|we] add {b} to {a}, what [do I get|is the result|comes out|is it]?",
        "[What number|Which number|What] is {b} more than {a}?",
        "[Increase|Raise] {a} by {b}.",
        "{b} more than {a} is [what|how much|which number]?",
        "[plus|add] {a} and {b}",
        "[What does|What will] print({a} + {b}) [print|show|output|give|return]?",
        "[Run|Evaluate] [this Python|the code|this code][:|] print({a}+{b})",
        "[{a} and {b} make|{a} plus {b} equals|{a} + {b} equals|{a} plus {b} is] [what|how much]?",
        "I have {a} and {b}. What is [the sum|the total|their sum|that together]?",
        "[sum|add|plus|total][:| ] {a} {b}",
        "[Add|Put] {b} [on top of|to] {a}.",
        "[Do you know|Can you tell me|Any idea|Could you tell me] [what|how much] {a} [plus|+|and] {b} is?",
        "[My homework|The exercise|The question] is {a} + {b}. [What is the answer|What do I write|Help me]?",
        "[{a} + {b} please|{a} plus {b} please|quick, {a} + {b}|and {a} + {b}]?",
        "[What is|Tell me|Say] [{a} and {b}|{a} with {b}] [added|added together|together|summed up|combined]?",
        "Let x = {a} and y = {b}. What is x + y?",
    ),
)  # fmt: skip
SUBTRACT = Frames(
    ("What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?", "Subtract {b} from {a}.", "What's {a} minus {b}?", "What is {a} minus {b}?",
     "Calculate {a} - {b}.", "{a}-{b}=", "{a} - {b} =", "Compute {a}-{b}."),
    (
        "[Compute|Calculate|Work out|Evaluate|Find|Give me|Tell me|Solve|Determine|Figure out] [{a} - {b}|{a} minus {b}|{a}-{b}|{a} take away {b}].",
        "[What is|What's|Find|Give me|Tell me|Calculate|I need|Compute] the difference [between|of] {a} and {b}.",
        "How much [is|are|do you get for] {a} [minus|-|less|take away] {b}?",
        "[Take|Subtract|Deduct|Remove] {b} [away from|from|off] {a}.",
        "What [do you get|do I get|is the result|comes out|is left|remains] [if|when] [you|I|we] [subtract|take|take away|deduct] {b} from {a}?",
        "If [I|you|we] [take|subtract|deduct] {b} from {a}, what [do I get|is the result|is left|remains]?",
        "[What number|Which number|What] is {b} [less|smaller] than {a}?",
        "[Decrease|Reduce|Lower] {a} by {b}.",
        "{b} less than {a} is [what|how much|which number]?",
        "[What|How much] is missing from {b} to {a}?",
        "[What does|What will] print({a} - {b}) [print|show|output|give|return]?",
        "[{a} minus {b} equals|{a} - {b} equals|{a} minus {b} is|{a} less {b} makes] [what|how much]?",
        "[Do you know|Can you tell me|Any idea|Could you tell me] [what|how much] {a} [minus|-] {b} is?",
        "[My homework|The exercise|The question] is {a} - {b}. [What is the answer|What do I write|Help me]?",
        "[minus|subtract|difference][:| ] {a} {b}",
        "How [far|much] [is it from {b} up to {a}|must I add to {b} to get {a}|do I add to {b} to reach {a}]?",
        "I have {a} and [lose|spend|give away|pay] {b}. [What is left|How much is left|How much remains|How much do I have now]?",
        "Let x = {a} and y = {b}. What is x - y?",
    ),
)  # fmt: skip
GAIN = Frames(
    ("{name} has {a} {things} and [gets|buys|finds] {b} more. How many {things} does {name} have [now|]?",
     "I have {a} {things} and buy {b} more. How many {things} do I have?"),
    (
        "{name} [had|has|owns] {a} {things}. {other} [gives|gave|brings|sells] {name} {b} more. How many {things} does {name} have [now|in total|altogether]?",
        "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have [together|in total|altogether|in all]?",
        "There are {a} {things} [on the table|in a box|in the room|in the shop] and [someone adds {b}|{b} more arrive|{name} brings {b} more]. How many {things} are there [now|]?",
        "If I [have|buy|own] {a} {things} and [get|find|buy] {b} more, how many [{things} do I have|do I have|are there]?",
        "If {name} has {a} {things} and {other} has {b}, how many [{things} do they have together|are there in total]?",
        "[In the morning|On Monday|Yesterday|First] {name} [sold|counted|found|collected] {a} {things}, [in the evening|on Tuesday|today|later] {b}. How many [is that in total|{things} is that|altogether]?",
        "A [shop|school|farm|library] has {a} {things}. It [buys|gets|receives] {b} [more|new ones|new {things}]. How many {things} does it have now?",
        "{name} is {a} years old. How old will {name} be in {b} years?",
        "{a} {things} plus {b} {things}, how many {things} is that?",
        "[What is|How much is|Calculate] {a} {things} plus {b} {things}?",
        "[Add|Put] {b} {things} to {a} {things}. How many [{things} |]are there[ now|]?",
    ),
)  # fmt: skip
LOSS = Frames(
    ("{name} has {a} {things} and [gives away|loses|sells] {b}. How many {things} are left?",
     "I have {a} {things} and eat {b}. How many are left?"),
    (
        "{name} [had|has|owns] {a} {things}. {name} [gives|gave|sells|sold|lends] {b} to {other}. How many {things} [are left|does {name} have now|remain|does {name} still have]?",
        "There are {a} {things} [on the table|in a box|in the room|in the shop] and [someone takes {b}|{b} are gone|{name} takes {b}|{b} break]. How many {things} are [left|there now|still there]?",
        "If I [have|buy|own] {a} {things} and [eat|lose|sell|give away|use] {b}, how many [{things} are left|do I have left|are left|remain]?",
        "{name} has {a} {things}, {other} has {b}. How many more {things} does {name} have than {other}?",
        "A [shop|school|farm|library] has {a} {things}. It [sells|loses|gives away] {b}. How many {things} [are left|remain|does it have now]?",
        "{name} wants {a} {things} but has only {b}. How many [are missing|more does {name} need|more are needed]?",
        "{a} {things} minus {b} {things}, how many {things} is that?",
        "[What is|How much is|Calculate] {a} {things} minus {b} {things}?",
        "[Take|Remove] {b} {things} from {a} {things}. How many [{things} |]are [left|there now]?",
        "I [have|had] {a} dollars and [spend|spent|pay|paid|lost|lose] {b}. How much [money |][do I have left|is left|have I left]?",
    ),
)  # fmt: skip
SUM = Frames(
    ("What is the sum of {list}?", "Add {list}.", "Add these numbers: {list}", "Sum: {list}"),
    (
        "[Calculate|Compute|Find|Give me|Tell me|Work out] the [sum|total] of [these numbers: |the numbers |this list: |]{list}.",
        "[Add|Sum|Add up|Sum up|Total] [these numbers|the following numbers|this list|all of these|the following][:|] {list}.",
        "[What is|What's] the [total|sum] [of these numbers|of this list|of the following|of all these][:|] {list}?",
        "How much [is|are|do] {list} [together|in total|altogether|all together]?",
        "What do you get [if|when] you add [up |]{list}?",
    ),
)  # fmt: skip
PARITY = Frames(
    ("Is {a} even or odd?", "Is {a} odd or even?"),
    (
        "[Tell me whether|Tell me if|Say whether|Decide whether|Check if] {a} is [even or odd|odd or even|an even or an odd number].",
        "[Is the number {a}|Would you call {a}|Is {a}] [an even or an odd number|even or odd|odd or even]?",
        "{a}: [even or odd|odd or even]?",
        "[What kind of number is {a}|Which is it for {a}], [even or odd|odd or even]?",
    ),
)  # fmt: skip


def operand(speaker: Speaker) -> int:
    """A number: half of them short, the others of any length; some are round."""
    rng = speaker.rng
    digits = rng.randint(1, 3) if rng.random() < 0.5 else rng.randint(1, LONGEST)
    value = pools.number(rng, digits)
    if rng.random() < ROUND_SHARE:
        value = round(value, 1 - digits) or 10
    return value


def shown(speaker: Speaker, number: int, in_words: bool) -> str:
    """A number as digits, as a word, or with commas at the thousands."""
    if in_words and number < len(pools.SMALL_NUMBERS):
        return pools.SMALL_NUMBERS[number]
    return f"{number:,}" if number > 999 and speaker.rng.random() < 0.06 else str(number)


def key_of(a: int, sign: str, b: int) -> str:
    """The operands' key; sums of single digits are facts to learn, never held out."""
    return "" if a < 10 and b < 10 else f"{a}{sign}{b}"


def plain(speaker: Speaker) -> Draft:
    """Two numbers."""
    rng = speaker.rng
    in_words = rng.random() < WORDS_SHARE
    a, b = (rng.randrange(21), rng.randrange(21)) if in_words else (operand(speaker), operand(speaker))
    slots = {"a": shown(speaker, a, in_words), "b": shown(speaker, b, in_words)}
    if rng.random() < 0.55:
        return Draft(key_of(a, "+", b), speaker.say(ADD, **slots), steps.addition(a, b), str(a + b), is_hard=True)
    if a < b and rng.random() < 0.7:
        a, b = b, a
        slots = {"a": slots["b"], "b": slots["a"]}
    return Draft(key_of(a, "-", b), speaker.say(SUBTRACT, **slots), steps.subtraction(a, b), str(a - b), is_hard=True)


def story(speaker: Speaker) -> Draft:
    """Two numbers in a story."""
    rng = speaker.rng
    a, b = sorted((pools.number(rng, rng.randint(1, 3)), pools.number(rng, rng.randint(1, 3))), reverse=True)
    slots = {
        "name": pools.proper(rng, pools.NAMES),
        "other": rng.choice(pools.NAMES),
        "things": rng.choice(pools.THINGS),
    }
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            a, b = b, a
        return Draft(
            f"{a}+{b}",
            speaker.say(GAIN, a=a, b=b, **slots),
            f"{a} + {b}\n" + steps.addition(a, b),
            str(a + b),
            is_hard=True,
        )
    return Draft(
        f"{a}-{b}",
        speaker.say(LOSS, a=a, b=b, **slots),
        f"{a} - {b}\n" + steps.subtraction(a, b),
        str(a - b),
        is_hard=True,
    )


def several(speaker: Speaker) -> Draft:
    """Three to five numbers, as a list or as a sum."""
    rng = speaker.rng
    numbers = [pools.number(rng, rng.choice((1, 1, 2, 2, 3))) for _ in range(rng.randint(3, 5))]
    if rng.random() < 0.5:
        text = rng.choice((" + ", "+")).join(map(str, numbers))
        frames = Frames(
            ("What is {a}?", "{a}", "Calculate {a}.", "{a} = ?"),
            ("[Compute|Work out|Evaluate|Solve|How much is] {a}.",),
        )
        question = speaker.say(frames, a=text)
    else:
        question = speaker.say(SUM, list=listing(rng, list(map(str, numbers))))
    return Draft(f"sum{numbers}", question, steps.running_sum(numbers), str(sum(numbers)), is_hard=True)


def parity(speaker: Speaker) -> Draft:
    """Even or odd, by the last digit."""
    a = pools.number(speaker.rng, speaker.rng.randint(1, 5))
    word = "odd" if a % 2 else "even"
    return Draft(f"parity{a}", speaker.say(PARITY, a=a), f"last digit {a % 10}, {word}", word)


def draft(speaker: Speaker) -> Draft:
    """An addition or subtraction."""
    return speaker.rng.choices((plain, story, several, parity), (62, 22, 12, 4))[0](speaker)
