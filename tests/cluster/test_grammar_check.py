"""Grammars are tried in a process of their own, which ends by itself where one takes too long."""

from __future__ import annotations

import asyncio
import json

import pytest
from tiny_engine import process_is_gone

from flyray.cluster.answer_grammar import AnswerGrammar
from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.front.errors import RequestError
from flyray.cluster.grammar_check import MAX_BYTES, GrammarCheck
from flyray.cluster.processes import descendants


def regex(pattern: str) -> AnswerGrammar:
    text = json.dumps({"type": "structural_tag", "format": {"type": "regex", "pattern": pattern}})
    return AnswerGrammar(text, "guided_regex")


async def refusal(check: GrammarCheck, grammar: AnswerGrammar) -> str:
    with pytest.raises(RequestError) as caught:
        await check.check(grammar)
    assert (caught.value.status, caught.value.param) == (400, "guided_regex")
    return caught.value.message


def test_grammars_are_refused_with_the_reason() -> None:
    async def run() -> None:
        check = GrammarCheck(DEMO_MODEL, limit_s=0.5)
        before = descendants()
        await asyncio.gather(*(check.check(regex("a+")) for _ in range(3)))
        (first,) = descendants() - before
        assert "Lookahead is not supported" in await refusal(check, regex("(?=a)b"))
        assert "is too large" in await refusal(check, regex("a" * MAX_BYTES))
        assert not process_is_gone(first)
        slow = regex("(" + "|".join(f"[a-z]{{{count}}}x" for count in range(1, 200)) + ")+")  # 15 s
        for _ in range(2):  # the second time it is known
            assert "takes more than 0.5 s to compile" in await refusal(check, slow)
        assert process_is_gone(first)
        await check.check(regex("a+"))

    asyncio.run(run())
