"""A page that shows examples as a model will see them: pixels after the resize, tokens by their part, boxes, masks.

    Path("preview.html").write_text(preview_page(examples, processor, max_text=129, mask_decoder=decode))

One file without references: pictures are inside it.
"""

import base64
import html
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from paligemma.data.example import Example
from paligemma.data.loader import read_item, read_text
from paligemma.draw.overlay import overlay
from paligemma.draw.style import Style
from paligemma.errors import PaliGemmaError
from paligemma.processing.batch import Item
from paligemma.processing.image import load_image
from paligemma.processing.processor import Processor
from paligemma.tasks import TASKS
from paligemma.tasks.base import MaskDecoder
from paligemma.tasks.grammar import parse_entries

MIN_SIDE_PX = 336  # small pictures are enlarged, every pixel a square, so that they can be looked at
_BOXES = {"detect": "detect", "segment": "segment"}


@dataclass(frozen=True)
class Sight:
    """One example as a model sees it.

    Attributes:
        picture: what stands in its file, the first of several.
        pixels: uint8[R, R, 3] of every picture after the resize.
        pieces: (text, part) of every token; a part is "bos", "prefix", "separator", "suffix", "eos" or "silent", a
            suffix token without loss.
        n_image_tokens: before them.
        n_cut: text tokens beyond the limit, which the model does not see.
    """

    example: Example
    picture: Image.Image | None
    pixels: tuple[np.ndarray[Any, np.dtype[np.uint8]], ...]
    pieces: tuple[tuple[str, str], ...]
    n_image_tokens: int
    n_cut: int


def see(example: Example, processor: Processor, *, max_text: int | None = None) -> Sight:
    """What becomes of an example.

    Raises:
        DataError: it cannot be read.
    """
    return sight_of(example, read_item(example, processor, max_text), processor)


def sight_of(example: Example, item: Item, processor: Processor) -> Sight:
    """An example beside the row that became of it, in a `Loader` for instance.

    Raises:
        DataError: its file cannot be read.
    """
    pixels = () if item.pixels is None else tuple(_levels(one) for one in item.pixels.numpy())
    picture = Image.fromarray(load_image(example.images[0])) if example.images else None
    n_cut = len(read_text(example, processor, None).sequence) - len(item.sequence)
    pieces = _pieces(item, processor)
    return Sight(example, picture, pixels, pieces, item.sequence.n_image_tokens, n_cut)


def preview_page(
    examples: Iterable[Example | Sight | PaliGemmaError],
    processor: Processor,
    *,
    max_text: int | None = None,
    mask_decoder: MaskDecoder | None = None,
    title: str = "preview",
) -> str:
    """The page; an error in place of an example is shown as one, one that was seen already as it was seen.

    Args:
        max_text: text tokens that the model sees, as in training.
        mask_decoder: int[n, 16] -> float32[n, 64, 64]; without one masks stay tokens.
    """
    cards = []
    for example in examples:
        try:
            if isinstance(example, PaliGemmaError):
                raise example
            sight = example if isinstance(example, Sight) else see(example, processor, max_text=max_text)
            cards.append(_card(sight, mask_decoder))
        except PaliGemmaError as error:
            cards.append(f'<article class="broken"><p>{html.escape(str(error))}</p></article>')
    config = processor.config
    facts = (
        f"{config.vision.resolution} × {config.vision.resolution} pixels, resize {config.processing.resize}, "
        f"{config.vision.n_image_tokens} image tokens a picture"
        + (f", at most {max_text} text tokens" if max_text is not None else "")
    )
    return _PAGE.format(title=html.escape(title), facts=html.escape(facts), cards="\n".join(cards), style=_STYLE)


def _card(sight: Sight, mask_decoder: MaskDecoder | None) -> str:
    example = sight.example
    pictures = [_figure(_enlarged(Image.fromarray(one)), f"picture {i} as the model sees it")
                for i, one in enumerate(sight.pixels, 1)]  # fmt: skip
    if sight.picture is not None:
        found = _found(example, sight.picture, mask_decoder)
        drawn = overlay(sight.picture, found, style=Style(scores=False, min_long_side_px=MIN_SIDE_PX))
        told = f"the file, {sight.picture.width} × {sight.picture.height}" + (
            ", with the suffix drawn" if found else ""
        )
        pictures.insert(0, _figure(drawn, told))
    chips = "".join(f'<span class="{part}">{_spelled(text)}</span>' for text, part in sight.pieces)
    counts = {part: sum(1 for _, p in sight.pieces if p == part) for part in ("prefix", "suffix", "silent", "eos")}
    n_learned = counts["suffix"] + counts["eos"]
    facts = f"{sight.n_image_tokens} image + {len(sight.pieces)} text tokens, {n_learned} learned"
    if counts["silent"]:
        facts += f", {counts['silent']} without loss"
    if example.weight != 1:
        facts += f", weight {example.weight:g}"
    cut = f'<p class="cut">{sight.n_cut} tokens are cut off.</p>' if sight.n_cut else ""
    return (
        f'<article><header><b>{html.escape(example.where)}</b><span>{facts}</span></header>'
        f'<div class="pictures">{"".join(pictures)}</div>'
        f'<p class="ask">{html.escape(example.prefix)}</p><p class="answer">{html.escape(example.suffix) or "∅"}</p>'
        f'<div class="tokens"><span class="image">{sight.n_image_tokens} × image</span>{chips}</div>{cut}</article>'
    )  # fmt: skip


def _found(example: Example, picture: Image.Image, mask_decoder: MaskDecoder | None) -> Any:
    """What the suffix says, in pixels of the picture; None where it says no boxes."""
    entries, _ = parse_entries(example.suffix)
    if not entries:
        return None
    task = "segment" if any(entry.codes is not None for entry in entries) and mask_decoder else "detect"
    size_hw = (picture.height, picture.width)
    parse: Callable[..., Any] = TASKS[task].parse
    return parse(example.suffix, size_hw=size_hw, mask_decoder=mask_decoder)


def _pieces(item: Item, processor: Processor) -> tuple[tuple[str, str], ...]:
    sequence, tokenizer = item.sequence, processor.tokenizer
    tokens = processor.config.tokens
    text = ~sequence.mask_image & sequence.mask_input
    ids, is_suffix, learned = sequence.tokens[text], sequence.mask_ar[text] == 1, sequence.mask_loss[text]
    separator = set(tokenizer.encode("\n"))
    found = []
    for i, (token, answers, counts) in enumerate(zip(ids.tolist(), is_suffix, learned, strict=True)):
        last_of_prefix = not answers and (i + 1 == len(ids) or is_suffix[i + 1])
        if token == tokens.bos and i == 0:
            part = "bos"
        elif answers:
            part = "eos" if token == tokens.eos else "suffix" if counts else "silent"
        else:
            part = "separator" if last_of_prefix and token in separator else "prefix"
        found.append((tokenizer.piece(token), part))
    return tuple(found)


def _levels(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if pixels.dtype == np.uint8:
        return pixels.transpose(1, 2, 0)
    return np.clip(np.rint((pixels.transpose(1, 2, 0) + 1) * 127.5), 0, 255).astype(np.uint8)


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, round(MIN_SIDE_PX / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _figure(picture: Image.Image, told: str) -> str:
    shown = picture.copy()
    shown.thumbnail((720, 720), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    shown.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(told)}">'
    return f"<figure>{image}<figcaption>{html.escape(told)}</figcaption></figure>"


def _spelled(piece: str) -> str:
    return html.escape(piece.replace("\n", "⏎").replace("▁", "·")) or "∅"


_STYLE = """
:root { color-scheme: light dark; --ink: #18181c; --soft: #6b6b75; --paper: #fff; --line: #e2e2e8;
  --prefix: #dbe7ff; --suffix: #d9f5e5; --silent: #eee; --image: #ffe9c7; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a0a0aa; --paper: #17171b; --line: #33333b;
  --prefix: #24365c; --suffix: #1f4a34; --silent: #34343a; --image: #5a4216; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } .facts, header span, figcaption { color: var(--soft); }
.key span, .tokens span { display: inline-block; padding: 0 .3em; margin: 1px; border-radius: 3px;
  font: 12px/1.6 ui-monospace, monospace; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
header { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; margin-bottom: .6rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; max-width: 400px; }
figure img { max-width: 100%; max-height: 340px; border-radius: 4px; image-rendering: auto; }
figcaption { font-size: 12px; } .ask { margin: .8rem 0 0; font-weight: 600; }
.answer { margin: 0 0 .6rem; overflow-wrap: anywhere; }
.bos, .prefix, .separator { background: var(--prefix); } .suffix, .eos { background: var(--suffix); }
.bos, .separator, .eos { outline: 1px solid var(--soft); } .image { background: var(--image); }
.silent { background: var(--silent); text-decoration: line-through; }
.cut, .broken { color: #b3261e; } @media (prefers-color-scheme: dark) { .cut, .broken { color: #ff8a80; } }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1><p class="facts">{facts}</p>
<p class="key"><span class="image">image</span> <span class="prefix">prefix: seen both ways</span>
<span class="suffix">suffix: learned, seen from the left</span> <span class="silent">suffix without loss</span></p>
{cards}
</body></html>
"""
