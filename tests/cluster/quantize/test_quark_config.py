"""flyray's words for Quark's layouts are Quark's own."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from source_checkpoints import PREFIX, native_checkpoint

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.quantization_config import read_quantization
from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.quantize.quark_config import FORMATS, QUARK_VERSION, quark_config
from flyray.cluster.quantize.quark_quantizer import quark_quantizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_checkpoint(tmp_path_factory.mktemp("config") / "source")


@pytest.mark.parametrize("format", FORMATS)
def test_config_is_what_quark_writes(source: Path, tmp_path: Path, format: str) -> None:
    target = tmp_path / "quark"
    quark_quantizer(format).direct_quantize_checkpoint(str(source), str(target), device="cpu")
    written = json.loads((target / "config.json").read_text())["quantization_config"]
    checkpoint = Checkpoint(source)
    stored = [checkpoint.stored_name(name) for name in checkpoint.names]
    exclude = [
        name.removesuffix(".weight")
        for name in stored
        if name.endswith(".weight") and "norm" not in name and "embed" not in name
    ]
    assert f"{PREFIX}model.layers.1.mlp.gate" in exclude
    ours = quark_config(format, reversed(exclude))
    assert ours == written
    # Also in the order of the keys, so that the files are the same bytes.
    assert json.dumps(ours) == json.dumps(written)
    stated = read_quantization({"quantization_config": ours})
    assert stated.experts == format
    assert stated.excluded.names == set(exclude)


def test_version_is_the_installed_one() -> None:
    installed = metadata.version("amd-quark")
    assert installed.split(".")[:2] == QUARK_VERSION.split("."), (
        f"amd-quark {installed} is installed: compare its words with cluster/quantize/quark_config.py"
    )


def test_what_has_no_words_is_refused() -> None:
    with pytest.raises(QuantizeError, match="w4a8 is no layout of AMD Quark; those are w8a8, w8a8-fp8, w4a8-channel"):
        quark_config("w4a8", [])
    for pattern in ("re:.*gate", "*.gate", "model.layers.[0].mlp"):
        with pytest.raises(QuantizeError, match="no pattern"):
            quark_config("w8a8", ["lm_head", pattern])
