"""How fast parts of flyray are: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, JsonFile, clear_errors, say


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
