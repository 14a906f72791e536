"""What a compiled product is made for."""

from __future__ import annotations

from dataclasses import dataclass

from . import wave_maps as maps

QUAD = maps.WAVE * maps.LANE_WORDS
"""Words of a piece: of 16 rows of weights, or of 16 activations."""


@dataclass(frozen=True)
class ProductShape:
    """What a compiled kernel is made for. bits: of a weight, 4 or 8. inner: K, a multiple of 16. rows: of the result.
    units: of an expert in its `WaveMatrix`. gated: a unit's tiles are gate and up, and the result is silu(gate) * up;
    else rows of one matrix. tokens: a block's, 16, 64 or 128."""

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
        return self.tokens // maps.ROWS

    @property
    def pieces(self) -> int:
        """Along K."""
        return -(-self.inner // (4 * maps.PIECE[self.bits])) * 4

    @property
    def chunk(self) -> int:
        """Pieces of one turn of the loop: two buffers of its activations stay within half of the LDS."""
        return {1: 4, 4: 2, 8: 1}[self.token_tiles]

    @property
    def runs(self) -> int:
        """Of 16 bytes of activations that go with a lane's 16 bytes of weights."""
        return 2 if self.bits == 4 else 1

    @property
    def chunk_words(self) -> int:
        """Of the activations of a chunk."""
        return self.chunk * self.token_tiles * self.runs * QUAD

    @property
    def tile_words(self) -> int:
        """Of the weights of 16 rows."""
        return self.pieces * QUAD

    @property
    def multiplier_words(self) -> int:
        """Of 16 bits, of the multipliers of 16 rows."""
        return self.pieces // 4 * maps.WAVE

    @property
    def lds_bytes(self) -> int:
        """Of both buffers of activations."""
        return 2 * 4 * self.chunk_words
