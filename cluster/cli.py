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

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Serves Kimi-K2.5 on a Ray cluster, or a small demo model on this machine.",
)

bench_app = typer.Typer(no_args_is_help=True, help="Measure how fast parts of flyray are on this machine.")
app.add_typer(bench_app, name="bench")

USAGE_ERROR = 2
RUN_ERROR = 1
# Errors that lie in what the user gave, by name: their modules are not imported for this.
_USAGE_ERRORS = (
    "BatchFileError",
    "CalibrationSettingsError",
    "CalibrationTextError",
    "CheckpointError",
    "ConfigError",
    "EvalError",
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
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", show_default=False)]
WorkDir = Annotated[Path | None, typer.Option(help="Keeps quantized checkpoints; by default ~/.cache/flyray.")]
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


@app.command()
def batch(
    input: Annotated[Path, typer.Argument(help="Requests, a line each, in OpenAI's batch form.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Results; what stands there already is not run again.")],
    url: Annotated[str | None, typer.Option(help="A running server.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="Start the engine of this configuration.")] = None,
    demo: Demo = False,
    concurrency: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 32,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Run lines again that had errors.")] = False,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Run a file of requests at low priority; stop it at any time and go on with the same command."""
    with _clear_errors(debug):
        from .batch import command as batch_command

        if url is not None and (demo or config is not None):
            raise typer.BadParameter("give one of --url, --config and --demo")
        raise typer.Exit(
            batch_command.run(
                input,
                output,
                url=url,
                config=None if url is not None else _configuration(config, demo, None),
                concurrency=concurrency,
                retry_errors=retry_errors,
                json_path=json,
                keep_logs=debug,
            )
        )


@app.command("eval")
def evaluate(
    checkpoints: Annotated[list[Path] | None, typer.Argument(help="Checkpoint folders.", show_default=False)] = None,
    demo: Demo = False,
    format: Annotated[
        str, typer.Option(help="Formats, shipped recipes and recipes' .yaml files, separated by commas; all: formats.")
    ] = "all",
    tasks: Annotated[int, typer.Option(help="Tasks of each family; 0 for none.", min=0)] = 20,
    text_bytes: Annotated[int, typer.Option(help="Bytes of text; 0 for none.", min=0)] = 200_000,
    text: Annotated[Path | None, typer.Option(help="Text of your own: .txt or .jsonl, also .xz, .gz.")] = None,
    tasks_file: Annotated[Path | None, typer.Option(help="Tasks of your own: .jsonl, also .xz, .gz.")] = None,
    calibration_text: Annotated[
        Path | None,
        typer.Option(help="Text to calibrate recipes with that need it; with --demo, its own."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of text scored at once.", min=2)] = 1024,
    shards: Annotated[int, typer.Option(help="Shards of each engine.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each shard.", min=1)] = 1,
    lanes: Annotated[int, typer.Option(help="Engines that run at once.", min=1)] = 2,
    work_dir: WorkDir = None,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Measure checkpoints in several formats and recipes side by side: perplexity, KL divergence from the checkpoint's
    own weights, top-1 agreement with them, and task scores.

    The checkpoint itself (w4a16 or bf16) is the reference and is always measured. While it runs, its predictions lie in
    the work folder: 4 bytes times the vocabulary for every token of text. What recipes need is made and kept there too.
    """
    with _clear_errors(debug):
        from .demo.files import DEMO_CALIBRATION, DEMO_MODEL, DEMO_TASKS, DEMO_TEXT
        from .evaluate import command as eval_command

        if demo == bool(checkpoints):
            raise typer.BadParameter("give either checkpoints or --demo")
        settings = eval_command.EvalSettings(
            tasks=tasks, text_bytes=text_bytes, window=window, shards=shards, threads=threads, lanes=lanes
        )
        raise typer.Exit(
            eval_command.run(
                checkpoints or [DEMO_MODEL],
                text_file=text or DEMO_TEXT,
                tasks_file=tasks_file or DEMO_TASKS,
                calibration_file=calibration_text or (DEMO_CALIBRATION if demo else None),
                formats=[name.strip() for name in format.split(",")],
                settings=settings,
                work_dir=work_dir or eval_command.WORK_DIR,
                json_path=json,
                keep_logs=debug,
            )
        )


@app.command()
def verify(
    a: Annotated[str, typer.Argument(help="A checkpoint: FOLDER, or FOLDER:PRECISION.", show_default=False)],
    b: Annotated[str | None, typer.Argument(help="Another of the same model, compared with A.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Most KL divergence of B from A, nats a token.", min=0)] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Least share of tokens where both find the same one likeliest.", min=0, max=1)
    ] = None,
    max_perplexity_ratio: Annotated[float | None, typer.Option(help="Most perplexity of B, over A's.", min=0)] = None,
    max_weight_error: Annotated[
        float | None,
        typer.Option(help="Most relative error of any quantized tensor of B; copied ones must then be equal.", min=0),
    ] = None,
    max_row_error: Annotated[
        float | None, typer.Option(help="Most relative error of any row of a quantized tensor of B.", min=0)
    ] = None,
    min_task_share: Annotated[float | None, typer.Option(help="Least right answers of B, over A's.", min=0)] = None,
    engine: Annotated[bool, typer.Option(help="Also load and run what is verified.")] = True,
    tasks: Annotated[int, typer.Option(help="Tasks of each family; 0 for none.", min=0)] = 20,
    text_bytes: Annotated[int, typer.Option(help="Bytes of text; 0 for none.", min=0)] = 200_000,
    text: Annotated[Path | None, typer.Option(help="Text of your own: .txt or .jsonl, also .xz, .gz.")] = None,
    tasks_file: Annotated[Path | None, typer.Option(help="Tasks of your own: .jsonl, also .xz, .gz.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of text scored at once.", min=2)] = 1024,
    shards: Annotated[int, typer.Option(help="Shards of each engine.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each shard.", min=1)] = 1,
    lanes: Annotated[int, typer.Option(help="Engines that run at once.", min=1)] = 2,
    work_dir: WorkDir = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write checks and figures to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Check that a checkpoint is whole and sound, and how far it is from another of the same model.

    Alone: SHA256SUMS, every tensor's name, shape and dtype, config.json, the tokenizer, NaN and infinity, and that it
    loads and passes the golden prompt. Against A also every tensor, KL divergence, top-1, perplexity and tasks.

    Files and structure always count; numbers count where a limit is given. Who publishes an 8-bit checkpoint might set
    --max-weight-error 0.03 --max-kl 0.005 --min-top1 0.95 --max-perplexity-ratio 1.005; of w4a8 from native INT4
    --max-weight-error 0.03 as well; of one INT4 scale a row, --max-weight-error 0.2 --max-kl 0.1.

    Exit code 0: nothing failed; 1: something did, and is named; 2: the call is wrong.
    """
    with _clear_errors(debug):
        from .demo.files import DEMO_TASKS, DEMO_TEXT
        from .evaluate.settings import WORK_DIR, EvalSettings
        from .verify import command as verify_command
        from .verify.limits import Limits

        settings = EvalSettings(
            tasks=tasks, text_bytes=text_bytes, window=window, shards=shards, threads=threads, lanes=lanes
        )
        limits = Limits(max_kl, min_top1, max_perplexity_ratio, min_task_share, max_weight_error, max_row_error)
        raise typer.Exit(
            verify_command.run(
                a,
                b,
                limits=limits,
                text_file=text or DEMO_TEXT,
                tasks_file=tasks_file or DEMO_TASKS,
                settings=settings,
                engine=engine,
                work_dir=work_dir or WORK_DIR,
                json_path=json,
                keep_logs=debug,
            )
        )


@app.command("demo")
def show_demo(
    once: Annotated[bool, typer.Option("--once", help="End after the batch instead of serving on.")] = False,
    port: Annotated[int, typer.Option(help="Where to serve.", min=1, max=65535)] = 8000,
    work_dir: WorkDir = None,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Quantize the demo model into every format, measure it, serve it, and run a batch."""
    with _clear_errors(debug):
        from .demo import demo as show

        raise typer.Exit(
            show.run(once=once, port=port, work_dir=work_dir or show.WORK_DIR, json_path=json, keep_logs=debug)
        )


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A checkpoint, native or unquantized: a folder or an fsspec URL.")],
    target: Annotated[str, typer.Argument(help="The folder to write, or an fsspec URL.")],
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe's name, or a YAML file.")] = None,
    format: Annotated[str | None, typer.Option(help="The shipped recipe of this name.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="What flyray calibrate wrote.")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="What flyray sensitivity wrote.")] = None,
    budget: Annotated[str | None, typer.Option(help="Of a mixed recipe: bytes as '400 GB', or a share.")] = None,
    workers: Annotated[int | None, typer.Option(help="Files quantized at once; by default one a CPU.", min=1)] = None,
    memory: Annotated[str, typer.Option(help="Most memory that a worker's work takes.")] = "4 GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the target.")] = False,
    ray: Annotated[
        str,
        typer.Option(help="host:port of a Ray cluster whose nodes all see source and target, or auto; local is here."),
    ] = "local",
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Quantize a checkpoint by a recipe, file by file; stop it at any time and go on with the same command."""
    with _clear_errors(debug):
        from .quantize import command

        chosen = recipe or format
        if chosen is None or (recipe is not None and format is not None):
            raise typer.BadParameter("give one of --recipe and --format")
        raise typer.Exit(
            command.run(
                source,
                target,
                chosen,
                command.QuantizeInputs(calibration, sensitivity, budget),
                workers=workers,
                memory=memory,
                overwrite=overwrite,
                ray_address=ray,
                json_path=json,
                keep_logs=debug,
            )
        )


@app.command()
def calibrate(
    paths: Annotated[list[Path], typer.Argument(help="A checkpoint's folder, unless --demo, and the folder to write.")],
    demo: Demo = False,
    text: Annotated[Path | None, typer.Option(help="Text to run: .txt or .jsonl, also .xz, .gz.")] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to run; 0 for all of the text.", min=0)] = 0,
    window: Annotated[int, typer.Option(help="Tokens of text run as one prompt.", min=1)] = 1024,
    moments_block: Annotated[
        int, typer.Option(help="For error feedback: second moments in blocks of so many columns; 0 for none.", min=0)
    ] = 0,
    precision: Annotated[str, typer.Option(help="A format to run the model in; auto is its own.")] = "auto",
    shards: Annotated[int, typer.Option(help="Shards of the engine.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each shard.", min=1)] = 1,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Run text and keep statistics of what a model's routed experts see, to quantize it with."""
    with _clear_errors(debug):
        from .calibrate import command
        from .demo.files import DEMO_CALIBRATION, DEMO_MODEL

        if len(paths) != 2 - demo:
            raise typer.BadParameter("give a checkpoint (or --demo) and the folder to write")
        if text is None and not demo:
            raise typer.BadParameter("give --text, such as the model will be used for; only --demo has text of its own")
        settings = command.CalibrationSettings(
            text=text or DEMO_CALIBRATION,
            tokens=tokens,
            window=window,
            moments_block=moments_block,
            precision=precision,
            shards=shards,
            threads=threads,
        )
        checkpoint = DEMO_MODEL if demo else paths[0]
        raise typer.Exit(command.run(checkpoint, paths[-1], settings, json_path=json, keep_logs=debug))


@bench_app.command("quantize")
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
    with _clear_errors(debug):
        from rich.console import Console

        from .bench.quantize import bench_quantize as measure
        from .figures import write_figures
        from .quantize.recipe import load_recipe

        found = measure(source, work_dir, load_recipe(recipe), runs=runs, workers=workers, say=_say)
        Console().print(found.table())
        if json is not None:
            write_figures(json, found.figures())


@app.command()
def synthesize(
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Annotated[str, typer.Option(help="kimi-k2.5, or a config.json.")] = "kimi-k2.5",
    set: Annotated[list[str] | None, typer.Option(help="A field to change, as num_hidden_layers=3.")] = None,
    format: Annotated[str, typer.Option(help="w4a16 (native INT4 experts) or bf16.")] = "w4a16",
    law: Annotated[str, typer.Option(help="Of the weights: gaussian, laplace or student-t5.")] = "gaussian",
    seed: Annotated[int, typer.Option(help="Of the random numbers.", min=0)] = 0,
    debug: Debug = False,
) -> None:
    """Write a random checkpoint of a model's shapes, to quantize and to measure with."""
    with _clear_errors(debug):
        from .synthesize import Synthesis, parse_changes, synthesize

        written = synthesize(target, Synthesis(model, parse_changes(set or []), format, law, seed))
        _say(f"{target}: {written / 1e9:.2f} GB")


@app.command()
def trace(
    output: Annotated[Path, typer.Argument(help="The file to write (JSON, for Perfetto).")],
    config: Annotated[Path | None, typer.Option(help="The engine's configuration.")] = None,
    demo: Demo = False,
    steps: Annotated[int, typer.Option(help="Steps to record.", min=1, max=1000)] = 16,
    sequences: Annotated[int, typer.Option(help="Sequences that run in them.", min=1)] = 8,
    debug: Debug = False,
) -> None:
    """Record an engine's steps and draw them beside the planned ones."""
    with _clear_errors(debug):
        from . import trace_command

        settings = trace_command.TraceSettings(steps, sequences)
        raise typer.Exit(trace_command.run(_configuration(config, demo, None), output, settings, keep_logs=debug))


@app.command()
def sensitivity(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="[CHECKPOINT] OUT.json", help="A checkpoint (not with --demo); the file to write."),
    ],
    demo: Demo = False,
    low: Annotated[str, typer.Option(help="The format of fewer bytes, or a checkpoint in it.")] = "w4a8-channel",
    high: Annotated[str, typer.Option(help="The format of more bytes, or a checkpoint in it.")] = "w8a8",
    groups: Annotated[int, typer.Option(help="Groups that each layer's experts are measured in.", min=1)] = 4,
    calibration: Annotated[
        Path | None, typer.Option(help="Statistics of flyray calibrate: experts are grouped by use, not by number.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text of your own: .txt or .jsonl, also .xz, .gz.")] = None,
    text_bytes: Annotated[int, typer.Option(help="Bytes of text.", min=1)] = 100_000,
    window: Annotated[int, typer.Option(help="Tokens of text scored at once.", min=2)] = 1024,
    shards: Annotated[int, typer.Option(help="Shards of the engine.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each shard.", min=1)] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of another run.")] = False,
    work_dir: WorkDir = None,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Measure what each group of experts loses at the low format; stop it at any time and go on with the same command.

    The file tells `flyray quantize --recipe mixed --sensitivity FILE --budget BYTES` what stays at the high format.
    """
    with _clear_errors(debug):
        from .demo.files import DEMO_CALIBRATION, DEMO_MODEL
        from .evaluate.command import WORK_DIR
        from .sensitivity import command as sensitivity_command

        if len(paths) != (1 if demo else 2):
            raise typer.BadParameter("give a checkpoint and a file to write, or --demo and a file to write")
        settings = sensitivity_command.SensitivitySettings(
            low=low,
            high=high,
            groups=groups,
            calibration=calibration,
            text_bytes=text_bytes,
            window=window,
            shards=shards,
            threads=threads,
        )
        raise typer.Exit(
            sensitivity_command.run(
                DEMO_MODEL if demo else paths[0],
                paths[-1],
                text_file=text or DEMO_CALIBRATION,
                settings=settings,
                work_dir=work_dir or WORK_DIR,
                overwrite=overwrite,
                json_path=json,
                keep_logs=debug,
            )
        )


@app.command()
def report(
    output: Annotated[Path, typer.Argument(help="The page to write (HTML).")],
    evaluation: Annotated[Path | None, typer.Option("--eval", help="Figures of flyray eval --json.")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="The file of flyray sensitivity.")] = None,
    quantized: Annotated[
        list[Path] | None, typer.Option(help="A checkpoint that flyray quantize made; may be given again.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write one page of what quantizing lost, with plots and what to do, from whatever was measured."""
    with _clear_errors(debug):
        from .quality_report import command as report_command

        report_command.run(output, evaluation=evaluation, sensitivity=sensitivity, quantized=quantized or ())
        _say(f"wrote {output}")


def main() -> None:
    """The console script."""
    app()


def _configuration(path: Path | None, demo: bool, port: int | None) -> FlyrayConfig:
    """The file's configuration or the demo's. Raises ConfigError."""
    from .config import ConfigError, demo_config, load_config

    if demo == (path is not None):
        raise ConfigError("give either a configuration (a YAML file) or --demo")
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
