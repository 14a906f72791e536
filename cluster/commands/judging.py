"""What a checkpoint is worth: eval, verify, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Demo, JsonFile, WorkDir, clear_errors, say, words


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
    kv_dtype: Annotated[
        str, typer.Option(help="Of KV pages: auto, int8, fp8, separated by commas; all is measured with each.")
    ] = "auto",
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
    with clear_errors(debug):
        from ..demo.files import DEMO_CALIBRATION, DEMO_MODEL, DEMO_TASKS, DEMO_TEXT
        from ..evaluate import command as eval_command

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
                kv_dtypes=words(kv_dtype) or ("auto",),
                settings=settings,
                work_dir=work_dir or eval_command.WORK_DIR,
                json_path=json,
                keep_logs=debug,
            )
        )


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
    with clear_errors(debug):
        from ..demo.files import DEMO_TASKS, DEMO_TEXT
        from ..evaluate.settings import WORK_DIR, EvalSettings
        from ..verify import command as verify_command
        from ..verify.limits import Limits

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
    with clear_errors(debug):
        from ..quality_report import command as report_command

        report_command.run(output, evaluation=evaluation, sensitivity=sensitivity, quantized=quantized or ())
        say(f"wrote {output}")
