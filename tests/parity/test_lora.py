"""Adapters against peft: what is trained here answers alike there, and the other way round."""

import copy
import warnings

import pytest
import torch

from paligemma.checkpoints import read_adapter, write
from paligemma.checkpoints.lora_write import load_adapter, write_adapter
from paligemma.models.lora import LoraOptions, adapters_of, add_lora
from paligemma.processing.batch import collate
from tests.configs import logits_of, tiny_config, tiny_model, unlike_items
from tests.hf_peer import peer_inputs, peer_of

peft = pytest.importorskip("peft")

ATOL = 2e-4
KINDS = {
    "LoRA": LoraOptions(rank=3, alpha=5),
    "DoRA": LoraOptions(rank=3, alpha=5, use_dora=True),
    "rank-stabilised": LoraOptions(rank=4, alpha=3, use_rslora=True),
    "both towers": LoraOptions(rank=2, alpha=2, targets=("decoder", "vision", "projector")),
    "attention of one layer": LoraOptions(rank=2, targets=(r"text\.blocks\.1\.attn\.(q|v)",)),
}
GENERATIONS = {1: tiny_config(1), 2: tiny_config(2)}


def randomised(model, options):
    add_lora(model, options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for adapter in adapters_of(model)["default"].values():
            adapter.b.normal_(std=0.3, generator=generator)
            if adapter.magnitude is not None:
                adapter.magnitude.mul_(torch.rand(adapter.magnitude.shape, generator=generator) + 0.5)
    return model.eval()


def quietly(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_written_here_answers_alike_in_peft_and_back(tmp_path, generation, kind):
    base = tiny_model(GENERATIONS[generation])
    model = randomised(copy.deepcopy(base), KINDS[kind])
    folder = write_adapter(tmp_path / "adapter", model, KINDS[kind], base="google/some-base")
    batch = collate(unlike_items(base.config), padding_side="left")
    real = batch.mask_input
    ours = logits_of(model, batch)[real]
    assert (ours - logits_of(base, batch)[real]).abs().max() > 100 * ATOL

    theirs = quietly(lambda: peft.PeftModel.from_pretrained(peer_of(base), folder)).eval()
    loaded = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert len(loaded) == sum(len(list(a.parameters())) for a in adapters_of(model)["default"].values())
    with torch.no_grad():
        expected = theirs(**peer_inputs(batch, base.config)).logits[real]
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)

    quietly(lambda: theirs.save_pretrained(tmp_path / "back"))
    again = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(again, read_adapter(tmp_path / "back", base.config))
    torch.testing.assert_close(logits_of(again, batch)[real], ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_gradients_of_an_adapter_are_those_of_peft(tmp_path, kind):
    base = tiny_model(GENERATIONS[2])
    model = randomised(copy.deepcopy(base), KINDS[kind])
    folder = write_adapter(tmp_path / "adapter", model, KINDS[kind])
    theirs = quietly(lambda: peft.PeftModel.from_pretrained(peer_of(base), folder, is_trainable=True))
    batch = collate(unlike_items(base.config, n_suffix=3), padding_side="right")
    real = batch.mask_input
    model(**batch.model_inputs())[real].square().mean().backward()
    theirs(**peer_inputs(batch, base.config)).logits[real].square().mean().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    checked = 0
    for letter, attribute in (("lora_A", "a"), ("lora_B", "b"), ("lora_magnitude_vector", "magnitude")):
        for path, adapter in adapters_of(model)["default"].items():
            parameter = getattr(adapter, attribute)
            if parameter is None:
                continue
            layer, leaf = path.split(".")[2], path.split(".")[-1]
            word = {"out": "o"}.get(leaf, leaf)
            (found,) = (
                g
                for n, g in grads.items()
                if f"layers.{layer}." in n and f".{word}_proj.{letter}" in n and "vision" not in n
            )
            torch.testing.assert_close(parameter.grad, found, atol=1e-4, rtol=1e-3)
            checked += 1
    assert checked == len(grads)


def test_a_written_base_and_adapter_load_from_their_folders_in_peft(tmp_path):
    """Both from disk, as a user of transformers would."""
    import transformers

    base = tiny_model(GENERATIONS[2])
    write(tmp_path / "base", base.config, base.state_dict())
    model = randomised(copy.deepcopy(base), KINDS["LoRA"])
    write_adapter(tmp_path / "adapter", model, KINDS["LoRA"], base=str(tmp_path / "base"))
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    adapted = quietly(lambda: peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")).eval()
    batch = collate(unlike_items(base.config), padding_side="left")
    with torch.no_grad():
        expected = adapted(**peer_inputs(batch, base.config)).logits
    torch.testing.assert_close(
        logits_of(model, batch)[batch.mask_input],
        expected[batch.mask_input][:, : logits_of(model, batch).shape[-1]],
        atol=ATOL,
        rtol=0,
    )
