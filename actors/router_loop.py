"""The router's loop: requests in, a plan a step to every shard, results in, news out. One thread owns all of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import zmq

from .client_port import ClientMessage, ClientPort
from .engine_error import EngineError
from .expert_state import UNKNOWN
from .link import Links
from .micro_batches import MicroBatchChoice
from .placement_switch import PlacementSwitch
from .recordings import Recording, Recordings
from .request import Cancel, EngineStatus, Generate, StatusQuery, TracedStep
from .request_desk import RequestDesk
from .scheduler import Scheduler, SchedulerError
from .sent_steps import SentStep, SentSteps
from .shard_group import ShardGroup, ShardLost
from .step_news import StepNews
from .step_plan import StepResult
from .waker import Waker

logger = logging.getLogger(__name__)


class RouterLoop:
    """Runs an engine's steps in the calling thread until `stop`.

    The engine takes requests once `ready` is set, before that only from the client `golden`. When a shard is lost, a
    step misses its deadline or a shard answers with an error, `on_lost` may have the shards come together again: until
    `resume` nothing runs, `recovering` says why, requests wait and new ones are taken. Else, and when `fail` is called,
    the engine fails once and for all: all requests end with that error, `error` says it, and new requests get it at
    once. The loop waits without spinning while there is nothing to do.
    recoveries: how often the shards came back. stopped_whole: after `run`, whether it was stopped and had not failed.
    experts: what is told of their load; whoever gathers it replaces it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        shards: ShardGroup,
        clients: ClientPort,
        links: Links,
        micro_batches: MicroBatchChoice,
        step_timeout_s: float,
        precision_plan: tuple[str, ...],
        golden: bytes,
        on_lost: Callable[[ShardLost], bool] = lambda lost: False,
        drain: bool = False,
    ) -> None:
        """links: of the clients. on_lost: begins to bring the shards together again, and returns at once; False where
        that is not to be. drain: `stop` waits for the steps on their way, so that every shard has run the same ones."""
        self.ready = False
        self.error = ""
        self.recovering = ""
        self.recoveries = 0
        self.stopped_whole = False
        self.experts = UNKNOWN
        self._scheduler, self._shards, self._clients = scheduler, shards, clients
        self._step_timeout_s = step_timeout_s
        self._precision_plan = precision_plan
        self._golden = golden
        self._on_lost, self._drain = on_lost, drain
        self._desk = RequestDesk(scheduler, clients)
        self._sent = SentSteps()
        self._steps = 0
        self._dropped = 0
        self._recordings = Recordings()
        self._micro_batches = micro_batches
        self._switch = PlacementSwitch()
        self._stopping = False
        self._doom = ""
        self._next: tuple[ShardGroup, int] | None = None
        self._turned = threading.Condition()
        self._waker = Waker(links.context, "router")
        self._poller = zmq.Poller()
        for socket in (self._waker.socket, clients.socket):
            self._poller.register(socket, zmq.POLLIN)
        shards.register(self._poller)

    def run(self) -> None:
        """Runs until `stop`. Nothing that a client or a shard sends ends it."""
        while not self._stopping or (self._drain and self._sent):
            ready = dict(self._poller.poll(self._wait_ms()))
            if self._waker.socket in ready:
                self._waker.take()
                if self._doom and not self._stopping:
                    self._fail(self._doom)
                ready = {}
            with self._turned:
                self._try_turn(ready)
                self._turned.notify_all()
        self.stopped_whole = not self.error
        self._end("the engine was stopped")
        with self._turned:
            self._turned.notify_all()
        self._waker.close()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """While nothing runs: keeps it so, clients' messages wait; from any thread but the loop's.

        Raises EngineError if there are requests, a step of theirs does not end, or the engine has failed.
        """
        deadline = time.monotonic() + self._step_timeout_s
        with self._turned:
            while True:
                stats = self._scheduler.stats
                if self.error or self.recovering:
                    raise EngineError(self.error or self.recovering)
                if stats.running or stats.waiting:
                    raise EngineError(f"requests run ({stats.running}) or wait ({stats.waiting}); there must be none")
                if not self._sent:
                    break
                # What has ended is told to the shards in a step of its own.
                if not self._turned.wait(deadline - time.monotonic()):
                    raise EngineError(f"the last step did not end within {self._step_timeout_s:g} s")
            yield

    def switch(self, version: int) -> bool:
        """Has all plans from the next one on name this change of experts' places, for which every shard must be ready;
        from any thread but the loop's. True when a step with it is done, or the shards come together again with it;
        False if none will be."""
        with self._turned:
            if self.error or self.recovering:
                return False
            self._switch.named = version
            while self._switch.done != version and not self.error and not self.recovering:
                self._turned.wait()
            return not self.error

    @property
    def placement(self) -> int:
        """The last change of experts' places that plans name."""
        return self._switch.named

    def clear_prefix_cache(self) -> None:
        """Forgets what KV pages hold, for the model has changed; within `hold` only."""
        self._scheduler.clear_cache()

    def resume(self, shards: ShardGroup, epoch: int) -> None:
        """Has these shards run what was running, in a new epoch that begins with the last change of experts' places;
        from any thread."""
        self._next = shards, epoch
        self._waker.wake()

    def fail(self, reason: str) -> None:
        """Ends all requests and takes no more; from any thread."""
        self._doom = reason
        self._waker.wake()

    def stop(self) -> None:
        """Ends `run`; from any thread."""
        self._stopping = True
        self._waker.wake()

    def _wait_ms(self) -> int | None:
        """Until the next plan is to leave, or the oldest step's deadline; for ever when no step is on its way."""
        if not self._sent:
            return None
        left = 0.0 if self._sent.full else self._sent.held
        return max(0, int((left or self._step_timeout_s - self._sent.elapsed) * 1000) + 1)

    def _try_turn(self, ready: dict[zmq.Socket, int]) -> None:
        try:
            self._turn(ready)
        except ShardLost as error:
            self._lose(error)
        except SchedulerError as error:
            self._fail(str(error))
        except Exception as error:  # a bug here must not leave clients waiting
            logger.exception("router")
            if self.error:
                raise
            self._fail(f"router: {type(error).__name__}: {error}")

    def _turn(self, ready: dict[zmq.Socket, int]) -> None:
        if self._clients.socket in ready:
            for client, message in self._clients.receive():
                self._handle(client, message)
        if self._next is not None and not self.error:
            self._take_up(*self._next)
            self._next = None
        if self.error or self.recovering:
            return
        for result in self._shards.receive(ready):
            self._take(result)
        self._check_deadline()
        while not (self._stopping or self._sent.full or self._sent.held) and self._send_step():
            pass

    def _handle(self, client: bytes, message: ClientMessage) -> None:
        if isinstance(message, StatusQuery):
            self._status(client, message)
        elif isinstance(message, Cancel):
            self._desk.cancel(client, message.request)
        else:
            self._generate(client, message)

    def _generate(self, client: bytes, message: Generate) -> None:
        error = self.error
        if not error and not self.ready and client != self._golden:
            error = "the engine is still starting"
        if error:
            self._desk.refuse(client, message, error)
        else:
            self._desk.open(client, message)

    def _send_step(self) -> bool:
        plans = self._scheduler.schedule(self._recordings.wanted, self._switch.named)
        if plans is None:
            return False
        step = plans[0].step
        tokens = max(plan.rows for plan in plans.values())
        program = self._micro_batches.program(tokens, max(plan.sequences for plan in plans.values()))
        if program != plans[0].program:
            plans = {shard: replace(plan, program=program) for shard, plan in plans.items()}
        self._switch.sent(step)
        self._sent.send(step, tokens, program)
        self._shards.send(plans)
        if tokens:  # a step that only ends sequences shows nothing
            self._recordings.sent(step)
        return True

    def _take(self, result: StepResult) -> None:
        """Keeps a shard's result; completes steps in their order when all shards have answered."""
        if result.error:
            raise ShardLost(f"shard {result.shard}: {result.error}", [result.shard])
        if not self._sent.take(result):
            self._dropped += 1
        while (ended := self._sent.end(len(self._shards.addresses))) is not None:
            self._complete(ended)

    def _complete(self, ended: SentStep) -> None:
        step, results = ended.number, ended.results
        stages = [TracedStep(step, result.shard, result.stages) for result in results if result.stages]
        if stages:
            self._micro_batches.measured(ended.tokens, ended.program, stages)
        self._answer(self._recordings.completed(step, results))
        self._steps += 1
        self._switch.ended(step)
        self._desk.deliver(self._scheduler.complete(self._shards.told(results)))

    def _check_deadline(self) -> None:
        if self._sent and self._sent.elapsed > self._step_timeout_s:
            step = self._sent.oldest
            answered = {result.shard for result in step.results}
            silent = [shard for shard in range(len(self._shards.addresses)) if shard not in answered]
            names = ", ".join(f"shard {shard}" for shard in silent)
            raise ShardLost(f"{names} did not answer step {step.number} within {self._step_timeout_s:g} s", silent)

    def _answer(self, recordings: list[Recording]) -> None:
        for recording in recordings:
            status = self._status_of(recording.query, tuple(recording.steps))
            self._clients.send_status(recording.client, status)

    def _status(self, client: bytes, query: StatusQuery) -> None:
        """Answers at once, or, if steps are to be recorded, when they have been."""
        if query.trace_steps <= 0 or self.error:
            self._clients.send_status(client, self._status_of(query, ()))
        else:
            self._recordings.begin(client, query)

    def _status_of(self, query: StatusQuery, trace: tuple[TracedStep, ...]) -> EngineStatus:
        stats, config = self._scheduler.stats, self._scheduler.config
        return EngineStatus(
            query=query.query,
            engine=config.engine,
            epoch=config.epoch,
            ready=self.ready and not self.error and not self.recovering,
            error=self.error,
            recovering=self.recovering,
            recoveries=self.recoveries,
            shards=len(self._shards.addresses),
            running=stats.running,
            waiting=stats.waiting,
            free_pages=sum(stats.free_pages),
            total_pages=stats.total_pages,
            steps=self._steps,
            dropped_messages=self._dropped + self._desk.dropped + self._clients.dropped + self._shards.dropped,
            context_length=config.context_length,
            precision_plan=self._precision_plan,
            trace=trace,
            cached_pages=stats.cached_pages,
            preemptions=stats.preemptions,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            experts=self.experts,
        )

    def _lose(self, lost: ShardLost) -> None:
        """What runs waits for the shards to come back, if they may."""
        self._forget_steps()
        self._answer(self._recordings.end())
        self.recovering = str(lost)
        if not self.ready or self._stopping or not self._on_lost(lost):
            self._fail(str(lost))

    def _take_up(self, shards: ShardGroup, epoch: int) -> None:
        self._dropped += self._shards.dropped
        self._shards = shards
        shards.register(self._poller)
        self._scheduler.restart(epoch)
        self._switch.settle()
        self.recovering = ""
        self.recoveries += 1

    def _forget_steps(self) -> None:
        """Those on their way; nothing more is sent to the shards, or heard of them."""
        self._sent.clear()
        self._shards.unregister(self._poller)
        self._shards.close()

    def _fail(self, reason: str) -> None:
        if not self.error:
            logger.error("engine %s failed: %s", self._scheduler.config.engine, reason)
            self._end(reason)

    def _end(self, reason: str) -> None:
        """Ends all requests with the reason; from now on nothing goes to the shards."""
        if self.error:
            return
        self.error = reason
        self.ready = False
        if self.recovering:
            self.recovering = ""
        else:
            self._forget_steps()
        self._desk.deliver(StepNews(items=self._scheduler.fail_all(reason)))
        self._answer(self._recordings.end())
