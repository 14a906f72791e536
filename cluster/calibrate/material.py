"""The text that a model is calibrated with, as windows of tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..evaluate.perplexity import Document, TextError, TokenBytes, read_documents

Window = tuple[int, ...]


def read_windows(path: Path, tokenizer: TokenBytes, length: int, tokens: int) -> list[Window]:
    """Windows of a file's documents (see `read_documents`), of at most `length` tokens each and `tokens` in all, 0 for
    all of the text. Sources take turns, so that little text has all kinds in it. Raises TextError."""
    windows = list(cut(tokenizer, read_documents(path), length, tokens))
    if not windows:
        raise TextError(f"{path} holds no text to calibrate with")
    return windows


def cut(tokenizer: TokenBytes, documents: Iterable[Document], length: int, tokens: int) -> Iterator[Window]:
    """Windows of documents, one of each source in turns; the last is cut to make `tokens` in all (0: no limit)."""
    if length < 1 or tokens < 0:
        raise ValueError(f"windows of {length} tokens, {tokens} in all, cannot be cut")
    queues: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        queues[document.source].append(document)
    sources = [_windows(tokenizer, queue, length) for queue in queues.values()]
    left = tokens
    while sources:
        for source in list(sources):
            window = next(source, None)
            if window is None:
                sources.remove(source)
                continue
            if tokens:
                window = window[:left]
                left -= len(window)
            yield window
            if tokens and not left:
                return


def _windows(tokenizer: TokenBytes, documents: list[Document], length: int) -> Iterator[Window]:
    """All windows of one source's documents; none holds tokens of two documents."""
    for document in documents:
        ids = tokenizer.encode(document.text, allow_special=False)
        for begin in range(0, len(ids), length):
            yield tuple(ids[begin : begin + length])
