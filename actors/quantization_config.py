"""What config.json's quantization_config says of every weight: in flyray's words, AMD Quark's, or compressed-tensors'.

flyray's are for what Quark's cannot say: `w4a8`, and checkpoints whose experts are in several formats.

    {"quant_method": "flyray", "version": 2, "format": "mixed",
     "experts": {"1": {"w8a8": "0-5,12", "w4a8-channel": "6-11,13-23"}},    # layer, format, experts; mixed only
     "linears": {"w8a8": ["model.layers.0.self_attn.o_proj"]},              # with the checkpoint's prefix
     "exclude": ["lm_head"]}                                                # names or patterns, never quantized
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any

from ..kernels.formats import FORMATS, GROUP_SIZE
from .safetensors_header import CheckpointError

MIXED = "mixed"
"""The format of a checkpoint whose experts are in several."""
_FIELD = "quantization_config"
_VERSIONS = (1, 2)


@dataclass(frozen=True)
class Excluded:
    """Modules that are not quantized, in the published forms: whole names, globs, regular expressions after "re:".

    A regular expression must match from the name's beginning, as in vLLM's loader.
    """

    names: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()

    def has(self, *names: str) -> bool:
        """Whether one of a module's names (with and without the checkpoint's prefix) is meant."""
        return any(name in self.names or any(pattern.match(name) for pattern in self.patterns) for name in names)


@dataclass(frozen=True)
class StatedFormats:
    """Formats are those of `formats.FORMATS`; "bf16" is for what is not quantized, float32 too.

    experts: of all experts, or "mixed", then by_expert[layer, expert] has them. linears: of every other linear that is
    neither in int8_linears (names with the prefix) nor excluded.
    """

    experts: str
    linears: str = "bf16"
    by_expert: Mapping[tuple[int, int], str] = field(default_factory=dict)
    int8_linears: frozenset[str] = frozenset()
    excluded: Excluded = Excluded()

    def matrix(self, layer: int, expert: int, *names: str) -> str | None:
        """Of a routed expert's matrix, `names` its module's with and without the prefix; None if nothing is said."""
        if self.excluded.has(*names):
            return "bf16"
        return self.by_expert.get((layer, expert)) if self.experts == MIXED else self.experts

    def linear(self, *names: str) -> str:
        """Of another linear module."""
        if self.excluded.has(*names):
            return "bf16"
        return "w8a8" if any(name in self.int8_linears for name in names) else self.linears


def read_quantization(config: Mapping[str, Any]) -> StatedFormats:
    """Reads config.json, the quantization_config at its top or in text_config.

    Raises CheckpointError, naming the field, for what flyray cannot read; the caller adds the file.
    """
    text = config.get("text_config")
    nested = text.get(_FIELD) if isinstance(text, Mapping) else None
    stated = config.get(_FIELD) or nested
    if not stated:
        return StatedFormats("bf16")
    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    match method:
        case "compressed-tensors":
            return _compressed_tensors(stated)
        case "quark":
            return _quark(stated)
        case "flyray":
            return _flyray(stated)
    raise CheckpointError(f"{_FIELD}.quant_method is {method!r}; known are compressed-tensors, quark and flyray")


def _compressed_tensors(stated: Mapping[str, Any]) -> StatedFormats:
    try:
        weights = stated["config_groups"]["group_0"]["weights"]
        seen = {key: weights[key] for key in ("num_bits", "type", "strategy", "group_size", "symmetric")}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{_FIELD}.config_groups.group_0.weights lacks {error}") from None
    if len(stated["config_groups"]) > 1:
        raise CheckpointError(f"{_FIELD}.config_groups has {sorted(stated['config_groups'])}; only one can be read")
    seen |= {"format": stated.get("format"), "actorder": weights.get("actorder")}
    expected = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": GROUP_SIZE,
        "symmetric": True,
        "format": "pack-quantized",
        "actorder": None,
    }
    for key, value in expected.items():
        if seen[key] != value:
            raise CheckpointError(f"{_FIELD}: {key} is {seen[key]!r}; only {value!r} can be read")
    return StatedFormats("w4a16")


def _quark(stated: Mapping[str, Any]) -> StatedFormats:
    for key in ("layer_quant_config", "layer_type_quant_config"):
        if stated.get(key):
            raise CheckpointError(f"{_FIELD}.{key} is not empty; only one global_quant_config can be read")
    layers = stated.get("global_quant_config") or {}
    weight = layers.get("weight") if isinstance(layers, Mapping) else None
    stages = weight if isinstance(weight, list) else [weight]
    law = [(stage.get("dtype"), stage.get("qscheme")) for stage in stages if isinstance(stage, Mapping)]
    known = {
        (("fp8_e4m3", "per_channel"),): "w8a8-fp8",
        (("int8", "per_channel"),): "w8a8",
        (("fp8_e4m3", "per_tensor"), ("int4", "per_channel")): "w4a8-channel",
    }
    found = known.get(tuple(law))
    if found is None:
        raise CheckpointError(f"{_FIELD}.global_quant_config.weight is {law}; known are {[list(k) for k in known]}")
    export = stated.get("export") or {}
    pack = export.get("pack_method", "reorder") if isinstance(export, Mapping) else export
    if found == "w4a8-channel" and pack != "reorder":
        raise CheckpointError(f"{_FIELD}.export.pack_method is {pack!r}; only 'reorder' can be read")
    return StatedFormats(found, found, excluded=_excluded(stated))


def _flyray(stated: Mapping[str, Any]) -> StatedFormats:
    version, format = stated.get("version", 1), stated.get("format")
    if version not in _VERSIONS:
        raise CheckpointError(f"{_FIELD}.version is {version!r}, this flyray reads {_VERSIONS}")
    if version == 1:
        for key in ("experts", "linears"):
            if key in stated:
                raise CheckpointError(f"{_FIELD}.{key} needs version 2, version is 1")
    if format not in FORMATS and (format != MIXED or version == 1):
        raise CheckpointError(f"{_FIELD}.format is {format!r}, not one of {FORMATS}, nor {MIXED!r} of version 2")
    if format != MIXED and stated.get("experts"):
        raise CheckpointError(f"{_FIELD}.experts is for format {MIXED!r} alone, format is {format!r}")
    by_expert = dict(_experts(stated)) if format == MIXED else {}
    return StatedFormats(format, "bf16", by_expert, frozenset(_linears(stated)), _excluded(stated))


def _experts(stated: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int], str]]:
    layers = stated.get("experts")
    if not isinstance(layers, Mapping) or not layers:
        raise CheckpointError(f"{_FIELD}.experts is {layers!r}; format {MIXED!r} needs {{layer: {{format: experts}}}}")
    for layer, formats in layers.items():
        where = f"{_FIELD}.experts.{layer}"
        if not (isinstance(layer, str) and layer.isascii() and layer.isdigit() and isinstance(formats, Mapping)):
            raise CheckpointError(f'{where}: expected {{"<layer number>": {{"<format>": "0-5,12"}}}}')
        seen: set[int] = set()
        for format, text in formats.items():
            if format not in FORMATS:
                raise CheckpointError(f"{where}: {format!r} is not one of {FORMATS}")
            for expert in parse_experts(text, f"{where}.{format}"):
                if expert in seen:
                    raise CheckpointError(f"{where} names expert {expert} twice")
                seen.add(expert)
                yield (int(layer), expert), format


def parse_experts(text: object, where: str) -> list[int]:
    """ "0-5,12" -> [0, 1, 2, 3, 4, 5, 12]. Raises CheckpointError with `where` for anything else."""
    experts: list[int] = []
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
        low = int(match[1]) if match else 0
        high = int(match[2] or low) if match else -1
        if high < low:
            raise CheckpointError(f'{where} is {text!r}; expert numbers such as "0-5,12" are right')
        experts += range(low, high + 1)
    return experts


def format_experts(experts: Sequence[int]) -> str:
    """[0, 1, 2, 3, 4, 5, 12] -> "0-5,12", what `parse_experts` reads."""
    runs: list[list[int]] = []
    for expert in sorted(experts):
        if runs and expert == runs[-1][1] + 1:
            runs[-1][1] = expert
        else:
            runs.append([expert, expert])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _linears(stated: Mapping[str, Any]) -> list[str]:
    linears = stated.get("linears") or {}
    if not isinstance(linears, Mapping) or set(linears) - {"w8a8"}:
        raise CheckpointError(f'{_FIELD}.linears is {linears!r}; only {{"w8a8": [module names]}} can be read')
    return _names(linears.get("w8a8"), "linears.w8a8")


def _excluded(stated: Mapping[str, Any]) -> Excluded:
    names, patterns = set(), []
    for entry in _names(stated.get("exclude"), "exclude"):
        if not entry.startswith("re:") and not any(sign in entry for sign in "*?["):
            names.add(entry)
            continue
        try:
            patterns.append(re.compile(entry[3:] if entry.startswith("re:") else translate(entry)))
        except re.error as error:
            raise CheckpointError(f"{_FIELD}.exclude: {entry!r} is no regular expression: {error}") from None
    return Excluded(frozenset(names), tuple(patterns))


def _names(value: object, key: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{_FIELD}.{key} is {value!r}; a list of module names is right")
    return value
