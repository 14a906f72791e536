"""All that an engine would launch on a GPU which need not be here, compiled for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...actors.model.config import ModelConfig
from ..build.build import build_all
from ..build.built import Built, NotBuilt
from ..build.launches import BuildTask
from ..figures import Figure
from .finding import Finding

SHARDS = (1, 2, 3, 4, 8)
"""Numbers of GPUs that the experts are spread over."""


def check_target(target: str, model: ModelConfig, formats: tuple[str, ...]) -> Iterator[Finding]:
    """As `flyray build` does, kept on the disk between runs. target: such as gfx942. formats: of the routed experts."""
    shards = tuple(count for count in SHARDS if count <= model.n_routed_experts)
    try:
        built = [step.built for step in build_all(BuildTask(model, formats, shards, target))]
    except ValueError as error:
        yield Finding(target, "fault", str(error))
        return
    for source in dict.fromkeys(each.source for each in built):
        yield judge_built(target, source, [each for each in built if each.source == source])
    for each in built:
        if each.faults:
            yield Finding(f"{target} {each.name}", "fault", "; ".join(each.faults))


def judge_built(target: str, source: str, built: Sequence[Built | NotBuilt]) -> Finding:
    """The kernels of one source; those at fault are findings of their own."""
    about, right = f"{target} {source}", [each for each in built if isinstance(each, Built) and not each.faults]
    figures = (
        Figure(f"kernels.{source}", len(built), "1"),
        Figure(f"kernels_at_fault.{source}", len(built) - len(right), "1"),
    )
    text = f"{len(right)} of {len(built)} kernels compiled without spills"
    if right:
        registers, lds = max(each.isa.vgpr for each in right), max(each.lds for each in right)
        text += f", with at most {registers} VGPR and {lds} bytes of LDS"
    return Finding(about, "ok" if len(right) == len(built) else "fault", text, figures)
