"""Calling tools: the right tool with the right arguments, or none, or a question back; and the answer after a result."""

# ruff: noqa: E501 (tables of sentences)

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import chat, pools
from ..known_tools import KNOWN_TOOLS
from ..phrases import Frames, Speaker, dress, parted
from ..tools import VERBS, MadeTool, Parameter, declare, make_tool, short_text, sorted_keys
from .example import Draft

FAMILY = "tool"
NONE_FITS = "None of my tools can do that."
KNOWN_SHARE = 0.35
NONE_SHARE = 0.17
MOST_TOOLS = 6
KNOWN_BY_MODEL = ("calculate_sum", "translate", "convert_money", "get_date")  # what it can answer without a tool

GENERIC = ("{verb} [the|a|my|] {thing} {clauses}.", "[I want to|I need to|I would like to|Help me] {verb} [the|a|my] {thing} {clauses}.",
           "[Can you|Could you|Would you] {verb} [the|a|my] {thing} {clauses}?", "{verb} {thing} {clauses}", "{clauses}, {verb} [the|a] {thing}.",
           "[Use your tool to|Go and|Please] {verb} [the|a|my] {thing} {clauses}.", "[It is time to|We have to|Let's|You should|You must] {verb} [the|a|my|our] {thing} {clauses}.")  # fmt: skip
ASKING = (
    "[What is|What's] the {thing} {clauses}?",
    "[Do you know|Can you tell me] the {thing} {clauses}?",
    "[Which|What] {thing} is there {clauses}?",
    "[I need|I want] [the|a] {thing} {clauses}.",
)
EXPLICIT = (
    "{key} {value}",
    "{key}: {value}",
    "{key} is {value}",
    "with {key} {value}",
    "{key} = {value}",
    "the {key} is {value}",
    "using {key} {value}",
)
READING_VERBS = ("get", "find", "check", "list")


@dataclass(frozen=True)
class Request:
    """What a user asks of a tool: the words, the arguments, and a required parameter left out, if any."""

    text: str
    arguments: Mapping[str, Any]
    missing: str = ""


def some_tool(speaker: Speaker, heldout: bool) -> MadeTool:
    """A known or a made tool."""
    if not heldout and speaker.rng.random() < KNOWN_SHARE:
        return speaker.rng.choice(KNOWN_TOOLS)
    return make_tool(speaker.rng, heldout)


def clause(speaker: Speaker, parameter: Parameter, value: object) -> str:
    """One argument in words; free text stands in quotation marks."""
    rng = speaker.rng
    value = f'"{value}"' if parameter.kind.make is short_text else value
    if rng.random() < 0.62:
        return rng.choice(parameter.kind.clauses).format(value)
    return rng.choice(EXPLICIT).format(key=rng.choice((parameter.key, parameter.key.replace("_", " "))), value=value)


def phrasing(speaker: Speaker, frames: tuple[str, ...]) -> str:
    """A phrasing of the frames that is held out or not, as the speaker asks; empty if there is none."""
    choices = parted(Frames((), frames))[speaker.heldout]
    return speaker.rng.choice(speaker.rng.choice(choices)) if choices else ""


def asked_for(speaker: Speaker, tool: MadeTool) -> Request:
    """A request for a tool, in its own frames or in general ones."""
    rng = speaker.rng
    given = [p for p in tool.parameters if p.required or tool.requests or rng.random() < 0.6]
    values = {p.key: p.kind.make(rng) for p in given}
    own = phrasing(speaker, tool.requests) if tool.requests and rng.random() < 0.85 else ""
    if own:
        return Request(dress(rng, own).format(**values), values)
    is_missing = given and given[-1].required and not tool.requests and rng.random() < 0.06
    missing = given[-1].key if is_missing else ""
    values.pop(missing, None)
    return Request(general_request(speaker, tool, [p for p in given if p.key != missing], values), values, missing)


def general_request(speaker: Speaker, tool: MadeTool, given: list[Parameter], values: Mapping[str, Any]) -> str:
    """A request from the tool's verb, its thing and a clause an argument, in any order."""
    rng = speaker.rng
    clauses = [clause(speaker, p, values[p.key]) for p in rng.sample(given, len(given))]
    frames = GENERIC + (ASKING if tool.verb in READING_VERBS else ())
    text = dress(rng, phrasing(speaker, frames))
    verb = rng.choice((tool.verb, *VERBS.get(tool.verb, (tool.verb,))))
    joined = rng.choice((" ", " ", ", ", " and ")).join(clauses)
    text = text.format(verb=verb, thing=tool.thing or "it", clauses=joined)
    text = " ".join(text.replace(" ,", ",").replace(" .", ".").replace(" ?", "?").split()).lstrip(", ")
    return text[0].upper() + text[1:] if rng.random() < 0.7 else text


def some_tools(speaker: Speaker, chosen: MadeTool | None, avoid: MadeTool, heldout: bool) -> list[MadeTool]:
    """The declared tools: the chosen one among others; none of the others does what is asked."""
    rng = speaker.rng
    tools = [chosen] if chosen else []
    for _ in range(rng.randint(1 if chosen is None else 0, MOST_TOOLS - 1)):
        other = some_tool(speaker, heldout and rng.random() < 0.5)
        if chosen and not chosen.requests and rng.random() < 0.25:  # the same verb or thing: harder to tell apart
            other = make_tool(rng, heldout)
            if other.verb == chosen.verb or other.thing == chosen.thing:
                continue
        clashes = {tool.name for tool in tools} | {avoid.name}
        if other.name in clashes or related(other, avoid):
            continue
        tools.append(other)
    rng.shuffle(tools)
    return tools


def related(one: MadeTool, other: MadeTool) -> bool:
    """Whether two tools concern the same thing, so that a request could mean either."""
    words = set(one.thing.split()) & set(other.thing.split())
    return bool(words) or bool(set(one.name.split("_")) & set(other.thing.split()))


def scan(tools: Sequence[MadeTool], chosen: MadeTool | None) -> str:
    """Reads the names up to the chosen tool, or all of them."""
    lines = []
    for tool in tools:
        lines.append(f"{tool.name}: {'yes' if tool is chosen else 'no'}")
        if tool is chosen:
            break
    return "\n".join(lines)


def fields(arguments: Mapping[str, Any]) -> str:
    """The arguments, one a line."""
    return "".join(f"\n{key}: {value}" for key, value in arguments.items())


def result_text(speaker: Speaker) -> tuple[str, str]:
    """A tool's result and what the assistant says of it."""
    rng = speaker.rng
    if rng.random() < 0.45:
        words = rng.choice((
            f"{rng.choice(('sunny', 'cloudy', 'rainy', 'windy', 'foggy', 'snowy'))} and {rng.randint(-10, 40)} degrees",
            str(rng.randint(0, 9999)), f"{rng.randint(0, 999)} {pools.word(rng)}", "done", "ok", "not found", f"ok, number {rng.randint(1, 999)}",
            pools.sentence(rng), " ".join(pools.word(rng) for _ in range(rng.randint(1, 6))), f"{rng.randrange(24)}:{rng.randrange(60):02d}",
        ))  # fmt: skip
        return words, f"The result is: {words}" + ("" if words[-1] in ".!?" else ".")
    keys = rng.sample(
        (
            "temperature",
            "condition",
            "price",
            "status",
            "name",
            "time",
            "total",
            "wind_speed",
            "city",
            "count",
            "id",
            "error",
            pools.word(rng),
            pools.word(rng),
        ),
        rng.randint(1, 4),
    )
    data = {key: rng.choice((rng.randint(0, 999), pools.word(rng), pools.proper(rng, pools.NAMES))) for key in keys}
    parts = [f"the {key.replace('_', ' ')} is {value}" for key, value in data.items()]
    said = (", ".join(parts[:-1]) + " and " if parts[1:] else "") + parts[-1] + "."
    return rng.choice((json.dumps(data), chat.compact(data))), said[0].upper() + said[1:]


@dataclass(frozen=True)
class Scene:
    """The tools of a conversation: as made, and as declared."""

    tools: tuple[MadeTool, ...]
    declared: tuple[Mapping[str, Any], ...]


def scene(speaker: Speaker, tools: list[MadeTool]) -> Scene:
    """Declares tools; half of the time with sorted keys."""
    declared = [declare(speaker.rng, tool) for tool in tools]
    return Scene(tuple(tools), tuple(sorted_keys(declared) if speaker.rng.random() < 0.5 else declared))


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


def call_message(calls: Sequence[Mapping[str, Any]], thought: str) -> dict[str, Any]:
    """An assistant's message that calls tools."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": list(calls)}
    return {**message, "reasoning_content": thought} if thought else message


def can_repeat(parameter: Parameter, text: str, value: object) -> bool:
    """Whether a request can name several values of a parameter."""
    return parameter.kind.make is not short_text and not parameter.kind.enum and text.count(str(value)) == 1


def several(speaker: Speaker, parameter: Parameter, request: Request) -> tuple[str, list[dict[str, Any]]]:
    """The same request for two or three values of one parameter: the words, and the arguments of each call."""
    rng = speaker.rng
    values = [request.arguments[parameter.key], *(parameter.kind.make(rng) for _ in range(rng.randint(1, 2)))]
    gap = rng.choice((", ", " and "))
    joined = gap.join(map(str, values[:-1])) + f" and {values[-1]}"
    text = request.text.replace(str(values[0]), joined, 1)
    return text, [{**request.arguments, parameter.key: value} for value in values]


def call(speaker: Speaker, stage: Scene, chosen: MadeTool, first: int = 0) -> Draft:
    """A request that one declared tool answers; calls are counted from ``first``."""
    request = asked_for(speaker, chosen)
    text, every = request.text, [dict(request.arguments)]
    thought = scan(stage.tools, chosen)
    key = chosen.name + str(every)
    if request.missing:
        answer = f"Please tell me the {request.missing.replace('_', ' ')}."
        thought += fields(request.arguments) + f"\n{request.missing}: missing"
        return Draft(key, text, thought, answer, messages=(user(text),), tools=stage.declared)
    repeatable = [p for p in chosen.parameters if p.key in every[0] and can_repeat(p, text, every[0][p.key])]
    if repeatable and speaker.rng.random() < 0.1:
        text, every = several(speaker, speaker.rng.choice(repeatable), request)
    calls = tuple(chat.tool_call(chosen.name, arguments, first + i) for i, arguments in enumerate(every))
    thought += "\nthen".join(map(fields, every))
    return Draft(key, text, thought, "", messages=(user(text),), tools=stage.declared, calls=calls)


def no_tool(speaker: Speaker, heldout: bool) -> Draft:
    """A request that no declared tool answers."""
    wanted = some_tool(speaker, heldout)
    while wanted.name in KNOWN_BY_MODEL:
        wanted = some_tool(speaker, heldout)
    tools: list[MadeTool] = []
    while not tools:
        tools = some_tools(speaker, None, wanted, heldout)
    request = asked_for(speaker, wanted)
    thought = scan(tools, None) + "\nno tool fits"
    key = wanted.name + str(dict(request.arguments))
    messages = (user(request.text),)
    return Draft(key, request.text, thought, NONE_FITS, messages=messages, tools=scene(speaker, tools).declared)


def after_result(speaker: Speaker, made: Draft) -> Draft:
    """The answer once the tools' results are there; the client may or may not send the thought back."""
    rng = speaker.rng
    messages: list[Mapping[str, Any]] = [
        *made.messages,
        call_message(made.calls, made.thought if rng.random() < 0.5 else ""),
    ]
    said = []
    for each in made.calls:
        result, words = result_text(speaker)
        message = {"role": "tool", "tool_call_id": each["id"], "content": result}
        messages.append({**message, "name": each["function"]["name"]} if rng.random() < 0.3 else message)
        said.append(words)
    answer = " ".join(said)
    return Draft(
        made.key + answer, made.question, "read the result", answer, messages=tuple(messages), tools=made.tools
    )


def called_again(speaker: Speaker, stage: Scene, made: Draft) -> Draft:
    """A second request after the first was answered; the count of calls goes on."""
    first = after_result(speaker, made)
    past = (*first.messages, {"role": "assistant", "content": first.answer})
    second = call(speaker, stage, speaker.rng.choice(stage.tools), len(made.calls))
    return replace(second, messages=(*past, *second.messages))


def draft(speaker: Speaker, heldout: bool = False) -> Draft:
    """A task with tools; ``heldout`` takes tools never seen in training."""
    way = speaker.rng.random()
    if way < NONE_SHARE:
        return no_tool(speaker, heldout)
    chosen = some_tool(speaker, heldout)
    stage = scene(speaker, some_tools(speaker, chosen, chosen, heldout))
    made = call(speaker, stage, chosen)
    if way < 0.72 or not made.calls:
        return made
    return after_result(speaker, made) if way < 0.87 else called_again(speaker, stage, made)


def idle_tools(speaker: Speaker) -> tuple[Mapping[str, Any], ...]:
    """Made-up tools that are declared while the user wants something else."""
    return scene(speaker, [make_tool(speaker.rng) for _ in range(speaker.rng.randint(1, 3))]).declared
