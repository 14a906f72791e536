"""Names and words the tasks draw from, and names made up from syllables."""

# ruff: noqa: E501 (lists of words)

import random
import string
from functools import cache
from pathlib import Path


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


NAMES = listed("""Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Quinn Rosa Sam Tom Uma Vera
    Will Xena Yuri Zoe Lena Max Nina Oscar Ruth Simon Tina Victor Wendy Alice Bob Carol Dan Eve Frank Gina Hugo Ivan
    Julia Karl Laura Mark Nora Otto Peter Sarah John Mary James Linda Robert Susan Michael Karen Thomas Nancy Daniel
    Lisa Kevin Sandra Brian Ashley George Emily Edward Donna Ronald Carla Anton Bruno Diana Elena Fatima Gabriel
    Hana Ismail Jana Kenji Luis Maria Nadia Omar Priya Ravi Sofia Tariq Wei Yuki Ahmed Chen Ines Lucas Marta Pedro
    Aisha Boris Carlos Dora Eric Fiona""")
CITIES = listed("""Paris London Berlin Rome Madrid Vienna Oslo Lisbon Dublin Athens Prague Warsaw Tokyo Cairo Lima Boston Chicago
    Denver Seattle Austin Toronto Sydney Delhi Seoul Munich Milan Geneva Porto Zurich Nice Hamburg Naples Lyon
    Bergen Helsinki Stockholm Mumbai Beijing Shanghai Osaka Kyoto Nairobi Lagos Dallas Houston Miami Phoenix
    Portland Montreal Vancouver Istanbul Moscow Kyiv Bangkok Singapore Jakarta Manila Hanoi Dubai Doha""")
COLORS = listed("red blue green yellow black white purple orange pink brown gray silver gold turquoise violet beige")
ANIMALS = listed("""dog cat horse bird fish rabbit turtle hamster snake parrot goat sheep duck fox bear wolf lion tiger mouse frog
    cow pig chicken donkey camel monkey owl eagle""")
OBJECTS = listed("""apple book chair lamp pencil bottle table window door car bike phone clock spoon plate cup ball box key shoe hat
    coat bag ring coin stone leaf flower tree boat desk mirror towel candle bucket ladder hammer guitar piano camera
    sofa carpet pillow blanket umbrella wallet helmet jacket basket kettle""")
THINGS = listed("""apples books chairs lamps pencils bottles coins stones flowers eggs oranges cookies stamps marbles cards balls
    pens cups plates shells stickers candles tickets boxes sheep ducks cars toys buttons photos bananas candies
    cakes tomatoes pears keys dollars points trees shirts""")
FOODS = listed("""pizza pasta soup bread rice salad cheese cake fish eggs apples grapes honey tea coffee milk juice chocolate
    potatoes beans noodles pancakes tacos sushi curry yogurt cookies bananas""")
JOBS = listed("""doctor teacher nurse driver cook farmer painter singer writer pilot baker lawyer judge engineer clerk dentist
    plumber carpenter librarian gardener journalist waiter mechanic scientist actor""")
COUNTRIES = listed("""France Germany Italy Spain Austria Norway Portugal Ireland Greece Poland Japan Egypt Peru Canada Australia India
    China Sweden Finland Denmark Hungary Kenya Ghana Cuba Chile Brazil Mexico Thailand Vietnam Nepal Iceland Belgium""")
LANGUAGES = listed(
    "French German Spanish Italian Polish Dutch Greek Japanese Chinese Portuguese Russian Arabic Turkish Korean"
)
ROOMS = (
    *listed("kitchen bedroom office bathroom garage hall garden basement attic library lobby balcony"),
    "living room",
)
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("January February March April May June July August September October November December")
COMPANIES = listed(
    "Acme Globex Initech Umbra Vertex Norda Solvix Quanta Brightco Lumen Apex Orion Helio Zenith Polaris Cobalt"
)
TITLES = (
    "Emma",
    "Persuasion",
    "Moby Dick",
    "Hamlet",
    "Walden",
    "Dracula",
    "Ulysses",
    "Middlemarch",
    "Jane Eyre",
    "Ivanhoe",
)
ORDINALS = listed("first second third fourth fifth sixth seventh eighth ninth tenth")
SMALL_NUMBERS = listed("""zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty""")
ONSETS = listed("b c d f g h j k l m n p r s t v w z br ch dr fl gr kl pl qu sh st th tr")
VOWELS = listed("a e i o u a e i o ai ea io ou")
CODAS = ("", "", "", "n", "r", "s", "l", "m", "x", "nd", "rk", "th", "lt")


@cache
def words() -> tuple[str, ...]:
    """Three thousand common English words (``words.txt``, from WordNet)."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


def syllables(rng: random.Random, count: int) -> str:
    """A made-up word of so many syllables."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if i else "") for i in range(count))


def proper(rng: random.Random, pool: tuple[str, ...], made_up: float = 0.25) -> str:
    """A name of the pool, or sometimes one made up."""
    return syllables(rng, rng.randint(2, 3)).capitalize() if rng.random() < made_up else rng.choice(pool)


def scramble(rng: random.Random, shortest: int, longest: int, alphabet: str = string.ascii_lowercase) -> str:
    """A string of random characters."""
    return "".join(rng.choices(alphabet, k=rng.randint(shortest, longest)))


def number(rng: random.Random, digits: int) -> int:
    """A number of exactly so many digits (one digit: from 0)."""
    return rng.randrange(10 ** (digits - 1), 10**digits) if digits > 1 else rng.randrange(10)


def word(rng: random.Random) -> str:
    """A common word."""
    return rng.choice(words())


def sentence(rng: random.Random) -> str:
    """Some words that look like a sentence, for copying and for filling long texts."""
    subject = rng.choice(
        (f"the {word(rng)}", rng.choice(NAMES), f"a {word(rng)}", f"every {word(rng)}", "nobody", "my friend")
    )
    verb = rng.choice(
        ("saw", "found", "likes", "keeps", "carried", "wants", "sold", "lost", "painted", "forgot", "brought")
    )
    rest = rng.choice(
        (
            "",
            f" in {rng.choice(CITIES)}",
            f" near the {word(rng)}",
            f" on {rng.choice(DAYS)}",
            f" with {rng.choice(NAMES)}",
        )
    )
    text = f"{subject} {verb} {rng.choice(('the', 'a', 'some', 'that'))} {word(rng)}{rest}"
    return text[0].upper() + text[1:] + rng.choice((".", ".", "!", "?"))
