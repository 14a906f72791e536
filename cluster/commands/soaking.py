"""Whether answers under load are those of requests run alone: bench soak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, JsonFile, clear_errors, say, words


def bench_soak(
    seconds: Annotated[float, typer.Option(help="How long; a third of it runs the requests alone.", min=1.0)] = 60.0,
    seed: Annotated[int, typer.Option(help="Of requests, their order and who leaves.")] = 0,
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint's folder; by default the demo model.", show_default=False)
    ] = None,
    precision: Annotated[str, typer.Option(help="As in a configuration: auto, w4a8, w8a8 and so on.")] = "auto",
    int8_weights: Annotated[
        str,
        typer.Option(
            help="Weights beside the routed experts in 8 bits: of attention, shared, dense, head.", show_default=False
        ),
    ] = "",
    int4_weights: Annotated[str, typer.Option(help="The same in 4 bits.", show_default=False)] = "",
    shards: Annotated[int, typer.Option(help="Shards of the loaded engine.", min=1)] = 2,
    rebalance: Annotated[
        float, typer.Option(help="Seconds after which the loaded engine moves experts again; 0: never.", min=0.0)
    ] = 0.0,
    kill_every: Annotated[
        float, typer.Option(help="Seconds, on average, after which a shard is killed again; 0: never.", min=0.0)
    ] = 0.0,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Load an engine with random requests, cancellations and too few pages; exit 1 at the first answer that differs
    from that of the request run alone."""
    with clear_errors(debug):
        from ..bench.soak import SoakReport, SoakSettings, soak
        from ..config import DEMO_MODEL
        from ..figures import write_figures
        from ..job import Main, job_ray, run_stoppable

        kinds = words(int8_weights), words(int4_weights)
        settings = SoakSettings(seconds, 0, seed, shards, precision, *kinds, rebalance, kill_every)
        with job_ray(settings.cpus, keep_logs=debug) as end_now:

            def run(main: Main[SoakReport]) -> SoakReport:
                return run_stoppable(main, end_now)

            report = soak(model or DEMO_MODEL, settings, say, run)
        for line in report.lines():
            say(line)
        if json is not None:
            write_figures(json, report.figures())
