"""The whole model: image tower, projector, decoder; the file to read beside the report's figure.

    pixels [I,3,R,R] ── SigLIP ── projector ──▶ image tokens [I,P,D]   (not scaled)
    text ids [B,S] ── table * sqrt(D) ────────▶ with the image tokens written into their slots [B,S,D]
                   ── Gemma ── final norm ────▶ pre-logits ── table ──▶ logits

Sources: PaliGemma report (arXiv 2407.07726) section 3.1; big_vision models/proj/paligemma/paligemma.py.
"""

# B rows · S tokens of a row · I images of the batch · P tokens of an image · D width · V table rows

import torch
from torch import Tensor, nn

from paligemma.config import PaliGemmaConfig
from paligemma.errors import ShapeError
from paligemma.models.attention import Span
from paligemma.models.gemma import GemmaDecoder
from paligemma.models.kv_cache import KVCache
from paligemma.models.linear import Linear
from paligemma.models.siglip import SiglipTower


class PaliGemmaModel(nn.Module):
    """SigLIP, one affine projector, Gemma; a config in, tensors in and out.

    Every call takes a row as `processing.batch.Batch` lays it out, image slots included:

        tokens      int64[B, S]  ids; anything at image slots and padding
        mask_image  bool[B, S]   slots that image tokens fill, in reading order of rows and images
        mask_ar     int[B, S]    1 opens a new block (suffix), 0 stays in it (image, prefix)
        mask_input  bool[B, S]   real tokens; default all
        segment_ids int64[B, S]  the example within the row; default one per row
        positions   int64[B, S]  place within the example; default counts the real tokens of the row

    Parameters are allocated, not initialised: load a checkpoint into them or call `models.init.init_weights`.
    """

    def __init__(
        self,
        config: PaliGemmaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = None if device is None else torch.device(device)
        self.config = config
        self.vision = SiglipTower(config.vision, device=place, dtype=dtype)
        self.projector = Linear(config.vision.width, config.text.width, device=place, dtype=dtype)
        self.text = GemmaDecoder(config.text, device=place, dtype=dtype)

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Image tokens float[I, P, D] of pixels float[I, 3, R, R] in [-1, 1], or of their levels uint8[I, 3, R, R].

        Compute once, reuse for every prompt.
        """
        out: Tensor = self.projector(self.vision(pixels))
        return out

    def embed(self, tokens: Tensor, mask_image: Tensor, image_embeds: Tensor | None) -> Tensor:
        """[B, S, D]: scaled text rows with the image tokens written, unscaled, into the image slots."""
        n_slots = int(mask_image.sum()) if not torch.compiler.is_compiling() else -1
        n_given = 0 if image_embeds is None else image_embeds.shape[0] * image_embeds.shape[1]
        if n_slots not in (-1, n_given):
            raise ShapeError(
                f"{n_slots} image slots but {n_given} image tokens: every image must fill exactly its own slots. "
                "Let the Processor lay out tokens and pixels together."
            )
        # Image slots carry ids that need not exist in the table.
        x = self.text.embed(tokens.masked_fill(mask_image, 0))
        if image_embeds is None:
            return x
        return x.masked_scatter(mask_image[..., None], image_embeds.to(x.dtype))

    def pre_logits(
        self,
        tokens: Tensor,
        *,
        mask_image: Tensor,
        mask_ar: Tensor,
        pixels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_of: Tensor | None = None,
        mask_input: Tensor | None = None,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, S, D] after the final norm; with a cache, the rows' keys and values are kept in it."""
        if image_embeds is None and pixels is not None:
            image_embeds = self.embed_image(pixels)
        if image_embeds is not None and image_of is not None:
            image_embeds = image_embeds[image_of]
        x = self.embed(tokens, mask_image, image_embeds)
        span = make_span(mask_ar, mask_input, segment_ids, positions)
        out: Tensor = self.text(x, span, cache)
        return out

    def forward(
        self,
        tokens: Tensor,
        *,
        mask_image: Tensor,
        mask_ar: Tensor,
        pixels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_of: Tensor | None = None,
        mask_input: Tensor | None = None,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Logits of a whole row at once, with gradients: training, scoring, parity.

        Args:
            pixels: float[I, 3, R, R] in [-1, 1], images in reading order of the rows; or
            image_embeds: float[I, P, D] from `embed_image`, in their place.
            image_of: int64[n], which picture fills each of the n image slots, where several rows share one.
            keep: bool[B, S]; logits only where True, so that 257,152 columns are not computed for image tokens.

        Returns:
            float32[B, S, V], or [n_kept, V] with `keep`. Entry s predicts token s + 1. The final soft cap acts here
            unless `config.text.final_cap` is "later_steps" (big_vision: neither in the loss nor on the first token).
        """
        x = self.pre_logits(
            tokens, mask_image=mask_image, mask_ar=mask_ar, pixels=pixels, image_embeds=image_embeds,
            image_of=image_of, mask_input=mask_input, segment_ids=segment_ids, positions=positions,
        )  # fmt: skip
        return self.text.logits(x if keep is None else x[keep], capped=self.config.text.final_cap == "everywhere")

    def prefill(
        self,
        tokens: Tensor,
        *,
        cache: KVCache,
        mask_image: Tensor,
        mask_ar: Tensor,
        pixels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_of: Tensor | None = None,
        mask_input: Tensor | None = None,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Read prompts into an empty cache; one example per row, padded on either side.

        Returns:
            float32[B, V]: logits of the token after each row's last real one.
        """
        x = self.pre_logits(
            tokens, mask_image=mask_image, mask_ar=mask_ar, pixels=pixels, image_embeds=image_embeds,
            image_of=image_of, mask_input=mask_input, segment_ids=segment_ids, positions=positions, cache=cache,
        )  # fmt: skip
        if mask_input is None:
            last = x[:, -1]
        else:
            slot = torch.arange(x.shape[1], device=x.device)
            last = x[torch.arange(x.shape[0], device=x.device), (slot * mask_input).argmax(dim=1)]
        return self.text.logits(last, capped=self.config.text.final_cap == "everywhere")

    def extend(
        self, tokens: Tensor, cache: KVCache, mask_input: Tensor | None = None, *, capped: bool = True
    ) -> Tensor:
        """Append T tokens to every row of a filled cache; each sees all before it, none after.

        Args:
            tokens: int64[B, T]; `mask_input` bool[B, T] marks the real ones (right-padded suffixes of unlike length).
            capped: whether the final soft cap acts. It does on every decoding step of either reference; a likelihood
                that must equal `forward`'s asks for what `config.text.final_cap` says there.

        Returns:
            float32[B, T, V]: logits of the token after each.
        """
        if mask_input is None:
            mask_input = torch.ones_like(tokens, dtype=torch.bool)
        block = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        span = Span(
            block=block,
            valid=mask_input,
            segment=torch.ones_like(tokens),
            position=cache.next_position[:, None] + block,
        )
        return self.text.logits(self.text(self.text.embed(tokens), span, cache), capped=capped)

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token int64[B] to every row; float32[B, V] logits of the next one."""
        return self.extend(tokens[:, None], cache)[:, 0]


def make_span(mask_ar: Tensor, mask_input: Tensor | None, segment_ids: Tensor | None, positions: Tensor | None) -> Span:
    """Fill in the defaults of a row: all tokens real, one example, positions counting real tokens from 0."""
    valid = torch.ones_like(mask_ar, dtype=torch.bool) if mask_input is None else mask_input.bool()
    if positions is None:
        if segment_ids is not None and bool((segment_ids.amax(dim=1) > 1).any()):
            raise ShapeError("several examples in a row need positions: count them from 0 within each segment.")
        positions = (valid.cumsum(dim=1) - 1).clamp_min(0)
    segment = torch.ones_like(positions) if segment_ids is None else segment_ids
    return Span(block=mask_ar.long().cumsum(dim=1), valid=valid, segment=segment, position=positions)
