"""The mask auto-encoder: its file, its laws, and what it refuses."""

import io
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from paligemma.errors import CheckpointError, PickleRefused, ShapeError
from paligemma.models.mask_vae import MaskVae, mask_vae_shapes

HIDDEN, CODE_DIM, N_CODES = (3, 5, 7, 11), 13, 128


def _small(seed: int = 0) -> MaskVae:
    torch.manual_seed(seed)
    return MaskVae(HIDDEN, CODE_DIM, N_CODES)


def _arrays(model: MaskVae) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _file(arrays: dict[str, np.ndarray]) -> io.BytesIO:
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return file


def test_a_narrow_model_survives_its_file_bit_by_bit(tmp_path: Path) -> None:
    model = _small()
    model.to_npz(tmp_path / "vae.npz")
    back = MaskVae.from_npz(tmp_path / "vae.npz")
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["vae.npz"]


def test_float16_files_are_read_as_float32_and_moving_averages_are_ignored() -> None:
    arrays = {name: array.astype(np.float16) for name, array in _arrays(_small()).items()}
    averages = {"_vq_vae._ema_cluster_size": np.ones(N_CODES), "_vq_vae._ema_w": np.ones((N_CODES, CODE_DIM))}
    model = MaskVae.from_npz(_file({**arrays, **averages}))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    np.testing.assert_array_equal(model.codebook.detach().numpy(), arrays["_vq_vae._embedding"].astype(np.float32))


def test_the_encoder_need_not_mirror_the_decoder() -> None:
    other = mask_vae_shapes((2, 4, 6, 8), CODE_DIM, N_CODES)
    shapes = {
        **mask_vae_shapes(HIDDEN, CODE_DIM, N_CODES),
        **{n: s for n, s in other.items() if n.startswith("encoder")},
    }
    codes = MaskVae(shapes=shapes).encode(torch.rand(2, 64, 64))
    assert codes.shape == (2, 16)


def test_a_mask_does_not_depend_on_its_batch_mates_and_chunks_do_not_show() -> None:
    model = _small()
    codes = torch.randint(N_CODES, (131, 16), generator=torch.Generator().manual_seed(1))
    together = model.decode(codes)
    assert together.shape == (131, 64, 64)
    for i in (0, 127, 128, 130):
        torch.testing.assert_close(model.decode(codes[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6)
    masks = (together > together.mean()).float()
    assert torch.equal(model.encode(masks)[128:], model.encode(masks[128:]))


def test_the_grid_of_codes_is_row_major() -> None:
    """Changing code 7 (row 1, column 3) moves the map most around rows 16-31, columns 48-63."""
    model = _small()
    codes = torch.zeros(2, 16, dtype=torch.int64)
    codes[1, 7] = 5
    with torch.no_grad():
        model.codebook[5] += 3.0
    moved = (model.decode(codes)[1] - model.decode(codes)[0]).abs().reshape(4, 16, 4, 16).sum(dim=(1, 3))
    assert divmod(int(moved.argmax()), 4) == (1, 3)


def test_the_nearest_codeword_is_chosen_and_the_first_of_equals() -> None:
    model = _small()
    masks = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2))
    features = model.encode_features(masks).detach().permute(0, 2, 3, 1).reshape(3, 16, 1, CODE_DIM)
    distance = (features - model.codebook.detach()).square().sum(-1)
    assert torch.equal(model.encode(masks), distance.argmin(-1))
    with torch.no_grad():
        model.codebook[:] = model.codebook[0].clone()
    assert torch.equal(model.encode(masks), torch.zeros(3, 16, dtype=torch.int64))


def test_gradients_reach_both_sides_through_features() -> None:
    model = _small()
    features = model.encode_features(torch.rand(2, 64, 64))
    model.decode_features(features).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == ["_vq_vae._embedding"]


def test_no_masks_and_no_codes_are_fine() -> None:
    assert _small().decode_array(np.zeros((0, 16), np.int64)).shape == (0, 64, 64)
    assert _small().encode_array(np.zeros((0, 64, 64), np.float32)).shape == (0, 16)


def test_wrong_codes_and_masks_are_refused_with_their_values() -> None:
    model = _small()
    with pytest.raises(ShapeError, match="span 0…128: expected 0…127"):
        model.decode(torch.tensor([[0] * 15 + [128]]))
    with pytest.raises(ShapeError, match=r"codes have shape \(1, 15\): expected \[n, 16\]"):
        model.decode(torch.zeros(1, 15, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"masks have shape \(1, 32, 32\)"):
        model.encode(torch.zeros(1, 32, 32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("decoder.8.weight"), "decoder.8.weight is missing"),
        (lambda a: a.pop("encoder.0.bias"), "encoder.0.bias is missing"),
        (lambda a: a.pop("_vq_vae._embedding"), "_vq_vae._embedding is missing"),
        (lambda a: a.update({"encoder.77.weight": np.zeros(3)}), "encoder.77.weight is unknown"),
        (lambda a: a.update({"decoder.0.bias": np.zeros(3, np.float32)}), r"decoder.0.bias has shape \(3,\): expected"),
        (lambda a: a.update({"encoder.6.bias": np.full(11, np.nan, np.float32)}), "encoder.6.bias holds NaN"),
        (lambda a: a.update({"encoder.6.bias": np.zeros(11, np.int64)}), "encoder.6.bias is int64"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_the_name_of_its_tensor(change: object, said: str) -> None:
    arrays = _arrays(_small())
    change(arrays)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=said):
        MaskVae.from_npz(_file(arrays))


def test_files_that_are_no_npz_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = _file(_arrays(_small())).getvalue()
    cases = {"cut.npz": whole[: len(whole) // 2], "empty.npz": b"", "text.npz": b"hello"}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=name) as refused:
            MaskVae.from_npz(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match="does not exist"):
        MaskVae.from_npz(tmp_path / "nowhere.npz")


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("the pickle was opened",))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "vae.pkl").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(PickleRefused, match=r"vae\.pkl is a pickle"):
        MaskVae.from_npz(tmp_path / "vae.pkl")
    inside = _file({**_arrays(_small()), "encoder.0.bias": np.array([_Trap()], dtype=object)})
    with pytest.raises(CheckpointError, match="damaged"):
        MaskVae.from_npz(inside)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "vae.npz"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))  # the disk is full after 2,000 bytes
    try:
        with pytest.raises(CheckpointError, match=r"vae\.npz cannot be written"):
            _small().to_npz(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["vae.npz"]
