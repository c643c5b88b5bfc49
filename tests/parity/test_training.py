"""Loss and gradients of a transfer batch against transformers 5.23: rows of a JSONL file, through our loader and loss.

The peer gets the same tokens and pixels with `token_type_ids` and an attention mask (without them it is causal over the
prefix), labels on the suffix alone, and takes its mean over target tokens; here that is `per_token`.
"""

import copy
import dataclasses
import functools

import pytest
import torch

from paligemma.models.init import init_weights
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.train.loop import FitOptions, default_loss
from paligemma.train.loss import target_counts
from tests.hf_peer import peer_inputs, peer_name, peer_of
from tests.training_runs import SMALL, loader_of, write_rows

GENERATIONS = {
    "PaliGemma 1": {
        "n_kv_heads": 1, "post_norms": False, "attn_logits_softcap": None, "final_logits_softcap": None,
    },
    "PaliGemma 2": {},
}  # fmt: skip


@functools.cache
def model_of(generation: str) -> PaliGemmaModel:
    config = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, **GENERATIONS[generation]))
    model = PaliGemmaModel(config)
    init_weights(model, torch.Generator().manual_seed(3), zero_projector=False)
    return model


@pytest.mark.parametrize("options", [{}, {"part_size": 2}, {"arrange": "pack", "part_size": 3}], ids=str)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_transfer_batch_has_the_loss_and_gradients_of_transformers(tmp_path, generation, options):
    """However the step is cut or packed here, the peer sees it as one padded batch."""
    path = write_rows(tmp_path, 6)
    ours, peer = copy.deepcopy(model_of(generation)), peer_of(model_of(generation))
    peer.requires_grad_(True)
    (whole,) = loader_of(path, batch_size=6).step(0).parts
    theirs = peer(
        **peer_inputs(whole, ours.config), labels=whole.tokens.masked_fill(~whole.mask_loss, -100)
    ).loss  # fmt: skip
    theirs.backward()

    parts = loader_of(path, batch_size=6, **options).step(0).parts
    loss = default_loss(FitOptions(steps=1, normalization="per_token"))
    count = sum(target_counts(part, "per_token") for part in parts)
    total = 0.0
    for part in parts:
        sums = loss(ours, part)
        (sums.total / count).backward()
        total += sums.total.item()
    assert total / count == pytest.approx(theirs.item(), rel=1e-5)
    named = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = named[peer_name(name, post_norms=ours.config.text.post_norms)].grad
        scale = float(expected.abs().max())
        if name.endswith("attn.k.bias"):  # zero but for rounding: a shift of all scores changes no softmax
            assert scale < 1e-5
            continue
        assert scale > 0, name
        torch.testing.assert_close(
            parameter.grad, expected.reshape(parameter.shape), atol=2e-4 * scale, rtol=1e-3, msg=name
        )
