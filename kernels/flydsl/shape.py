"""What a compiled product is made for."""

from __future__ import annotations

from dataclasses import dataclass

from . import wave_maps as maps

WAVES = 4
"""Of a program."""
THREADS = WAVES * maps.WAVE
QUAD = maps.WAVE * maps.LANE_WORDS
"""Words of a piece: of 16 rows of weights, or of a unit of 16 activations for every part."""
NOWHERE = 0x60000000
"""A byte beyond any buffer, also twice: what is loaded from there is zero, and is not read."""
FEW = 4
"""Pairs of the smallest blocks."""
BLOCKS = (FEW, 16, 64, 128)
"""Pairs of a block."""


def unit_count(rows: int, gated: bool) -> int:
    """Units of 32 rows of an expert's matrix [rows, K], whole programs of `WAVES`. gated: a unit has 16 rows of the
    gate and the same of up."""
    height, unit = (rows // 2, maps.ROWS) if gated else (rows, maps.ROWS * maps.TILES)
    return -(-height // (unit * WAVES)) * WAVES


@dataclass(frozen=True)
class ProductShape:
    """What a compiled kernel is made for. bits: of a weight, 4 or 8. inner: K, a multiple of 16. rows: of the result.
    units: of an expert in its `WaveMatrix`. gated: a unit's tiles are gate and up, and the result is silu(gate) * up;
    else rows of one matrix. tokens: a block's, of `BLOCKS`."""

    bits: int
    inner: int
    rows: int
    units: int
    gated: bool
    tokens: int

    @property
    def name(self) -> str:
        """Such as w4_gate_up_t16_k7168."""
        return f"w{self.bits}_{'gate_up' if self.gated else 'down'}_t{self.tokens}_k{self.inner}"

    @property
    def token_tiles(self) -> int:
        """Of 16."""
        return -(-self.tokens // maps.ROWS)

    @property
    def split(self) -> int:
        """How many waves share the rows of a unit, each with its own part of K: all with few tokens, so that few
        experts keep many compute units busy; else one, and all share the activations."""
        return WAVES if self.tokens == FEW else 1

    @property
    def programs(self) -> int:
        """For all rows of an expert."""
        return self.units * self.split // WAVES

    @property
    def pieces(self) -> int:
        """Along K."""
        return -(-self.inner // (maps.PACKED * maps.PIECE[self.bits])) * maps.PACKED

    @property
    def chunk(self) -> int:
        """Pieces of one turn, whose activations go through LDS together."""
        return {FEW: 4, 16: 4, 64: 2, 128: 1}[self.tokens]

    @property
    def ahead(self) -> int:
        """Pieces whose weights a wave has in registers or on their way: those of one run of the loop's body. More than
        two turns are not worth their registers, for a turn's activations are waited for with all that is older."""
        return 8 if self.tokens == maps.ROWS else 4

    @property
    def lane_weights(self) -> int:
        """Weights of a lane in one run of the loop's body."""
        return maps.TILES * self.ahead * 8 * maps.LANE_BYTES // self.bits

    @property
    def turns(self) -> int:
        """Of one run of the loop's body."""
        return self.ahead // self.chunk

    @property
    def bodies(self) -> int:
        """Runs of the loop's body; weights beyond the last piece are zeros that take no bandwidth."""
        return -(-self.pieces // (self.ahead * self.split))

    @property
    def runs(self) -> int:
        """Of activations that go with a lane's 16 bytes of weights."""
        return maps.RUNS[self.bits]

    @property
    def token_units(self) -> int:
        """Units of 16 bytes of one token's activations in a turn."""
        return self.chunk * 4 * self.runs

    @property
    def loads(self) -> int:
        """Of units, by each thread that brings a turn's activations: of the program, or of a wave for itself."""
        return self.tokens * self.token_units * self.split // (WAVES * maps.WAVE)

    @property
    def height(self) -> int:
        """Tokens of a tile."""
        return min(self.tokens, maps.ROWS)

    @property
    def run_words(self) -> int:
        """Of LDS that the lanes of a wave read at once."""
        return 4 * self.height * maps.LANE_WORDS

    @property
    def buffer_words(self) -> int:
        """Of the activations of a turn."""
        return self.chunk * self.token_tiles * self.runs * self.run_words

    @property
    def tile_words(self) -> int:
        """Of the weights of 16 rows."""
        return self.pieces * QUAD

    @property
    def multiplier_words(self) -> int:
        """Of 16 bits, of the multipliers of 16 rows."""
        return self.pieces // maps.PACKED * maps.WAVE

    @property
    def lds_bytes(self) -> int:
        """Two buffers of a program's activations in turns; or each wave's own, and later its sums."""
        if self.split == 1:
            return 4 * 2 * self.buffer_words
        return 4 * WAVES * max(self.buffer_words, maps.TILES * QUAD)
