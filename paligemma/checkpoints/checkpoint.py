"""Any checkpoint as one thing: a configuration and a mapping of native names to tensors, read when asked for.

    with open_checkpoint("google--paligemma2-3b-pt-224/") as ckpt:
        model = PaliGemmaModel(ckpt.config, device="meta")
        for name, tensor in ckpt.stream(dtype=torch.bfloat16): …

Names and shapes are settled when it opens: every native parameter is found exactly once, everything left over is
either known and listed with its reason or refused. After that only data are read, one tensor at a time.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from paligemma.checkpoints import big_vision, hugging_face, hugging_face_config
from paligemma.checkpoints.files import Scratch, Spec, TensorFile, is_float
from paligemma.checkpoints.hub import hub_name
from paligemma.checkpoints.identify import Format, identify, npz_in, refuse_pickle, split_subkey
from paligemma.checkpoints.npz_io import NpzFile
from paligemma.checkpoints.rules import POSITIONS, TABLE, Piece, keeps_order, match, native_shapes, rearrange, sizes_of
from paligemma.checkpoints.safetensors_io import SafetensorsFiles
from paligemma.checkpoints.state import Progress, State
from paligemma.config import PaliGemmaConfig
from paligemma.errors import CheckpointError, ConfigError
from paligemma.models.posemb import resample_position_embedding
from paligemma.presets import N_TOKENS, RAW_GEMMA_ROWS

NEW_ROW_STD = 0.02  # of rows appended to an embedding table; big_vision models/ppp/gemma.py `load`


@dataclass(frozen=True)
class Change:
    """A native tensor that is asked for in another shape than the file has."""

    shape: tuple[int, ...]
    apply: Callable[[Tensor], Tensor]
    what: str


class Checkpoint(State):
    """An open checkpoint: `config`, and native names -> tensors in the dtype of the file, read on access.

    Attributes:
        config: the configuration of the tensors handed out.
        format: "hf" or "npz".
        dropped: tensors of the file that are no part of the model -> why.
        changes: native names whose tensor is resampled, cut or extended on the way.
    """

    def __init__(
        self,
        path: Path,
        format: Format,
        file: TensorFile,
        file_config: PaliGemmaConfig,
        pieces: list[Piece],
        dropped: dict[str, str],
        layout: str = "",
    ) -> None:
        self.path, self.format, self.layout = path, format, layout
        self.config = self.file_config = file_config
        self.dropped = dropped
        self.changes: dict[str, Change] = {}
        self._file = file
        self._scratch = Scratch()
        order = {name: i for i, name in enumerate(native_shapes(file_config))}
        self._pieces = {piece.native: piece for piece in sorted(pieces, key=lambda piece: order[piece.native])}
        self._sizes = sizes_of(file_config)

    def spec(self, name: str) -> Spec:
        """Shape and dtype of a tensor without reading it."""
        piece = self._pieces[name]
        shape = self.changes[name].shape if name in self.changes else piece.shape
        return Spec(shape, self._file.specs[piece.foreign].dtype)

    @property
    def file_specs(self) -> Mapping[str, Spec]:
        """Shape and dtype of every tensor of the file, by its own names."""
        return self._file.specs

    def source(self, name: str) -> str:
        """Where a native tensor comes from, in the file's own words, for messages."""
        piece = self._pieces[name]
        index = "".join(f"[{i}]" for i in piece.index)
        return f"{self._file.where(piece.foreign)}: {piece.foreign}{index}"

    def get_as(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """One tensor, copied at most once more than reading takes."""
        piece = self._pieces[name]
        is_cast = dtype not in (None, self._file.specs[piece.foreign].dtype)
        is_copied = name not in self.changes and (is_cast or not keeps_order(piece.dims, piece.native_dims))
        try:
            raw = self._file.read(piece.foreign, piece.index, self._scratch if is_copied else None)
        except OSError as error:
            raise CheckpointError(f"{self._file.where(piece.foreign)}: {error.strerror}. Download it again.") from None
        if name in self.changes:
            tensor = rearrange(raw, piece.dims, piece.native_dims, self._sizes)
            return self.changes[name].apply(tensor).to(dtype or raw.dtype)
        return rearrange(raw, piece.dims, piece.native_dims, self._sizes, dtype=dtype)

    def reading_order(self) -> list[str]:
        return sorted(self._pieces, key=self._place)

    def _place(self, name: str) -> tuple[tuple[int, int], tuple[int, ...]]:
        piece = self._pieces[name]
        return self._file.place(piece.foreign), piece.index

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def change_resolution(self, resolution: int) -> None:
        """Hand out position embeddings for another resolution, resampled as big_vision does between stages."""
        vision = replace(self.config.vision, resolution=resolution)
        self.config = replace(self.config, vision=vision)
        if vision.n_image_tokens == self.file_config.vision.n_image_tokens:
            return
        self.changes[POSITIONS] = Change(
            (vision.n_image_tokens, vision.width),
            lambda table: resample_position_embedding(table, vision.grid),
            f"resampled to {vision.grid} x {vision.grid}",
        )

    def change_rows(self, rows: int, *, seed: int = 0) -> None:
        """Hand out an embedding table with other rows: filler cut away, new rows drawn with std 0.02.

        Raises:
            ConfigError: rows of real tokens would be lost.
        """
        have = self.file_config.text.vocab_size
        tokens = self.config.tokens
        is_raw = have in big_vision.RAW_ROWS and rows > have
        # The 256,128-row files pad 256,000 pieces to a multiple of 128.
        real = RAW_GEMMA_ROWS if is_raw else tokens.n_tokens
        if rows < real:
            raise ConfigError(
                f"{self.path}: a table of {rows} rows would lose real tokens: expected at least {real}. "
                "Vocabularies can only be extended."
            )
        text = replace(self.config.text, vocab_size=rows)
        if is_raw:
            new = big_vision.tokens_for(rows)
            tokens = replace(new, pad=tokens.pad, eos=tokens.eos, bos=tokens.bos, unk=tokens.unk)
        elif rows > have == tokens.n_tokens:
            tokens = replace(tokens, n_tokens=rows, image=rows)
        self.config = replace(self.config, text=text, tokens=tokens)
        if rows == have:
            return
        keep = real if is_raw else min(rows, have)
        self.changes[TABLE] = Change(
            (rows, text.width),
            lambda table: extend_rows(table[:keep], rows, seed=seed),
            f"{have} rows cut to {keep}" if rows == keep else f"{rows - keep} new rows drawn with std {NEW_ROW_STD}",
        )


def extend_rows(table_VD: Tensor, rows: int, *, seed: int = 0) -> Tensor:
    """Append rows of independent normal numbers (mean 0, std 0.02) in the dtype of the table.

    Numpy's legacy generator draws them, so that a seed gives the rows that big_vision would give.
    """
    out = torch.empty(rows, table_VD.shape[1], dtype=table_VD.dtype)
    out[: len(table_VD)] = table_VD
    new = np.random.RandomState(seed).normal(0.0, NEW_ROW_STD, size=(rows - len(table_VD), table_VD.shape[1]))
    out[len(table_VD) :] = torch.from_numpy(new)
    return out


def open_checkpoint(
    path: str | Path,
    *,
    config: PaliGemmaConfig | None = None,
    strict: bool = True,
    resolution: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Open a Hugging Face folder, a safetensors file or a big_vision `.npz` (`file.npz:img` for part of it).

    Args:
        config: used instead of what the files say; must fit the weights.
        strict: refuse tensors that nobody asked for; False reports them in `dropped` and warns.
        resolution: hand out position embeddings for another picture side.
        vocab_size: hand out a table with this many rows; new ones are drawn from `seed`.

    Raises:
        CheckpointError: missing, misshapen, unexpected or truncated tensors; PickleRefused for a pickle.
        ConfigError: a configuration that disagrees with the weights.
    """
    file_path, subkey = split_subkey(path)
    kind = identify(path)
    if kind == "pickle":
        raise refuse_pickle(file_path)
    if kind == "adapter":
        raise CheckpointError(
            f"{file_path}: a LoRA adapter, not a model: expected whole weights. Load its base model and give "
            "this folder as adapter=, or merge the two with `paligemma checkpoint merge`."
        )
    opened = _open_npz(file_path, subkey, config, strict) if kind == "npz" else _open_hf(file_path, config, strict)
    if vocab_size is None and kind == "npz" and config is None and opened.config.text.vocab_size in big_vision.RAW_ROWS:
        vocab_size = N_TOKENS
        warnings.warn(f"{file_path}: a raw Gemma table; extended to {N_TOKENS} rows (seed {seed}).", stacklevel=2)
    if vocab_size is not None:
        opened.change_rows(vocab_size, seed=seed)
    if resolution is not None:
        opened.change_resolution(resolution)
    return opened


def _open_npz(path: Path, subkey: str, config: PaliGemmaConfig | None, strict: bool) -> Checkpoint:
    if path.is_dir():
        (path,) = npz_in(path)
    file = NpzFile(path)
    try:
        tree = big_vision.find_tree(file.specs, str(path), subkey)
        if config is None:
            config = _stored_choices(file, big_vision.infer_config(tree, str(path)))
        rules = big_vision.rules_for(tree, config)
        pieces = match(rules, config, tree.specs, str(path), names=tree.names, only=tree.only)
        used = {piece.foreign for piece in pieces}
        dropped = _settle(path, strict, *big_vision.leftovers(tree, used))
        _require_floats(file, used)
        return Checkpoint(path, "npz", file, config, pieces, dropped)
    except BaseException:
        file.close()
        raise


def _stored_choices(file: NpzFile, inferred: PaliGemmaConfig) -> PaliGemmaConfig:
    """Choices that we wrote into an archive because no shape tells them."""
    if big_vision.CONFIG_KEY not in file.specs:
        return inferred
    try:
        block = json.loads(bytes(file.read(big_vision.CONFIG_KEY).tolist()))
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {big_vision.CONFIG_KEY} is not JSON ({error}). Convert again.") from None
    return PaliGemmaConfig.from_dict(hugging_face_config.overlay(inferred.to_dict(), block))


def _open_hf(path: Path, config: PaliGemmaConfig | None, strict: bool) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    file = SafetensorsFiles(hugging_face.weight_files(folder) if path.is_dir() else [path])
    try:
        if path.is_dir():
            hugging_face.check_index(folder, file)
        names = hugging_face.inner_names(file, str(path))
        specs = {inner: file.specs[full] for inner, full in names.items()}
        facts = hugging_face_config.facts_of(specs, str(path))
        if config is None:
            config = hugging_face_config.read_config(folder, facts)
        pieces = match(hugging_face.rules_for(config.text.post_norms), config, specs, str(path), names=names)
        used = {piece.foreign for piece in pieces}
        dropped = _settle(path, strict, *hugging_face.leftovers(names, used))
        if hugging_face.HEAD_NAME in names:
            is_tied = hugging_face_config.ties_head(folder)
            head = hugging_face.check_head(file, names, is_tied=is_tied, where=str(path))
            dropped[names[hugging_face.HEAD_NAME]] = head
        _require_floats(file, used)
        config = replace(config, name=hub_name(folder) or config.name)
        return Checkpoint(path, "hf", file, config, pieces, dropped, hugging_face.layout_of(file.specs) or "mixed")
    except BaseException:
        file.close()
        raise


def _settle(path: Path, strict: bool, reasons: dict[str, str], unknown: list[str]) -> dict[str, str]:
    if unknown and strict:
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors have no place in this model, first {unknown[0]}: expected none. "
            "If they may be dropped, read with strict=False (--no-strict)."
        )
    if unknown:
        warnings.warn(f"{path}: dropped {len(unknown)} unknown tensors: {', '.join(unknown[:5])}…", stacklevel=4)
    return reasons | dict.fromkeys(unknown, "unknown; dropped because strict=False")


def _require_floats(file: TensorFile, used: set[str]) -> None:
    for name in used:
        if not is_float(file.specs[name].dtype):
            raise CheckpointError(
                f"{file.where(name)}: {name} holds {file.specs[name].dtype}: expected floating "
                "point. Quantised weights of other packages cannot be read; take the original checkpoint."
            )


def read(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    strict: bool = True,
    config: PaliGemmaConfig | None = None,
    check: bool = False,
    resolution: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[PaliGemmaConfig, dict[str, Tensor]]:
    """Read a whole checkpoint: its configuration and every native tensor, contiguous, in memory of their own.

    Args:
        dtype: of all tensors; None keeps what the file has.
        check: refuse NaN and Inf.
        strict, config, resolution, vocab_size, seed: as in `open_checkpoint`.
        progress: called with the bytes of each tensor read.
    """
    with open_checkpoint(
        path, config=config, strict=strict, resolution=resolution, vocab_size=vocab_size, seed=seed
    ) as checkpoint:
        state = dict(checkpoint.stream(dtype, check=check, progress=progress))
        return checkpoint.config, {name: state[name] for name in checkpoint}


def stream(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    strict: bool = True,
    config: PaliGemmaConfig | None = None,
    check: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """(native name, tensor) one at a time; see `open_checkpoint` for the configuration beforehand."""
    with open_checkpoint(path, config=config, strict=strict) as checkpoint:
        yield from checkpoint.stream(dtype, check=check)
