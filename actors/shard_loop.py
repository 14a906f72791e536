"""A shard's loop: a plan in, its rows through the stages, the new tokens out. One thread owns all of it."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
import zmq

from .expert_mover import ExpertMover
from .interpreter import Interpreter, StageError
from .link import LinkError
from .sequence_table import PlanError, SequenceTable
from .shard_group import HELLO
from .shard_start import ShardStart
from .step_answer import Answer
from .step_plan import NewTokens, PromptScores, StageTime, StepPlan, StepResult
from .waker import Waker
from .wire import WireError, decode_as, encode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Running:
    """A step on its way. times: of its stages, if they are told."""

    step: int
    answer: Answer
    times: list[StageTime]


class ShardLoop:
    """Runs the plans that come by the socket `plans` until it is woken, the router is gone or a step fails.

    steps: done. dropped: messages of another engine or epoch, or of none. error: why it has ended, "" if it was woken.
    fault: whether a step failed for another reason than that peers are gone.
    """

    def __init__(
        self,
        start: ShardStart,
        plans: zmq.Socket,
        router_gone: zmq.Socket,
        waker: Waker,
        table: SequenceTable,
        interpreter: Interpreter,
        mover: ExpertMover | None,
    ) -> None:
        """router_gone: readable when the router's end of `plans` is lost. mover: where experts move."""
        self.steps = self.dropped = 0
        self.error = ""
        self.fault = False
        self._start, self._table, self._interpreter, self._mover = start, table, interpreter, mover
        self._plans, self._router_gone, self._waker = plans, router_gone, waker
        self._programs = [program.name for program in start.programs]
        self._placement = start.move
        self._on_their_way: deque[_Running] = deque()

    def hello(self) -> None:
        """Tells the router that the shard is connected."""
        self._send(HELLO, NewTokens())

    def run(self, device: torch.device) -> None:
        """device: that of the kernels."""
        poller = zmq.Poller()
        for socket in (self._waker.socket, self._router_gone, self._plans):
            poller.register(socket, zmq.POLLIN)
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index)  # each thread has a current device
        with torch.inference_mode():
            while not self.error:
                # A device that computes is asked again and again: to sleep would take longer than the step may.
                ready = dict(poller.poll(0 if self._on_their_way else None))
                if self._waker.socket in ready:
                    break
                if self._router_gone in ready:
                    # Nobody will call `stop` any more; Ray ends this process.
                    self.error = "the router is gone"
                    break
                if self._plans in ready:
                    self._receive_plan()
                elif self._on_their_way[0].answer.ready:
                    self._finish()
        self._plans.disable_monitor()

    def _receive_plan(self) -> None:
        start = self._start
        try:
            plan = decode_as(self._plans.recv(), StepPlan)
        except WireError:
            self.dropped += 1
            return
        if (plan.engine, plan.epoch) != (start.engine, start.epoch):
            self.dropped += 1
            return
        whole = plan.program == self._programs[0] and not plan.trace
        follows = self._interpreter.runs_ahead and whole and self._table.can_follow(plan)
        # Beside a step on its way a second one may be begun, if it can do without the first one's tokens on the host.
        while len(self._on_their_way) > follows and not self.error:
            self._finish()
        if not self.error:
            self._begin(plan)
        if not self.error and self._on_their_way[-1].answer.ready:
            while self._on_their_way and not self.error:
                self._finish()

    def _begin(self, plan: StepPlan) -> None:
        """Begins to run a plan."""
        times: list[StageTime] = []
        try:
            if plan.program not in self._programs:
                names = ", ".join(map(repr, self._programs))
                raise PlanError(f"the plan names program {plan.program!r}, this shard has {names}")
            if plan.placement != self._placement:
                self._switch(plan.placement)
            batch = self._table.apply(plan)
            traced = times if plan.trace else None
            answer = self._interpreter.begin(plan.step, batch, plan.decode_rows, traced, plan.program)
        except Exception as error:
            self._fail(plan.step, error)
            return
        if not answer.ready:
            self._table.promise(plan.step, batch)
        self._on_their_way.append(_Running(plan.step, answer, times))

    def _switch(self, version: int) -> None:
        if self._mover is None or version != self._placement + 1:
            raise PlanError(f"the plan names placement {version}, this shard is at {self._placement}")
        self._mover.apply(version)
        self._placement = version

    def _finish(self) -> None:
        """Waits for the oldest step on its way and answers the router."""
        running = self._on_their_way.popleft()
        try:
            answer = running.answer.wait()
        except Exception as error:
            self._fail(running.step, error)
            return
        self._table.sampled(running.step, answer.tokens)
        self.steps += 1
        tokens, scores = (answer.tokens, answer.scores) if self._start.answers else (NewTokens(), ())
        self._send(running.step, tokens, scores, tuple(running.times))

    def _fail(self, step: int, error: Exception) -> None:
        """While an error is handled: it becomes the result of the step, and the loop ends."""
        self.fault = not isinstance(error.__cause__ or error, LinkError | dist.DistBackendError)
        if not isinstance(error, StageError | PlanError):
            logger.exception("shard %d, step %d", self._start.shard, step)
        self.error = f"step {step}: {error}" if isinstance(error, StageError | PlanError) else repr(error)
        self._send(step, NewTokens(), error=self.error)

    def _send(
        self,
        step: int,
        tokens: NewTokens,
        scores: tuple[PromptScores, ...] = (),
        times: tuple[StageTime, ...] = (),
        error: str = "",
    ) -> None:
        start = self._start
        result = StepResult(start.engine, start.epoch, step, start.shard, tokens, scores, times, error)
        self._plans.send(encode(result))
