"""Next-token distributions that one column keeps on disk for the others to be compared with.

A file a window: float32 log probabilities [tokens - 1, vocabulary], written and read by the engines' shards. They are
as large as they sound (4 bytes times the vocabulary a token), so the room is checked before anything starts, and the
folder is gone when the evaluation is, however it ended.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..scratch_folder import scratch_folder

BYTES_A_VALUE = 4
FOLDER = "distributions-"


class SpaceError(ValueError):
    """The disk cannot hold the distributions; the message has the numbers and what to do."""


@dataclass(frozen=True)
class WindowUse:
    """Paths for `Generate`; one of them is empty."""

    keep: str
    compare: str


class Shelf:
    """The files of one reference column: windows are kept in any order, and may be compared with once they are."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._kept: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)

    def path(self, number: int) -> str:
        """The file of a window."""
        return str(self._folder / f"{number}.f32")

    def finish(self, number: int) -> None:
        """The window's file is whole."""
        self._kept[number].set()

    async def kept(self, number: int) -> None:
        """Returns when the window's file is whole."""
        await self._kept[number].wait()


@dataclass(frozen=True)
class Distributions:
    """A column's use of a shelf: it fills it, or compares with it, a window as soon as that is there."""

    shelf: Shelf
    fills: bool

    @asynccontextmanager
    async def window(self, number: int) -> AsyncIterator[WindowUse]:
        """In the context the engine scores the window with these paths."""
        path = self.shelf.path(number)
        if self.fills:
            yield WindowUse(keep=path, compare="")
            self.shelf.finish(number)
        else:
            await self.shelf.kept(number)
            yield WindowUse(keep="", compare=path)


def needed_bytes(windows: Sequence[Sequence[int]], vocabulary: int) -> int:
    """Bytes of the distributions of windows of tokens."""
    return sum(len(window) - 1 for window in windows) * vocabulary * BYTES_A_VALUE


@contextmanager
def distributions_folder(work_dir: Path, needed: int) -> Iterator[Path]:
    """A folder in work_dir with room for `needed` bytes, removed with the context; also what killed runs left there.

    Its path is absolute, as shards need it. Raises SpaceError with the numbers.
    """
    with scratch_folder(work_dir.resolve(), FOLDER) as folder:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise SpaceError(
                f"{folder.parent}: comparing distributions needs {needed / 1e9:.2f} GB there for the while, "
                f"{free / 1e9:.2f} GB are free; measure less text (--text-bytes) or name a folder on another disk "
                "(--work-dir)"
            )
        yield folder
