"""The parts of the recipe that taught the embedded model, and the folder that is shipped."""

import json

import numpy as np
import pytest
import torch

from paligemma import load
from paligemma.checkpoints import read, write
from paligemma.checkpoints.rules import TABLE
from paligemma.data.world import render, sample_scene
from paligemma.models.mask_vae import MaskVae
from paligemma.presets import TINY, with_table_rows
from paligemma.recipes.tiny.export import export, history_of, lesson_of
from paligemma.recipes.tiny.patches import patch_owners, patch_targets
from paligemma.recipes.tiny.stages import TinyOptions, small_recipe
from paligemma.recipes.tiny.suffix import mask_codes
from paligemma.recipes.tree import to_tree
from paligemma.tasks.coords import on_step
from paligemma.tasks.masks import crop_mask
from paligemma.train.muon import Muon, orthogonalise
from tests.embedded import TINY as FOLDER


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


def test_bins_land_on_the_nearest_step_and_the_last_one_stays():
    assert [on_step(i, 8) for i in (0, 3, 5, 500, 1017, 1021, 1023)] == [0, 0, 8, 496, 1016, 1023, 1023]
    assert [on_step(i, 1) for i in (0, 77, 1023)] == [0, 77, 1023]


def test_patches_tell_whose_they_are_where_it_ends_and_what_its_mask_is():
    vae = MaskVae.from_npz(FOLDER / "mask_vae.npz").eval()
    scene = sample_scene(5, "plain")
    drawn = render(scene)
    (codes,) = mask_codes([(scene, drawn)], vae)
    owner = patch_owners(scene, drawn, TINY.vision.grid)
    kinds, colours, edges, masks = patch_targets(scene, drawn, owner, codes)
    h, w = scene.size_hw
    for i in scene.shapes:
        own = owner == i
        assert own.any()
        x1, y1, x2, y2 = drawn.boxes_xyxy_px[i]
        assert np.allclose(edges[own] / 1023, [y1 / h, x1 / w, y2 / h, x2 / w], atol=0.5 / 1023)
        decoded = vae.decode(torch.from_numpy(masks[own][:1])).numpy()[0] > 0
        truth = crop_mask(drawn.masks[i], (y1 / h, x1 / w, y2 / h, x2 / w)) > 0.5
        assert (decoded & truth).sum() / (decoded | truth).sum() > 0.8
        assert len(set(kinds[own])) == len(set(colours[own])) == 1
    nothing = owner == len(scene.things)
    assert (colours[nothing] == -1).all()
    assert (masks[nothing] == -1).all()


def test_what_is_shipped_is_the_preset_in_half_precision_with_its_history(tmp_path):
    """Rows that pad the table, for kernels of a training, are left out; every answer stays."""
    import yaml

    config, weights = read(FOLDER, dtype=torch.float32)
    padded = torch.cat([weights[TABLE], torch.zeros(64, config.text.width)])
    model = tmp_path / "run" / "model"
    write(
        model, with_table_rows(config, len(padded)), {**weights, TABLE: padded},
        beside=[FOLDER / "tokenizer.model", FOLDER / "mask_vae.npz"],
    )  # fmt: skip
    recipe = small_recipe("stage1", FOLDER, tmp_path / "run", 112, TinyOptions(steps=30, seed=5), "cpu")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(to_tree(recipe)))
    export(TINY, model, tmp_path / "out", [{"lesson": "stage 0"}, lesson_of("stage 1", tmp_path / "run")])
    shipped, tensors = read(tmp_path / "out")
    assert shipped == TINY
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    assert all(torch.equal(tensors[name].float(), weights[name]) for name in weights)
    assert [lesson["lesson"] for lesson in history_of(tmp_path / "out")] == ["stage 0", "stage 1"]
    assert history_of(tmp_path / "out")[1] == {
        "lesson": "stage 1", "steps": 30, "resolution": 112, "examples_per_step": 160, "lr": 1.5e-3, "cooldown": 0.35,
        "seed": 5,
    }  # fmt: skip
    assert history_of(None) == []
    assert history_of(tmp_path / "run") == [{"lesson": "before, not known (run)"}]
    scene = sample_scene(5, "plain")
    label = scene.things[0].name
    first, second = (load(folder).segment(render(scene).image, label) for folder in (FOLDER, tmp_path / "out"))
    assert first.raw == second.raw
    assert "<seg" in first.raw
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == TINY.text.vocab_size
