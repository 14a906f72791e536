"""Every kernel that the engine launches for Kimi-K2.5 on gfx942 compiles: no spills, no scratch, LDS, matrix units.

Compiled alone: no such GPU is here to run them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton.backends.amd")

from flyray.actors.model.config import ModelConfig
from flyray.cluster.build.build import _launch, _named, _product
from flyray.cluster.build.built import Built, NotBuilt
from flyray.cluster.build.launches import PROMPTS, ROWS, BuildTask
from flyray.cluster.build.report import build_figures, build_table, faults
from flyray.cluster.cli import app
from flyray.cluster.synthesize import Synthesis
from flyray.kernels import triton as triton_kernels
from flyray.kernels.flydsl.build import LINKERS, products
from flyray.kernels.flydsl.isa import Isa
from flyray.kernels.flydsl.shape import ProductShape
from flyray.kernels.protocol import Int4Matrix, Int8Matrix
from flyray.kernels.triton.recording import Launch
from flyray.kernels.triton.tiles import tables_of

CONFIG = ModelConfig.from_dict(Synthesis("kimi-k2.5").config())
# Of each format the fewest rows that are sorted, and a prompt; other numbers and shards are left to `flyray build`.
TASK = BuildTask(CONFIG, ("w4a8", "w8a8", "w8a8-fp8", "bf16"), (8,), "gfx942", (16,), (2048,))
ISA = Isa(vgpr=100, sgpr=20, spills=0, parked=3, scratch=0, lds=64, lines=(), loop=Counter())
GOOD = Built("triton.a.SIZE16", "triton", "a", ISA, 16384, 4, "v_mfma_i32_16x16x32_i8", "v_mfma_i32_.*i8", 4.125, 16)


@pytest.fixture(scope="module")
def launches() -> tuple[Launch, ...]:
    return TASK.wanted().triton


def test_all_that_is_launched_is_found(launches: tuple[Launch, ...]) -> None:
    """A kernel that no other one calls is launched, on gfx942 or on sm_90."""
    folder = Path(triton_kernels.__file__).parent
    text = "".join(file.read_text() for file in [*folder.glob("*.py"), *(folder.parent / "aiter").glob("*.py")])
    kernels = set(re.findall(r"@triton\.jit.*\n(?:# .*\n)*def (\w+)", text))
    cuda = replace(TASK, target="sm_90", formats=("w4a8",), shards=(1,), prompts=()).wanted().triton
    assert {launch.kernel for launch in (*launches, *cuda)} == kernels - set(re.findall(r"(?<!def )\b(\w+)\(", text))


def test_the_numbers_of_rows_meet_every_regime_of_linears() -> None:
    counts = {*ROWS, *PROMPTS}
    for name, rows in tables_of("gfx942").items():
        bounds = [0, *(most for most, *_ in rows)] if ".linear." in name else []
        for above, most in pairwise(bounds):
            assert any(above < count <= most for count in counts), (
                f"{name}: nothing of {above + 1} to {most} rows is run"
            )


def test_flydsls_products_are_those_that_it_launches() -> None:
    task = replace(TASK, formats=("w4a8", "w8a8"), rows=(1, 8, 64, 512), prompts=())
    assert set(task.wanted().flydsl) == set(products(7168, 2048, (Int4Matrix, Int8Matrix)))
    assert not replace(task, target="gfx90a", shards=(1,), rows=(1,)).wanted().flydsl
    with pytest.raises(ValueError, match="expert_parallel: 400 shards cannot share 384 experts"):
        replace(task, shards=(400,)).wanted()


def test_gfx942(launches: tuple[Launch, ...]) -> None:
    once = {}
    for name, launch in _named(launches):
        # Of products one of all constants, without what is a hint on numbers and addresses alone; of others one.
        product = any(part in launch.kernel for part in ("products", "absorb", "attend", "gather_e"))
        once.setdefault((launch.kernel, str(launch.constants) if product else ""), (name, launch))
    built = [_launch(name, launch, "gfx942")[0] for name, launch in once.values()]
    assert list(faults(built)) == []
    products = {each.family: each for each in built if isinstance(each, Built) and each.tokens}
    assert {"experts int4 gate_up", "experts bf16 down", "linear int8", "float_products"} < products.keys()
    assert all(each.matrix for each in products.values())


@pytest.mark.skipif(
    find_spec("flydsl") is None or ("ROCM_PATH" not in os.environ and not any(map(shutil.which, LINKERS))),
    reason="needs FlyDSL and a linker for gfx942 (Debian: lld-19)",
)
def test_a_product_is_compiled_once(tmp_path: Path) -> None:
    shape = ProductShape(4, 256, 32, 4, False, 16)
    first, fresh = _product(shape, "gfx942", tmp_path)
    again, fresh_again = _product(shape, "gfx942", tmp_path)
    assert (fresh, fresh_again) == (True, False)
    assert isinstance(first, Built)
    assert first == again
    assert (first.faults, first.matrix) == ((), "v_mfma_i32_16x16x32_i8")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"isa": replace(ISA, spills=2)}, "spills 2 registers"),
        ({"isa": replace(ISA, scratch=24)}, "needs 24 bytes of scratch"),
        ({"lds": 73728}, "needs 73728 bytes of LDS, there are 65536"),
        ({"matrix": ""}, r"has no v_mfma_i32_.*i8, but no matrix instruction"),
        ({"matrix": "v_mfma_f32_16x16x16_f16"}, "has no v_mfma_i32_.*i8, but v_mfma_f32_16x16x16_f16"),
    ],
)
def test_what_must_not_run(change: dict[str, object], fault: str) -> None:
    assert GOOD.faults == ()
    bad = replace(GOOD, **change)  # type: ignore[arg-type]
    assert bad.faults == (fault,)
    assert list(faults([GOOD, bad])) == [f"triton.a.SIZE16: {fault}"]


def test_numbers_of_a_kernel() -> None:
    figures = {figure.name: figure.value for figure in build_figures([GOOD, NotBuilt("b", "triton", ("no",))], 1)}
    assert figures["vgpr.triton.a.SIZE16"] == 100
    assert figures["spills.triton.a.SIZE16"] == 0
    assert figures["parked.triton.a.SIZE16"] == 3
    assert figures["lds.triton.a.SIZE16"] == 16384
    assert figures["bytes_flop.triton.a.SIZE16"] == 4.125 / 8 / (2 * 16)
    # Four programs of 16 KiB fit the LDS: a wave of each on every SIMD, though registers would hold four.
    assert figures["waves.triton.a.SIZE16"] == 4
    assert replace(GOOD, lds=32768).waves == 2
    assert (figures["build.kernels"], figures["build.compiled"], figures["build.faults"]) == (2, 1, 1)
    rows = build_table([GOOD, replace(GOOD, name="triton.a.SIZE64", lds=32768)])
    assert rows.row_count == 1
    assert list(rows.columns[5].cells) == ["16,384–32,768"]


def test_the_command_refuses_what_cannot_be() -> None:
    run = CliRunner().invoke(app, ["build", "--format", "w4a8", "--expert-parallel", "500"])
    assert run.exit_code == 1
    assert "expert_parallel: 500 shards cannot share 384 experts" in run.stderr
    run = CliRunner().invoke(app, ["build", "--format", "w3a8"])
    assert run.exit_code == 1
    assert "'w3a8' is unknown" in run.stderr
