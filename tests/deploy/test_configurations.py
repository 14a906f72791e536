"""Every configuration in deploy/ is one that flyray takes; a GPU's fits the GPUs that it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flyray.cluster.config import FlyrayConfig, load_config
from flyray.cluster.doctor.devices import SeenGpu
from flyray.cluster.doctor.fit import Demand, check_fit
from flyray.cluster.plan.gpu import find_gpu
from flyray.cluster.synthesize import read_shape
from flyray.cluster.yaml_file import read_yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("name", sorted(file.name for file in DEPLOY.glob("*.yaml")))
def test_every_configuration_is_taken(name: str) -> None:
    config = FlyrayConfig.model_validate(read_yaml(DEPLOY / name, "configuration", "'model:'"))
    assert config.engine_config().model_path


@pytest.mark.parametrize(("shards", "states"), [(8, {"ok"}), (3, {"ok"}), (2, {"fault"})])
def test_kimi_fits_as_few_mi325x_as_its_configuration_says(tmp_path: Path, shards: int, states: set[str]) -> None:
    model = tmp_path / "Kimi-K2.5"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(read_shape("kimi-k2.5")))
    text = (
        (DEPLOY / "mi325x.yaml")
        .read_text()
        .replace("/data/Kimi-K2.5", str(model))
        .replace("shards: 8", f"shards: {shards}")
    )
    file = tmp_path / "mi325x.yaml"
    file.write_text(text)
    config = load_config(file)
    assert config.engine.shards == shards
    memory = find_gpu("MI325X").memory
    seen = [SeenGpu(number, "AMD Instinct MI325X", memory, memory) for number in range(shards)]
    assert {each.state for each in check_fit(Demand.of_config(config), seen, memory)} == states
