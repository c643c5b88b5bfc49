"""Detection: `detect cat ; dog` <-> `<loc>x4 cat ; <loc>x4 dog`."""

from collections.abc import Iterable

from paligemma.results import Detection, Detections
from paligemma.tasks.base import MaskDecoder, SizeHw, SpanScores, TokenLogprobs, size_of
from paligemma.tasks.coords import DIVISOR, bins_to_box, box_to_tokens
from paligemma.tasks.grammar import check_area, check_label, check_labels, format_entries, parse_entries


class DetectTask:
    """Boxes with labels."""

    name = "detect"

    def prefix(self, things: str | Iterable[str]) -> str:
        """`detect {thing} ; {thing} ; …`; one string is one thing."""
        return f"detect {check_labels(things)}"

    def suffix(self, result: Iterable[Detection], size_hw: SizeHw | None = None) -> str:
        """One entry per object in the order given; no object at all is the empty string, answered by ending at once.

        Args:
            size_hw: height and width of the original picture; taken from a `Detections` that knows it.

        Raises:
            TaskError: a label that the grammar cannot carry, or a box without area.
        """
        found = list(result)
        size = size_of(result, size_hw) if found else (1, 1)
        return format_entries(
            (box_to_tokens(item.box_xyxy_px, size), None, check_label(item.label, may_be_empty=True)) for item in found
        )

    def parse(
        self,
        text: str,
        *,
        size_hw: SizeHw | None = None,
        token_logprobs: TokenLogprobs | None = None,
        mask_decoder: MaskDecoder | None = None,
        divisor: int = DIVISOR,
    ) -> Detections:
        """Boxes in pixels of the original picture, in the order of the text.

        Args:
            size_hw: height and width of the original picture; None: boxes are fractions of its sides.
            divisor: 1023 inverts the encoding; 1024 as the references' demos do.
        """
        scores = SpanScores(text, token_logprobs)
        entries, problems = parse_entries(text)
        valid, no_area = check_area(text, entries)
        masks = [f"mask tokens that a detection has no use for: {e.label!r}" for e in valid if e.codes is not None]
        found = (
            Detection(
                e.label, bins_to_box(e.bins, size_hw or (1, 1), divisor=divisor), scores.geometric_mean(*e.score_span)
            )
            for e in valid
        )
        return Detections(
            found, raw=text, problems=[*problems, *no_area, *masks], size_hw=size_hw, logprob=scores.total
        )
