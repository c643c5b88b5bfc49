"""Examples about one picture share its way through the tower; what is not to be learned counts in no loss."""

import numpy as np
import pytest
import torch

from paligemma.data.example import Example
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.errors import DataError, OptionError
from paligemma.models.init import init_weights
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.models.siglip import of_levels
from paligemma.train.loss import loss_sums
from tests.training_runs import SMALL, processor

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)


class Asked:
    """Two pictures with two questions each, and one with one."""

    rows = ((0, "red"), (0, "green"), (1, "blue"), (1, "a red circle"), (2, "red"))

    def __init__(self, *, shared: bool = True, unlearned: tuple[tuple[int, int], ...] = (), suffix: str = "") -> None:
        self.pictures = [PICTURES[i] for i in range(3)]
        self.shared, self.unlearned, self.suffix = shared, unlearned, suffix

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        picture, answer = self.rows[index]
        image = self.pictures[picture] if self.shared else self.pictures[picture].copy()
        return Example((image,), "caption en", self.suffix or answer, unlearned=self.unlearned)


def loader(source: Asked, **options: object) -> Loader:
    return Loader(source, processor(), LoaderOptions(batch_size=5, shuffle=False, **options))


@pytest.mark.parametrize("arrange", ["bucket", "pack"])
def test_a_shared_picture_is_encoded_once_and_gives_the_same_loss_and_gradients(arrange):
    (once,), (each,) = (loader(Asked(shared=shared), arrange=arrange).step(0).parts for shared in (True, False))
    assert len(once.pixels) == 3
    assert len(each.pixels) == 5
    assert torch.equal(once.pixels[once.image_of], each.pixels)
    found = []
    for batch in (once, each):
        model = init_weights(PaliGemmaModel(SMALL), torch.Generator().manual_seed(0), zero_projector=False)
        sums = loss_sums(model, batch)
        sums.total.backward()
        grads = torch.cat([p.grad.to_dense().flatten() for p in model.parameters()])
        found.append((sums.total.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_batches_hold_levels_of_which_the_tower_makes_the_same_pixels():
    (batch,) = loader(Asked()).step(0).parts
    assert batch.pixels.dtype == torch.uint8
    pixels = processor().pixels(Asked().pictures)
    assert torch.equal(of_levels(batch.pixels), pixels)
    model = init_weights(PaliGemmaModel(SMALL), torch.Generator().manual_seed(0), zero_projector=False)
    assert torch.equal(model.embed_image(batch.pixels), model.embed_image(pixels))


def test_distortion_is_seeded_by_the_place_and_sees_the_picture_as_it_is():
    seen = []

    def darker(picture, side, rng):
        seen.append((picture.shape, side))
        return (picture * rng.uniform(0.2, 0.8)).astype(np.uint8)

    made = [
        Loader(Asked(shared=False), processor(), LoaderOptions(batch_size=5, shuffle=False), distort=darker).step(n)
        for n in (0, 0, 1)
    ]
    first, again, later = (data.parts[0].pixels for data in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert set(seen) == {((20, 30, 3), 28)}


def test_a_place_gives_what_its_step_holds():
    """Pages that look at single places show what training sees of them."""
    grainy = Loader(
        Asked(shared=False), processor(), LoaderOptions(batch_size=5, seed=4),
        distort=lambda picture, side, rng: rng.integers(0, 255, picture.shape).astype(np.uint8),
    )  # fmt: skip
    data = grainy.step(1)
    (batch,) = data.parts
    pixels = {one.numpy().tobytes() for one in batch.pixels}
    found = [grainy.example(place) for place in range(5, 10)]
    assert tuple(example.where for example, _ in found) == data.names
    assert {item.pixels[0].numpy().tobytes() for _, item in found} == pixels
    assert len(pixels) == 5


BOX = "<loc0001><loc0002><loc0300><loc0400>"


def test_unlearned_stretches_count_in_no_loss():
    suffix = f"{BOX} red ; {BOX} noise"
    start = len(f"{BOX} red ; ")
    (whole,) = loader(Asked(suffix=suffix)).step(0).parts
    (part,) = loader(Asked(suffix=suffix, unlearned=((start, start + len(BOX)),))).step(0).parts
    assert torch.equal(whole.tokens, part.tokens)
    dropped = whole.mask_loss & ~part.mask_loss
    assert (dropped.sum(dim=1) == 4).all()
    is_loc = (part.tokens >= SMALL.tokens.loc_start) & (part.tokens < SMALL.tokens.seg_start)
    assert (is_loc & part.mask_loss).sum(dim=1).tolist() == [4] * 5
    assert not (part.mask_loss & ~whole.mask_loss).any()


def test_a_stretch_that_cuts_a_word_is_refused():
    with pytest.raises(DataError, match="cuts through tokens of 'a red circle'"):
        loader(Asked(suffix="a red circle", unlearned=((3, 4),))).step(0)


def test_a_stream_cannot_be_shuffled():
    class Stream(Asked):
        is_sequential = True

    with pytest.raises(OptionError, match=r"loader\.shuffle=True for a stream: expected False"):
        Loader(Stream(), processor(), LoaderOptions())
