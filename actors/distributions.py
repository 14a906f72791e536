"""Next-token distributions of a scored prompt: kept in a file, or compared with those that were kept.

A file belongs to one prompt of n tokens: log probabilities [n - 1, V] little-endian float32, row i those of token
i + 1, without a header. Slices write and read their own rows, so a prompt may be cut into steps in any way.
Both sides of a comparison are such rounded rows: a distribution compared with itself has a divergence of exactly 0.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .step_batch import Scored

_BYTES = 4


class DistributionError(Exception):
    """A file of distributions cannot be written, or is not what the prompt needs; the message names the file."""


@dataclass(frozen=True)
class Comparison:
    """Of each row: divergences, KL(kept ‖ found) in nats, and whether both give the same token most probability."""

    divergences: tuple[float, ...]
    agreements: tuple[bool, ...]


class SliceDistributions:
    """Keeps and compares the distributions of one slice, some rows at a time.

    wanted: whether there is anything to do. error: what went wrong with a file; nothing more is done then. divergences,
    agreements: of all rows so far, none after an error.
    """

    def __init__(self, scored: Scored, vocab_size: int) -> None:
        self.wanted = bool(scored.keep or scored.compare)
        self.error = ""
        self.divergences: list[float] = []
        self.agreements: list[bool] = []
        self._keep = KeptDistributions(scored.keep, vocab_size) if scored.keep else None
        self._compare = KeptDistributions(scored.compare, vocab_size) if scored.compare else None
        self._next, self._last = scored.start, scored.last

    def take(self, logits: Tensor) -> None:
        """The next rows' logits [S, V] float."""
        if not self.wanted or self.error:
            return
        found = log_distributions(logits.cpu())
        try:
            if self._keep is not None:
                self._keep.write(self._next, found)
            if self._compare is not None:
                result = compare(self._compare.read(self._next, len(found)), found)
                self.divergences += result.divergences
                self.agreements += result.agreements
        except DistributionError as error:
            self._fail(error)
        self._next += len(found)

    def end(self) -> None:
        """After the slice's last rows; at the prompt's end the files must end too."""
        if self.error or not self._last:
            return
        try:
            if self._keep is not None and self._next == 0:  # one token, nothing to predict
                self._keep.write(0, torch.empty(0))
            if self._compare is not None:
                self._compare.check_end(self._next)
        except DistributionError as error:
            self._fail(error)

    def _fail(self, error: DistributionError) -> None:
        self.error = str(error)
        self.divergences.clear()
        self.agreements.clear()


class KeptDistributions:
    """One prompt's file, of rows of `vocab_size`."""

    def __init__(self, path: str, vocab_size: int) -> None:
        self._path, self._row_bytes = path, vocab_size * _BYTES
        self._vocab_size = vocab_size

    def write(self, first: int, logprobs: Tensor) -> None:
        """Writes rows first.. of logprobs [rows, V] float32; row 0 begins the file anew. Raises DistributionError."""
        flags = os.O_WRONLY | (os.O_CREAT | os.O_TRUNC if first == 0 else 0)
        data = memoryview(logprobs.numpy().astype("<f4", copy=False).tobytes())
        try:
            descriptor = os.open(self._path, flags, 0o644)
            try:
                done = 0
                while done < len(data):
                    done += os.pwrite(descriptor, data[done:], first * self._row_bytes + done)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DistributionError(f"{self._path}: distributions cannot be kept: {error.strerror}") from error

    def read(self, first: int, rows: int) -> Tensor:
        """Rows first.. -> [rows, V] float32. Raises DistributionError."""
        count = rows * self._vocab_size
        try:
            with open(self._path, "rb") as stream:
                data = np.fromfile(stream, "<f4", count, offset=first * self._row_bytes)
                found = os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise self._unreadable(error) from error
        if data.size != count:
            raise self._wrong_size(found, first + rows, "at least ")
        return torch.from_numpy(data.astype(np.float32, copy=False)).view(rows, self._vocab_size)

    def check_end(self, rows: int) -> None:
        """Raises DistributionError unless the file holds exactly so many rows."""
        try:
            found = os.stat(self._path).st_size
        except OSError as error:
            raise self._unreadable(error) from error
        if found != rows * self._row_bytes:
            raise self._wrong_size(found, rows, "")

    def _unreadable(self, error: OSError) -> DistributionError:
        return DistributionError(f"{self._path}: kept distributions cannot be read: {error.strerror}")

    def _wrong_size(self, found: int, rows: int, least: str) -> DistributionError:
        return DistributionError(
            f"{self._path}: holds {found} bytes of kept distributions, {least}{rows * self._row_bytes} are needed for "
            f"{rows} positions of {self._vocab_size} tokens; keep those of this very prompt and model"
        )


def log_distributions(logits: Tensor) -> Tensor:
    """logits [S, V] float -> log probabilities [S, V] float32, rounded once from float64."""
    return logits.double().log_softmax(dim=-1).float()


def compare(kept: Tensor, found: Tensor) -> Comparison:
    """kept and found [S, V] float32 log probabilities; sums in float64."""
    before = kept.double()
    divergences = (before.exp() * (before - found.double())).sum(dim=-1)
    return Comparison(tuple(divergences.tolist()), tuple((kept.argmax(-1) == found.argmax(-1)).tolist()))
