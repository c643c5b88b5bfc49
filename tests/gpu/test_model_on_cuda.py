"""On a CUDA device: the kernels used there give the numbers of the plain path on the CPU."""

import dataclasses

import pytest
import torch

from paligemma.config import PaliGemmaConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.models.init import init_weights
from paligemma.models.kv_cache import KVCache
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.models.siglip import of_levels

pytestmark = pytest.mark.gpu

CONFIG = PaliGemmaConfig(
    vision=VisionConfig(width=96, depth=2, mlp_dim=160, n_heads=3, resolution=56),
    text=TextConfig(
        width=128, depth=4, mlp_dim=192, n_heads=8, n_kv_heads=2, head_dim=32, vocab_size=512, post_norms=True,
        query_pre_attn_scalar=32, attn_logits_softcap=5.0, final_logits_softcap=3.0, sliding_window=12,
    ),
    tokens=TokenConfig(n_tokens=500, loc_start=10, seg_start=20, image=501),
)  # fmt: skip
UNCAPPED = dataclasses.replace(
    CONFIG, text=dataclasses.replace(CONFIG.text, attn_logits_softcap=None, final_logits_softcap=None)
)


def test_levels_become_the_numbers_of_the_cpu() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(of_levels(levels.cuda()).cpu(), of_levels(levels))


def rows() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    n_image, n_text = CONFIG.vision.n_image_tokens, 21
    mask_image = torch.zeros(3, n_image + n_text, dtype=torch.bool)
    mask_image[:, :n_image] = True
    mask_ar = torch.zeros_like(mask_image, dtype=torch.int64)
    mask_ar[:, n_image + 9 :] = 1
    mask_input = torch.ones_like(mask_image)
    mask_input[1, -5:] = False
    return {
        "tokens": torch.randint(3, 500, mask_image.shape, generator=rng),
        "mask_image": mask_image,
        "mask_ar": mask_ar,
        "mask_input": mask_input,
        "pixels": torch.rand(3, 3, 56, 56, generator=rng) * 2 - 1,
    }


def model(config: PaliGemmaConfig) -> PaliGemmaModel:
    return init_weights(PaliGemmaModel(config), torch.Generator().manual_seed(0), zero_projector=False).eval()


@pytest.mark.parametrize("config", [CONFIG, UNCAPPED], ids=["caps", "no caps"])
def test_logits_on_cuda_are_those_of_the_cpu(config: PaliGemmaConfig) -> None:
    batch, on_cpu = rows(), model(config)
    expected = on_cpu(**batch)[batch["mask_input"]]
    on_gpu = model(config).cuda()
    got = on_gpu(**{name: value.cuda() for name, value in batch.items()}).cpu()[batch["mask_input"]]
    assert torch.allclose(got, expected, atol=2e-3 * expected.abs().max().item())


def test_gradients_flow_through_flex_attention() -> None:
    batch = {name: value.cuda() for name, value in rows().items()}
    net, reference = model(CONFIG).cuda(), model(CONFIG)
    net(**batch)[batch["mask_input"]].square().mean().backward()
    cpu = rows()
    reference(**cpu)[cpu["mask_input"]].square().mean().backward()
    for (name, got), (_, expected) in zip(net.named_parameters(), reference.named_parameters(), strict=True):
        assert got.grad is not None, name
        assert expected.grad is not None, name
        scale = expected.grad.abs().max().item() + 1e-6
        assert torch.allclose(got.grad.cpu(), expected.grad, atol=1e-2 * scale), name


@pytest.mark.parametrize("static", [False, True])
def test_decoding_with_a_cache_repeats_the_full_pass(static: bool) -> None:
    batch = {name: value.cuda() for name, value in rows().items() if name != "mask_input"}
    net = model(CONFIG).cuda()
    n = CONFIG.vision.n_image_tokens + 9
    with torch.inference_mode():
        full = net(**batch)
        cache = KVCache.allocate(CONFIG.text, 3, batch["tokens"].shape[1], device="cuda", static=static)
        prompt = {name: value if name == "pixels" else value[:, :n] for name, value in batch.items()}
        step = net.prefill(cache=cache, **prompt)
        for t in range(n, batch["tokens"].shape[1]):
            assert torch.allclose(step, full[:, t - 1], atol=2e-3 * full.abs().max().item())
            step = net.decode_step(batch["tokens"][:, t], cache)
