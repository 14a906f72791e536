"""What was measured, and what others publish, beside what the plan says of the same: `measured.yaml`."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from ...actors.model.config import ModelConfig
from ..synthesize import Synthesis
from .gpu import Gpu, find_gpu
from .placement import layer_us, spreads, step_us
from .stage_costs import Batch
from .workload import Workload


class _Point(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    model: str


class MeasuredLayers(_Point):
    """One run of `flyray bench layers`; its fields are described in `measured.yaml`."""

    date: datetime.date
    format: str
    int8_weights: tuple[str, ...]
    int4_weights: tuple[str, ...]
    context: int
    layer_us: dict[int, dict[int, float]]
    prefill_tokens: int
    prefill_us: dict[int, float]


class Latency(BaseModel):
    """Published milliseconds to the first token, and from one token to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttft_ms: float
    tpot_ms: float


class PublishedServing(_Point):
    """What an engine's maker says of it; fields as in `measured.yaml`."""

    source: str
    gpus: int
    tokens_in: int
    tokens_out: int
    formats: dict[str, dict[int, Latency]]


@dataclass(frozen=True)
class LayerPoint:
    """µs of one MoE layer, planned and measured. load: a batch, or prompts."""

    gpus: int
    load: str
    planned_us: float
    measured_us: float


@dataclass(frozen=True)
class ServingPoint:
    """A published latency beside the plan's for the same load: a step with half of the answer in the cache, and one
    prompt of every request at once."""

    batch: int
    published: Latency
    step_ms: float
    floor_ms: float
    prompts_ms: float


@cache
def _points() -> tuple[tuple[MeasuredLayers, ...], tuple[PublishedServing, ...]]:
    raw = yaml.safe_load(Path(__file__).with_name("measured.yaml").read_text())
    return (
        tuple(MeasuredLayers.model_validate(each) for each in raw["measured"]),
        tuple(PublishedServing.model_validate(each) for each in raw["published"]),
    )


def measured_on(gpu: Gpu) -> tuple[MeasuredLayers, ...]:
    """All runs on that kind."""
    return tuple(each for each in _points()[0] if each.gpu == gpu.name)


def published_of(gpu: Gpu, work: Workload) -> tuple[PublishedServing, ...]:
    """All that is known of the model in its format on that kind."""
    here = (each for each in _points()[1] if each.gpu == gpu.name and work.format in each.formats)
    return tuple(each for each in here if _config(each.model) == work.model)


def layer_points(measured: MeasuredLayers) -> list[LayerPoint]:
    """Each measured time beside the planned one, of its own model, format and load."""
    gpu, model = find_gpu(measured.gpu), _config(measured.model)
    kinds = measured.int8_weights, measured.int4_weights
    work = Workload(model, measured.format, *kinds, measured.context, measured.prefill_tokens)
    points = []
    for gpus, times in measured.layer_us.items():
        for batch, took in times.items():
            planned = layer_us(work, gpu, gpus, Batch.decode(batch, gpus, work.context))
            points.append(LayerPoint(gpus, str(batch), planned, took))
    for prompts, took in measured.prefill_us.items():
        planned = layer_us(work, gpu, 1, Batch.prompts(prompts, work.prefill, 1))
        points.append(LayerPoint(1, f"{prompts} x {work.prefill:,} prompt", planned, took))
    return points


def serving_points(published: PublishedServing, work: Workload) -> list[ServingPoint]:
    """work: the model as it is planned; its context and prompts are replaced by the published ones."""
    gpu, gpus = find_gpu(published.gpu), published.gpus
    own, context = next(spreads(gpus)), published.tokens_in + published.tokens_out // 2
    work = work.with_load(context, published.tokens_in)
    points = []
    for batch, latency in published.formats[work.format].items():
        step = Batch.decode(batch, gpus, context)
        took, floor = (step_us(work, kind, gpus, own, step) / 1e3 for kind in (gpu, gpu.ideal))
        prompts = step_us(work, gpu, gpus, own, Batch.prompts(batch, published.tokens_in, gpus)) / 1e3
        points.append(ServingPoint(batch, latency, took, floor, prompts))
    return points


def _config(model: str) -> ModelConfig:
    return ModelConfig.from_dict(Synthesis(model).config())
