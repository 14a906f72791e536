"""What the tokens of an answer may be: grammars, compiled for a model's vocabulary, and where sequences stand in them.

A grammar is a structural tag of xgrammar as JSON (https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html), which
names special tokens by their ids. Text in a grammar never becomes a special token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import xgrammar

# Compiled grammars are kept for the next requests up to this size.
_CACHE_BYTES = 256 << 20
_MOST_THREADS = 8


class GrammarBook:
    """Compiles grammars for the vocabulary of a checkpoint folder, in a thread of its own.

    vocab_size: of the model, which may have tokens that no text has. xgrammar, whose import takes a second, and the
    vocabulary are read with the first grammar.
    """

    def __init__(self, model_path: str | Path, vocab_size: int, threads: int) -> None:
        self._folder, self._vocab_size = Path(model_path), vocab_size
        self._threads = min(threads, _MOST_THREADS)
        self._compiler: xgrammar.GrammarCompiler | None = None
        self._known: OrderedDict[str, xgrammar.CompiledGrammar] = OrderedDict()
        self._bytes = 0
        self._worker = ThreadPoolExecutor(1, "grammars")

    def begin(self, grammar: str) -> Future[xgrammar.CompiledGrammar]:
        """Compiles a grammar, or finds it among those known. The future raises what is wrong with it, a ValueError or
        RuntimeError."""
        return self._worker.submit(self.compile, grammar)

    def compile(self, grammar: str) -> xgrammar.CompiledGrammar:
        """As `begin`, in this thread."""
        compiled = self._known.get(grammar)
        if compiled is None:
            compiled = self._known[grammar] = self.prepare().compile_structural_tag(grammar)
            self._bytes += compiled.memory_size_bytes
        self._known.move_to_end(grammar)
        while self._bytes > _CACHE_BYTES and len(self._known) > 1:
            self._bytes -= self._known.popitem(last=False)[1].memory_size_bytes
        return compiled

    def prepare(self) -> xgrammar.GrammarCompiler:
        """Reads the vocabulary, if it has not been read yet; in the thread that compiles."""
        if self._compiler is None:
            self._compiler = _compiler(Vocabulary.read(self._folder), self._vocab_size, self._threads)
        return self._compiler

    def walk(self, grammar: str, ends: Sequence[int], generated: Iterable[int]) -> GrammarWalk:
        """The way of a sequence that has generated these tokens. Its grammar is compiled meanwhile."""
        return GrammarWalk(self.begin(grammar), self._vocab_size, ends, generated)

    def close(self) -> None:
        """Waits for a compilation that runs; those that wait are dropped."""
        self._worker.shutdown(cancel_futures=True)


class GrammarWalk:
    """Where one sequence stands in its grammar.

    ends: tokens that end the answer; they are allowed exactly where the grammar may end. generated: the answer so far.
    fault: "", or why no further token can be drawn.
    """

    def __init__(
        self, compiled: Future[xgrammar.CompiledGrammar], vocab_size: int, ends: Sequence[int], generated: Iterable[int]
    ) -> None:
        self._compiled, self._ends = compiled, list(ends)
        self._due = list(generated)
        self._words = torch.empty((1, -(-vocab_size // 32)), dtype=torch.int32)
        self._matcher: xgrammar.GrammarMatcher | None = None
        self.fault = ""

    def took(self, token: int) -> None:
        """The sequence goes on with this token."""
        self._due.append(token)

    def allowed(self) -> Tensor | None:
        """What may come next: a bit for each token, [ceil(V / 32)] int32, valid until the next call. None: anything,
        as behind the end, where a step that ran ahead draws what nobody reads, and where there is a `fault`."""
        if self.fault:
            return None
        try:
            matcher = self._caught_up()
        except (ValueError, RuntimeError) as error:
            self.fault = f"the grammar cannot be used: {error}"
            return None
        if self.fault or matcher.is_terminated():
            return None
        if not matcher.fill_next_token_bitmask(self._words):
            return None
        words = self._words[0]
        if not words.any():
            self.fault = "the grammar allows no further token: nothing matches what it asks for next"
            return None
        return words

    def _caught_up(self) -> xgrammar.GrammarMatcher:
        """The matcher behind all tokens that came; waits for the grammar to be compiled."""
        matcher = self._matcher
        if matcher is None:
            import xgrammar

            matcher = self._matcher = xgrammar.GrammarMatcher(self._compiled.result(), override_stop_tokens=self._ends)
        for token in self._due:
            if not matcher.is_terminated() and not matcher.accept_token(token):
                self.fault = f"token {token} of the answer does not follow the grammar"
                break
        self._due.clear()
        return matcher


def _compiler(vocabulary: Vocabulary, vocab_size: int, threads: int) -> xgrammar.GrammarCompiler:
    import xgrammar

    # A token without bytes is one that no grammar can have. Special tokens begin with a byte that no UTF-8 has, so that
    # a grammar meets them by their ids alone, and never as their names in a text.
    tokens = [b""] * vocab_size
    for text, token in vocabulary.ranks.items():
        tokens[token] = text
    for name, token in vocabulary.special.items():
        tokens[token] = b"\xff" + name.encode()
    info = xgrammar.TokenizerInfo(tokens, vocab_size=vocab_size, stop_token_ids=[])
    # Its own cache gives rules of one grammar the masks that they had in another one (0.2.8).
    return xgrammar.GrammarCompiler(info, max_threads=threads, cache_enabled=False)
