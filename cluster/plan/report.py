"""A plan as tables, figures and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from ..figures import Figure
from ..weight_bytes import shard_weight_bytes
from .placement import Spread
from .plan import CountPlan, Plan

_GB = 1e9


def weights_table(plan: Plan) -> Table:
    """What the weights of the model take, by kind."""
    weights, model = plan.work.weights, plan.work.model
    moe = len(model.moe_layers)
    rows = {
        "embedding, last norm": weights.embedding,
        "head": weights.head,
        f"attention, {model.num_hidden_layers} layers": model.num_hidden_layers * weights.attention,
        f"dense MLP, {model.first_k_dense_replace} layers": model.first_k_dense_replace * weights.dense,
        f"gate, {moe} layers": moe * weights.gate,
        f"shared experts, {moe} layers": moe * weights.shared,
        "on every GPU, together": shard_weight_bytes(model, weights, 0),
        f"{model.n_routed_experts} routed experts, {moe} layers": moe * model.n_routed_experts * weights.expert,
        "a token in the KV cache": plan.work.kv_token_bytes,
    }
    table = Table("", "GB", title=f"{plan.model}, experts in {plan.work.format}", title_justify="left")
    for name, size in rows.items():
        table.add_row(name, f"{size / _GB:,.6f}" if size < _GB / 1000 else f"{size / _GB:,.2f}")
    table.columns[1].justify = "right"
    return table


def counts_table(plan: Plan) -> Table:
    """What every count of GPUs gives: memory and prefill."""
    work, gpu = plan.work, plan.gpu
    table = Table(
        *("GPUs", "weights a GPU, GB", "may fill, GB", "KV tokens", f"sequences of {work.context:,}"),
        *(f"prompt of {work.prefill:,}, ms", "prompts, tokens/s"),
        title=f"{gpu.name}: at least {plan.least} for the weights and {work.context:,} tokens",
        title_justify="left",
    )
    for count in plan.counts:
        room = count.memory
        cells = [str(count.gpus), f"{room.weights / _GB:.1f}", f"{room.usable / _GB:.1f}"]
        if not count.fits:
            table.add_row(*cells, "does not fit", "", "", "")
            continue
        prompts = f"{count.prefill_us / 1e3:.0f}", f"{_prefill_rate(plan, count):,.0f}"
        table.add_row(*cells, f"{room.kv_tokens:,}", f"{room.kv_tokens // work.context:,}", *prompts)
    for column in table.columns:
        column.justify = "right"
    return table


def decode_table(plan: Plan) -> Table:
    """A step of every batch on every count of GPUs."""
    table = Table(
        *("GPUs", "batch", "step, ms", "floor, ms", "MoE layer, µs", "tokens/s", "fastest in simulation", "ms"),
        title=f"decode with {plan.work.context:,} tokens in the cache; * the engine does not run this way",
        title_justify="left",
    )
    for count in plan.counts:
        for each in count.decoding:
            ms = [each.us / 1e3, each.floor_us / 1e3]
            table.add_row(
                *(str(count.gpus), str(each.batch), *(f"{value:.2f}" for value in ms), f"{each.layer_us:,.0f}"),
                *(f"{each.tokens_a_second:,.0f}", _way(each.fastest), f"{each.fastest_us / 1e3:.2f}"),
            )
    for column in table.columns[:6]:
        column.justify = "right"
    return table


def figures(plan: Plan) -> Iterator[Figure]:
    """All numbers; those of several counts of GPUs end with `.gN`."""
    yield Figure("least_gpus", plan.least, "1")
    yield Figure("kv_bytes_per_token", plan.work.kv_token_bytes, "bytes")
    for count in plan.counts:
        end = f".g{count.gpus}" if len(plan.counts) > 1 else ""
        yield Figure(f"bytes_per_gpu{end}", count.memory.weights, "bytes")
        yield Figure(f"kv_tokens{end}", count.memory.kv_tokens, "tokens")
        if not count.fits:
            continue
        yield Figure(f"ttft_us{end}", count.prefill_us, "us")
        yield Figure(f"prefill_tok_s{end}", _prefill_rate(plan, count), "tokens/s")
        for each in count.decoding:
            at = f".b{each.batch}{end}"
            yield Figure(f"decode_us{at}", each.us, "us")
            yield Figure(f"decode_floor_us{at}", each.floor_us, "us")
            yield Figure(f"decode_fastest_us{at}", each.fastest_us, "us")
            yield Figure(f"us_per_moe_layer{at}", each.layer_us, "us")


def write_plot(plan: Plan, path: Path) -> None:
    """Memory of a GPU and time of a step over the counts of GPUs, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(9, 3.8), layout="constrained", dpi=120)
    drawing.suptitle(f"{plan.model}, {plan.work.format}, {plan.gpu.name}", fontsize=10)
    memory, steps = drawing.subplots(1, 2)
    names = [str(count.gpus) for count in plan.counts]
    weights = [count.memory.weights / _GB for count in plan.counts]
    memory.bar(names, weights, color="#4477aa", label="weights")
    free = [max(0.0, count.memory.usable / _GB - used) for count, used in zip(plan.counts, weights, strict=True)]
    memory.bar(names, free, bottom=weights, color="#ccbb44", label="KV cache")
    memory.axhline(plan.gpu.memory / _GB, color="#cc3311", linewidth=1)
    memory.set(xlabel="GPUs", ylabel="GB a GPU")
    memory.legend(fontsize=8)
    for count in plan.counts:
        if count.decoding:
            batches = [each.batch for each in count.decoding]
            steps.plot(batches, [each.us / 1e3 for each in count.decoding], marker="o", label=f"{count.gpus} GPUs")
    steps.set(xlabel="sequences", ylabel="ms a step", xscale="log", ylim=(0, None))
    steps.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, format="png")


def _way(spread: Spread) -> str:
    return str(spread) if spread.runs else f"{spread} *"


def _prefill_rate(plan: Plan, count: CountPlan) -> float:
    """Prompt tokens a second with a prompt on every GPU."""
    return count.gpus * plan.work.prefill / count.prefill_all_us * 1e6
