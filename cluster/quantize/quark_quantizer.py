"""AMD Quark, run file to file on a few matrices at a time.

Quark's `direct_quantize_checkpoint` wants a checkpoint folder, keeps a whole file in memory as float32, and needs a
weight and its scale in one file. So some matrices at a time are laid out as a small checkpoint of their own in a
temporary folder, and Quark's export of that is read back: any layout of the source works, in bounded memory.

Quark is imported where it is needed only: the import takes 10 to 40 s, and the first one compiles an extension.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...actors.checkpoint import Checkpoint
from .matrix import QuantizeError
from .plan import MatrixPlan

SCHEMES = {"w8a8": "flyray_int8_per_channel", "w8a8-fp8": "ptpc_fp8", "w4a8-channel": "int4_fp8"}
"""The formats that Quark makes, and its scheme for each; flyray registers its own for INT8, Quark's is per tensor."""

_PACKAGES = ("amd-quark", "transformers", "compressed-tensors", "ninja")


def require_quark() -> None:
    """Raises QuantizeError if a package that Quark needs is not installed. Imports nothing."""
    for package in _PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise QuantizeError(f"{package} is not installed: pip install 'flyray[quantize]'") from None


def quark_quantize(
    format: str, source_format: str, config: Mapping[str, Any], prefix: str, matrices: Sequence[MatrixPlan]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Quantizes the matrices through Quark.

    config is the source's config.json. Returns the tensors of each matrix by name and part, and the
    quantization_config that Quark writes for them.
    """
    quantizer = quark_quantizer(format)
    with tempfile.TemporaryDirectory(prefix="flyray-quark-") as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.mkdir()
        (source / "config.json").write_text(json.dumps(dict(config)))
        save_file(_staged_tensors(prefix, matrices), source / "model.safetensors", metadata={"format": "pt"})
        quantizer.direct_quantize_checkpoint(str(source), str(target), device="cpu")
        made = Checkpoint(target)
        if made.expert_format() != format:
            raise QuantizeError(f"Quark wrote {made.expert_format()} where {format} was asked for")
        parts: dict[str, dict[str, Tensor]] = {}
        for name in made.names:
            matrix, _, part = name.rpartition(".")
            parts.setdefault(matrix, {})[part] = made.read(name)
        return parts, made.config["quantization_config"]


def _staged_tensors(prefix: str, matrices: Sequence[MatrixPlan]) -> dict[str, Tensor]:
    staged: dict[str, Tensor] = {}
    for matrix in matrices:
        parts = matrix.read()
        for part, tensor in parts.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise QuantizeError(f"{matrix.name}.{part} holds values that are not finite")
        if "weight_packed" in parts:  # compressed-tensors needs the shape to decompress
            parts.setdefault("weight_shape", torch.tensor([matrix.rows, matrix.columns], dtype=torch.int32))
        staged |= {f"{prefix}{matrix.name}.{part}": tensor for part, tensor in parts.items()}
    return staged


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
