"""The turbo codec in NumPy: the same bits as the C reference (ggml_turbo/format), without compiling anything.

It is the independent implementation that the C code is tested against: the two have only the tables in common.
For speed use `turboquant_gguf.quantize`, which goes through the C library.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..turbo_tables import TABLES

BLOCK = 64
SCALE_BIAS = 40
MAX_INPUT = np.float32(2.0**29)
AROUND_GUESS = (np.float32(0.94), np.float32(1.06))
RENORMALIZE = 16
STATES = np.arange(256)


@dataclass(frozen=True)
class Codec:
    """One type: `bits` a value, the encoder's scale factors, and the codebook of 256 trellis states (int64)."""

    bits: int
    rms_to_scale: np.float32
    max_to_scale: np.float32
    mse: float
    codebook: np.ndarray

    @property
    def name(self) -> str:
        return f"turbo{self.bits}"

    @property
    def block_bytes(self) -> int:
        return 2 + self.bits * BLOCK // 8


@cache
def codecs() -> dict[str, Codec]:
    """Codecs by name, from the smallest type to the most exact."""
    return {
        table.name: Codec(
            table.bits,
            np.float32(table.rms_to_scale),
            np.float32(table.max_to_scale),
            table.mse,
            np.array([table.a[s & 15] + table.b[s >> 4 ^ table.p[s & 15]] for s in STATES], np.int64),
        )
        for table in TABLES
    }


# ---- decoder ----


def states_of(codec: Codec, blocks: np.ndarray) -> np.ndarray:
    """Trellis states (n, 64) of blocks, uint8 (n, block_bytes): value i's are the 8 bits from 8 + k(i+1) on."""
    padded = np.pad(blocks, ((0, 0), (0, 1))).astype(np.int64)
    bit = 8 + codec.bits * (np.arange(BLOCK) + 1)
    return (padded[:, bit // 8] | padded[:, bit // 8 + 1] << 8) >> bit % 8 & 255


def scales_of(codec: Codec, blocks: np.ndarray) -> np.ndarray:
    """Scales (n,) float32 of blocks, uint8 (n, block_bytes)."""
    codes = (blocks[:, 0].astype(np.int64) | blocks[:, 1].astype(np.int64) << 8) & (1 << 8 + codec.bits) - 1
    return scale_values(codec, codes)


def scale_values(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """Minifloats with 6 bits of exponent and k+2 bits of mantissa; code 0 is zero."""
    steps = 1 << codec.bits + 2
    values = np.ldexp(1.0 + codes % steps / steps, codes // steps - SCALE_BIAS).astype(np.float32)
    return np.where(codes == 0, np.float32(0), values)


def scale_ends(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """Scales (n,) float32 halfway between those of these codes and of the next; below code 1's is 2^-40 here, not 0."""
    steps = 2 << codec.bits + 2
    halves = 2 * codes + 1
    return np.ldexp(1.0 + halves % steps / steps, halves // steps - SCALE_BIAS).astype(np.float32)


def dequantize_blocks(codec: Codec, blocks: np.ndarray) -> np.ndarray:
    """float32 (n, 64) from blocks, uint8 (n, block_bytes)."""
    return scales_of(codec, blocks)[:, None] * codec.codebook[states_of(codec, blocks)].astype(np.float32)


# ---- encoder ----


def scale_codes(codec: Codec, scales: np.ndarray) -> np.ndarray:
    """Nearest codes to scales >= 0, float32, saturating at both ends."""
    mantissa = codec.bits + 2
    bits = scales.astype(np.float32).view(np.uint32).astype(np.int64)
    codes = (bits + (1 << 22 - mantissa) >> 23 - mantissa) - (127 - SCALE_BIAS << mantissa)
    return np.clip(codes, 0, (1 << 6 + mantissa) - 1)


def sanitize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (n, 64) without NaN, infinities and what overflows, and the largest magnitudes (n,)."""
    magnitude = np.abs(x)
    largest = np.where(magnitude < np.inf, magnitude, np.float32(0)).max(axis=1)
    largest = np.minimum(largest, MAX_INPUT)
    clean = np.where(np.isnan(x), np.float32(0), x)
    return np.clip(clean, -largest[:, None], largest[:, None]), largest


def energies(x: np.ndarray) -> np.ndarray:
    """Sums of squares (n,) of x (n, 64); the order of the sum is part of the definition."""
    squares = (x * x).reshape(-1, 4, 16)
    total = ((squares[:, 0] + squares[:, 1]) + squares[:, 2]) + squares[:, 3]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def targets_of(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """x (n, 64) in codebook units with 8 fractional bits."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a zero scale is a zero block, dealt with by the caller
        scaled = x * (np.float32(256) / scales)[:, None]
    return np.rint(np.clip(np.nan_to_num(scaled), -32767, 32767)).astype(np.int64)


def step_costs(codec: Codec, target: np.ndarray) -> np.ndarray:
    """Costs (n, 256) of every state for targets (n,)."""
    distance = np.clip(target[:, None] - 256 * codec.codebook[None, :], -32768, 32767)
    return distance * distance + (1 << 14) >> 15


def search(codec: Codec, targets: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Viterbi search over targets (n, 64): total costs (n,) and, for each value, the costs by shared bits."""
    shared = 1 << 8 - codec.bits
    best = [np.zeros((len(targets), shared), np.int64)]
    total = np.zeros(len(targets), np.int64)
    for i in range(BLOCK):
        costs = path_costs(codec, targets, best, i)
        smallest = costs.reshape(len(targets), shared, 1 << codec.bits).min(axis=2)
        if (i + 1) % RENORMALIZE == 0:
            removed = smallest.min(axis=1)
            smallest -= removed[:, None]
            total += removed
        best.append(smallest)
    return total, best


def path_costs(codec: Codec, targets: np.ndarray, best: list[np.ndarray], i: int) -> np.ndarray:
    shared = 1 << 8 - codec.bits
    return np.minimum(best[i][:, STATES % shared] + step_costs(codec, targets[:, i]), 65535)


def traceback(codec: Codec, targets: np.ndarray, best: list[np.ndarray]) -> np.ndarray:
    """States (n, 64) of the best paths."""
    states = np.empty(targets.shape, np.int64)
    first, count = np.zeros(len(targets), np.int64), 256
    for i in reversed(range(BLOCK)):
        candidates = first[:, None] + np.arange(count)
        costs = np.take_along_axis(path_costs(codec, targets, best, i), candidates, axis=1)
        states[:, i] = first + costs.argmin(axis=1)
        first, count = (states[:, i] << codec.bits) % 256, 1 << codec.bits
    return states


def fit_scales(codec: Codec, energy: np.ndarray, states: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Codes of the scales with which the chosen states have this energy (n,), float32, found bit by bit."""
    entries = codec.codebook[states]
    cc = (entries * entries).sum(axis=1).astype(np.float32)
    fitted = np.zeros_like(codes)
    for bit in reversed(range(8 + codec.bits)):
        tried = fitted + (1 << bit)
        begin = scale_ends(codec, tried - 1)
        fitted = np.where(energy >= begin * begin * cc, tried, fitted)
    return np.where(cc > 0, fitted, codes)


def pack(codec: Codec, codes: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Blocks, uint8 (n, block_bytes), of scale codes (n,) and states (n, 64)."""
    start = states[:, 0] & (1 << 8 - codec.bits) - 1
    header = codes | start << 8 + codec.bits
    values = states >> 8 - codec.bits
    bits = np.concatenate(
        [
            header[:, None] >> np.arange(16) & 1,
            (values[:, :, None] >> np.arange(codec.bits) & 1).reshape(len(states), -1),
        ],
        axis=1,
    )
    return np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")


def quantize_blocks(codec: Codec, x: np.ndarray) -> np.ndarray:
    """Blocks, uint8 (n, block_bytes), of x, float32 (n, 64)."""
    clean, largest = sanitize(x)
    energy = energies(clean)
    rms = np.sqrt(energy / np.float32(BLOCK))
    guess = np.maximum(rms * codec.rms_to_scale, largest * codec.max_to_scale)
    tries = []
    for factor in AROUND_GUESS:
        codes = scale_codes(codec, guess * factor)
        scales = scale_values(codec, codes)
        targets = targets_of(clean, scales)
        total, best = search(codec, targets)
        states = traceback(codec, targets, best)
        blocks = pack(codec, fit_scales(codec, energy, states, codes), states)
        tries.append((total.astype(np.float32) * (scales * scales), codes, blocks))
    (error0, code0, blocks0), (error1, code1, blocks1) = tries
    blocks = np.where((error1 < error0)[:, None], blocks1, blocks0)
    return np.where(((code0 == 0) | (code1 == 0))[:, None], np.uint8(0), blocks)
