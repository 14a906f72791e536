"""Text to token ids and back: Kimi's tiktoken vocabulary with its special tokens.

What a user types never becomes a special token: `encode` without `allow_special` knows none, and `encode_prompt` takes
special tokens only from the pieces that a template wrote itself.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from ..actors.vocabulary import TokenizerError, Vocabulary

__all__ = ["Detokenizer", "Piece", "Tokenizer", "TokenizerError"]

# Kimi's split pattern (tokenization_kimi.py of the published checkpoint); a tokenizer_config.json may carry its own
# as "pat_str". `&&[^\p{Han}]` is a class intersection: Han characters belong to the first alternative alone.
_LETTERS_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LETTERS_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UPPER}*{_LETTERS_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UPPER}+{_LETTERS_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# tiktoken's regular expressions overflow on very long runs; Kimi's tokenizer cuts text at these lengths, and the ids
# of a long text depend on where it is cut, so the same lengths are used here.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000


@dataclass(frozen=True)
class Piece:
    """A part of a prompt. literal: written by the template, so special tokens in it are meant as such."""

    text: str
    literal: bool


class Tokenizer:
    """The tokenizer of a checkpoint folder: `tiktoken.model` and `tokenizer_config.json`.

    special: name to id of every added token, "<think>" and "</think>" included.
    hidden: ids that leave no text when decoded (those marked "special" in tokenizer_config.json).
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        vocabulary = Vocabulary.read(self.folder)
        self.special, self.hidden = vocabulary.special, vocabulary.hidden
        self._encoding = tiktoken.Encoding(
            name=self.folder.name,
            pat_str=vocabulary.pattern or KIMI_PATTERN,
            mergeable_ranks=vocabulary.ranks,
            special_tokens=self.special,
        )
        self._bytes: dict[int, bytes] = {rank: token for token, rank in vocabulary.ranks.items()}
        self._names = {token: name for name, token in self.special.items()}
        by_length = sorted(self.special, key=len, reverse=True)
        self._markers = re.compile("(" + "|".join(re.escape(name) for name in by_length) + ")")

    @property
    def base_size(self) -> int:
        """Ids below this are ordinary text; those from it on are special or reserved."""
        return len(self._bytes)

    @property
    def size(self) -> int:
        """One more than the last id: the vocabulary, the special tokens, and the unnamed ids between them."""
        return max(self.special.values()) + 1

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """Ids of `text`. allow_special: "<|im_end|>" and the like become special tokens instead of ordinary text."""
        return self.encode_prompt([Piece(text, literal=allow_special)])

    def encode_prompt(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of a prompt in pieces. Text that adjoins over a border of pieces is encoded as one run."""
        ids: list[int] = []
        run: list[str] = []
        for piece in pieces:
            if not piece.literal:
                run.append(piece.text)
                continue
            for index, part in enumerate(self._markers.split(piece.text)):
                if index % 2 == 0:
                    run.append(part)
                    continue
                ids += self._encode_text("".join(run))
                run.clear()
                ids.append(self.special[part])
        return ids + self._encode_text("".join(run))

    def decode(self, ids: Sequence[int], named: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Hidden special tokens are left out, or `named`."""
        names = self._names if named else {}
        pieces = [names[token].encode() if token in names else self.token_bytes(token) for token in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The text bytes of one token: empty for hidden and for reserved, unnamed ids.

        Raises ValueError for a negative id.
        """
        if token < 0:
            raise ValueError(f"token id {token} is negative")
        if token in self._bytes:
            return self._bytes[token]
        if token in self.hidden or token not in self._names:
            return b""
        return self._names[token].encode()

    def token_name(self, token: int) -> str:
        """The written form of one token, special tokens by name."""
        return self._names.get(token) or self.token_bytes(token).decode("utf-8", errors="replace")

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = []
        for part in _split_long(text):
            ids += self._encoding.encode_ordinary(part)
        return ids


class Detokenizer:
    """Text of a stream of tokens. A character is given only when all its bytes have come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """The end: bytes of an incomplete character become one U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _split_long(text: str) -> Iterator[str]:
    """Cuts at 400,000 characters, and inside runs of more than 25,000 characters that are all space or all not."""
    for begin in range(0, len(text), _MAX_CHARS):
        chunk = text[begin : begin + _MAX_CHARS]
        if len(chunk) <= _MAX_RUN:
            yield chunk
            continue
        start, run, space = 0, 0, chunk[0].isspace()
        for index, char in enumerate(chunk):
            if char.isspace() != space:
                run, space = 1, not space
                continue
            run += 1
            if run > _MAX_RUN:
                yield chunk[start:index]
                start, run = index, 1
        yield chunk[start:]
