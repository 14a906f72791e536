"""Memory of results: a tensor's place is given to the next one when nobody holds the tensor any more."""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from ..huge_pages import huge_block

_ALIGNMENT = 64
_BLOCK = 32 << 20  # of addresses


class Arena:
    """Hands out tensors whose memory it keeps; from any thread.

    A place goes to tensors of its own size alone, rounded up to a power of two, so that a model's layers share their
    places, and steps of many sizes too. It never shrinks: of each such size it keeps as many places as were ever held
    at once. What no tensor reaches of a place takes no memory.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._places: set[int] = set()
        self._block = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with undefined values."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        rounded = max(_ALIGNMENT, 1 << (size - 1).bit_length())
        free = self._free.setdefault(rounded, [])
        try:
            place = free.pop()
        except IndexError:
            place = self._place(rounded)
        # An array of its own: the tensor's storage holds it, through all views, and it ends with the storage.
        held = place[:size]
        weakref.finalize(held, free.append, place).atexit = False
        return torch.from_numpy(held).view(dtype).view(shape)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._places

    def _place(self, size: int) -> np.ndarray:
        """Places lie one behind another in huge pages."""
        with self._lock:
            if size > len(self._block):
                self._block = huge_block(max(size, _BLOCK)).numpy()
            place, self._block = self._block[:size], self._block[size:]
            self._places.add(place.ctypes.data)
        return place
