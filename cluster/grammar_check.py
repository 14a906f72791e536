"""Finds out in a process of its own whether grammars can be compiled, and in time, before an engine sees them.

A compilation runs in C++ and cannot be interrupted; a grammar can be written that takes hours, or all memory. The
process that tries it ends by its own alarm and has bounded memory, and another one is started for the next grammar.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from .answer_grammar import AnswerGrammar
from .front.structured_output import refused

MAX_BYTES = 256 << 10
COMPILE_LIMIT_S = 5.0
_REMEMBERED = 1024


class GrammarCheck:
    """Checks grammars for the model in a folder, one after another; what was found is remembered.

    limit_s: seconds that one may take. The process is started with the first grammar, which takes about three seconds,
    and ends with this object.
    """

    def __init__(self, model_path: Path, limit_s: float = COMPILE_LIMIT_S) -> None:
        self._path, self._limit_s = model_path, limit_s
        self._found: OrderedDict[bytes, str] = OrderedDict()
        self._process: subprocess.Popen[str] | None = None
        self._thread = ThreadPoolExecutor(1, "grammar-check")

    async def check(self, grammar: AnswerGrammar) -> None:
        """Raises RequestError with the field that asks for it if a grammar cannot be used."""
        if len(grammar.text) > MAX_BYTES:
            raise refused(grammar.place, f"is too large: {len(grammar.text)} bytes as a grammar, at most {MAX_BYTES}")
        key = sha256(grammar.text.encode()).digest()
        if key not in self._found:
            fault = await asyncio.get_running_loop().run_in_executor(self._thread, self._fault, key, grammar.text)
        else:
            fault = self._found[key]
        if fault:
            raise refused(grammar.place, fault)

    def _fault(self, key: bytes, grammar: str) -> str:
        """ "" or what is wrong with a grammar. Runs in the thread."""
        if key not in self._found:  # else another request has asked meanwhile
            self._found[key] = self._ask(grammar)
            if len(self._found) > _REMEMBERED:
                self._found.popitem(last=False)
        return self._found[key]

    def _ask(self, grammar: str) -> str:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(grammar) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        self._process = None
        code = process.wait()
        if code == -signal.SIGALRM:
            return f"takes more than {self._limit_s:g} s to compile; make it smaller, above all its repetitions"
        return f"cannot be compiled: the compiler ended with code {code}, out of memory perhaps"

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "flyray.cluster.grammar_process", str(self._path), str(self._limit_s)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[str]) -> None:
    """The process ends with its input."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
