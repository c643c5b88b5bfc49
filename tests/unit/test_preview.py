"""The preview page shows what a model sees: the same pixels and tokens, and nothing of a row becomes markup."""

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from paligemma.data.example import Example
from paligemma.data.loader import read_item
from paligemma.data.world import render, sample_scene
from paligemma.draw.preview import preview_page, see
from paligemma.errors import DataError
from tests.training_runs import processor

PICTURE = render(sample_scene(3, "plain")).image
BOX = "<loc0100><loc0100><loc0500><loc0600>"


def test_pieces_spell_the_row_and_say_what_is_learned():
    words = processor()
    example = Example((PICTURE,), "detect red star", f"{BOX} red star ; {BOX} noise", unlearned=((48, 84),))
    sight = see(example, words)
    item = read_item(example, words, None)
    text = item.sequence.tokens[~item.sequence.mask_image].tolist()
    assert [piece for piece, _ in sight.pieces] == [words.tokenizer.piece(token) for token in text]
    parts = [part for _, part in sight.pieces]
    assert parts[0] == "bos"
    assert parts[-1] == "eos"
    assert parts.count("separator") == 1
    assert parts.count("silent") == 4
    learned = item.sequence.mask_loss[~item.sequence.mask_image]
    assert [part in ("suffix", "eos") for part in parts] == learned.tolist()


def test_pixels_on_the_page_are_those_of_the_model():
    words = processor()
    (seen,) = see(Example((PICTURE,), "caption en", "x"), words).pixels
    model = words.pixels([PICTURE])[0]
    back = torch.from_numpy(seen.transpose(2, 0, 1)).float() / 127.5 - 1
    assert (back - model).abs().max() <= 1 / 127.5
    page = preview_page([Example((PICTURE,), "caption en", "x")], words)
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall(r"base64,([^\"]+)", page)
    ]
    enlarged = shown[1][::12, ::12]  # every pixel is a square
    assert np.array_equal(enlarged, seen)


def test_what_is_cut_is_told():
    sight = see(Example((), "caption en", "a red circle and two blue stars"), processor(), max_text=8)
    whole = see(Example((), "caption en", "a red circle and two blue stars"), processor())
    assert sight.n_cut == len(whole.pieces) - 8
    assert sight.pieces == whole.pieces[:8]


def test_texts_of_rows_stay_text():
    nasty = "<script>alert(1)</script>"
    page = preview_page(
        [Example((PICTURE,), f"answer en {nasty}", nasty, where=nasty), DataError(f"{nasty} is broken")],
        processor(),
        title=nasty,
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5
