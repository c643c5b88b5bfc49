"""The two packages behind one interface, so that one loop measures both.

Both get the same pixels, ids and image features, run without gradients, keep their default attention and cache, and
compute logits for the last position only. The peer is called layer by layer below `generate`, whose bookkeeping per
token would only slow it down.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

N_TEXT = 4  # bos, two words, the separator
FIRST_TOKEN = 1000  # ids of the prompt and of the fed answer; any word of the vocabulary costs the same


class Side(Protocol):
    """One package with a loaded model."""

    n_image_tokens: int
    resolution: int

    def load(self, folder: Path, dtype: torch.dtype) -> None: ...

    def encode_image(self, pixels: Tensor) -> Tensor:
        """float[B, 3, R, R] -> image features float[B, P, D]."""

    def prefill(self, image_embeds: Tensor, n_new: int) -> tuple[Tensor, Any]:
        """Image features and a short prompt -> logits [B, V] of the next token, and the cache."""

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """int64[B] -> logits [B, V] of the next token."""


class Ours:
    """This package."""

    def load(self, folder: Path, dtype: torch.dtype) -> None:
        from paligemma.api.loading import fill
        from paligemma.checkpoints import open_checkpoint
        from paligemma.models.paligemma import PaliGemmaModel

        with open_checkpoint(folder) as checkpoint:
            model = PaliGemmaModel(checkpoint.config, device="meta", dtype=dtype)
            self.model = fill(model, checkpoint, torch.device("cpu")).eval()
        self.dtype = dtype
        self.n_image_tokens = self.model.config.vision.n_image_tokens
        self.resolution = self.model.config.vision.resolution

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.embed_image(pixels)

    def prefill(self, image_embeds: Tensor, n_new: int) -> tuple[Tensor, Any]:
        from paligemma.models.kv_cache import KVCache

        batch, n_image = image_embeds.shape[:2]
        tokens = torch.full((batch, n_image + N_TEXT), FIRST_TOKEN)
        mask_image = (torch.arange(n_image + N_TEXT) < n_image).expand(batch, -1)
        cache = KVCache.allocate(self.model.config.text, batch, n_image + N_TEXT + n_new, dtype=self.dtype)
        logits = self.model.prefill(
            tokens,
            image_embeds=image_embeds,
            mask_image=mask_image,
            mask_ar=torch.zeros_like(tokens),
            mask_input=torch.ones_like(tokens, dtype=torch.bool),
            cache=cache,
        )
        return logits, cache

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        return self.model.decode_step(tokens, cache)


class Peer:
    """Hugging Face transformers."""

    def load(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import PaliGemmaForConditionalGeneration

        self.model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        vision = self.model.config.vision_config
        self.n_image_tokens = (vision.image_size // vision.patch_size) ** 2
        self.resolution = vision.image_size

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixels).pooler_output
        return features

    def prefill(self, image_embeds: Tensor, n_new: int) -> tuple[Tensor, Any]:
        from transformers import DynamicCache
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        batch, n_image = image_embeds.shape[:2]
        tokens = torch.full((batch, n_image + N_TEXT), FIRST_TOKEN)
        tokens[:, :n_image] = self.model.config.image_token_id
        cache = DynamicCache(config=self.model.config.get_text_config())
        out = self.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            token_type_ids=torch.zeros_like(tokens),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image_embeds)},
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], cache

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        logits: Tensor = self.model(
            input_ids=tokens[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits[:, -1]


SIDES: dict[str, type[Ours] | type[Peer]] = {"paligemma": Ours, "transformers": Peer}
