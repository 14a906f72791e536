"""`flyray synthesize`: random checkpoints in real shapes, to measure and to test with what cannot be had.

Every value is drawn from one law, scaled by 1 / sqrt(columns), as a function of (seed, tensor name). Drawing each of
a trillion values would take days: groups of 32 columns are drawn once, and every matrix is put together from them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ..actors.checkpoint import INDEX
from ..actors.model.config import ModelConfig
from ..actors.model.fields import ConfigError
from ..actors.model.tensors import TensorSpec, attention_tensors, expert_shapes, mlp_tensors, outer_tensors
from ..kernels.formats import GROUP_SIZE, PACK, pack_native, quantize_native
from .names import nearest
from .quantize.matrix import TensorSpec as WrittenSpec
from .quantize.plan import check_space
from .quantize.safetensors_writer import SafetensorsWriter

MODELS = Path(__file__).parent / "models"
PREFIX = "language_model."
LAWS: dict[str, Callable[[torch.Generator, tuple[int, ...]], Tensor]] = {
    "gaussian": lambda generator, shape: torch.randn(shape, generator=generator),
    "laplace": lambda generator, shape: _laplace(generator, shape),
    "student-t5": lambda generator, shape: _student_t(generator, shape, 5),
}
_BANK_GROUPS = 1 << 16
_NATIVE: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP_SIZE,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
            },
        }
    },
}


class SynthesizeError(ValueError):
    """What was asked for cannot be made; the message names what and says what can."""


@dataclass(frozen=True)
class Synthesis:
    """What to make. model: a shipped shape or a config.json. changes: fields of its text_config. format: of the routed
    experts, "w4a16" (native INT4 groups of 32) or "bf16". law: of the weights, one of LAWS."""

    model: str = "kimi-k2.5"
    changes: Mapping[str, int] = field(default_factory=dict)
    format: str = "w4a16"
    law: str = "gaussian"
    seed: int = 0

    @property
    def native(self) -> bool:
        return self.format == "w4a16"

    def config(self) -> dict[str, Any]:
        """config.json. Raises SynthesizeError for an unknown model or field."""
        content = read_shape(self.model)
        content.pop("vision_config", None)  # its tensors are not made
        text = content.get("text_config", content)
        for key, value in self.changes.items():
            if not isinstance(text.get(key), int) or isinstance(text[key], bool):
                known = [name for name in text if isinstance(text[name], int)]
                raise SynthesizeError(f"{key}: no number in {self.model}'s configuration{nearest(key, known)}")
            text[key] = value
        for part in (content, text):  # special tokens that a smaller vocabulary no longer has
            for key in [key for key in part if key.endswith("token_id") and (part[key] or 0) >= text["vocab_size"]]:
                del part[key]
        text.pop("quantization_config", None)
        if self.native:
            text["quantization_config"] = copy.deepcopy(_NATIVE)
        return content


def models() -> tuple[str, ...]:
    """Names of the shipped shapes."""
    return tuple(sorted(file.stem for file in MODELS.glob("*.json")))


def model_file(model: str) -> str:
    """A shape's name, or the config.json of a folder."""
    return str(Path(model) / "config.json") if Path(model).is_dir() else model


def parse_changes(texts: Sequence[str]) -> dict[str, int]:
    """["num_hidden_layers=3"] as a dict. Raises SynthesizeError."""
    changes: dict[str, int] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not value.isdecimal():
            raise SynthesizeError(f"{text}: expected a field and a number, as num_hidden_layers=3")
        changes[key] = int(value)
    return changes


def synthesize(target: Path, what: Synthesis, progress: bool = True) -> int:
    """Writes the checkpoint, a file a layer and one for the rest, and returns the bytes of its tensors.

    It has no tokenizer: it can be quantized, planned with and measured, not talked to. Raises SynthesizeError.
    """
    if what.format not in ("w4a16", "bf16"):
        raise SynthesizeError(f"format: {what.format!r} is neither w4a16 nor bf16")
    if what.law not in LAWS:
        raise SynthesizeError(f"law: {what.law!r} is none of {', '.join(LAWS)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SynthesizeError(f"{target}: is not an empty folder")
    content = what.config()
    try:
        config = ModelConfig.from_dict(content)
    except ConfigError as error:
        raise SynthesizeError(str(error)) from error
    if what.native and any(columns % GROUP_SIZE for _, columns in expert_shapes(config).values()):
        raise SynthesizeError(f"hidden_size and moe_intermediate_size: native experts need multiples of {GROUP_SIZE}")
    files = dict(_files(config, what.native))
    total = sum(spec.bytes for specs in files.values() for spec in specs.values())
    check_space(target, total)
    target.mkdir(parents=True, exist_ok=True)
    drawing = _Drawing(what)
    for file, specs in track(files.items(), "synthesizing", disable=not progress):
        with SafetensorsWriter(target / file, specs) as writer:
            for name, tensor in drawing.tensors(specs):
                writer.write(name, tensor)
            writer.commit()
    weight_map = {name: file for file, specs in files.items() for name in specs}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    (target / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    return total


def read_shape(model: str) -> dict[str, Any]:
    """The config.json of a shipped shape, or the one named. Raises SynthesizeError."""
    return json.loads(_shape_file(model).read_text(encoding="utf-8"))


def _shape_file(model: str) -> Path:
    if model in models():
        return MODELS / f"{model}.json"
    file = Path(model)
    if file.suffix == ".json" and file.is_file():
        return file
    raise SynthesizeError(f"model: {model!r} is none of {', '.join(models())}, nor a config.json")


def _files(config: ModelConfig, native: bool) -> Iterator[tuple[str, dict[str, WrittenSpec]]]:
    """File name -> its tensors by stored name."""
    count = config.num_hidden_layers + 1

    def file(number: int, specs: Iterable[TensorSpec]) -> tuple[str, dict[str, WrittenSpec]]:
        written = {PREFIX + spec.name: WrittenSpec(spec.dtypes[0], spec.shapes[0]) for spec in specs}
        return f"model-{number:05d}-of-{count:06d}.safetensors", written

    for layer in range(config.num_hidden_layers):
        specs = [*attention_tensors(config, layer), *mlp_tensors(config, layer)]
        name, written = file(layer + 1, specs)
        if layer in config.moe_layers:
            written |= _expert_specs(config, layer, native)
        yield name, written
    yield file(count, outer_tensors(config))


def _expert_specs(config: ModelConfig, layer: int, native: bool) -> dict[str, WrittenSpec]:
    specs: dict[str, WrittenSpec] = {}
    for expert in range(config.n_routed_experts):
        for matrix, (rows, columns) in expert_shapes(config).items():
            at = f"{PREFIX}model.layers.{layer}.mlp.experts.{expert}.{matrix}"
            if native:
                specs[f"{at}.weight_packed"] = WrittenSpec(torch.int32, (rows, columns // PACK))
                specs[f"{at}.weight_scale"] = WrittenSpec(torch.bfloat16, (rows, columns // GROUP_SIZE))
                specs[f"{at}.weight_shape"] = WrittenSpec(torch.int32, (2,))
            else:
                specs[f"{at}.weight"] = WrittenSpec(torch.bfloat16, (rows, columns))
    return specs


class _Drawing:
    """Tensors from a bank of drawn groups."""

    def __init__(self, what: Synthesis) -> None:
        self._seed = what.seed
        generator = self._generator("bank")
        self._groups = LAWS[what.law](generator, (_BANK_GROUPS, GROUP_SIZE))
        values, self._scale = quantize_native(self._groups)
        self._packed = pack_native(values)

    def tensors(self, specs: Mapping[str, WrittenSpec]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, in order."""
        for name, spec in specs.items():
            module, _, part = name.rpartition(".")
            if part == "weight_packed":
                yield from self._native(module, spec.shape)
            elif len(spec.shape) == 1 and part in ("weight", "e_score_correction_bias"):
                yield name, torch.full(spec.shape, 1.0 if part == "weight" else 0.0, dtype=spec.dtype)
            elif part == "weight":
                yield name, self._weight(module, spec)

    def _native(self, matrix: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
        """All three tensors of a matrix; packed has the given shape."""
        rows, columns = shape[0], shape[1] * PACK
        chosen = self._choose(matrix, rows, columns)
        scale = self._scale[:, 0] / math.sqrt(columns)
        yield f"{matrix}.weight_packed", self._packed[chosen].flatten(1)
        yield f"{matrix}.weight_scale", scale[chosen]
        yield f"{matrix}.weight_shape", torch.tensor([rows, columns], dtype=torch.int32)

    def _weight(self, module: str, spec: WrittenSpec) -> Tensor:
        rows, columns = spec.shape
        groups = (self._groups / math.sqrt(columns)).to(spec.dtype)
        return groups[self._choose(module, rows, columns)].flatten(1)[:, :columns].contiguous()

    def _choose(self, name: str, rows: int, columns: int) -> Tensor:
        """Numbers of the groups that a matrix is made of, [rows, groups]."""
        shape = (rows, -(-columns // GROUP_SIZE))
        return torch.randint(_BANK_GROUPS, shape, generator=self._generator(name), dtype=torch.int32)

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _laplace(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    uniform = torch.rand(shape, generator=generator) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-12).log() / math.sqrt(2)


def _student_t(generator: torch.Generator, shape: tuple[int, ...], freedom: int) -> Tensor:
    normal = torch.randn((*shape, freedom + 1), generator=generator)
    return normal[..., 0] / normal[..., 1:].square().mean(-1).sqrt() / math.sqrt(freedom / (freedom - 2))
