"""The mask auto-encoder: a 64 x 64 mask <-> a 4 x 4 grid of codewords, which are the sixteen `<segNNN>` tokens.

Parameter names and layouts are those of the published file `vae-oid.npz`, and shapes are read from the file, so that
this module loads it, narrower ones, and writes both back. Sources: big_vision pp/proj/paligemma/segmentation.py
(encoder), evaluators/proj/paligemma/transfers/segmentation.py (decoder); the training code is AiT, arXiv 2301.02229.
"""

# n masks · C code width · K codes

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paligemma.errors import CheckpointError, PickleRefused, ShapeError

MASK_SIDE = 64
N_SEG = 16  # codes per mask: a 4 x 4 grid, row-major
_CODEBOOK = "_vq_vae._embedding"
_IGNORED = ("_vq_vae._ema_cluster_size", "_vq_vae._ema_w")  # moving averages that only its training reads
_SIDES = ("encoder", "decoder")
_CHUNK = 128  # masks per pass: bounds memory for crowded pictures

Shapes = Mapping[str, tuple[int, ...]]


def mask_vae_shapes(hidden: tuple[int, ...], code_dim: int, n_codes: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor; the published file is `mask_vae_shapes((16, 32, 64, 128), 512, 128)`."""
    return {
        _CODEBOOK: (n_codes, code_dim),
        **_encoder_shapes(hidden, code_dim, n_residual=2),
        **_decoder_shapes(hidden, code_dim, n_residual=2),
    }


def _encoder_shapes(hidden: tuple[int, ...], code_dim: int, n_residual: int) -> dict[str, tuple[int, ...]]:
    convs: dict[str, tuple[int, ...]] = {}
    for i, (n_in, n_out) in enumerate(zip((1, *hidden), hidden, strict=False)):
        convs[f"encoder.{2 * i}"] = (n_out, n_in, 4, 4)
    first = 2 * len(hidden)
    for i in range(first, first + n_residual):
        convs |= _residual_shapes(f"encoder.{i}", hidden[-1])
    convs[f"encoder.{first + n_residual}"] = (code_dim, hidden[-1], 1, 1)
    return _with_biases(convs)


def _decoder_shapes(hidden: tuple[int, ...], code_dim: int, n_residual: int) -> dict[str, tuple[int, ...]]:
    convs: dict[str, tuple[int, ...]] = {"decoder.0": (hidden[-1], code_dim, 1, 1)}
    for i in range(2, 2 + n_residual):
        convs |= _residual_shapes(f"decoder.{i}", hidden[-1])
    narrowing = hidden[::-1]
    for i, (n_in, n_out) in enumerate(zip((hidden[-1], *narrowing), narrowing, strict=False)):
        convs[f"decoder.{2 + n_residual + 2 * i}"] = (n_in, n_out, 4, 4)  # transposed: [in, out, k, k]
    convs[f"decoder.{2 + n_residual + 2 * len(hidden)}"] = (1, hidden[0], 1, 1)
    return _with_biases(convs)


def _residual_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.net.{i}": (width, width, k, k) for i, k in ((0, 3), (2, 3), (4, 1))}


def _with_biases(convs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight": shape for name, shape in convs.items()}
    biases = {f"{name}.bias": (s[1] if _is_transposed(name, s) else s[0],) for name, s in convs.items()}
    return weights | biases


def _is_transposed(name: str, shape: tuple[int, ...]) -> bool:
    """The decoder's 4 x 4 kernels enlarge; all other kernels are plain convolutions."""
    return name.startswith("decoder.") and shape[-1] == 4


class ResidualBlock(nn.Module):
    """x + net(x), with no activation after the sum."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.net(x)
        return out


class Codebook(nn.Module):
    """K codewords of width C, in a parameter named as in the published file."""

    def __init__(self, n_codes: int, code_dim: int) -> None:
        super().__init__()
        self._embedding = nn.Parameter(torch.empty(n_codes, code_dim).uniform_(-1 / n_codes, 1 / n_codes))

    def nearest(self, features_NC: Tensor) -> Tensor:
        """int64[N]: the codeword of smallest squared distance, the first of equals."""
        codes_KC = self._embedding.float()
        features_NC = features_NC.float()
        distance_NK = (
            features_NC.square().sum(1, keepdim=True) - 2 * features_NC @ codes_KC.T + codes_KC.square().sum(1)[None]
        )
        return distance_NK.argmin(dim=1)


class MaskVae(nn.Module):
    """Encoder, codebook and decoder of 64 x 64 masks.

    Args:
        hidden: channels after each of the four halvings; the decoder mirrors them. Published: (16, 32, 64, 128).
        code_dim: width of a codeword. Published: 512.
        n_codes: number of codewords; 128, as there are `<seg000>` … `<seg127>`.
        shapes: name -> shape of every tensor instead of the three above, as a file gives them.

    A new module has random weights; `from_npz` reads trained ones.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (16, 32, 64, 128),
        code_dim: int = 512,
        n_codes: int = 128,
        *,
        shapes: Shapes | None = None,
    ) -> None:
        super().__init__()
        given = dict(shapes) if shapes is not None else mask_vae_shapes(hidden, code_dim, n_codes)
        _check_shapes(given)
        self._vq_vae = Codebook(*given[_CODEBOOK])
        self.encoder = _tower("encoder", given)
        self.decoder = _tower("decoder", given)

    @property
    def codebook(self) -> nn.Parameter:
        """float[K, C]: the codewords themselves (the file's `_vq_vae._embedding`)."""
        return self._vq_vae._embedding

    @property
    def n_codes(self) -> int:
        return self.codebook.shape[0]

    def encode_features(self, masks: Tensor) -> Tensor:
        """float[n, 64, 64] masks in [0, 1] -> float[n, C, 4, 4] before quantisation; differentiable."""
        if masks.ndim != 3 or tuple(masks.shape[1:]) != (MASK_SIDE, MASK_SIDE):
            raise ShapeError(
                f"masks have shape {tuple(masks.shape)}: expected [n, 64, 64]. Crop and resize each to 64 × 64."
            )
        out: Tensor = self.encoder((2 * (masks.to(self.codebook) - 0.5))[:, None])
        return out

    def decode_features(self, quantised: Tensor) -> Tensor:
        """float[n, C, 4, 4] codewords on their grid -> float32[n, 64, 64], about -1 … 1; differentiable."""
        out: Tensor = self.decoder(quantised.to(self.codebook))[:, 0]
        return out.float()

    @torch.no_grad()
    def encode(self, masks: Tensor) -> Tensor:
        """float[n, 64, 64] masks in [0, 1] -> int64[n, 16] codes, row-major on the 4 x 4 grid."""
        parts = [self.encode_features(part) for part in torch.split(masks, _CHUNK)] if len(masks) else []
        if not parts:
            return torch.zeros(0, N_SEG, dtype=torch.int64, device=self.codebook.device)
        flat_NC = torch.cat(parts).permute(0, 2, 3, 1).flatten(0, 2)
        return self._vq_vae.nearest(flat_NC).reshape(len(masks), N_SEG)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """int[n, 16] codes -> float32[n, 64, 64]; a pixel is foreground where the value is > 0.

        Raises:
            ShapeError: not 16 codes per mask, or a code outside 0 … n_codes - 1.
        """
        if codes.ndim != 2 or codes.shape[1] != N_SEG:
            raise ShapeError(f"codes have shape {tuple(codes.shape)}: expected [n, {N_SEG}].")
        if not len(codes):
            return torch.zeros(0, MASK_SIDE, MASK_SIDE, device=self.codebook.device)
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.n_codes:
            raise ShapeError(f"mask codes span {low}…{high}: expected 0…{self.n_codes - 1}, the size of this codebook.")
        codes = codes.to(self.codebook.device, torch.int64)
        grids = (self.codebook[part].reshape(-1, 4, 4, self.codebook.shape[1]) for part in torch.split(codes, _CHUNK))
        return torch.cat([self.decode_features(grid.permute(0, 3, 1, 2)) for grid in grids])

    def decode_array(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """`decode` on numpy arrays: the `mask_decoder` that `paligemma.tasks` takes."""
        out: NDArray[np.float32] = self.decode(torch.from_numpy(np.asarray(codes, np.int64))).cpu().numpy()
        return out

    def encode_array(self, masks: NDArray[np.float32]) -> NDArray[np.int64]:
        """`encode` on numpy arrays: the `mask_encoder` that `paligemma.tasks` takes."""
        tensor = torch.from_numpy(np.asarray(masks, np.float32))
        out: NDArray[np.int64] = self.encode(tensor).cpu().numpy()
        return out

    @classmethod
    def from_npz(cls, source: str | Path | BinaryIO) -> "MaskVae":
        """Read a mask auto-encoder in the layout of `vae-oid.npz`, as float32, in evaluation mode.

        Raises:
            CheckpointError: not such a file, truncated, a tensor missing, unknown, misshapen, NaN or infinite.
            PickleRefused: a pickle; it is not opened.
        """
        arrays = _read_npz(source)
        where = _name(source)
        try:
            model = cls(shapes={name: array.shape for name, array in arrays.items()})
        except ShapeError as e:
            raise CheckpointError(f"{where} is no mask auto-encoder: {e}") from e
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise CheckpointError(
                    f"{where}: tensor {name} holds NaN or infinite values: expected finite ones. Fetch it anew."
                )
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return model.eval()

    def to_npz(self, path: str | Path, dtype: Literal["float32", "float16"] = "float32") -> None:
        """Write the layout of `vae-oid.npz`; nothing half-written ever stands under the final name.

        Raises:
            CheckpointError: no space, or a folder that does not exist or cannot be written.
        """
        path = Path(path)
        arrays = {
            name: tensor.detach().float().cpu().numpy().astype(dtype) for name, tensor in self.state_dict().items()
        }
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                np.savez(file, **arrays)
            os.replace(part, path)
        except OSError as e:
            raise CheckpointError(
                f"{path} cannot be written ({e.strerror or e}): expected a folder with space in it."
            ) from e
        finally:
            part.unlink(missing_ok=True)


def _name(source: str | Path | BinaryIO) -> str:
    return str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "the file"))


def _read_npz(source: str | Path | BinaryIO) -> dict[str, NDArray[np.float32]]:
    where = _name(source)
    expected = "expected a mask auto-encoder like big_vision's vae-oid.npz"
    try:
        data = Path(source).read_bytes() if isinstance(source, str | Path) else source.read()
    except FileNotFoundError as e:
        raise CheckpointError(f"{where} does not exist: {expected}. Check the path.") from e
    except OSError as e:
        raise CheckpointError(
            f"{where} cannot be read ({e.strerror}): {expected}. Check the path and its permissions."
        ) from e
    if not data.startswith(b"PK"):
        if data.startswith(b"\x80"):
            raise PickleRefused(
                f"{where} is a pickle, which can run code when it is read: {expected}. It was not opened."
            )
        raise CheckpointError(f"{where} is no npz file ({len(data)} bytes): {expected}. Fetch it anew.")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            raw = {name: np.asarray(file[name]) for name in file.files if name not in _IGNORED}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError) as e:
        raise CheckpointError(f"{where} is damaged ({e}): {expected}. Fetch it anew.") from e
    for name, array in raw.items():
        if array.dtype.kind != "f":
            raise CheckpointError(f"{where}: tensor {name} is {array.dtype}: expected float32 or float16.")
    return {name: array.astype(np.float32) for name, array in raw.items()}


def _tower(side: str, shapes: Shapes) -> nn.Sequential:
    """Layers 0 … last of one side; an index without tensors is a ReLU."""
    found = {int(name.split(".")[1]) for name in shapes if name.startswith(f"{side}.")}
    layers: list[nn.Module] = []
    for i in range(max(found) + 1):
        name = f"{side}.{i}"
        if f"{name}.weight" in shapes:
            layers.append(_conv(name, shapes))
        elif i in found:
            net = (_conv(f"{name}.net.{j}", shapes) if j % 2 == 0 else nn.ReLU() for j in range(5))
            layers.append(ResidualBlock(nn.Sequential(*net)))
        else:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _conv(name: str, shapes: Shapes) -> nn.Module:
    shape = shapes[f"{name}.weight"]
    kernel = shape[-1]
    if _is_transposed(name, shape):
        return nn.ConvTranspose2d(shape[0], shape[1], kernel, stride=2, padding=1)
    return nn.Conv2d(
        shape[1], shape[0], kernel, stride=2 if kernel == 4 else 1, padding=kernel // 2 if kernel < 4 else 1
    )


def _check_shapes(shapes: Shapes) -> None:
    """That the names are this architecture's and that each layer takes what the one before gives."""
    if len(shapes.get(_CODEBOOK, ())) != 2:
        raise ShapeError(f"tensor {_CODEBOOK} is missing or no matrix: expected [n_codes, code_dim] as in vae-oid.npz.")
    n_codes, code_dim = shapes[_CODEBOOK]
    n_residual = {
        side: len({n.split(".")[1] for n in shapes if n.startswith(f"{side}.") and ".net." in n}) for side in _SIDES
    }
    first = 2 + n_residual["decoder"]
    # The two sides need not mirror each other: only the decoder's widths are published as code.
    encoder = tuple(_width(shapes, f"encoder.{i}.weight", 0) for i in (0, 2, 4, 6))
    decoder = tuple(_width(shapes, f"decoder.{first + i}.weight", 1) for i in (6, 4, 2, 0))
    expected: dict[str, tuple[int, ...]] = {_CODEBOOK: (n_codes, code_dim)}
    expected |= _encoder_shapes(encoder, code_dim, n_residual["encoder"])
    expected |= _decoder_shapes(decoder, code_dim, n_residual["decoder"])
    missing, extra = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing or extra:
        what = f"{missing[0]} is missing" if missing else f"{extra[0]} is unknown"
        raise ShapeError(
            f"tensor {what} ({len(missing)} missing, {len(extra)} unknown): expected the names of vae-oid.npz."
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise ShapeError(f"tensor {name} has shape {tuple(shapes[name])}: expected {shape} beside its neighbours.")


def _width(shapes: Shapes, name: str, axis: int) -> int:
    if len(shapes.get(name, ())) != 4:
        raise ShapeError(f"tensor {name} is missing or no kernel: expected a 4-dimensional tensor as in vae-oid.npz.")
    return shapes[name][axis]
