"""The way back from any prompt: which builder wrote it, and what the record said."""

from paligemma.data.builders.asked import AnswerBuilder, QuestionBuilder
from paligemma.data.builders.base import Builder
from paligemma.data.builders.boxes import DetectBuilder, SegmentBuilder
from paligemma.data.builders.objects import CountBuilder, ListBuilder, MultiPresenceBuilder, PresenceBuilder
from paligemma.data.builders.text import CaptionBuilder, GroundedCaptionBuilder, OcrBuilder
from paligemma.data.example import Example
from paligemma.data.record import Record
from paligemma.tasks.base import MaskDecoder, SizeHw

ALL_CLASSES = "detect all classes"  # PaliGemma 2 report, appendix C

# The report has no number; a text of 256 tokens holds so many things with labels of up to three tokens.
DETECT_NOISE = DetectBuilder(prefix=ALL_CLASSES, fill_to=32)

READERS: tuple[Builder, ...] = (  # the first that knows a prompt reads it: special ones before general ones
    GroundedCaptionBuilder(),
    CaptionBuilder(),
    CaptionBuilder(style="cap"),
    CaptionBuilder(style="describe"),
    OcrBuilder(),
    ListBuilder(),
    MultiPresenceBuilder(),
    PresenceBuilder(),
    CountBuilder(),
    AnswerBuilder(),
    QuestionBuilder(),
    DetectBuilder(),
    SegmentBuilder(),
)


def read_example(example: Example, size_hw: SizeHw, mask_decoder: MaskDecoder | None = None) -> Record | None:
    """What an example says, read by the builder whose prompt it has.

    Args:
        size_hw: height and width of the picture in pixels.
        mask_decoder: int[n, 16] -> float32[n, 64, 64]; without one, objects come back without masks.

    Returns:
        The record; None for a raw prompt, which is nobody's: a bare question, a referring expression.

    Raises:
        DataError: an answer that does not follow the grammar of its prompt.
    """
    if example.prefix == ALL_CLASSES:
        return DETECT_NOISE.read(example, size_hw)
    reader = next((reader for reader in READERS if reader.reads(example.prefix)), None)
    return None if reader is None else reader.read(example, size_hw, mask_decoder=mask_decoder)
