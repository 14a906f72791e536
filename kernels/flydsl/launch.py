"""Products on the GPU: compiled once for every shape, launched on torch's current stream."""

from __future__ import annotations

from functools import cache

import flydsl.expr as fx  # pyright: ignore[reportMissingImports]
import torch

from .experts import Launcher
from .product import product_launcher
from .shape import ProductShape


@cache
def product(shape: ProductShape) -> Launcher:
    """A function of `product_launcher`'s arguments."""
    launch = product_launcher(shape)
    return lambda *arguments: launch(*arguments, stream=fx.Stream(torch.cuda.current_stream()))
