"""How much of a GPU's memory is left."""

from __future__ import annotations

import torch


def fitting_pages(device: torch.device, share: float, page_bytes: int, kept: int = 0) -> int:
    """KV pages that fit `share` of the device's memory beside all that is in it now, of this process or another, and
    `kept` bytes that will be.

    Raises ValueError with the numbers if not one does.
    """
    torch.accelerator.empty_cache()  # what conversions left behind is free
    free, total = torch.accelerator.get_memory_info(device)
    room = int(total * share) - (total - free) - kept
    if room < page_bytes:
        raise ValueError(
            f"gpu_memory_utilization: {share:g} of the {total} bytes of {device} leave {room} for the KV cache, and "
            f"a page takes {page_bytes}; {total - free + kept} are in use or set aside: raise it, or spread the model "
            "over more shards"
        )
    return room // page_bytes
