"""The GPUs that torch sees, what hides others, and what their memory gives against what its maker publishes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..bench.device_ceilings import median_seconds
from ..figures import Figure
from ..plan.gpu import Gpu, gpus
from .finding import Finding

MASKS = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_COPY_BYTES = 1 << 30
_EXPECTED = 0.75  # of the published bandwidth, which a plain copy reaches on a healthy GPU


@dataclass(frozen=True)
class SeenGpu:
    """number: torch's. name: the driver's. free, total: bytes of its memory."""

    number: int
    name: str
    free: int
    total: int


def seen_gpus() -> list[SeenGpu]:
    """All that torch sees."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        found.append(SeenGpu(number, torch.cuda.get_device_name(number), free, total))
    return found


def check_masks(environment: Mapping[str, str], hip: bool) -> Iterator[Finding]:
    """The variables that hide GPUs. hip: whether torch is built for ROCm."""
    masks = {name: environment[name] for name in MASKS if name in environment}
    said = ", ".join(f"{name}={value}" for name, value in masks.items())
    if hip and {"HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"} <= masks.keys():
        yield Finding(
            "visible GPUs",
            "warning",
            f"{said}: they add up, for HIP counts only what ROCR leaves, from 0; unset ROCR_VISIBLE_DEVICES",
        )
    elif hip and masks.get("CUDA_VISIBLE_DEVICES", "") != masks.get("HIP_VISIBLE_DEVICES", ""):
        yield Finding(
            "visible GPUs",
            "warning",
            f"{said}: on ROCm Ray wants both alike; set HIP_VISIBLE_DEVICES and unset the other",
        )
    elif masks:
        yield Finding("visible GPUs", "ok", said)


def check_gpus(seen: Sequence[SeenGpu]) -> Iterator[Finding]:
    """Every GPU that torch sees, and what its memory gives; where there is none, whether torch is for GPUs."""
    built = torch.version.hip or torch.version.cuda
    if not seen:
        kind = f"torch {torch.__version__} is built for {'ROCm' if torch.version.hip else 'CUDA'} {built}"
        if built:
            text = f"{kind}, but sees no GPU: is a driver loaded, and may this user open it (/dev/kfd, /dev/dri)?"
            yield Finding("GPUs", "fault", text)
        else:
            yield Finding("GPUs", "ok", f"torch {torch.__version__} is built for CPUs; backend: cpu")
        return
    for gpu in seen:
        known = published(gpu.name)
        text = f"{gpu.name}, {gpu.free / 1e9:.1f} of {gpu.total / 1e9:.1f} GB free"
        yield Finding(f"GPU {gpu.number}", "ok", text)
        size = min(_COPY_BYTES, gpu.free // 4)
        yield check_copy(torch.device("cuda", gpu.number), known.bandwidth if known else None, size)


def check_copy(device: torch.device, bandwidth: float | None, size: int = _COPY_BYTES) -> Finding:
    """What a plain copy moves against the published bandwidth, bytes a second; None where none is known."""
    rate = copy_rate(device, size)
    about, figure = f"memory of {device}", Figure(f"copy_bytes_s.{device}".replace(":", ""), rate, "bytes/s")
    if bandwidth is None:
        return Finding(about, "ok", f"a copy moves {rate / 1e12:.2f} TB/s", (figure,))
    share = rate / bandwidth
    text = f"a copy moves {rate / 1e12:.2f} TB/s, {share:.0%} of the published {bandwidth / 1e12:.2f}"
    if share < _EXPECTED:
        return Finding(about, "warning", f"{text}; is another process on it, or its clock held down?", (figure,))
    return Finding(about, "ok", text, (figure,))


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second read and written by copying `size` bytes, the median of several."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(device, lambda: target.copy_(source))


def published(name: str) -> Gpu | None:
    """The GPU of `gpus.yaml` that a driver's name contains."""
    return next((gpu for known, gpu in gpus().items() if known in name), None)
