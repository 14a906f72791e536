"""Compiles one product for the architecture that the environment names: a process of `build`."""

from __future__ import annotations

import sys

import torch

from .product import product_launcher
from .shape import ProductShape


def main(arguments: list[str]) -> None:
    """arguments: the fields of a `ProductShape` as integers."""
    bits, inner, rows, units, gated, tokens = map(int, arguments)
    launch = product_launcher(ProductShape(bits, inner, rows, units, bool(gated), tokens))

    # Only dtypes decide what is compiled, and that the tensors are not on a GPU keeps it from being launched.
    def tensor(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(64, dtype=dtype)

    word, real = tensor(torch.int32), tensor(torch.float32)
    multipliers = tensor(torch.int16) if bits == 4 else word
    launch(word, multipliers, real, word, real, word, word, word, real, 16, 1, 256, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
