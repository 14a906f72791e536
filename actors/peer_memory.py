"""Device memory that all processes of a node can write: a block of each GPU's, mapped into every shard's process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from .link import LinkError

_ALIGNMENT = 256
_KEY = "peer-memory"


class PeerMemory:
    """One block of the same layout on every shard. All shards make it at once.

    own: this shard's parts, zeros at first. places: of every part, its address on each shard, [shards] int64.
    """

    def __init__(
        self, parts: Sequence[tuple[torch.dtype, int]], shard: int, shards: int, device: torch.device, store: Store
    ) -> None:
        """parts: dtype and number of values of each. store: of these shards alone, through which they find each other's
        blocks. Raises LinkError where a GPU cannot reach another's memory."""
        begins, end = [], 0
        for dtype, count in parts:
            begins.append(end)
            end += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._block = torch.zeros(end, dtype=torch.uint8, device=device)
        torch.accelerator.synchronize()  # zeros before anybody writes
        _, *handle = self._block.untyped_storage()._share_cuda_()
        store.set(f"{_KEY}/{shard}", msgpack.packb(handle))  # pyright: ignore[reportArgumentType]
        # Held, so that they stay mapped.
        self._blocks = [
            self._block if peer == shard else _mapped(msgpack.unpackb(store.get(f"{_KEY}/{peer}")), peer, device)
            for peer in range(shards)
        ]
        sizes = [count * dtype.itemsize for dtype, count in parts]
        self.own = [
            self._block[begin : begin + size].view(dtype)
            for begin, size, (dtype, _) in zip(begins, sizes, parts, strict=True)
        ]
        addresses = torch.tensor([block.data_ptr() for block in self._blocks], device=device)
        self.places = [addresses + begin for begin in begins]


def _mapped(handle: list[Any], peer: int, device: torch.device) -> Tensor:
    """Another process's block, as memory that this process's `device` can reach."""
    try:
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *handle)
    except RuntimeError as error:
        raise LinkError(f"the GPU of shard {peer} cannot be written from here: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
