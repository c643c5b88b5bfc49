"""The shape of a model and every choice on which its references disagree: frozen, validated values.

Sizes come from Tables 1 of the Gemma and Gemma 2 reports and from the SigLIP So400m/14 definition; `presets.py` holds
the published combinations. Where big_vision (the JAX original, "bv") and transformers ("hf") compute different numbers,
the choice is one named field here, with both values and their source in its comment.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from paligemma.errors import ConfigError, nearest

Resize = Literal["hf_bicubic", "bv_bilinear", "bv_bilinear_aa", "float_bilinear_aa"]
Separator = Literal["apart", "joint"]
SpecialTokens = Literal["text", "parse"]
Alpha = Literal["drop", "white"]
MaskEdges = Literal["cut", "round"]
FinalCap = Literal["everywhere", "later_steps"]
EmbedScale = Literal["table_dtype", "float32", "bfloat16"]
Beams = Literal["bv", "hf"]


def _one_of(owner: str, name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        choices = ", ".join(get_args(allowed))
        raise ConfigError(
            f"{owner}.{name}={value!r}: expected one of {choices}.{nearest(str(value), get_args(allowed))}"
        )


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{type(owner).__name__}.{name}={value!r}: expected a positive whole number.")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """One SigLIP image tower without its pooling head."""

    width: int
    depth: int
    mlp_dim: int
    n_heads: int
    resolution: int
    patch_size: int = 14
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _positive(self, "width", "depth", "mlp_dim", "n_heads", "resolution", "patch_size")
        if self.width % self.n_heads:
            raise ConfigError(f"VisionConfig.n_heads={self.n_heads} does not divide width={self.width}.")
        if self.resolution < self.patch_size:
            raise ConfigError(
                f"VisionConfig.resolution={self.resolution} is smaller than one patch of {self.patch_size}."
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.n_heads

    @property
    def grid(self) -> int:
        """Patches per side; pixels beyond the last whole patch are unused (384 px: 27 patches, 6 px unused)."""
        return self.resolution // self.patch_size

    @property
    def n_image_tokens(self) -> int:
        return self.grid * self.grid


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """One Gemma or Gemma 2 decoder; sizes from Table 1 of the Gemma and Gemma 2 reports.

    `vocab_size` is the number of rows of the embedding table: 257152 in big_vision files, 257216 in Hugging Face
    folders, whose last 64 rows are filler.
    """

    width: int
    depth: int
    mlp_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int  # given, never derived: width // n_heads is wrong for Gemma 2
    vocab_size: int
    post_norms: bool  # Gemma 2: norms on both sides of attention and MLP
    query_pre_attn_scalar: (
        float  # queries are scaled by this to the power -0.5; 27B: 144 = width / n_heads, not head_dim
    )
    attn_logits_softcap: float | None = None  # Gemma 2: 50
    final_logits_softcap: float | None = None  # Gemma 2: 30; a transfer recipe may turn it off
    sliding_window: int | None = None  # hf PaliGemma 2: 4096 on layers 0, 2, 4, …; bv: none
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    # Where the final cap acts. hf: on every logit, also in the loss ("everywhere"). bv: on decode steps from the second
    # on, not on the first generated token nor in the loss ("later_steps"). "everywhere" keeps them consistent.
    final_cap: FinalCap = "everywhere"
    # sqrt(width) is rounded to the dtype of the table (bv and hf alike, "table_dtype"), or to a named one whatever the
    # table: "float32" keeps it exact, "bfloat16" repeats a bfloat16 table that was cast up after loading.
    embed_scale: EmbedScale = "table_dtype"

    def __post_init__(self) -> None:
        _positive(self, "width", "depth", "mlp_dim", "n_heads", "n_kv_heads", "head_dim", "vocab_size")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"TextConfig.n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}: each key/value head "
                "must serve equally many query heads. Gemma 2 2B uses 8 and 4."
            )
        if self.head_dim % 2:
            raise ConfigError(f"TextConfig.head_dim={self.head_dim} is odd: rotary positions need pairs.")
        for name in ("attn_logits_softcap", "final_logits_softcap", "sliding_window"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"TextConfig.{name}={value}: expected a positive number, or None for off.")
        if self.query_pre_attn_scalar <= 0:
            raise ConfigError(f"TextConfig.query_pre_attn_scalar={self.query_pre_attn_scalar}: expected > 0.")
        _one_of("TextConfig", "final_cap", self.final_cap, FinalCap)
        _one_of("TextConfig", "embed_scale", self.embed_scale, EmbedScale)

    @property
    def query_scale(self) -> float:
        return float(self.query_pre_attn_scalar**-0.5)

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer sees only a window; even layers do, as in Gemma 2."""
        return self.sliding_window is not None and layer % 2 == 0


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """Ids with a meaning. `n_tokens` counts the real vocabulary; rows of the table beyond it are filler."""

    n_tokens: int = 257_152
    pad: int = 0
    eos: int = 1
    bos: int = 2
    unk: int = 3
    loc_start: int = 256_000  # <loc0000>; 1,024 of them
    seg_start: int = 257_024  # <seg000>; 128 of them
    image: int = 257_152  # hf's <image>; never looked up in the table

    n_loc: int = 1024
    n_seg: int = 128


@dataclass(frozen=True, kw_only=True)
class ProcessingConfig:
    """How pictures and prompts become numbers. The references disagree on every field."""

    # hf_bicubic: Pillow bicubic, rounded uint8 (SiglipImageProcessor). bv_bilinear[_aa]: TF bilinear without / with
    # antialias, truncated to uint8 (big_vision resize op). float_bilinear_aa: kept in float (fine-tuning notebook).
    resize: Resize = "hf_bicubic"
    alpha: Alpha = "drop"  # bv and older hf drop alpha, keeping the colour beneath; transformers 5 composites on white
    exif_orientation: bool = True  # bv ignores it; applied only to files and bytes that we decode ourselves
    separator: Separator = "apart"  # bv tokenises "\n" on its own ("apart"), hf together with the prompt ("joint")
    special_tokens: SpecialTokens = "text"  # "<eos>" inside a prompt: plain characters (bv) or the control id (hf)
    # A mask is pasted into a box of whole pixels: its edges rounded (the published demo), or their fractions cut off
    # (big_vision's evaluator), which moves half of all edges by a pixel.
    mask_edges: MaskEdges = "round"

    def __post_init__(self) -> None:
        _one_of("ProcessingConfig", "resize", self.resize, Resize)
        _one_of("ProcessingConfig", "alpha", self.alpha, Alpha)
        _one_of("ProcessingConfig", "separator", self.separator, Separator)
        _one_of("ProcessingConfig", "special_tokens", self.special_tokens, SpecialTokens)
        _one_of("ProcessingConfig", "mask_edges", self.mask_edges, MaskEdges)


@dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig:
    """A whole model: image tower, projector (one affine map, vision.width to text.width), decoder, and its choices."""

    vision: VisionConfig
    text: TextConfig
    tokens: TokenConfig = field(default_factory=TokenConfig)
    processing: ProcessingConfig = field(default_factory=ProcessingConfig)
    beams: Beams = "bv"  # which beam search `n_beams > 1` means
    name: str = ""  # the preset or repository this came from; for people, never for decisions

    def __post_init__(self) -> None:
        _one_of("PaliGemmaConfig", "beams", self.beams, Beams)
        if self.text.vocab_size < self.tokens.n_tokens:
            raise ConfigError(
                f"text.vocab_size={self.text.vocab_size}: expected at least as many rows as there are tokens, "
                f"tokens.n_tokens={self.tokens.n_tokens}."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PaliGemmaConfig":
        """Inverse of `to_dict`; an unknown field is refused by name."""
        parts = {"vision": VisionConfig, "text": TextConfig, "tokens": TokenConfig, "processing": ProcessingConfig}
        known: dict[str, Any] = {}
        for key, value in values.items():
            part = parts.get(key)
            known[key] = _build(part, value, key) if part else value
        config: PaliGemmaConfig = _build(cls, known, "config")
        return config


def _build(cls: Any, values: dict[str, Any], where: str) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}.{key} is not a field of {cls.__name__}.{nearest(key, names)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
