"""What a model's kernels compile to: build."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import RUN_ERROR, Debug, JsonFile, clear_errors, counts, words

_TABLE_WIDTH = 150


def build(
    target: Annotated[str, typer.Option(help="Architecture to compile for: gfx942 is MI300X and MI325X.")] = "gfx942",
    model: Annotated[
        str, typer.Option(help="A shape (kimi-k2.5), a config.json, or a checkpoint's folder.")
    ] = "kimi-k2.5",
    format: Annotated[str, typer.Option(help="Of the routed experts, separated by commas.")] = (
        "w4a8,w8a8,w8a8-fp8,bf16"
    ),
    expert_parallel: Annotated[
        str, typer.Option(help="Numbers of GPUs that the experts are spread over, separated by commas.")
    ] = "1,2,3,4,8",
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Compile every kernel that the engine would launch for a model, without a GPU, and show what came out.

    Exits with 1 where a kernel spills registers, needs scratch or more LDS than there is, or lacks the matrix
    instruction that its products are to become. What is on the disk is not compiled again.
    """
    with clear_errors(debug):
        from rich.console import Console
        from rich.progress import Progress

        from ...actors.model.config import ModelConfig
        from ..build.build import build_all
        from ..build.built import Built, NotBuilt
        from ..build.launches import BuildTask
        from ..build.report import build_figures, build_table, faults
        from ..figures import write_figures
        from ..synthesize import Synthesis, model_file

        config = ModelConfig.from_dict(Synthesis(model_file(model)).config())
        task = BuildTask(config, words(format), counts(expert_parallel, "--expert-parallel"), target)
        found: list[Built | NotBuilt] = []
        compiled = 0
        console = Console(width=_TABLE_WIDTH)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(f"compiling for {target}", total=None)
            for step in build_all(task):
                found.append(step.built)
                compiled = step.compiled
                progress.update(bar, total=step.total, completed=step.done)
        console.print(build_table(found))
        broken = list(faults(found))
        console.print(f"{len(found)} kernels for {target}, {compiled} compiled now; {len(broken)} must not run")
        for line in broken:
            console.print(line, markup=False)
        if json is not None:
            write_figures(json, build_figures(found, compiled))
        if broken:
            raise typer.Exit(RUN_ERROR)
