"""Results in other packages' words: checked by those packages themselves."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from paligemma.errors import MissingExtra, OptionError
from paligemma.interop import coco_file, from_coco, to_coco, to_supervision
from paligemma.results import (
    Detection,
    Detections,
    ReadText,
    Segment,
    Segments,
    Word,
    mask_to_rle,
    pack_counts,
    unpack_counts,
)


def _mask(seed: int, size_hw: tuple[int, int] = (37, 53)) -> np.ndarray:
    """A blob with a ragged edge: many runs of unlike lengths."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    radius = 12 + 3 * rng.standard_normal(size_hw)
    return (y - 18) ** 2 + (x - 25) ** 2 < radius**2


CATS = Detections(
    [Detection("cat", (1.5, 2.0, 11.0, 22.0), 0.75), Detection("dog", (0.0, 0.0, 5.0, 5.0), 0.25)], size_hw=(37, 53)
)
BLOBS = Segments(
    [Segment("blob", (10.0, 4.0, 40.0, 34.0), _mask(0), 0.5), Segment("cat", (0.0, 0.0, 9.0, 9.0), _mask(1), 0.9)],
    size_hw=(37, 53),
)


@pytest.mark.parametrize(
    "mask", [_mask(2), ~_mask(3), np.zeros((4, 5), bool), np.ones((4, 5), bool), np.eye(33, dtype=bool)]
)
def test_compressed_masks_are_byte_for_byte_those_of_pycocotools(mask: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    counts = mask_to_rle(mask)["counts"]
    packed = pack_counts(counts)
    assert packed.encode() == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert unpack_counts(packed) == counts


def test_run_lengths_survive_packing_whatever_their_order() -> None:
    counts = [0, 1, 2**20, 3, 5, 10**6, 1, 31, 32, 33, 15, 16, 17]
    assert unpack_counts(pack_counts(counts)) == counts


def test_pycocotools_opens_our_file_and_scores_it_perfect_against_itself(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    whole = coco_file([("a.png", BLOBS), ("b.png", Segments([], size_hw=(37, 53)))])
    path = tmp_path / "found.json"
    path.write_text(json.dumps(whole))
    truth = coco.COCO(str(path))
    np.testing.assert_array_equal(truth.annToMask(truth.loadAnns([1])[0]), BLOBS[0].mask)
    for kind in ("bbox", "segm"):
        scores = COCOeval(truth, truth.loadRes(json.loads(path.read_text())["annotations"]), kind)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
        assert scores.stats[0] == pytest.approx(1.0)


def test_rows_say_box_score_label_and_picture() -> None:
    rows = to_coco([CATS, CATS], ["photos/000000000139.jpg", "sea.jpg"], categories={"cat": 17, "dog": 18})
    assert rows[0] == {
        "image_id": 139, "file_name": "photos/000000000139.jpg", "category_id": 17, "label": "cat",
        "bbox": [1.5, 2.0, 9.5, 20.0], "score": 0.75,
    }  # fmt: skip
    assert [row["image_id"] for row in rows] == [139, 139, "sea.jpg", "sea.jpg"]
    json.dumps(rows)


def test_there_and_back_keeps_boxes_masks_labels_and_scores() -> None:
    back = from_coco(to_coco([CATS, BLOBS], [1, 2]))
    assert list(back[1]) == list(CATS)
    assert isinstance(back[2], Segments)
    for item, before in zip(back[2], BLOBS, strict=True):
        assert (item.label, item.box_xyxy_px, item.score) == (before.label, before.box_xyxy_px, before.score)
        np.testing.assert_array_equal(item.mask, before.mask)


def test_words_are_of_one_category_and_say_what_they_read() -> None:
    read = ReadText("stop", (Word("stop", (1.0, 2.0, 3.0, 4.0), 0.5),))
    (row,) = to_coco(read, 7)
    assert (row["label"], row["utf8_string"], row["category_id"]) == ("text", "stop", 1)


def test_supervision_gets_boxes_scores_classes_and_masks() -> None:
    supervision = pytest.importorskip("supervision")
    found = to_supervision(BLOBS, classes=["cat", "blob"])
    assert isinstance(found, supervision.Detections)
    np.testing.assert_array_equal(found.xyxy, [s.box_xyxy_px for s in BLOBS])
    np.testing.assert_array_equal(found.class_id, [1, 0])
    np.testing.assert_allclose(found.confidence, [0.5, 0.9])
    np.testing.assert_array_equal(found.mask, [s.mask for s in BLOBS])
    assert list(found["class_name"]) == ["blob", "cat"]
    assert len(found[found.confidence > 0.7]) == 1
    assert to_supervision(CATS).mask is None


def test_supervision_gets_an_empty_result_as_its_own_empty_one() -> None:
    supervision = pytest.importorskip("supervision")
    assert to_supervision(Detections([])) == supervision.Detections.empty()


def test_without_supervision_the_answer_is_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)  # what an import of an absent package meets
    with pytest.raises(MissingExtra, match=r"pip install 'paligemma\[supervision\]'"):
        to_supervision(CATS)


def test_a_label_without_category_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(
        OptionError, match=r"label 'dog' has no category: known are 'cat', 'dogs'\. Did you mean 'dogs'\?"
    ):
        to_coco(CATS, 1, categories={"cat": 1, "dogs": 2})
    with pytest.raises(OptionError, match="2 results and 1 image ids"):
        to_coco([CATS, CATS], [1])
    with pytest.raises(OptionError, match="category 5 of image 1 has no label"):
        from_coco([{"image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 1]}])
