"""The stages that make the embedded models: lessons that resume, parts that others read, rows that share pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import paligemma
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.models.attention import Span
from paligemma.models.gemma import GemmaDecoder
from paligemma.models.init import init_decoder
from paligemma.models.mask_vae import MaskVae
from paligemma.presets import TINY
from paligemma.processing.processor import Processor
from paligemma.processing.tokenizer import Tokenizer
from paligemma.recipes.tiny.loop import LessonOptions, teach
from paligemma.recipes.tiny.rows import WorldOptions, WorldRows
from paligemma.recipes.tiny.stages import TinyOptions, small_recipe, stage0
from paligemma.recipes.tiny.vision import DrawPairs, Pair, PairOptions, pair_loss, write_siglip
from paligemma.recipes.tiny.words import write_gemma
from paligemma.tasks.grammar import parse_entries
from paligemma.train.coordinates import coordinate_loss
from tests.embedded import TINY as FOLDER


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with both raw parts, untaught."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tokenizer.model").write_bytes((FOLDER / "tokenizer.model").read_bytes())
    MaskVae.from_npz(FOLDER / "mask_vae.npz").to_npz(folder / "mask_vae.npz")
    torch.manual_seed(0)
    write_siglip(Pair(TINY, TINY.tokens.loc_start, torch.Generator().manual_seed(0)), folder / "siglip")
    write_gemma(decoder(), text_config(), folder / "gemma")
    return folder


def text_config():
    return replace(TINY.text, vocab_size=TINY.tokens.loc_start)


def decoder() -> GemmaDecoder:
    model = GemmaDecoder(text_config())
    init_decoder(model, torch.Generator().manual_seed(1))
    return model


def test_the_raw_parts_are_what_transformers_reads(work):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SiglipVisionModel.from_pretrained(work / "siglip").eval()
    torch.manual_seed(0)
    ours = Pair(TINY, TINY.tokens.loc_start, torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        seen = theirs(pixels)
        patches = ours.vision(pixels)
        torch.testing.assert_close(seen.last_hidden_state, patches, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen.pooler_output, ours.head(patches), rtol=1e-4, atol=1e-4)
        gemma = transformers.AutoModelForCausalLM.from_pretrained(work / "gemma").eval()
        ids = torch.arange(3, 20)[None]
        one = torch.ones_like(ids)
        place = torch.arange(ids.shape[1])[None]
        model = decoder()
        logits = model.logits(model(model.embed(ids), Span(block=place, valid=one.bool(), segment=one, position=place)))
        torch.testing.assert_close(gemma(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_stage_zero_is_a_whole_model_that_sees_nothing_yet(work):
    pg = paligemma.load(stage0(work), device="cpu")
    assert pg.config.vision == TINY.vision
    assert pg.config.text == TINY.text
    assert pg.mask_vae is not None
    image = np.zeros((20, 30, 3), np.uint8)
    assert pg.encode_image(image).image_embeds.abs().max() == 0  # the projector is zero
    rows = pg.model.text.embedding.weight[TINY.tokens.loc_start : TINY.tokens.seg_start]
    near, far = ((rows[:-n] * rows[n:]).sum(dim=1).mean() for n in (8, 512))
    assert near > 0.8 * rows.square().sum(dim=1).mean() > far  # neighbours begin alike


def test_rows_are_the_same_whoever_draws_them_and_share_their_picture(work):
    options = WorldOptions(n_rows=100, simple_rows=10)
    first, again = (WorldRows(work, TINY.tokens, options) for _ in range(2))
    rows = [first[i] for i in range(30)]
    assert [again[i].suffix for i in reversed(range(30))] == [row.suffix for row in reversed(rows)]
    assert all(rows[i].images[0] is rows[i + 1].images[0] for i in range(30) if i % 5 < 4)
    assert rows[4].images[0] is not rows[5].images[0]
    assert {row.prefix.split()[0] for row in rows[:10]} <= {"detect", "segment", "answer"}
    for row in rows:
        entries, problems = parse_entries(row.suffix)
        assert not problems or not entries
        assert all(bin_ % 8 == 0 or bin_ == 1023 for entry in entries for bin_ in entry.bins)
    other = WorldRows(work, TINY.tokens, replace(options, split="held_out"))
    assert not np.array_equal(other[0].images[0], rows[0].images[0])


def test_a_step_of_a_stage_runs_each_picture_once(work):
    recipe = small_recipe("stage1", work, work / "out", 112, TinyOptions(steps=3, n_images=2), "cpu")
    source = WorldRows(work, TINY.tokens, WorldOptions(n_rows=100))
    words = Processor(TINY, Tokenizer.from_file(work / "tokenizer.model", TINY.tokens))
    (batch,) = Loader(source, words, replace(recipe.loader, workers=0)).step(1).parts
    assert (batch.n_examples, len(batch.pixels)) == (10, 2)
    assert recipe.examples == 30


def test_captions_of_a_step_are_told_apart_only_where_they_differ(work):
    draw = DrawPairs(TINY, str(work / "tokenizer.model"), str(work / "mask_vae.npz"), PairOptions(n_images=4))
    step, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(step.pixels, again.pixels)
    assert not torch.equal(step.pixels, other.pixels)
    model = Pair(TINY, TINY.tokens.loc_start, torch.Generator().manual_seed(0))
    same = replace(step, captions=step.captions[:1].expand(4, -1))
    assert pair_loss(model, same)["found"] == 1  # whichever it picks is right
    losses = pair_loss(model, step)
    losses["loss"].backward()
    assert all(p.grad is not None for name, p in model.vision.named_parameters())


def test_a_lesson_that_was_stopped_ends_as_an_undisturbed_one(tmp_path):
    def lesson(work: Path, *, stop_at: int | None = None) -> nn.Module:
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))

        def draw(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

        def loss(m: nn.Module, data: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (m(data) - data.sum(dim=1, keepdim=True)).square().mean()}

        options = LessonOptions(steps=6, workers=0, save_minutes=0.0)
        return teach("x", model, draw, loss, [model[0].weight], work, options, torch.device("cpu"))[0]

    whole = lesson(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        lesson(tmp_path / "halves", stop_at=3)
    halves = lesson(tmp_path / "halves")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_places_on_steps_are_learned_from_their_neighbours_on_steps():
    tokens = TINY.tokens
    loss = coordinate_loss(tokens, sigma=6.0, step=8)
    target = torch.tensor([tokens.loc_start + 80])
    logits = torch.zeros(1, tokens.n_tokens)

    def with_mass_on(bin_: int) -> float:
        changed = logits.clone()
        changed[0, tokens.loc_start + bin_] = 5.0
        return float(loss(changed, target))

    assert with_mass_on(80) < with_mass_on(88) < with_mass_on(160)
    assert with_mass_on(81) == pytest.approx(with_mass_on(400), rel=1e-5)  # between steps there is nothing to win


def test_options_of_the_loader_are_those_of_a_stage():
    recipe = small_recipe("stage1", Path("x"), Path("y"), 112, TinyOptions(steps=3), "cpu")
    assert isinstance(recipe.loader, LoaderOptions)
    assert recipe.loader.shuffle is False  # drawn rows have no order to change
    assert recipe.robust is None
