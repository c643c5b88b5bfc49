"""Boxes, mask tokens, the mask auto-encoder and the RefCOCO scores against numbers of the JAX reference."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paligemma.metrics.detection import box_iou
from paligemma.metrics.segmentation import mask_iou, referring_scores
from paligemma.models.mask_vae import MaskVae, mask_vae_shapes
from paligemma.results import Segment
from paligemma.tasks.coords import decode_coord, encode_coord, loc_tokens
from paligemma.tasks.masks import crop_mask, pixel_box
from paligemma.tasks.segmentation import SegmentTask, read_referring

DATA = Path(__file__).parent / "data" / "detection_segmentation"


@cache
def vae() -> MaskVae:
    return MaskVae.from_npz(DATA / "vae_params.npz")


def _json(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def _by_name(cases: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case["case"] for case in cases])


def test_the_file_has_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(array.shape) for name, array in np.load(DATA / "vae_params.npz").items()}
    assert shapes == mask_vae_shapes((16, 32, 64, 128), 512, 128)


def test_decoded_masks_are_within_1e_4() -> None:
    golden = np.load(DATA / "decode.npz")
    np.testing.assert_allclose(vae().decode_array(golden["indices"]), golden["masks"][..., 0], rtol=0, atol=1e-4)


def test_encoded_masks_have_exactly_the_same_codes() -> None:
    golden = np.load(DATA / "encode.npz")
    masks = golden["masks"][..., 0]
    np.testing.assert_array_equal(vae().encode_array(masks), golden["indices"])
    with torch.no_grad():
        features = vae().encode_features(torch.from_numpy(masks[:2])).permute(0, 2, 3, 1)
    np.testing.assert_allclose(features.numpy(), golden["encoder_output_first_two"], rtol=1e-5, atol=1e-4)


def test_boxes_become_exactly_the_same_location_tokens() -> None:
    for case in _json("boxes_to_loc.json")["cases"]:
        assert loc_tokens(case["box"]) == case["loc"]
        assert [encode_coord(c) for c in case["box"]] == case["bins"]
        assert [decode_coord(i) for i in case["bins"]] == pytest.approx(case["inverse_bins_over_1023"], abs=1e-12)


@_by_name(_json("mask_to_suffix.json"))
def test_masks_become_exactly_the_same_suffix(case: dict[str, Any]) -> None:
    arrays = np.load(DATA / "mask_to_suffix.npz")
    mask = arrays[f"{case['case']}/mask"]
    np.testing.assert_allclose(
        crop_mask(mask, case["bbox"]), arrays[f"{case['case']}/crop64"][..., 0], rtol=0, atol=1e-4
    )

    height, width = mask.shape
    y1, x1, y2, x2 = case["bbox"]
    truth = Segment(case["sentence"], (x1 * width, y1 * height, x2 * width, y2 * height), mask > 0, 1.0)
    task = SegmentTask(referring=True, spaced=False)
    assert task.prefix(case["sentence"]) == case["prefix"]
    assert task.suffix([truth], (height, width), mask_encoder=vae().encode_array) == case["suffix"]


PASTED = _json("parse_and_paste.json")


def _read(case: dict[str, Any]) -> Segment | None:
    return read_referring(case["string"], (case["height"], case["width"]), vae().decode_array)


@_by_name(PASTED["cases"])
def test_answers_become_the_same_masks_boxes_and_overlaps(case: dict[str, Any]) -> None:
    arrays = np.load(DATA / "parse_and_paste.npz")
    found = _read(case)
    assert (found is not None) == case["valid"], case["note"]
    if found is None:
        return
    x1, y1, x2, y2 = pixel_box(found.box_xyxy_px, (case["height"], case["width"])) or (0, 0, 0, 0)
    assert [y1, x1, y2, x2] == case["box_pixels_y1x1y2x2"]
    golden = arrays[f"{case['case']}/pred_mask"].astype(bool)
    n_unlike = int((found.mask != golden).sum())
    assert n_unlike <= 5, "more than a handful of pixels differ"
    iou = mask_iou(found.mask, arrays[f"{case['case']}/gt_mask"].astype(bool))
    assert iou == pytest.approx(case["mask_iou"], abs=1e-2 if n_unlike else 1e-12)
    overlap = box_iou([found.box_xyxy_px], [_gt_box(case)])[0, 0]
    assert {t: bool(overlap >= float(t)) for t in case["box_iou_at_least"]} == case["box_iou_at_least"]


def _gt_box(case: dict[str, Any]) -> tuple[float, float, float, float]:
    y1, x1, y2, x2 = case["gt_box"]
    return (x1 * case["width"], y1 * case["height"], x2 * case["width"], y2 * case["height"])


def test_the_scores_over_all_answers_are_those_of_the_reference_evaluator() -> None:
    arrays = np.load(DATA / "parse_and_paste.npz")
    cases = PASTED["cases"]
    truth = [arrays[f"{case['case']}/gt_mask"].astype(bool) for case in cases]
    scores = referring_scores([_read(case) for case in cases], truth, [_gt_box(case) for case in cases])
    golden = PASTED["aggregate"]
    assert scores.miou == pytest.approx(golden["miou"], abs=1e-3)
    assert scores.box_accuracy == pytest.approx({0.5: golden["boxacc/0.5"], 0.75: golden["boxacc/0.75"]})
    assert (scores.n_invalid, scores.n_total) == (golden["invalid"], golden["total"])
