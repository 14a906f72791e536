"""Which of the GPUs that a process sees is its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

ALL_GPUS_VISIBLE = ("RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES")
"""Ray's settings, in the environment of its cluster: with them an actor sees all GPUs of its node, of which Ray gives
it some; else it sees those alone, as the first ones."""
_VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def device_index(assigned: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """torch's index of the first GPU of those that Ray assigned to this process, by Ray's names of them.

    Raises ValueError for one that the process cannot see.
    """
    if not any(environment.get(name) for name in ALL_GPUS_VISIBLE):
        return 0
    visible = next((environment[name].split(",") for name in _VISIBLE if environment.get(name)), None)
    if visible is None:
        return int(assigned[0])
    if assigned[0] not in visible:
        raise ValueError(f"Ray assigned GPU {assigned[0]}, but this process sees {', '.join(visible)}")
    return visible.index(assigned[0])


def masked_from_peers(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Ray hides the GPUs of other processes from this one."""
    return not environment.get(ALL_GPUS_VISIBLE[0])
