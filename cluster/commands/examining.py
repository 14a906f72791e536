"""What is wrong on this machine: doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import RUN_ERROR, Config, Debug, JsonFile, clear_errors

_TABLE_WIDTH = 118


def doctor(
    config: Config = None,
    model: Annotated[
        str, typer.Option(help="A shape, a config.json or a folder: its kernels are checked, and whether it fits here.")
    ] = "",
    target: Annotated[
        str, typer.Option(help="Compile for this GPU as well, here or not: gfx942.", show_default=False)
    ] = "",
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Look for what would go wrong: packages, limits, GPUs, what hides and what links them, memory, every kernel.

    With a configuration file or a model also whether it fits this machine's memory, and how fast its folder is read.
    Exits with 1 where there is a fault. The report is made to be pasted into a bug.
    """
    with clear_errors(debug):
        from rich.console import Console

        from ..doctor.doctor import examine, findings_table
        from ..doctor.request import examination
        from ..figures import versions, write_figures

        found = list(examine(examination(config, model, target)))
        console = Console(width=_TABLE_WIDTH)
        console.print(", ".join(f"{name} {version}" for name, version in versions().items()))
        console.print(findings_table(found))
        faults = sum(each.state == "fault" for each in found)
        console.print(f"{faults} faults, {sum(each.state == 'warning' for each in found)} warnings")
        if json is not None:
            figures = [figure for each in found for figure in each.figures]
            said = [{"state": each.state, "about": each.about, "text": each.text} for each in found]
            write_figures(json, figures, {"findings": said})
        if faults:
            raise typer.Exit(RUN_ERROR)
