"""What is asked of the doctor: a configuration file or a model, and a target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...actors.checkpoint import CheckpointError
from ...actors.model.config import ModelConfig
from ...actors.model.fields import ConfigError as ModelConfigError
from ..config import DEMO_MODEL, ConfigError, load_config
from ..plan.gpu import PlanError
from ..synthesize import Synthesis, model_file
from .devices import seen_gpus
from .doctor import Examination
from .finding import Finding
from .fit import Demand


def examination(config: Path | None, model: str, target: str) -> Examination:
    """Without a configuration or a model: the demo model's shapes; the same where the model cannot be read, which is
    then a finding. Raises ConfigError for a configuration that cannot be used, and for both, and SynthesizeError for a
    model that there is not."""
    if config is not None and model:
        raise ConfigError("give either a configuration or --model")
    loaded = load_config(config) if config is not None else None
    path = loaded.model.path if loaded is not None else model
    demo = ModelConfig.from_dict(Synthesis(model_file(str(DEMO_MODEL))).config())
    backend, address = (loaded.engine.backend, loaded.ray.address) if loaded is not None else ("", "local")
    asked = Examination(demo, target=target, backend=backend, ray_address=address)
    if not path:
        return asked
    try:
        demand = Demand.of_config(loaded) if loaded is not None else Demand.of_model(model, len(seen_gpus()))
    except (CheckpointError, ModelConfigError, PlanError) as error:
        return replace(asked, trouble=(Finding("model", "fault", str(error)),))
    return replace(
        asked, shapes=demand.work.model, demand=demand, folder=Path(path) if demand.model.disk.read else None
    )
