"""How a server bears load: bench serve."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from .options import ApiKey, Debug, JsonFile, clear_errors, configuration, say

# As a shell tells an end by SIGINT.
_STOPPED = 130


def bench_serve(
    url: Annotated[str | None, typer.Argument(help="A running server's URL.", show_default=False)] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Serve the packaged demo model and load that.")] = False,
    config: Annotated[Path | None, typer.Option(help="Serve this configuration and load that.")] = None,
    concurrency: Annotated[str, typer.Option(help="Streams at once, separated by commas (closed loop).")] = "1,8,32",
    rate: Annotated[
        str, typer.Option(help="Instead: arrivals a second, separated by commas (open loop).", show_default=False)
    ] = "",
    duration: Annotated[float, typer.Option(help="Seconds of each run.", min=0.1)] = 10.0,
    runs: Annotated[int, typer.Option(help="Runs of each level.", min=1)] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 64,
    shared_prefix: Annotated[int, typer.Option(help="Tokens before these that all prompts of a run share.", min=0)] = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy answers; above, drawn ones.", min=0, max=2)] = 0.0,
    endpoint: Annotated[str, typer.Option(help="completions (exact lengths) or chat.")] = "completions",
    api_key: ApiKey = "",
    model: Annotated[str, typer.Option(help="With a URL; by default the server's first.")] = "",
    ttft_limit: Annotated[float | None, typer.Option(help="Goodput: most milliseconds to the first token.")] = None,
    tpot_limit: Annotated[float | None, typer.Option(help="Goodput: most milliseconds a token after it.")] = None,
    against_engine: Annotated[
        bool, typer.Option("--against-engine", help="In turns, load the engine without HTTP; tells HTTP's share.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    json: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures to this PNG.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """Load a server with streams; tell times to first token, between tokens, throughput and goodput."""
    with clear_errors(debug):
        from rich.console import Console

        from ..bench.load import Level, Workload
        from ..bench.load_summary import Limits
        from ..bench.plot import check_plots
        from ..bench.serve import ServeSettings, bench_config, bench_url
        from ..figures import write_figures
        from ..held_port import HeldPort

        if (url is not None) + demo + (config is not None) != 1:
            raise typer.BadParameter("give one of a URL, --demo and --config")
        if plot is not None:
            check_plots()
        if rate:
            levels = tuple(Level(duration, rate=each) for each in _numbers(rate, float, "--rate"))
        else:
            levels = tuple(Level(duration, each) for each in _numbers(concurrency, int, "--concurrency"))
        settings = ServeSettings(
            levels,
            Workload(model, endpoint, prompt_tokens, max_tokens, seed, shared_prefix, temperature=temperature),
            runs,
            Limits(_seconds(ttft_limit), _seconds(tpot_limit)),
            against_engine,
            api_key,
        )
        if url is not None:
            found = bench_url(url, settings)
        else:
            with HeldPort() as port:
                chosen = configuration(config, demo, port.number if demo else None)
                try:
                    found = bench_config(chosen, settings, say=say, keep_logs=debug)
                except KeyboardInterrupt:
                    raise typer.Exit(_STOPPED) from None
        Console().print(found.table())
        if json is not None:
            write_figures(json, found.figures())
        if plot is not None:
            found.plot(plot)


def _numbers(text: str, kind: type, option: str) -> list:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise typer.BadParameter(f"{option}: {text!r} must be numbers above 0, separated by commas")
    return numbers


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
