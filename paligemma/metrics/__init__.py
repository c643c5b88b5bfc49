"""Results in, numbers out: no model, no files.

detection.py     average precision over IoU thresholds (COCO), box IoU
segmentation.py  mask IoU with misses as 0, referring-expression scores
text.py          exact match, word accuracy, precision and recall of sets
caption.py       CIDEr-D, BLEU, ROUGE-L
answers.py       VQA accuracy, ANLS, relaxed accuracy
"""

from typing import TYPE_CHECKING

from paligemma.lazy import lazy

if TYPE_CHECKING:
    from paligemma.metrics.answers import anls, relaxed_match, soft_accuracy, vqa_accuracy
    from paligemma.metrics.caption import bleu, cider, rouge_l
    from paligemma.metrics.detection import average_precision, box_iou
    from paligemma.metrics.segmentation import mask_iou, mean_mask_iou, referring_scores
    from paligemma.metrics.text import exact_match, set_score, word_accuracy

_HOMES = {
    "anls": "answers",
    "average_precision": "detection",
    "bleu": "caption",
    "box_iou": "detection",
    "cider": "caption",
    "exact_match": "text",
    "mask_iou": "segmentation",
    "mean_mask_iou": "segmentation",
    "referring_scores": "segmentation",
    "relaxed_match": "answers",
    "rouge_l": "caption",
    "set_score": "text",
    "soft_accuracy": "answers",
    "vqa_accuracy": "answers",
    "word_accuracy": "text",
}
__all__ = [
    "anls", "average_precision", "bleu", "box_iou", "cider", "exact_match", "mask_iou", "mean_mask_iou",
    "referring_scores", "relaxed_match", "rouge_l", "set_score", "soft_accuracy", "vqa_accuracy", "word_accuracy",
]  # fmt: skip

__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.{home}" for name, home in _HOMES.items()})
