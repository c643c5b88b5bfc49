"""The parts of the recipe that taught the embedded model, and that an interrupted run ends as an undisturbed one."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from paligemma.data.world import render, sample_scene
from paligemma.models.mask_vae import MaskVae
from paligemma.presets import TINY
from paligemma.processing.tokenizer import Tokenizer
from paligemma.recipes.tiny import train as training
from paligemma.recipes.tiny.examples import ExampleOptions, Step, SuffixWriter, draw_step
from paligemma.recipes.tiny.patches import patch_owners, patch_targets, place_loss
from paligemma.recipes.tiny.train import TrainOptions, train
from paligemma.tasks.coords import on_step
from paligemma.tasks.masks import crop_mask
from paligemma.train.muon import Muon, orthogonalise
from tests.embedded import TINY as FOLDER

SMALL = ExampleOptions(patch_steps=1, patch_images=2, simple_steps=1, n_images=2, n_questions=3, seed=3)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizer.model").write_bytes((FOLDER / "tokenizer.model").read_bytes())
    MaskVae.from_npz(FOLDER / "mask_vae.npz").to_npz(folder / "mask_vae.npz")
    return folder


@pytest.fixture(scope="module")
def writer(work: Path) -> SuffixWriter:
    tokenizer = Tokenizer.from_file(work / "tokenizer.model", TINY.tokens)
    return SuffixWriter(tokenizer, MaskVae.from_npz(work / "mask_vae.npz").eval(), SMALL.loc_step)


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (1, 16, 16)])
def test_orthogonalised_matrices_have_singular_values_about_one_and_keep_their_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50
    found = orthogonalise(matrices)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3
    assert values.median() > 0.6
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.mT @ found @ vh.mT  # diagonal where directions are kept
    assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_muon_steps_as_the_one_in_torch_does_up_to_its_bfloat16():
    rng = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((24, 40), (40, 24), (24, 40))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    a = Muon(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=rng)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        moved = (q - before).norm()
        assert moved > 0.1
        assert (p - q).norm() < 0.05 * moved


@pytest.mark.parametrize("step", [1, 8])
def test_a_place_is_learned_best_by_saying_how_near_each_bin_is(step):
    bins = torch.tensor([0, 8 * 40, 1023])
    off = (torch.arange(1024) % step != 0) & (torch.arange(1024) != 1023)
    perfect = -((torch.arange(1024) - bins[:, None]).float() ** 2) / (2 * 6.0**2)
    perfect = perfect.masked_fill(off, -1e9)
    logits = torch.cat([torch.full((3, 5), -1e9), perfect], dim=1)  # five words before the places
    assert place_loss(logits, bins, 5, 6.0, step).abs().max() < 1e-4
    near, far = (place_loss(logits.roll(shift, dims=1), bins, 5, 6.0, step)[1] for shift in (step, 80))
    assert 0.001 < near < far


def test_bins_land_on_the_nearest_step_and_the_last_one_stays():
    assert [on_step(i, 8) for i in (0, 3, 5, 500, 1017, 1021, 1023)] == [0, 0, 8, 496, 1016, 1023, 1023]
    assert [on_step(i, 1) for i in (0, 77, 1023)] == [0, 77, 1023]


def test_every_step_is_drawn_the_same_again_and_unlike_the_next(writer):
    first, again, other = (draw_step(TINY, writer, SMALL, n) for n in (2, 2, 3))
    assert torch.equal(first.pixels, again.pixels)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first.groups, again.groups, strict=True))
    assert not torch.equal(first.pixels, other.pixels)


def test_places_in_suffixes_lie_on_steps_and_only_the_suffix_is_a_target(writer):
    tokens = TINY.tokens
    n_places = 0
    for number in range(2, 6):
        for rows in draw_step(TINY, writer, SMALL, number).groups:
            bins = rows.tokens[(rows.tokens >= tokens.loc_start) & (rows.tokens < tokens.seg_start)] - tokens.loc_start
            assert ((bins % SMALL.loc_step == 0) | (bins == 1023)).all()
            n_places += len(bins)
            assert torch.equal(rows.mask_loss, rows.mask_input & (rows.mask_ar == 1))
            last = rows.mask_input.sum(dim=1) - 1
            assert (rows.tokens.gather(1, last[:, None]) == tokens.eos).all()
    assert n_places > 8


def test_patches_tell_whose_they_are_where_it_ends_and_what_its_mask_is(writer):
    scene = sample_scene(5, "plain")
    drawn = render(scene)
    (codes,) = writer.codes([(scene, drawn)])
    owner = patch_owners(scene, drawn, TINY.vision.grid)
    kinds, colours, edges, masks = patch_targets(scene, drawn, owner, codes)
    h, w = scene.size_hw
    for i in scene.shapes:
        own = owner == i
        assert own.any()
        x1, y1, x2, y2 = drawn.boxes_xyxy_px[i]
        assert np.allclose(edges[own] / 1023, [y1 / h, x1 / w, y2 / h, x2 / w], atol=0.5 / 1023)
        decoded = writer.vae.decode(torch.from_numpy(masks[own][:1])).numpy()[0] > 0
        truth = crop_mask(drawn.masks[i], (y1 / h, x1 / w, y2 / h, x2 / w)) > 0.5
        assert (decoded & truth).sum() / (decoded | truth).sum() > 0.8
        assert len(set(kinds[own])) == len(set(colours[own])) == 1
    nothing = owner == len(scene.things)
    assert (colours[nothing] == -1).all()
    assert (masks[nothing] == -1).all()


def test_an_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(work, tmp_path, monkeypatch):
    options = TrainOptions(steps=4, warmup=2, workers=0, save_minutes=0.0)

    def run(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for name in ("tokenizer.model", "mask_vae.npz"):
            (folder / name).write_bytes((work / name).read_bytes())
        assert train(TINY, folder, options, SMALL)

    run(tmp_path / "whole")
    steps = training._steps

    def two_steps(*args: object) -> Iterator[Step]:
        yield from islice(steps(*args), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "_steps", two_steps)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "halves")
    assert torch.load(tmp_path / "halves" / "state.pt", weights_only=True)["step"] == 2
    run(tmp_path / "halves")
    whole, halves = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "halves"))
    for part in ("model", "average", "heads"):
        assert all(torch.equal(whole[part][name], halves[part][name]) for name in whole[part]), part
