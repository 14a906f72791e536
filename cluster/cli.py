"""The command line: `flyray COMMAND`. Every command's code is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .config import FlyrayConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

USAGE_ERROR = 2
RUN_ERROR = 1
# Errors that lie in what the user gave, by name: their modules are not imported for this.
_USAGE_ERRORS = ("BatchFileError", "CheckpointError", "ConfigError", "PrecisionError", "TokenizerError")

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and keep Ray's logs.")]
Demo = Annotated[bool, typer.Option("--demo", help="Take the packaged demo model, on this machine's CPU.")]
Config = Annotated[Path | None, typer.Argument(help="A configuration file (YAML).", show_default=False)]


@app.command()
def serve(
    config: Config = None,
    demo: Demo = False,
    port: Annotated[int | None, typer.Option(help="Another port than the configuration's.", min=1, max=65535)] = None,
    debug: Debug = False,
) -> None:
    """Serve a model with OpenAI's endpoints until Ctrl-C."""
    with _clear_errors(debug):
        from . import serve as server

        server.serve(_configuration(config, demo, port), say=_say, keep_logs=debug)


@app.command()
def chat(
    url: Annotated[
        str | None, typer.Argument(help="A server's URL, as http://127.0.0.1:8000.", show_default=False)
    ] = None,
    demo: Demo = False,
    model: Annotated[str | None, typer.Option(help="One of the server's models; by default its first.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    thinking: Annotated[bool, typer.Option(help="Think before answering.")] = True,
    temperature: Annotated[float | None, typer.Option(help="Randomness; by default the model's.", min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", min=1)] = None,
    debug: Debug = False,
) -> None:
    """Talk to a server, or with --demo to the demo model."""
    with _clear_errors(debug):
        from .chat_terminal import ChatSettings, converse, converse_demo

        settings = ChatSettings(model, system, thinking, temperature, max_tokens)
        if demo == (url is not None):
            raise typer.BadParameter("give either a server's URL or --demo")
        if url is None:
            converse_demo(settings, keep_logs=debug)
        else:
            converse(url, settings)


def main() -> None:
    """The console script."""
    app()


def _configuration(path: Path | None, demo: bool, port: int | None) -> FlyrayConfig:
    """The file's configuration or the demo's. Raises ConfigError."""
    from .config import ConfigError, demo_config, load_config

    if demo == (path is not None):
        raise ConfigError("give either a configuration file or --demo")
    config = demo_config() if path is None else load_config(path)
    if port is not None:
        config = config.model_copy(update={"serve": config.serve.model_copy(update={"port": port})})
    return config


@contextmanager
def _clear_errors(debug: bool) -> Iterator[None]:
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


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()
