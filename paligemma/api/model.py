"""PaliGemma: pictures and a question in, typed answers out.

Every verb is a batch of one: `detect(image, labels)` is `batch("detect", [image], [labels])[0]`, so that many pictures
are answered exactly as each alone. The path is one and the same for all:

    pictures ─ SigLIP ▶ EncodedImage ┐
    verb ─ requests ▶ prompt ────────┴ Processor ▶ Batch ─ engine ▶ Generation ─ requests ▶ result
"""

from collections.abc import Iterator, Sequence
from typing import Any

from paligemma.api.adapters import Chosen
from paligemma.api.arguments import list_of
from paligemma.api.encoded import EncodedImage, Pictures
from paligemma.api.raw import BATCH_SIZE, RawPrompts
from paligemma.api.requests import MAX_NEW_TOKENS, VERBS, Request, Subject, check_call, weigh
from paligemma.api.words import spell
from paligemma.engine import generate as engine
from paligemma.errors import OptionError, nearest
from paligemma.results import Answer, Caption, Detections, ReadText, Segments


class PaliGemma(RawPrompts):
    """A model with everything it needs to be asked; made by `paligemma.load`.

    A picture is a path, a PIL image, uint8[H, W, 3], the bytes of a file, or an `EncodedImage`; a list of those is one
    example of several pictures. Every call takes `adapter`, the name of one that was loaded beside the base; None is
    the base, with what was merged into it.

    Attributes:
        model: the `PaliGemmaModel`; its parameters keep their gradients, the verbs below never use them.
        processor: pictures and texts → `Batch`.
        mask_vae: decoder of mask tokens; None where no file was found, and `segment` says how to give one.
    """

    def __repr__(self) -> str:
        vision, text = self.config.vision, self.config.text
        return (
            f"PaliGemma({self.config.name or 'unnamed'}: {vision.resolution} px, {vision.n_image_tokens} image tokens, "
            f"{vision.depth}+{text.depth} layers, {self.dtype} on {self.device})"
        )

    # ------------------------------------------------------------------------------------------------------- verbs

    def caption(
        self,
        image: Pictures,
        lang: str = "en",
        box: tuple[float, float, float, float] | None = None,
        *,
        max_new_tokens: int | None = None,
        adapter: str | None = None,
    ) -> Caption:
        """Describe a picture.

        Args:
            lang: language code of the caption, such as "de".
            box: (left, top, right, bottom) in pixels: describe this region instead.
            max_new_tokens: longest caption; default 128.
        """
        (found,) = self.batch("caption", [image], [lang], box=box, max_new_tokens=max_new_tokens, adapter=adapter)
        return found  # type: ignore[no-any-return]

    def answer(
        self,
        image: Pictures,
        question: str,
        choices: Sequence[str] | None = None,
        *,
        lang: str = "en",
        max_new_tokens: int | None = None,
        allow_special: bool = False,
        adapter: str | None = None,
    ) -> Answer:
        """Answer a question about a picture.

        Args:
            choices: possible answers. Nothing is generated then: each is weighed by its likelihood, and
                `Answer.choices` holds them best first with probabilities that sum to 1.
            lang: language code of the answer.
            max_new_tokens: longest answer; default 48.
            allow_special: let control tokens such as "<eos>" stand in the question.
        """
        (found,) = self.batch(
            "answer", [image], [question], choices=choices, lang=lang, max_new_tokens=max_new_tokens,
            allow_special=allow_special, adapter=adapter,
        )  # fmt: skip
        return found  # type: ignore[no-any-return]

    def question(
        self,
        image: Pictures,
        answer: str,
        *,
        lang: str = "en",
        max_new_tokens: int | None = None,
        adapter: str | None = None,
    ) -> Answer:
        """Ask what a given answer would fit: the question stands in `Answer.text`."""
        (found,) = self.batch(
            "question", [image], [answer], lang=lang, max_new_tokens=max_new_tokens, adapter=adapter
        )  # fmt: skip
        return found  # type: ignore[no-any-return]

    def detect(
        self,
        image: Pictures,
        labels: str | Sequence[str],
        *,
        min_score: float = 0.0,
        max_new_tokens: int | None = None,
        adapter: str | None = None,
    ) -> Detections:
        """Find things: a list of `Detection(label, box_xyxy_px, score)` in pixels of the picture as it was given.

        Args:
            labels: what to look for; "cat ; dog" means the same as ["cat", "dog"].
            min_score: leave out what scores lower. A score is the geometric mean of the probabilities of the label's
                tokens.
            max_new_tokens: longest answer; default 512. An answer cut there is told in `.problems`.
        """
        (found,) = self.batch(
            "detect", [image], [labels], min_score=min_score, max_new_tokens=max_new_tokens, adapter=adapter
        )
        return found  # type: ignore[no-any-return]

    def segment(
        self,
        image: Pictures,
        labels: str | Sequence[str],
        *,
        min_score: float = 0.0,
        max_new_tokens: int | None = None,
        adapter: str | None = None,
    ) -> Segments:
        """Find things with their masks: a list of `Segment(label, box_xyxy_px, mask: bool[H, W], score)`.

        Raises:
            OptionError: there is no mask decoder.
        """
        (found,) = self.batch(
            "segment", [image], [labels], min_score=min_score, max_new_tokens=max_new_tokens, adapter=adapter
        )
        return found  # type: ignore[no-any-return]

    def read(self, image: Pictures, *, max_new_tokens: int | None = None, adapter: str | None = None) -> ReadText:
        """Read the text in a picture; words come with boxes where the model writes them."""
        (found,) = self.batch("read", [image], max_new_tokens=max_new_tokens, adapter=adapter)
        return found  # type: ignore[no-any-return]

    def batch(
        self,
        verb: str,
        images: Sequence[Pictures],
        args: Sequence[Any] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        max_new_tokens: int | None = None,
        allow_special: bool = False,
        adapter: Chosen = None,
        **options: Any,
    ) -> list[Any]:
        """One verb over many pictures; every answer equals the single call's.

        Args:
            verb: "caption", "answer", "question", "detect", "segment" or "read".
            images: one picture, or list of pictures, per example; sizes and counts may differ.
            args: the second argument of the verb for each example (language, question, answer, labels); None for none.
            batch_size: examples in memory at a time.
            max_new_tokens: longest answer; default by verb.
            allow_special: let control tokens such as "<eos>" stand in questions and answers.
            adapter: one for all, or a list with one (or None) per example.
            options: the verb's keyword arguments, the same for all.

        Raises:
            OptionError: unknown verb or option, args missing or too many, or another number of args than of images.
        """
        if verb not in VERBS:
            raise OptionError(f"there is no verb {verb!r}: expected one of {', '.join(VERBS)}.{nearest(verb, VERBS)}")
        examples = list_of(images, "images")
        if args is None:
            rows: list[tuple[Any, ...]] = [() for _ in examples]
        else:
            rows = [(arg,) for arg in list_of(args, "args")]
        if len(rows) != len(examples):
            raise OptionError(
                f"{len(rows)} args for {len(examples)} images: expected one per image, in the same order."
            )
        for row in rows:
            check_call(verb, row, options)
        options = {name: tuple(value) if isinstance(value, Iterator) else value for name, value in options.items()}
        longest = MAX_NEW_TOKENS[verb] if max_new_tokens is None else max_new_tokens

        def answer(some: Sequence[int]) -> list[Any]:
            handles = self._encode([examples[i] for i in some])
            requests = [
                VERBS[verb](self._subject(handle), *rows[i], **options) for handle, i in zip(handles, some, strict=True)
            ]
            return self._fulfil(handles, requests, allow_special, longest)

        return self._adapters.each(adapter, len(examples), batch_size, answer)

    # ------------------------------------------------------------------------------------------------------ inside

    def _subject(self, handle: EncodedImage) -> Subject:
        decoder = None if self.mask_vae is None else self.mask_vae.decode_array
        return Subject(handle.sizes_hw, decoder, self.config.processing.mask_edges)

    def _fulfil(
        self, handles: Sequence[EncodedImage], requests: Sequence[Request], allow_special: bool, max_new_tokens: int
    ) -> list[Any]:
        """Results of one chunk of requests; all of them have choices, or none."""
        special = allow_special or requests[0].has_tokens
        batch = self._lay_out(handles, [request.prefix for request in requests], allow_special=special)
        if requests[0].choices:
            weights = self._weigh(batch, [request.choices for request in requests], allow_special)
            return [weigh(request.choices, w) for request, w in zip(requests, weights, strict=True)]
        decoded = engine.generate(self.model, batch, max_new_tokens=max_new_tokens, eos=self._eos)
        return [
            request.read(spell(self.processor.tokenizer, one)) for request, one in zip(requests, decoded, strict=True)
        ]
