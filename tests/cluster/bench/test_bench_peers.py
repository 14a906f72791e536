"""Peers: what is run, what is read of their output, and what is said where they are missing."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import write_tiny

from flyray.cluster.bench.llama_cpp_peer import LlamaCppPeer, parse_llama_cpp, quantized_gguf
from flyray.cluster.bench.peers import check_peers, open_peer
from flyray.cluster.bench.published_folder import published_folder
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
# A stand-in for a command: it keeps its arguments, and does what it was told to.
COMMAND = """#!{python}
import json, sys
open({log!r}, "a").write(json.dumps(sys.argv[1:]) + chr(10))
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
    log, gguf = on_path("llama-batched-bench", f"print({LLAMA!r})"), tmp_path / "model.gguf"
    found = asyncio.run(LlamaCppPeer(gguf, 2).measure(Sizes((8,), 256, 64)))
    assert (found.decode, found.prefill) == ({8: 117.25}, 306.954437)
    [arguments] = map(json.loads, log.read_text().splitlines())
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options["-m"] == str(gguf)
    assert (options["-npp"], options["-ntg"], options["-npl"]) == ("256", "64", "1,8")
    assert (options["-t"], options["-tb"], options["-c"]) == ("2", "2", "2560")


def test_llama_cpps_weights_are_made_once(tmp_path: Path, on_path) -> None:
    log = on_path("llama-quantize", "import shutil; shutil.copy(*sys.argv[1:3])")
    folder = published_folder(write_tiny(tmp_path / "model"), tmp_path / "work")
    kept = quantized_gguf(folder, "Q4_0")
    assert quantized_gguf(folder, "Q4_0") == kept
    assert kept.parent == tmp_path / "work"
    assert [json.loads(line)[2] for line in log.read_text().splitlines()] == ["Q4_0"]


def test_a_command_that_fails_says_its_last_errors(tmp_path: Path, on_path) -> None:
    on_path("llama-batched-bench", "sys.exit('error: unable to load model')")
    with pytest.raises(BenchError, match=r"llama-batched-bench ended with exit code 1:\nerror: unable to load"):
        asyncio.run(LlamaCppPeer(tmp_path, 1).measure(SIZES))


def test_a_process_that_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM is not installed here: its script cannot import it.
    monkeypatch.setattr("flyray.cluster.bench.peers._PYTHONS", {"vllm-cpu": lambda: sys.executable})
    source = write_tiny(tmp_path / "model")
    with (
        open_peer("vllm-cpu", source, tmp_path / "work", 1) as peer,
        pytest.raises(BenchError, match="peer vllm-cpu: its process ended with exit code 1"),
    ):
        asyncio.run(peer.measure(SIZES))


def test_vllm_runs_with_the_python_beside_its_command(tmp_path: Path, on_path) -> None:
    on_path("vllm", "")
    with pytest.raises(BenchUsageError, match="python is not there: vllm must be installed in a virtual environment"):
        check_peers(["vllm-cpu"])
    (tmp_path / "bin" / "python").touch()
    check_peers(["vllm-cpu"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama.cpp", "llama-batched-bench is not on the PATH; build it"),
        ("vllm-cpu", "vllm is not on the PATH; install its build for CPUs"),
        ("llama.cpp:", "'llama.cpp:' is unknown; known are transformers, vllm-cpu, llama.cpp, llama.cpp:TYPE"),
    ],
)
def test_a_peer_that_cannot_run_says_what_to_install(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchUsageError, match=said):
        check_peers([name])
