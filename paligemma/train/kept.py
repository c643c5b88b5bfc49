"""What autograd keeps of a forward pass until the way back: every tensor of `models/`, in bytes, from shapes alone.

To be read beside `models/gemma.py` and `models/siglip.py`, one line here for each tensor there. The tests count what
torch really saves and hold these lines to it, so that a change of the models shows here.

On a CPU, attention of generation 2 in rows with much padding keeps less than what stands here (`models/runs.py`).

Three things decide how much a layer keeps: what is trained in it, whether anything below it is trained (its input then
needs a gradient), and the dtypes. Under autocast over float32 weights every product casts its input and its weight
anew: q, k and v keep three copies of one input, and the cast weights stay until the way back.
"""

# S slots of a row · D width · N query heads · G = N / K · M MLP width · W tower width · P patches of an image

from collections.abc import Mapping
from dataclasses import dataclass

from paligemma.config import TextConfig, VisionConfig


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One part of a step on its way through the model.

    Attributes:
        rows, length: of the decoder's input, image tokens included; n_images: pictures, over all rows.
        compute: bytes per value of a product's result.
        residual: bytes per value of the stream between blocks.
        is_cast: autocast over float32 weights.
        is_fused: kernels of a GPU, which keep no scores.
    """

    rows: int
    length: int
    n_images: int
    compute: int = 4
    residual: int = 4
    is_cast: bool = False
    is_fused: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class Learns:
    """What is trained in and below one block.

    Attributes:
        weights: leaves of the block whose weights move, such as "attn.q" or "pre_attn_norm".
        ranks: leaves with an adapter, and its rank.
        below: whether the block's input needs a gradient.
        use_dora: whether adapters have a magnitude.
    """

    weights: frozenset[str] = frozenset()
    ranks: Mapping[str, int]
    below: bool
    use_dora: bool = False

    @property
    def anything(self) -> bool:
        return self.below or bool(self.weights) or bool(self.ranks)


def decoder_block(config: TextConfig, learns: Learns, part: Pass) -> float:
    """Bytes that one decoder block keeps."""
    if not learns.anything:
        return 0.0
    D, M = config.width, config.mlp_dim
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    first = _norm("pre_attn_norm", D, learns, part, given=learns.below)
    attended = learns.below or _any(learns, "pre_attn_norm", "attn.q", "attn.k", "attn.v")
    inner = part.compute
    per_token = first + _inputs(("attn.q", "attn.k", "attn.v"), D, (q, kv, kv), part.residual, learns, part)
    per_row = 0.0
    if attended:
        scores, mask = _scores(config, part)
        per_token += q * inner + 2 * kv * inner + scores
        per_row += mask
    per_token += _inputs(("attn.out",), q, (D,), inner, learns, part)
    after = attended or _any(learns, "attn.out")
    if config.post_norms:
        per_token += _norm("post_attn_norm", D, learns, part, given=after)
        after = after or _any(learns, "post_attn_norm")
    per_token += _norm("pre_mlp_norm", D, learns, part, given=after)
    after = after or _any(learns, "pre_mlp_norm")
    per_token += _inputs(("mlp.gate", "mlp.up"), D, (M, M), part.residual, learns, part)
    if after or _any(learns, "mlp.gate", "mlp.up"):
        per_token += 3 * M * inner  # the gate before and after its GELU, and what it multiplies
    per_token += _inputs(("mlp.down",), M, (D,), inner, learns, part)
    if config.post_norms:
        per_token += _norm("post_mlp_norm", D, learns, part, given=True)
    return part.tokens * per_token + part.rows * per_row


def tower_block(config: VisionConfig, learns: Learns, part: Pass) -> float:
    """Bytes that one block of the image tower keeps."""
    if not learns.anything:
        return 0.0
    W, M, c = config.width, config.mlp_dim, part.compute
    norm = part.residual * W + 8  # its input, mean and deviation
    per_patch = float(norm) * (learns.below or _any(learns, "attn_norm"))
    per_patch += _inputs(("attn.q", "attn.k", "attn.v"), W, (W, W, W), part.residual, learns, part)
    per_patch += 4 * W * c + 4 * config.n_heads  # q, k, v, what they mixed, and a float32 per head
    if "attn.out" in learns.ranks and not (part.compute == 4 and not part.is_cast):
        per_patch += _inputs(("attn.out",), W, (W,), c, learns, part)
    per_patch += norm
    per_patch += _inputs(("mlp.up",), W, (M,), part.residual, learns, part)
    per_patch += M * c + _inputs(("mlp.down",), M, (W,), c, learns, part)
    return part.n_images * config.n_image_tokens * per_patch


def cast_weights(values: Mapping[str, int], learns: Learns, part: Pass) -> float:
    """Bytes of the bfloat16 copies that autocast makes of a block's matrices and that the way back needs.

    Args:
        values: leaf -> size of its matrix.
    """
    if not part.is_cast or not learns.anything:
        return 0.0
    # In the lowest block that learns, q, k and v of an adapter have no gradient to pass on.
    first = () if learns.below or "attn.q" in learns.weights else ("attn.q", "attn.k", "attn.v")
    return 2.0 * sum(n for leaf, n in values.items() if leaf not in first)


def _scores(config: TextConfig, part: Pass) -> tuple[float, float]:
    """Bytes per token, and per row, that attention keeps besides queries, keys and values."""
    N, S = config.n_heads, part.length
    groups = N // config.n_kv_heads
    q = N * config.head_dim
    if part.is_fused:
        return q * part.compute + 4 * N, 0.0
    angles = 0.0 if part.residual == part.compute else 4 * config.head_dim / 2 * part.compute
    if config.attn_logits_softcap is None:
        return angles + q * part.compute + 4 * N, groups * S * S * part.compute  # the mask as numbers to be added
    per_score = 8 if part.compute == 4 else 8 + part.compute  # tanh and softmax in float32, the latter cast as well
    return angles + N * S * per_score, groups * S * S


def _norm(leaf: str, width: int, learns: Learns, part: Pass, *, given: bool) -> float:
    """Bytes per token that an RMSNorm keeps: its input in float32, its scale, and the quotient where the gain moves."""
    moves = leaf in learns.weights
    if part.is_fused:
        return (4.0 * width + 4) * (given or moves)
    return (4.0 * width + 4) * given + 4.0 * width * moves


def _inputs(
    leaves: tuple[str, ...], n_in: int, n_out: tuple[int, ...], given: int, learns: Learns, part: Pass
) -> float:
    """Bytes per token that projections of one shared input keep of it, their adapters included.

    Args:
        given: bytes per value of that input.
    """
    moving = [leaf for leaf in leaves if leaf in learns.weights]
    adapted = [(leaf, out) for leaf, out in zip(leaves, n_out, strict=True) if leaf in learns.ranks]
    inside = 2 if part.is_cast else 4  # of an adapter's products; its matrices are float32
    kept = 0.0
    if moving:
        kept += n_in * part.compute * (1 if given == part.compute else len(moving))
    if adapted and given == 4 == inside:
        kept += 0 if moving else n_in * 4
    else:
        kept += n_in * inside * len(adapted)
    for leaf, out in adapted:
        kept += learns.ranks[leaf] * inside
        if learns.use_dora:  # base and update, each times a factor that learns
            kept += 2 * out * part.compute
    return kept


def _any(learns: Learns, *leaves: str) -> bool:
    return any(leaf in learns.weights or leaf in learns.ranks for leaf in leaves)
