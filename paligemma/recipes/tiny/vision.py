"""Stage 0, image part: a small SigLIP, taught to tell which caption belongs to which picture.

    pictures ─ tower ─ pooling head ─┐
                                     ├─ t · cosine + b ─ sigmoid loss over all pairs of a step (arXiv 2303.15343)
    captions ─ text tower ───────────┘

Beside it the tower learns what lies in each patch: kind, colour, edges and mask codes of the thing that owns it.
SigLIP 2 (arXiv 2502.14786) adds location-aware losses to the contrastive one for the same reason: whole-picture
captions alone say nothing about places, and the world's pictures are too few to find out.
"""

# I pictures of a step · P patches · W tower width · T caption tokens

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from paligemma.config import PaliGemmaConfig, VisionConfig
from paligemma.data.world import COLOURS, World, caption, render, sample_scene
from paligemma.models.init import init_tower
from paligemma.models.mask_vae import N_SEG, MaskVae
from paligemma.models.siglip import SiglipBlock, SiglipTower
from paligemma.processing.image import to_pixels
from paligemma.processing.tokenizer import Tokenizer
from paligemma.recipes.tiny.loop import LessonOptions, teach
from paligemma.recipes.tiny.patches import KINDS, patch_owners, patch_targets, position_waves
from paligemma.recipes.tiny.suffix import mask_codes
from paligemma.tasks.coords import N_LOC

TEXT = VisionConfig(width=128, depth=3, mlp_dim=384, n_heads=4, resolution=14)  # the text tower's blocks
MAX_CAPTION = 56  # tokens
LOC_STEP = 8  # bins between the places that are told apart, 0.9 of 112 pixels
N_PLACES = N_LOC // LOC_STEP + 1


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """What a step of the lesson shows: `n_images` pictures, `plain_share` of them plain."""

    n_images: int = 96
    plain_share: float = 0.4
    dense_weight: float = 1.0
    seed: int = 0


class PoolingHead(nn.Module):
    """SigLIP's: one learned query attends to all patches, then a residual MLP. Names as in Hugging Face's `head`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.width) * config.width**-0.5)
        self.attention = nn.MultiheadAttention(config.width, config.n_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc1, self.fc2 = nn.Linear(config.width, config.mlp_dim), nn.Linear(config.mlp_dim, config.width)

    def forward(self, x_IPW: Tensor) -> Tensor:
        pooled = self.attention(self.probe.expand(len(x_IPW), -1, -1), x_IPW, x_IPW, need_weights=False)[0][:, 0]
        out: Tensor = pooled + self.fc2(F.gelu(self.fc1(self.layernorm(pooled)), approximate="tanh"))
        return out


class TextTower(nn.Module):
    """Captions, padded to one length, through full attention; the last slot tells, as in SigLIP."""

    def __init__(self, n_pieces: int, width_out: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_pieces, TEXT.width)
        self.positions = nn.Parameter(torch.randn(MAX_CAPTION, TEXT.width) * 0.02)
        self.blocks = nn.ModuleList(SiglipBlock(TEXT, None, None) for _ in range(TEXT.depth))
        self.final_norm = nn.LayerNorm(TEXT.width)
        self.head = nn.Linear(TEXT.width, width_out)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens_IT: Tensor) -> Tensor:
        x = self.embedding(tokens_IT) + self.positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.final_norm(x)[:, -1])
        return out


class Pair(nn.Module):
    """Both towers, temperature and bias of the sigmoid loss, and linear readers of single patches."""

    def __init__(self, config: PaliGemmaConfig, n_pieces: int, generator: torch.Generator) -> None:
        super().__init__()
        self.vision = SiglipTower(config.vision)
        init_tower(self.vision, generator)
        position_waves(self.vision)
        self.head = PoolingHead(config.vision)
        self.words = TextTower(n_pieces, config.vision.width)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        sizes = {
            "kind": len(KINDS),
            "colour": len(COLOURS),
            "edges": 4 * N_PLACES,
            "codes": N_SEG * config.tokens.n_seg,
        }
        self.readers = nn.ModuleDict({name: nn.Linear(config.vision.width, n) for name, n in sizes.items()})
        self.sides = nn.Linear(config.vision.width, 4)

    def matrices(self) -> list[nn.Parameter]:
        """The weights inside the blocks."""
        return [p for blocks in (self.vision.blocks, self.words.blocks) for p in blocks.parameters() if p.ndim == 2]


@dataclass(frozen=True)
class PairStep:
    """Pictures with their captions and what lies in their patches."""

    pixels: Tensor  # float32[I, 3, R, R]
    captions: Tensor  # int64[I, T]
    kind: Tensor  # int64[I, P]
    colour: Tensor  # int64[I, P], -1 where there is nothing
    edges: Tensor  # int64[I, P, 4], bins
    codes: Tensor  # int64[I, P, 16], -1 where there is no shape


class DrawPairs:
    """Step n of the lesson, from the seed and n alone."""

    def __init__(self, config: PaliGemmaConfig, tokenizer_path: str, vae_path: str, options: PairOptions) -> None:
        self.config, self.paths, self.options = config, (tokenizer_path, vae_path), options
        self._tools: tuple[Tokenizer, MaskVae] | None = None

    def __call__(self, step: int) -> PairStep:
        if self._tools is None:
            self._tools = Tokenizer.from_file(self.paths[0], self.config.tokens), MaskVae.from_npz(self.paths[1]).eval()
        tokenizer, vae = self._tools
        options, config = self.options, self.config
        rng = np.random.default_rng([options.seed, 77, step])
        drawn = []
        for _ in range(options.n_images):
            world: World = "plain" if rng.random() < options.plain_share else "full"
            scene = sample_scene(int(rng.integers(2**48)), world)
            drawn.append((scene, render(scene)))
        rows: list[tuple[NDArray[Any], ...]] = []
        captions = np.zeros((len(drawn), MAX_CAPTION), np.int64)
        for i, ((scene, rendering), codes) in enumerate(zip(drawn, mask_codes(drawn, vae), strict=True)):
            ids = [*tokenizer.encode(caption(scene, rendering))[: MAX_CAPTION - 1], tokenizer.tokens.eos]
            captions[i, : len(ids)] = ids
            owner = patch_owners(scene, rendering, config.vision.grid)
            rows.append(patch_targets(scene, rendering, owner, codes, LOC_STEP))
        pixels = [to_pixels(r.image, config.vision.resolution, config.processing.resize) for _, r in drawn]
        kind, colour, edges, codes_ = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return PairStep(torch.stack(pixels), torch.from_numpy(captions), kind, colour, edges, codes_)


def pair_loss(model: nn.Module, step: PairStep, dense_weight: float = 1.0) -> dict[str, Tensor]:
    """The contrastive loss, the losses of the patches, and the share of captions found among those of the step."""
    assert isinstance(model, Pair)
    patches = model.vision(step.pixels)
    images = F.normalize(model.head(patches).float(), dim=-1)
    words = F.normalize(model.words(step.captions).float(), dim=-1)
    logits = images @ words.T * model.logit_scale.exp() + model.logit_bias
    # Two pictures of the same caption are both right.
    same = (step.captions[:, None] == step.captions).all(dim=-1)
    contrast = -F.logsigmoid(torch.where(same, logits, -logits)).sum(dim=1).mean()
    dense = dense_losses(model, patches, step)
    loss = contrast + dense_weight * torch.stack(list(dense.values())).sum()
    found = same.gather(1, logits.argmax(dim=1, keepdim=True)).float().mean()
    told = {name: value.detach() for name, value in dense.items()}
    return {"loss": loss, "contrast": contrast.detach(), "found": found, **told}


def dense_losses(model: Pair, patches_IPW: Tensor, step: PairStep) -> dict[str, Tensor]:
    """Kinds of all patches; colours and edges of owned ones; mask codes of those of shapes."""
    owned = step.colour >= 0
    mine, edges = patches_IPW[owned], step.edges[owned]
    is_shape = step.codes[..., 0] >= 0
    places = model.readers["edges"](mine).unflatten(-1, (4, N_PLACES)).float()
    bins = torch.arange(N_PLACES, device=edges.device)
    near = torch.softmax(-((bins - edges[..., None] / LOC_STEP) ** 2) / 2, dim=-1)  # one step off costs little
    codes = model.readers["codes"](patches_IPW[is_shape]).unflatten(-1, (N_SEG, -1)).flatten(0, 1).float()
    return {
        "kind": F.cross_entropy(model.readers["kind"](patches_IPW).flatten(0, 1).float(), step.kind.flatten()),
        "colour": F.cross_entropy(model.readers["colour"](mine).float(), step.colour[owned]),
        "edges": -(near * places.log_softmax(dim=-1)).sum(dim=-1).mean() - torch.special.entr(near).sum(-1).mean(),
        "sides": 5 * (model.sides(mine).float() - edges / (N_LOC - 1)).abs().mean(),
        "codes": 0.3 * F.cross_entropy(codes, step.codes[is_shape].flatten()),
    }


def train_vision(
    config: PaliGemmaConfig, work: Path, options: LessonOptions, pairs: PairOptions, device: torch.device
) -> bool:
    """Teach the pair; the raw SigLIP lands in `work/siglip` when the lesson is over."""
    torch.manual_seed(options.seed)
    draw = DrawPairs(config, str(work / "tokenizer.model"), str(work / "mask_vae.npz"), pairs)
    n_pieces = config.tokens.loc_start
    model = Pair(config, n_pieces, torch.Generator().manual_seed(options.seed)).to(device)

    def loss(m: nn.Module, step: PairStep) -> dict[str, Tensor]:
        moved = PairStep(*(getattr(step, name).to(device) for name in PairStep.__dataclass_fields__))
        return pair_loss(m, moved, pairs.dense_weight)

    average, over = teach("vision", model, draw, loss, model.matrices(), work, options, device)
    if over:
        assert isinstance(average, Pair)
        write_siglip(average, work / "siglip")
    return over


@torch.no_grad()
def write_siglip(model: Pair, folder: Path) -> None:
    """A raw SigLIP checkpoint in Hugging Face's names: tower, pooling head, text tower, temperature and bias."""
    config = model.vision.config
    tensors = {f"vision_model.{_foreign(name)}": p for name, p in model.vision.state_dict().items()}
    tensors |= {f"vision_model.head.{_mlp(name)}": p for name, p in model.head.state_dict().items()}
    tensors |= {f"text_model.{name}": p for name, p in model.words.state_dict().items()}
    tensors |= {"logit_scale": model.logit_scale[None], "logit_bias": model.logit_bias[None]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous().cpu() for name, p in tensors.items()}, folder / "model.safetensors")
    vision = {
        "hidden_size": config.width, "num_hidden_layers": config.depth, "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.n_heads, "image_size": config.resolution, "patch_size": config.patch_size,
        "layer_norm_eps": config.norm_eps, "hidden_act": "gelu_pytorch_tanh", "model_type": "siglip_vision_model",
    }  # fmt: skip
    text = {
        "hidden_size": TEXT.width, "num_hidden_layers": TEXT.depth, "intermediate_size": TEXT.mlp_dim,
        "num_attention_heads": TEXT.n_heads, "max_position_embeddings": MAX_CAPTION, "model_type": "siglip_text_model",
        "projection_size": config.width, "vocab_size": len(model.words.embedding.weight),
    }  # fmt: skip
    values = {"model_type": "siglip", "architectures": ["SiglipModel"], "vision_config": vision, "text_config": text}
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")


_FOREIGN = {  # native part -> Hugging Face's
    "patch_embedding": "embeddings.patch_embedding", "position_embedding": "embeddings.position_embedding.weight",
    "final_norm": "post_layernorm", "blocks": "encoder.layers", "attn_norm": "layer_norm1", "mlp_norm": "layer_norm2",
    "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj", "up": "fc1", "down": "fc2",
}  # fmt: skip


def _foreign(name: str) -> str:
    return ".".join(_FOREIGN.get(part, part) for part in name.split("."))


def _mlp(name: str) -> str:
    return f"mlp.{name}" if name.startswith("fc") else name
