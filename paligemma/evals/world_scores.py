"""Scores of plain predictions about the picture world: no model is needed here.

A training loop that decodes in its own way, and `paligemma eval tiny`, both end in

    tally = Tally()
    tally.add(exam, replies)      # one reply per exam.questions, for as many exams as there are
    scores = tally.scores()
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from paligemma.data.world import ANSWER_KINDS, Exam, Question, caption_facts, scene_facts
from paligemma.data.world.caption import Fact
from paligemma.data.world.questions import Objects
from paligemma.errors import ShapeError
from paligemma.metrics.detection import average_precision
from paligemma.metrics.segmentation import mean_mask_iou
from paligemma.metrics.text import set_score, word_accuracy
from paligemma.results import Detection, Segment

# What a model replied to one question: found things for `detect` and `segment`, text for everything else.
Reply = str | Sequence[Detection] | Sequence[Segment]


@dataclass(frozen=True, kw_only=True)
class WorldScores:
    """Scores on one set of pictures, each 0..1 and higher better; None where nothing of the kind was asked.

    Attributes:
        n_pictures: how many pictures were scored.
        ap: mean over classes (a class is a colour and a shape) and the IoU thresholds 0.50, 0.55, … 0.95, as COCO.
        ap50: the same at 0.50.
        mask_iou: mean over all true masks of the IoU with the predicted mask of the same label that fits best; each
            predicted mask serves one true one, and a true one that none serves counts 0.
        answers: share of all `answer` questions answered with exactly the true text.
        answers_by_kind: the same by kind of question.
        caption_precision: of the colour-shape pairs that captions state, the share that is in the picture.
        caption_recall: of the pairs in the pictures, the share that captions state.
        ocr_words: word accuracy, 1 - word error rate over the pictures with text, at least 0; case counts.
        n_asked: how many questions stand behind each kind of answer, and how many things behind the rest.
    """

    n_pictures: int
    ap: float | None
    ap50: float | None
    mask_iou: float | None
    answers: float | None
    answers_by_kind: dict[str, float]
    caption_precision: float | None
    caption_recall: float | None
    ocr_words: float | None
    n_asked: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)


@dataclass
class Tally:
    """Takes in replies picture by picture and keeps only what the scores need."""

    n_pictures: int = 0
    _boxes: list[tuple[list[Detection], list[Detection]]] = field(default_factory=list)  # said, true
    _iou_sum: float = 0.0
    _n_masks: int = 0
    _facts: list[tuple[set[Hashable], set[Hashable]]] = field(default_factory=list)
    _texts: list[tuple[str, str]] = field(default_factory=list)
    _answers: dict[str, list[bool]] = field(default_factory=dict)  # kind -> right or wrong

    def add(self, exam: Exam, replies: Sequence[Reply]) -> None:
        """Score the replies to one exam.

        Args:
            exam: the picture and its questions.
            replies: one per question, in order; boxes in pixels of the picture, masks bool[H, W] of its size.

        Raises:
            ShapeError: more or fewer replies than questions.
        """
        if len(replies) != len(exam.questions):
            raise ShapeError(
                f"{len(replies)} replies to {len(exam.questions)} questions about picture {exam.seed} ({exam.world}): "
                "expected one reply per question, in their order."
            )
        self.n_pictures += 1
        for question, reply in zip(exam.questions, replies, strict=True):
            if isinstance(reply, str):
                self._add_text(exam, question, reply)
                continue
            objects = cast(Objects, question.answer)
            boxes, masks = exam.drawn.boxes_xyxy_px, exam.drawn.masks
            if question.task == "detect":
                said = [Detection(p.label, p.box_xyxy_px, p.score) for p in reply]  # a Segment would keep its mask
                self._boxes.append((said, [Detection(label, boxes[i], 1.0) for label, i in objects]))
            elif objects:
                found = mean_mask_iou([reply], [[Segment(label, boxes[i], masks[i], 1.0) for label, i in objects]])
                self._iou_sum += found.mean * found.n_references
                self._n_masks += found.n_references

    def _add_text(self, exam: Exam, question: Question, reply: str) -> None:
        truth = cast(str, question.answer)
        if question.kind == "caption":
            self._facts.append((_numbered(caption_facts(reply)), _numbered(scene_facts(exam.scene))))
        elif question.kind == "ocr":
            self._texts.append((reply, truth))
        else:
            self._answers.setdefault(question.kind, []).append(reply.strip() == truth)

    def scores(self) -> WorldScores:
        """The scores of everything added so far."""
        precision = average_precision([said for said, _ in self._boxes], [true for _, true in self._boxes])
        facts = set_score([said for said, _ in self._facts], [true for _, true in self._facts])
        kinds = [kind for kind in ANSWER_KINDS if kind in self._answers]
        rights = [right for kind in kinds for right in self._answers[kind]]
        return WorldScores(
            n_pictures=self.n_pictures,
            ap=_known(precision.mean),
            ap50=_known(precision.at(0.5)),
            mask_iou=self._iou_sum / self._n_masks if self._n_masks else None,
            answers=float(np.mean(rights)) if rights else None,
            answers_by_kind={kind: float(np.mean(self._answers[kind])) for kind in kinds},
            caption_precision=_known(facts.precision),
            caption_recall=_known(facts.recall),
            ocr_words=_known(word_accuracy([said for said, _ in self._texts], [true for _, true in self._texts])),
            n_asked={
                "boxes": precision.n_references,
                "masks": self._n_masks,
                **{kind: len(self._answers[kind]) for kind in kinds},
                "facts": facts.n_references,
                "words": sum(len(true.split()) for _, true in self._texts),
            },
        )


def _known(value: float) -> float | None:
    """Metrics answer nan where nothing was asked, which JSON has no word for."""
    return None if math.isnan(value) else value


def _numbered(facts: Counter[Fact]) -> set[Hashable]:
    """Two blue stars as a first and a second blue star."""
    return {(fact, k) for fact, n in facts.items() for k in range(n)}
