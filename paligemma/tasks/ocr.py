"""Reading text: `ocr` <-> a plain transcription, or words with their boxes.

With boxes the answer has the grammar of detection, the transcription in the label's place, in raster order. The report
describes that task without printing the literal string; this form is ours, so one parser reads both.
"""

from paligemma.results import ReadText, Word
from paligemma.tasks.base import MaskDecoder, SizeHw, SpanScores, TokenLogprobs, plain_text, size_of
from paligemma.tasks.coords import DIVISOR, bins_to_box, box_to_tokens
from paligemma.tasks.grammar import check_area, check_label, format_entries, parse_entries, stray_tokens


class ReadTask:
    """Text, with or without boxes."""

    name = "read"

    def prefix(self) -> str:
        """`ocr`."""
        return "ocr"

    def suffix(self, result: ReadText | str, size_hw: SizeHw | None = None) -> str:
        """Words with boxes where the result has words, its text otherwise; no text at all is the empty string.

        Raises:
            TaskError: a word that the grammar cannot carry, a box without area, words without size_hw.
        """
        if isinstance(result, ReadText) and result.words:
            size = size_of(result, size_hw)
            return format_entries(
                (box_to_tokens(w.box_xyxy_px, size), None, check_label(w.text, "word")) for w in result.words
            )
        text = result.text if isinstance(result, ReadText) else result
        return plain_text(text, "text") if text.strip() else ""

    def parse(
        self,
        text: str,
        *,
        size_hw: SizeHw | None = None,
        token_logprobs: TokenLogprobs | None = None,
        mask_decoder: MaskDecoder | None = None,
        divisor: int = DIVISOR,
    ) -> ReadText:
        """A transcription. Where the text has boxes, `.words` holds those with area, and `.text` joins all readings."""
        scores = SpanScores(text, token_logprobs)
        entries, problems = parse_entries(text)
        if not entries:
            return ReadText(text.strip(), (), scores.total, raw=text, problems=tuple(stray_tokens(text)))
        valid, no_area = check_area(text, entries)
        words = tuple(
            Word(e.label, bins_to_box(e.bins, size_hw or (1, 1), divisor=divisor), scores.geometric_mean(*e.score_span))
            for e in valid
        )
        reading = " ".join(entry.label for entry in entries if entry.label)
        return ReadText(reading, words, scores.total, raw=text, problems=(*problems, *no_area))
