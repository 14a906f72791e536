"""What the largest decode step takes of a GPU's memory beside weights and pages: exchange, experts' results, logits."""

from __future__ import annotations

from ...actors.device_steps import MAX_ROWS
from ...actors.model.config import ModelConfig
from .gpu import Gpu

_FLOAT_BYTES = 4
_ID_BYTES = 4


def step_buffers(model: ModelConfig, gpu: Gpu, gpus: int) -> int:
    """Bytes of a step of `MAX_ROWS` rows on each of the GPUs, rows counted at their widest, in float32."""
    slots, columns = model.num_experts_per_tok, model.hidden_size
    row = columns * _FLOAT_BYTES
    results = gpus * MAX_ROWS * slots * row  # `experts` has a place for every pair, its own and others'
    logits = MAX_ROWS * model.vocab_size * _FLOAT_BYTES
    if gpus == 1:
        return results + logits
    arriving = gpus * MAX_ROWS * (row + _FLOAT_BYTES + slots * _ID_BYTES)
    # Written into place by the others (`PeerExchange`), or a row from each of them for every slot (`FixedExchange`).
    slot_rows = MAX_ROWS * slots * row * (1 if gpu.direct else gpus)
    return results + logits + arriving + slot_rows
