"""Writes the model card's tables: ``python -m flyray.cluster.demo.training.card scores.json``."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COLUMNS = ("operands", "phrasings", "tools", "operands/instant")


def cell(row: Mapping[str, Any] | None) -> str:
    """A share with its interval."""
    return f"{row['percent']:g} ({row['low']:g}–{row['high']:g}), {row['total']}" if row else ""


def task_table(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One line a family."""
    yield "| family | held-out operands | held-out phrasings | unseen tools | held-out operands, instant |"
    yield "|---|---|---|---|---|"
    for family in dict.fromkeys(name.split("/")[0] for name in tasks):
        cells = (cell(tasks.get(f"{family}/{column}")) for column in COLUMNS)
        yield f"| {family} | " + " | ".join(cells) + " |"


def text_table(text: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """One line a length of rows and group of texts."""
    yield "| held-out text | bits a byte | perplexity a token | tokens |"
    yield "|---|---|---|---|"
    for rows, groups in text.items():
        for group, row in groups.items():
            yield f"| {group}, {rows} | {row['bits_per_byte']:.3f} | {row['perplexity']:.2f} | {row['tokens']} |"


def load_table(load: Mapping[str, list[float]]) -> Iterator[str]:
    """The highest and lowest load of an expert over the mean, a column a layer."""
    yield "| layer | " + " | ".join(str(layer) for layer in range(1, len(load["highest"]) + 1)) + " |"
    yield "|---" * (len(load["highest"]) + 1) + "|"
    for name, values in load.items():
        yield f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |"


def tables(scores: Mapping[str, Any]) -> str:
    """All tables."""
    parts = (task_table(scores["tasks"]), text_table(scores["text"]), load_table(scores["expert_load"]))
    return "\n\n".join("\n".join(part) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scores", type=Path)
    print(tables(json.loads(parser.parse_args().scores.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
