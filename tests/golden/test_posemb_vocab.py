"""Position tables at another resolution and new vocabulary rows, against big_vision's."""

import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from paligemma.checkpoints import open_checkpoint
from paligemma.errors import ShapeError
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.models.posemb import resample_position_embedding
from tests.golden_model import DATA, arrays

FOLDER = "posemb_vocab"
CASES = json.loads((DATA / FOLDER / "index.json").read_text())["posemb_cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['old_grid']}to{case['new_grid']}")
def test_resampling_gives_the_reference_table(case):
    tables = arrays(FOLDER, "posemb_resample")
    old, expected = (tables[f"case{case['case']}/{which}"][0] for which in ("old", "new"))
    grid = case["new_grid"]
    got = resample_position_embedding(torch.from_numpy(old), grid).numpy()
    assert got.shape == expected.shape
    got, expected = (table.reshape(grid, grid, -1) for table in (got, expected))
    if case["zero_edge_artifact"]:  # a rounding accident of scipy zeroes its last row and column; ours interpolates
        assert not expected[-1].any()
        assert not expected[:, -1].any()
        assert np.abs(got[-1]).min() > 0
        got, expected = got[:-1, :-1], expected[:-1, :-1]
    assert_allclose(got, expected, atol=1e-6, rtol=0)


def test_corners_stay_where_they_are():
    """Aligned corners: at any size the four corner patches keep their embedding."""
    table = torch.arange(16.0)[:, None]
    new = resample_position_embedding(table, 7).reshape(7, 7)
    assert new[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 3, 12, 15]


def test_a_table_that_is_no_square_is_refused_with_its_size():
    with pytest.raises(ShapeError, match="15 rows: expected a square number"):
        resample_position_embedding(torch.zeros(15, 2), 4)


def test_a_model_at_another_resolution_with_new_words_computes_the_reference_logits():
    golden = arrays(FOLDER, "load_at_new_resolution")
    with open_checkpoint(DATA / "paligemma_v1" / "params.npz", resolution=84, vocab_size=1728, seed=123) as checkpoint:
        model = PaliGemmaModel(checkpoint.config)
        model.load_state_dict(dict(checkpoint.stream(torch.float32)))
    model.requires_grad_(False)
    assert_allclose(model.vision.position_embedding.numpy(), golden["pos_embedding"][0], atol=1e-6, rtol=0)
    assert_allclose(model.text.embedding.weight[1664:].numpy(), golden["new_embedding_rows"], atol=0, rtol=0)
    zimg = model.embed_image(torch.from_numpy(golden["image"]).permute(0, 3, 1, 2))
    assert_allclose(zimg.numpy(), golden["zimg"], atol=1e-4, rtol=0)
    text, ar = (torch.from_numpy(golden[name]).long() for name in ("text", "mask_ar"))
    slots = torch.zeros(len(text), zimg.shape[1], dtype=torch.int64)
    mask_image = torch.cat([slots + 1, torch.zeros_like(text)], dim=1).bool()
    logits = model(
        torch.cat([slots, text], dim=1),
        mask_image=mask_image,
        mask_ar=torch.cat([slots, ar], dim=1),
        image_embeds=zimg,
        keep=~mask_image,
    )
    assert_allclose(logits.numpy(), golden["text_logits"].reshape(logits.shape), atol=5e-4, rtol=0)
