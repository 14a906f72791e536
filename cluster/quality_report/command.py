"""`flyray report OUT.html`: one page of what quantizing lost, from whatever was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..figures import replace_text, versions
from ..quantize.manifest import MatrixError
from . import plots
from .advice import advice
from .inputs import Inputs, Quantized, read_inputs

WORST = 20
"""Matrices in the table of the worst."""


@dataclass(frozen=True)
class Plot:
    """A plot and what to see in it."""

    title: str
    svg: Markup
    caption: str


def run(
    target: str | Path,
    *,
    evaluation: Path | None = None,
    sensitivity: Path | None = None,
    quantized: Sequence[Path] = (),
) -> None:
    """The command: reads what is given and writes the page. Raises what `read_inputs` raises, and ReportError when
    matplotlib is not installed."""
    replace_text(Path(target), render(read_inputs(evaluation, sensitivity, quantized)))


def render(inputs: Inputs) -> str:
    """The page: one HTML file that needs nothing else, and no scripts."""
    environment = Environment(
        loader=PackageLoader(__package__ or "", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        inputs=inputs,
        advice=advice(inputs),
        plots=_plots(inputs),
        worst=_worst(inputs.quantized),
        families=inputs.evaluation.families if inputs.evaluation else (),
        unreached=[(each.label, _experts(each.uncalibrated)) for each in inputs.quantized if each.uncalibrated],
        versions=versions(),
    )


def _plots(inputs: Inputs) -> list[Plot]:
    found: list[Plot] = []
    if inputs.evaluation is not None:
        ends = (inputs.sensitivity.low, inputs.sensitivity.high) if inputs.sensitivity else None
        for kind, title in (("kl", "Bytes against KL divergence"), ("perplexity_ratio", "Bytes against perplexity")):
            if svg := plots.bytes_against(inputs.evaluation, kind, ends):
                caption = "Bars are 95 % intervals over documents. Further left and lower is better."
                found.append(Plot(title, svg, caption))
        if svg := plots.task_shares(inputs.evaluation):
            caption = f"{inputs.evaluation.tasks} tasks a checkpoint; bars are Wilson's 95 % intervals."
            found.append(Plot("Tasks", svg, caption))
    if (measured := inputs.sensitivity) is not None:
        found.append(
            Plot(
                "Loss by layer",
                plots.loss_by_layer(measured),
                f"KL divergence when only a group of experts is at {measured.low}, over all at {measured.high}; "
                f"{measured.tokens:,} tokens of {measured.documents} documents, 95 % intervals paired by document.",
            )
        )
        found.append(
            Plot(
                "Loss against the budget",
                plots.budget_curve(measured),
                "The best choice for every budget of bytes, as the mixed recipe makes it. Measured points show whether "
                "the units' losses add up.",
            )
        )
    if any(matrix.relative > 0 for each in inputs.quantized for matrix in each.matrices):
        svg = plots.error_histograms(inputs.quantized)
        found.append(Plot("Errors of the matrices", svg, "A long tail to the right is where clipping or 8 bits help."))
    return found


def _worst(quantized: Sequence[Quantized]) -> list[tuple[str, MatrixError]]:
    """The matrices with the largest relative errors of all checkpoints, and of each one the very worst."""
    ranked = sorted(
        ((each.label, matrix) for each in quantized for matrix in each.matrices),
        key=lambda row: (-row[1].relative, row[0], row[1].name),
    )
    firsts = [next(row for row in ranked if row[0] == each.label) for each in quantized if each.matrices]
    chosen = {id(row[1]) for row in [*ranked[:WORST], *firsts]}
    return [row for row in ranked if id(row[1]) in chosen]


def _experts(matrices: Sequence[str]) -> list[str]:
    """Experts of matrices, each once, in their order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in matrices))
