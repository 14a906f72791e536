"""Making checkpoints: calibrate, sensitivity, quantize, synthesize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Demo, JsonFile, WorkDir, clear_errors, say


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
    with clear_errors(debug):
        from ..calibrate import command
        from ..demo.files import DEMO_CALIBRATION, DEMO_MODEL

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
    with clear_errors(debug):
        from ..demo.files import DEMO_CALIBRATION, DEMO_MODEL
        from ..evaluate.command import WORK_DIR
        from ..sensitivity import command as sensitivity_command

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
    with clear_errors(debug):
        from ..quantize import command

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
    with clear_errors(debug):
        from ..synthesize import Synthesis, parse_changes, synthesize

        written = synthesize(target, Synthesis(model, parse_changes(set or []), format, law, seed))
        say(f"{target}: {written / 1e9:.2f} GB")
