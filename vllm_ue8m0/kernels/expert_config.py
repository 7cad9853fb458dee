"""Launch configurations of the sm_90 experts, by rules.

What decides is how many rows an expert is expected to get, from numbers that the host knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..layouts import ceil_div
from .hopper_config import HALF_SHARED_BYTES, SHARED_BYTES

# Most expected rows of an expert for tiles of so many; more is for expert_prefill. H100,
# 2026-11-23, 256 experts of 2048, 512, 768 and 1,024 tokens: in tiles of 32 3,950 us, -, 4,534; of
# 64 4,114, 4,186 and 4,249; by expert_prefill 4,003, 4,058 and 4,113. Those of tiles by
# expert_decode, before expert_chain.
TOKENS = ((9, 16), (22, 32))
LEAST_ROWS = 8
PREFILL_ROWS = 128
# Most expected rows of an expert where a second tile of it is rare. Two tiles read its weights from
# L2, whose own bandwidth is less than twice the memory's.
FEW_ROWS = 2
# Of an expert that needs no tall ones. Their two launches mostly have nothing to do, take 3.5 us,
# and hold SMs that shared experts would have. H200, 2026-11-30, 64 tokens, us without and with: 256
# experts of 2048 2,246 and 2,245, skewed 1,570 and 1,566, all on the same eight 180 and 115; 32 of
# 256, skewed, 344 and 346.
MOST_TILES = 4
MOST_TOPK = 16  # of one token without sorting
MAX_STAGES = 4
CHAIN_WARPS = 8  # of expert_chain that multiply
# Of a thread of it at the launch. They leave room for small kernels of shared experts, which else
# wait for its end: with 168 a layer's norm came 7.4, 8.2 and 11.2 us after it for 1, 16 and 64
# tokens, with 128 6.4, 5.4 and 9.1 (traces, H200, 2026-11-30).
CHAIN_REGISTERS = 128


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
    """rows: of a tile. gated, down: of expert_decode; chain: ring stages of expert_chain; else
    expert_prefill.

    one_token: every slot of the only token is a tile. tall: most tiles of an expert without tall
    ones, 0: there are none. least_tall: least tiles that tall ones take the place of.
    """

    rows: int
    gated: Product | None = None
    down: Product | None = None
    one_token: bool = False
    chain: int | None = None
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


def chain_bytes(stages: int, rows: int, NK: int, scale_bytes: int) -> int:
    """Shared memory of expert_chain: ring, scales of w, a layout's change. NK: the longer K's."""
    stage = 2 * 128 * 128 + 128 * (rows + scale_bytes)
    return stages * stage + 16 * (1 << (NK - 1).bit_length()) + 128 * rows * 4 + 512


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
    rows = LEAST_ROWS if M <= LEAST_ROWS else fitting[0]
    active = E * min(1.0, topk / num_global)
    # One token's gated units fill the SMs in expert_chain, or parts of K do in two launches. H200,
    # 2026-11-29, us by chain and by two: 256 experts of 2048 (128 units) 91.4 and 94.8, of 256 (16)
    # 35.6 and 21.2; 32 of 256 of 2048 (16) 37.4 and 36.7.
    filled = active * ceil_div(inner, 128) >= 0.9 * sms
    if M == 1 and topk <= MOST_TOPK and not filled:
        splits = 1 if invariant else gated_splits(active, H, inner, sms)
        return _two_launches(rows, H, inner, scale_bytes, splits, True, sms)
    config = ExpertsConfig(rows, chain=_chain_stages(rows, H, inner, scale_bytes))
    tall, least = (1 if expected <= FEW_ROWS else 2), sms // ceil_div(inner, 128) + 1
    popular = min(E, M * topk // (tall * rows + 1))  # at most
    if MOST_TILES * rows >= M or most_tiles(M * topk, popular, rows) < least:
        return config
    return replace(config, tall=tall, least_tall=least)


def batched_config(T: int, H: int, inner: int, scale_bytes: int, sms: int) -> ExpertsConfig:
    """For experts with room for T rows each; how many they use is not known."""
    rows = 16 if T <= 16 else 32 if T <= 32 else 64
    return _two_launches(rows, H, inner, scale_bytes, 1, False, sms)


def _chain_stages(rows: int, H: int, inner: int, scale_bytes: int) -> int:
    """As many as an SM has room for, in one program of eight warps.

    H200, 2026-11-29, us with four stages and with three: 256 experts of 256, 16 tokens 143.3 and
    147.1; 32 experts of 2048, 16 tokens 146.1 and 150.1; 256 of 2048, 8 and 32 tokens 574 and 588,
    1,627 and 1,654. In one program and in two of four warps: 256 of 256, 16, 32 and 128 tokens
    143.3, 226.0, 353.1 and 150.9, 228.9, 354.9; 256 of 1024, 16 and 64 tokens 521, 1,126 and 537,
    1,159.
    """
    stages, NK = MAX_STAGES, ceil_div(max(H, inner), 128)
    while chain_bytes(stages, rows, NK, scale_bytes) > SHARED_BYTES:
        stages -= 1
    assert stages > 1, f"rings of {rows} rows and scales of {NK} blocks of K fit no SM"
    return stages


def _two_launches(
    rows: int, H: int, inner: int, scale_bytes: int, splits: int, one_token: bool, sms: int
) -> ExpertsConfig:
    """Of expert_decode."""

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
    # Eight warps of an SM multiply, in two programs, whose waiting differs; 64 rows have registers
    # for one. H100, 2026-11-23, 256 experts of 2048, 512 tokens: 3,974 us, in one program 4,001.
    each = 2 if rows <= 32 else 1
    columns = 128 if rows > 16 else 64
    down = deepest(Product(columns, 1, 1, each * sms, 8 // each), False)
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
