"""What a quantizing run will read and write, worked out and checked from headers alone, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...actors.checkpoint import Checkpoint
from ...actors.expert_format import EXPERT_TENSOR
from ...actors.safetensors_header import TensorEntry, dtype_name
from ...actors.statistics import Statistics, fingerprint
from ...kernels.formats import PACK
from .assignment import Modules, assign, check_experts, mixed_experts
from .calibrated import PACKED_COLUMNS
from .location import Location, same_place
from .matrix import SOURCE_FORMATS, QuantizeError, TensorSpec, check_columns, output_specs
from .mixed import Choice, choose_from_file
from .plan_inputs import QuantizeInputs
from .recipe import Recipe, Scheme
from .rounding import NO_MOMENTS, check_scheme
from .target_folder import TargetFolder, target_folder


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix that is quantized. name is without the checkpoint's prefix; kind is gate_proj, up_proj or down_proj
    of a routed expert, "self_attn.o_proj" and the like of a linear. source_format: "w4a16", or "bf16" for floats."""

    name: str
    kind: str
    rows: int
    columns: int
    scheme: Scheme
    source_format: str
    source: Mapping[str, TensorEntry]

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def source_bytes(self) -> int:
        return sum(entry.bytes for entry in self.source.values())

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that are written, by the last part of their names."""
        return output_specs(self.scheme.format, self.rows, self.columns)


@dataclass(frozen=True)
class CopyPlan:
    """A tensor whose values stay as they are. name is without the checkpoint's prefix."""

    name: str
    stored_name: str
    entry: TensorEntry

    @property
    def source_bytes(self) -> int:
        return self.entry.bytes


Item = MatrixPlan | CopyPlan


@dataclass(frozen=True)
class FilePlan:
    """One output file: what becomes of the tensors of the source file of this name, in its order."""

    name: str
    target: Location
    prefix: str
    items: tuple[Item, ...]

    @property
    def path(self) -> Location:
        return self.target / self.name

    @property
    def matrices(self) -> tuple[MatrixPlan, ...]:
        return tuple(item for item in self.items if isinstance(item, MatrixPlan))

    @property
    def by_quark(self) -> bool:
        return any(matrix.scheme.by == "quark" for matrix in self.matrices)

    @property
    def source_bytes(self) -> int:
        return sum(item.source_bytes for item in self.items)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The header, by stored names."""
        specs: dict[str, TensorSpec] = {}
        for item in self.items:
            if isinstance(item, CopyPlan):
                specs[item.stored_name] = TensorSpec(item.entry.dtype, item.entry.shape)
            else:
                specs |= {f"{self.prefix}{item.name}.{part}": spec for part, spec in item.specs.items()}
        return specs


@dataclass(frozen=True)
class QuantizePlan:
    """A whole run. label: its name in reports. unquantized: stored names of the Linear modules that are copied, for
    config.json. choice: of a mixed recipe."""

    label: str
    recipe: Recipe
    inputs: QuantizeInputs
    source: Checkpoint
    target: Location
    source_format: str
    unquantized: tuple[str, ...]
    files: tuple[FilePlan, ...]
    choice: Choice | None = None

    @property
    def folder(self) -> TargetFolder:
        return target_folder(self.target)

    @cached_property
    def matrices(self) -> tuple[MatrixPlan, ...]:
        return tuple(matrix for file in self.files for matrix in file.matrices)

    @cached_property
    def source_bytes(self) -> int:
        return sum(file.source_bytes for file in self.files)

    @cached_property
    def target_bytes(self) -> int:
        return sum(spec.bytes for file in self.files for spec in file.specs.values())


def plan_quantization(
    checkpoint: Checkpoint, target: Location, label: str, recipe: Recipe, inputs: QuantizeInputs
) -> QuantizePlan:
    """Raises QuantizeError for inputs that do not go with the recipe, a source that is already quantized, rules that
    match nothing or what cannot be quantized, and a matrix that does not fit its format (by name); CheckpointError,
    StatisticsError and SensitivityError for what cannot be read."""
    if recipe.smoothing is not None and any(scheme.by == "quark" for scheme in recipe.schemes()):
        raise QuantizeError(f"recipe {recipe.name}: smoothing needs by: flyray in every rule")
    inputs.check(recipe)
    source_format = checkpoint.expert_format()
    if source_format not in SOURCE_FORMATS:
        raise QuantizeError(
            f"{checkpoint.path} is already quantized to {source_format}; "
            "quantize the native (compressed-tensors INT4) or the bf16 checkpoint instead"
        )
    if inputs.calibration is not None:
        _check_statistics(inputs.calibration, checkpoint, recipe)
    modules = Modules.of(checkpoint.names)
    choice = _choice(checkpoint, recipe, inputs, modules)
    schemes = assign(recipe, modules, choice)
    check_experts(modules, schemes, source_format)
    if recipe.smoothing is not None:
        _check_smoothing(modules, schemes, source_format)
    files = tuple(_files(checkpoint, target, source_format, schemes))
    _check_schemes(files, recipe, inputs)
    return QuantizePlan(
        label=label,
        recipe=recipe,
        inputs=inputs,
        source=checkpoint,
        target=target,
        source_format=source_format,
        unquantized=_unquantized_linears(checkpoint, schemes),
        files=files,
        choice=choice,
    )


def check_target(source: Location, target: Location) -> None:
    """Refuses a target that is the source, or is a file."""
    if same_place(source, target):
        raise QuantizeError(f"{target}: source and target are the same folder")
    if target.exists() and not target.is_dir():
        raise QuantizeError(f"{target}: is a file, not a folder")


def check_space(target: Location, needed: int) -> None:
    """Refuses a run that the disk of a local `target` certainly cannot hold."""
    if not isinstance(target, Path):
        return
    existing = next(folder for folder in (target, *target.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise QuantizeError(f"{target}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _check_statistics(calibration: Path, checkpoint: Checkpoint, recipe: Recipe) -> None:
    statistics = Statistics.open(calibration)
    statistics.check(checkpoint)
    if not statistics.plan.moments_block and any(scheme.error_feedback for scheme in recipe.schemes()):
        raise QuantizeError(f"{calibration}: {NO_MOMENTS}")


def _check_smoothing(modules: Modules, schemes: Mapping[str, Scheme], source_format: str) -> None:
    """Smoothing reaches the experts that are copied too, and those of a native checkpoint are packed."""
    for module in modules.matrices:
        if source_format != "bf16" and module not in schemes:
            raise QuantizeError(f"{module}: {PACKED_COLUMNS}")


def _check_schemes(files: Sequence[FilePlan], recipe: Recipe, inputs: QuantizeInputs) -> None:
    """Raises QuantizeError, naming the first matrix, for what its source cannot give."""
    seen = set()
    for matrix in (matrix for file in files for matrix in file.matrices if matrix.scheme.by == "flyray"):
        if (kind := (matrix.scheme, matrix.source_format)) not in seen:
            seen.add(kind)
            try:
                check_scheme(*kind, calibrated=inputs.calibration is not None, smooths=recipe.smoothing is not None)
            except QuantizeError as error:
                raise QuantizeError(f"recipe {recipe.name}: {matrix.name}: {error}") from error


def _choice(checkpoint: Checkpoint, recipe: Recipe, inputs: QuantizeInputs, modules: Modules) -> Choice | None:
    mixed = recipe.mixed
    if mixed is None or inputs.sensitivity is None:
        return None
    experts = mixed_experts(recipe, modules)
    first = min(experts)
    shapes = [_shape(checkpoint, name) for name, expert in modules.matrices.items() if expert == first]
    return choose_from_file(
        inputs.sensitivity,
        mixed,
        inputs.budget,
        experts=experts,
        fingerprint=fingerprint(checkpoint),
        low_bytes=_bytes(mixed.low.format, shapes),
        high_bytes=_bytes(mixed.high.format, shapes),
    )


def _bytes(format: str, shapes: Sequence[tuple[int, int]]) -> int:
    return sum(spec.bytes for rows, columns in shapes for spec in output_specs(format, rows, columns).values())


def _shape(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """Rows and columns of a matrix's weights."""
    if checkpoint.has(f"{module}.weight_packed"):
        rows, words = checkpoint.entry(f"{module}.weight_packed").shape
        return rows, words * PACK
    shape = checkpoint.entry(f"{module}.weight").shape
    if len(shape) != 2:
        raise QuantizeError(f"{module}.weight has shape {list(shape)}, expected [rows, columns]")
    return shape[0], shape[1]


def _files(
    checkpoint: Checkpoint, target: Location, source_format: str, schemes: Mapping[str, Scheme]
) -> Iterator[FilePlan]:
    """Output files keep their source's names. A matrix goes where its weight lies, whatever file holds its scales; a
    source file of nothing but scales has no output file."""
    items: dict[str, list[Item]] = {}
    parts = _parts(checkpoint, schemes)
    for name in checkpoint.names:
        module, _, part = name.rpartition(".")
        entry = checkpoint.entry(name)
        if module not in schemes:
            items.setdefault(entry.file.name, []).append(CopyPlan(name, checkpoint.stored_name(name), entry))
        elif part in ("weight", "weight_packed"):
            matrix = _matrix(checkpoint, module, schemes[module], source_format, parts[module])
            items.setdefault(entry.file.name, []).append(matrix)
    for file, found in sorted(items.items()):
        yield FilePlan(file, target, checkpoint.prefix, tuple(found))


def _parts(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> dict[str, dict[str, TensorEntry]]:
    found: dict[str, dict[str, TensorEntry]] = {}
    for name in checkpoint.names:
        module, _, part = name.rpartition(".")
        if module in schemes:
            found.setdefault(module, {})[part] = checkpoint.entry(name)
    return found


def _matrix(
    checkpoint: Checkpoint, module: str, scheme: Scheme, source_format: str, parts: Mapping[str, TensorEntry]
) -> MatrixPlan:
    expert = EXPERT_TENSOR.fullmatch(f"{module}.weight")
    rows, columns = _shape(checkpoint, module)
    if expert is not None:
        check_columns(module, columns, source_format, scheme.format)
        return MatrixPlan(module, f"{expert['kind']}_proj", rows, columns, scheme, source_format, parts)
    if set(parts) != {"weight"} or not parts["weight"].dtype.is_floating_point or parts["weight"].dtype.itemsize < 2:
        seen = ", ".join(f"{part} {dtype_name(entry.dtype)}" for part, entry in parts.items())
        raise QuantizeError(f"{module} has the tensors {seen}: only bfloat16, float16 and float32 can be quantized")
    kind = module.split(".", 3)[3].removeprefix("mlp.") if "shared_experts" in module else module.split(".", 3)[3]
    return MatrixPlan(module, kind, rows, columns, scheme, "bf16", parts)


def _unquantized_linears(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> tuple[str, ...]:
    """What Quark's file-to-file export lists as excluded: every module with a `weight` of two or more dimensions that
    is neither a norm nor an embedding, by stored name."""
    modules: list[str] = []
    for name in checkpoint.names:
        module, _, part = name.rpartition(".")
        is_linear = part == "weight" and not module.endswith("norm") and "embed" not in module
        if is_linear and module not in schemes and len(checkpoint.entry(name).shape) >= 2:
            modules.append(checkpoint.stored_name(name).removesuffix(".weight"))
    return tuple(sorted(modules))
