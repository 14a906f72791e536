"""Writes the evaluation data of the repository: held-out documents and fixed tasks.

``python -m flyray.cluster.demo.training.publish heldout.jsonl.xz FOLDER`` writes ``heldout.jsonl.xz`` (JSON lines
``{"source", "group", "text"}``) and ``tasks.jsonl`` (``{"family", "split", "messages", "tools", "answer", "prompt"}``).
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from .tasks import FAMILIES, Example, make_example
from .tasks.calling import FAMILY as TOOLS

SEED = 7
EACH = 40
UNSEEN_TOOLS = 60
LONGEST_PROMPT = 6_000  # characters


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(arguments.heldout, arguments.folder / "heldout.jsonl.xz")
    lines = "".join(line(example) + "\n" for example in fixed_examples())
    (arguments.folder / "tasks.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
