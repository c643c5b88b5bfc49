"""The scores of the embedded model: laws of the scoring, and the way from a model to its report."""

import json

import numpy as np
import pytest

from paligemma.data.world import HELD_OUT, exam, sample_scene
from paligemma.errors import OptionError, ShapeError
from paligemma.evals.tiny import evaluate
from paligemma.evals.world_scores import Tally
from paligemma.results import Answer, Caption, Detection, Detections, ReadText, Segment, Segments

NUMBERS = ("ap", "ap50", "mask_iou", "answers", "caption_precision", "caption_recall")


def true_reply(one, question):
    boxes, masks = one.drawn.boxes_xyxy_px, one.drawn.masks
    if question.task == "detect":
        return [Detection(label, boxes[i], 0.9) for label, i in question.answer]
    if question.task == "segment":
        return [Segment(label, boxes[i], masks[i], 0.9) for label, i in question.answer]
    return question.answer


def empty_reply(_, question):
    return "" if question.task == "text" else []


def scores(replier, world="full", n=25):
    tally = Tally()
    for seed in range(n):
        one = exam(world, seed)
        tally.add(one, [replier(one, question) for question in one.questions])
    return tally.scores()


def altered(task, change):
    """The truth, with the list of a task's objects changed."""

    def replier(one, question):
        reply = true_reply(one, question)
        return change(reply) if question.task == task else reply

    return replier


@pytest.mark.parametrize("world", ["plain", "full"])
def test_true_replies_score_one_everywhere(world):
    perfect = scores(true_reply, world)
    assert [getattr(perfect, name) for name in NUMBERS] == [pytest.approx(1.0)] * len(NUMBERS)
    assert set(perfect.answers_by_kind.values()) == {1.0}
    assert perfect.ocr_words == (1.0 if world == "full" else None)
    assert perfect.n_pictures == 25


def test_empty_replies_score_nothing():
    nothing = scores(empty_reply)
    assert (nothing.ap, nothing.ap50, nothing.mask_iou, nothing.answers) == (0, 0, 0, 0)
    assert (nothing.caption_recall, nothing.ocr_words) == (0, 0)
    assert nothing.caption_precision is None  # nothing was stated


def test_a_missed_mask_counts_as_zero():
    half = scores(altered("segment", lambda found: found[::2]))
    shown = sum(
        len(range(0, len(q.answer), 2)) for s in range(25) for q in exam("full", s).questions if q.task == "segment"
    )
    assert half.mask_iou == pytest.approx(shown / half.n_asked["masks"])
    assert half.ap == pytest.approx(1.0)  # the boxes were all there


def test_a_mask_said_twice_serves_one_thing_only():
    def doubled(found):
        return [found[0]] * len(found)

    def pairs_of_equals():
        for seed in range(400):
            one = exam("full", seed)
            labels = [label for label, _ in one.questions[1].answer]
            if len(labels) == 2 and labels[0] == labels[1]:
                yield one

    tally = Tally()
    for one in pairs_of_equals():
        tally.add(one, [altered("segment", doubled)(one, question) for question in one.questions])
    assert tally.n_pictures > 0
    assert tally.scores().mask_iou == pytest.approx(0.5, abs=0.02)  # the copy may overlap the other thing a little


def test_a_mask_under_another_label_counts_nothing():
    renamed = scores(
        altered("segment", lambda found: [Segment("blue car", s.box_xyxy_px, s.mask, s.score) for s in found])
    )
    assert renamed.mask_iou == 0


def test_a_mask_half_as_large_counts_half():
    def thinned(segment):
        mask = segment.mask.copy()
        flat = mask.reshape(-1)
        flat[np.flatnonzero(flat)[::2]] = False
        return Segment(segment.label, segment.box_xyxy_px, mask, segment.score)

    assert scores(altered("segment", lambda found: [thinned(s) for s in found])).mask_iou == pytest.approx(
        0.5, abs=0.01
    )


def test_boxes_off_by_a_tenth_cost_ap_but_not_ap50():
    def shifted(box):
        left, top, right, bottom = box
        return left + 0.1 * (right - left), top, right + 0.1 * (right - left), bottom

    moved = scores(
        altered("detect", lambda found: [Detection(d.label, shifted(d.box_xyxy_px), d.score) for d in found])
    )
    assert moved.ap50 == pytest.approx(1.0)
    assert 0.6 < moved.ap < 0.8  # IoU 0.82: right at 0.50 to 0.80, seven of ten thresholds


def test_invented_boxes_of_a_true_class_lower_precision():
    def inventing(found):
        return [*found, *(Detection(d.label, (0.0, 0.0, 3.0, 3.0), 0.99) for d in found)]

    assert scores(altered("detect", inventing)).ap50 < 0.8


def test_caption_facts_are_counted_both_ways():
    def saying_more(one, question):
        reply = true_reply(one, question)
        return f"{reply} and nine purple moons" if question.kind == "caption" else reply

    more = scores(saying_more)
    assert more.caption_recall == pytest.approx(1.0)
    assert more.caption_precision == pytest.approx(more.n_asked["facts"] / (more.n_asked["facts"] + 9 * 25), abs=0.05)


def test_words_count_once_each_and_with_their_case():
    def shouting(one, question):
        reply = true_reply(one, question)
        return reply.swapcase() if question.kind == "ocr" else reply

    digits = sum(
        word.isdigit()
        for s in range(25)
        for q in exam("full", s).questions
        if q.kind == "ocr"
        for word in q.answer.split()
    )
    shouted = scores(shouting)
    assert shouted.ocr_words == pytest.approx(digits / shouted.n_asked["words"])


def test_replies_that_are_not_one_per_question_are_refused():
    one = exam("plain", 0)
    with pytest.raises(ShapeError, match=f"1 replies to {len(one.questions)} questions about picture 0"):
        Tally().add(one, [""])


@pytest.mark.parametrize("world", ["plain", "full"])
def test_an_exam_is_fixed_held_out_and_complete(world):
    assert len(HELD_OUT[world]) == 1000
    for seed in range(40):
        one, again = exam(world, seed), exam(world, seed)
        assert one.questions == again.questions
        assert one.scene == sample_scene(seed, world, "held_out") != sample_scene(seed, world, "train")
        kinds = [question.kind for question in one.questions]
        assert kinds[:2] == ["detect", "segment"]
        assert len(set(kinds)) == len(kinds)
        assert ("ocr" in kinds) == bool(one.scene.texts)
        for question in one.questions[:2]:
            pairs = {one.scene.things[i].name for i in one.scene.shapes}
            assert pairs < set(question.labels)
            assert len(question.labels) == len(pairs) + 1
            assert {i for _, i in question.answer} == set(one.scene.shapes)


class Oracle:
    """Answers every verb truthfully, and like any model knows only the picture and the prompt."""

    def __init__(self, unseen=()):
        self.known = {}
        self.n_encoded = 0
        for world, what in [*((world, None) for world in HELD_OUT), *(("full", what) for what in unseen)]:
            for seed in range(6):
                one = exam(world, seed, what)
                self.known[one.drawn.image.tobytes()] = one

    def encode_image(self, image):
        self.n_encoded += 1
        return self.known[image.tobytes()]

    def batch(self, verb, images, args=None, *, batch_size, max_new_tokens):
        assert max_new_tokens >= 16
        assert batch_size >= 1
        return [self.one(verb, image, arg) for image, arg in zip(images, args or [None] * len(images), strict=True)]

    def one(self, verb, one, arg):
        prefix = {
            "detect": "detect ",
            "segment": "segment ",
            "caption": "caption ",
            "read": "ocr",
            "answer": "answer en ",
        }[verb]
        prefix += " ; ".join(arg) if verb in ("detect", "segment") else arg or ""
        (question,) = [question for question in one.questions if question.prefix == prefix]
        reply = true_reply(one, question)
        kinds = {
            "detect": Detections,
            "segment": Segments,
            "caption": lambda text: Caption(text, 0.0),
            "read": ReadText,
            "answer": lambda text: Answer(text, 0.0),
        }
        return kinds[verb](reply)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_model_that_knows_everything_is_asked_everything_and_scores_one(batch_size):
    oracle = Oracle()
    report = evaluate(oracle, limit=6, batch_size=batch_size, progress=False)
    assert list(report.worlds) == ["plain", "full"]
    assert oracle.n_encoded == 12  # every picture once
    for found in report.worlds.values():
        assert found.n_pictures == 6
        assert [getattr(found, name) for name in NUMBERS] == [pytest.approx(1.0)] * len(NUMBERS)
        assert found.n_asked["count"] == 6


def test_a_report_is_json_and_a_table_with_one_column_per_set():
    report = evaluate(Oracle(), limit=2, progress=False)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    lines = report.table().splitlines()
    assert lines[0].split() == ["held-out", "pictures", "plain", "full"]
    assert lines[-1].split() == ["pictures", "2", "2"]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert any(line.startswith("AP50") and line.split()[1:] == ["1.000", "1.000"] for line in lines)


def test_progress_goes_to_stderr_only(capsys):
    evaluate(Oracle(), limit=1, worlds=["plain"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "eval tiny, plain" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"worlds": ["plane"]}, "the set 'plane' does not"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        evaluate(Oracle(), **options)


def test_unseen_sets_are_the_full_pictures_in_another_style():
    report = evaluate(Oracle(("shapes", "backgrounds", "fonts")), limit=6, unseen=True, progress=False)
    assert list(report.worlds) == ["plain", "full", "shapes", "backgrounds", "texts", "fonts"]
    for name, found in report.worlds.items():
        assert [getattr(found, score) for score in NUMBERS] == [pytest.approx(1.0)] * len(NUMBERS), name
    with_text = sum(bool(exam("full", seed).scene.texts) for seed in range(6))
    assert [report.worlds[name].n_pictures for name in ("shapes", "texts", "fonts")] == [6, with_text, with_text]
    assert report.worlds["texts"].n_asked["words"] == report.worlds["full"].n_asked["words"]
    lines = report.table().splitlines()
    assert lines[0].split() == ["seen", "unseen", "unseen", "seen", "unseen"]
    assert {len(line) for line in lines} == {len(lines[0])}
