"""Tokenizes the documents: ``python -m flyray.cluster.demo.training.prepare CORPUS TOKENIZER corpus.xz``."""

import argparse
from pathlib import Path

from .corpus import read
from .packing import TEST, encode_documents, write_corpus
from .vocabulary import Vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    vocabulary = Vocabulary(arguments.tokenizer)
    streams = encode_documents(read(arguments.corpus / "documents.jsonl.xz"), vocabulary, seed=0)
    heldout = encode_documents(read(arguments.corpus / "heldout.jsonl.xz"), vocabulary, seed=0)
    streams |= {name + TEST: ids for name, ids in heldout.items()}
    print({name: len(ids) for name, ids in streams.items()})
    write_corpus(arguments.output, streams)


if __name__ == "__main__":
    main()
