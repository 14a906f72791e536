"""Trains the byte-pair vocabulary: Kimi's split, digits never merged, on text and tasks.

``python -m flyray.cluster.demo.training.tokenizer documents.jsonl.xz FOLDER`` writes ``tiktoken.model`` and
``tokenizer_config.json``.
"""

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from . import vocabulary
from .corpus import Document, read
from .tasks import training_example

CHARACTERS = {"prose": 5_000_000, "docs": 2_000_000, "code": 2_000_000}
LONGEST_SAMPLE = 5_000
TASKS = 15_000
CONTEXT = 4096
RECALL_ENTRIES = 40


def text_sample(documents: list[Document], rng: random.Random) -> Iterator[str]:
    """Beginnings of random documents, so many characters a group."""
    left = dict(CHARACTERS)
    for document in rng.sample(documents, len(documents)):
        if left[document.group] > 0:
            text = document.text[:LONGEST_SAMPLE]
            left[document.group] -= len(text)
            yield text


def task_sample(rng: random.Random) -> Iterator[str]:
    """Tasks without their special tokens."""
    special = re.compile("|".join(map(re.escape, vocabulary.SPECIAL)))
    for _ in range(TASKS):
        example = training_example(rng, RECALL_ENTRIES)
        yield from filter(None, special.split(example.prompt + example.completion))


def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + index): byte for index, byte in enumerate(rest)}


def token_at(tokenizer: Tokenizer, rank: int) -> str:
    """A trained token; raises ValueError if the samples gave too few."""
    token = tokenizer.id_to_token(rank)
    if token is None:
        raise ValueError(
            f"the samples gave {tokenizer.get_vocab_size()} of {vocabulary.PLAIN} tokens: more text is needed"
        )
    return token


def train(samples: Iterator[str]) -> list[bytes]:
    """The tokens in the order of their ranks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
        pre_tokenizers.Split(Regex(vocabulary.PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        samples, trainers.BpeTrainer(vocab_size=vocabulary.PLAIN, initial_alphabet=alphabet, show_progress=False)
    )
    table = byte_of_character()
    return [bytes(table[char] for char in token_at(tokenizer, rank)) for rank in range(vocabulary.PLAIN)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(0)
    samples = [*text_sample(list(read(arguments.documents)), rng), *task_sample(rng)]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    vocabulary.write(arguments.folder, train(iter(samples)), CONTEXT)


if __name__ == "__main__":
    main()
