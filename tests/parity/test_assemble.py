"""Stage 0 against transformers 5.23: its raw SigLIP and Gemma in, its PaliGemma out, and the same numbers between."""

import pytest
import torch
from torch import nn

from paligemma.checkpoints import assemble, save_assembly
from paligemma.models.attention import Span
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import collate
from tests.configs import logits_of, unlike_items
from tests.hf_peer import peer_inputs
from tests.raw_parts import TEXT, VISION
from tests.raw_parts import model as part_model

transformers = pytest.importorskip("transformers")

N_PIECES, SIDE = 64, 56
GENERATIONS = pytest.mark.parametrize("generation", [1, 2])


def lively(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # norms start at zero, which would hide two that are mixed up
        for name, parameter in model.named_parameters():
            is_factor = "layer_norm" in name or ("post_layernorm" in name and name.endswith("weight"))
            parameter.normal_(std=0.2, generator=generator)
            parameter.add_(float(is_factor))
    return model.eval()


def raw_siglip(whole: bool = False) -> nn.Module:
    """A random SigLIP: tower and head, or with the text tower and the two numbers of its loss."""
    tower = {
        "hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 3, "num_hidden_layers": 2, "patch_size": 14,
        "image_size": SIDE,
    }  # fmt: skip
    if not whole:
        return lively(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**tower)), 1)
    text = {**tower, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    return lively(transformers.SiglipModel(transformers.SiglipConfig(vision_config=tower, text_config=text)), 1)


def raw_gemma(generation: int) -> nn.Module:
    sizes = {
        "vocab_size": N_PIECES, "hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3, "attn_implementation": "eager",
    }  # fmt: skip
    if generation == 1:
        return lively(transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes)), 2)
    config = transformers.Gemma2Config(**sizes, query_pre_attn_scalar=12, attn_logit_softcapping=5.0)
    return lively(transformers.Gemma2ForCausalLM(config), 2)


@pytest.fixture(scope="module", params=[1, 2], ids=["Gemma", "Gemma-2"])
def parts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tower, decoder = raw_siglip(), raw_gemma(request.param)
    tower.save_pretrained(folder / "siglip")
    decoder.save_pretrained(folder / "gemma", max_shard_size="40KB")
    assert len(list((folder / "gemma").glob("*.safetensors"))) > 1
    return folder, tower, decoder


def test_the_model_computes_what_its_parts_compute_one_after_the_other(parts):
    folder, tower, decoder = parts
    config, state = assemble(folder / "siglip", folder / "gemma", resolution=SIDE, projector="normal")
    with state:
        model = PaliGemmaModel(config).eval()
        model.load_state_dict(dict(state))
    generator = torch.Generator().manual_seed(3)
    nn.init.normal_(model.projector.bias, generator=generator)
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
    words = torch.randint(3, N_PIECES, (2, 7), generator=generator)
    with torch.no_grad():
        seen = tower(pixel_values=pixels).last_hidden_state
        image = nn.functional.linear(seen, model.projector.weight, model.projector.bias)
        # Their Gemma takes embeddings as they enter the first layer; image tokens are not multiplied by sqrt(width).
        inputs = torch.cat([image, decoder.get_input_embeddings()(words)], 1)
        length = inputs.shape[1]
        sees_all = torch.zeros(2, 1, length, length)
        kinds = ("full_attention", "sliding_attention")
        mask = sees_all if config.text.post_norms is False else dict.fromkeys(kinds, sees_all)
        expected = decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits

        x = torch.cat([model.embed_image(pixels), model.text.embed(words)], 1)
        zero = torch.zeros(2, length, dtype=torch.long)
        span = Span(block=zero, valid=zero == 0, segment=zero, position=torch.arange(length).expand(2, -1))
        got = model.text.logits(model.text(x, span))
    assert got.shape[-1] == N_PIECES + 1152
    assert expected.abs().max() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(got[..., :N_PIECES], expected, atol=1e-5, rtol=0)


@GENERATIONS
@pytest.mark.parametrize("layout", ["A", "D"])
def test_the_folder_loads_in_transformers_without_a_stray_key(tmp_path, generation, layout):
    raw_siglip(whole=True).save_pretrained(tmp_path / "siglip")
    decoder = raw_gemma(generation)
    decoder.save_pretrained(tmp_path / "gemma")
    config, state = assemble(tmp_path / "siglip", tmp_path / "gemma", resolution=112)
    with state:
        save_assembly(tmp_path / "out", config, state, layout=layout)
    model, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[kind], (kind, report[kind])
    theirs = model.model.language_model
    assert theirs.config.model_type == ("gemma2" if generation == 2 else "gemma")
    for name, tensor in decoder.model.state_dict().items():
        if name != "embed_tokens.weight":
            assert torch.equal(theirs.state_dict()[name], tensor), name
    table = theirs.embed_tokens.weight
    assert torch.equal(table[:N_PIECES], decoder.model.embed_tokens.weight)
    assert (len(table), model.config.image_token_index) == (1280, N_PIECES + 1152)  # rounded up to 64 behind <image>
    assert not model.model.multi_modal_projector.linear.weight.any()
    assert model.config.vision_config.image_size == 112


@GENERATIONS
@pytest.mark.parametrize(
    ("tower", "decoder"), [*((kind, "Gemma folder") for kind in VISION), *(("SigLIP folder", kind) for kind in TEXT)]
)
def test_parts_of_every_kind_make_a_folder_that_computes_the_same_in_transformers(tmp_path, generation, tower, decoder):
    """A configuration that was guessed wrong from shapes would load, and compute something else."""
    config, state = part_model(generation)
    for name in ("v", "t"):
        (tmp_path / name).mkdir()
    vision, text = VISION[tower](tmp_path / "v", config, state), TEXT[decoder](tmp_path / "t", config, state)
    made, parts = assemble(vision, text, resolution=config.vision.resolution, projector="normal")
    with parts:
        save_assembly(tmp_path / "out", made, parts)
        model = PaliGemmaModel(made).eval()
        model.load_state_dict(dict(parts))
    peer, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto", attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    batch = collate(unlike_items(made, n_suffix=4))
    with torch.no_grad():
        expected = peer.eval()(**peer_inputs(batch, made)).logits[..., : made.text.vocab_size]
    got, real = logits_of(model, batch), batch.mask_input
    scale = expected[real].abs().max().item()  # these weights are large, and rounding with them
    torch.testing.assert_close(got[real], expected[real], atol=5e-4 * scale, rtol=0)
    # What the raw decoder has, not what shapes alone would say.
    heads = (config.text.n_heads, config.text.n_kv_heads, config.text.head_dim, config.vision.n_heads)
    assert (made.text.n_heads, made.text.n_kv_heads, made.text.head_dim, made.vision.n_heads) == heads


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_a_raw_tokenizer_is_extended_for_transformers_too(tmp_path, kind):
    from pathlib import Path

    words = Path(__file__).parents[1] / "golden" / "data" / "text_preprocessing" / "tokenizer.model"
    raw_siglip().save_pretrained(tmp_path / "siglip")
    config = transformers.GemmaConfig(
        vocab_size=512, hidden_size=40, intermediate_size=72, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=1,
    )  # fmt: skip
    transformers.GemmaForCausalLM(config).save_pretrained(tmp_path / "gemma")
    if kind == "tokenizer.model":
        (tmp_path / "gemma" / kind).write_bytes(words.read_bytes())
    else:
        from paligemma.processing.fast_tokenizer import to_fast_json

        (tmp_path / "gemma" / kind).write_bytes(to_fast_json(words.read_bytes(), None, kind))
    config, state = assemble(tmp_path / "siglip", tmp_path / "gemma", resolution=SIDE)
    with state:
        save_assembly(tmp_path / "out", config, state)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_token_id == config.tokens.image == 1664
    encoded = processor.tokenizer("<loc0000><loc1023><seg000><seg127>", add_special_tokens=False)["input_ids"]
    assert encoded == [512, 1535, 1536, 1663]
    from paligemma.processing.tokenizer import Tokenizer

    assert Tokenizer.from_file(tmp_path / "out", config.tokens).encode("<loc0000>") == [512]
