"""Raw prompts: what stands beneath the verbs, with adapters chosen per request.

pictures ─ SigLIP ▶ EncodedImage ┐
prompt ──────────────────────────┴ Processor ▶ Batch ─ engine ▶ Generation, pieces of text, likelihoods
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from paligemma.api.adapters import Adapters, Chosen, open_adapter
from paligemma.api.arguments import forbidden_of, is_several, list_of, per_prompt, per_prompt_rules, per_prompt_seeds
from paligemma.api.encoded import EncodedImage, Pictures
from paligemma.api.encoding import encode
from paligemma.api.words import answer_ids, spell, spell_along
from paligemma.checkpoints.lora import Adapter
from paligemma.config import Beams, PaliGemmaConfig
from paligemma.engine import generate as engine
from paligemma.engine.beam import beam_search
from paligemma.engine.filters import Constraint, Forbidden
from paligemma.engine.sampling import GREEDY, Greedy, Policy
from paligemma.engine.score import score_suffixes
from paligemma.errors import OptionError
from paligemma.models.mask_vae import MaskVae
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch
from paligemma.processing.processor import Processor
from paligemma.results import Generation

BATCH_SIZE = 8
DEFAULT_NEW_TOKENS = 128  # of a raw prompt, whose task is unknown


class RawPrompts:
    """The part of `PaliGemma` that knows prompts and texts, and no task."""

    def __init__(self, model: PaliGemmaModel, processor: Processor, mask_vae: MaskVae | None = None) -> None:
        self.model = model
        self.processor = processor
        self.mask_vae = mask_vae
        self._adapters = Adapters(model)

    @property
    def config(self) -> PaliGemmaConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.projector.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.projector.weight.dtype

    # ---------------------------------------------------------------------------------------------------- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of those beside the base."""
        return self._adapters.names

    def add_adapter(self, name: str, folder: str | Path | Adapter, *, strict: bool = True) -> None:
        """Load a PEFT LoRA folder beside the base, to be asked for by name.

        Args:
            folder: or what `checkpoints.read_adapter` read of one.
            strict: refuse an adapter that was trained on other published weights, or does not fit to the last tensor.

        Raises:
            OptionError: the name is taken, or cannot be one.
            CheckpointError: it is the adapter of another model, or changes more than linear layers.
        """
        if not isinstance(folder, Adapter):
            folder = open_adapter(folder, self.config, strict=strict)
        self._adapters.add(name, folder)

    def remove_adapter(self, name: str) -> None:
        """Take an adapter off and give its memory back; not while a request with it is being answered.

        Raises:
            OptionError: there is none of that name.
        """
        self._adapters.remove(name)

    # ------------------------------------------------------------------------------------------------------ prompts

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
        adapter: Chosen = None,
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
            adapter: one for all, or a list with one (or None) per prompt.

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
        examples = per_prompt(images, texts, is_single=isinstance(prompts, str))
        rules, each_seed = per_prompt_rules(constraint, len(texts)), per_prompt_seeds(seeds, len(texts))
        shared: dict[str | None, EncodedImage] = {}  # one picture for all passes the tower once, not once per chunk

        def answer(some: Sequence[int]) -> list[Generation]:
            if is_several(images) or len(texts) <= batch_size:
                handles = self._encode([examples[i] for i in some])
            else:
                seen_by = self._adapters.of_pictures()
                if seen_by not in shared:
                    (shared[seen_by],) = self._encode([images])
                handles = [shared[seen_by]] * len(some)
            batch = self._lay_out(handles, [texts[i] for i in some], allow_special=allow_special)
            banned, rule = forbidden_of(forbidden, len(texts), some), [rules[i] for i in some]
            if n_beams == 1:
                decoded = engine.generate(
                    self.model, batch, max_new_tokens=max_new_tokens, sampling=sampling or GREEDY, eos=self._eos,
                    forbidden=banned, constraint=rule, best_of=best_of,
                    seeds=None if each_seed is None else [each_seed[i] for i in some],
                )  # fmt: skip
            else:
                decoded = beam_search(
                    self.model, batch, n_beams=n_beams, max_new_tokens=max_new_tokens, kind=beam, eos=self._eos,
                    forbidden=banned, constraint=rule,
                )  # fmt: skip
            return [spell(self.processor.tokenizer, one) for one in decoded]

        return self._adapters.each(adapter, len(texts), batch_size, answer)

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
        adapter: str | None = None,
    ) -> Iterator[str]:
        """The answer to a raw prompt, piece by piece as it is written; joined, the text of `generate`.

        The model works only while the pieces are taken: who stops iterating stops it. A character that is spelled in
        several tokens comes with its last one.
        """
        with self._adapters.choose(adapter):
            batch = self._lay_out(self._encode([image]), [prompt], allow_special=allow_special)
        steps = engine.stream(
            self.model, batch, max_new_tokens=max_new_tokens, sampling=sampling or GREEDY, eos=self._eos,
            forbidden=forbidden, constraint=constraint,
        )  # fmt: skip
        return spell_along(self.processor.tokenizer, self._adapters.along(adapter, steps))

    def score(
        self,
        image: Pictures,
        prompt: str,
        suffixes: Sequence[str],
        *,
        allow_special: bool = False,
        batch_size: int = 32,
        adapter: str | None = None,
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
        with self._adapters.choose(adapter):
            batch = self._lay_out(self._encode([image]), [prompt], allow_special=allow_special)
            return self._weigh(batch, [list(suffixes)], allow_special, batch_size)[0]

    def encode_image(self, image: Pictures, *, adapter: str | None = None) -> EncodedImage:
        """Run the image tower once: the handle stands for the picture, or pictures, in every call.

        The handle belongs to this model, and stays on its device. Only an adapter that changes the image tower or the
        projector needs handles of its own.
        """
        with self._adapters.choose(adapter):
            return self._encode([image])[0]

    # ------------------------------------------------------------------------------------------------------ inside

    @property
    def _eos(self) -> int:
        return self.config.tokens.eos

    def _encode(self, examples: Sequence[Pictures]) -> list[EncodedImage]:
        """One handle per example, under the adapter that is chosen around here."""
        adapters = self._adapters
        return encode(
            self.model, self.processor, examples, adapter=adapters.of_pictures(), check=adapters.check_handle
        )  # fmt: skip

    def _lay_out(
        self, handles: Sequence[EncodedImage], prompts: Sequence[str], *, allow_special: bool = False
    ) -> Batch:
        images = [[handle] if handle.n_images else None for handle in handles]
        return self.processor(images, list(prompts), allow_special=allow_special)

    def _weigh(
        self, batch: Batch, suffixes: Sequence[Sequence[str]], allow_special: bool, batch_size: int = 32
    ) -> list[NDArray[np.float64]]:
        """Log-likelihoods of whole answers to each prompt of a batch."""
        ids = [[answer_ids(self.processor, text, allow_special=allow_special) for text in some] for some in suffixes]
        scored = score_suffixes(self.model, batch, ids, batch_size=batch_size)
        return [np.array([one.logprob for one in some], np.float64) for some in scored]
