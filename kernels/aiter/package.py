"""AMD's AITER as it is installed: found and judged without importing it, which needs ROCm, then imported and called."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .calls import CALLS, Call, call_fault

PACKAGE = "amd-aiter"
_OTHER = "aiter"
"""On PyPI a package for asynchronous iterators, whose module hides AMD's."""
_ONLY_AMDS = "mla.py"

CONSTANTS = {
    "silu": "ActivationType.Silu",
    "no_quantization": "QuantType.No",
    "per_token": "QuantType.per_Token",
    "per_1x32": "QuantType.per_1x32",
    "int4": "dtypes.i4x2",
}
"""Where the module `aiter` has what is passed by value."""


def installed_folder() -> Path | None:
    """The folder of the module `aiter`, whosever it is; None where none is installed or it is a single file."""
    spec = find_spec("aiter")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return Path(folders[0]) if folders else None


def package_fault(folder: Path | None) -> str:
    """What is wrong with the installation whose module stands in this folder; empty where it is AMD's."""
    if folder is not None and (folder / _ONLY_AMDS).is_file():
        return ""
    remedy = f"install {PACKAGE} from AMD's index or use one of its containers"
    if folder is not None or _version(_OTHER) is not None:
        return (
            f"package: the installed module aiter is that of the package {_OTHER} (asynchronous iterators), not "
            f"AMD's; uninstall {_OTHER}, then {remedy}"
        )
    return f"package: {PACKAGE} is not installed; {remedy}"


def installed_call_fault(name: str, folder: Path) -> str:
    """Why one of `CALLS` does not fit the release in this folder, naming the release; empty where it does."""

    def source(path: str) -> str | None:
        file = folder.parent / path
        return file.read_text() if file.is_file() else None

    fault = call_fault(name, source)
    return f"package: {PACKAGE} {_version(PACKAGE) or '(release unknown)'}: {fault}" if fault else ""


class Aiter:
    """Functions of a library, called by the names of their arguments, and its constants.

    find: gives one of `CALLS`; constant: one of `CONSTANTS`, by its name."""

    def __init__(self, find: Callable[[Call], Callable[..., Any]], constant: Callable[[str], Any]) -> None:
        self._find, self.constant = find, constant

    def call(self, name: str, **arguments: Any) -> Any:
        """Calls one of `CALLS`; keyword arguments may be left out, others may not."""
        call = CALLS[name]
        ordered = [arguments.pop(each) for each in call.positional]
        unknown = arguments.keys() - set(call.keywords)
        if unknown:
            raise TypeError(f"{name}: {', '.join(sorted(unknown))} is not declared in CALLS")
        return self._find(call)(*ordered, **arguments)


INSTALLED = Aiter(
    lambda call: getattr(import_module(call.module), call.name),
    lambda name: reduce(getattr, CONSTANTS[name].split("."), import_module("aiter")),
)
"""The installed release; nothing is imported before it is called."""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


__all__ = ["CONSTANTS", "INSTALLED", "PACKAGE", "Aiter", "installed_call_fault", "installed_folder", "package_fault"]
