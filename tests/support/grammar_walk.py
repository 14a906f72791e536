"""Random ways through a grammar: what a model that knows nothing would write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flyray.actors.grammar import GrammarBook
from flyray.cluster.tokenizer import Tokenizer

# After so many tokens those are preferred that close something.
_LONG = 24
_MOST = 400


class GrammarWalker:
    """Walks through grammars of a tokenizer's vocabulary. `book` compiles them."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer(folder)
        self.ends = tuple(self.tokenizer.special[name] for name in ("<|im_end|>", "[EOS]"))
        self.book = GrammarBook(folder, self.tokenizer.size, 2)
        texts = [self.tokenizer.token_bytes(token) for token in range(self.tokenizer.base_size)]
        self._whole = np.zeros(self.tokenizer.size, bool)  # tokens of parts of characters would need luck to fit
        self._closing = np.zeros(self.tokenizer.size, bool)
        for token, text in enumerate(texts):
            self._whole[token] = _is_text(text)
            self._closing[token] = text in (b'"', b"}", b"]", b'"}', b'"]', b"a", b"0", b"@", b".", b":")
        self._whole[self.tokenizer.base_size :] = True

    def format(self, schema: Any) -> str:
        return json.dumps({"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}})

    def allowed(self, words: Any) -> np.ndarray:
        """[n] the tokens of a mask."""
        bits = np.unpackbits(words.numpy().view(np.uint8), bitorder="little", count=self.tokenizer.size)
        return bits.nonzero()[0]

    def walk(self, grammar: str, seed: int, begun: Sequence[int] = ()) -> tuple[list[int], str]:
        """Tokens that follow the grammar, without the one that ends them, and "stop"; or "length" for too many, or the
        walk's fault."""
        random, walk, tokens = np.random.default_rng(seed), self.book.walk(grammar, self.ends, begun), list(begun)
        while len(tokens) < _MOST:
            words = walk.allowed()
            if words is None:
                return tokens, walk.fault or "anything"
            choices = self.allowed(words)
            may_end = bool(set(self.ends) & set(choices.tolist()))
            if may_end and random.random() < 0.5:
                return tokens, "stop"
            choices = choices[~np.isin(choices, self.ends)]
            choices = choices[self._whole[choices]] if self._whole[choices].any() else choices
            if len(tokens) > _LONG and self._closing[choices].any():
                choices = choices[self._closing[choices]]
            if not len(choices):
                return tokens, "stop"
            tokens.append(int(random.choice(choices)))
            walk.took(tokens[-1])
        return tokens, "length"


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
