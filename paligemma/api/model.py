"""PaliGemma: pictures and a question in, typed answers out.

Every verb is a batch of one: `detect(image, labels)` is `batch("detect", [image], [labels])[0]`, so that many pictures
are answered exactly as each alone. The path is one and the same for all:

    pictures ─ SigLIP ▶ EncodedImage ┐
    verb ─ requests ▶ prompt ────────┴ Processor ▶ Batch ─ engine ▶ Generation ─ requests ▶ result
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paligemma.api.arguments import (
    chunks,
    forbidden_of,
    is_several,
    list_of,
    per_prompt,
    per_prompt_rules,
    per_prompt_seeds,
    pictures_of,
)
from paligemma.api.encoded import EncodedImage, Pictures
from paligemma.api.requests import MAX_NEW_TOKENS, VERBS, Request, Subject, check_call, weigh
from paligemma.config import Beams, PaliGemmaConfig
from paligemma.engine import generate as engine
from paligemma.engine.beam import beam_search
from paligemma.engine.filters import Constraint, Forbidden
from paligemma.engine.generate import NewToken
from paligemma.engine.prompts import Decoded
from paligemma.engine.sampling import GREEDY, Greedy, Policy
from paligemma.engine.score import score_suffixes
from paligemma.errors import OptionError, nearest
from paligemma.models.mask_vae import MaskVae
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch
from paligemma.processing.processor import Processor
from paligemma.results import Answer, Caption, Detections, Generation, ReadText, Segments

BATCH_SIZE = 8
DEFAULT_NEW_TOKENS = 128  # of a raw prompt, whose task is unknown


class PaliGemma:
    """A model with everything it needs to be asked; made by `paligemma.load`.

    A picture is a path, a PIL image, uint8[H, W, 3], the bytes of a file, or an `EncodedImage`; a list of those is one
    example of several pictures.

    Attributes:
        model: the `PaliGemmaModel`; its parameters keep their gradients, the verbs below never use them.
        processor: pictures and texts → `Batch`.
        mask_vae: decoder of mask tokens; None where no file was found, and `segment` says how to give one.
    """

    def __init__(self, model: PaliGemmaModel, processor: Processor, mask_vae: MaskVae | None = None) -> None:
        self.model = model
        self.processor = processor
        self.mask_vae = mask_vae

    def __repr__(self) -> str:
        vision, text = self.config.vision, self.config.text
        return (
            f"PaliGemma({self.config.name or 'unnamed'}: {vision.resolution} px, {vision.n_image_tokens} image tokens, "
            f"{vision.depth}+{text.depth} layers, {self.dtype} on {self.device})"
        )

    @property
    def config(self) -> PaliGemmaConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.projector.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.projector.weight.dtype

    # ------------------------------------------------------------------------------------------------------- verbs

    def caption(
        self,
        image: Pictures,
        lang: str = "en",
        box: tuple[float, float, float, float] | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> Caption:
        """Describe a picture.

        Args:
            lang: language code of the caption, such as "de".
            box: (left, top, right, bottom) in pixels: describe this region instead.
            max_new_tokens: longest caption; default 128.
        """
        (found,) = self.batch("caption", [image], [lang], box=box, max_new_tokens=max_new_tokens)
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
            allow_special=allow_special,
        )  # fmt: skip
        return found  # type: ignore[no-any-return]

    def question(self, image: Pictures, answer: str, *, lang: str = "en", max_new_tokens: int | None = None) -> Answer:
        """Ask what a given answer would fit: the question stands in `Answer.text`."""
        (found,) = self.batch("question", [image], [answer], lang=lang, max_new_tokens=max_new_tokens)
        return found  # type: ignore[no-any-return]

    def detect(
        self, image: Pictures, labels: str | Sequence[str], *, min_score: float = 0.0, max_new_tokens: int | None = None
    ) -> Detections:
        """Find things: a list of `Detection(label, box_xyxy_px, score)` in pixels of the picture as it was given.

        Args:
            labels: what to look for; "cat ; dog" means the same as ["cat", "dog"].
            min_score: leave out what scores lower. A score is the geometric mean of the probabilities of the label's
                tokens.
            max_new_tokens: longest answer; default 512. An answer cut there is told in `.problems`.
        """
        (found,) = self.batch("detect", [image], [labels], min_score=min_score, max_new_tokens=max_new_tokens)
        return found  # type: ignore[no-any-return]

    def segment(
        self, image: Pictures, labels: str | Sequence[str], *, min_score: float = 0.0, max_new_tokens: int | None = None
    ) -> Segments:
        """Find things with their masks: a list of `Segment(label, box_xyxy_px, mask: bool[H, W], score)`.

        Raises:
            OptionError: there is no mask decoder.
        """
        (found,) = self.batch("segment", [image], [labels], min_score=min_score, max_new_tokens=max_new_tokens)
        return found  # type: ignore[no-any-return]

    def read(self, image: Pictures, *, max_new_tokens: int | None = None) -> ReadText:
        """Read the text in a picture; words come with boxes where the model writes them."""
        (found,) = self.batch("read", [image], max_new_tokens=max_new_tokens)
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
        results: list[Any] = []
        for chunk in chunks(len(examples), batch_size):
            handles = self._encode([examples[i] for i in chunk])
            requests = [
                VERBS[verb](self._subject(handle), *rows[i], **options)
                for handle, i in zip(handles, chunk, strict=True)
            ]
            results += self._fulfil(handles, requests, allow_special, longest)
        return results

    # --------------------------------------------------------------------------------------------- beneath the verbs

    def generate(
        self,
        images: Pictures,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Policy | None = None,
        n_beams: int = 1,
        beam: Beams | None = None,
        constraint: Constraint | Sequence[Constraint | None] | None = None,
        best_of: int = 1,
        forbidden: Forbidden | None = None,
        seeds: Sequence[int] | None = None,
        allow_special: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> list[Generation]:
        """Continue raw prompts.

        Args:
            images: with one prompt: a picture, a list of pictures that it is about, or None. With a list of prompts:
                one such entry per prompt, or a single picture that all of them are about.
            prompts: prefixes without image, bos and separator; "" is allowed.
            max_new_tokens: end of sequence included.
            sampling: `Greedy()` (default) or `Sampling(temperature, top_k, top_p, seed)`.
            n_beams: more than 1 searches with beams instead.
            beam: "bv" (the JAX original; default by `config.beams`) or "hf" (transformers).
            constraint: which tokens may come next: the tokens written so far → bool[V], or None for all; one rule, or
                one (or None) per prompt.
            best_of: sample so many answers per prompt and keep the likeliest.
            forbidden: ids, or bool[V], or bool[n, V] with a mask per prompt, that are never written; log-probabilities
                stay those of the unmasked distribution.
            seeds: one per prompt in place of `sampling.seed` for all, for several answers to one prompt.
            allow_special: let control tokens such as "<eos>" stand in a prompt.
            batch_size: prompts in memory at a time.

        Returns:
            One `Generation` per prompt, in order.
        """
        if best_of != 1 and n_beams != 1:
            raise OptionError(f"best_of={best_of} with n_beams={n_beams}: expected sampling or beams. Leave one out.")
        if n_beams != 1 and sampling is not None and not isinstance(sampling, Greedy):
            raise OptionError(f"sampling with n_beams={n_beams}: beam search draws nothing. Leave one of them out.")
        if n_beams != 1 and seeds is not None:
            raise OptionError(f"seeds with n_beams={n_beams}: beam search draws nothing. Leave one of them out.")
        texts = [prompts] if isinstance(prompts, str) else list_of(prompts, "prompts")
        if len(texts) > batch_size and not is_several(images):
            images = self.encode_image(images)  # once, not once per chunk
        examples = per_prompt(images, texts, is_single=isinstance(prompts, str))
        rules, each_seed = per_prompt_rules(constraint, len(texts)), per_prompt_seeds(seeds, len(texts))
        out: list[Generation] = []
        for chunk in chunks(len(texts), batch_size):
            banned = forbidden_of(forbidden, len(texts), chunk)
            batch = self._lay_out(
                self._encode([examples[i] for i in chunk]), [texts[i] for i in chunk], allow_special=allow_special
            )
            if n_beams == 1:
                decoded = engine.generate(
                    self.model, batch, max_new_tokens=max_new_tokens, sampling=sampling or GREEDY, eos=self._eos,
                    forbidden=banned, constraint=[rules[i] for i in chunk], best_of=best_of,
                    seeds=None if each_seed is None else [each_seed[i] for i in chunk],
                )  # fmt: skip
            else:
                decoded = beam_search(
                    self.model, batch, n_beams=n_beams, max_new_tokens=max_new_tokens, kind=beam, eos=self._eos,
                    forbidden=banned, constraint=[rules[i] for i in chunk],
                )  # fmt: skip
            out += [self._spell(one) for one in decoded]
        return out

    def stream(
        self,
        image: Pictures,
        prompt: str,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Policy | None = None,
        constraint: Constraint | None = None,
        forbidden: Forbidden | None = None,
        allow_special: bool = False,
    ) -> Iterator[str]:
        """The answer to a raw prompt, piece by piece as it is written; joined, the text of `generate`.

        The model works only while the pieces are taken: who stops iterating stops it. A character that is spelled in
        several tokens comes with its last one.
        """
        batch = self._lay_out(self._encode([image]), [prompt], allow_special=allow_special)
        steps = engine.stream(
            self.model, batch, max_new_tokens=max_new_tokens, sampling=sampling or GREEDY, eos=self._eos,
            forbidden=forbidden, constraint=constraint,
        )  # fmt: skip
        return self._pieces(steps)

    def score(
        self,
        image: Pictures,
        prompt: str,
        suffixes: Sequence[str],
        *,
        allow_special: bool = False,
        batch_size: int = 32,
    ) -> NDArray[np.float64]:
        """Log-likelihood of each suffix after a raw prompt, end of sequence included; the prompt is read once.

        Args:
            suffixes: whole answers; "" is the likelihood of no answer at all.
            batch_size: suffixes in memory at a time.

        Returns:
            float64[n], in nats; a sum over tokens, without length normalisation.
        """
        if isinstance(suffixes, str):
            raise OptionError(f"suffixes={suffixes!r} is one text: expected a list of texts. Write [{suffixes!r}].")
        batch = self._lay_out(self._encode([image]), [prompt], allow_special=allow_special)
        return self._weigh(batch, [list(suffixes)], allow_special, batch_size)[0]

    def encode_image(self, image: Pictures) -> EncodedImage:
        """Run the image tower once: the handle stands for the picture, or pictures, in every call.

        The handle belongs to this model, and stays on its device.
        """
        return self._encode([image])[0]

    # ------------------------------------------------------------------------------------------------------ inside

    @property
    def _eos(self) -> int:
        return self.config.tokens.eos

    def _subject(self, handle: EncodedImage) -> Subject:
        decoder = None if self.mask_vae is None else self.mask_vae.decode_array
        return Subject(handle.sizes_hw, decoder, self.config.processing.mask_edges)

    @torch.no_grad()  # not inference_mode: a handle may take part in training the decoder
    def _encode(self, examples: Sequence[Pictures]) -> list[EncodedImage]:
        """One handle per example; all new pictures pass the tower together, each of them once."""
        flat = [pictures_of(example) for example in examples]
        new = {id(p): p for pictures in flat for p in pictures if not isinstance(p, EncodedImage)}
        loaded = [self.processor.load_image(picture) for picture in new.values()]
        encoded: dict[int, EncodedImage] = {}
        if loaded:
            pixels = self.processor.pixels(loaded).to(self.device, self.dtype)
            for key, picture, embeds in zip(new, loaded, self.model.embed_image(pixels), strict=True):
                encoded[key] = EncodedImage(embeds[None], (picture.shape[:2],))
        nothing = torch.zeros(0, self.config.vision.n_image_tokens, self.config.text.width, device=self.device)
        return [
            EncodedImage.joined([encoded.get(id(p), p) for p in pictures]) if pictures else EncodedImage(nothing, ())
            for pictures in flat
        ]

    def _lay_out(
        self, handles: Sequence[EncodedImage], prompts: Sequence[str], *, allow_special: bool = False
    ) -> Batch:
        images = [[handle] if handle.n_images else None for handle in handles]
        return self.processor(images, list(prompts), allow_special=allow_special)

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
        return [request.read(self._spell(one)) for request, one in zip(requests, decoded, strict=True)]

    def _weigh(
        self, batch: Batch, suffixes: Sequence[Sequence[str]], allow_special: bool, batch_size: int = 32
    ) -> list[NDArray[np.float64]]:
        """Log-likelihoods of whole answers to each prompt of a batch."""
        ids = [[self._suffix_ids(text, allow_special) for text in some] for some in suffixes]
        scored = score_suffixes(self.model, batch, ids, batch_size=batch_size)
        return [np.array([one.logprob for one in some], np.float64) for some in scored]

    def _suffix_ids(self, text: str, allow_special: bool) -> list[int]:
        """Tokens of a whole answer, eos included."""
        row = self.processor.sequence(0, "", text, allow_special=allow_special, where=f"the answer {text!r}")
        return [int(token) for token in row.tokens[row.mask_loss]]

    def _spell(self, decoded: Decoded) -> Generation:
        pieces = tuple(self.processor.tokenizer.pieces(decoded.tokens))
        return Generation("".join(pieces), decoded.tokens, decoded.logprobs, decoded.finish_reason, pieces)

    def _pieces(self, steps: Iterator[tuple[NewToken, ...]]) -> Iterator[str]:
        text = self.processor.tokenizer.stream()
        for (new,) in steps:
            if piece := text.push(new.token):
                yield piece
        if rest := text.close():
            yield rest
