"""Tools made up at random: a verb, a thing, parameters; a tenth of the things is never seen in training.

A :class:`MadeTool` knows its declaration (OpenAI's ``tools`` entry) and how a user asks for it. Names are copied from the
declaration by the model, so there are tens of thousands: verbs, things, naming styles and sometimes made-up words.
"""

# ruff: noqa: E501 (tables of sentences)

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import pools
from .phrases import digest

HELDOUT_THINGS = 8  # one thing in so many

VERBS = {
    "get": ("get", "show me", "fetch", "look up", "tell me", "give me", "find", "check", "read"),
    "find": ("find", "search for", "look for", "locate", "get me"),
    "list": ("list", "show me all", "list all", "give me"),
    "create": ("create", "make", "add", "set up", "make me"),
    "add": ("add", "put in", "enter", "insert"),
    "delete": ("delete", "remove", "erase", "get rid of"),
    "cancel": ("cancel", "call off", "stop"),
    "update": ("update", "change", "modify", "edit"),
    "set": ("set", "change", "adjust", "put"),
    "send": ("send", "mail", "deliver", "forward"),
    "book": ("book", "reserve", "arrange"),
    "order": ("order", "buy", "purchase", "get me"),
    "start": ("start", "begin", "launch", "turn on", "run"),
    "stop": ("stop", "end", "turn off", "halt"),
    "open": ("open", "open up"),
    "close": ("close", "shut"),
    "track": ("track", "follow", "trace"),
    "check": ("check", "verify", "test", "look at"),
    "play": ("play", "start", "put on"),
    "print": ("print", "print out"),
    "share": ("share", "pass on"),
    "save": ("save", "store", "keep"),
    "rent": ("rent", "hire"),
    "repair": ("repair", "fix"),
    "clean": ("clean", "wash"),
    "paint": ("paint",),
    "move": ("move", "shift"),
    "copy": ("copy", "duplicate"),
    "approve": ("approve", "accept", "confirm"),
    "reject": ("reject", "refuse", "decline"),
    "rate": ("rate", "review"),
    "sell": ("sell",),
    "count": ("count",),
    "measure": ("measure",),
    "schedule": ("schedule", "plan"),
    "assign": ("assign", "give"),
    "lock": ("lock",),
    "unlock": ("unlock",),
    "upload": ("upload",),
    "download": ("download",),
    "archive": ("archive",),
    "restore": ("restore", "bring back"),
    "refund": ("refund",),
    "renew": ("renew", "extend"),
    "inspect": ("inspect", "examine"),
}
THINGS = pools.listed("""report invoice ticket flight train hotel meeting reminder event note message email photo video song playlist
    album movie book recipe menu table room house garden lamp light heater fan window door gate garage alarm camera
    sensor robot drone printer scanner server database backup file folder document contract account card payment
    transfer balance loan budget bill receipt tax order package parcel shipment delivery truck car bike boat taxi
    bus route map location address contact user customer employee team project task issue branch build release test
    log metric chart survey form quiz exam course lesson grade student teacher class school doctor nurse patient
    medicine prescription appointment vaccine diet workout pet dog cat horse plant tree flower farm field tractor
    harvest weather forecast temperature humidity storm river lake bridge tunnel road parking stadium game match
    score player ticker stock bond fund currency exchange auction bid offer coupon discount product catalog basket
    cart shelf warehouse supplier factory machine engine battery charger cable screen keyboard mouse phone laptop
    tablet router modem password token session subscription newsletter article blog comment poll vote election
    museum gallery painting statue concert festival party wedding gift cake pizza coffee lunch dinner snack passport
    visa permit license insurance claim warranty repair complaint feedback rating badge trophy medal planet star
    satellite rocket telescope sample experiment recipe potion dragon castle quest treasure sword shield lantern""")
PEOPLE_KEYS = ("name", "person", "recipient", "contact", "user", "customer", "guest", "owner", "patient", "student")


@dataclass(frozen=True)
class Kind:
    """A kind of parameter: its possible keys, JSON type, values, how a request says it, how it is described."""

    keys: tuple[str, ...]
    type: str
    make: Callable[[random.Random], Any]
    clauses: tuple[str, ...]
    descriptions: tuple[str, ...]
    enum: tuple[str, ...] = ()


def choice(*options: Any) -> Callable[[random.Random], Any]:
    """A maker that picks one option."""
    return lambda rng: rng.choice(options)


def short_text(rng: random.Random) -> str:
    """One to five words."""
    return " ".join(pools.word(rng) for _ in range(rng.randint(1, 5)))


def date(rng: random.Random) -> str:
    """A date as year-month-day."""
    return f"{rng.randint(2024, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def time(rng: random.Random) -> str:
    """A time of day."""
    return f"{rng.randrange(24)}:{rng.randrange(60):02d}"


KINDS = (
    Kind(("city", "location", "town", "place", "destination"), "string", lambda r: pools.proper(r, pools.CITIES, 0.35),
         ("in {}", "for {}", "at {}", "near {}"), ("Name of the city", "The city", "City name, e.g. Paris", "Where")),
    Kind(PEOPLE_KEYS, "string", lambda r: pools.proper(r, pools.NAMES, 0.35),
         ("for {}", "of {}", "to {}", "with {}"), ("Name of the person", "The person's name", "Who", "Full name")),
    Kind(("day", "weekday"), "string", choice(*pools.DAYS), ("on {}", "for {}", "next {}"), ("Day of the week", "The weekday")),
    Kind(("date", "start_date", "due_date"), "string", date, ("on {}", "for {}", "starting {}"), ("Date as YYYY-MM-DD", "The date")),
    Kind(("time", "start_time", "hour"), "string", time, ("at {}", "for {}", "by {}"), ("Time of day", "The time, e.g. 14:30")),
    Kind(("count", "quantity", "number", "amount"), "integer", lambda r: r.randint(1, 99),
         ("{} times", "with count {}", "{} pieces", "quantity {}"), ("How many", "The number of pieces", "Quantity")),
    Kind(("minutes", "duration"), "integer", lambda r: r.randint(1, 180), ("for {} minutes", "lasting {} minutes", "of {} minutes"), ("Duration in minutes", "Minutes")),
    Kind(("level", "percent", "brightness", "volume"), "integer", lambda r: r.randint(0, 100), ("to {} percent", "to {}", "at {} percent"), ("From 0 to 100", "The level in percent")),
    Kind(("language", "target_language"), "string", choice(*pools.LANGUAGES), ("in {}", "into {}", "to {}"), ("The language", "Target language")),
    Kind(("color",), "string", choice(*pools.COLORS), ("in {}", "with the color {}", "in the color {}"), ("The color", "Color name")),
    Kind(("text", "message", "content", "body"), "string", short_text, ("saying {}", "that says {}", "with the text {}"), ("The text", "Text of the message")),
    Kind(("topic", "query", "subject", "keyword"), "string", lambda r: pools.word(r), ("about {}", "on {}", "for {}"), ("What to search for", "The topic", "Search term")),
    Kind(("title",), "string", choice(*pools.TITLES), ("titled {}", "called {}", 'named "{}"'), ("The title", "Title of the work")),
    Kind(("id", "number", "code", "reference"), "string", lambda r: pools.scramble(r, 1, 3).upper() + str(r.randrange(10, 9999)), ("with id {}", "number {}", "{}"), ("The identifier", "Reference code")),
    Kind(("id", "account", "order_id", "item_id"), "integer", lambda r: r.randint(100, 99999), ("with id {}", "number {}", "{}"), ("The numeric id", "Id of the item")),
    Kind(("room",), "string", choice(*pools.ROOMS), ("in the {}", "of the {}", "for the {}"), ("The room", "Room name")),
    Kind(("email", "address"), "string", lambda r: f"{pools.syllables(r, 2)}@{pools.syllables(r, 2)}.{r.choice(('com', 'org', 'net'))}", ("to {}", "for {}", "at {}"), ("Email address", "The email")),
    Kind(("price", "max_price", "budget", "cost"), "integer", lambda r: r.randint(5, 5000), ("under {} dollars", "for {} dollars", "up to {} dollars"), ("Price in dollars", "Highest price")),
    Kind(("unit",), "string", choice("celsius", "fahrenheit"), ("in {}",), ("Unit of the temperature",), ("celsius", "fahrenheit")),
    Kind(("size",), "string", choice("small", "medium", "large"), ("in size {}", "in {}", "of size {}"), ("The size",), ("small", "medium", "large")),
    Kind(("priority",), "string", choice("low", "normal", "high"), ("with {} priority", "with priority {}"), ("How urgent",), ("low", "normal", "high")),
    Kind(("state", "status"), "string", choice("on", "off"), ("to {}", "{}"), ("On or off",), ("on", "off")),
    Kind(("year",), "integer", lambda r: r.randint(1950, 2030), ("from {}", "of {}", "in {}"), ("The year",)),
    Kind(("animal", "pet"), "string", choice(*pools.ANIMALS), ("for my {}", "for the {}", "of the {}"), ("The animal",)),
    Kind(("food", "dish"), "string", choice(*pools.FOODS), ("with {}", "for {}", "of {}"), ("The food", "Name of the dish")),
)  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A parameter of a made tool."""

    key: str
    kind: Kind
    required: bool = True


@dataclass(frozen=True)
class MadeTool:
    """A tool: its name, what it does, its parameters, and the frames of requests (slots are parameter keys)."""

    name: str
    description: str
    verb: str
    thing: str
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...] = field(default=())

    @property
    def is_heldout(self) -> bool:
        """Whether the tool belongs to those never seen in training."""
        return not self.requests and any(map(is_heldout_thing, self.thing.split()))


def is_heldout_thing(thing: str) -> bool:
    """Whether tools about this thing are kept out of training."""
    return digest("thing", thing) % HELDOUT_THINGS == 0


def styled(rng: random.Random, verb: str, thing: str) -> str:
    """A tool's name in one of the usual styles."""
    style = rng.random()
    last = thing.split()
    if style < 0.6:
        return "_".join([verb, *last])
    if style < 0.72:
        return verb + "".join(part.capitalize() for part in last)
    if style < 0.82:
        return "_".join([*last, verb])
    if style < 0.88:
        return "-".join([verb, *last])
    if style < 0.94:
        return "_".join([pools.word(rng), verb, *last])
    return "_".join([verb, *last, rng.choice(("tool", "v2", "api", "service", "info", "now"))])


def described(rng: random.Random, verb: str, thing: str, parameters: tuple[Parameter, ...]) -> str:
    """A description of a made tool."""
    article = rng.choice(("a ", "the ", "a ", "")) if thing[0] not in "aeiou" else rng.choice(("an ", "the "))
    base = f"{verb.capitalize()} {article}{thing}"
    if parameters and rng.random() < 0.35:
        base += rng.choice((" for a given ", " by ", " with ")) + parameters[0].key.replace("_", " ")
    return base + rng.choice(("", "", ".", ". Returns a short text.", " of the user", " in the system"))


def some_parameters(rng: random.Random) -> tuple[Parameter, ...]:
    """None to four parameters of different keys and kinds."""
    found: dict[str, Parameter] = {}
    for kind in rng.sample(KINDS, rng.choices((0, 1, 2, 3, 4), (4, 38, 36, 16, 6))[0]):
        key = rng.choice(kind.keys)
        if key not in found:
            found[key] = Parameter(key, kind, required=not found or rng.random() < 0.75)
    return tuple(found.values())


def some_thing(rng: random.Random, heldout: bool) -> str:
    """A thing that is held out or is not; in training sometimes a common or a made-up word, or two words."""
    while True:
        thing = rng.choice(THINGS)
        if not heldout and (way := rng.random()) < 0.35:
            thing = (
                pools.word(rng)
                if way < 0.2
                else pools.syllables(rng, 2)
                if way < 0.27
                else f"{pools.word(rng)} {thing}"
            )
        if is_heldout_thing(thing.split()[-1]) == heldout and (
            heldout or not any(map(is_heldout_thing, thing.split()))
        ):
            return thing


def make_tool(rng: random.Random, heldout: bool = False) -> MadeTool:
    """A random tool."""
    verb, thing = rng.choice(tuple(VERBS)), some_thing(rng, heldout)
    parameters = some_parameters(rng)
    return MadeTool(styled(rng, verb, thing), described(rng, verb, thing, parameters), verb, thing, parameters)


def schema(rng: random.Random, parameter: Parameter) -> dict[str, Any]:
    """A parameter's JSON schema, with or without a description."""
    result: dict[str, Any] = {"type": parameter.kind.type}
    if rng.random() < 0.5:
        result["description"] = rng.choice(parameter.kind.descriptions)
    if parameter.kind.enum:
        result["enum"] = list(parameter.kind.enum)
    return result


def sorted_keys(value: Any) -> Any:
    """The same JSON with sorted keys."""
    if isinstance(value, dict):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list) else value


def declare(rng: random.Random, tool: MadeTool) -> dict[str, Any]:
    """The tool as an entry of OpenAI's ``tools``."""
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {parameter.key: schema(rng, parameter) for parameter in tool.parameters},
    }
    required = [parameter.key for parameter in tool.parameters if parameter.required]
    if required or rng.random() < 0.5:
        parameters["required"] = required
    function: dict[str, Any] = {"name": tool.name}
    if rng.random() < 0.9:
        function["description"] = tool.description
    return {"type": "function", "function": {**function, "parameters": parameters}}
