"""GPUs as numbers: `gpus.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from ...kernels.protocol import ActivationFormat


class PlanError(ValueError):
    """A plan that cannot be made; the message says why, and what could be."""


class Rates(BaseModel):
    """Operations a second of dense products, by what the weights multiply."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    float: float
    int8: float
    fp8: float

    def of(self, activations: ActivationFormat) -> float:
        """Of products with these activations."""
        return {ActivationFormat.FLOAT: self.float, ActivationFormat.INT8: self.int8, ActivationFormat.FP8: self.fp8}[
            activations
        ]


class Attained(BaseModel):
    """What is reached of the published peaks, 0..1, and what a stage and a step take beside their work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bandwidth: float
    matrix: float
    stage_us: float
    step_us: float


class Gpu(BaseModel):
    """One kind of GPU; its fields and units stand in `gpus.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory: int
    bandwidth: float
    rates: Rates
    peer: float
    egress: float
    network: float
    exchange_us: float
    node: int
    direct: bool
    attained: Attained

    @property
    def ideal(self) -> Gpu:
        """With all that is published reached, nothing beside the work and nothing sent in vain: what no kernel can be
        faster than."""
        perfect = Attained(bandwidth=1, matrix=1, stage_us=0, step_us=0)
        return self.model_copy(update={"attained": perfect, "exchange_us": 0.0, "direct": True})

    def exchange_seconds(self, bytes_a_peer: float, gpus: int) -> float:
        """To send as many bytes to each of the other GPUs, beside the latency: the slowest of one link, of all links
        together, and of the network to other nodes."""
        here = min(gpus, self.node) - 1
        away = gpus - 1 - here
        return max(
            bytes_a_peer / self.peer if here else 0.0,
            bytes_a_peer * here / self.egress,
            bytes_a_peer * away / self.network,
        )


@cache
def gpus() -> dict[str, Gpu]:
    """All that are known, by name."""
    raw = yaml.safe_load(Path(__file__).with_name("gpus.yaml").read_text())
    attained = raw.pop("attained")
    return {name: Gpu(name=name, attained=attained, **each) for name, each in raw.items()}


def find_gpu(name: str) -> Gpu:
    """Raises PlanError with the names there are."""
    for known, gpu in gpus().items():
        if known.lower() == name.lower():
            return gpu
    raise PlanError(f"gpu: {name!r} is unknown; known are {', '.join(gpus())}")
