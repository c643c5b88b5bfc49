"""A complete model folder with random weights and the golden tokenizer, for tests of everything above the parts.

Random weights say nothing sensible, so tests on them compare answers with one another, never with the truth.
"""

import shutil
from pathlib import Path

import torch

from paligemma.checkpoints import write
from paligemma.config import PaliGemmaConfig, ProcessingConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.models.init import init_weights
from paligemma.models.mask_vae import MaskVae
from paligemma.models.paligemma import PaliGemmaModel

TOKENIZER = Path(__file__).parent / "golden" / "data" / "text_preprocessing" / "tokenizer_extended.model"

CONFIG = PaliGemmaConfig(
    vision=VisionConfig(width=24, depth=2, mlp_dim=40, n_heads=3, resolution=42, patch_size=14),
    text=TextConfig(
        width=32, depth=2, mlp_dim=56, n_heads=4, n_kv_heads=2, head_dim=10, vocab_size=1664,
        post_norms=True, query_pre_attn_scalar=10, attn_logits_softcap=50.0, final_logits_softcap=30.0,
    ),
    tokens=TokenConfig(n_tokens=1664, loc_start=512, seg_start=1536, image=1664),
    processing=ProcessingConfig(resize="hf_bicubic"),
    name="random",
)  # fmt: skip


def random_model(seed: int = 0, config: PaliGemmaConfig = CONFIG) -> PaliGemmaModel:
    """Weights under which answers are lively: they differ between pictures, hold boxes, and end at unlike lengths."""
    generator = torch.Generator().manual_seed(seed)
    model = init_weights(PaliGemmaModel(config, dtype=torch.float32), generator, zero_projector=False).eval()
    with torch.no_grad():
        model.projector.weight.mul_(8)
        table = model.text.embedding.weight
        table.normal_(0, 0.05, generator=generator)  # small, or every token would just repeat itself
        table[config.tokens.eos] *= 2.0
        for block in model.text.blocks:
            block.post_mlp_norm.scale.fill_(7)
            block.mlp.gate.weight.mul_(4)
        model.text.final_norm.scale.fill_(9)  # logits far enough apart that no greedy choice is a tie
    return model


def write_folder(folder: Path, *, mask_vae: bool = True, tokenizer: bool = True, seed: int = 0) -> Path:
    """A Hugging Face folder as `load` takes it."""
    model = random_model(seed)
    write(folder, CONFIG, dict(model.state_dict()), "hf")
    if tokenizer:
        shutil.copy(TOKENIZER, folder / "tokenizer.model")
    if mask_vae:
        torch.manual_seed(seed)
        MaskVae(hidden=(2, 3, 4, 5), code_dim=6, n_codes=128).to_npz(folder / "mask_vae.npz")
    return folder
