"""Activation statistics of the routed experts, as calibration wrote them: reading a statistics folder.

`statistics.json` says what was gathered and whether it is complete; for every layer and shard one safetensors file
holds the sums (`statistics_writer`). Sums are float64 on disk: a float32 sum over millions of tokens would lose the
small ones; what is read is float32, for no use of it needs more. Experts are disjoint between shards; moments of the
layer's input are summed over them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Checkpoint, CheckpointError
from .model.config import ModelConfig
from .safetensors_header import TensorEntry, read_header
from .statistics_plan import VERSION, StatisticsError, StatisticsPlan, fingerprint

__all__ = ["LayerStatistics", "Statistics", "StatisticsError", "StatisticsPlan", "fingerprint"]

RECORD = "statistics.json"
_REMEDY = "remove the folder and gather them again"


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's statistics. E experts, D hidden size, I inner size, B moments_block (or all columns, if fewer).

    count: [E] int64, tokens routed to each expert. input_absmax, input_energy: [E, D] float32, largest magnitude and
    sum of squares of every channel of the experts' inputs. inner_absmax, inner_energy: [E, I] float32, the same of the
    inputs of down_proj. input_moments: [D/B, B, B] float32, diagonal blocks of the sum of x xᵀ over all (token, expert)
    pairs of the layer, so that a token counts once for each of its experts; None where moments_block is 0.
    """

    layer: int
    count: Tensor
    input_absmax: Tensor
    input_energy: Tensor
    inner_absmax: Tensor
    inner_energy: Tensor
    input_moments: Tensor | None
    _inner: tuple[tuple[range, TensorEntry], ...]

    def inner_moments(self, expert: int) -> Tensor | None:
        """[I/B, B, B] float32 of an expert's down_proj inputs, read from disk; None where moments_block is 0.

        Raises IndexError for an expert that the layer does not have.
        """
        if not 0 <= expert < len(self.count):
            raise IndexError(f"expert {expert}: layer {self.layer} has experts 0..{len(self.count) - 1}")
        for experts, entry in self._inner:
            if expert in experts:
                return _read(entry, expert - experts.start).float()
        return None


class Statistics:
    """A complete statistics folder. tokens: that the engine ran; precision: in which format."""

    def __init__(self, path: Path, plan: StatisticsPlan, tokens: int) -> None:
        """See `open`."""
        self.path, self.plan, self.tokens = path, plan, tokens
        self.precision = plan.precision
        self.layers = plan.layers
        self._files = {layer: self._headers(layer) for layer in plan.layers}
        self._counts = {layer: self._count(layer) for layer in plan.layers}

    @staticmethod
    def open(path: str | Path) -> Statistics:
        """Reads statistics.json and the headers and counts of all files. Raises StatisticsError, also for statistics
        that are incomplete: those of an engine that still runs, or was killed."""
        folder = Path(path)
        record = read_record(folder)
        if not record["complete"]:
            raise StatisticsError(
                f"{folder / RECORD}: incomplete; stop the engine that gathers them (they are complete when it has "
                f"stopped), or, if it was killed, {_REMEDY}"
            )
        try:
            plan, tokens = StatisticsPlan.parse(record), int(record["tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise StatisticsError(f"{folder / RECORD}: {error!r}; {_REMEDY}") from error
        return Statistics(folder, plan, tokens)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises StatisticsError unless the statistics are of this model, in whatever format it is."""
        model = ModelConfig.from_dict(checkpoint.config)
        found = (self.plan.hidden_size, self.plan.inner_size, self.plan.num_experts, self.layers)
        sizes = (model.hidden_size, model.moe_intermediate_size, model.n_routed_experts, tuple(model.moe_layers))
        if found != sizes or self.plan.fingerprint != fingerprint(checkpoint, model):
            raise StatisticsError(
                f"{self.path / RECORD}: gathered on another model than {checkpoint.path}; calibrate that one"
            )

    def layer(self, number: int) -> LayerStatistics:
        """One layer's statistics, of all shards. Raises KeyError for a layer without routed experts."""
        files = self._files[number]

        def joined(name: str) -> Tensor:
            return torch.cat([_read(file[name]) for file in files])

        moments = None
        if self.plan.moments_block:
            moments = torch.stack([_read(file["input_moments"]) for file in files]).sum(0).float()
        inner = zip(self.plan.experts, files, strict=True) if self.plan.moments_block else ()
        return LayerStatistics(
            layer=number,
            count=self._counts[number],
            input_absmax=joined("input_absmax"),
            input_energy=joined("input_energy").float(),
            inner_absmax=joined("inner_absmax"),
            inner_energy=joined("inner_energy").float(),
            input_moments=moments,
            _inner=tuple((experts, file["inner_moments"]) for experts, file in inner),
        )

    def counts(self, number: int) -> Tensor:
        """[E] int64, tokens of one layer routed to each expert."""
        return self._counts[number]

    @property
    def unreached(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of every expert that no token was routed to."""
        return tuple(
            (layer, expert) for layer, count in self._counts.items() for expert in (count == 0).nonzero()[:, 0].tolist()
        )

    def _headers(self, layer: int) -> list[dict[str, TensorEntry]]:
        found = []
        for shard in range(len(self.plan.experts)):
            file = self.path / self.plan.file(layer, shard)
            try:
                header = read_header(file)
            except CheckpointError as error:
                raise StatisticsError(f"{error}; {_REMEDY}") from error
            expected = self.plan.tensors(shard)
            for name, (dtype, shape) in expected.items():
                entry = header.get(name)
                if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
                    is_there = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
                    raise StatisticsError(
                        f"{file}: tensor {name} is {is_there}, expected {dtype} {list(shape)}; {_REMEDY}"
                    )
            found.append(header)
        return found

    def _count(self, layer: int) -> Tensor:
        count = torch.cat([_read(file["count"]) for file in self._files[layer]])
        expected = self.tokens * self.plan.top_k
        if int(count.sum()) != expected or int(count.min()) < 0:
            file = self.path / self.plan.file(layer, 0)
            raise StatisticsError(
                f"{file}: the layer's experts had {int(count.sum())} tokens, {RECORD} says {expected} "
                f"({self.tokens} to {self.plan.top_k} each); {_REMEDY}"
            )
        return count


def read_record(folder: Path) -> dict[str, Any]:
    """statistics.json of this version, complete or not. Raises StatisticsError."""
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StatisticsError(f"{file}: is not there; name a folder that `flyray calibrate` has written") from None
    except OSError as error:
        raise StatisticsError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StatisticsError(f"{file}: is not JSON: {error}; {_REMEDY}") from error
    if not isinstance(record, dict) or not isinstance(record.get("complete"), bool):
        raise StatisticsError(f"{file}: has no field 'complete' that is true or false; {_REMEDY}")
    if record.get("version") != VERSION:
        raise StatisticsError(f"{file}: version {record.get('version')!r}, this flyray reads {VERSION}; {_REMEDY}")
    return record


def _read(entry: TensorEntry, index: int | None = None) -> Tensor:
    """A tensor of a file, or only one item of its first dimension."""
    shape, begin = entry.shape, entry.begin
    if index is not None:
        shape = shape[1:]
        begin += index * math.prod(shape) * entry.dtype.itemsize
    count = math.prod(shape)
    try:
        with open(str(entry.file), "rb") as stream:  # statistics are always in a folder here
            data = np.fromfile(stream, np.uint8, count * entry.dtype.itemsize, offset=begin)
    except OSError as error:
        raise StatisticsError(f"{entry.file}: cannot be read: {error.strerror}") from error
    if len(data) != count * entry.dtype.itemsize:
        raise StatisticsError(f"{entry.file}: became shorter while it was read; {_REMEDY}")
    return torch.from_numpy(data).view(entry.dtype).reshape(shape)
