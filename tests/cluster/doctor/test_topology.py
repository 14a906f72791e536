"""Links between GPUs, as the makers' tools print them and the kernel's files say."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.doctor.topology import (
    Links,
    TopologyError,
    check_pcie,
    check_peers,
    check_topology,
    judge_links,
    parse_amd,
    parse_nvidia,
    parse_rocm,
)

# As the tool prints it into a pipe too: the heading underlined, columns apart by tabs, NICs among them.
NVIDIA = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-55,112-167\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\tNODE\t0-55,112-167\t0\t\tN/A\n"
    "GPU2\tSYS\tSYS\t X \tSYS\t56-111,168-223\t1\t\tN/A\n"
    "NIC0\tPIX\tNODE\tSYS\t X \t\t\t\t\n"
    "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)
ROCM = """

============================ ROCm System Management Interface ============================
================================ Weight between two GPUs =================================
       GPU0         GPU1         GPU2
GPU0   0            15           40
GPU1   15           0            40
GPU2   40           40           0

================================= Hops between two GPUs ==================================
       GPU0         GPU1         GPU2
GPU0   0            1            2
GPU1   1            0            2
GPU2   2            2            0

=============================== Link Type between two GPUs ===============================
       GPU0         GPU1         GPU2
GPU0   0            XGMI         PCIE
GPU1   XGMI         0            PCIE
GPU2   PCIE         PCIE         0

======================================= Numa Nodes =======================================
GPU[0]\t\t: (Topology) Numa Node: 0
GPU[0]\t\t: (Topology) Numa Affinity: 0
================================== End of ROCm SMI Log ===================================
"""
AMD = """[
 {"gpu": 0, "bdf": "0000:05:00.0", "links": [
  {"gpu": 0, "bdf": "0000:05:00.0", "weight": 0, "link_status": "ENABLED", "link_type": "SELF", "num_hops": 0},
  {"gpu": 2, "bdf": "0000:65:00.0", "weight": 40, "link_status": "ENABLED", "link_type": "PCIE", "num_hops": 2},
  {"gpu": 1, "bdf": "0000:26:00.0", "weight": 15, "link_status": "ENABLED", "link_type": "XGMI", "num_hops": 1}]},
 {"gpu": 1, "bdf": "0000:26:00.0", "links": [
  {"gpu": 0, "weight": 15, "link_type": "XGMI"}, {"gpu": 2, "weight": 40, "link_type": "PCIE"}]},
 {"gpu": 2, "bdf": "0000:65:00.0", "links": [{"gpu": 0, "weight": 40, "link_type": "PCIE"}]}
]"""
# Before ROCm 6.3.
AMD_OLD = """[
 {"gpu": 0, "link_type": {"gpu_0": "SELF", "gpu_1": "XGMI", "gpu_2": "PCIE"}, "hops": {"gpu_1": 1}},
 {"gpu": 1, "link_type": {"gpu_0": "XGMI", "gpu_1": "SELF", "gpu_2": "PCIE"}},
 {"gpu": 2, "link_type": {"gpu_0": "PCIE", "gpu_1": "PCIE", "gpu_2": "SELF"}}
]"""
MIXED = {(0, 1): "XGMI", (0, 2): "PCIE", (1, 2): "PCIE"}


def test_each_tools_output_is_understood() -> None:
    assert parse_nvidia(NVIDIA) == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "SYS"}
    assert parse_rocm(ROCM) == parse_amd(AMD) == parse_amd(AMD_OLD) == MIXED


@given(st.integers(2, 16), st.data())
def test_tables_of_any_size_are_read(gpus: int, data: st.DataObject) -> None:
    kinds = st.sampled_from(["NV18", "NV4", "PIX", "PXB", "PHB", "NODE", "SYS", "XGMI", "PCIE"])
    links = {pair: data.draw(kinds) for pair in combinations(range(gpus), 2)}
    names = [f"GPU{gpu}" for gpu in range(gpus)]

    def table(itself: str) -> str:
        rows = [["", *names]]
        for a in range(gpus):
            rows.append([names[a], *(links.get((min(a, b), max(a, b)), itself) for b in range(gpus))])
        return "\n".join("\t".join(row) for row in rows)

    assert parse_nvidia(table("X")) == links
    assert parse_rocm(f"=== Link Type between two GPUs ===\n{table('0')}\n\n=== Numa Nodes ===\n") == links


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_nvidia, "No devices were found", "no line names the GPUs"),
        (parse_nvidia, "\tGPU0\tGPU1\nGPU0\t X ", "no link of GPU0 to GPU1"),
        (parse_nvidia, "\tGPU0\tCPU Affinity\nGPU0\t X \t0-7", "no two GPUs"),
        (parse_rocm, "ERROR: No AMD GPUs specified", "no table"),
        (parse_rocm, "= Link Type between two GPUs =\n GPU0\nGPU0 0\n", "no two GPUs"),
        (parse_amd, "", "not understood"),
        (parse_amd, '[{"gpu": 0, "links": [{"gpu": 1}]}]', "KeyError"),
        (parse_amd, '[{"gpu": 0, "links": []}]', "no two GPUs"),
    ],
)
def test_what_is_not_understood_is_said(parse, text: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        parse(text)


def test_the_first_tool_that_is_understood_answers() -> None:
    (found,) = check_topology(3, True, _answers(amd="Traceback", rocm=ROCM))
    assert (found.state, found.about) == ("warning", "links between GPUs")
    assert "3 pairs of 3 GPUs: 2 by PCIE, 1 by XGMI" in found.text
    assert "GPUs 0–2 (PCIE), 1–2 (PCIE)" in found.text
    (unknown,) = check_topology(2, True, _answers(amd="Traceback"))
    assert unknown.state == "unknown"
    assert "amd-smi topology --json: its JSON is not understood" in unknown.text
    assert "there is no rocm-smi" in unknown.text
    (unknown,) = check_topology(2, False, lambda command: None)
    assert unknown.text == "not known: there is no nvidia-smi"
    assert list(check_topology(1, False, lambda command: NVIDIA)) == []


def _answers(amd: str | None = None, rocm: str | None = None):
    return lambda command: {"amd-smi": amd, "rocm-smi": rocm}[command[0]]


@pytest.mark.parametrize("kind", ["XGMI", "NV18", "NV4"])
def test_fast_links_are_right(kind: str) -> None:
    links: Links = dict.fromkeys(combinations(range(8), 2), kind)
    found = judge_links(links)
    assert (found.state, found.text) == ("ok", f"28 pairs of 8 GPUs: 28 by {kind}")


def test_peers_that_are_out_of_reach_are_named() -> None:
    (found,) = check_peers(3, lambda a, b: {a, b} != {0, 2})
    assert found.state == "warning"
    assert "GPUs 0–2 cannot reach" in found.text
    assert next(check_peers(3, lambda a, b: True)).state == "ok"
    assert list(check_peers(1)) == []


def test_pcie_links_are_held_against_their_most(tmp_path: Path) -> None:
    for address, now in (("0000:c1:00.0", "16"), ("0000:c6:00.0", "8")):
        device = tmp_path / address
        device.mkdir()
        for which, width in (("current", now), ("max", "16")):
            (device / f"{which}_link_speed").write_text("32.0 GT/s PCIe\n")
            (device / f"{which}_link_width").write_text(f"{width}\n")
    addresses = {0: "0000:C1:00.0", 1: "0000:c6:00.0", 2: "0000:c9:00.0"}
    found = list(check_pcie(addresses, tmp_path))
    assert [each.state for each in found] == ["ok", "warning", "unknown"]
    assert found[1].text.startswith("32.0 GT/s PCIe x 8 of 32.0 GT/s PCIe x 16")
