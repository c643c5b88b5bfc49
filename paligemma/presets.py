"""Every published size, as values; sizes and their sources are those of `docs/models.md`.

`PRESETS` maps a checkpoint's short name to its configuration with the real vocabulary (257,152 rows). Hugging Face
folders carry 64 filler rows more: `with_table_rows(config, HF_TABLE_ROWS)`.
"""

import dataclasses

from paligemma.config import PaliGemmaConfig, ProcessingConfig, TextConfig, TokenConfig, VisionConfig

N_TOKENS = 257_152
HF_TABLE_ROWS = 257_216  # (N_TOKENS + 1 for <image>) rounded up to a multiple of 64
RAW_GEMMA_ROWS = 256_000
RESOLUTIONS = (224, 448, 896)


def so400m(resolution: int) -> VisionConfig:
    """SigLIP So400m/14 without its pooling head."""
    return VisionConfig(width=1152, depth=27, mlp_dim=4304, n_heads=16, resolution=resolution, patch_size=14)


def gemma_2b(vocab_size: int = N_TOKENS) -> TextConfig:
    return TextConfig(
        width=2048, depth=18, mlp_dim=16_384, n_heads=8, n_kv_heads=1, head_dim=256, vocab_size=vocab_size,
        post_norms=False, query_pre_attn_scalar=256,
    )  # fmt: skip


def gemma2_2b(vocab_size: int = N_TOKENS) -> TextConfig:
    return TextConfig(
        width=2304, depth=26, mlp_dim=9216, n_heads=8, n_kv_heads=4, head_dim=256, vocab_size=vocab_size,
        post_norms=True, query_pre_attn_scalar=256, attn_logits_softcap=50.0, final_logits_softcap=30.0,
    )  # fmt: skip


def gemma2_9b(vocab_size: int = N_TOKENS) -> TextConfig:
    return TextConfig(
        width=3584, depth=42, mlp_dim=14_336, n_heads=16, n_kv_heads=8, head_dim=256, vocab_size=vocab_size,
        post_norms=True, query_pre_attn_scalar=256, attn_logits_softcap=50.0, final_logits_softcap=30.0,
    )  # fmt: skip


def gemma2_27b(vocab_size: int = N_TOKENS) -> TextConfig:
    return TextConfig(
        width=4608, depth=46, mlp_dim=36_864, n_heads=32, n_kv_heads=16, head_dim=128, vocab_size=vocab_size,
        post_norms=True, query_pre_attn_scalar=144, attn_logits_softcap=50.0, final_logits_softcap=30.0,
    )  # fmt: skip


TINY_N_PIECES = 768  # SentencePiece pieces of the embedded tokenizer before the loc and seg tokens
TINY = PaliGemmaConfig(
    vision=VisionConfig(width=192, depth=6, mlp_dim=768, n_heads=6, resolution=112, patch_size=14),
    text=TextConfig(
        width=128, depth=4, mlp_dim=384, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=TINY_N_PIECES + 1152,
        post_norms=True, query_pre_attn_scalar=32, attn_logits_softcap=50.0, final_logits_softcap=30.0,
    ),
    tokens=TokenConfig(
        n_tokens=TINY_N_PIECES + 1152, loc_start=TINY_N_PIECES, seg_start=TINY_N_PIECES + 1024,
        image=TINY_N_PIECES + 1152,
    ),
    processing=ProcessingConfig(resize="float_bilinear_aa"),
    name="tiny",
)  # fmt: skip
TINY_HI = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, resolution=224), name="tiny-hi")
EMBEDDED = ("tiny", "tiny-hi")  # whose weights are inside the package
# A million parameters with the tokenizer of `tiny`: what the studies teach again and again. No weights are published.
STUDY = PaliGemmaConfig(
    vision=VisionConfig(width=96, depth=4, mlp_dim=384, n_heads=4, resolution=84, patch_size=14),
    text=TextConfig(
        width=96, depth=3, mlp_dim=288, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=TINY.text.vocab_size,
        post_norms=True, query_pre_attn_scalar=32, attn_logits_softcap=50.0, final_logits_softcap=30.0,
    ),
    tokens=TINY.tokens,
    processing=TINY.processing,
    name="study",
)  # fmt: skip


def _family(name: str, text: TextConfig) -> dict[str, PaliGemmaConfig]:
    return {
        f"{name}-{resolution}": PaliGemmaConfig(vision=so400m(resolution), text=text, name=f"{name}-{resolution}")
        for resolution in RESOLUTIONS
    }


# The unimodal parts from which stage 0 assembles a model.
VISION_PRESETS: dict[str, VisionConfig] = {f"siglip-so400m-patch14-{r}": so400m(r) for r in (224, 384, 448, 896)}
TEXT_PRESETS: dict[str, TextConfig] = {
    "gemma-2b": gemma_2b(RAW_GEMMA_ROWS),
    "gemma-2-2b": gemma2_2b(RAW_GEMMA_ROWS),
    "gemma-2-9b": gemma2_9b(RAW_GEMMA_ROWS),
    "gemma-2-27b": gemma2_27b(RAW_GEMMA_ROWS),
}
MODEL_PRESETS: dict[str, PaliGemmaConfig] = {
    **_family("paligemma-3b", gemma_2b()),
    **_family("paligemma2-3b", gemma2_2b()),
    **_family("paligemma2-10b", gemma2_9b()),
    **_family("paligemma2-28b", gemma2_27b()),
    "tiny": TINY,
    "tiny-hi": TINY_HI,
}

PRESETS: dict[str, PaliGemmaConfig | VisionConfig | TextConfig] = {**MODEL_PRESETS, **VISION_PRESETS, **TEXT_PRESETS}


def with_table_rows(config: PaliGemmaConfig, rows: int) -> PaliGemmaConfig:
    """The same model with another number of rows in its embedding table."""
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=rows))


def with_softcaps(config: PaliGemmaConfig, *, attn: float | None, final: float | None) -> PaliGemmaConfig:
    """The same model with other soft caps; None turns one off."""
    text = dataclasses.replace(config.text, attn_logits_softcap=attn, final_logits_softcap=final)
    return dataclasses.replace(config, text=text)
