"""Strings <-> typed results: each task builds its prompt, formats ground truth, and parses what a model wrote.

TASKS["detect"].prefix(["cat", "dog"])                     "detect cat ; dog"
TASKS["detect"].suffix(detections, size_hw)                "<loc0123><loc0045><loc0567><loc0890> cat"
TASKS["detect"].parse(text, size_hw=size_hw)               Detections in pixels of the original picture

base.py          the protocol, scores from token log-probabilities
grammar.py       the one grammar of boxes, masks and labels
coords.py        boxes <-> location tokens        masks.py  masks <-> 64 x 64 maps of a box
caption.py, vqa.py, detection.py, segmentation.py, ocr.py
"""

from paligemma.tasks.base import MaskDecoder, MaskEncoder, Task, TokenLogprobs
from paligemma.tasks.caption import CaptionTask, GroundedCaptionTask
from paligemma.tasks.detection import DetectTask
from paligemma.tasks.ocr import ReadTask
from paligemma.tasks.segmentation import SegmentTask
from paligemma.tasks.vqa import AnswerTask, QuestionTask

__all__ = ["TASKS", "MaskDecoder", "MaskEncoder", "Task", "TokenLogprobs"]

TASKS: dict[str, Task] = {
    "caption": CaptionTask(),
    "answer": AnswerTask(),
    "detect": DetectTask(),
    "segment": SegmentTask(),
    "read": ReadTask(),
    "grounded_caption": GroundedCaptionTask(),
    "question": QuestionTask(),
}
