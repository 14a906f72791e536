"""In how many micro-batches a step runs: as many as make it shortest in simulation, with costs that were measured.

While one micro-batch's tokens travel another's are computed; but each stage starts once for each, and experts' weights
are read once for each. What outweighs the other is known only of steps that were traced (`EngineStatus.trace`): until
steps of two sizes have been, a step is not divided.
"""

from __future__ import annotations

from collections.abc import Sequence

from .measured_costs import LINK_US, stage_costs
from .request import TracedStep
from .sequence import COLOCATED, LayerPlan, StageProgram, sequence
from .simulate import simulate

# Layers of one kind take the same: so many of them tell programs apart as well as all would.
_LAYERS = 3
# A step that is traced runs stage by stage, an undivided one that is not is captured and takes less: a division that
# saves little of the former saves nothing of the latter.
_LEAST_GAIN = 0.05
# Sizes are told apart by a factor; a line through two that are nearer would be noise.
_FACTOR = 1.5


class MicroBatchChoice:
    """Which of an engine's programs, the first of one micro-batch, runs a step. `shards` of them run it together."""

    def __init__(self, programs: Sequence[StageProgram], shards: int) -> None:
        self._names, self._shards = [program.name for program in programs], shards
        layers = programs[0].layers
        dense = min(layers.first_k_dense_replace, 1)
        few = LayerPlan(min(layers.num_hidden_layers, dense + _LAYERS), dense)
        self._programs = [sequence(few, COLOCATED, each.micro_batches, each.attention) for each in programs]
        self._costs: dict[int, dict[str, float]] = {}
        self._chosen: dict[int, str] = {}

    def measured(self, rows: int, program: str, steps: Sequence[TracedStep]) -> None:
        """Takes in a step of one micro-batch on all shards; rows: of the shard that has the most."""
        if program != self._names[0] or not rows or len(self._names) == 1:
            return
        costs = stage_costs(steps)
        if all(stage.kind in costs for stage in self._programs[0].stages[COLOCATED]):
            near = [known for known in self._costs if max(known, rows) < _FACTOR * min(known, rows)]
            for known in near:
                del self._costs[known]
            self._costs[rows] = costs
            self._chosen.clear()

    def program(self, rows: int, sequences: int) -> str:
        """For a step of so many rows of so many sequences, those of the shard that has the most."""
        if len(self._names) == 1 or len(self._costs) < 2 or sequences < 2:
            return self._names[0]
        size = 1 << max(rows - 1, 0).bit_length()
        if size not in self._chosen:
            whole, *divided = (self.microseconds(number, size) for number in range(len(self._names)))
            best = min(divided)
            self._chosen[size] = self._names[divided.index(best) + 1 if best < (1 - _LEAST_GAIN) * whole else 0]
        return self._chosen[size]

    def microseconds(self, number: int, rows: int) -> float:
        """Of a few layers of program `number`, in simulation."""
        program = self._programs[number]
        each = -(-rows // program.micro_batches)
        kinds = {stage.kind for stage in program.stages[COLOCATED]}
        costs = {kind: self._cost(kind, each) for kind in kinds}
        links = {f"link.{stage.sends}": LINK_US for stage in program.stages[COLOCATED] if stage.sends}
        return simulate(program, {**costs, **links}, self._shards).duration

    def _cost(self, kind: str, rows: int) -> float:
        """On the line through the two measured sizes around `rows`, or nearest to it; below the smallest size, and
        where a larger one took less, what the smaller one took."""
        sizes = sorted(self._costs)
        above = min(sum(size < rows for size in sizes), len(sizes) - 1)
        low, high = sizes[max(above - 1, 0)], sizes[max(above, 1)]
        begin, end = self._costs[low][kind], self._costs[high][kind]
        return begin + max(0.0, end - begin) * max(0, rows - low) / (high - low)
