"""Results in, numbers out: no model, no files.

detection.py     average precision over IoU thresholds (COCO), box IoU
segmentation.py  mask IoU with misses as 0, referring-expression scores
text.py          exact match, word accuracy, precision and recall of sets
"""
