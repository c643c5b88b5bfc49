"""Adapters: a new one changes nothing, a trained one merges exactly, several stand beside one base."""

import copy
import threading

import pytest
import torch

from paligemma.errors import OptionError
from paligemma.models.lora import (
    LoraLinear,
    LoraOptions,
    adapters_of,
    add_lora,
    merge_lora,
    targeted,
    use_adapter,
)
from tests.configs import logits_of, tiny_config, tiny_model, unlike_prompts

CONFIG = tiny_config(2)
KINDS = {
    "LoRA": LoraOptions(rank=3, alpha=5),
    "DoRA": LoraOptions(rank=3, alpha=5, use_dora=True),
    "rank-stabilised": LoraOptions(rank=4, alpha=3, use_rslora=True),
    "image tower too": LoraOptions(rank=2, targets=("decoder", "vision", "projector")),
}


def model_with(options: LoraOptions, *names: str, trained: bool = True):
    model = copy.deepcopy(tiny_model(CONFIG))
    for seed, name in enumerate(names or ("default",)):
        add_lora(model, options, name=name, seed=seed)
        if trained:
            generator = torch.Generator().manual_seed(10 + seed)
            with torch.no_grad():
                for adapter in adapters_of(model)[name].values():
                    adapter.b.normal_(std=0.3, generator=generator)
                    if adapter.magnitude is not None:
                        adapter.magnitude.mul_(1.3)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_alone_is_trained(kind):
    model, batch = model_with(KINDS[kind], trained=False), unlike_prompts(CONFIG)
    torch.testing.assert_close(logits_of(model, batch), logits_of(tiny_model(CONFIG), batch), atol=2e-5, rtol=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters.default." in name for name in trained)
    assert any(name.startswith("vision") for name in trained) == (kind == "image tower too")


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_answers_as_the_one_beside_the_weights(kind):
    model, batch = model_with(KINDS[kind]), unlike_prompts(CONFIG)
    beside = logits_of(model, batch)
    assert (beside - logits_of(tiny_model(CONFIG), batch)).abs().max() > 0.05
    merge_lora(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert set(model.state_dict()) == set(tiny_model(CONFIG).state_dict())
    torch.testing.assert_close(logits_of(model, batch), beside, atol=1e-4, rtol=1e-4)


def test_each_call_chooses_its_adapter_and_threads_do_not_disturb_one_another():
    options, batch = KINDS["LoRA"], unlike_prompts(CONFIG)
    both = model_with(options, "a", "b")
    alone = {
        name: logits_of(model_with(options, *names), batch) for name, names in {"a": ("a",), "b": ("a", "b")}.items()
    }
    base = logits_of(tiny_model(CONFIG), batch)
    expected = {"a": alone["a"], "b": alone["b"], None: base}
    wrong = []

    def ask(name):
        for _ in range(5):
            with use_adapter(both, name):
                if not torch.allclose(logits_of(both, batch), expected[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    torch.testing.assert_close(logits_of(both, batch), expected["b"])  # outside, the last one that was made active


def test_dropout_acts_in_training_only():
    model = model_with(LoraOptions(rank=3, dropout=0.5))
    batch = unlike_prompts(CONFIG)
    assert torch.equal(logits_of(model, batch), logits_of(model, batch))
    model.train()
    assert not torch.equal(logits_of(model, batch), logits_of(model, batch))


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("decodr",), "Did you mean 'decoder'"), (("q_proj",), "matches no linear"), (("(",), "no reg")],
)
def test_a_target_that_matches_nothing_is_refused(targets, message):
    with pytest.raises(OptionError, match=message):
        add_lora(copy.deepcopy(tiny_model(CONFIG)), LoraOptions(targets=targets))


def test_targets_keep_the_order_of_the_model():
    names = ["text.blocks.0.attn.q", "vision.blocks.0.attn.q", "text.blocks.0.mlp.up"]
    assert targeted(names, ("vision", "decoder")) == names


def test_an_adapter_that_is_not_there_is_refused():
    model = model_with(KINDS["LoRA"], "cats")
    with pytest.raises(OptionError, match="Did you mean 'cats'"), use_adapter(model, "cat"):
        pass
    with pytest.raises(OptionError, match="no adapter 'dogs'"):
        merge_lora(model, "dogs")
