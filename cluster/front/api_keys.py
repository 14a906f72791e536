"""The keys that let clients in: a file of their digests, read again when it changes, and new ones for it.

A line is NAME:DIGEST, the SHA-256 of a key in hex; lines that begin with # and empty ones are left out. The file holds
no key, so who reads it cannot come in. A digest without salt or rounds is enough for keys that nobody can guess, which
is what `new_key` makes; it is no way to keep passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from pathlib import Path

_PREFIX = "fr-"
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.@-]+):(?P<digest>[0-9a-fA-F]{64})")
_LOOK_PERIOD_S = 1.0

logger = logging.getLogger(__name__)


class ApiKeysError(ValueError):
    """A file of keys cannot be used; the message names the file and the line, never what stands in it."""


class ApiKeys:
    """The keys of one file. Within a second of a change it holds for all requests that begin from then on."""

    def __init__(self, path: str | Path) -> None:
        """Raises ApiKeysError for a file that cannot be read, has a line of another form, a name twice or no key."""
        self._path = Path(path)
        self._seen = _version(self._path)
        self._digests = read_digests(self._path)
        self._looked = time.monotonic()

    def __contains__(self, key: str) -> bool:
        """Whether it is one of them, in a time that tells nothing of any."""
        self._look()
        digest = _digest(key)
        found = False
        for known in self._digests.values():
            found |= hmac.compare_digest(known, digest)
        return found

    def _look(self) -> None:
        """Takes a changed file's keys. One that cannot be used is told in the log, and the keys stay what they were."""
        now = time.monotonic()
        if now - self._looked < _LOOK_PERIOD_S:
            return
        self._looked = now
        version = _version(self._path)
        if version == self._seen:
            return
        self._seen = version
        try:
            self._digests = read_digests(self._path)
        except ApiKeysError as error:
            logger.error("%s; the keys that it had before are still taken", error)


def read_digests(path: Path) -> dict[str, bytes]:
    """Name to digest. Raises ApiKeysError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ApiKeysError(f"{path}: cannot read the API keys ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ApiKeysError(f"{path}: the file of API keys is no text") from None
    digests: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise ApiKeysError(f"{path}, line {number}: must be NAME:DIGEST, which `flyray key FILE NAME` adds")
        if found["name"] in digests:
            raise ApiKeysError(f"{path}, line {number}: the name {found['name']!r} is there already")
        digests[found["name"]] = bytes.fromhex(found["digest"])
    if not digests:
        raise ApiKeysError(f"{path}: there is no key in it, so nobody could come in; `flyray key FILE NAME` makes one")
    return digests


def new_key() -> str:
    """A key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def add_key(path: Path, name: str, key: str) -> None:
    """Adds a key's line to the file, made for its owner alone if there is none. Raises ApiKeysError, OSError."""
    line = f"{name}:{_digest(key).hex()}"
    if not _LINE.fullmatch(line):
        raise ApiKeysError(f"{name!r} is no name for a key: letters, digits and _ . @ - are")
    if path.exists() and path.stat().st_size and name in read_digests(path):
        raise ApiKeysError(f"{path}: the name {name!r} is there already; take another, or delete its line first")
    with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+", encoding="utf-8") as file:
        text = file.read()
        file.write(("" if not text or text.endswith("\n") else "\n") + line + "\n")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _version(path: Path) -> tuple[int, int, int] | None:
    """Tells one state of a file from another; None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
