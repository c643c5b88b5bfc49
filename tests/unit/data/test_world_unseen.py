"""What training never shows: the same scene with one thing exchanged, and nothing else."""

import dataclasses

import numpy as np
import pytest

from paligemma.data.world import BACKGROUNDS, FONTS, SHAPES, UNSEEN, Thing, exam, render, restyled, sample_scene
from paligemma.data.world.fonts import UNSEEN_FONTS
from paligemma.data.world.palette import MIN_CONTRAST, blend, distance
from paligemma.data.world.raster import patch
from paligemma.data.world.scene import UNSEEN_BACKGROUNDS

SEEDS = range(60)


def full(seed):
    return sample_scene(seed, "full", "held_out")


@pytest.mark.parametrize("what", UNSEEN)
def test_names_places_and_order_stay(what):
    changed = 0
    for seed in SEEDS:
        before, after = full(seed), restyled(full(seed), what, seed)
        assert after == restyled(full(seed), what, seed)
        assert [(t.name, t.text, t.rgb, t.centre_xy_px) for t in after.things] == [
            (t.name, t.text, t.rgb, t.centre_xy_px) for t in before.things
        ]
        assert all(mask.any() for mask in render(after).masks), seed
        changed += before != after
    assert changed >= (0.25 if what == "fonts" else 0.9) * len(SEEDS)


def test_nothing_is_hidden_by_another_outline():
    for seed in (*SEEDS, 272):  # in 272, all but three pixels of a thing would be
        before, after = (render(scene).masks for scene in (full(seed), restyled(full(seed), "shapes", seed)))
        assert all(2 * a.sum() >= b.sum() for a, b in zip(after, before, strict=True))
    changed = [thing.variant for seed in SEEDS for thing in restyled(full(seed), "shapes", seed).things if thing.shape]
    assert np.mean(changed) > 0.95


def test_every_shape_has_another_outline_of_about_its_size():
    for shape in SHAPES:
        thing = Thing(
            kind="shape", shape=shape, colour="red", rgb=(220, 20, 30), size_px=90.0, centre_xy_px=(60.0, 60.0),
            elongation=2.8 if shape in ("oval", "rectangle") else 1.0,
        )  # fmt: skip
        own = patch(thing, (120, 120))
        other = patch(dataclasses.replace(thing, variant=True), (120, 120))
        pictures = []
        for one in (own, other):
            area = np.zeros((120, 120), bool)
            area[one.window] = one.area
            pictures.append(area)
        iou = (pictures[0] & pictures[1]).sum() / (pictures[0] | pictures[1]).sum()
        assert 0.5 < iou < 0.985, (shape, iou)


def test_training_scenes_show_none_of_it():
    for world in ("plain", "full"):
        for seed in range(150):
            scene = sample_scene(seed, world)
            assert scene.background.kind in BACKGROUNDS
            assert not any(thing.variant or thing.font in UNSEEN_FONTS for thing in scene.things)
    assert not set(UNSEEN_FONTS) & set(FONTS)
    assert not set(UNSEEN_BACKGROUNDS) & set(BACKGROUNDS)


def test_another_font_takes_no_more_room():
    for seed in SEEDS:
        before, after = full(seed), restyled(full(seed), "fonts", seed)
        for i in before.texts:
            (h, w), (own_h, own_w) = (patch(s.things[i], s.size_hw).area.shape for s in (after, before))
            assert h <= own_h + 1
            assert w <= own_w + 1


def test_things_stand_out_from_another_background():
    for seed in SEEDS:
        scene = restyled(full(seed), "backgrounds", seed)
        assert scene.background.kind in UNSEEN_BACKGROUNDS
        first, second = scene.background.rgbs
        assert first != second
        weakest = min(min(distance(t.rgb, blend(first, second, share)) for share in (0, 0.5, 1)) for t in scene.things)
        assert weakest > 0.8 * MIN_CONTRAST


@pytest.mark.parametrize("what", UNSEEN)
def test_an_exam_asks_the_same_in_another_style(what):
    # What is left of a thing depends on the middles of outlines; everything else is asked as it was.
    moved = {"left"} if what == "shapes" else set()
    for seed in range(20):
        plain, other = exam("full", seed), exam("full", seed, what)
        asked = [[(q.kind, q.prefix) for q in one.questions if q.kind not in moved] for one in (plain, other)]
        assert asked[0] == asked[1]
        assert len(asked[0]) >= 5
