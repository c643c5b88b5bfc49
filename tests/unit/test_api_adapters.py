"""Several adapters beside one base: an answer under a name is that of the model with this adapter alone."""

import threading

import numpy as np
import pytest
import torch

import paligemma
from paligemma.checkpoints.lora_write import write_adapter
from paligemma.errors import CheckpointError, OptionError
from paligemma.models.lora import LoraOptions, add_lora

DECODER, EVERYWHERE = LoraOptions(rank=4), LoraOptions(rank=2, targets=("decoder", "vision", "projector"))
QUESTION = "answer en what colour is the circle?"


def picture(colour: tuple[int, int, int]) -> np.ndarray:
    """A disc on white."""
    y, x = np.mgrid[:80, :100]
    pixels = np.full((80, 100, 3), 255, np.uint8)
    pixels[(y - 40) ** 2 + (x - 50) ** 2 < 600] = colour
    return pixels


PICTURES = [picture((220, 20, 30)), picture((30, 70, 220)), picture((40, 160, 50)), picture((240, 200, 20))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters that change answers: one of the decoder, one that sees pictures otherwise."""
    out = {}
    for seed, (name, options) in enumerate({"words": DECODER, "sight": EVERYWHERE}.items()):
        model = paligemma.load("tiny", device="cpu").model
        add_lora(model, options, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if ".adapters." in parameter_name and parameter_name.endswith(".b"):
                    parameter.normal_(std=0.05, generator=generator)
        out[name] = write_adapter(tmp_path_factory.mktemp("adapters") / name, model, options, base="tiny")
    return out


@pytest.fixture(scope="module")
def alone(folders):
    """Scores of suffixes by a model with one adapter merged; None: the base."""
    out = {}
    for name in (None, "words", "sight"):
        pg = paligemma.load("tiny", device="cpu", adapter=None if name is None else folders[name])
        out[name] = [pg.score(p, QUESTION, ["red", "blue", "green"]) for p in PICTURES]
    return out


@pytest.fixture
def pg(folders):
    loaded = paligemma.load("tiny", device="cpu")
    for name, folder in folders.items():
        loaded.add_adapter(name, folder)
    return loaded


def assert_like(scores, expected):
    np.testing.assert_allclose(np.asarray(scores), np.asarray(expected), atol=2e-4)


def test_every_name_answers_as_its_adapter_alone_and_none_as_the_base(pg, alone):
    assert pg.adapters == ("words", "sight")
    spread = np.abs(np.asarray(alone["words"]) - np.asarray(alone[None])).max()
    assert spread > 0.05  # the adapters do change answers
    for name in ("words", None, "sight", "words"):
        assert_like([pg.score(p, QUESTION, ["red", "blue", "green"], adapter=name) for p in PICTURES], alone[name])


def test_a_batch_may_mix_names_and_keeps_its_order(pg):
    names = ["words", None, "sight", "words"]
    mixed = pg.generate(PICTURES, [QUESTION] * 4, adapter=names, batch_size=2)
    single = [pg.generate(p, QUESTION, adapter=n)[0] for p, n in zip(PICTURES, names, strict=True)]
    assert [g.tokens for g in mixed] == [g.tokens for g in single]


def test_threads_keep_their_own_choice(pg, alone):
    found: dict[str | None, list] = {}

    def ask(name: str | None) -> None:
        found[name] = [pg.score(p, QUESTION, ["red", "blue", "green"], adapter=name) for p in PICTURES]

    threads = [threading.Thread(target=ask, args=(name,)) for name in (None, "words", "sight")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, scores in found.items():
        assert_like(scores, alone[name])


def test_an_encoded_picture_belongs_to_what_saw_it(pg, alone):
    base, sight = pg.encode_image(PICTURES[0]), pg.encode_image(PICTURES[0], adapter="sight")
    assert_like(pg.score(base, QUESTION, ["red", "blue", "green"], adapter="words"), alone["words"][0])
    assert_like(pg.score(sight, QUESTION, ["red", "blue", "green"], adapter="sight"), alone["sight"][0])
    with pytest.raises(OptionError, match=r"encoded under the base.*Encode it again"):
        pg.score(base, QUESTION, ["red"], adapter="sight")


def test_one_that_is_taken_off_is_gone(pg, alone):
    pg.remove_adapter("words")
    assert pg.adapters == ("sight",)
    with pytest.raises(OptionError, match="there is no adapter 'words'"):
        pg.generate(PICTURES[0], QUESTION, adapter="words")
    assert_like(pg.score(PICTURES[0], QUESTION, ["red", "blue", "green"]), alone[None][0])


def test_mistakes_are_told(pg, folders, tmp_path):
    with pytest.raises(OptionError, match="there is an adapter 'words' already"):
        pg.add_adapter("words", folders["words"])
    with pytest.raises(OptionError, match=r"no adapter 'sigt'.*Did you mean 'sight'"):
        pg.generate(PICTURES[0], QUESTION, adapter="sigt")
    with pytest.raises(OptionError, match="3 adapters for 4 examples"):
        pg.generate(PICTURES, [QUESTION] * 4, adapter=["words", None, "sight"])
    with pytest.raises(CheckpointError):
        pg.add_adapter("other", tmp_path)
