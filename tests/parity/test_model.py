"""Logits, loss and every gradient against transformers 5.23 (eager), on tiny random models whose sizes all differ.

float32, max-abs difference of logits of size 3 to 10; positions are counted from 0 here and from 1 there, which rotary
positions forgive up to rounding.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from paligemma.processing.batch import collate
from tests.configs import logits_of, random_item, tiny_config, tiny_model, unlike_items
from tests.hf_peer import peer_inputs, peer_name, peer_of

ATOL = 2e-4  # rounding, which depends on the processor: 3e-5 measured with AVX-512, 7e-5 with AVX2
CONFIGS = {
    "PaliGemma 1": tiny_config(1),
    "PaliGemma 2": tiny_config(2),
    "PaliGemma 2 without window": tiny_config(2, sliding_window=None),
    "PaliGemma 2 without caps": tiny_config(2, attn_logits_softcap=None, final_logits_softcap=None),
    "PaliGemma 2 attention cap only": tiny_config(2, final_logits_softcap=None),
    "PaliGemma 2 final cap only": tiny_config(2, attn_logits_softcap=None),
}


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"), scope="module")
def pair(request):
    model = tiny_model(CONFIGS[request.param])
    return model, peer_of(model)


def peer_logits(peer, batch, config):
    with torch.no_grad():
        return peer(**peer_inputs(batch, config)).logits


@pytest.mark.parametrize("n_suffix", [0, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_unlike_prompts_and_image_counts_in_one_batch(pair, side, n_suffix):
    """None, one and two images per example; left padding is what transformers generates from."""
    model, peer = pair
    batch = collate(unlike_items(model.config, n_suffix=n_suffix), padding_side=side)
    got, expected = logits_of(model, batch), peer_logits(peer, batch, model.config)
    real = batch.mask_input
    torch.testing.assert_close(got[real], expected[real], atol=ATOL, rtol=0)
    assert expected[real].abs().max() > 1  # not a comparison of zeros


def test_the_window_matters_where_there_is_one():
    """Otherwise the comparison with a window could not see it: without, logits differ by hundreds of tolerances."""
    batch = collate(unlike_items(tiny_config(2), n_suffix=4))
    with_window, without = (
        logits_of(tiny_model(CONFIGS[name]), batch) for name in ("PaliGemma 2", "PaliGemma 2 without window")
    )
    assert (with_window - without)[batch.mask_input].abs().max() > 200 * ATOL


def test_image_features_and_their_reuse(pair):
    model, peer = pair
    batch = collate(unlike_items(model.config))
    with torch.no_grad():
        embeds = model.embed_image(batch.pixels)
        expected = peer.model.get_image_features(batch.pixels).pooler_output
    torch.testing.assert_close(embeds, expected, atol=ATOL, rtol=0)
    assert torch.equal(logits_of(model, batch.with_image_embeds(embeds)), logits_of(model, batch))


def test_loss_and_every_gradient(pair):
    """The mean over target tokens, as transformers takes it; gradients of all parameters, the tied table included."""
    frozen, frozen_peer = pair
    model, peer = copy.deepcopy(frozen).requires_grad_(True), copy.deepcopy(frozen_peer).requires_grad_(True)
    batch = collate(unlike_items(model.config, n_suffix=3))
    logits = model(**batch.model_inputs(), keep=batch.mask_loss.roll(-1, dims=1))
    loss = F.cross_entropy(logits, batch.tokens[batch.mask_loss])
    labels = batch.tokens.masked_fill(~batch.mask_loss, -100)
    peer_loss = peer(**peer_inputs(batch, model.config), labels=labels).loss
    torch.testing.assert_close(loss, peer_loss, atol=ATOL, rtol=0)
    loss.backward()
    peer_loss.backward()
    theirs = dict(peer.named_parameters())
    for name, weight in model.named_parameters():
        expected = theirs.pop(peer_name(name, post_norms=model.config.text.post_norms)).grad
        assert weight.grad is not None, name
        assert expected.abs().max() > 0, name
        # A key bias shifts all scores of a query alike: its gradient is 0 up to rounding in both.
        scale = max(float(expected.abs().max()), 1e-2)
        torch.testing.assert_close(weight.grad, expected, atol=1e-4 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert not theirs


@pytest.mark.parametrize("generation", [1, 2])
def test_bfloat16_is_as_close_as_bfloat16_allows(generation):
    """Relative 2e-2 of the logits' scale; the argmax equal wherever the two best are further apart than that."""
    config = tiny_config(generation)
    model = copy.deepcopy(tiny_model(config)).to(torch.bfloat16)
    batch = collate([random_item(config, seed, n_images=seed % 3, n_prefix=4, n_suffix=6) for seed in range(12)])
    got, expected = logits_of(model, batch), peer_logits(peer_of(model), batch, config).float()
    real = batch.mask_input
    got, expected = got[real], expected[real]
    scale = float(expected.abs().max())
    rms = float((got - expected).square().mean().sqrt())
    assert rms < 2e-2 * scale, (rms, scale)
    top = expected.topk(2).values
    clear = top[:, 0] - top[:, 1] > 4e-2 * scale
    same = got.argmax(-1) == expected.argmax(-1)
    assert clear.float().mean() > 0.3
    assert same[clear].float().mean() >= 0.99
