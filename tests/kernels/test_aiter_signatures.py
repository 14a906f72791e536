"""That every call of AITER binds in its published releases, and that a changed one is named."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from aiter_signatures import found, parsed, recorded, sources

from flyray.kernels.aiter.calls import CALLS, INT4_CALLS, OPERATION_CALLS, Call, read_signature
from flyray.kernels.aiter.package import Aiter, installed_call_fault, package_fault
from flyray.kernels.aiter.source import AiterSource, release_fault
from flyray.kernels.protocol import Int4Matrix, Int8Matrix

RELEASES = recorded()


@pytest.mark.parametrize("release", RELEASES)
def test_every_call_fits_the_release(release: str) -> None:
    signatures = RELEASES[release]
    lacking = CALLS.keys() - signatures.keys()
    assert lacking == (set() if release.startswith("main") else set(INT4_CALLS))
    for name, signature in signatures.items():
        assert CALLS[name].fault(signature) == ""


def test_operations_name_calls_and_all_are_used() -> None:
    assert AiterSource.operations == OPERATION_CALLS.keys()
    assert {name for names in OPERATION_CALLS.values() for name in names} | set(INT4_CALLS) == CALLS.keys()


def passed() -> list[tuple[str, str]]:
    return [(name, each) for name, call in CALLS.items() for each in (*call.positional, *call.keywords)]


@pytest.mark.parametrize(("name", "parameter"), passed())
def test_a_renamed_parameter_is_named(name: str, parameter: str) -> None:
    for signatures in RELEASES.values():
        if name in signatures:
            renamed = [
                each.replace(name="other") if each.name == parameter else each
                for each in signatures[name].parameters.values()
            ]
            fault = CALLS[name].fault(inspect.Signature(renamed))
            assert name in fault
            assert parameter in fault or "other" in fault


def test_moved_added_and_lacking_parameters() -> None:
    call = Call("aiter.ops.x", "f", ("a", "b"), ("c",))
    assert call.path == "aiter/ops/x.py"
    assert call.fault(parsed("a, b, extra=1, c=None")) == ""
    assert call.fault(parsed("b, a, c")) == "aiter.ops.x.f: parameter 1 is b, expected a"
    assert call.fault(parsed("a")) == "aiter.ops.x.f: parameter 2 is nothing, expected b"
    assert call.fault(parsed("a, b, d=1")) == "aiter.ops.x.f has no parameter c"
    assert call.fault(parsed("a, b, c, d")) == "aiter.ops.x.f needs d, which is not passed"
    assert call.fault(parsed("a, b, *, c, d")) == "aiter.ops.x.f needs d, which is not passed"
    assert call.fault(None) == "aiter.ops.x.f does not exist"


def test_signatures_are_read_without_running() -> None:
    source = "import missing\n@missing.decorator\ndef f(x: missing.T, *, y=(1, 2), z=missing.call()) -> None: ...\n"
    signature = read_signature(source, "f")
    assert str(signature) == "(x, *, y=(1, 2), z='missing.call()')"
    assert read_signature(source, "g") is None


def test_a_call_passes_what_is_declared_alone() -> None:
    library = Aiter(lambda call: lambda out, input: (call.name, out, input), str)
    assert library.call("silu_and_mul", input=2, out=1) == ("silu_and_mul", 1, 2)
    with pytest.raises(TypeError, match="silu_and_mul: scale is not declared"):
        library.call("silu_and_mul", input=2, out=1, scale=3)


def test_the_other_package_of_that_name_is_recognized(tmp_path: Path) -> None:
    assert package_fault(None).startswith("package: amd-aiter is not installed")
    folder = tmp_path / "aiter"
    folder.mkdir()
    (folder / "__init__.py").write_text("def anext(): ...\n")
    fault = package_fault(folder)
    assert "that of the package aiter (asynchronous iterators), not AMD's" in fault
    (folder / "mla.py").write_text("")
    assert package_fault(folder) == ""


def test_an_installed_release_is_read(tmp_path: Path) -> None:
    release = RELEASES["0.1.7.post2.dev18"]
    for name, signature in release.items():
        path = tmp_path / CALLS[name].path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            body = "num_kv_splits_indptr is None" if name == "mla_decode_fwd" else "..."
            file.write(f"def {name}({', '.join(map(_written, signature.parameters.values()))}): {body}\n")
    folder = tmp_path / "aiter"
    assert release_fault("experts", Int8Matrix, folder) == ""
    fault = release_fault("experts", Int4Matrix, folder)
    assert fault.endswith("aiter.ops.shuffle.pack_int8_to_packed_int4 does not exist")
    assert found(sources(tmp_path)).keys() == release.keys()
    mla = folder / "mla.py"
    assert installed_call_fault("mla_decode_fwd", folder) == ""
    mla.write_text(mla.read_text().replace(" is None", " = cached()"))
    assert release_fault("mla_attention", None, folder).endswith(
        "mla_decode_fwd replaces num_kv_splits_indptr with its own"
    )
    mla.write_text(mla.read_text().replace("kv_indices", "page_indices"))
    assert installed_call_fault("mla_decode_fwd", folder).endswith(
        "aiter.mla.mla_decode_fwd: parameter 6 is page_indices, expected kv_indices"
    )
    assert "page_indices" in release_fault("mla_attention", None, folder)


def _written(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}=0"
