"""Scores a model: bits a byte of held-out text, exact match of held-out tasks, the hand-written probes.

``python -m flyray.cluster.demo.training.score MODEL corpus.xz OUT.json`` scores a checkpoint, on a GPU if there is one.
"""

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import chat
from .attention import packed_attention
from .generate import answers
from .load import load
from .model import Model
from .packing import TEST, read_corpus
from .probes import PROBES
from .sources import GROUPS
from .tasks import FAMILIES, Example, make_example
from .tasks.calling import FAMILY as TOOLS
from .vocabulary import EOS, Vocabulary

SEED = 2026
INSTANT_FAMILIES = ("lookup", "json", "tool", "memory", "chat", "fact")
SLACK = 40  # tokens an answer may be longer than the expected one
LONGEST_PROMPT = 4096 - 600
ROWS = (1024, 4096)  # lengths of the rows of held-out text


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def scored_examples(count: int, tool_count: int) -> list[Example]:
    """The examples of every family and split from one seed, and instant ones of the easy families."""
    rng = random.Random(SEED)
    examples: list[Example] = []
    for family in FAMILIES:
        for split in ("operands", "phrasings"):
            examples += [make_example(rng, family, split) for _ in range(count)]
    examples += [make_example(rng, TOOLS, "tools") for _ in range(tool_count)]
    for family in INSTANT_FAMILIES:
        examples += [make_example(rng, family, "operands", thinking=False) for _ in range(count // 2)]
    return examples


def cell_of(example: Example) -> str:
    """The table's cell an example counts in."""
    return f"{example.family}/{example.split}" + ("" if example.thinking else "/instant")


def is_right(example: Example, written: str) -> bool:
    """Whether what follows the thought is the expected content and calls."""
    said = written.split(chat.THINK_END, 1)[-1] if example.thinking else written
    return said == example.answer + chat.calls_text(example.calls)


def score_tasks(model: Model, vocabulary: Vocabulary, examples: Iterable[Example], device: str) -> dict[str, Any]:
    """Right and total of each cell, and some wrong answers."""
    examples = [e for e in examples if len(e.prompt) < 4 * LONGEST_PROMPT]
    prompts = [vocabulary.encode(example.prompt) for example in examples]
    longest = [len(vocabulary.encode(example.completion)) + len(example.answer) + SLACK for example in examples]
    kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= LONGEST_PROMPT]
    found = answers(model, [prompts[i] for i in kept], [longest[i] for i in kept], device)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    wrong: list[dict[str, str]] = []
    for index, ids in zip(kept, found, strict=True):
        example, written = examples[index], vocabulary.decode(ids)
        right = is_right(example, written)
        counts[cell_of(example)][0] += right
        counts[cell_of(example)][1] += 1
        if not right:
            wrong.append(
                {
                    "cell": cell_of(example),
                    "prompt": example.prompt[-700:],
                    "expected": example.completion[-300:],
                    "written": written[-300:],
                }
            )
    return {"cells": {cell: tuple(count) for cell, count in counts.items()}, "wrong": wrong}


def score_probes(model: Model, vocabulary: Vocabulary, device: str) -> dict[str, Any]:
    """The hand-written questions."""
    prompts = [vocabulary.encode(chat.render([{"role": "user", "content": question}])) for question, _ in PROBES]
    found = answers(model, prompts, [200] * len(prompts), device)
    rows = []
    for (question, expected), ids in zip(PROBES, found, strict=True):
        said = vocabulary.decode(ids).split(chat.THINK_END, 1)[-1]
        rows.append({"question": question, "expected": expected, "said": said, "right": said == expected})
    return {"right": sum(row["right"] for row in rows), "total": len(rows), "rows": rows}


@torch.no_grad()
def score_text(
    model: Model, vocabulary: Vocabulary, streams: Mapping[str, np.ndarray], length: int, device: str
) -> dict[str, Any]:
    """Bits a byte and perplexity a token of the held-out text, documents isolated, in rows of ``length``."""
    model.eval()
    lengths = torch.tensor(vocabulary.byte_lengths, device=device)
    result = {}
    for group in GROUPS:
        nats = count = size = 0.0
        stream = streams[group + TEST].astype(np.int64)
        for start in range(0, len(stream) - length, length):
            ids = torch.from_numpy(stream[start : start + length + 1]).to(device)
            losses = model(
                ids[:-1],
                torch.arange(length, device=device),
                packed_attention(ids[:-1], length),
                ids[1:],
                torch.ones(length, device=device),
            )[1]
            inside = (ids[1:] != EOS) & (ids[:-1] != EOS)
            nats += losses[inside].sum().item()
            count += inside.sum().item()
            size += lengths[ids[1:][inside]].sum().item()
        result[group] = {
            "bits_per_byte": round(nats / math.log(2) / size, 4),
            "perplexity": round(math.exp(nats / count), 3),
            "tokens": int(count),
            "bytes": int(size),
        }
    model.train()
    return result


def table(cells: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Shares with their intervals."""
    rows = {}
    for cell, (right, total) in sorted(cells.items()):
        low, high = wilson(right, total)
        rows[cell] = {
            "right": right,
            "total": total,
            "percent": round(100 * right / total, 1),
            "low": round(100 * low, 1),
            "high": round(100 * high, 1),
        }
    return rows


def write(path: Path, value: object) -> None:
    """Writes JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def report(
    model: Model, vocabulary: Vocabulary, streams: Mapping[str, np.ndarray], counts: tuple[int, int], device: str
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """All scores, and the wrong answers; ``counts`` are the examples of a family and split, and of unseen tools."""
    text = {f"rows of {n}": score_text(model, vocabulary, streams, n, device) for n in ROWS}
    tasks = score_tasks(model, vocabulary, scored_examples(*counts), device)
    probes = score_probes(model, vocabulary, device)
    return {"text": text, "tasks": table(tasks["cells"]), "probes": probes}, tasks["wrong"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "corpus", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--scored", type=int, default=100, help="examples of each family and split")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, vocabulary = load(given.model).to(device), Vocabulary(given.model)
    scores, wrong = report(model, vocabulary, read_corpus(given.corpus), (given.scored, 2 * given.scored), device)
    write(given.out, scores | {"wrong": wrong})
    for name, row in scores["tasks"].items():
        print(f"{name:28s} {row['right']}/{row['total']}  {row['low']}-{row['high']}")
    print("probes", scores["probes"]["right"], scores["probes"]["total"], scores["text"])


if __name__ == "__main__":
    main()
