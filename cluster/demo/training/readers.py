"""Turns a package's files into documents of plain text, one reader a kind of file."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

GLOSSES_A_DOCUMENT = 6
SKIPPED_TAGS = frozenset({"script", "style", "nav", "head", "footer", "header"})
BLOCK_TAGS = frozenset({"p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "br", "table", "ul"})


def plain(path: Path) -> Iterator[str]:
    """A text file is one document."""
    yield path.read_text(encoding="utf-8", errors="ignore")


def python(path: Path) -> Iterator[str]:
    """A module is one document; tests and generated tables are left out."""
    if not re.search(r"/(tests?|idlelib|lib2to3|encodings|site-packages|testing)/|test_|_pb2|/unicode", str(path)):
        yield path.read_text(encoding="utf-8", errors="ignore")


def wordnet(path: Path) -> Iterator[str]:
    """``data.noun`` and its like: the words of a synset and the gloss behind the bar."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
        if line.startswith("  ") or "|" not in line:
            continue
        fields, gloss = line.split("|", 1)
        words = fields.split()
        names = [words[4 + 2 * i].replace("_", " ") for i in range(int(words[3], 16))]
        lines.append(f"{', '.join(names)}: {gloss.strip()}")
    for start in range(0, len(lines), GLOSSES_A_DOCUMENT):
        yield "\n".join(lines[start : start + GLOSSES_A_DOCUMENT])


def factbook(path: Path) -> Iterator[str]:
    """A country: one line a fact, named by the headings above it."""

    def facts(node: object, name: str) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from facts(value, name if key == "text" else key)
        elif isinstance(node, str) and node.strip():
            yield f"{name}: {re.sub('<[^>]+>', ' ', node).strip()}"

    yield "\n".join(facts(json.loads(path.read_text(encoding="utf-8")), "country"))


def bible(path: Path) -> Iterator[str]:
    """Verses (id, book, chapter, verse, text) to one document a chapter."""
    rows = csv.reader(io.StringIO(gzip.decompress(path.read_bytes()).decode("utf-8", "ignore")))
    verses = [row for row in rows if len(row) >= 5 and row[1].isdigit()]
    for _, chapter in groupby(verses, key=lambda row: (row[1], row[2])):
        yield "\n".join(row[4] for row in chapter)


def rdata(path: Path) -> Iterator[str]:
    """An R lazy-load file: zlib blocks that hold serialized character vectors; long vectors are books."""
    raw, start = path.read_bytes(), 0
    while (start := raw.find(b"\x78", start)) >= 0:
        stream = zlib.decompressobj()
        try:
            block = stream.decompress(raw[start:])
        except zlib.error:
            start += 1
            continue
        start = len(raw) - len(stream.unused_data)
        lines = re.findall(rb"\x00\x04\x00\x09\x00\x00\x00.([\x09\x20-\x7e\x80-\xff]*)", block, re.DOTALL)
        yield from chapters([line.decode("utf-8", "ignore") for line in lines])


def chapters(lines: list[str]) -> Iterator[str]:
    """Cuts a book's lines at its chapter headings."""
    if len(lines) < 500:
        return
    chapter: list[str] = []
    for line in lines:
        if re.match(r"(?i)(chapter|letter|volume)\s+\w+\.?$", line.strip()):
            yield "\n".join(chapter)
            chapter = []
        chapter.append(line)
    yield "\n".join(chapter)


def dictd(path: Path) -> Iterator[str]:
    """A dictd dictionary: the index gives each entry's offset and length in base 64."""
    text = gzip.decompress(path.read_bytes())
    digits = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

    def number(code: str) -> int:
        value = 0
        for char in code:
            value = 64 * value + digits[char]
        return value

    index = path.with_name(path.name.removesuffix(".dict.dz") + ".index")
    spans = {tuple(map(number, line.split("\t")[1:3])) for line in index.read_text("utf-8", "ignore").splitlines()}
    for offset, length in sorted(spans):
        yield text[offset : offset + length].decode("utf-8", "ignore").strip()


def dialogue(path: Path) -> Iterator[str]:
    """Chatterbot's YAML: ``- - question`` and ``  - answer`` lines to one document a conversation."""
    for talk in re.split(r"\n- ", path.read_text(encoding="utf-8", errors="ignore").split("conversations:", 1)[-1]):
        lines = [line.strip().lstrip("- ").strip() for line in talk.splitlines()]
        yield "\n".join(line for line in lines if line)


class _Text(HTMLParser):
    """Collects a page's visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.skipping += tag in SKIPPED_TAGS
        if tag in BLOCK_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping = max(0, self.skipping - (tag in SKIPPED_TAGS))

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def html(path: Path) -> Iterator[str]:
    """A web page's visible text is one document."""
    page = _Text()
    page.feed(path.read_text(encoding="utf-8", errors="ignore"))
    yield re.sub(r"[ \t]*\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", "".join(page.parts)))


READERS = {
    reader.__name__: reader for reader in (plain, python, wordnet, factbook, bible, rdata, dictd, dialogue, html)
}
