"""Which format a path holds, judged by its content; pickles are recognised and never opened."""

import re
import shlex
import zipfile
from pathlib import Path
from typing import Literal

from paligemma.checkpoints.npz_io import pieces_of
from paligemma.errors import CheckpointError, PickleRefused

# Files of mask auto-encoders that lie beside weights: ours, and the name of the published one.
MASK_DECODERS = ("mask_vae.npz", "vae-oid.npz")
Format = Literal["hf", "npz", "adapter", "pickle"]

_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_ORBAX = ("_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA")
_FOREIGN = {b"GGUF": "GGUF (llama.cpp)", b"\x89HDF": "HDF5 (Keras)", b"\x93NUM": "a single numpy array"}


def split_subkey(path: str | Path) -> tuple[Path, str]:
    """ "file.npz:img" -> (file.npz, "img"); a path that exists as it stands is left alone."""
    found = re.fullmatch(r"(.+\.npz(?:\.part[^.:/\\]*)?):([^:\\]+)", str(path))
    if found and not Path(path).exists():
        return Path(found[1]), found[2]
    return Path(path), ""


def identify(path: str | Path) -> Format:
    """Tell the format of a checkpoint file or folder by its content, not by its name.

    Returns:
        "hf" for a Hugging Face folder or a safetensors file, "npz" for a big_vision archive (whole or in pieces),
        "adapter" for a PEFT LoRA folder, "pickle" for torch pickles, which nothing here opens.

    Raises:
        CheckpointError: nothing there, or nothing that can be recognised.
    """
    file, _ = split_subkey(path)
    if file.is_dir():
        return _identify_folder(file)
    if pieces_of(file):
        return "npz"
    if not file.exists():
        raise CheckpointError(f"{file}: no such file or folder: expected a checkpoint. Check the path.")
    return _identify_file(file)


def _identify_folder(folder: Path) -> Format:
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names and "config.json" not in names:
        return "adapter"
    if any(
        name.endswith((".safetensors", ".safetensors.index.json")) and not name.startswith("adapter_") for name in names
    ):
        return "hf"
    archives = npz_in(folder)
    if len(archives) == 1:
        return "npz"
    if len(archives) > 1:
        raise CheckpointError(f"{folder}: holds {len(archives)} .npz archives: expected one. Name the one you mean.")
    if any(name.endswith(_PICKLE_SUFFIXES) for name in names):
        return "pickle"
    refuse_tensorstore(folder)
    raise CheckpointError(
        f"{folder}: no weights inside: expected model.safetensors, its shards, or one .npz. Check the path."
    )


def npz_in(folder: Path) -> list[Path]:
    """The archives of a folder; a split one counts once, a mask decoder beside the weights not at all."""
    whole = {
        re.sub(r"\.part[^.]*$", "", p.name) for p in folder.iterdir() if re.search(r"\.npz(\.part[^.]*)?$", p.name)
    } - set(MASK_DECODERS)
    return [folder / name for name in sorted(whole)]


def _identify_file(path: Path) -> Format:
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise CheckpointError(f"{path}: the file is empty: expected weights. Download it again.")
    if head[:4] == b"PK\x03\x04":
        return "pickle" if _is_torch_zip(path) else "npz"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "pickle"
    if head[8:9] == b"{":
        return "hf"
    if head[:4] in _FOREIGN:
        raise CheckpointError(f"{path}: {_FOREIGN[head[:4]]}: expected safetensors or .npz. Convert it first.")
    if path.suffix in _PICKLE_SUFFIXES:
        return "pickle"
    raise CheckpointError(
        f"{path}: not a checkpoint this package knows: expected safetensors or .npz, found bytes {head[:4].hex(' ')}. "
        "If it was downloaded, look whether it is a web page or a Git LFS pointer."
    )


def _is_torch_zip(path: Path) -> bool:
    # Only the directory of the archive is read. A truncated one has none: judge by the name then.
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return path.suffix in _PICKLE_SUFFIXES


def refuse_pickle(path: Path) -> PickleRefused:
    """The refusal of a pickle, with the command that converts it."""
    if path.is_dir():
        command = (
            'python -c "import sys; from transformers import PaliGemmaForConditionalGeneration as M; '
            'M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])" '
            f"{shlex.quote(str(path))} {shlex.quote(f'{path}-safetensors')}"
        )
    else:
        target = path.with_suffix(".safetensors")
        command = (
            'python -c "import sys, torch; from safetensors.torch import save_file; '
            "s = torch.load(sys.argv[1], map_location='cpu', weights_only=True); s = s.get('model_state_dict', s); "
            'save_file({k: v.clone().contiguous() for k, v in s.items() if not v.is_complex()}, sys.argv[2])" '
            f"{shlex.quote(str(path))} {shlex.quote(str(target))}"
        )
    return PickleRefused(
        f"{path}: a pickle, which can run code when opened: expected safetensors or .npz. It was not opened; if you "
        f"trust its source, convert it: {command}"
    )


def refuse_pickled_part(path: Path) -> PickleRefused:
    """The refusal of a pickled raw Gemma or SigLIP, with the command that converts it: a file, or a folder of them."""
    if not path.is_dir():
        return refuse_pickle(path)
    files = sorted(file for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    index = path / "pytorch_model.bin.index.json"
    known = (path / "pytorch_model.bin").is_file() or index.is_file()  # the names that transformers looks for
    is_plain = known and not (index.is_file() and "qkv_proj" in index.read_text(encoding="utf-8", errors="replace"))
    is_plain = is_plain and (path / "config.json").is_file()
    if len(files) == 1 and not is_plain:
        return refuse_pickle(files[0])
    if is_plain:
        target = f"{path}-safetensors"
        code = (
            "import sys; from transformers import AutoModel as M; "
            "M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
        )
    else:  # the shards of gemma_pytorch, which transformers does not know
        target = f"{path}.safetensors"
        code = (
            "import sys, pathlib, torch; from safetensors.torch import save_file; s = {}; "
            f"[s.update(torch.load(f, map_location='cpu', weights_only=True)) for f in "
            f"sorted(pathlib.Path(sys.argv[1]).glob('*{files[0].suffix}'))]; "
            "save_file({k: v.clone().contiguous() for k, v in s.items() if not v.is_complex()}, sys.argv[2])"
        )
    return PickleRefused(
        f"{path}: holds pickles, which can run code when opened: expected safetensors or .npz. None was opened; if you "
        f'trust their source, convert them: python -c "{code}" {shlex.quote(str(path))} {shlex.quote(target)}'
    )


def refuse_tensorstore(folder: Path) -> None:
    """Refuse a folder of array chunks (Gemma's Flax weights, big_vision's trainer), with the command that converts it.

    Raises:
        CheckpointError: it is one, or holds one.
    """
    inside = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    old = next((p for p in inside if p.name.startswith("checkpoint.bv") or any(p.glob("params~*"))), None)
    if old is not None:
        what = "a tensorstore checkpoint of big_vision"
        code = (
            "import sys, numpy as np, big_vision.utils as u; np.savez(sys.argv[2], **{n: np.asarray(v, np.float32) "
            "for n, v in u.tree_flatten_with_names(u.tsload(sys.argv[1]))[0]})"
        )
    else:
        old = next((p for p in inside if any((p / name).exists() for name in _ORBAX)), None)
        what = "an Orbax (tensorstore) checkpoint"
        code = (
            "import sys, os, jax, numpy as np, orbax.checkpoint as o; "
            "t = o.PyTreeCheckpointer().restore(os.path.abspath(sys.argv[1])); "
            "np.savez(sys.argv[2], **{'/'.join(str(k.key) for k in p): np.asarray(v, np.float32) "
            "for p, v in jax.tree_util.tree_flatten_with_path(t)[0]})"
        )
    if old is None:
        return
    raise CheckpointError(
        f"{old}: {what}: expected .npz or safetensors. Convert it where its own package is installed: "
        f'python -c "{code}" {shlex.quote(str(old))} {shlex.quote(f"{old}.npz")}'
    )
