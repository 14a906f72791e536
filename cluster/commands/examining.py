"""What is wrong on this machine: doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import RUN_ERROR, Debug, JsonFile, clear_errors

_TABLE_WIDTH = 118


def doctor(
    model: Annotated[
        str, typer.Option(help="Whose shapes the kernels are checked in: a shape, a config.json or a folder.")
    ] = "",
    target: Annotated[
        str, typer.Option(help="Compile for this GPU as well, here or not: gfx942.", show_default=False)
    ] = "",
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Look for what would go wrong: packages, GPUs and what hides them, memory bandwidth, every kernel.

    Exits with 1 where there is a fault. The report is made to be pasted into a bug.
    """
    with clear_errors(debug):
        from rich.console import Console

        from ...actors.model.config import ModelConfig
        from ..config import DEMO_MODEL
        from ..doctor.doctor import examine, findings_table
        from ..figures import write_figures
        from ..synthesize import Synthesis, model_file

        shapes = ModelConfig.from_dict(Synthesis(model_file(model or str(DEMO_MODEL))).config())
        found = list(examine(shapes, target))
        Console(width=_TABLE_WIDTH).print(findings_table(found))
        if json is not None:
            write_figures(json, [figure for each in found for figure in each.figures])
        if any(each.state == "fault" for each in found):
            raise typer.Exit(RUN_ERROR)
