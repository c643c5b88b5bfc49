"""How much arithmetic a step takes, counted from shapes: the numerator of MFU and the ground of `paligemma plan`.

Model FLOPs: what the mathematics needs, a multiplication and an addition each counted, without what activation
checkpointing computes again. A product y = xW costs 2·n·in·out forward; backward the same for the gradient of x, where
something below it is trained, and once more for the gradient of W, where W is. Attention over S tokens of which a row
sees all: 4·S²·width per layer forward, twice that backward.
"""

# P image tokens · S tokens of a row · D decoder width · V table rows

from collections.abc import Callable
from dataclasses import dataclass

from paligemma.config import PaliGemmaConfig

Trained = Callable[[str], bool]  # component ("vision", "projector", "text", "embedding") -> whether its weights move


@dataclass(frozen=True)
class Work:
    """FLOPs of one step.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def step_work(
    config: PaliGemmaConfig,
    *,
    n_images: int,
    n_rows: int,
    row_length: int,
    n_targets: int,
    trained: Trained = lambda _component: True,
    adapter_values: int = 0,
) -> Work:
    """FLOPs of a step.

    Args:
        n_images: pictures through the tower.
        n_rows, row_length: of the decoder's input, image tokens included.
        n_targets: tokens whose logits are computed.
        trained: which components' weights move; adapters on a component count in `adapter_values`, not here.
        adapter_values: LoRA parameters in the decoder, each used once per token.
    """
    vision, text = config.vision, config.text
    patches = n_images * vision.n_image_tokens
    tower = patches * (
        3 * vision.patch_size**2 * vision.width
        + vision.depth * (4 * vision.width**2 + 2 * vision.width * vision.mlp_dim)
    )
    tower_attention = vision.depth * n_images * 2 * vision.n_image_tokens**2 * vision.width
    projector = patches * vision.width * text.width
    heads = (text.n_heads + 2 * text.n_kv_heads) * text.head_dim
    per_token = text.depth * (
        text.width * heads + text.n_heads * text.head_dim * text.width + 3 * text.width * text.mlp_dim
    )
    tokens = n_rows * row_length
    decoder = tokens * per_token
    decoder_attention = text.depth * n_rows * 2 * row_length**2 * text.n_heads * text.head_dim
    adapters = tokens * adapter_values
    head = n_targets * text.width * text.vocab_size

    forward = 2.0 * (tower + tower_attention + projector + decoder + decoder_attention + adapters + head)
    below_projector = trained("vision")
    below_decoder = below_projector or trained("projector") or trained("embedding") or bool(adapter_values)
    backward = 0.0
    backward += tower * (2 if trained("vision") else 0) + tower_attention * (2 if trained("vision") else 0)
    backward += projector * (below_projector + trained("projector"))
    in_decoder = below_decoder or trained("text")
    backward += decoder * (in_decoder + trained("text")) + decoder_attention * 2 * in_decoder
    backward += adapters * 2
    backward += head * (in_decoder + trained("embedding"))
    return Work(forward, 2.0 * backward)
