"""Stages over batches of several sequences and over several shards: the same bits as one sequence in one process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from deepseek_oracle import NATIVE, published_tensors, random_model, save_checkpoint, small_text, write_native
from torch import Tensor

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.kv_pages import KvPages
from flyray.actors.model.layer_weights import ShardWeights
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.model.stages import ModelStages
from flyray.actors.weights import load_shard
from flyray.kernels.protocol import Activations, PagedBatch
from flyray.kernels.select import CPU_BACKENDS, select_kernels

PAGE = 8
TEXT = small_text(n_group=2, topk_group=1)
CONFIG = ModelConfig.from_dict(TEXT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = published_tensors(random_model(TEXT, 31), write_native)
    return save_checkpoint(tmp_path_factory.mktemp("stages"), TEXT, tensors, NATIVE)


class Shards:
    """All shards' stages of one model; the sequences live on the first one."""

    def __init__(self, path: Path, count: int, precision: str, backend: str) -> None:
        kernels = select_kernels(backend, 1)
        bounds = [8 * shard // count for shard in range(count + 1)]
        weights = [
            load_shard(Checkpoint(path), CONFIG, precision, range(begin, end), kernels)
            for begin, end in pairwise(bounds)
        ]
        self.stages = [
            ModelStages(CONFIG, part, kernels, KvPages.allocate(CONFIG, 16, PAGE, kernels)) for part in weights
        ]

    def run(self, tokens: list[int], batch: PagedBatch) -> Tensor:
        """Logits of every row."""
        home = self.stages[0]
        hidden = home.embed(torch.tensor(tokens))
        for layer in range(CONFIG.num_hidden_layers):
            hidden = home.attention(layer, hidden, batch)
            hidden = self._moe(layer, hidden) if layer in CONFIG.moe_layers else home.dense(layer, hidden)
        return home.head(hidden)

    def _moe(self, layer: int, hidden: Tensor) -> Tensor:
        home, top_k = self.stages[0], CONFIG.num_experts_per_tok
        routing = home.gate(layer, hidden)
        slots = torch.zeros(hidden.shape[0], top_k, CONFIG.hidden_size)
        for shard in self.stages:
            owned = shard.weights.experts
            token, slot = ((routing.ids >= owned[0]) & (routing.ids <= owned[-1])).nonzero(as_tuple=True)
            # As after an exchange: only the rows that this shard's experts need, each once.
            rows, pair_token = token.unique(return_inverse=True)
            part = take(routing.activations, rows)
            local = routing.ids[token, slot] - owned[0]
            slots[token, slot] = shard.experts(layer, part, pair_token.to(torch.int32), local.to(torch.int32))
        return home.combine(layer, hidden, slots, routing.weights, home.shared(layer, routing))


def take(activations: Activations, rows: Tensor) -> Activations:
    scale = None if activations.scale is None else activations.scale[rows]
    return Activations(activations.format, activations.values[rows], scale)


def paged(slices: list[tuple[int, int, list[int]]]) -> PagedBatch:
    """slices: (first position, tokens, pages of the sequence so far)."""
    width = max(len(pages) for _, _, pages in slices)
    starts, positions, slots = [0], [], []
    for first, count, pages in slices:
        starts.append(starts[-1] + count)
        positions += range(first, first + count)
        slots += [pages[p // PAGE] * PAGE + p % PAGE for p in range(first, first + count)]
    return PagedBatch(
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([first + count for first, count, _ in slices], dtype=torch.int32),
        torch.tensor([pages + [-1] * (width - len(pages)) for _, _, pages in slices], dtype=torch.int32),
        torch.tensor(positions),
        torch.tensor(slots),
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("precision", ["w4a16", "w4a8", "w8a8"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_and_shards_do_not_change_a_bit(count: int, precision: str, backend: str, checkpoint: Path) -> None:
    generator = torch.Generator().manual_seed(count)
    first, second = (torch.randint(0, 97, (20,), generator=generator).tolist() for _ in range(2))
    alone = SingleProcessModel.load(checkpoint, precision, select_kernels(backend, 1), 32)
    expected_first, expected_second = alone.prefill(first), alone.prefill(second)

    shards = Shards(checkpoint, count, precision, backend)
    pages_first, pages_second = [11, 3, 14], [4, 0, 7]  # neither in order nor side by side
    chunk = shards.run(first[:13], paged([(0, 13, pages_first[:2])]))
    mixed = shards.run([*second[:17], *first[13:16]], paged([(0, 17, pages_second), (13, 3, pages_first[:2])]))
    decode = shards.run([first[16], second[17]], paged([(16, 1, pages_first), (17, 1, pages_second)]))
    assert torch.equal(chunk, expected_first[:13])
    assert torch.equal(mixed[:17], expected_second[:17])
    assert torch.equal(mixed[17:], expected_first[13:16])
    assert torch.equal(decode, torch.stack([expected_first[16], expected_second[17]]))


@pytest.fixture(scope="module")
def stages(checkpoint: Path) -> ModelStages:
    kernels = select_kernels("reference", 1)
    weights: ShardWeights = load_shard(Checkpoint(checkpoint), CONFIG, "w4a8", range(8), kernels)
    return ModelStages(CONFIG, weights, kernels, KvPages.allocate(CONFIG, 2, PAGE, kernels))


def test_stages_refuse_the_wrong_layer(stages: ModelStages) -> None:
    hidden = torch.zeros(2, CONFIG.hidden_size)
    with pytest.raises(ValueError, match="layer 1 has routed experts, not a dense MLP"):
        stages.dense(1, hidden)
    with pytest.raises(ValueError, match="layer 0 has a dense MLP, no routed experts"):
        stages.gate(0, hidden)
    slots = torch.zeros(2, 3, CONFIG.hidden_size)
    with pytest.raises(ValueError, match="layer 0 cannot combine"):
        stages.combine(0, hidden, slots, torch.zeros(2, 3), hidden)
    with pytest.raises(ValueError, match=r"cannot combine slots \(2, 2, 64\) of 2 tokens"):
        stages.combine(1, hidden, slots[:, :2], torch.zeros(2, 2), hidden)


def test_an_empty_step(stages: ModelStages) -> None:
    """A shard without sequences still runs every stage's shape."""
    hidden = stages.embed(torch.zeros(0, dtype=torch.int64))
    batch = PagedBatch(
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(0, 0, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
    )
    hidden = stages.dense(0, stages.attention(0, hidden, batch))
    routing = stages.gate(1, hidden)
    none = torch.zeros(0, dtype=torch.int32)
    outputs = stages.experts(1, routing.activations, none, none)
    slots = outputs.view(0, CONFIG.num_experts_per_tok, CONFIG.hidden_size)
    hidden = stages.combine(1, hidden, slots, routing.weights, stages.shared(1, routing))
    assert stages.head(hidden).shape == (0, CONFIG.vocab_size)


def test_page_sizes() -> None:
    kernels = select_kernels("reference", 1)
    kv = KvPages.allocate(CONFIG, 5, PAGE, kernels)
    assert kv.values.shape == (3, 5, PAGE, 48)
    assert (kv.num_pages, kv.page_size) == (5, PAGE)
    assert KvPages.page_bytes(CONFIG, PAGE, kernels) * 5 == kv.values.nbytes
    with pytest.raises(ValueError, match="at least one page of one token, not 0 of 8"):
        KvPages.allocate(CONFIG, 0, PAGE, kernels)
