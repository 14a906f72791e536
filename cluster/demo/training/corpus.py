"""Reads the fetched packages into one file of documents, and keeps some documents apart for scoring.

``python -m flyray.cluster.demo.training.corpus FETCHED FOLDER`` writes ``documents.jsonl.xz`` (training) and
``heldout.jsonl.xz`` (never trained on): JSON lines ``{"source", "group", "text"}``.
"""

import argparse
import hashlib
import json
import lzma
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .fetch import folder_of
from .readers import READERS
from .sources import SOURCES, Source

SHORTEST = 120
LONGEST = 12_000
HELDOUT_SHARE = 40  # one document in so many
HELDOUT_CHARACTERS = 48_000  # kept of each source
HELDOUT_LONGEST = 6_000


@dataclass(frozen=True)
class Document:
    """A piece of text and where it comes from."""

    source: str
    group: str
    text: str


def is_heldout(text: str) -> bool:
    """Whether a document belongs to the held-out share, by a hash of its beginning."""
    digest = hashlib.md5(text[:200].encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0


def files_of(root: Path, source: Source) -> list[Path]:
    """The source's files in a fixed order, shuffled by name so that a limit takes a fair share."""
    folder = Path(sysconfig.get_paths()["stdlib"]) if source.client == "stdlib" else folder_of(root, source)
    files = (path for path in folder.glob(source.files) if path.is_file())
    return sorted(files, key=lambda path: hashlib.md5(str(path.relative_to(folder)).encode()).digest())


def documents_of(root: Path, source: Source) -> Iterator[Document]:
    """A source's documents, none twice, none too short, up to the source's limit."""
    seen: set[bytes] = set()
    total = 0
    for path in files_of(root, source):
        for whole in READERS[source.reader](path):
            for start in range(0, len(whole), LONGEST):
                text = whole[start : start + LONGEST].strip()
                key = hashlib.md5(text.encode("utf-8", "ignore")).digest()
                if len(text) < SHORTEST or key in seen or total >= source.limit:
                    continue
                seen.add(key)
                total += len(text)
                yield Document(source.name, source.group, text)


def write(path: Path, documents: list[Document]) -> None:
    """Writes JSON lines, compressed."""
    with lzma.open(path, "wt", encoding="utf-8", preset=6) as file:
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")


def read(path: Path) -> Iterator[Document]:
    """Reads what :func:`write` wrote."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield Document(**json.loads(line))


def build(fetched: Path, folder: Path) -> None:
    """Reads every source and writes the two files."""
    folder.mkdir(parents=True, exist_ok=True)
    training: list[Document] = []
    heldout: list[Document] = []
    for source in SOURCES:
        kept = trained = 0
        for document in documents_of(fetched, source):
            if not is_heldout(document.text):
                training.append(document)
                trained += len(document.text)
            elif kept < HELDOUT_CHARACTERS:
                heldout.append(Document(document.source, document.group, document.text[:HELDOUT_LONGEST]))
                kept += len(heldout[-1].text)
        print(f"{source.name}: {trained / 1e6:.2f} M characters to train on, {kept / 1e3:.0f} k held out", flush=True)
    write(folder / "documents.jsonl.xz", training)
    write(folder / "heldout.jsonl.xz", heldout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fetched", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    build(arguments.fetched, arguments.folder)


if __name__ == "__main__":
    main()
