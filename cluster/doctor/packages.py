"""Which packages are installed, against what flyray's own metadata asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement

from .finding import Finding

# The module `aiter` of both; AMD's is on its own index, in a package of another name.
_WRONG_AITER, _AITER = "aiter", "amd-aiter"


def installed_packages() -> dict[str, str]:
    """Versions by name, lower case with "-"."""
    return {_normal(each.metadata["Name"]): each.version for each in metadata.distributions() if each.metadata["Name"]}


def check_packages(requirements: Iterable[str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """requirements: as `importlib.metadata.requires("flyray")` gives them. Those of extras count where they are
    installed. What fits is one finding."""
    said: set[str] = set()
    fitting: list[str] = []
    for text in requirements:
        wanted = Requirement(text)
        name, found = _normal(wanted.name), installed.get(_normal(wanted.name))
        if name == "flyray" or _bare(wanted) in said:
            continue
        said.add(_bare(wanted))
        optional = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        if found is None:
            if not optional:
                yield Finding(name, "fault", f"is not installed; install it with: pip install '{_bare(wanted)}'")
        elif not wanted.specifier.contains(found, prereleases=True):
            state = "warning" if optional else "fault"
            yield Finding(name, state, f"is {found}, needed is {wanted.specifier}: pip install '{_bare(wanted)}'")
        else:
            fitting.append(f"{name} {found}")
    if fitting:
        yield Finding("packages", "ok", ", ".join(fitting))
    if _WRONG_AITER in installed:
        yield Finding(
            _WRONG_AITER,
            "fault",
            f"{installed[_WRONG_AITER]} from PyPI is an unrelated package, whose module hides AMD's: "
            f"pip uninstall {_WRONG_AITER}; AMD's is {_AITER}",
        )


def _bare(requirement: Requirement) -> str:
    """Without the extra that asks for it."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")
