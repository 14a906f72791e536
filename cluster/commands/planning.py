"""What a model needs of GPUs: plan."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Debug, JsonFile, PlotFile, clear_errors, counts, words

_TABLE_WIDTH = 118


def plan(
    model: Annotated[
        str, typer.Option(help="A shape (kimi-k2.5), a config.json, or a checkpoint's folder.")
    ] = "kimi-k2.5",
    gpu: Annotated[str, typer.Option(help="MI300X, MI325X, MI355X, H100 or H200.")] = "MI325X",
    gpus: Annotated[
        str, typer.Option(help="How many, separated by commas; the numbers stand side by side.")
    ] = "1,2,3,4,8",
    format: Annotated[
        str,
        typer.Option(
            help="Of the routed experts: w4a8, w8a8, w8a8-fp8, w4a16 …; by default a checkpoint's own, else w4a8.",
            show_default=False,
        ),
    ] = "",
    int8_weights: Annotated[
        str, typer.Option(help="Other weights in INT8: of attention, shared, dense, head.", show_default=False)
    ] = "",
    int4_weights: Annotated[str, typer.Option(help="The same in INT4.", show_default=False)] = "",
    kv_dtype: Annotated[str, typer.Option(help="Of KV pages: bf16, f32, int8 or fp8.")] = "bf16",
    context: Annotated[
        int, typer.Option(help="Tokens of a decoding sequence in the cache; 0: 8192, or the model's most.", min=0)
    ] = 0,
    prefill: Annotated[int, typer.Option(help="Tokens of a prompt; 0: 2048, or the model's most.", min=0)] = 0,
    batch: Annotated[str, typer.Option(help="Sequences that decode at once, separated by commas.")] = "1,8,32,128",
    json: JsonFile = None,
    plot: PlotFile = None,
    debug: Debug = False,
) -> None:
    """Say where a model would lie on GPUs, how large its batches may be, and how fast it could be. Needs no GPU.

    Times are a simulation of the engine's stages from published peaks and the parts of them that kernels reach on an
    H200, whose measured layers stand beside where it is the GPU; so do a maker's published latencies.
    """
    with clear_errors(debug):
        from rich.console import Console

        from ..bench.plot import check_plots
        from ..figures import write_figures
        from ..plan import report
        from ..plan.command import plan_model

        if plot is not None:
            check_plots()
        kinds = words(int8_weights), words(int4_weights)
        found = plan_model(
            model, gpu, counts(gpus, "--gpus"), format, *kinds, context, prefill, counts(batch, "--batch"), kv_dtype
        )
        console = Console(width=_TABLE_WIDTH)
        console.print(report.heading(found))
        for table in report.tables(found):
            console.print(table)
        for remark in report.remarks(found):
            console.print(remark)
        if json is not None:
            write_figures(json, report.figures(found))
        if plot is not None:
            report.write_plot(found, plot)
