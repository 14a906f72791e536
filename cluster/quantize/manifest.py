"""quantize.json: what a quantized checkpoint was made from and which of its files are finished; and SHA256SUMS.

A run adds a record for every output file, so that the same command goes on where a run was stopped. The first line
holds a digest of the rest, because everything else in the folder is covered by SHA256SUMS and this file is not: it
holds times, so it is not the same for two runs.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .location import Location, locate
from .matrix import QuantizeError
from .target_folder import TargetFolder, target_folder

MANIFEST = "quantize.json"
SUMS = "SHA256SUMS"
VERSION = 1

_FIRST = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')
_SUM = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")
_COMMENT = "# sha256 of the lines below: "


class ManifestError(QuantizeError):
    """A quantize.json that cannot be read as one."""


@dataclass(frozen=True)
class MatrixError:
    """How far a quantized matrix is from its source: squared Frobenius norms of the difference and of the source."""

    name: str
    kind: str
    format: str
    difference: float
    norm: float

    @property
    def relative(self) -> float:
        return (self.difference / self.norm if self.norm else self.difference) ** 0.5


@dataclass(frozen=True)
class FileRecord:
    """A finished output file. seconds: that a worker took; peak_memory: bytes of its resident memory at most while at
    it, baseline: before it; node: Ray's id of where. uncalibrated: matrices that calibration did not reach."""

    bytes: int
    sha256: str
    source_bytes: int
    seconds: float
    peak_memory: int
    baseline: int
    node: str
    matrices: tuple[MatrixError, ...] = ()
    uncalibrated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """What decides every byte of a quantized checkpoint: a run goes on only where all of it is the same. source and
    code: fingerprints. recipe: its keys. inputs: digests."""

    source: str
    recipe: Mapping[str, Any]
    inputs: Mapping[str, str]
    code: str


@dataclass(frozen=True)
class Manifest:
    """files: the finished ones by name."""

    origin: Origin
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    @staticmethod
    def read(path: str | Path | Location) -> Manifest:
        """Of a folder. Raises ManifestError."""
        found = find_manifest(target_folder(locate(path)))
        if found is None:
            raise ManifestError(f"{path}: has no {MANIFEST}; flyray quantize did not make it")
        return found

    @property
    def bytes(self) -> int:
        """Of all finished files."""
        return sum(record.bytes for record in self.files.values())

    def with_file(self, name: str, record: FileRecord) -> Manifest:
        return replace(self, files={**self.files, name: record})

    def dump(self) -> builtins.bytes:
        # One line a file and none a matrix: there are tens of thousands of them.
        files = ",\n".join(f"{json.dumps(name)}: {json.dumps(_dump_record(file))}" for name, file in self.files.items())
        origin = json.dumps(asdict(self.origin))
        body = f'"version": {VERSION},\n"origin": {origin},\n"files": {{\n{files}\n}}\n}}\n'.encode()
        return b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body

    @staticmethod
    def parse(data: builtins.bytes, where: str) -> Manifest:
        first = _FIRST.match(data)
        if first is None or hashlib.sha256(data[first.end() :]).hexdigest() != first[1].decode():
            raise ManifestError(f"{where}: is damaged: its content is not what its digest says")
        content = json.loads(data)
        if content["version"] != VERSION:
            raise ManifestError(f"{where}: version is {content['version']}, this flyray reads {VERSION}")
        files = {name: _parse_record(record) for name, record in content["files"].items()}
        return Manifest(Origin(**content["origin"]), files)


def find_manifest(folder: TargetFolder) -> Manifest | None:
    """The folder's, None if there is none. Raises ManifestError."""
    if folder.size(MANIFEST) is None:
        return None
    return Manifest.parse(folder.read(MANIFEST), f"{folder.place}/{MANIFEST}")


def dump_sums(sums: Mapping[str, str]) -> bytes:
    """SHA256SUMS as `sha256sum -c` reads it, with a digest of itself in a comment. sums: hexadecimal by file name."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    return f"{_COMMENT}{hashlib.sha256(lines.encode()).hexdigest()}\n{lines}".encode()


def check_sums(path: str | Path | Location) -> list[str]:
    """The names of files that are not what SHA256SUMS and quantize.json say, missing ones too; empty if all is well.

    Reads every byte. Raises QuantizeError for a folder that has no SHA256SUMS.
    """
    folder = target_folder(locate(path))
    if folder.size(SUMS) is None:
        raise QuantizeError(f"{path}: has no {SUMS}; flyray quantize did not make it, or was stopped before its end")
    sums, wrong = _parse_sums(folder.read(SUMS))
    for name, digest in sums.items():
        if folder.size(name) is None or _digest(folder.place / name) != digest:
            wrong.append(name)
    if folder.size(MANIFEST) is not None:
        try:
            find_manifest(folder)
        except ManifestError:
            wrong.append(MANIFEST)
    return sorted(set(wrong))


def _parse_sums(data: bytes) -> tuple[dict[str, str], list[str]]:
    """Digests by name, and SUMS itself if it is damaged. One that sha256sum wrote has no digest of itself."""
    head, _, rest = data.partition(b"\n")
    plain = _SUM.fullmatch(head.decode(errors="replace")) is not None
    if not plain and head != f"{_COMMENT}{hashlib.sha256(rest).hexdigest()}".encode():
        return {}, [SUMS]
    lines = (data if plain else rest).decode(errors="replace").splitlines()
    matches = [_SUM.fullmatch(line) for line in lines]
    damaged = [] if all(matches) else [SUMS]
    return {match[2]: match[1] for match in matches if match is not None}, damaged


def _digest(file: Location) -> str:
    with file.open("rb") as stream:
        whole = hashlib.sha256()
        while data := stream.read(4 << 20):
            whole.update(data)
    return whole.hexdigest()


def _dump_record(record: FileRecord) -> dict[str, Any]:
    matrices = [[m.name, m.kind, m.format, m.difference, m.norm] for m in record.matrices]
    return {**{key: getattr(record, key) for key in _PLAIN}, "matrices": matrices}


def _parse_record(record: Mapping[str, Any]) -> FileRecord:
    values = {key: record[key] for key in _PLAIN}
    values["uncalibrated"] = tuple(values["uncalibrated"])
    return FileRecord(**values, matrices=tuple(MatrixError(*row) for row in record["matrices"]))


_PLAIN = ("bytes", "sha256", "source_bytes", "seconds", "peak_memory", "baseline", "node", "uncalibrated")
