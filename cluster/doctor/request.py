"""What is asked of the doctor: a configuration file or a model, and a target."""

from __future__ import annotations

from pathlib import Path

from ...actors.model.config import ModelConfig
from ..config import DEMO_MODEL, ConfigError, load_config
from ..synthesize import Synthesis, model_file
from .devices import seen_gpus
from .doctor import Examination
from .fit import Demand


def examination(config: Path | None, model: str, target: str) -> Examination:
    """Without a configuration or a model: the demo model's shapes. Raises what reading them raises, and ConfigError for
    both."""
    if config is not None:
        if model:
            raise ConfigError("give either a configuration or --model")
        loaded = load_config(config)
        demand, folder = Demand.of_config(loaded), Path(loaded.model.path)
        return Examination(demand.work.model, demand, folder, target, loaded.ray.address)
    if model:
        demand = Demand.of_model(model, len(seen_gpus()))
        return Examination(demand.work.model, demand, Path(model) if demand.model.disk.read else None, target)
    return Examination(ModelConfig.from_dict(Synthesis(model_file(str(DEMO_MODEL))).config()), target=target)
