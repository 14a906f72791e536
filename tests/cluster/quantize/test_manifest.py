"""quantize.json and SHA256SUMS: what they hold comes back, and a single changed bit anywhere is noticed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized import quantize_by
from source_checkpoints import native_checkpoint

from flyray.cluster.quantize.manifest import (
    MANIFEST,
    SUMS,
    FileRecord,
    Manifest,
    ManifestError,
    MatrixError,
    Origin,
    check_sums,
)
from flyray.cluster.quantize.matrix import QuantizeError

names = st.text(min_size=1, max_size=20)
sizes = st.integers(0, 2**60)
reals = st.floats(0, 1e30)
records = st.builds(
    FileRecord,
    bytes=sizes,
    sha256=names,
    source_bytes=sizes,
    seconds=reals,
    peak_memory=sizes,
    baseline=sizes,
    node=names,
    matrices=st.lists(st.builds(MatrixError, names, names, names, reals, reals), max_size=3).map(tuple),
    uncalibrated=st.lists(names, max_size=3).map(tuple),
)
origins = st.builds(Origin, names, st.dictionaries(names, names), st.dictionaries(names, names), names)
manifests = st.builds(Manifest, origins, st.dictionaries(names, records, max_size=4))


@given(manifests)
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    assert Manifest.parse(manifest.dump(), "here") == manifest


@given(manifests, st.data())
def test_a_changed_bit_of_a_manifest_is_noticed(manifest: Manifest, data: st.DataObject) -> None:
    content = bytearray(manifest.dump())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ManifestError, match="here: is damaged"):
        Manifest.parse(bytes(content), "here")


@pytest.fixture(scope="module")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    quantize_by("w4a8", native_checkpoint(folder / "source"), folder / "made")
    return folder / "made"


def test_a_finished_folder_checks_out(finished: Path) -> None:
    assert check_sums(finished) == []
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=finished, check=True)
    listed = {line.split()[1] for line in (finished / SUMS).read_text().splitlines()[1:]}
    assert listed | {SUMS, MANIFEST} == {path.name for path in finished.iterdir()}
    manifest = Manifest.read(finished)
    assert set(manifest.files) == {path.name for path in finished.glob("*.safetensors")}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_bit_of_any_file_is_noticed_and_the_file_named(finished: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(finished.iterdir())))
    content = file.read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    try:
        file.write_bytes(changed)
        assert check_sums(finished) == [file.name]
    finally:
        file.write_bytes(content)


def test_missing_files_are_named_and_unfinished_folders_refused(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "config.json").unlink()
    (copy / "tiktoken.model").unlink()
    assert check_sums(copy) == ["config.json", "tiktoken.model"]
    (copy / SUMS).unlink()
    with pytest.raises(QuantizeError, match=r"has no SHA256SUMS; flyray quantize did not make it"):
        check_sums(copy)
    with pytest.raises(ManifestError, match=r"has no quantize\.json"):
        Manifest.read(tmp_path)
