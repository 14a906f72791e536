"""Collectives between processes; `test_doctor.py` runs gloo's, the same calls as RCCL's and NCCL's."""

from __future__ import annotations

from multiprocessing import Pipe

import pytest
import torch

from flyray.cluster.doctor.collectives import (
    CollectiveFailure,
    CollectiveTime,
    check_collectives,
    gather,
    judge,
)
from flyray.cluster.plan.gpu import find_gpu


def test_processes_that_do_not_answer_are_named() -> None:
    (silent, here), (mute, there) = Pipe(duplex=False), Pipe(duplex=False)
    with here, there, silent, mute, pytest.raises(CollectiveFailure, match=r"process 0, 1 did not answer within 0 s"):
        gather([silent, mute], timeout_s=0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fails where there is no GPU")
def test_what_a_process_raises_is_the_finding() -> None:
    (found,) = check_collectives(1, "cuda", find_gpu("MI325X"))
    assert found.state == "fault"
    assert found.text.startswith("process 0: ")


def test_times_are_held_against_what_is_published() -> None:
    gpu = find_gpu("MI325X")
    good = CollectiveTime("all-to-all", 30e-6, 300e9)
    assert judge("RCCL", good, gpu).state == judge("gloo", good, None).state == "ok"
    late = judge("RCCL", CollectiveTime("all-to-all", 400e-6, 300e9), gpu)
    assert (late.state, "35 µs are usual" in late.text) == ("warning", True)
    slow = judge("RCCL", CollectiveTime("all-to-all", 30e-6, 20e9), gpu)
    assert (slow.state, "of 448 published" in slow.text) == ("warning", True)
