"""Pictures -> handles, each new picture through the image tower once."""

from collections.abc import Callable, Sequence

import torch

from paligemma.api.arguments import pictures_of
from paligemma.api.encoded import EncodedImage, Pictures
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.processor import Processor


@torch.no_grad()  # not inference_mode: a handle may take part in training the decoder
def encode(
    model: PaliGemmaModel,
    processor: Processor,
    examples: Sequence[Pictures],
    *,
    adapter: str | None = None,
    check: Callable[[EncodedImage], None] = lambda handle: None,
) -> list[EncodedImage]:
    """One handle per example; all new pictures pass the tower together.

    Args:
        adapter: for the record of the new handles (`EncodedImage.adapter`).
        check: called with every handle that was given, to refuse those that do not fit.
    """
    flat = [pictures_of(example) for example in examples]
    given = [picture for pictures in flat for picture in pictures]
    for handle in given:
        if isinstance(handle, EncodedImage):
            check(handle)
    new = {id(picture): picture for picture in given if not isinstance(picture, EncodedImage)}
    loaded = [processor.load_image(picture) for picture in new.values()]
    encoded: dict[int, EncodedImage] = {}
    weight = model.projector.weight
    if loaded:
        pixels = processor.pixels(loaded).to(weight.device, weight.dtype)
        for key, picture, embeds in zip(new, loaded, model.embed_image(pixels), strict=True):
            encoded[key] = EncodedImage(embeds[None], (picture.shape[:2],), adapter)
    nothing = torch.zeros(0, model.config.vision.n_image_tokens, model.config.text.width, device=weight.device)
    return [
        EncodedImage.joined([encoded.get(id(p), p) for p in pictures]) if pictures else EncodedImage(nothing, ())
        for pictures in flat
    ]
