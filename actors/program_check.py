"""Proves that a stage program computes the model it names, whatever the number of actors.

Every value has the readers that the model's data flow gives it (`_readers`). A program is right if, for each role:

- each stage takes and makes the values of its kind, of its own micro-batch, and comes once;
- what it reads was written before, by the stage that makes it for this reader: so the residual stream goes through
  each layer's attention and MLP exactly once, in order;
- no buffer is overwritten, and no step ends, while one of its value's readers has yet to come;
- running all roles side by side, none waits for ever, and every message is received by the stage of its layer and
  micro-batch in the order of sending; none is left, for each combine waits for what its dispatch brought about. Actors
  of one role run the same order, so what holds for one of each holds for all;
- it ends with `sample`, and each micro-batch is sampled.
"""

from __future__ import annotations

from collections import deque

from .stage_program import CHANNELS, SIGNATURES, Channel, ProgramError, Stage, StageKind, StageProgram, make_stage

OUTSIDE_LAYERS = ("embed", "head", "own_logits", "logits", "sample")


def check(program: StageProgram) -> None:
    """Raises `ProgramError`, naming role and stage, unless the program is right in all the points above."""
    seen: set[str] = set()
    for role, stages in program.stages.items():
        for stage in stages:
            _check_stage(program, role, stage)
            if stage.name in seen:
                raise ProgramError(f"{program.name}, {role}: {stage.name} comes twice")
            seen.add(stage.name)
        _check_buffers(program, role, stages)
    _check_channels(program)
    for micro_batch in range(program.micro_batches):
        if f"sample.{micro_batch}" not in seen:
            raise ProgramError(f"{program.name}: micro-batch {micro_batch} is never sampled")
    if not any(stages and stages[-1].kind == "sample" for stages in program.stages.values()):
        raise ProgramError(f"{program.name}: no role ends with sample")


def _check_stage(program: StageProgram, role: str, stage: Stage) -> None:
    """The stage by itself: a known kind, a layer and a micro-batch that there are, the buffers of its kind."""
    where = f"{program.name}, {role}, {stage.name}"
    if stage.kind not in SIGNATURES:
        raise ProgramError(f"{where}: kind {stage.kind!r} is none of {', '.join(SIGNATURES)}")
    inside = stage.kind not in OUTSIDE_LAYERS
    if not (0 <= stage.layer < program.layers.num_hidden_layers if inside else stage.layer == -1):
        raise ProgramError(f"{where}: layer {stage.layer} has no {stage.kind}")
    if not 0 <= stage.micro_batch < program.micro_batches:
        raise ProgramError(f"{where}: micro-batch {stage.micro_batch} is not 0..{program.micro_batches - 1}")
    right = make_stage(stage.kind, stage.layer, stage.micro_batch)
    for part in ("reads", "writes", "receives", "sends"):
        found, expected = getattr(stage, part), getattr(right, part)
        if found != expected:
            raise ProgramError(f"{where}: {part} {found!r}, its kind needs {expected!r}")


def _check_buffers(program: StageProgram, role: str, stages: tuple[Stage, ...]) -> None:
    """Follows every buffer through a role's order."""
    where = f"{program.name}, {role}"
    writers: dict[str, Stage] = {}
    pending: dict[str, set[str]] = {}
    for stage in stages:
        for buffer in stage.reads:
            if buffer not in writers:
                raise ProgramError(f"{where}: {stage.name} reads {buffer} before it is written")
            if stage.name not in pending[buffer]:
                writer = writers[buffer].name
                raise ProgramError(f"{where}: {stage.name} reads the {buffer} of {writer}, which is not for it")
            pending[buffer].remove(stage.name)
        for buffer in stage.writes:
            # Today's kinds cannot get here, for combine and head wait for all that came before in their layer; a kind
            # whose result is read late could.
            if pending.get(buffer):
                left = ", ".join(sorted(pending[buffer]))
                raise ProgramError(f"{where}: {stage.name} overwrites {buffer}, which {left} has yet to read")
            writers[buffer] = stage
            pending[buffer] = _readers(program, stage)
    for buffer, left in pending.items():
        if left:
            names = ", ".join(sorted(left))
            raise ProgramError(f"{where}: the {buffer} of {writers[buffer].name} is never read by {names}")


def _readers(program: StageProgram, stage: Stage) -> set[str]:
    """The names of the stages that are to read what this stage writes."""
    layers, tensor = program.layers, program.attention == "tensor_parallel"
    dense = stage.layer < layers.first_k_dense_replace
    last = stage.layer == layers.num_hidden_layers - 1
    kinds: tuple[StageKind, ...]
    at = stage.layer
    match stage.kind:
        case "attention" | "output":
            kinds = ("dense",) if dense else ("gate", "combine")
        case "gate":
            kinds = ("own_experts", "shared", "combine") if tensor else ("dispatch", "shared", "combine")
        case "dispatch" | "own_experts" | "shared":
            kinds = ("combine",)
        case "head" | "logits":
            kinds = ("sample",)
            at = -1
        case "dense" | "combine" if last:
            kinds = ("own_logits", "logits") if tensor else ("head",)
            at = -1
        case "embed" | "dense" | "combine":
            kinds = ("own_heads", "output") if tensor else ("attention",)
            at = stage.layer + 1
        case _:  # the sampled tokens leave the program
            kinds = ()
    return {make_stage(kind, at, stage.micro_batch).name for kind in kinds}


def _check_channels(program: StageProgram) -> None:
    """Runs one actor of each role side by side, with nothing but their messages."""
    channels: dict[Channel, deque[Stage]] = {channel: deque() for channel in CHANNELS}
    left = {role: deque(stages) for role, stages in program.stages.items()}
    moving = True
    while moving:
        moving = False
        for role, stages in left.items():
            while stages and _receive(program, role, stages[0], channels):
                stage = stages.popleft()
                if stage.sends:
                    channels[stage.sends].append(stage)
                moving = True
    for role, stages in left.items():
        if stages:
            raise ProgramError(f"{program.name}, {role}: {stages[0].name} waits for a message that is never sent")


def _receive(program: StageProgram, role: str, stage: Stage, channels: dict[Channel, deque[Stage]]) -> bool:
    """Whether the stage can run now; takes the message that it receives."""
    if not stage.receives:
        return True
    messages = channels[stage.receives]
    if not messages:
        return False
    sender = messages.popleft()
    if (sender.layer, sender.micro_batch) != (stage.layer, stage.micro_batch):
        raise ProgramError(f"{program.name}, {role}: {stage.name} receives, but what {sender.name} sent comes first")
    return True
