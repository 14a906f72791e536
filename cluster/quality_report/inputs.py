"""What the report reads: an evaluation's figures, a sensitivity file, and the manifests of quantized checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluate.intervals import Interval, wilson
from ..figures import Figure, read_figures
from ..quantize.manifest import Manifest, MatrixError
from ..quantize.matrix import QuantizeError
from ..sensitivity.sensitivity import Sensitivity

ALL_TASKS = "all"
_INTERVALS = ("perplexity", "perplexity_ratio", "kl", "top1")


class ReportError(ValueError):
    """An input of the report is not what it should be; the message names the file and the field."""


@dataclass(frozen=True)
class EvalColumn:
    """One evaluated checkpoint. kl in nats a token and top1, a share, against the reference column, perplexity_ratio
    over it; None: not measured. bytes: of its tensors on disk. tasks: shares of right answers by name."""

    label: str
    perplexity: Interval | None
    perplexity_ratio: Interval | None
    kl: Interval | None
    top1: Interval | None
    bytes: int | None
    tasks: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Columns in the file's order; how much text and how many tasks they saw, 0 for none."""

    columns: tuple[EvalColumn, ...]
    tokens: int
    documents: int
    tasks: int

    @property
    def families(self) -> tuple[str, ...]:
        """Names of task scores but for that of all, in the file's order."""
        names = dict.fromkeys(name for column in self.columns for name in column.tasks)
        return tuple(name for name in names if name != ALL_TASKS)

    def task_share(self, column: EvalColumn) -> Interval | None:
        """The share of all tasks that a column got right, with Wilson's interval."""
        share = column.tasks.get(ALL_TASKS)
        return None if share is None or not self.tasks else wilson(round(share * self.tasks), self.tasks)


@dataclass(frozen=True)
class Quantized:
    """One quantized checkpoint. matrices: the error of each; uncalibrated: those that calibration did not reach."""

    label: str
    matrices: tuple[MatrixError, ...]
    uncalibrated: tuple[str, ...]

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(sorted({matrix.format for matrix in self.matrices}))


@dataclass(frozen=True)
class Inputs:
    """At least one of them is there."""

    evaluation: Evaluation | None
    sensitivity: Sensitivity | None
    quantized: tuple[Quantized, ...]


def read_inputs(evaluation: Path | None, sensitivity: Path | None, quantized: Sequence[Path]) -> Inputs:
    """Raises ReportError and SensitivityError, naming the file."""
    if evaluation is None and sensitivity is None and not quantized:
        raise ReportError("give at least one of --eval, --sensitivity and --quantized")
    return Inputs(
        None if evaluation is None else read_evaluation(evaluation),
        None if sensitivity is None else read_sensitivity(sensitivity),
        tuple(read_quantized(folder, label) for folder, label in zip(quantized, labels(quantized), strict=True)),
    )


def labels(folders: Sequence[Path]) -> list[str]:
    """The end of each path, as long as it takes to tell it from the others. Raises ReportError for one given twice."""
    places = [folder.resolve().parts for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ReportError(f"--quantized {Path(*place)}: given twice")
    return [_label(place, places) for place in places]


def _label(place: tuple[str, ...], places: Sequence[tuple[str, ...]]) -> str:
    lengths = range(1, len(place) + 1)
    alone = (length for length in lengths if [other[-length:] for other in places].count(place[-length:]) == 1)
    return "/".join(place[-next(alone, len(place)) :])


def read_evaluation(file: Path) -> Evaluation:
    """The figures that `flyray eval --json` wrote. Raises ReportError."""
    try:
        found = read_figures(file)
    except OSError as error:
        raise ReportError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ReportError(f"{file} holds no figures; give what 'flyray eval --json FILE' wrote") from None
    for figure in found.values():
        if isinstance(figure.value, bool) or not isinstance(figure.value, int | float):
            raise ReportError(f"{file}: {figure.name} is {figure.value!r}, must be a number")
    labels = _labels(found)
    if not labels:
        raise ReportError(
            f"{file}: has no figure perplexity.LABEL and no task_score.all.LABEL; give what 'flyray eval --json' wrote"
        )
    counts = {name: int(found[f"eval.{name}"].value) if f"eval.{name}" in found else 0 for name in _COUNTS}
    columns = tuple(_column(file, found, label, labels) for label in labels)
    return Evaluation(columns, counts["tokens"], counts["documents"], counts["tasks"])


_COUNTS = ("tokens", "documents", "tasks")


def _labels(found: Mapping[str, Figure]) -> list[str]:
    names = [name.partition(".")[2] for name in found if name.startswith("perplexity.")]
    bounds = {f"{name}.{end}" for name in names for end in ("low", "high")}
    prefix = f"task_score.{ALL_TASKS}."
    with_tasks = [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
    return list(dict.fromkeys([*(name for name in names if name not in bounds), *with_tasks]))


def _column(file: Path, found: Mapping[str, Figure], label: str, labels: Sequence[str]) -> EvalColumn:
    intervals = {kind: _interval(file, found, f"{kind}.{label}") for kind in _INTERVALS}
    size = found.get(f"bytes.{label}")
    tasks: dict[str, float] = {}
    for name, figure in found.items():
        if name.startswith("task_score.") and name.endswith(f".{label}"):
            # "w8a8" also ends "extra.w8a8", where that is a label of its own.
            longer = [other for other in labels if len(other) > len(label) and name.endswith(f".{other}")]
            if not longer:
                tasks[name.removeprefix("task_score.").removesuffix(f".{label}")] = float(figure.value)
    return EvalColumn(label=label, **intervals, bytes=None if size is None else int(size.value), tasks=tasks)


def _interval(file: Path, found: Mapping[str, Figure], name: str) -> Interval | None:
    if name not in found:
        return None
    try:
        return Interval(*(float(found[part].value) for part in (name, f"{name}.low", f"{name}.high")))
    except KeyError as error:
        raise ReportError(f"{file}: has {name}, but not {error.args[0]}") from None


def read_sensitivity(file: Path) -> Sensitivity:
    """The file of a run, finished or not. Raises SensitivityError, and ReportError if nothing was measured yet."""
    found = Sensitivity.read(file)
    if not found.units:
        raise ReportError(f"{file}: units is empty: no group of experts was measured yet")
    return found


def read_quantized(folder: Path, label: str) -> Quantized:
    """From the manifest of a quantizing run. Raises ReportError."""
    try:
        manifest = Manifest.read(folder)
    except (QuantizeError, OSError) as error:
        raise ReportError(str(error)) from None
    records = [manifest.files[name] for name in sorted(manifest.files)]
    return Quantized(
        label,
        tuple(matrix for record in records for matrix in record.matrices),
        tuple(name for record in records for name in record.uncalibrated),
    )
