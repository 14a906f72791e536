"""Running a model: serve, chat, batch, demo, trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import ApiKey, Config, Debug, Demo, JsonFile, WorkDir, clear_errors, configuration, say


def serve(
    config: Config = None,
    demo: Demo = False,
    port: Annotated[int | None, typer.Option(help="Another port than the configuration's.", min=1, max=65535)] = None,
    debug: Debug = False,
) -> None:
    """Serve a model with OpenAI's endpoints until Ctrl-C."""
    with clear_errors(debug):
        from .. import serve as server

        server.serve(configuration(config, demo, port), say=say, keep_logs=debug)


def chat(
    url: Annotated[
        str | None, typer.Argument(help="A server's URL, as http://127.0.0.1:8000.", show_default=False)
    ] = None,
    demo: Demo = False,
    api_key: ApiKey = "",
    model: Annotated[str | None, typer.Option(help="One of the server's models; by default its first.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    thinking: Annotated[bool, typer.Option(help="Think before answering.")] = True,
    temperature: Annotated[float | None, typer.Option(help="Randomness; by default the model's.", min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", min=1)] = None,
    debug: Debug = False,
) -> None:
    """Talk to a server, or with --demo to the demo model."""
    with clear_errors(debug):
        from ..chat_terminal import ChatSettings, converse, converse_demo

        settings = ChatSettings(model, system, thinking, temperature, max_tokens)
        if demo == (url is not None):
            raise typer.BadParameter("give either a server's URL or --demo")
        if url is None:
            converse_demo(settings, keep_logs=debug)
        else:
            converse(url, settings, api_key)


def batch(
    input: Annotated[Path, typer.Argument(help="Requests, a line each, in OpenAI's batch form.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Results; what stands there already is not run again.")],
    url: Annotated[str | None, typer.Option(help="A running server.", show_default=False)] = None,
    api_key: ApiKey = "",
    config: Annotated[Path | None, typer.Option(help="Start the engine of this configuration.")] = None,
    demo: Demo = False,
    concurrency: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 32,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Run lines again that had errors.")] = False,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Run a file of requests at low priority; stop it at any time and go on with the same command."""
    with clear_errors(debug):
        from ..batch import command as batch_command

        if url is not None and (demo or config is not None):
            raise typer.BadParameter("give one of --url, --config and --demo")
        raise typer.Exit(
            batch_command.run(
                input,
                output,
                url=url,
                api_key=api_key,
                config=None if url is not None else configuration(config, demo, None),
                concurrency=concurrency,
                retry_errors=retry_errors,
                json_path=json,
                keep_logs=debug,
            )
        )


def key(
    file: Annotated[Path, typer.Argument(help="The file that `serve.api_keys_file` names.", show_default=False)],
    name: Annotated[str, typer.Argument(help="Whose it is, to find its line again.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Make an API key: it is printed once, and the file gets its digest."""
    with clear_errors(debug):
        from ..front.api_keys import add_key, new_key

        made = new_key()
        add_key(file, name, made)
        say(made)


def show_demo(
    once: Annotated[bool, typer.Option("--once", help="End after the batch instead of serving on.")] = False,
    port: Annotated[int, typer.Option(help="Where to serve.", min=1, max=65535)] = 8000,
    work_dir: WorkDir = None,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Quantize the demo model into every format, measure it, serve it, and run a batch."""
    with clear_errors(debug):
        from ..demo import demo as show

        raise typer.Exit(
            show.run(once=once, port=port, work_dir=work_dir or show.WORK_DIR, json_path=json, keep_logs=debug)
        )


def trace(
    output: Annotated[Path, typer.Argument(help="The file to write (JSON, for Perfetto).")],
    config: Annotated[Path | None, typer.Option(help="The engine's configuration.")] = None,
    demo: Demo = False,
    steps: Annotated[int, typer.Option(help="Steps to record.", min=1, max=1000)] = 16,
    sequences: Annotated[int, typer.Option(help="Sequences that run in them.", min=1)] = 8,
    debug: Debug = False,
) -> None:
    """Record an engine's steps and draw them beside the planned ones."""
    with clear_errors(debug):
        from .. import trace_command

        settings = trace_command.TraceSettings(steps, sequences)
        raise typer.Exit(trace_command.run(configuration(config, demo, None), output, settings, keep_logs=debug))
