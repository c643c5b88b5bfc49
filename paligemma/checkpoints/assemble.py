"""Stage 0: a raw SigLIP and a raw Gemma become one PaliGemma that has learned nothing yet.

    config, state = assemble("siglip-so400m-patch14-224/", "gemma-2-2b/")
    with state:
        save_assembly("stage0/", config, state)

The tower keeps its weights and loses its head; positions are resampled; the projector starts at zero; the decoder
keeps its weights, and its table gets 1,024 loc and 128 seg rows. No other parameters exist. Tensors are read one at a
time, when they are asked for.

Sources: PaliGemma report (arXiv 2407.07726) section 3; big_vision models/ppp/gemma.py `load`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paligemma.checkpoints import big_vision
from paligemma.checkpoints.checkpoint import NEW_ROW_STD, Change
from paligemma.checkpoints.convert import SENTENCEPIECE, padded_rows
from paligemma.checkpoints.files import Spec, as_dtype, dtype_name
from paligemma.checkpoints.finite import require_finite
from paligemma.checkpoints.hugging_face import Layout
from paligemma.checkpoints.rules import POSITIONS, TABLE, native_shapes
from paligemma.checkpoints.state import State
from paligemma.checkpoints.unimodal import Part, open_part
from paligemma.checkpoints.write import MAX_SHARD_BYTES, Target, fit_rows, write
from paligemma.config import PaliGemmaConfig, ProcessingConfig, Resize, TextConfig, TokenConfig, VisionConfig
from paligemma.errors import CheckpointError, ConfigError, OptionError, nearest
from paligemma.presets import MODEL_PRESETS, RAW_GEMMA_ROWS, with_softcaps
from paligemma.processing.tokenizer import Tokenizer

N_LOC, N_SEG = 1024, 128
PROJECTORS = ("zeros", "normal")
TOKENIZERS = (*SENTENCEPIECE, "tokenizer.json")

# (table of the text part, rows wanted, std, seed) -> the table with its new rows
Extend = Callable[[Tensor, int, float, int], Tensor]


def _normal(table_VD: Tensor, rows: int, std: float, seed: int) -> Tensor:
    # Numpy's legacy generator, so that a seed gives the rows that big_vision would give.
    new = np.random.RandomState(seed).normal(0.0, std, size=(rows - len(table_VD), table_VD.shape[1]))
    return _append(table_VD, torch.from_numpy(new))


def _zeros(table_VD: Tensor, rows: int, std: float, seed: int) -> Tensor:
    return _append(table_VD, torch.zeros(rows - len(table_VD), table_VD.shape[1]))


def _mean(table_VD: Tensor, rows: int, std: float, seed: int) -> Tensor:
    return fit_rows(table_VD, rows)


def _append(table_VD: Tensor, new_ND: Tensor) -> Tensor:
    out = torch.empty(len(table_VD) + len(new_ND), table_VD.shape[1], dtype=table_VD.dtype)
    out[: len(table_VD)] = table_VD
    out[len(table_VD) :] = new_ND
    return out


# How the rows of the new tokens start. The report's appendix finds the noise better than the average embedding.
INITS: dict[str, tuple[Extend, str]] = {
    "normal": (_normal, "drawn with mean 0 and std {std:g} (seed {seed})"),
    "mean": (_mean, "equal to the mean of all others"),
    "zeros": (_zeros, "of zeros"),
}


@dataclass(frozen=True)
class AssemblyReport:
    """What became of both parts, for people.

    Attributes:
        vision, text: where each came from.
        positions, table, projector, tokenizer: what was done to it.
        dropped: reason -> the tensors left out for it, by their names in the files.
    """

    vision: str
    text: str
    positions: str
    table: str
    projector: str
    dropped: Mapping[str, tuple[str, ...]]
    tokenizer: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Assembly(State):
    """Native names -> tensors of a model put together of two open parts; `close` it, or use it in a `with`.

    Attributes:
        report: what was dropped, extended and resampled.
        folder: of the text part, where its tokenizer may lie.
    """

    def __init__(
        self,
        config: PaliGemmaConfig,
        vision: Part,
        text: Part,
        projector: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        report: AssemblyReport,
    ) -> None:
        self.report, self.folder = report, text.folder
        self._parts = {part.kind: part for part in (vision, text)}
        self._projector, self._dtype = projector, dtype
        self._names = list(native_shapes(config))

    @property
    def places(self) -> list[Path]:
        """Files or folders that the parts are read from."""
        return [part.checkpoint.path for part in self._parts.values()]

    def spec(self, name: str) -> Spec:
        part = self._part(name)
        if part is not None:
            spec = part.checkpoint.spec(name)
        else:
            spec = Spec(tuple(self._projector[name].shape), self._projector[name].dtype)
        return Spec(spec.shape, self._dtype or spec.dtype)

    def get_as(self, name: str, dtype: torch.dtype | None) -> Tensor:
        part, wanted = self._part(name), dtype or self._dtype
        if part is None:
            return self._projector[name].to(wanted)
        tensor = part.checkpoint.get_as(name, wanted)
        if wanted == torch.float16 and part.checkpoint.spec(name).dtype != wanted:
            require_finite(tensor, f"{self.source(name)}, rounded to float16 (at most 65,504),")
        return tensor

    def source(self, name: str) -> str:
        part = self._part(name)
        return name if part is None else part.checkpoint.source(name)

    def reading_order(self) -> list[str]:
        order = [n for part in self._parts.values() for n in part.checkpoint.reading_order() if self._part(n) is part]
        return [*order, *self._projector]

    def _part(self, name: str) -> Part | None:
        kind = name.split(".")[0]
        return self._parts[kind] if kind in ("vision", "text") else None  # type: ignore[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        for part in self._parts.values():
            part.checkpoint.close()

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def assemble(
    vision: str | Path,
    text: str | Path,
    *,
    resolution: int | None = None,
    init: str = "normal",
    init_std: float = NEW_ROW_STD,
    seed: int = 0,
    projector: str = "zeros",
    dtype: torch.dtype | str | None = None,
    vocab_size: int | None = None,
    softcaps: tuple[float | None, float | None] | None = None,
    sliding_window: int | None = None,
    resize: Resize | None = None,
    preset: str | None = None,
    vision_preset: VisionConfig | str | None = None,
    text_preset: TextConfig | str | None = None,
    strict: bool = True,
) -> tuple[PaliGemmaConfig, Assembly]:
    """Put an image tower and a decoder together; Gemma 1 gives a PaliGemma, Gemma 2 a PaliGemma 2.

    Args:
        vision, text: files or folders, as `open_part` takes them. A whole PaliGemma gives the half that is asked for,
            its vocabulary as it is.
        resolution: side of the pictures; position embeddings of another one are resampled. Default 224, or the
            preset's.
        init: how rows of new tokens start: "normal", "mean" or "zeros"; `init_std` is of "normal". Drawn with `seed`
            and cast to the dtype of the table.
        projector: "zeros" as in the report, so that image tokens are zero vectors at first; "normal" draws its weight
            with std 1 / sqrt(width of the tower).
        dtype: of all tensors; None keeps what each part has.
        vocab_size: tokens of the result. Default: those of the text part, 1,024 loc and 128 seg.
        softcaps: (attention, final); None of a pair is off. Default: what the text part has (Gemma 2: 50 and 30).
        sliding_window: on even layers of Gemma 2. The original of PaliGemma 2 has none, whatever a raw Gemma 2 says;
            hub folders say 4,096, which no prompt of a published model reaches.
        resize: how pictures are resized. Default: the preset's, or "hf_bicubic".
        preset: name of a whole model whose sizes the parts must have; its choices are taken over.
        vision_preset, text_preset: of one part, where its files do not tell (see `open_part`).
        strict: refuse tensors that nobody asked for.

    Returns:
        The configuration, and the state, whose tensors are read when they are asked for.

    Raises:
        CheckpointError, ConfigError, OptionError: as `open_part`; a vocabulary that would shrink, a preset of other
            sizes, an unknown way to start.
    """
    whole = _preset(preset)
    if init not in INITS:
        raise OptionError(f"init={init!r}: expected one of {', '.join(INITS)}.{nearest(init, INITS)}")
    if projector not in PROJECTORS:
        raise OptionError(
            f"projector={projector!r}: expected one of {', '.join(PROJECTORS)}.{nearest(projector, PROJECTORS)}"
        )
    if not 0 < init_std < float("inf"):
        raise OptionError(f"init_std={init_std}: expected a positive number, 0.02 in the report.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise OptionError(f"seed={seed!r}: expected a whole number from 0 to {2**32 - 1:,}.")
    wanted = as_dtype(dtype)
    with contextlib.ExitStack() as opened:
        tower = open_part("vision", vision, config=vision_preset or (whole.vision if whole else None), strict=strict)
        opened.callback(tower.checkpoint.close)
        decoder = open_part("text", text, config=text_preset or (whole.text if whole else None), strict=strict)
        opened.callback(decoder.checkpoint.close)
        tokens = _extend(decoder, vocab_size, INITS[init], init_std, seed)
        if resolution is None:
            resolution = whole.vision.resolution if whole else 224
        tower.checkpoint.change_resolution(resolution)
        rows = decoder.checkpoint.spec(TABLE).shape[0]
        config = PaliGemmaConfig(
            vision=tower.checkpoint.config.vision,
            text=replace(decoder.config.text, vocab_size=rows, sliding_window=sliding_window),
            tokens=tokens,
            processing=ProcessingConfig(resize=resize or "hf_bicubic"),
        )
        if whole is not None:
            config = _as_preset(config, whole, resize, sliding_window)
        if softcaps is not None:
            config = with_softcaps(config, attn=softcaps[0], final=softcaps[1])
        config = replace(config, name=preset or big_vision.preset_name(config))
        state = Assembly(
            config, tower, decoder, _projector(config, tower, decoder, projector, seed), wanted,
            _report(config, tower, decoder, projector),
        )  # fmt: skip
        opened.pop_all()
    return config, state


def save_assembly(
    target: str | Path,
    config: PaliGemmaConfig,
    state: Assembly,
    *,
    to: Target | None = None,
    layout: Layout = "A",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> AssemblyReport:
    """Write an assembly tensor by tensor; a folder also gets the tokenizer of the text part, loc and seg appended.

    Args:
        to: "hf" or "npz"; default by the name of the target.
        tokenizer: a `tokenizer.model` or `tokenizer.json`, when none lies beside the text part.
        progress: called with (bytes done, bytes in all).

    Returns:
        The report of the assembly with what became of the tokenizer.

    Raises:
        CheckpointError: the target exists, the disk is full, a value overflows.
        TokenizerError: a tokenizer of another vocabulary.
    """
    goal: Target = to or ("npz" if str(target).endswith(".npz") else "hf")
    for path in state.places:
        if Path(target).resolve() in (path.resolve(), *([path.resolve().parent] if path.is_file() else [])):
            raise CheckpointError(f"{target}: {path} lies there, a part of it: expected another place. Name a new one.")
    total, done = state.n_bytes, 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(done, total)

    with TemporaryDirectory() as scratch:
        found = Path(tokenizer) if tokenizer is not None else _tokenizer_in(state.folder)
        beside: list[Path] = []
        if goal == "npz":
            said = "an .npz holds none: give --tokenizer when the model is loaded"
        elif found is None:
            said = f"none in {state.folder}: give --tokenizer, now or when the model is loaded"
        else:
            words = Tokenizer.from_file(found, config.tokens)
            beside = words.save(scratch, hugging_face=True)
            said = f"{found}, {words.n_tokens:,} tokens"
        write(
            target, config, state, goal, layout=layout, max_shard_bytes=max_shard_bytes, overwrite=overwrite,
            table_rows=padded_rows(config) if goal == "hf" else None, beside=beside, progress=advance,
        )  # fmt: skip
    return replace(state.report, tokenizer=said)


def _tokenizer_in(folder: Path) -> Path | None:
    return next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)


def _preset(name: str | None) -> PaliGemmaConfig | None:
    if name is not None and name not in MODEL_PRESETS:
        raise OptionError(f"preset={name!r}: expected one of {', '.join(MODEL_PRESETS)}.{nearest(name, MODEL_PRESETS)}")
    return None if name is None else MODEL_PRESETS[name]


def _extend(decoder: Part, vocab_size: int | None, init: tuple[Extend, str], std: float, seed: int) -> TokenConfig:
    """Ask the text part for a table with loc and seg rows; returns where they stand."""
    have, tokens = decoder.config.text.vocab_size, decoder.tokens
    if decoder.is_raw:
        # The 256,128-row files pad 256,000 pieces to a multiple of 128.
        pieces = RAW_GEMMA_ROWS if have in big_vision.RAW_ROWS else have
        least = pieces + N_LOC + N_SEG
    else:
        pieces = least = tokens.n_tokens
    rows = least if vocab_size is None else vocab_size
    if rows < least:
        raise ConfigError(
            f"vocab_size={rows}: the text part has {pieces:,} tokens"
            f"{f', {N_LOC} loc and {N_SEG} seg come behind them' if decoder.is_raw else ''}: expected at least "
            f"{least}. Vocabularies can only be extended."
        )
    if decoder.is_raw:
        tokens = replace(
            TokenConfig(), pad=tokens.pad, eos=tokens.eos, bos=tokens.bos, unk=tokens.unk,
            n_tokens=rows, loc_start=pieces, seg_start=pieces + N_LOC, image=rows,
        )  # fmt: skip
    elif rows > pieces:
        tokens = replace(tokens, n_tokens=rows, image=rows)
    if rows > pieces:
        extend, words = init
        decoder.checkpoint.changes[TABLE] = Change(
            (rows, decoder.config.text.width),
            lambda table: extend(table[:pieces], rows, std, seed),
            f"{rows:,} rows: {pieces:,} of the text part, {rows - pieces:,} {words.format(std=std, seed=seed)}",
        )
    return tokens


def _as_preset(
    found: PaliGemmaConfig, whole: PaliGemmaConfig, resize: Resize | None, sliding_window: int | None
) -> PaliGemmaConfig:
    """The preset with the resolution and rows of what was put together, when the sizes are the same."""
    vision = replace(whole.vision, resolution=found.vision.resolution)
    text = replace(whole.text, vocab_size=found.text.vocab_size)
    if sliding_window is not None:
        text = replace(text, sliding_window=sliding_window)
    for part, ours, theirs in (("vision", vision, found.vision), ("text", text, found.text)):
        for name in ("width", "depth", "mlp_dim", "n_heads", "n_kv_heads", "head_dim", "patch_size", "post_norms"):
            if hasattr(ours, name) and getattr(ours, name) != getattr(theirs, name):
                raise ConfigError(
                    f"preset={whole.name!r}: its {part}.{name} is {getattr(ours, name)}, the {part} part has "
                    f"{getattr(theirs, name)}: expected parts of its sizes. Name another preset, or none."
                )
    if found.tokens.n_tokens != whole.tokens.n_tokens:
        raise ConfigError(
            f"preset={whole.name!r}: it has {whole.tokens.n_tokens:,} tokens, the text part comes to "
            f"{found.tokens.n_tokens:,}: expected the same. Vocabularies can only be extended; name another preset, or "
            "none."
        )
    processing = whole.processing if resize is None else replace(whole.processing, resize=resize)
    return replace(whole, vision=vision, text=text, tokens=found.tokens, processing=processing)


def _projector(config: PaliGemmaConfig, vision: Part, text: Part, how: str, seed: int) -> dict[str, Tensor]:
    wide, narrow = config.text.width, config.vision.width
    dtype = torch.promote_types(vision.checkpoint.spec(POSITIONS).dtype, text.checkpoint.spec(TABLE).dtype)
    weight = torch.zeros(wide, narrow)
    if how == "normal":
        weight.normal_(std=narrow**-0.5, generator=torch.Generator().manual_seed(seed))
    return {"projector.weight": weight.to(dtype), "projector.bias": torch.zeros(wide, dtype=dtype)}


def _report(config: PaliGemmaConfig, vision: Part, text: Part, projector: str) -> AssemblyReport:
    v, t = config.vision, config.text
    old, table = vision.config.vision, text.checkpoint.changes.get(TABLE)
    dropped: dict[str, tuple[str, ...]] = {}
    for part in (vision, text):
        for name, why in part.dropped.items():
            dropped[why] = (*dropped.get(why, ()), name)
    return AssemblyReport(
        vision=f"{vision.checkpoint.path}, width {v.width}, depth {v.depth}, {_dtype(vision, POSITIONS)}",
        text=f"{text.checkpoint.path}, Gemma {2 if t.post_norms else 1}, width {t.width}, depth {t.depth}, "
        f"{_dtype(text, TABLE)}",
        positions=f"{v.grid} x {v.grid}"
        + (f", resampled from {old.grid} x {old.grid}" if POSITIONS in vision.checkpoint.changes else ", as they were"),
        table=f"{t.vocab_size:,} rows, as they were" if table is None else table.what,
        projector=f"{v.width} to {t.width}, "
        + ("zeros" if projector == "zeros" else f"drawn with std {v.width**-0.5:.3g}"),
        dropped=dropped,
    )


def _dtype(part: Part, name: str) -> str:
    return dtype_name(part.checkpoint.spec(name).dtype)
