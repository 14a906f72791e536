"""The model's vocabulary as tiktoken reads it: ``tiktoken.model`` and ``tokenizer_config.json``."""

import base64
import json
from functools import cached_property
from pathlib import Path

import tiktoken

SPECIAL = (
    "[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|im_middle|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>", "<think>",
    "</think>", "[PAD]",
)  # fmt: skip
SIZE = 4096
PLAIN = SIZE - len(SPECIAL)  # tokens of text
ID = {text: PLAIN + index for index, text in enumerate(SPECIAL)}
BOS, EOS, IM_END, PAD, MEDIA_PAD = ID["[BOS]"], ID["[EOS]"], ID["<|im_end|>"], ID["[PAD]"], ID["<|media_pad|>"]
NOT_SPECIAL = ("<think>", "</think>")  # kept when special tokens are skipped
# Kimi's split: runs of Han; words with one leading mark and contractions; up to three digits; marks; line ends; spaces.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join((
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))  # fmt: skip


class Vocabulary:
    """Text to token ids and back."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "tiktoken.model").read_bytes().splitlines()
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        special = {token["content"]: int(number) for number, token in config["added_tokens_decoder"].items()}
        self.coding = tiktoken.Encoding(
            "nano", pat_str=config["pat_str"], mergeable_ranks=self.ranks, special_tokens=special
        )

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text become themselves."""
        return self.coding.encode(text, allowed_special="all")

    def letters(self, text: str) -> list[int]:
        """Token ids of a text written byte by byte, one token a letter."""
        return [self.ranks[bytes([byte])] for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.coding.decode(ids)

    @cached_property
    def byte_lengths(self) -> list[int]:
        """How many bytes each token stands for; special tokens none."""
        return [len(token) for token in sorted(self.ranks, key=self.ranks.__getitem__)] + [0] * len(SPECIAL)


def write(folder: Path, tokens: list[bytes], longest: int) -> None:
    """Writes the two files; ``longest`` is the model's context."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(ID[text]): {"content": text, "special": text not in NOT_SPECIAL, **flags} for text in SPECIAL
    }  # Kimi marks its thinking tokens as not special
    config = {
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "model_max_length": longest,
        "pat_str": PATTERN,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
