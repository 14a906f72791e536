"""A plan as tables, figures and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from ...kernels.select import check_kv_dtype
from ..figures import Figure
from ..weight_bytes import shard_weight_bytes
from .placement import Spread
from .plan import CountPlan, Plan
from .points import layer_points, measured_on, published_of, serving_points

_GB = 1e9
_BACKEND = "triton"  # what runs on every kind of GPU
_CONTEXTS = (1024, 8192, 32768, 131072)


def heading(plan: Plan) -> str:
    """The model, and its checkpoint."""
    disk = plan.disk
    kind = "" if disk.read else "a native checkpoint has "
    more = f", {disk.tensors - disk.text_tensors} of them a vision tower's" if disk.tensors > disk.text_tensors else ""
    size = f"{kind}{_gigabytes(disk.bytes)} GB in {disk.tensors:,} tensors{more}"
    return f"{plan.model}, routed experts in {plan.work.format}. On the disk: {size}."


def tables(plan: Plan) -> list[Table]:
    """All that there is to say."""
    known = (measured_table(plan), published_table(plan))
    found = [weights_table(plan), memory_table(plan), capacity_table(plan), decode_table(plan)]
    return found + [table for table in known if table is not None]


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
        f"a token in the KV cache, {plan.work.kv_dtype}": plan.work.kv_token_bytes,
    }
    table = Table("in a GPU's memory", "GB")
    for name, size in rows.items():
        table.add_row(name, _gigabytes(size))
    table.columns[1].justify = "right"
    return table


def memory_table(plan: Plan) -> Table:
    """What lies on the fullest GPU of every count."""
    rows = ("routed experts", "all other weights", "KV cache", "step buffers", "free")
    least = f"{plan.least} GPU{'s' if plan.least > 1 else ''}"
    title = f"a {plan.gpu.name}'s {plan.gpu.memory / _GB:.1f} GB; at least {least} for the weights and "
    table = Table("GPUs", *rows, title=f"{title}{plan.work.context:,} tokens", title_justify="left")
    for count in plan.counts:
        room = count.memory
        weights = [_gigabytes(size) for size in (room.routed, room.weights - room.routed)]
        if not count.fits:
            table.add_row(str(count.gpus), *weights, "does not fit", "", "")
            continue
        rest = room.cache_bytes, room.buffers, plan.gpu.memory - room.weights - room.cache_bytes - room.buffers
        table.add_row(str(count.gpus), *weights, *map(_gigabytes, rest))
    return _to_the_right(table)


def capacity_table(plan: Plan) -> Table:
    """How many sequences of which length the caches hold together, and how fast prompts are computed."""
    work, most = plan.work, plan.work.model.max_position_embeddings
    contexts = sorted({context for context in (*_CONTEXTS, work.context) if context < most} | {most})
    table = Table(
        *("GPUs", "KV tokens", *(f"{context:,}" for context in contexts)),
        *(f"prompt of {work.prefill:,}, ms", "tensor-p., ms", "prompts, tokens/s"),
        title="sequences that fit at once, by their length; prompts one at a time, and one on every GPU",
        title_justify="left",
    )
    for count in plan.counts:
        if count.fits:
            fit = (f"{count.memory.sequences(context):,}" for context in contexts)
            together = f"{count.prefill_tensor_us / 1e3:.0f}" if count.prefill_tensor_us else ""
            prompts = f"{count.prefill_us / 1e3:.0f}", together, f"{_prefill_rate(plan, count):,.0f}"
            table.add_row(str(count.gpus), f"{count.memory.kv_tokens:,}", *fit, *prompts)
    return _to_the_right(table)


def decode_table(plan: Plan) -> Table:
    """A step of every batch on every count of GPUs."""
    table = Table(
        *("GPUs", "batch", "step, ms", "floor, ms", "MoE layer, µs", "tokens/s", "tensor-p., ms"),
        *("fastest simulated", "ms"),
        title=f"decode with {plan.work.context:,} tokens in the cache; * the engine does not run this way",
        title_justify="left",
    )
    for count in plan.counts:
        for each in count.decoding:
            ms = [each.us / 1e3, each.floor_us / 1e3]
            table.add_row(
                *(str(count.gpus), str(each.batch), *(f"{value:.2f}" for value in ms), f"{each.layer_us:,.0f}"),
                *(f"{each.tokens_a_second:,.0f}", f"{each.tensor_us / 1e3:.2f}" if each.tensor_us else ""),
                *(_way(each.fastest), f"{each.fastest_us / 1e3:.2f}"),
            )
    return _to_the_right(table, 7)


def measured_table(plan: Plan) -> Table | None:
    """What was measured on that kind of GPU beside the plan of it; None where nothing was."""
    runs = measured_on(plan.gpu)
    if not runs:
        return None
    table = Table(
        *("GPUs", "batch", "planned, µs", "measured, µs", "planned / measured"),
        title="; ".join(
            f"a MoE layer of {run.model} in {run.format}, {run.context:,} tokens of context, {run.gpu}, {run.date}"
            for run in runs
        ),
        title_justify="left",
    )
    for point in (point for run in runs for point in layer_points(run)):
        times = point.planned_us, point.measured_us
        share = point.planned_us / point.measured_us
        table.add_row(str(point.gpus), point.load, *(f"{time:,.0f}" for time in times), f"{share:.2f}")
    return _to_the_right(table)


def published_table(plan: Plan) -> Table | None:
    """What others publish for this model, format and kind of GPU, beside the plan for the same load; None where nothing
    is known."""
    found = published_of(plan.gpu, plan.work)
    if not found:
        return None
    table = Table(
        *("requests", "a token, published, ms", "planned", "floor", "prompts, published TTFT, ms", "planned"),
        title="; ".join(
            f"published: {each.source}, {each.gpus} x {each.gpu}, {each.tokens_in:,} tokens in, {each.tokens_out} out"
            for each in found
        ),
        title_justify="left",
    )
    for point in (point for each in found for point in serving_points(each, plan.work)):
        step = point.published.tpot_ms, point.step_ms, point.floor_ms
        prompts = point.published.ttft_ms, point.prompts_ms
        table.add_row(str(point.batch), *(f"{ms:.2f}" for ms in step), *(f"{ms:,.0f}" for ms in prompts))
    return _to_the_right(table)


def remarks(plan: Plan) -> list[str]:
    """What the times rest on, what of it the engine does not run, and when a key of its configuration pays."""
    said = []
    if not measured_on(plan.gpu):
        said.append(f"nothing was measured on {plan.gpu.name}: what is reached of its peaks is taken from an H200")
    try:
        check_kv_dtype(_BACKEND, plan.work.kv_dtype)
    except ValueError as error:
        said.append(f"not run by the engine: {error}")
    return said + [line for count in plan.counts if (line := _tensor_pays(count))]


def figures(plan: Plan) -> Iterator[Figure]:
    """All numbers; those of several counts of GPUs end with `.gN`."""
    yield Figure("least_gpus", plan.least, "1")
    yield Figure("disk_bytes", plan.disk.bytes, "bytes")
    yield Figure("disk_tensors", plan.disk.tensors, "1")
    yield Figure("disk_text_bytes", plan.disk.text_bytes, "bytes")
    yield Figure("kv_bytes_per_token", plan.work.kv_token_bytes, "bytes")
    for count in plan.counts:
        end = f".g{count.gpus}" if len(plan.counts) > 1 else ""
        yield Figure(f"bytes_per_gpu{end}", count.memory.weights, "bytes")
        yield Figure(f"kv_tokens{end}", count.memory.kv_tokens, "tokens")
        yield Figure(f"sequences{end}", count.memory.sequences(plan.work.context), "1")
        if not count.fits:
            continue
        yield Figure(f"ttft_us{end}", count.prefill_us, "us")
        if count.prefill_tensor_us:
            yield Figure(f"ttft_tensor_parallel_us{end}", count.prefill_tensor_us, "us")
        yield Figure(f"prefill_tok_s{end}", _prefill_rate(plan, count), "tokens/s")
        for each in count.decoding:
            at = f".b{each.batch}{end}"
            yield Figure(f"decode_us{at}", each.us, "us")
            yield Figure(f"decode_floor_us{at}", each.floor_us, "us")
            if each.tensor_us:
                yield Figure(f"decode_tensor_parallel_us{at}", each.tensor_us, "us")
            yield Figure(f"decode_fastest_us{at}", each.fastest_us, "us")
            yield Figure(f"us_per_moe_layer{at}", each.layer_us, "us")
    for each in (point for run in measured_on(plan.gpu) for point in layer_points(run)):
        load = each.load.replace(" x ", "x").replace(" prompt", "").replace(",", "")
        yield Figure(f"planned_of_measured.b{load}.g{each.gpus}", each.planned_us / each.measured_us, "1")
    for each in (point for run in published_of(plan.gpu, plan.work) for point in serving_points(run, plan.work)):
        yield Figure(f"published_tpot_us.b{each.batch}", 1e3 * each.published.tpot_ms, "us")
        yield Figure(f"published_load_us.b{each.batch}", 1e3 * each.step_ms, "us")


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
    memory.axhline(plan.gpu.memory / _GB, color="#cc3311", linewidth=1, label="memory")
    memory.set(xlabel="GPUs", ylabel="GB a GPU")
    memory.legend(fontsize=8)
    for count in plan.counts:
        if count.decoding:
            batches = [each.batch for each in count.decoding]
            steps.plot(batches, [each.us / 1e3 for each in count.decoding], marker="o", label=f"{count.gpus} GPUs")
    steps.set(xlabel="sequences", ylabel="ms a step", xscale="log", ylim=(0, None))
    batches = sorted({each.batch for count in plan.counts for each in count.decoding})
    steps.set_xticks(batches, labels=[str(batch) for batch in batches], minor=False)
    steps.minorticks_off()
    steps.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, format="png")


def _tensor_pays(count: CountPlan) -> str:
    """For which loads engine.attention is better set."""
    faster = [f"{each.batch}" for each in count.decoding if 0 < each.tensor_us < each.us]
    loads = [f"batch {', '.join(faster)}"] if faster else []
    loads += ["a prompt alone"] if 0 < count.prefill_tensor_us < count.prefill_us else []
    if not loads:
        return ""
    return f"{count.gpus} GPUs: engine.attention: tensor_parallel is faster for {' and '.join(loads)}"


def _gigabytes(size: float) -> str:
    digits = 2 if size >= _GB else 4 if size >= _GB / 1000 else 6
    return f"{size / _GB:,.{digits}f}"


def _to_the_right(table: Table, columns: int | None = None) -> Table:
    for column in table.columns[:columns]:
        column.justify = "right"
    return table


def _way(spread: Spread) -> str:
    return str(spread) if spread.runs else f"{spread} *"


def _prefill_rate(plan: Plan, count: CountPlan) -> float:
    """Prompt tokens a second with a prompt on every GPU."""
    return count.gpus * plan.work.prefill / count.prefill_all_us * 1e6
