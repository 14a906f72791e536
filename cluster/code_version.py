"""A fingerprint of flyray's own code: what was computed by other code must not pass for what this code computes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

ROOT = __name__.rsplit(".", 2)[0]  # "flyray"
CODE = (".py", ".cpp", ".inc", ".h", ".jinja")
# Code that makes the demo model, and does not run with it.
LEFT_OUT = "training"


def code_version(*modules: str) -> str:
    """16 hexadecimal digits over the source files of modules or packages, named from flyray's root ("kernels.formats").

    Nothing is imported but parent packages. Raises ValueError for a module that does not exist.
    """
    files: list[Path] = []
    for module in modules:
        spec = find_spec(f"{ROOT}.{module}")
        if spec is None or spec.origin is None:
            raise ValueError(f"flyray has no module {module}")
        origin = Path(spec.origin)
        files += _package_files(origin.parent) if origin.name == "__init__.py" else [origin]
    return digest(files)


def digest(files: Iterable[Path]) -> str:
    """16 hexadecimal digits over the names and contents of files, in the order of their names."""
    whole = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.name, str(file))):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.name}\0{content}\0".encode())
    return whole.hexdigest()[:16]


def _package_files(folder: Path) -> list[Path]:
    return [
        file
        for file in folder.rglob("*")
        if file.suffix in CODE and LEFT_OUT not in file.relative_to(folder).parts and file.is_file()
    ]
