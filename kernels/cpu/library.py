"""Loads the compiled CPU library and declares its C functions."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ABI_VERSION = 8
_LIBRARY = "libflyray_cpu"


class LibraryError(RuntimeError):
    """The compiled library is missing, of another version, or cannot start here."""


def library_path(folder: Path) -> Path:
    """The compiled library in `folder`, under any of this Python's extension suffixes."""
    names = [f"{_LIBRARY}{suffix}" for suffix in EXTENSION_SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise LibraryError(
        f"the CPU kernels are not compiled: {folder} has none of {', '.join(names)}. "
        "Install a C++17 compiler (g++) and run `pip install -e .` (or `pip install .`) in flyray's source tree."
    )


def load_library() -> ctypes.CDLL:
    """The library with all argument types declared; a `LibraryError` says how to build it when it is missing."""
    path = library_path(Path(__file__).parent)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path} does not load: {error}") from error
    version = library.flyray_abi_version()
    if version != ABI_VERSION:
        raise LibraryError(
            f"{path} has interface version {version}, this flyray needs {ABI_VERSION}; rebuild it with "
            "`pip install -e . --no-deps` in flyray's source tree"
        )
    library.flyray_error.restype = c_char_p
    library.flyray_open.argtypes = [c_int, c_char_p]
    library.flyray_open.restype = c_void_p
    library.flyray_close.argtypes = [c_void_p]
    library.flyray_close.restype = None
    library.flyray_variant.argtypes = [c_void_p]
    library.flyray_variant.restype = c_char_p
    library.flyray_run.argtypes = [c_void_p, c_char_p, c_int64]
    library.flyray_run.restype = c_int
    return library
