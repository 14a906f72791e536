"""What commands share: their common options, how errors end them, and how they find a configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..config import FlyrayConfig

USAGE_ERROR = 2
RUN_ERROR = 1
# Errors that lie in what the user gave, by name: their modules are not imported for this.
_USAGE_ERRORS = (
    "ApiKeysError",
    "BatchFileError",
    "BenchUsageError",
    "CalibrationSettingsError",
    "CalibrationTextError",
    "CheckpointError",
    "ConfigError",
    "EvalError",
    "PlanError",
    "PrecisionError",
    "QuantizeError",
    "RayAddressError",
    "ReportError",
    "SensitivityError",
    "SpaceError",
    "StatisticsError",
    "SynthesizeError",
    "TaskError",
    "TextError",
    "TokenizerError",
    "VerifyError",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and keep Ray's logs.")]
Demo = Annotated[bool, typer.Option("--demo", help="Take the packaged demo model, on this machine's CPU.")]
ApiKey = Annotated[
    str,
    typer.Option(
        "--api-key", envvar="FLYRAY_API_KEY", help="The server's API key, if it asks for one.", show_default=False
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", show_default=False)]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw the numbers into this PNG.", show_default=False)]
WorkDir = Annotated[Path | None, typer.Option(help="Keeps quantized checkpoints; by default ~/.cache/flyray.")]
Config = Annotated[Path | None, typer.Argument(help="A configuration file (YAML).", show_default=False)]


def configuration(path: Path | None, demo: bool, port: int | None) -> FlyrayConfig:
    """The file's configuration or the demo's. Raises ConfigError."""
    from ..config import ConfigError, demo_config, load_config

    if demo == (path is not None):
        raise ConfigError("give either a configuration (a YAML file) or --demo")
    config = demo_config() if path is None else load_config(path)
    if port is not None:
        config = config.model_copy(update={"serve": config.serve.model_copy(update={"port": port})})
    return config


@contextmanager
def clear_errors(debug: bool) -> Iterator[None]:
    """One line for an error: exit code 2 if the call or a file is wrong, else 1. With `debug` the traceback as well."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            raise
        typer.echo(f"flyray: {error or type(error).__name__}", err=True)
        raise typer.Exit(USAGE_ERROR if type(error).__name__ in _USAGE_ERRORS else RUN_ERROR) from None


def words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def counts(text: str, option: str) -> tuple[int, ...]:
    """Numbers above 0 between commas. Raises BadParameter naming the option."""
    numbers = words(text)
    if not numbers or not all(word.isdecimal() and int(word) for word in numbers):
        raise typer.BadParameter(f"{option}: {text!r} must be numbers above 0, separated by commas")
    return tuple(map(int, numbers))


def say(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    typer.echo(line)
    sys.stdout.flush()
