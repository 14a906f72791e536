"""From logits to token ids and log probabilities: greedy, or one random number a row over what min-p, top-k and top-p
leave.

The random number is a function of (seed, position) alone: splitmix64 as a counter-based generator. A replay of a
sequence therefore draws the same tokens, on any shard and in any batch.

**Every rounding is defined**, so that backends agree on each token. With z a row's logits and b the largest of them, a
token's weight at temperature T is the integer nearest to `ordered_exp(float32((z - b) / T)) * 2^44` (half to even).
Sums of weights are exact whatever their order, and need no sorted vocabulary. What is kept is always a beginning of
the order "larger logit first, then lower id"; the draw then goes through the kept tokens in the order of their ids:

- min-p keeps z >= b + T * log(min_p), in float64, as do the next two; log is the C library's.
- top-k keeps the k first.
- top-p keeps, of what is left, the fewest whose weights together reach ceil(top_p * sum).
- The token is the first whose weight, added to those before it, exceeds floor(u * sum of the kept), u in [0, 1).
- A log probability is float32(z - b - log(sum at temperature 1 * 2^-44)), of the logits as they are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .logit_changes import changed_logits
from .ordered import ordered_exp
from .protocol import Drawn, Sampled, SamplingRow
from .sampling_limits import MAX_TOP_LOGPROBS

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# A weight has this many bits behind the point: 2^19 tokens of weight 1 still fit a signed 64-bit sum.
WEIGHT_BITS = 44
# A temperature above 0 and below the least normal float32 counts as that; one above float32's largest as this.
LEAST_TEMPERATURE = 2.0**-126
MOST_TEMPERATURE = torch.finfo(torch.float32).max
MAX_VOCABULARY = 1 << (63 - WEIGHT_BITS)
# How many of the best tokens top-p looks at first; twice as many each time that these do not reach it.
_FIRST_BEST = 256


Bits = TypeVar("Bits", int, "NDArray[np.uint64]")


def splitmix64(state: Bits) -> Bits:
    """One output of Steele, Lea and Flood's SplitMix64 for a 64-bit state, or for each of an array of uint64."""
    z = (state + _GOLDEN) & _MASK  # of an array the sum wraps by itself
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)  # pyright: ignore[reportReturnType] -- NumPy types what two Python numbers would give


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of (seed, position)."""
    return (splitmix64((splitmix64(seed & _MASK) + position) & _MASK) >> 11) * 2.0**-53


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """`uniform` of each seed, of which 64 bits count, and position."""
    states = splitmix64(seeds) + positions.astype(np.uint64)
    return (splitmix64(states) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def check_sampling_row(row: SamplingRow) -> None:
    """Refuses values outside their range with a ValueError that names the field."""
    if not 0.0 <= row.temperature < float("inf"):
        raise ValueError(f"sample: temperature is {row.temperature}, expected a finite number >= 0")
    if not 0.0 < row.top_p <= 1.0:
        raise ValueError(f"sample: top_p is {row.top_p}, expected more than 0 and at most 1")
    if row.top_k < 0:
        raise ValueError(f"sample: top_k is {row.top_k}, expected >= 0 (0 is off)")
    if row.position < 0:
        raise ValueError(f"sample: position is {row.position}, expected >= 0")
    if not 0.0 <= row.min_p <= 1.0:
        raise ValueError(f"sample: min_p is {row.min_p}, expected 0 to 1 (0 is off)")
    if not 0 <= row.top_logprobs <= MAX_TOP_LOGPROBS:
        raise ValueError(f"sample: top_logprobs is {row.top_logprobs}, expected 0 to {MAX_TOP_LOGPROBS}")


WORDS = 5
"""Numbers that say how a row draws, float64: temperature, top_p, temperature * log(min_p), which is -inf where min_p is
off, the random number and top_k."""
_WORDS, _NUMBER = Struct(f"={WORDS}d"), Struct("=d")
_RANDOM = 3 * _NUMBER.size


class SamplingRows(list[SamplingRow]):
    """Rows whose words stay at one place, so that a captured `sample` draws anew by what was put here last.

    words: [S, WORDS] float64. What a captured `sample` draws by is theirs alone: `move` leaves the rows as they are.
    """

    def __init__(self, rows: Sequence[SamplingRow]) -> None:
        self.words = torch.empty((len(rows), WORDS), dtype=torch.float64)
        self._bytes = self.words.view(torch.uint8).numpy().reshape(-1).data
        self.put(rows)

    def put(self, rows: Iterable[SamplingRow]) -> None:
        """Other rows, as many; a captured `sample` takes none with changes or top_logprobs."""
        self[:] = rows
        self._random = [(index, row.seed) for index, row in enumerate(self) if row.temperature > 0.0]
        place = 0
        for row in self:
            temperature, top_p, reach, _, top_k = row_words(row.temperature, row.top_p, row.min_p, row.top_k)
            random = uniform(row.seed, row.position) if temperature > 0.0 else 0.0
            _WORDS.pack_into(self._bytes, place, temperature, top_p, reach, random, top_k)
            place += _WORDS.size

    def move(self, positions: Sequence[int]) -> None:
        """Draws as the same rows at other positions would."""
        for index, seed in self._random:
            _NUMBER.pack_into(self._bytes, index * _WORDS.size + _RANDOM, uniform(seed, positions[index]))


def row_words(temperature: float, top_p: float, min_p: float, top_k: int) -> tuple[float, float, float, float, float]:
    """Of one row, but for the random number, which is 0. The logarithm is the C library's, which NumPy's is not."""
    reach = temperature * math.log(min_p) if min_p > 0.0 else -math.inf
    return temperature, top_p, reach, 0.0, float(min(top_k, MAX_VOCABULARY))


def check_sampling(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Refuses with a ValueError what `sample` cannot run."""
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[0] != len(rows):
        raise ValueError(
            f"sample: logits is {logits.dtype} {list(logits.shape)}, expected float [{len(rows)}, vocabulary]"
        )
    if rows and not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"sample: logits has {logits.shape[1]} columns, expected 1 to {MAX_VOCABULARY}")
    for row in rows:
        check_sampling_row(row)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    """logits [S, V] float, one `SamplingRow` a row -> `Sampled`, on the logits' device.

    A row whose largest logit is NaN or infinite, as given or as changed, is refused with a ValueError; -inf marks a
    forbidden token.
    """
    check_sampling(logits, rows)
    logits = logits.to(torch.float32)
    columns = min(max((row.top_logprobs for row in rows), default=0), logits.shape[1])
    count, device = len(rows), logits.device
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    logprobs = torch.empty(count, dtype=torch.float32, device=device)
    top_tokens = torch.empty((count, columns), dtype=torch.int64, device=device)
    top_logprobs = torch.empty((count, columns), dtype=torch.float32, device=device)
    changed = changed_logits(logits, rows)
    for index, row in enumerate(rows):
        given = logits[index]
        best, log_sum = _log_sum(given, index)
        tokens[index] = _token(changed[index], row, _random(rows, index), index)
        top_tokens[index] = _best(given, columns) if columns else top_tokens[index]
        logprobs[index] = float(given[tokens[index]]) - best - log_sum
        top_logprobs[index] = given[top_tokens[index]].to(torch.float64) - best - log_sum
    return Sampled(tokens, logprobs, top_tokens, top_logprobs)


def draw(logits: Tensor, words: Tensor) -> Drawn:
    """`AheadKernels.draw`, by operations of the logits' device alone: all rows are sorted."""
    logits = logits.to(torch.float32)
    size, largest = logits.shape[1], logits.amax(1)
    temperature, top_p, reach, random, top_k = words.unbind(1)
    apart = logits - largest[:, None]
    log_sum = (_integers(apart).sum(1).to(torch.float64) * 2.0**-WEIGHT_BITS).log()
    divisor = temperature.clamp(LEAST_TEMPERATURE, MOST_TEMPERATURE).to(torch.float32)
    # A sort may put -0.0 behind 0.0, which is as large.
    order = (logits + 0.0).sort(dim=1, descending=True, stable=True).indices
    limit = (logits.to(torch.float64) >= (largest.to(torch.float64) + reach)[:, None]).sum(1)
    limit = torch.where(top_k > 0.0, limit.minimum(top_k.to(torch.int64)), limit)
    weights = _integers(apart / divisor[:, None]).gather(1, order)
    weights *= torch.arange(size, device=logits.device) < limit[:, None]
    total = weights.sum(1)
    needed = torch.where(top_p < 1.0, (top_p * total.to(torch.float64)).ceil().to(torch.int64).minimum(total), total)
    weights *= weights.cumsum(1) - weights < needed[:, None]
    cumulative = torch.zeros_like(weights).scatter_(1, order, weights).cumsum(1)
    total = cumulative[:, -1]
    target = (random * total.to(torch.float64)).to(torch.int64).minimum(total - 1)
    drawn = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_max(size - 1)
    tokens = torch.where(temperature > 0.0, drawn, logits.argmax(1))
    given = logits.gather(1, tokens[:, None])[:, 0].to(torch.float64)
    logprobs = (given - largest.to(torch.float64) - log_sum).to(torch.float32)
    return Drawn(tokens, logprobs, largest)


def _largest(logits: Tensor, index: int) -> float:
    best = float(logits.max())
    if not -math.inf < best < math.inf:
        raise ValueError(f"sample: the largest of logits row {index} is {best}, expected a finite number")
    return best


def _log_sum(logits: Tensor, index: int) -> tuple[float, float]:
    """Of logits [V]: the largest b, and log(sum of exp(z - b))."""
    best = _largest(logits, index)
    return best, math.log(float(int(_weights(logits, best, 1.0).sum())) * 2.0**-WEIGHT_BITS)


def _weights(logits: Tensor, best: float, temperature: float) -> Tensor:
    """Weights of logits [n] float32 whose row's largest is `best` -> [n] int64."""
    # A tensor on the device: by a number on the host an accelerator multiplies with its reciprocal.
    divisor = min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)
    divisor = torch.tensor(divisor, dtype=torch.float32, device=logits.device)
    return _integers((logits - best) / divisor)


def _integers(scaled: Tensor) -> Tensor:
    """Weights, int64, of float32 (z - b) / T."""
    return (ordered_exp(scaled).to(torch.float64) * 2.0**WEIGHT_BITS).round().to(torch.int64)


def _best(logits: Tensor, count: int) -> Tensor:
    """The ids of the `count` largest of logits [V], larger first, then lower ids first."""
    if not 0 < count < logits.shape[0]:
        return logits.sort(descending=True, stable=True).indices[:count]
    ids = (logits >= logits.topk(count).values[-1]).nonzero()[:, 0]
    return ids[logits[ids].sort(descending=True, stable=True).indices[:count]]


def _random(rows: Sequence[SamplingRow], index: int) -> float:
    if isinstance(rows, SamplingRows):
        return float(rows.words[index, 3])
    return uniform(rows[index].seed, rows[index].position)


def _token(logits: Tensor, row: SamplingRow, random: float, index: int) -> int:
    """One token of logits [V] float32."""
    best = _largest(logits, index)
    if row.temperature == 0.0:
        return int(logits.argmax())
    weights = _weights(logits, best, row.temperature)
    kept = _kept(logits, weights, row, best)
    if kept is not None:
        weights = weights[kept]
    cumulative = weights.cumsum(0)
    total = int(cumulative[-1])
    target = min(int(random * float(total)), total - 1)
    chosen = int(torch.searchsorted(cumulative, target, right=True))
    return chosen if kept is None else int(kept[chosen])


def _kept(logits: Tensor, weights: Tensor, row: SamplingRow, best: float) -> Tensor | None:
    """The ids that min-p, top-k and top-p leave, ascending; None: all."""
    limit = size = logits.shape[0]
    if row.min_p > 0.0:
        limit = int((logits.to(torch.float64) >= best + row.temperature * math.log(row.min_p)).sum())
    if row.top_k > 0:
        limit = min(limit, row.top_k)
    if row.top_p >= 1.0:
        return None if limit == size else _best(logits, limit).sort().values
    total = int(weights.sum() if limit == size else weights[_best(logits, limit)].sum())
    needed = min(math.ceil(row.top_p * float(total)), total)
    count = min(_FIRST_BEST, limit)
    while True:
        ids = _best(logits, count)
        cumulative = weights[ids].cumsum(0)
        if int(cumulative[-1]) >= needed:
            return ids[: int(torch.searchsorted(cumulative, needed)) + 1].sort().values
        count = min(2 * count, limit)
