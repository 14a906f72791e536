"""AMD Quark, run file to file on a few matrices at a time.

Quark's `direct_quantize_checkpoint` wants a checkpoint folder, keeps a whole file in memory as float32, and needs a
weight and its scale in one file. So some matrices at a time are laid out as a small checkpoint of their own in a
temporary folder, and Quark's export of that is read back: any layout of the source works, in bounded memory.

Quark is imported where it is needed only: the import takes 7 s and more, and the first one compiles an extension.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from ...kernels.formats import GROUP_SIZE, PACK
from ..scratch_folder import scratch_folder
from .matrix import QuantizeError, output_specs
from .quark_scan import short_scan

SCHEMES = {"w8a8": "flyray_int8_per_channel", "w8a8-fp8": "ptpc_fp8", "w4a8-channel": "int4_fp8"}
"""The formats that Quark makes, and its scheme for each; flyray registers its own for INT8, Quark's is per tensor.
Its INT4 of one stage is left out: Quark 0.13 packs it otherwise than it says (see test_quark_faults.py)."""

ROW_WISE = ("w8a8", "w8a8-fp8")
"""Formats in which a row's result depends on that row alone: a large matrix may be given as pieces of its rows, and the
results put together. In w4a8-channel the first scale is one of the whole matrix."""

# Bytes a weight of what each writes, and of the copies that Quark makes of one matrix at a time (measured).
_MEMORY = {"w8a8": (1.0, 12), "w8a8-fp8": (1.0, 9), "w4a8-channel": (0.5, 24)}
_FIXED_BYTES = 80 << 20

# What Quark is told about the staged tensors: packed ones are native, the others are as they are.
_STAGED_CONFIG = {
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": GROUP_SIZE,
                    "symmetric": True,
                },
            }
        },
    },
}

_PACKAGES = ("amd-quark", "transformers", "compressed-tensors", "ninja")


def require_quark() -> None:
    """Raises QuantizeError if a package that Quark needs is not installed. Imports nothing."""
    for package in _PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise QuantizeError(f"{package} is not installed: pip install 'flyray[quantize]'") from None


Parts = Mapping[str, Tensor]
"""A matrix's tensors by the last part of their names."""


def quark_round(format: str, matrices: Mapping[str, Parts]) -> dict[str, dict[str, Tensor]]:
    """Rounds matrices, or any other [N, K] linear weights, through Quark: the bytes that it would write itself.

    matrices: by any names; each either native ("weight_packed", "weight_scale") or plain ("weight", bfloat16 or
    float32; Quark computes its scales in that precision). Returns the tensors of each as `output_specs` has them.
    Takes up to `quark_bytes` of memory. Raises QuantizeError for values that are not finite, and for anything but the
    tensors that `format` has.
    """
    # Every matrix poses as a routed expert's: that is what Quark's template quantizes, whatever they really are.
    posing = {f"model.layers.0.mlp.experts.{number}.up_proj": name for number, name in enumerate(matrices)}
    # Below the system's temporary folder (TMPDIR), not in shared memory: what is staged lives for seconds, so that most
    # of it is deleted before the disk sees it. In shared memory it would count against the worker's memory, and what a
    # killed process leaves behind would be missing until the machine restarts.
    with scratch_folder(Path(tempfile.gettempdir(), f"flyray-quark-{os.getuid()}"), "staged-") as folder:
        source, target = folder / "source", folder / "target"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(_STAGED_CONFIG))
        staged = {f"{pose}.{part}": tensor for pose, name in posing.items() for part, tensor in _stage(name, matrices)}
        save_file(staged, source / "model.safetensors", metadata={"format": "pt"})
        del staged
        # Quark would delete the target, also on an error, and so it never sees a folder of the user's.
        quark_quantizer(format).direct_quantize_checkpoint(str(source), str(target), device="cpu")
        made: dict[str, dict[str, Tensor]] = {name: {} for name in matrices}
        # Read, not mapped, so that nothing refers to the files when they are removed.
        for stored, tensor in load((target / "model.safetensors").read_bytes()).items():
            pose, _, part = stored.rpartition(".")
            made[posing[pose]][part] = tensor
    for name, parts in made.items():
        _check(format, name, matrices[name], parts)
    return made


def quark_bytes(format: str, sizes: Iterable[tuple[int, int]]) -> int:
    """What `quark_round` takes at its peak beyond the matrices given to it, for matrices of these rows and columns.

    A bound: all of them as float32 and as written, and the copies of the largest that Quark makes in between.
    """
    weights = [rows * columns for rows, columns in sizes]
    written, copies = _MEMORY[format]
    return int(sum(weights) * (4 + written) + max(weights, default=0) * copies) + _FIXED_BYTES


def _stage(name: str, matrices: Mapping[str, Parts]) -> Iterator[tuple[str, Tensor]]:
    parts = matrices[name]
    for part, tensor in parts.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise QuantizeError(f"{name}.{part} holds values that are not finite")
        yield part, tensor
    if "weight_packed" in parts and "weight_shape" not in parts:  # compressed-tensors decompresses to this
        yield "weight_shape", torch.tensor(_shape(parts), dtype=torch.int32)


def _shape(parts: Parts) -> tuple[int, int]:
    packed = parts.get("weight_packed")
    rows, columns = parts["weight"].shape if packed is None else (packed.shape[0], packed.shape[1] * PACK)
    return rows, columns


def _check(format: str, name: str, source: Parts, made: Parts) -> None:
    expected = {part: (spec.dtype, spec.shape) for part, spec in output_specs(format, *_shape(source)).items()}
    found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in made.items()}
    if found != expected:
        raise QuantizeError(f"Quark wrote {found} for {name}, where {format} has {expected}")


def quark_quantizer(format: str) -> Any:
    quark = import_quark()
    config = importlib.import_module("quark.torch.quantization.config.config")
    scheme = SCHEMES[format]
    if scheme not in quark.LLMTemplate.get_supported_schemes():
        quark.LLMTemplate.register_scheme(scheme, _int8_per_channel(config))
    # This template quantizes the routed experts only, as the published checkpoints do.
    return quark.ModelQuantizer(quark.LLMTemplate.get("kimi_k25").get_config(scheme=scheme))


def _int8_per_channel(config: Any) -> Any:
    """INT8 weights with one static scale an output row, INT8 activations with one dynamic scale a token."""
    common = {"symmetric": True, "scale_type": "float32", "round_method": "half_even"}
    weight = config.Int8PerChannelSpec(ch_axis=0, is_dynamic=False, **common)
    activations = config.Int8PerChannelSpec(ch_axis=1, is_dynamic=True, **common)
    return config.QLayerConfig(weight=weight.to_quantization_spec(), input_tensors=activations.to_quantization_spec())


def import_quark() -> Any:
    """quark.torch, its log lines limited to errors, its extension compiled under a lock that dies with the process."""
    # Quark reads its log level from the environment, once, while it is imported.
    os.environ.setdefault("QUARK_LOG_LEVEL", "error")
    try:
        with short_scan():
            with ExtensionLock(_extension_folder()):
                importlib.import_module("quark.torch.kernel")
            return importlib.import_module("quark.torch")
    except (ImportError, OSError, RuntimeError) as error:
        raise QuantizeError(
            f"AMD Quark could not be loaded: {error}. Its first import compiles an extension: "
            "it needs g++, ninja and pip install 'flyray[quantize]'"
        ) from error


def _extension_folder() -> Path:
    """Where this Python and this torch keep Quark's compiled extension."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-torch{torch.__version__}"
    return Path.home() / ".cache" / "flyray" / "torch_extensions" / version


class ExtensionLock:
    """Holds a build folder that only flyray uses for Quark's extension; the lock dies with the process.

    torch guards a build with a plain file, and waits for ever if a killed process left it behind. In a folder that
    only processes under this lock use, such a file is known to be stale, and is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.folder / "flyray.lock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        for stale in self.folder.glob("*/lock"):
            stale.unlink()
        # torch reads the folder from the environment, each time that it looks for an extension.
        os.environ["TORCH_EXTENSIONS_DIR"] = str(self.folder)

    def __exit__(self, *error: object) -> None:
        os.close(self._file)
