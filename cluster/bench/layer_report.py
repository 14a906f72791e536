"""What `flyray bench layers` found: figures, and the table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from rich.table import Table

from ...actors.model.config import ModelConfig
from ..figures import Figure
from ..layer_work import attention_values, attention_weights, expert_weights, gate_weights, shared_weights
from .layer_shard import Prompts, ShardTimes
from .traffic import LinearBits, step_traffic


@dataclass(frozen=True)
class DecodeFinding:
    """A batch on some number of shards. layer_s: of one MoE layer, by the difference of two depths. touched: distinct
    experts of a layer, of all rows together. floor_s: of reading what a shard must read of a layer. step_s: of the
    whole model with sampling; outside_s: the same of a model without layers. same: the part of the tokens that one
    shard gave too, gain: its step's time over this one's; None where it was not run."""

    shards: int
    format: str
    batch: int
    rows: int
    layer_s: float
    touched: float
    floor_s: float
    step_s: float
    outside_s: float
    same: float | None
    gain: float | None

    @property
    def tokens_s(self) -> float:
        return self.rows * self.shards / self.step_s


@dataclass(frozen=True)
class PrefillFinding:
    """Prompts on one shard. layer_s: of one MoE layer; step_s: of all layers. floor_s: of the layer's products at the
    rates of INT8 and, for attention, of bfloat16."""

    format: str
    prompts: Prompts
    layer_s: float
    floor_s: float
    step_s: float


@dataclass(frozen=True)
class LayerBench:
    """times: by number of shards, of each shard. linears: of each format, the bits of weights beside the experts."""

    model: str
    config: ModelConfig
    context: int
    linears: Mapping[str, LinearBits]
    times: Mapping[int, tuple[ShardTimes, ...]]

    @property
    def _shallow(self) -> int:
        return self.config.first_k_dense_replace + 1

    def decodes(self) -> Iterator[DecodeFinding]:
        """In the order of shards, formats, batches."""
        for shards, times in self.times.items():
            for format in times[0].formats:
                for batch in sorted(times[0].formats[format].decode):
                    yield self._decode(shards, format, batch)

    def prefills(self) -> Iterator[PrefillFinding]:
        """Of one shard."""
        for times in self.times.values():
            for format, found in times[0].formats.items():
                for prompts, seconds in found.prefill_s.items():
                    whole = seconds[self.config.num_hidden_layers]
                    yield PrefillFinding(
                        format, prompts, self._of_layer(seconds), self._prefill_floor(times[0], prompts), whole
                    )

    def figures(self) -> list[Figure]:
        """us_per_moe_layer.bBATCH.FORMAT, experts_touched, share_of_floor, tpot_ms, outside_layers_ms and decode_tok_s
        likewise, with .gN behind them for N shards; gain and same_tokens of N shards over one;
        us_per_moe_layer.pPROMPTS.FORMAT and prefill_tok_s; weight_bytes.FORMAT and used_bytes of a shard; ceilings."""
        found = []
        for shards, times in self.times.items():
            end, ceilings = _suffix(shards), times[0].ceilings
            found.append(Figure(f"read_bandwidth{end}", ceilings.read, "bytes/s"))
            found.append(Figure(f"int8_peak{end}", ceilings.int8, "operations/s"))
            found.append(Figure(f"bf16_peak{end}", ceilings.bf16, "operations/s"))
            for format in times[0].formats:
                each = [shard.formats[format] for shard in times]
                found.append(Figure(f"weight_bytes.{format}{end}", max(one.weight_bytes for one in each), "bytes"))
                found.append(Figure(f"used_bytes.{format}{end}", max(one.used_bytes for one in each), "bytes"))
        found.append(Figure("layers", self.config.num_hidden_layers, "1"))
        for decode in self.decodes():
            found += _decode_figures(decode)
        for prefill in self.prefills():
            at = f"p{prefill.prompts}.{prefill.format}"
            tokens = prefill.prompts.count * prefill.prompts.tokens
            found.append(Figure(f"us_per_moe_layer.{at}", 1e6 * prefill.layer_s, "microseconds"))
            found.append(Figure(f"share_of_floor.{at}", prefill.floor_s / prefill.layer_s, "1"))
            found.append(Figure(f"prefill_tok_s.{at}", tokens / prefill.step_s, "tokens/s"))
        return found

    def table(self) -> Table:
        """The figures for people."""
        layers = self.config.num_hidden_layers
        table = Table(title=f"{self.model}, {layers} layers, {self.context} tokens of context, random weights")
        for column in ("shards", "format", "batch", "experts", "µs a MoE layer", "of floor", "ms a step", "outside",
                       "tokens/s", "gain", "same"):  # fmt: skip
            table.add_column(column, justify="right", no_wrap=True)
        for each in self.decodes():
            table.add_row(
                str(each.shards), each.format, str(each.batch), f"{each.touched:.1f}", f"{1e6 * each.layer_s:,.0f}",
                f"{each.floor_s / each.layer_s:.0%}", f"{1e3 * each.step_s:.2f}", f"{1e3 * each.outside_s:.2f}",
                f"{each.tokens_s:,.0f}", _or_none(each.gain, ".2f"), _or_none(each.same, ".0%"),
            )  # fmt: skip
        for each in self.prefills():
            tokens = each.prompts.count * each.prompts.tokens
            table.add_row(
                "1", each.format, f"p{each.prompts}", "", f"{1e6 * each.layer_s:,.0f}",
                f"{each.floor_s / each.layer_s:.0%}", f"{1e3 * each.step_s:.2f}", "", f"{tokens / each.step_s:,.0f}",
                "", "",
            )  # fmt: skip
        return table

    def remarks(self) -> list[str]:
        """What the numbers were taken on, a line each."""
        lines = []
        for shards, times in self.times.items():
            ceilings = times[0].ceilings
            lines.append(
                f"{shards} x {times[0].device}: reads {ceilings.read / 1e9:,.0f} GB/s, multiplies INT8 "
                f"{ceilings.int8 / 1e12:,.1f}, bf16 {ceilings.bf16 / 1e12:,.1f} TOP/s"
            )
            for format in times[0].formats:
                each = [shard.formats[format] for shard in times]
                weights, used = (max(getattr(one, name) for one in each) for name in ("weight_bytes", "used_bytes"))
                lines.append(
                    f"{format} on {shards}: {weights / 1e9:.1f} GB of weights a shard, {used / 1e9:.1f} in use"
                )
        lines += [f"{format}: beside the experts {bits}" for format, bits in self.linears.items()]
        return [*lines, "a layer's time is the difference of two depths; p: a prefill, of the rates of products"]

    def _decode(self, shards: int, format: str, batch: int) -> DecodeFinding:
        each = [shard.formats[format] for shard in self.times[shards]]
        times, whole = [one.decode[batch] for one in each], self.config.num_hidden_layers
        touched = _touched([one.chosen for one in times])
        step = max(one.step_s[whole] for one in times)
        rows, same, gain = len(times[0].tokens), None, None
        if shards > 1 and 1 in self.times:
            alone = self.times[1][0].formats[format].decode[batch]
            together = np.stack([one.tokens for one in times], axis=1).flatten()[: len(alone.tokens)]
            same, gain = float((together == alone.tokens).mean()), alone.step_s[whole] / step
        return DecodeFinding(
            shards, format, batch, rows, max(self._of_layer(one.pass_s) for one in times), touched,
            self._decode_floor(shards, format, rows, touched), step, max(one.step_s[0] for one in times), same, gain,
        )  # fmt: skip

    def _of_layer(self, seconds: Mapping[int, float]) -> float:
        """Of one MoE layer, from seconds by depth."""
        deep, shallow = self.config.num_hidden_layers, self._shallow
        return (seconds[deep] - seconds[shallow]) / (deep - shallow)

    def _decode_floor(self, shards: int, format: str, rows: int, touched: float) -> float:
        """Seconds to read one MoE layer: the experts that are touched, spread evenly, all else, and the rows' cache."""
        found = self.times[shards][0]
        deep, shallow = (
            step_traffic(replace(self.config, num_hidden_layers=depth), format, self.linears[format], touched, 0, 0)
            for depth in (self.config.num_hidden_layers, self._shallow)
        )
        layers = self.config.num_hidden_layers - self._shallow
        cache = rows * self.context * self.config.kv_width * found.formats[format].kv_itemsize
        read = (deep.experts - shallow.experts) / shards + deep.others - shallow.others
        return (read / layers + cache) / found.ceilings.read

    def _prefill_floor(self, times: ShardTimes, prompts: Prompts) -> float:
        """Seconds of one MoE layer's products at the measured rates."""
        config, tokens = self.config, prompts.count * prompts.tokens
        experts = config.num_experts_per_tok * expert_weights(config)
        weights = attention_weights(config) + gate_weights(config) + shared_weights(config) + experts
        visible = prompts.count * prompts.tokens * (prompts.tokens + 1) // 2
        attention = visible * attention_values(config)
        return 2 * tokens * weights / times.ceilings.int8 + 2 * attention / times.ceilings.bf16


def _decode_figures(each: DecodeFinding) -> list[Figure]:
    at = f"b{each.batch}.{each.format}{_suffix(each.shards)}"
    found = [
        Figure(f"us_per_moe_layer.{at}", 1e6 * each.layer_s, "microseconds"),
        Figure(f"experts_touched.{at}", each.touched, "1"),
        Figure(f"share_of_floor.{at}", each.floor_s / each.layer_s, "1"),
        Figure(f"tpot_ms.{at}", 1e3 * each.step_s, "ms"),
        Figure(f"outside_layers_ms.{at}", 1e3 * each.outside_s, "ms"),
        Figure(f"decode_tok_s.{at}", each.tokens_s, "tokens/s"),
    ]
    if each.gain is not None and each.same is not None:
        found += [Figure(f"gain.{at}", each.gain, "1"), Figure(f"same_tokens.{at}", each.same, "1")]
    return found


def _touched(chosen: list[np.ndarray]) -> float:
    """[MoE layers, T, K] of each shard -> mean distinct experts a layer of all together."""
    layers = np.concatenate([each.reshape(len(each), -1) for each in chosen], axis=1)
    return float(np.mean([len(np.unique(layer)) for layer in layers]))


def _suffix(shards: int) -> str:
    return f".g{shards}" if shards > 1 else ""


def _or_none(value: float | None, format: str) -> str:
    return "" if value is None else f"{value:{format}}"
