"""Launch configurations of the sm_90 experts, by rules.

What decides is how many rows an expert is expected to get, from numbers that the host knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..layouts import ceil_div
from .hopper_config import HALF_SHARED_BYTES, SHARED_BYTES

# Most expected rows of an expert for tiles of so many; more is for expert_prefill. H100,
# 2026-11-23, 256 experts of 2048, 512, 768 and 1,024 tokens: in tiles of 32 3,950 us, -, 4,534; of
# 64 4,114, 4,186 and 4,249; by expert_prefill 4,003, 4,058 and 4,113.
TOKENS = ((9, 16), (22, 32))
LEAST_ROWS = 8
PREFILL_ROWS = 128
# Most expected rows of an expert where a second tile of it is rare. Two tiles read its weights from
# L2, whose own bandwidth is less than twice the memory's.
FEW_ROWS = 2
MOST_TOPK = 16  # of one token without sorting
MAX_STAGES = 4
LONG_WAVES = 3


@dataclass(frozen=True)
class Product:
    """expert_decode: rows of w a tile, ring stages, parts of K, programs (a multiple of those).

    warps: that multiply, four for each 64 or 128 rows of w.
    """

    block_n: int
    stages: int
    splits: int
    programs: int
    warps: int


@dataclass(frozen=True)
class ExpertsConfig:
    """rows: of a tile. gated, down: of expert_decode; None: expert_prefill.

    one_token: every slot of the only token is a tile. tall: most tiles of an expert without tall
    ones, 0: there are none. least_tall: least tiles that tall ones take the place of.
    """

    rows: int
    gated: Product | None = None
    down: Product | None = None
    one_token: bool = False
    tall: int = 0
    least_tall: int = 0


def most_tiles(slots: int, num_experts: int, rows: int) -> int:
    """Every expert with rows has at most one tile that is not full."""
    return min(slots, (slots + num_experts * (rows - 1)) // rows)


def part_blocks(NK: int, step: int, splits: int) -> int:
    """A power of two, at least the blocks of K of any part, which has whole stages of `step`."""
    return 1 << (step * ceil_div(ceil_div(NK, step), splits) - 1).bit_length()


def shared_bytes(
    product: Product, rows: int, NK: int, gated: bool, one_token: bool, scale_bytes: int
) -> int:
    """Shared memory of expert_decode: ring, one token's codes, scales of w, a layout's change."""
    step, fused = 1 if gated else 2, gated and one_token
    blocks = part_blocks(NK, step, product.splits)
    stage = 2 * 128 * product.block_n + (0 if fused else step * 128 * (rows + scale_bytes))
    token = blocks * rows * (128 + 4) if fused else 0
    return product.stages * stage + token + 16 * blocks + product.block_n * rows * 4 + 256


def registers(rows: int) -> int:
    """Of a thread of expert_decode at the launch."""
    return 128 if rows < 64 else 168


def prefill_bytes(stages: int, scale_bytes: int, gated: bool) -> int:
    """Shared memory of expert_prefill: ring, a layout's change of 64 x 128 16-bit results, up."""
    return stages * 128 * (3 * 128 + scale_bytes) + (2 if gated else 1) * 64 * 128 * 2 + 256


def experts_config(
    M: int, topk: int, E: int, num_global: int, H: int, inner: int, scale_bytes: int,
    invariant: bool, sms: int,
) -> ExpertsConfig:  # fmt: skip
    """num_global: experts that topk_ids choose from, of which E are here; inner: their width."""
    expected = max(1.0, M * topk / num_global)
    fitting = [tokens for most, tokens in TOKENS if expected <= most]
    if not fitting:
        return ExpertsConfig(PREFILL_ROWS)
    one_token = M == 1 and topk <= MOST_TOPK
    rows = LEAST_ROWS if M <= LEAST_ROWS else fitting[0]
    divided = one_token and not invariant
    active = E * (1 - (1 - min(1.0, topk / num_global)) ** M)  # of uniform routing
    splits = gated_splits(active, H, inner, sms) if divided else 1
    waves = active * ceil_div(inner, 128) / sms
    config = _few_rows(rows, H, inner, scale_bytes, splits, one_token, waves, sms)
    tall, least = (1 if expected <= FEW_ROWS else 2), sms // ceil_div(inner, 128) + 1
    popular = min(E, M * topk // (tall * rows + 1))  # at most
    if tall * rows >= M or most_tiles(M * topk, popular, rows) < least:
        return config
    return replace(config, tall=tall, least_tall=least)


def batched_config(T: int, H: int, inner: int, scale_bytes: int, sms: int) -> ExpertsConfig:
    """For experts with room for T rows each; how many they use is not known."""
    rows = 16 if T <= 16 else 32 if T <= 32 else 64
    return _few_rows(rows, H, inner, scale_bytes, 1, False, 0, sms)


def _few_rows(
    rows: int, H: int, inner: int, scale_bytes: int, splits: int, one_token: bool, waves: float,
    sms: int,
) -> ExpertsConfig:  # fmt: skip
    """waves: units of the gated product for an SM, as far as known."""

    def deepest(product: Product, gated: bool) -> Product:
        """As many stages as half an SM has room for, two at least."""
        NK = ceil_div(H if gated else inner, 128)
        for stages in range(MAX_STAGES, 1, -1):
            product = replace(product, stages=stages)
            used = shared_bytes(product, rows, NK, gated, one_token, scale_bytes)
            if used <= HALF_SHARED_BYTES:
                break
        assert used <= SHARED_BYTES, f"{product} of {rows} rows fits no SM"
        return product

    gated = deepest(Product(128, 1, splits, sms // splits * splits, 8), True)
    # Where the stream is long, fewer stages. H100, 2026-11-23, with three and with two: 256 experts
    # of 2048, 32 tokens 2,436 and 2,402 us, 128 tokens 3,763 and 3,706; of 256, 128 tokens (4
    # waves) 516 and 510, 16 tokens (2 waves) 209 and 212.
    if waves >= LONG_WAVES:
        gated = replace(gated, stages=2)
    # Eight warps of an SM multiply, in two programs, whose waiting differs. H100, 2026-11-23, 256
    # experts of 2048, 512 tokens: 3,974 us, in one program 4,001; of 256: 579 and 621. Of 64
    # columns each while units are few: 256 experts of 256, 16, 32, 64 and 128 tokens: 209, 331,
    # 452 and 516 us, of 128 columns 211, 340, 448 and 504. 64 rows have registers for one. Two,
    # three or four stages are the same within 1 %.
    wide = rows > 16 or waves >= LONG_WAVES
    each = 2 if rows <= 32 else 1
    down = deepest(Product(128 if wide else 64, 1, 1, each * sms, 8 // each), False)
    return ExpertsConfig(rows, gated, down, one_token)


def gated_splits(experts: float, H: int, inner: int, sms: int) -> int:
    """Parts of K of the gated product: what fills the SMs for one token's experts.

    At least one and a half units for each: H100, 2026-11-23, 256 experts of 2048: 129 us in two
    parts, 130 whole, 132 in four; of 256: 25.9 in eight, 26.9 in four. More tokens have more
    experts, and adding parts costs more than SMs without work: 256 experts of 256, 8 and 16 tokens:
    130 and 210 us; in eight parts 150 and 250.
    """
    units, splits = max(1.0, experts) * ceil_div(inner, 128), 1
    while units * splits < 1.5 * sms and 8 * splits <= ceil_div(H, 128):
        splits *= 2
    return splits
