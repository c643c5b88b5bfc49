"""Stage 0, text part: a small Gemma 2, taught to continue the sentences of the picture world.

Captions, questions with their answers, lists of names, and stories: lists of what is somewhere, followed by questions
about it. What the decoder brings along is the language and how to look something up in what was said, as Gemma does in
the report; it has no idea of any place or picture.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from paligemma.config import PaliGemmaConfig, TextConfig
from paligemma.data.world import corpus, stories
from paligemma.models.attention import Span
from paligemma.models.gemma import GemmaDecoder
from paligemma.models.init import init_decoder
from paligemma.processing.tokenizer import Tokenizer
from paligemma.recipes.tiny.loop import LessonOptions, teach

LENGTH = 96  # tokens of a row


@dataclass(frozen=True, kw_only=True)
class WordOptions:
    """How many rows a step reads, and from how many lines of the corpus and how many stories they come."""

    n_rows: int = 64
    n_lines: int = 4_000
    n_stories: int = 12_000
    seed: int = 0


class DrawWords:
    """Rows of step n: lines and stories, one after another, cut into equal rows; bos opens and eos closes each."""

    def __init__(self, tokenizer: Tokenizer, options: WordOptions) -> None:
        tokens = tokenizer.tokens
        texts = [*corpus(options.n_lines, options.seed), *stories(options.n_stories, options.seed)]
        ids = [
            i
            for line in np.random.default_rng(options.seed).permutation(np.array(texts, object))
            for i in (tokens.bos, *tokenizer.encode(line), tokens.eos)
        ]
        self.ids: NDArray[np.int64] = np.array(ids, np.int64)
        self.options = options

    def __call__(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.options.seed, 78, step])
        starts = rng.integers(0, len(self.ids) - LENGTH - 1, self.options.n_rows)
        return torch.from_numpy(np.stack([self.ids[start : start + LENGTH + 1] for start in starts]))


def word_loss(model: nn.Module, rows_BT: Tensor) -> dict[str, Tensor]:
    """Next-token cross-entropy, causal, no picture."""
    assert isinstance(model, GemmaDecoder)
    inputs, targets = rows_BT[:, :-1], rows_BT[:, 1:]
    place = torch.arange(inputs.shape[1], device=rows_BT.device).expand_as(inputs)
    one = torch.ones_like(inputs)
    span = Span(block=place, valid=one.bool(), segment=one, position=place)
    logits = model.logits(model(model.embed(inputs), span))
    return {"loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten())}


def train_words(
    config: PaliGemmaConfig, work: Path, options: LessonOptions, words: WordOptions, device: torch.device
) -> bool:
    """Teach the decoder; the raw Gemma lands in `work/gemma` when the lesson is over."""
    torch.manual_seed(options.seed)
    text = replace(config.text, vocab_size=config.tokens.loc_start)
    model = GemmaDecoder(text)
    init_decoder(model, torch.Generator().manual_seed(options.seed))
    model.embedding.sparse = False  # one table of a thousand rows
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    draw = DrawWords(Tokenizer.from_file(work / "tokenizer.model", config.tokens), words)

    def loss(m: nn.Module, rows: Tensor) -> dict[str, Tensor]:
        return word_loss(m, rows.to(device))

    average, over = teach("words", model.to(device), draw, loss, matrices, work, replace(options, workers=0), device)
    if over:
        assert isinstance(average, GemmaDecoder)
        write_gemma(average, text, work / "gemma")
    return over


_FOREIGN = {  # native part -> Hugging Face's
    "embedding": "embed_tokens", "blocks": "layers", "final_norm": "norm", "pre_attn_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm", "pre_mlp_norm": "pre_feedforward_layernorm", "scale": "weight",
    "post_mlp_norm": "post_feedforward_layernorm", "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj",
    "out": "o_proj", "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}  # fmt: skip


@torch.no_grad()
def write_gemma(model: GemmaDecoder, config: TextConfig, folder: Path) -> None:
    """A raw Gemma 2 checkpoint in Hugging Face's names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "model." + ".".join(_FOREIGN.get(part, part) for part in name.split(".")): p.detach().contiguous().cpu()
        for name, p in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    values = {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": config.vocab_size,
        "hidden_size": config.width, "num_hidden_layers": config.depth, "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "query_pre_attn_scalar": config.query_pre_attn_scalar, "attn_logit_softcapping": config.attn_logits_softcap,
        "final_logit_softcapping": config.final_logits_softcap, "sliding_window": 4096, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "hidden_activation": "gelu_pytorch_tanh", "bos_token_id": 2, "eos_token_id": 1,
        "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
