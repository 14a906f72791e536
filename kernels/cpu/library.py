"""Loads the compiled CPU library and declares its C functions."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ABI_VERSION = 4
_LIBRARY = "libflyray_cpu"

_P, _N = c_void_p, c_int64
_SIGNATURES: dict[str, list[type]] = {
    "flyray_rms_norm": [_P, _P, _P, c_int, _P, _N, _N, c_float],
    "flyray_linear": [_P, _P, _P, c_int, _P, _N, _N, _N, _N],
    "flyray_linear_int8": [_P, _P, _P, _P, _P, _N, _N, _N],
    "flyray_rope": [_P, _P, _P, _P, _P, _P, _N, _N, _N, _N],
    "flyray_write_kv": [_P, _P, _P, _P, _N, _N, _N, _N],
    "flyray_attention": [_P] * 8 + [_N] * 8 + [c_float],
    "flyray_gate": [_P, _P, _P, c_int, _P, _P, _P, _N, _N, _N, _N, _N, _N, c_int, c_float],
    "flyray_quantize": [_P, _P, c_int, _P, _P, _N, _N],
    "flyray_silu_mul": [_P, _P, _P, _N, _N],
    "flyray_combine": [_P, _P, _P, _P, _N, _N, _N],
    "flyray_experts": [_P, c_int] + [_P] * 11 + [_N] * 5,
    "flyray_fold": [_P, _P, _P, c_int, _P, _N, _N, _P, _P, _P, _P, _P, _N, _N],
    "flyray_scales": [_P, c_int, _P, _P, _P, _P, _P, _N, c_float, _P, _P, _N, _N],
    "flyray_round": [_P, _P, _P, _P, _P, _N, _N, _N, c_float, c_float],
}


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
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = c_int
    return library
