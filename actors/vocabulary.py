"""The tokens of a checkpoint, as its folder lists them: Kimi's `tiktoken.model` and `tokenizer_config.json`."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path


class TokenizerError(ValueError):
    """The tokenizer's files are missing or malformed; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Vocabulary:
    """ranks: the bytes of every ordinary token, and its id. special: name to id of every added token. hidden: ids of
    those that leave no text (marked "special"). pattern: how text is split, "" where the folder does not say."""

    ranks: dict[bytes, int]
    special: dict[str, int]
    hidden: frozenset[int]
    pattern: str

    @staticmethod
    def read(folder: Path) -> Vocabulary:
        """Raises TokenizerError."""
        ranks = _read_ranks(folder / "tiktoken.model")
        config = _read_config(folder / "tokenizer_config.json")
        special, hidden = _special_tokens(config, folder / "tokenizer_config.json", len(ranks))
        return Vocabulary(ranks, special, hidden, config.get("pat_str", ""))


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Reads lines of "base64 rank". Not through tiktoken's loader: it keeps a copy by path that would go stale."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot read the tokenizer's vocabulary ({error.strerror})") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise TokenizerError(f"{path}:{number}: expected 'base64 rank', found {line[:60]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: ranks must be 0..{len(ranks) - 1}, each once")
    return ranks


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path}: cannot read the tokenizer's configuration ({error.strerror})") from error
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: expected a JSON object")
    return config


def _special_tokens(config: dict, path: Path, base_size: int) -> tuple[dict[str, int], frozenset[int]]:
    added = config.get("added_tokens_decoder")
    if not isinstance(added, dict) or not added:
        raise TokenizerError(f"{path}: 'added_tokens_decoder' must list the special tokens by id")
    special: dict[str, int] = {}
    hidden: set[int] = set()
    for key, entry in added.items():
        where = f"{path}: added_tokens_decoder[{key!r}]"
        if not str(key).isdigit() or int(key) < base_size:
            raise TokenizerError(f"{where}: the id must be a number from {base_size} on, after the vocabulary")
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
            raise TokenizerError(f"{where}: 'content' must be the token's text")
        if entry["content"] in special:
            raise TokenizerError(f"{where}: {entry['content']!r} is listed twice")
        special[entry["content"]] = int(key)
        if entry.get("special", True):
            hidden.add(int(key))
    return special, frozenset(hidden)
