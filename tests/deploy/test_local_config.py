"""`deploy/local.yaml` is what people copy: it must load, and name every key there is."""

from pathlib import Path

import yaml

from flyray.cluster.config import EnginesSection, FlyrayConfig, load_config

LOCAL = Path(__file__).parents[2] / "deploy" / "local.yaml"


def test_it_loads_and_serves_the_demo_model() -> None:
    config = load_config(LOCAL)
    assert config.model_name == "kimi-k2.5-nano"
    assert (config.engine.shards, config.model.precision) == (2, "w4a8")


def test_it_names_every_key() -> None:
    named = yaml.safe_load(LOCAL.read_text())
    known = {section: set(field.annotation.model_fields) for section, field in FlyrayConfig.model_fields.items()}
    assert {section: set(keys) for section, keys in named.items()} == known
    assert set(named["serve"]["engines"]) == set(EnginesSection.model_fields)
