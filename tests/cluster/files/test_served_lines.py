"""Batch lines on engines that come and go: what waits, what is tried again, and what is the line's answer."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from flyray.cluster.batch.line import Answer, BatchLine
from flyray.cluster.chat import ChatService
from flyray.cluster.files.served_lines import MOST_FAILURES, ServedLines
from flyray.cluster.front.engine_view import EngineView
from flyray.cluster.front.errors import EngineUnavailable, RequestError
from flyray.cluster.front.requests import CompletionRequest

LINE = BatchLine(1, "a", "/v1/completions", {"model": "m", "prompt": "hi"})
GONE = EngineUnavailable("gone")
DONE = {"id": "x"}


class Engines:
    """Gives in turn what a request meets: a body, or an error. absent: how often there is no engine at first."""

    def __init__(self, *meets: dict[str, Any] | Exception, absent: int = 0, stage: str = "ready") -> None:
        self.meets, self.absent, self.stage = list(meets), absent, stage
        self.priorities: list[int] = []

    async def service(self) -> ChatService:
        if self.absent:
            self.absent -= 1
            raise EngineUnavailable("starting")
        return cast(ChatService, self)

    async def completion_response(self, request: CompletionRequest, priority: int) -> dict[str, Any]:
        self.priorities.append(priority)
        met = self.meets.pop(0)
        if isinstance(met, Exception):
            raise met
        return met

    async def views(self) -> list[EngineView]:
        return [EngineView("engine-1", self.stage, "", None)]

    def idle(self) -> bool:
        return False

    def absence(self) -> EngineUnavailable:
        return GONE


def run(engines: Engines, line: BatchLine = LINE) -> Answer:
    return asyncio.run(ServedLines(engines, wait_s=0).run(line))


def test_a_line_waits_for_an_engine_and_runs_behind_interactive_requests() -> None:
    engines = Engines(DONE, absent=9)
    assert (run(engines).body, engines.priorities) == (DONE, [1])


def test_engines_that_are_lost_cost_a_line_nothing() -> None:
    assert run(Engines(*[GONE] * 20, DONE, stage="failed")).body == DONE


def test_a_full_queue_is_waited_for() -> None:
    assert run(Engines(*[RequestError("full", status=429, code="queue_full")] * 20, DONE)).body == DONE


def test_what_fails_on_engines_that_are_ready_is_the_line_s_fault() -> None:
    answer = run(Engines(*[GONE] * MOST_FAILURES, DONE))
    assert (answer.status, answer.body["error"]["message"]) == (503, "gone")
    assert run(Engines(*[GONE] * (MOST_FAILURES - 1), DONE)).body == DONE


@pytest.mark.parametrize(
    ("met", "status", "code"),
    [
        (RequestError("no", code="invalid_request"), 400, "invalid_request"),
        (RecursionError(), 400, "invalid_json"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), 400, "invalid_json"),
        (ZeroDivisionError(), 500, "internal"),
    ],
)
def test_an_error_is_the_answer_of_its_line_alone(met: Exception, status: int, code: str) -> None:
    answer = run(Engines(met))
    assert (answer.status, answer.body["error"]["code"]) == (status, code)
