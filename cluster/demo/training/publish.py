"""Writes the evaluation data of the repository: held-out documents and fixed tasks.

``python -m flyray.cluster.demo.training.publish heldout.jsonl.xz FOLDER`` writes ``heldout.jsonl.xz`` to score and
``calibration.jsonl.xz`` to calibrate with (JSON lines ``{"source", "group", "text"}``, no document in both), and
``tasks.jsonl`` (``{"family", "split", "messages", "tools", "answer", "prompt"}``).
"""

import argparse
import io
import json
import lzma
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .tasks import FAMILIES, Example, make_example
from .tasks.calling import FAMILY as TOOLS

SEED = 7
EACH = 40
UNSEEN_TOOLS = 60
LONGEST_PROMPT = 6_000  # characters
# Of each source's held-out documents the last are for calibration: as many as give 12 kB, but never its first three.
CALIBRATION_BYTES = 12_000
SCORED_AT_LEAST = 3


def short_example(rng: random.Random, family: str, split: str) -> Example:
    """An example whose prompt is not too long for a small file."""
    while True:
        example = make_example(rng, family, split)
        if len(example.prompt) <= LONGEST_PROMPT:
            return example


def fixed_examples() -> Iterator[Example]:
    """The examples of the file, always the same."""
    rng = random.Random(SEED)
    for family in FAMILIES:
        for split in ("operands", "phrasings"):
            yield from (short_example(rng, family, split) for _ in range(EACH))
    yield from (short_example(rng, TOOLS, "tools") for _ in range(UNSEEN_TOOLS))


def line(example: Example) -> str:
    """An example as a line of JSON; ``answer`` is the content expected, or a list of calls (name, arguments)."""
    row = {
        "family": example.family,
        "split": example.split,
        "messages": example.messages,
        "tools": example.tools,
        "answer": example.expected,
        "prompt": example.prompt,
    }
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def parted(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """Held-out documents to score, and those to calibrate with, in their order."""
    lines = list(lines)
    sources: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        sources[json.loads(line)["source"]].append(line)
    chosen = set[str]()
    for documents in sources.values():
        size = 0
        for line in reversed(documents[SCORED_AT_LEAST:]):
            if size >= CALIBRATION_BYTES:
                break
            chosen.add(line)
            size += len(line.encode())
    return [line for line in lines if line not in chosen], [line for line in lines if line in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    parts = parted(io.StringIO(lzma.decompress(arguments.heldout.read_bytes()).decode()))
    for name, documents in zip(("heldout", "calibration"), parts, strict=True):
        packed = lzma.compress("".join(documents).encode(), preset=9)
        (arguments.folder / f"{name}.jsonl.xz").write_bytes(packed)
    lines = "".join(line(example) + "\n" for example in fixed_examples())
    (arguments.folder / "tasks.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
