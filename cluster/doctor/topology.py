"""How the GPUs of this machine are linked, by the tools of their makers and by what the kernel says of PCIe."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path

import torch

from .finding import Finding

Links = Mapping[tuple[int, int], str]
"""(GPU, GPU), lower first -> how they are linked: "XGMI", "PCIE", "NV18", "PIX", "PXB", "PHB", "NODE", "SYS"."""

_ABOUT = "links between GPUs"
_TOOL_S = 20.0
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_GPU = re.compile(r"GPU\s*\[?(\d+)\]?")
_FAST = re.compile(r"XGMI|NV\d+")


class TopologyError(ValueError):
    """A tool said what is not understood here."""


def check_topology(gpus: int, hip: bool, ask: Callable[[list[str]], str | None] | None = None) -> Iterator[Finding]:
    """gpus: that torch sees. ask: runs a command, None where there is no such command."""
    if gpus < 2:
        return
    found, said = None, []
    for command, parse in _AMD if hip else _NVIDIA:
        text = (ask or run_tool)(command)
        if text is None:
            said.append(f"there is no {command[0]}")
            continue
        try:
            found = parse(text)
            break
        except TopologyError as error:
            said.append(f"{' '.join(command)}: {error}")
    if found is None:
        yield Finding(_ABOUT, "unknown", f"not known: {'; '.join(said)}")
    else:
        yield judge_links(found)


def judge_links(links: Links) -> Finding:
    """Whether all pairs are linked by xGMI or NVLink, as those of a node for this model are. The tools count all GPUs
    of the machine, also those that this process does not see."""
    said = ", ".join(f"{count} by {kind}" for kind, count in Counter(links.values()).most_common())
    text = f"{len(links)} pairs of {len({gpu for pair in links for gpu in pair})} GPUs: {said}"
    slow = [f"{a}–{b} ({kind})" for (a, b), kind in sorted(links.items()) if not _FAST.fullmatch(kind)]
    if not slow:
        return Finding(_ABOUT, "ok", text)
    more = f" and {len(slow) - 4} more" if len(slow) > 4 else ""
    return Finding(
        _ABOUT,
        "warning",
        f"{text}. PCIe alone between GPUs {', '.join(slow[:4])}{more}: what travels in each layer takes several times "
        "as long; is a bridge or its firmware missing, or is this a virtual machine with a part of a node?",
    )


def check_peers(
    gpus: int, reaches: Callable[[int, int], bool] = torch.cuda.can_device_access_peer
) -> Iterator[Finding]:
    """Whether each GPU may read the others' memory, as torch says."""
    if gpus < 2:
        return
    apart = [f"{a}–{b}" for a, b in combinations(range(gpus), 2) if not (reaches(a, b) and reaches(b, a))]
    if apart:
        text = f"GPUs {', '.join(apart[:4])} cannot reach each other's memory: is IOMMU on (iommu=pt), or ACS?"
        yield Finding("peer access", "warning", text)
    else:
        yield Finding("peer access", "ok", f"each of {gpus} GPUs reaches the others' memory")


def pcie_addresses(gpus: int) -> dict[int, str]:
    """Of the GPUs that torch sees."""
    found = {}
    for gpu in range(gpus):
        place = torch.cuda.get_device_properties(gpu)
        found[gpu] = f"{place.pci_domain_id:04x}:{place.pci_bus_id:02x}:{place.pci_device_id:02x}.0"
    return found


def check_pcie(addresses: Mapping[int, str], devices: Path = Path("/sys/bus/pci/devices")) -> Iterator[Finding]:
    """The link of each GPU to the host: as wide and as fast as it can be? addresses: "0000:c1:00.0" by GPU."""
    for gpu, address in addresses.items():
        about, device = f"PCIe of GPU {gpu}", devices / address.lower()
        try:
            now, most = (
                [(device / f"{which}_link_{what}").read_text().strip() for what in ("speed", "width")]
                for which in ("current", "max")
            )
        except OSError:
            yield Finding(about, "unknown", f"not known: {device} does not say")
            continue
        text = f"{now[0]} x {now[1]}"
        if now != most:
            yield Finding(
                about, "warning", f"{text} of {most[0]} x {most[1]}: reseat it, or look at its slot in the BIOS"
            )
        else:
            yield Finding(about, "ok", text)


def parse_nvidia(text: str) -> Links:
    """Of `nvidia-smi topo -m`: a matrix whose columns end in affinities and may have NICs. Raises TopologyError."""
    lines = [_ESCAPE.sub("", line).split() for line in text.splitlines()]
    columns = next((line for line in lines if line[:1] == ["GPU0"] and "X" not in line), None)
    if columns is None:
        raise TopologyError("no line names the GPUs")
    rows = {line[0]: line[1:] for line in lines if line and line is not columns and _GPU.fullmatch(line[0])}
    return _pairs(columns, rows)


def parse_rocm(text: str) -> Links:
    """Of `rocm-smi --showtopo` or `--showtopotype`: the matrix under "Link Type". Raises TopologyError."""
    _, title, rest = text.partition("Link Type between two GPUs")
    lines = [line.split() for line in rest.splitlines()[1:]]
    lines = lines[: next((number for number, line in enumerate(lines) if line and line[0][:3] == "==="), len(lines))]
    table = [line for line in lines if line]
    if not title or not table:
        raise TopologyError('no table "Link Type between two GPUs"')
    return _pairs(table[0], {line[0]: line[1:] for line in table[1:]})


def parse_amd(text: str) -> Links:
    """Of `amd-smi topology --json`, as it is since ROCm 6.3: [{gpu, links: [{gpu, link_type}]}]; before, link_type was
    {"gpu_1": "XGMI"} of each GPU. Raises TopologyError."""
    try:
        content = json.loads(text)
        links = {}
        for entry in content:
            if "links" in entry:
                others = {link["gpu"]: link["link_type"] for link in entry["links"]}
            else:
                others = {int(name.rpartition("_")[2]): kind for name, kind in entry["link_type"].items()}
            links |= {(entry["gpu"], other): kind for other, kind in others.items() if entry["gpu"] < other}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TopologyError(f"its JSON is not understood: {error!r}") from None
    if not links:
        raise TopologyError("its JSON names no two GPUs")
    return links


def run_tool(command: list[str]) -> str | None:
    """What a tool prints; None where it is not installed. One that fails or hangs prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_S, check=False).stdout
    except subprocess.TimeoutExpired:
        return ""


def _pairs(columns: list[str], rows: Mapping[str, list[str]]) -> Links:
    gpus = [name for name in columns if _GPU.fullmatch(name)]
    links = {}
    for a, b in combinations(gpus, 2):
        if a not in rows or len(rows[a]) <= columns.index(b):
            raise TopologyError(f"no link of {a} to {b}")
        links[int(a[3:]), int(b[3:])] = rows[a][columns.index(b)]
    if not links:
        raise TopologyError("no two GPUs in its table")
    return links


_AMD = ((["amd-smi", "topology", "--json"], parse_amd), (["rocm-smi", "--showtopo"], parse_rocm))
_NVIDIA = ((["nvidia-smi", "topo", "-m"], parse_nvidia),)
