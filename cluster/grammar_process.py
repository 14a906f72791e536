"""The process behind `GrammarCheck`: a grammar a line comes in, as JSON, and "" or what is wrong with it goes out."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from pathlib import Path

from ..actors.grammar import GrammarBook
from ..actors.vocabulary import Vocabulary

# Beyond what the process has before the first grammar.
_MOST_MEMORY = 4 << 30
_XGRAMMARS_PREFIX = re.compile(r"^\[[\d:]+\] \S+:\d+: (Check failed: .*? is false: )?")


def main(model_path: str, limit_s: float) -> None:
    """Ends with its input. A grammar that takes longer than `limit_s` ends it by SIGALRM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes the input
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    vocabulary = Vocabulary.read(Path(model_path))
    book = GrammarBook(model_path, max(vocabulary.special.values()) + 1, os.cpu_count() or 1)
    bounded = False
    for line in sys.stdin:
        book.prepare()
        if not bounded:
            bounded = True
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + _MOST_MEMORY, used + _MOST_MEMORY))
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        fault = _fault(book, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        answers.write(json.dumps(fault) + "\n")
        answers.flush()


def _fault(book: GrammarBook, grammar: str) -> str:
    try:
        book.compile(grammar)
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = _XGRAMMARS_PREFIX.sub("", str(error)).strip().partition("\n")[0]
        return f"cannot be enforced: {reason or type(error).__name__}"
    return ""


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
