"""Plans: what must hold for any GPU and load, what is known of Kimi-K2.5, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flyray.actors.model.config import ModelConfig
from flyray.actors.model.kv_pages import KvPages
from flyray.cluster.cli import app
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.figures import read_figures
from flyray.cluster.plan.command import plan_model
from flyray.cluster.plan.gpu import find_gpu, gpus
from flyray.cluster.plan.placement import GpuMemory, layer_us, memory, spreads, step_us
from flyray.cluster.plan.plan import Plan
from flyray.cluster.plan.points import layer_points, measured_on
from flyray.cluster.plan.stage_costs import Batch
from flyray.cluster.plan.workload import Workload
from flyray.cluster.synthesize import Synthesis
from flyray.kernels.select import describe_kernels

KIMI = ModelConfig.from_dict(Synthesis("kimi-k2.5").config())
SMALL = ModelConfig.from_dict(Synthesis("bench-1b").config())


def kimi(gpu: str, counts: tuple[int, ...], format: str, batches: tuple[int, ...] = (1,)) -> Plan:
    return plan_model("kimi-k2.5", gpu, counts, format, (), (), 8192, 2048, batches)


@pytest.mark.parametrize(
    ("gpu", "format", "least"), [("MI325X", "w4a8", 3), ("MI325X", "w8a8", 5), ("H200", "w4a8", 5)]
)
def test_kimi_fits_as_few_gpus_as_it_must(gpu: str, format: str, least: int) -> None:
    plan = kimi(gpu, (least - 1, least), format)
    assert plan.least == least
    assert [count.fits for count in plan.counts] == [False, True]
    # 1.01469T parameters in routed experts, everything else once on every GPU.
    bits = {"w4a8": 4.125, "w8a8": 8}[format]
    routed = 60 * 3 * 2048 * 7168 * -(-384 // least) * bits / 8
    assert plan.counts[1].memory.weights == pytest.approx(routed + 23.45e9, rel=0.002)
    assert plan.work.kv_token_bytes == 70272


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(gpus())), st.integers(1, 6), st.integers(1, 64), st.sampled_from(["w4a8", "w8a8", "bf16"])
)
def test_no_way_is_faster_than_the_floor(name: str, count: int, batch: int, format: str) -> None:
    gpu, work = find_gpu(name), Workload(SMALL, format, (), (), 512, 256)
    for spread in spreads(count):
        step = Batch.decode(batch, 1 if spread.attention == "tensor" else spread.holders, work.context)
        more = Batch.decode(2 * batch, 1 if spread.attention == "tensor" else spread.holders, work.context)
        took = step_us(work, gpu, count, spread, step)
        assert step_us(work, gpu.ideal, count, spread, step) < took
        assert took <= step_us(work, gpu, count, spread, more) * (1 + 1e-9)
    first, step = next(spreads(count)), Batch.decode(batch, count, work.context)
    assert first.runs
    assert layer_us(work, gpu, count, step) < step_us(work, gpu, count, first, step)


@given(st.sampled_from(sorted(gpus())), st.integers(1, 15))
def test_more_gpus_hold_less_each(name: str, count: int) -> None:
    work = Workload(KIMI, "w4a8", (), (), 1024, 1024)
    few, more = (memory(work, find_gpu(name), each, next(spreads(each))) for each in (count, count + 1))
    assert few.weights >= more.weights
    assert few.kv_tokens <= more.kv_tokens


def test_tensor_parallel_attention_pays_for_few_sequences() -> None:
    (count,) = kimi("MI325X", (8,), "w4a8", (1, 256)).counts
    few, many = count.decoding
    assert 0 < few.tensor_us < few.us
    assert many.tensor_us > many.us
    data, tensor = (spread for spread in spreads(8) if spread.runs)
    assert (str(data), str(tensor)) == ("colocated", "tensor-parallel")
    work, gpu = Workload(KIMI, "w4a8", (), (), 8192, 2048), find_gpu("MI325X")
    whole, sliced = memory(work, gpu, 8, data), memory(work, gpu, 8, tensor)
    # Of 8 GPUs each has an eighth of q_b_proj, kv_b_proj and the head; all have all sequences.
    heads = 61 * (64 * 192 * 1536 + 64 * 256 * 512) * 2
    assert whole.weights - sliced.weights == (heads + 163840 * 7168 * 2) * 7 // 8
    assert (whole.caches, sliced.caches) == (8, 1)


def test_more_gpus_than_heads_have_no_tensor_parallel_attention() -> None:
    tensor = next(each for each in spreads(65) if each.attention == "tensor")
    assert memory(Workload(KIMI, "w4a8", (), (), 8192, 2048), find_gpu("MI325X"), 65, tensor).kv_tokens == 0


def test_command_writes_every_number(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    call = ["plan", "--gpus", "2,3", "--batch", "1,1000", "--json", str(out), "--plot", str(tmp_path / "plan.png")]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "does not fit" in done.output
    assert "engine.attention: tensor_parallel is faster for batch 1" in done.output
    found = read_figures(out)
    assert found["ttft_tensor_parallel_us.g3"].value > 0
    assert found["decode_floor_us.b1.g3"].value < found["decode_tensor_parallel_us.b1.g3"].value
    assert found["least_gpus"].value == 3
    assert found["bytes_per_gpu.g2"].value > 256 << 30 > found["bytes_per_gpu.g3"].value
    assert found["decode_us.b1.g3"].value > found["decode_floor_us.b1.g3"].value > 0
    assert "decode_us.b1000.g3" not in found  # more sequences than the cache holds
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["--gpu", "MI250"], "gpu: 'MI250' is unknown; known are MI300X"),
        (["--gpus", "500"], "gpus: 500: shards: 500 shards cannot share 384 experts"),
        (["--format", "int3"], "format: 'int3' is none of"),
        (["--context", "300000"], "max_position_embeddings are 262144"),
        (["--int8-weights", "gate"], "int8_weights: 'gate' is unknown"),
        (["--model", "no-such"], "no-such"),
    ],
)
def test_what_cannot_be_planned_is_refused(call: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["plan", *call])
    assert done.exit_code == 2
    assert message in done.output


def test_the_command_stands_beside_what_is_published(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    call = ["plan", "--gpus", "8", "--context", "10496", "--batch", "2,40", "--json", str(out)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    found = read_figures(out)
    for batch, published in ((2, 16.95), (40, 46.78)):
        assert f"{published}" in done.output
        assert found[f"published_tpot_us.b{batch}"].value == pytest.approx(1e3 * published)
        assert found[f"published_load_us.b{batch}"].value == pytest.approx(found[f"decode_us.b{batch}"].value)
    assert "nothing was measured on MI325X" in done.output


def test_the_plan_is_near_what_was_measured() -> None:
    """On an H200, µs a MoE layer, by `flyray bench layers`."""
    points = [point for run in measured_on(find_gpu("H200")) for point in layer_points(run)]
    assert {point.gpus for point in points} == {1, 2}
    for point in points:
        assert point.planned_us == pytest.approx(point.measured_us, rel=0.25), point
    assert not measured_on(find_gpu("MI325X"))


def test_a_sequence_lies_in_one_cache() -> None:
    """Four GPUs of room for 1.5 sequences each hold four sequences, not six."""
    room = GpuMemory(weights=0, routed=0, usable=0, caches=4, cache_tokens=1536, token_bytes=1, buffers=0)
    assert (room.kv_tokens, room.sequences(1024), room.sequences(2048)) == (6144, 4, 0)


def test_default_contexts_end_with_the_models() -> None:
    found = plan_model(str(DEMO_MODEL), "MI325X", (1,), "", (), (), 0, 0, (1,))
    assert (found.work.context, found.work.prefill, found.work.format) == (4096, 2048, "w4a16")


@pytest.mark.parametrize(
    ("backend", "kv_dtype"), [("triton", "bf16"), ("triton", "f32"), ("cpu", "f32"), ("cpu", "int8"), ("cpu", "fp8")]
)
def test_a_token_in_the_cache_takes_what_the_engines_pages_take(backend: str, kv_dtype: str) -> None:
    kernels = describe_kernels(backend, 1, kv_dtype)
    assert Workload(KIMI, "w4a8", (), (), 1, 1, kv_dtype).kv_token_bytes == KvPages.page_bytes(KIMI, 1, kernels)


def test_collectives_of_fixed_sizes_take_longer_than_writing_into_place() -> None:
    """A decode step of 64 rows a GPU: all slots travel, not the eighth that a GPU has experts for."""
    gpu, work = find_gpu("MI325X"), Workload(KIMI, "w4a8", (), (), 1024, 1024)
    assert not gpu.direct
    step, prompts = Batch.decode(512, 8, 1024), Batch.prompts(8, 1024, 8)
    direct = gpu.model_copy(update={"direct": True})
    more = layer_us(work, gpu, 8, step) - layer_us(work, direct, 8, step)
    unused = 64 * 8 * (1 - 48 / 384) * 7168 * 4 / gpu.peer * 1e6
    assert more == pytest.approx(unused, rel=0.1)
    assert layer_us(work, gpu, 8, prompts) == layer_us(work, direct, 8, prompts)
