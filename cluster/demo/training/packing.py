"""Documents and tasks as rows of token ids.

A corpus file holds one stream of 16-bit ids a group of texts, each document ended by ``[EOS]``; a task row holds whole
examples, each ended by ``[EOS]``, with the ids that are learned marked by the highest bit.
"""

import json
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .corpus import Document
from .sources import GROUPS
from .tasks import Example, training_example
from .vocabulary import EOS, PAD, Vocabulary

LEARNED = 0x8000
TEST = "_test"


def encode_documents(documents: Iterable[Document], vocabulary: Vocabulary, seed: int) -> dict[str, np.ndarray]:
    """One stream of ids a group, its documents in a random order."""
    streams: dict[str, list[np.ndarray]] = {group: [] for group in GROUPS}
    for document in documents:
        ids = vocabulary.coding.encode_ordinary(document.text)
        streams[document.group].append(np.array([*ids, EOS], np.uint16))
    rng = random.Random(seed)
    for parts in streams.values():
        rng.shuffle(parts)
    return {group: np.concatenate(parts) for group, parts in streams.items() if parts}


def write_corpus(path: Path, streams: dict[str, np.ndarray]) -> None:
    """A line of JSON with the lengths, then the ids, all compressed."""
    with lzma.open(path, "wb", preset=1) as file:
        file.write(json.dumps({name: len(ids) for name, ids in streams.items()}).encode() + b"\n")
        for ids in streams.values():
            file.write(ids.astype("<u2").tobytes())


def read_corpus(path: Path) -> dict[str, np.ndarray]:
    """What :func:`write_corpus` wrote."""
    with lzma.open(path, "rb") as file:
        lengths = json.loads(file.readline())
        return {name: np.frombuffer(file.read(2 * length), dtype="<u2") for name, length in lengths.items()}


def encode_example(example: Example, vocabulary: Vocabulary) -> np.ndarray:
    """An example's ids ``[n] uint16``; those of its completion carry the mark :data:`LEARNED`."""
    prompt = vocabulary.encode(example.prompt)
    if example.by_letters:
        lead, answer = example.completion.removesuffix("<|im_end|>").removesuffix(example.answer), example.answer
        completion = [*vocabulary.encode(lead), *vocabulary.letters(answer), *vocabulary.encode("<|im_end|>")]
    else:
        completion = vocabulary.encode(example.completion)
    ids = np.array([*prompt, *completion, EOS], np.uint16)
    ids[len(prompt) : -1] |= LEARNED
    return ids


def pack_rows(rng: random.Random, vocabulary: Vocabulary, length: int, longest_recall: int) -> Iterator[np.ndarray]:
    """Endless rows ``[length + 1] uint16`` of fresh training examples, filled with ``[PAD]``."""
    row = np.full(length + 1, PAD, np.uint16)
    used = 0
    while True:
        ids = encode_example(training_example(rng, longest_recall), vocabulary)
        if len(ids) > length:
            continue
        if used + len(ids) > length + 1:
            yield row
            row = np.full(length + 1, PAD, np.uint16)
            used = 0
        row[used : used + len(ids)] = ids
        used += len(ids)
