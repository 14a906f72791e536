"""Signatures of AITER's functions that flyray calls, out of its published releases, in `aiter_signatures.json`.

    python tests/support/aiter_signatures.py 0.1.7.post2.dev18    # downloads amd-aiter from the package index
    python tests/support/aiter_signatures.py amd_aiter-….whl      # or a wheel at hand, or a folder of sources

reads the Python sources of that release without running them, and writes or replaces its entry. The entry of August
2026 was written by hand from AITER's repository, of which no wheel is on the package index.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from flyray.kernels.aiter.calls import CALLS, Source, read_signature

FILE = Path(__file__).with_name("aiter_signatures.json")
Signatures = dict[str, inspect.Signature]


def recorded() -> dict[str, Signatures]:
    """Of each release, by name, the signatures of the functions that it has."""
    return {
        release: {name: parsed(text) for name, text in functions.items()}
        for release, functions in json.loads(FILE.read_text()).items()
    }


def parsed(parameters: str) -> inspect.Signature:
    """The signature of what stands between a function's parentheses."""
    signature = read_signature(f"def function({parameters}): ...", "function")
    assert signature is not None
    return signature


def found(source: Source) -> dict[str, str]:
    """The parameters, as text, of those of `CALLS` that a release has."""
    functions = {}
    for name, call in CALLS.items():
        text = source(call.path)
        signature = None if text is None else read_signature(text, name)
        if signature is not None:
            functions[name] = ", ".join(map(_parameter, signature.parameters.values()))
    return functions


def sources(release: Path) -> Source:
    """The files of a wheel or of a folder that holds the folder `aiter`."""
    if release.is_dir():
        return lambda path: (release / path).read_text() if (release / path).is_file() else None
    wheel = ZipFile(release)
    return lambda path: wheel.read(path).decode() if path in wheel.namelist() else None


def _parameter(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is parameter.empty:
        return parameter.name
    return f"{parameter.name}={default if isinstance(default, str) and default.isidentifier() else _literal(default)}"


def _literal(default: object) -> str:
    # An expression's source was kept as text: no parameter that is called here has a text as its default.
    return default if isinstance(default, str) else repr(default)


def _write(release: str, functions: dict[str, str]) -> None:
    everything = json.loads(FILE.read_text()) if FILE.exists() else {}
    everything[release] = functions
    FILE.write_text(json.dumps(everything, indent=1) + "\n")


def main(given: str) -> None:
    """Writes the entry of one release."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(given)
        if not path.exists():
            wanted = [f"amd-aiter=={given}", "--no-deps", "--pre", "--dest", folder]
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted], check=True)
            path = next(Path(folder).glob("*.whl"))
        release = path.name if path.is_dir() else path.name.split("-")[1]
        _write(release, found(sources(path)))


if __name__ == "__main__":
    main(sys.argv[1])
