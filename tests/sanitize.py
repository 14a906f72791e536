"""The kernel tests on a C++ library built with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

The library is built in a temporary folder beside links to the rest of flyray, so that the installed one stays as it is.
Torch allocates a tensor with malloc, so that a read or write past any end of one is seen. Needs g++ and its sanitizers.

    python tests/sanitize.py [arguments of pytest]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# All kernels, with sizes of every remainder; what looks at no kernel of C++ is left out.
TESTS = [
    "test_batch_invariance.py",
    "test_cpu_equals_reference.py",
    "test_cpu_library.py",
    "test_cpu_quantizer.py",
    "test_few_rows.py",
    "test_quantize_rows.py",
    "test_row_kernels.py",
    "test_attention.py",
    "test_sampling.py",
    "test_gate.py",
    "test_selfcheck.py",
    "test_weight_quantizer.py",
]
# The reference backend is no C++, and sizes beyond a few tiles are slow here and show nothing more.
CHOSEN = "not reference and not full_size and not frequencies_follow"


def build(package: Path) -> None:
    """A package `flyray` whose compiled library is sanitized."""
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    cpu = package / "kernels" / "cpu"
    cpu.mkdir(parents=True)
    for floor in ("actors", "cluster"):
        (package / floor).symlink_to(ROOT / floor)
    for there in (ROOT / "kernels", ROOT / "kernels" / "cpu"):
        here = package / there.relative_to(ROOT)
        for file in there.iterdir():
            if file.suffix == ".py" or (file.is_dir() and file.name not in ("cpu", "__pycache__")):
                (here / file.name).symlink_to(file)
    options = [option for option in extension["extra-compile-args"] if not option.startswith("-O")] + FLAGS

    def compile_one(source: str) -> Path:
        made = cpu / f"{Path(source).stem}.o"
        subprocess.run([COMPILER, *options, "-c", ROOT / source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, extension["sources"]))
    library = cpu / f"{extension['name'].rpartition('.')[2]}.so"
    subprocess.run([COMPILER, *FLAGS, "-shared", *objects, *extension["extra-link-args"], "-o", library], check=True)


def runtime(name: str) -> str:
    """The path of one of the compiler's sanitizer libraries."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        sys.exit(f"{COMPILER} has no {name}: install its sanitizers")
    return str(path)


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="flyray-sanitize-") as folder:
        build(Path(folder) / "flyray")
        # The C++ library first, or AddressSanitizer cannot find the exceptions that others throw.
        preloaded = " ".join(map(runtime, ("libasan.so", "libstdc++.so.6")))
        environment = os.environ | {
            "PYTHONPATH": folder,
            "LD_PRELOAD": preloaded,
            # Python and torch keep much until the end; that is no leak of the kernels.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        asked = "import flyray.kernels.cpu.library as it; print(it.__file__)"
        said = subprocess.run(
            [sys.executable, "-c", asked], env=environment, check=True, capture_output=True, text=True
        ).stdout
        if not said.startswith(folder):
            sys.exit(f"the tests would run beside {said.strip()}, which is not sanitized")
        tests = [str(ROOT / "tests" / "kernels" / name) for name in TESTS]
        options = ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-p", "no:faulthandler", "-k", CHOSEN]
        command = [sys.executable, "-m", "pytest", *options, *tests, *arguments]
        return subprocess.run(command, env=environment, check=False, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
