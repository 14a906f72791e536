"""Writes ``words.txt``: the commonest plain English words of the prose that WordNet knows.

``python -m flyray.cluster.demo.training.wordlist documents.jsonl.xz words.txt``
"""

# ruff: noqa: E501 (lists of words)

import argparse
import re
from collections import Counter
from pathlib import Path

from .corpus import read
from .pools import listed

COUNT = 3000
LEFT_OUT = frozenset(
    listed("""ass bastard bitch breast breasts damn dead die died dung fool fools god gods harlot hate hell idol idols jew
    jews kill killed murder naked nazi negro negroes prostitute rape raped savage savages sex sexual sin sins slave
    slaves slain slay slew virgin whore womb""")
)


def common_words(path: Path) -> list[str]:
    """The commonest words of three to ten letters that head a WordNet gloss, alphabetically."""
    known: set[str] = set()
    counts: Counter[str] = Counter()
    for document in read(path):
        if document.source == "wordnet":
            for line in document.text.splitlines():
                known.update(re.findall(r"(?<![\w-])[a-z]{3,10}(?![\w-])", line.split(":", 1)[0]))
        if document.group == "prose":
            counts.update(re.findall(r"\b[a-z]{3,10}\b", document.text))
    words = (word for word, _ in counts.most_common() if word in known and word not in LEFT_OUT)
    return sorted(word for word, _ in zip(words, range(COUNT), strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents", type=Path)
    parser.add_argument("words", type=Path)
    arguments = parser.parse_args()
    arguments.words.write_text("\n".join(common_words(arguments.documents)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
