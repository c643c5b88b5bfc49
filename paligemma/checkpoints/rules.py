"""Rules between native parameters and the tensors of a file: one line per tensor, read in both directions.

A layout is written with one letter per dim, brackets joining dims into one:

    vision   l layers · W width · m MLP width · h heads · e head width · c colours · p patch side · N positions
    text     L layers · D width · F MLP width · H query heads · K key/value heads · d head dim · V table rows

`Rule("text.blocks.{i}.attn.k.weight", "llm/layers/attn/kv_einsum/w", "L 2:0 K D d")` says that the file keeps all
layers in one array, that of its second axis (size 2) we want part 0, and that the rest, [K, D, d], becomes the native
"(K d) D". The inverse follows from the same line.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paligemma.checkpoints.files import Spec
from paligemma.config import PaliGemmaConfig
from paligemma.errors import CheckpointError

# Every parameter of models/paligemma.py and its layout; all Linear weights are [out, in].
NATIVE: dict[str, str] = {
    "vision.patch_embedding.weight": "W c p p",
    "vision.patch_embedding.bias": "W",
    "vision.position_embedding": "N W",
    "vision.blocks.{i}.attn_norm.weight": "W",
    "vision.blocks.{i}.attn_norm.bias": "W",
    "vision.blocks.{i}.attn.q.weight": "(h e) W",
    "vision.blocks.{i}.attn.q.bias": "(h e)",
    "vision.blocks.{i}.attn.k.weight": "(h e) W",
    "vision.blocks.{i}.attn.k.bias": "(h e)",
    "vision.blocks.{i}.attn.v.weight": "(h e) W",
    "vision.blocks.{i}.attn.v.bias": "(h e)",
    "vision.blocks.{i}.attn.out.weight": "W (h e)",
    "vision.blocks.{i}.attn.out.bias": "W",
    "vision.blocks.{i}.mlp_norm.weight": "W",
    "vision.blocks.{i}.mlp_norm.bias": "W",
    "vision.blocks.{i}.mlp.up.weight": "m W",
    "vision.blocks.{i}.mlp.up.bias": "m",
    "vision.blocks.{i}.mlp.down.weight": "W m",
    "vision.blocks.{i}.mlp.down.bias": "W",
    "vision.final_norm.weight": "W",
    "vision.final_norm.bias": "W",
    "projector.weight": "D W",
    "projector.bias": "D",
    "text.embedding.weight": "V D",
    "text.blocks.{i}.pre_attn_norm.scale": "D",
    "text.blocks.{i}.attn.q.weight": "(H d) D",
    "text.blocks.{i}.attn.k.weight": "(K d) D",
    "text.blocks.{i}.attn.v.weight": "(K d) D",
    "text.blocks.{i}.attn.out.weight": "D (H d)",
    "text.blocks.{i}.post_attn_norm.scale": "D",
    "text.blocks.{i}.pre_mlp_norm.scale": "D",
    "text.blocks.{i}.mlp.gate.weight": "F D",
    "text.blocks.{i}.mlp.up.weight": "F D",
    "text.blocks.{i}.mlp.down.weight": "D F",
    "text.blocks.{i}.post_mlp_norm.scale": "D",
    "text.final_norm.scale": "D",
}
POST_NORMS = ("text.blocks.{i}.post_attn_norm.scale", "text.blocks.{i}.post_mlp_norm.scale")
TABLE = "text.embedding.weight"
POSITIONS = "vision.position_embedding"

Sizes = dict[str, int]
Layout = tuple[tuple[str, ...], ...]  # outer: dims of the tensor; inner: the letters joined in it


@dataclass(frozen=True)
class Rule:
    """One native parameter (template) and where a file keeps it.

    `{i}` in both names: one tensor per layer. `{i}` in the native name only: the file stacks the layers, and `dims`
    starts with the layer letter. A token `n:k` in `dims` is an axis of size n of which this parameter is part k.
    """

    native: str
    foreign: str
    dims: str

    @property
    def is_stacked(self) -> bool:
        return "{i}" in self.native and "{i}" not in self.foreign

    def split(self) -> tuple[list[str], str]:
        """The leading index tokens ("L", "2:0") and the layout of what they select."""
        tokens = self.dims.split(" ")
        n_lead = int(self.is_stacked)
        n_lead += int(len(tokens) > n_lead and ":" in tokens[n_lead])
        return tokens[:n_lead], " ".join(tokens[n_lead:])


@dataclass(frozen=True)
class Piece:
    """One native tensor, found: `foreign[index]`, laid out as `dims`, becomes `native` laid out as `native_dims`."""

    native: str
    foreign: str
    index: tuple[int, ...]
    dims: str
    native_dims: str
    shape: tuple[int, ...]  # native


def sizes_of(config: PaliGemmaConfig) -> Sizes:
    v, t = config.vision, config.text
    return {
        "l": v.depth, "W": v.width, "m": v.mlp_dim, "h": v.n_heads, "e": v.head_dim, "c": 3, "p": v.patch_size,
        "N": v.n_image_tokens, "L": t.depth, "D": t.width, "F": t.mlp_dim, "H": t.n_heads, "K": t.n_kv_heads,
        "d": t.head_dim, "V": t.vocab_size, "1": 1,
    }  # fmt: skip


def parse_layout(dims: str) -> Layout:
    """'(K d) D' -> (('K', 'd'), ('D',))."""
    return tuple(tuple((joined or single).split()) for joined, single in re.findall(r"\(([^)]*)\)|(\S+)", dims))


def shape_of(dims: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape that a layout has under given sizes; "2:0" counts as its 2."""
    return tuple(
        math.prod(int(letter.split(":")[0]) if ":" in letter else sizes[letter] for letter in group)
        for group in parse_layout(dims)
    )


def rearrange(tensor: Tensor, dims: str, target: str, sizes: Sizes, *, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` laid out as `dims` in the layout `target`, contiguous, in `dtype`: at most one copy."""
    have, want = _letters(dims), _letters(target)
    flat = tensor.reshape([sizes[letter] for letter in have])
    if have == want and dtype in (None, tensor.dtype):
        return flat.reshape(shape_of(target, sizes))
    view = flat.permute(_order(have, want))
    moved = torch.empty(view.shape, dtype=dtype or tensor.dtype)
    moved.copy_(view)
    return moved.reshape(shape_of(target, sizes))


def keeps_order(dims: str, target: str) -> bool:
    """Whether one layout is the other with dims joined or split, so that the bytes stay as they are."""
    return _letters(dims) == _letters(target)


def _letters(dims: str) -> list[str]:
    return [letter for group in parse_layout(dims) for letter in group if letter != "1"]


def _order(have: list[str], want: list[str]) -> list[int]:
    order: list[int] = []
    for letter in want:  # a letter may occur twice ("p p"): take its places from left to right
        order.append(next(i for i, own in enumerate(have) if own == letter and i not in order))
    return order


def native_templates(config: PaliGemmaConfig) -> list[str]:
    return [t for t in NATIVE if config.text.post_norms or t not in POST_NORMS]


def depth_of(template: str, config: PaliGemmaConfig) -> int:
    """How many parameters a template stands for."""
    if "{i}" not in template:
        return 1
    return config.vision.depth if template.startswith("vision.") else config.text.depth


def native_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model, layer by layer in the order of a forward pass."""
    sizes = sizes_of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    templates = native_templates(config)
    done: set[str] = set()
    for template in templates:
        if template in done:
            continue
        prefix = template.split("{i}")[0]
        group = [t for t in templates if "{i}" in t and t.startswith(prefix)] if "{i}" in template else [template]
        done.update(group)
        for i in range(depth_of(template, config)):
            for member in group:
                shapes[member.format(i=i)] = shape_of(NATIVE[member], sizes)
    return shapes


def match(
    rules: Iterable[Rule],
    config: PaliGemmaConfig,
    specs: Mapping[str, Spec],
    where: str,
    *,
    names: Mapping[str, str],
    only: tuple[str, ...] = (),
) -> list[Piece]:
    """Find every native parameter exactly once, by names and shapes alone: no data are read.

    Args:
        specs: by the names that the rules use.
        names: names of the rules -> names in the file.
        only: prefixes of the native names wanted; empty means all.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the configuration asks for.
    """
    sizes = sizes_of(config)
    wanted = {n: s for n, s in native_shapes(config).items() if not only or n.startswith(only)}
    pieces: dict[str, Piece] = {}
    for rule in rules:
        lead, rest = rule.split()
        expected = shape_of(rule.dims, sizes)
        for i in range(depth_of(rule.native, config)):
            native, foreign = rule.native.format(i=i), rule.foreign.format(i=i)
            if native not in wanted:
                continue
            if foreign not in specs:
                raise CheckpointError(
                    f"{where}: the tensor {foreign} is missing: this model needs it as {native} "
                    f"{list(wanted[native])}. Download or convert the checkpoint again."
                )
            if specs[foreign].shape != expected:
                raise CheckpointError(
                    f"{where}: {names[foreign]} has shape {list(specs[foreign].shape)}: expected {list(expected)} "
                    f"({rule.dims}) for this configuration. Take weights and configuration from the same checkpoint."
                )
            if native in pieces:
                raise CheckpointError(f"{where}: {native} is filled twice, by {pieces[native].foreign} and {foreign}.")
            index = tuple(int(token.split(":")[1]) if ":" in token else i for token in lead)
            pieces[native] = Piece(native, names[foreign], index, rest, NATIVE[rule.native], wanted[native])
    missing = [name for name in wanted if name not in pieces]
    if missing:
        raise CheckpointError(f"{where}: nothing fills {missing[0]} (and {len(missing) - 1} more).")
    return list(pieces.values())
