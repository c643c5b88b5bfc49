"""load(): from a name, a folder or a file to a `PaliGemma` that can be asked.

The model is built on the meta device, where it takes no memory, and each tensor goes from the file to its final place
and dtype on its own: the peak is the weights as they will be, plus one tensor.
"""

import dataclasses
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from paligemma.api.adapters import open_adapter
from paligemma.api.model import PaliGemma
from paligemma.checkpoints import merge, open_checkpoint, resolve
from paligemma.checkpoints.identify import MASK_DECODERS, split_subkey
from paligemma.checkpoints.state import State
from paligemma.config import PaliGemmaConfig, ProcessingConfig
from paligemma.errors import CheckpointError, OptionError, TokenizerError, nearest
from paligemma.models.lora import DECODER, check_name
from paligemma.models.mask_vae import MaskVae
from paligemma.models.nf4 import bitsandbytes, pack_linear
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.presets import EMBEDDED
from paligemma.processing.image import MAX_PIXELS
from paligemma.processing.processor import Processor
from paligemma.processing.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZE = {"nf4": DECODER}  # kind -> whose weights: attention and MLP of the decoder
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "paligemma_tokenizer.model", "gemma_tokenizer.model")

# Every choice on which the references disagree, by the part of the configuration that holds it.
PROCESSING_CHOICES = tuple(f.name for f in dataclasses.fields(ProcessingConfig))
TEXT_CHOICES = ("attn_logits_softcap", "final_logits_softcap", "sliding_window", "final_cap", "embed_scale")
CHOICES = (*PROCESSING_CHOICES, *TEXT_CHOICES, "beams")


def load(
    name: str | Path = "tiny",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    mask_vae: str | Path | None = None,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    resolution: int | None = None,
    check: bool = False,
    strict: bool = True,
    max_pixels: int | None = MAX_PIXELS,
    progress: bool = False,
    **choices: Any,
) -> PaliGemma:
    """Load a model with its tokenizer and mask decoder.

    Args:
        name: "tiny" or "tiny-hi" (embedded), a hub id such as "google/paligemma2-3b-mix-224", its short form
            "paligemma2-3b-mix-224", a local folder, or an `.npz` file.
        device: "auto" (the first CUDA device, else the CPU), "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto" (bfloat16 on CUDA, float32 elsewhere), "float32", "bfloat16", "float16".
        quantize: "nf4" packs attention and MLP of the decoder into 4 bits a value while they are read (bitsandbytes,
            the extra `qlora`); adapters can be trained and loaded over them. None leaves every weight in `dtype`.
        revision: branch, tag or commit of a hub repository.
        tokenizer: `tokenizer.model` or `tokenizer.json`, when it is not beside the weights.
        mask_vae: mask decoder `.npz`, when it is not beside the weights; only `segment` needs one.
        adapter: LoRA folder as PEFT writes it, merged into the weights while they are read.
        adapters: name -> LoRA folder, loaded beside the weights; every call chooses one by `adapter=name`.
        resolution: side in pixels of the square that the model shall see; None: as the checkpoint was made. Position
            embeddings are resampled, as between the stages of pre-training; answers suffer until it is taught further.
        check: refuse weights that hold NaN or Inf.
        strict: refuse tensors that no part of the model uses, and adapters of other published weights; False warns.
        max_pixels: largest picture that the model will open, against decompression bombs; None for any.
        progress: draw a bar on stderr when it takes more than two seconds.
        choices: fields on which the references disagree, by name, instead of what the checkpoint's own files say:
            resize, alpha, exif_orientation, separator, special_tokens, mask_edges (`ProcessingConfig`);
            attn_logits_softcap, final_logits_softcap, sliding_window, final_cap, embed_scale (`TextConfig`); beams
            (`PaliGemmaConfig`).

    Raises:
        OptionError: a name, device, dtype, kind of quantisation or choice that does not exist.
        MissingExtra: quantize="nf4" without bitsandbytes.
        CheckpointError: weights that cannot be read or trusted; HubError for a repository that cannot be reached.
        TokenizerError: no tokenizer, or one of another vocabulary.
    """
    if quantize is not None and quantize not in QUANTIZE:
        raise OptionError(
            f"quantize={quantize!r}: expected None or {', '.join(QUANTIZE)}.{nearest(str(quantize), QUANTIZE)}"
        )
    if quantize is not None:
        bitsandbytes(f"quantize='{quantize}'")  # missing: said now, not after gigabytes were fetched
    for named in adapters or {}:
        check_name(named)
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    path = find(name, revision)
    with open_checkpoint(path, strict=strict, resolution=resolution) as checkpoint:
        config = with_choices(checkpoint.config, **choices)
        if not config.name:
            config = dataclasses.replace(config, name=str(name))
        words = find_tokenizer(path, tokenizer, config)
        masks = find_mask_vae(path, mask_vae)
        state: State = checkpoint
        if adapter is not None:
            state = merge(checkpoint, open_adapter(adapter, config, strict=strict))
        beside = {named: open_adapter(folder, config, strict=strict) for named, folder in (adapters or {}).items()}
        model = PaliGemmaModel(config, device="meta", dtype=kind)
        packed = QUANTIZE[quantize] if quantize is not None else None
        fill(model, state, where, check=check, progress=progress, packed=packed)
    pg = PaliGemma(
        model.eval(), Processor(config, words, max_pixels=max_pixels), None if masks is None else masks.to(where)
    )
    for named, read in beside.items():
        pg.add_adapter(named, read)
    return pg


def with_choices(config: PaliGemmaConfig, **choices: Any) -> PaliGemmaConfig:
    """A configuration with some choices made otherwise; what the weights fix cannot be chosen.

    Raises:
        OptionError: a name that is no choice.
        ConfigError: a value that the choice does not have.
    """
    for choice in choices:
        if choice not in CHOICES:
            fixed = {f.name for part in (config.vision, config.text, config.tokens) for f in dataclasses.fields(part)}
            why = "is fixed by the weights" if choice in fixed else "is not a choice"
            raise OptionError(f"{choice} {why}: expected one of {', '.join(CHOICES)}.{nearest(choice, CHOICES)}")
    processing = {k: v for k, v in choices.items() if k in PROCESSING_CHOICES}
    text = {k: v for k, v in choices.items() if k in TEXT_CHOICES}
    top = {k: v for k, v in choices.items() if k == "beams"}
    return dataclasses.replace(
        config,
        processing=dataclasses.replace(config.processing, **processing),
        text=dataclasses.replace(config.text, **text),
        **top,
    )


def pick_device(device: str | torch.device) -> torch.device:
    """The device a name means, once it is known to exist."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise OptionError(f"device={str(device)!r} is not a device: expected auto, cpu, cuda, cuda:1 or mps.") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device='{place}': this machine or this build of torch has no CUDA. Take device='cpu'.")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"device='{place}': expected an index below {torch.cuda.device_count()}, the number of CUDA devices."
        )
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError("device='mps': this machine or this build of torch has no Metal device. Take device='cpu'.")
    return place


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype a name means; "auto" is bfloat16 on CUDA, as the weights are published, and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise OptionError(f"dtype={name!r}: expected auto, {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def find(name: str | Path, revision: str | None = None) -> Path:
    """The local folder or file behind a name; a hub repository is fetched into the cache first.

    "tiny" and "tiny-hi" are always the embedded models; a folder of that name is "./tiny".

    Raises:
        HubError: a repository that cannot be had, or a name that is neither a path nor a model.
        CheckpointError: a path that does not exist.
    """
    if str(name) not in EMBEDDED:
        return resolve(name, revision)
    if revision is not None:
        raise OptionError(f"revision={revision!r} for an embedded model: only hub ids have one. Leave it out.")
    path = Path(str(files("paligemma") / "assets" / str(name)))
    if not path.is_dir():
        raise CheckpointError(f"the embedded model '{name}' is missing: expected {path}. Install the package again.")
    return path


def fill(
    model: PaliGemmaModel,
    state: State,
    device: torch.device,
    *,
    check: bool = False,
    progress: bool = False,
    packed: str | None = None,
) -> PaliGemmaModel:
    """Put tensors into a model on the meta device, one after the other; none is read before the last is in place.

    Args:
        packed: pattern of the linear layers whose weights become NF4 as they arrive.

    Raises:
        CheckpointError: with `check`, a tensor that holds NaN or Inf.
    """
    dtype = model.projector.weight.dtype
    with tqdm(
        total=state.n_bytes, unit="B", unit_scale=True, desc="loading", delay=2, leave=False, disable=not progress
    ) as bar:
        for name, tensor in state.stream(dtype, check=check, progress=bar.update):
            module, _, leaf = name.rpartition(".")
            if packed is not None and leaf == "weight" and re.fullmatch(packed, module):
                pack_linear(model, module, tensor.to(device))
            else:
                setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(device)))
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not unfilled, f"the checkpoint reader left {unfilled[:3]} unfilled"
    return model


def find_tokenizer(path: Path, given: str | Path | None, config: PaliGemmaConfig) -> Tokenizer:
    """The tokenizer that was given, or the one beside the weights.

    Raises:
        TokenizerError: there is none, or its vocabulary is not the model's.
    """
    if given is not None:
        file = Path(given).expanduser()
        file = next((file / name for name in TOKENIZERS if (file / name).is_file()), file) if file.is_dir() else file
        if not file.is_file():
            raise TokenizerError(
                f"no tokenizer at {given}: expected tokenizer.model or tokenizer.json. Check the path."
            )
        return Tokenizer.from_file(file, config.tokens)
    folder = _folder_of(path)
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return Tokenizer.from_file(folder / name, config.tokens)
    raise TokenizerError(
        f"no tokenizer beside the weights in {folder}: expected {' or '.join(TOKENIZERS[:2])}. Copy it there, or give "
        "tokenizer=FILE (--tokenizer FILE). Every PaliGemma repository on the hub holds the same one."
    )


def find_mask_vae(path: Path, given: str | Path | None) -> MaskVae | None:
    """The mask decoder that was given, or the one beside the weights; None where there is none."""
    if given is not None:
        return MaskVae.from_npz(Path(given).expanduser())
    for name in MASK_DECODERS:
        if (_folder_of(path) / name).is_file():
            return MaskVae.from_npz(_folder_of(path) / name)
    return None


def _folder_of(path: Path) -> Path:
    file, _ = split_subkey(path)
    return file if file.is_dir() else file.parent
