from __future__ import annotations

import pytest

from flyray.actors.device_choice import ALL_GPUS_VISIBLE, device_index, masked_from_peers

UNMASKED = dict.fromkeys(ALL_GPUS_VISIBLE, "1")


@pytest.mark.parametrize(
    ("environment", "index"),
    [
        ({}, 0),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 0),
        (UNMASKED, 3),
        (UNMASKED | {"CUDA_VISIBLE_DEVICES": "2,3"}, 1),
        (UNMASKED | {"HIP_VISIBLE_DEVICES": "3,5"}, 0),
        (UNMASKED | {"CUDA_VISIBLE_DEVICES": "GPU-7,3"}, 1),
    ],
)
def test_the_gpu_that_ray_assigned(environment: dict[str, str], index: int) -> None:
    assert device_index(["3"], environment) == index


def test_a_gpu_that_cannot_be_seen() -> None:
    with pytest.raises(ValueError, match="Ray assigned GPU 3, but this process sees 0, 1"):
        device_index(["3"], UNMASKED | {"HIP_VISIBLE_DEVICES": "0,1"})


def test_peers_are_hidden_unless_ray_is_told_not_to() -> None:
    assert masked_from_peers({})
    assert not masked_from_peers(UNMASKED)
