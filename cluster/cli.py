"""The command line: `flyray COMMAND`. What each command takes stands in `commands`."""

from __future__ import annotations

import typer

from .commands import benching, building, examining, judging, loading, planning, quantizing, serving, soaking

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Serves Kimi-K2.5 on a Ray cluster, or a small demo model on this machine.",
)
# In the order of `flyray --help`.
app.command("serve")(serving.serve)
app.command("chat")(serving.chat)
app.command("batch")(serving.batch)
app.command("key")(serving.key)
app.command("eval")(judging.evaluate)
app.command("verify")(judging.verify)
app.command("demo")(serving.show_demo)
app.command("quantize")(quantizing.quantize)
app.command("calibrate")(quantizing.calibrate)
app.command("synthesize")(quantizing.synthesize)
app.command("trace")(serving.trace)
app.command("sensitivity")(quantizing.sensitivity)
app.command("report")(judging.report)
app.command("plan")(planning.plan)
app.command("build")(building.build)
app.command("doctor")(examining.doctor)

bench_app = typer.Typer(no_args_is_help=True, help="Measure how fast parts of flyray are on this machine.")
bench_app.command("quantize")(benching.bench_quantize)
bench_app.command("serve")(loading.bench_serve)
bench_app.command("engine")(benching.bench_engine)
bench_app.command("kernels")(benching.bench_kernels)
bench_app.command("layers")(benching.bench_layers)
bench_app.command("soak")(soaking.bench_soak)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The console script."""
    app()
