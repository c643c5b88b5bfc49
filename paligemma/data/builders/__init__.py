"""From a record to a prompt of the pre-training grammar with its answer, and back.

    record = coco[17]
    BUILDERS["detect"].build(record, rng)                 Example(prefix="detect cat ; dog", suffix="<loc…> dog ; …")
    read_example(example, size_hw)                        Record(instances=(…))
    Built(coco, builder_of("caption", lang="de"))         a source of examples

base.py       the protocol, cycling over epochs, raster order, `Built` (a source of examples), `OneOf`
text.py       caption, cap, describe, regions, ocr, answer, question      languages.py  the 35 languages
boxes.py      detect, segment, referring expressions                      noise.py      noise boxes
objects.py    listing, presence, multi-presence, counting                 read.py       the way back

Every choice is a field of a builder; change one with `builder_of(name, field=…)` or `dataclasses.replace`.
"""

import dataclasses
from typing import Any

from paligemma.data.builders.asked import AnswerBuilder, QuestionBuilder
from paligemma.data.builders.base import (
    Builder,
    Built,
    Choice,
    OneOf,
    Order,
    Turn,
    choice_no_replacement,
    raster_order,
)
from paligemma.data.builders.boxes import DetectBuilder, SegmentBuilder
from paligemma.data.builders.languages import LANGUAGES
from paligemma.data.builders.noise import noise_boxes
from paligemma.data.builders.objects import CountBuilder, ListBuilder, MultiPresenceBuilder, PresenceBuilder
from paligemma.data.builders.read import DETECT_NOISE, read_example
from paligemma.data.builders.text import CaptionBuilder, GroundedCaptionBuilder, OcrBuilder
from paligemma.errors import OptionError, nearest

__all__ = [
    "BUILDERS",
    "LANGUAGES",
    "AnswerBuilder",
    "Builder",
    "Built",
    "CaptionBuilder",
    "Choice",
    "CountBuilder",
    "DetectBuilder",
    "GroundedCaptionBuilder",
    "ListBuilder",
    "MultiPresenceBuilder",
    "OcrBuilder",
    "OneOf",
    "Order",
    "PresenceBuilder",
    "QuestionBuilder",
    "SegmentBuilder",
    "Turn",
    "builder_of",
    "choice_no_replacement",
    "noise_boxes",
    "raster_order",
    "read_example",
]

BUILDERS: dict[str, Builder] = {
    "caption": CaptionBuilder(),
    "cap": CaptionBuilder(style="cap"),
    "describe": CaptionBuilder(style="describe"),
    "grounded_caption": GroundedCaptionBuilder(),
    "ocr": OcrBuilder(),
    "ocr_boxes": OcrBuilder(boxes=True),
    "answer": AnswerBuilder(),
    "question": QuestionBuilder(),
    "detect": DetectBuilder(),
    "detect_noise": DETECT_NOISE,
    "segment": SegmentBuilder(),  # segment and referring build with mask_encoder=…
    "referring": SegmentBuilder(referring=True),
    "list_objects": ListBuilder(),
    "presence": PresenceBuilder(),
    "multi_presence": MultiPresenceBuilder(),
    "count": CountBuilder(),
}


def builder_of(name: str, /, **fields: Any) -> Builder:
    """A builder by name, with some of its fields changed.

    Raises:
        OptionError: no such builder, field or value; the nearest name is offered.
    """
    if name not in BUILDERS:
        raise OptionError(f"no builder '{name}': expected one of {', '.join(BUILDERS)}.{nearest(name, BUILDERS)}")
    builder: Any = BUILDERS[name]
    known = [field.name for field in dataclasses.fields(builder)]
    for field in fields:
        if field not in known:
            raise OptionError(
                f"builder '{name}' has no field '{field}': expected one of {', '.join(known)}.{nearest(field, known)}"
            )
    changed: Builder = dataclasses.replace(builder, **fields)
    return changed
