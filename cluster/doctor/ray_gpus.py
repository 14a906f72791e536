"""Which GPUs a process sees that asked Ray for one: looked at in such a process, not guessed from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ...actors.device_choice import ALL_GPUS_VISIBLE, device_index
from ..ray_address import connect
from .devices import MASKS
from .finding import Finding

LOCAL = "local"
_ABOUT = "GPUs under Ray"
_READY_S = 30.0
_VARIABLES = (*MASKS, *ALL_GPUS_VISIBLE)


@dataclass(frozen=True)
class RayView:
    """What such a process sees. assigned: Ray's names of its GPUs; visible: GPUs that torch sees; environment: the
    variables that decide; index: of its GPU among those that it sees, and name, of that one. error: why it has none."""

    assigned: tuple[str, ...]
    visible: int
    environment: Mapping[str, str]
    index: int = -1
    name: str = ""
    error: str = ""


def check_ray(address: str, gpus: int, hip: bool) -> Iterator[Finding]:
    """Asks a process with a GPU what it sees. address: of a running cluster, or "local" to start a Ray of this machine,
    and end it. gpus: that torch sees here."""
    try:
        with _connected(address):
            import ray

            known = int(ray.cluster_resources().get("GPU", 0))
            view = look(gpus=1) if known else None
    except TimeoutError:
        yield Finding(_ABOUT, "unknown", f"not known: Ray gave no GPU within {_READY_S:g} s; all may be taken")
    except Exception as error:  # whatever keeps Ray from starting is what is looked for
        yield Finding(_ABOUT, "fault", f"Ray at {address!r}: {type(error).__name__}: {error}")
    else:
        yield judge_view(view, known, gpus, hip)


def look(gpus: float) -> RayView:
    """In a process with as many GPUs, on the Ray that is connected. Raises TimeoutError where none is free."""
    import ray

    # Ray masks a task's process as it does an actor's.
    task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(_look)
    return ray.get(task.remote(), timeout=_READY_S)


def judge_view(view: RayView | None, known: int, gpus: int, hip: bool) -> Finding:
    """known: GPUs that Ray counts; gpus: that torch sees in the process that asks. view: None where Ray has no GPU."""
    if view is None or not known:
        return Finding(
            _ABOUT,
            "fault",
            f"torch sees {gpus}, Ray none: no shard would be placed; does amd-smi or nvidia-smi work here, and is "
            "ROCR_VISIBLE_DEVICES unset? Else start Ray with --num-gpus",
        )
    masks = ", ".join(f"{name}={value}" for name, value in sorted(view.environment.items())) or "no variables"
    text = f"Ray counts {known} of {gpus}; a process with GPU {', '.join(view.assigned)} sees {view.visible} ({masks})"
    if view.error or not view.visible:
        return Finding(_ABOUT, "fault", f"{text}: {view.error or 'unset what hides them, and start Ray again'}")
    if known < gpus:
        return Finding(_ABOUT, "warning", f"{text}: the others stay idle; a variable hides them from Ray")
    if hip and gpus > 1 and view.visible < gpus:
        return Finding(_ABOUT, "fault", f"{text}: RCCL cannot reach the others; start Ray with {ALL_GPUS_VISIBLE[0]}=1")
    return Finding(_ABOUT, "ok", f"{text}; its own is {view.index}, {view.name}")


@contextmanager
def _connected(address: str) -> Iterator[None]:
    from ..local_ray import LocalRay

    if address == LOCAL:
        with LocalRay(1):
            yield
        return
    import ray

    connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def _look() -> RayView:
    import ray
    import torch

    assigned = tuple(ray.get_runtime_context().get_accelerator_ids()["GPU"])
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    visible = torch.cuda.device_count()
    if not assigned:
        return RayView(assigned, visible, environment, error="Ray assigned none")
    try:
        index = device_index(assigned)
        return RayView(assigned, visible, environment, index, torch.cuda.get_device_name(index))
    except (ValueError, RuntimeError, AssertionError) as error:
        return RayView(assigned, visible, environment, error=str(error))
