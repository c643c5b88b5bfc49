"""What the studies on the `study` preset share: its stage 0, pictures drawn once, short runs, and the metric.

stage 0   a small SigLIP and a small Gemma of their own, put together: made once, kept in the work folder
stage 1   a few hundred steps of questions about drawn pictures, every arm from the same stage 0
judge     3,000 fixed questions about other pictures: which true answers would greedy decoding give?
"""

# B rows · S slots of a row · N target tokens · V table rows

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

import paligemma
from helpers.pictures import LOC_STEP, N_QUESTIONS, Pool, Rows, Sizes
from paligemma.api import PaliGemma
from paligemma.checkpoints import assemble, write
from paligemma.checkpoints.rules import TABLE
from paligemma.config import PaliGemmaConfig
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.models.mask_vae import MaskVae
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.presets import STUDY
from paligemma.processing.batch import Batch
from paligemma.recipes.tiny.loop import LessonOptions
from paligemma.recipes.tiny.patches import place_rows
from paligemma.recipes.tiny.vision import PairOptions, train_vision
from paligemma.recipes.tiny.words import WordOptions, train_words
from paligemma.train.coordinates import coordinate_loss
from paligemma.train.loop import FitOptions, default_loss, fit
from paligemma.train.loss import LossSums
from paligemma.train.optim import Optimizer, OptimOptions
from paligemma.train.schedule import Duration, Schedule
from paligemma.train.state import TrainState

SIGMA = 6.0  # width in bins of the curve by which places are learned, as for `tiny`
STAGE1_LR = 1.5e-3  # of `tiny`
Form = Literal["prefix-LM", "causal on the text", "causal everywhere"]
FORMS: tuple[Form, ...] = ("prefix-LM", "causal on the text", "causal everywhere")


# Stage 0.

KEPT = Path(__file__).resolve().parents[1] / "weights" / "parts"  # the raw parts of the pages in docs/studies


def parts(work: Path, sizes: Sizes, device: torch.device, config: PaliGemmaConfig = STUDY) -> tuple[Path, Path]:
    """Folders of the raw SigLIP and the raw Gemma; taught where they are not there yet and none are kept."""
    home = work / "parts"
    home.mkdir(parents=True, exist_ok=True)
    assets = Path(str(files("paligemma") / "assets" / "tiny"))
    if not (home / "tokenizer.model").exists():
        shutil.copy(assets / "tokenizer.model", home / "tokenizer.model")
        MaskVae.from_npz(assets / "mask_vae.npz").to_npz(home / "mask_vae.npz")
    if sizes.is_whole_stage0:
        for name in ("siglip", "gemma"):
            if (KEPT / name).exists() and not (home / name).exists():
                shutil.copytree(KEPT / name, home / name)
    if not (home / "siglip").exists():
        lesson = LessonOptions(steps=sizes.vision_steps, workers=sizes.workers)
        train_vision(STUDY, home, lesson, PairOptions(n_images=sizes.vision_images, plain_share=1.0), device)
    words = home if config.text == STUDY.text else home / f"words-{config.text.width}"
    if not (words / "gemma").exists():
        words.mkdir(exist_ok=True)
        if words != home:
            shutil.copy(home / "tokenizer.model", words / "tokenizer.model")
        train_words(config, words, LessonOptions(steps=sizes.word_steps), WordOptions(n_lines=sizes.word_lines), device)
    return home / "siglip", words / "gemma"


def stage0_print(work: Path, sizes: Sizes, device: torch.device) -> str:
    """Which stage 0 the runs of a work folder begin with, as one short word: the bits of its SigLIP and its Gemma."""
    digest = hashlib.sha256()
    for part in parts(work, sizes, device):
        for file in sorted(part.glob("*.safetensors")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def stage0(
    work: Path, sizes: Sizes, device: torch.device, *, config: PaliGemmaConfig = STUDY, init: str = "waves"
) -> Path:
    """The folder of a model that has learned nothing together yet.

    Args:
        init: of the rows of new tokens: "waves" as for `tiny` (location rows are waves of the coordinate), or what
            `checkpoints.assemble` knows.
    """
    side = config.vision.resolution
    out = work / f"stage0-{config.text.width}-{side}-{init}"
    if (out / "config.json").exists():
        return out
    vision, text = parts(work, sizes, device, config)
    _, joined = assemble(vision, text, resolution=side, init="normal" if init == "waves" else init)
    with joined:
        tensors = {name: joined.get_as(name, torch.float32) for name in joined}
    if init == "waves":
        table, first = tensors[TABLE], config.tokens.loc_start
        norm = table[:first].norm(dim=1).mean()
        table[first : first + config.tokens.n_loc] = place_rows(config.tokens.n_loc, config.text.width) * norm
    save(out, config, tensors, work)
    return out


def save(out: Path, config: PaliGemmaConfig, tensors: Any, work: Path) -> None:
    """A model's folder, tokenizer beside."""
    kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    write(out, config, kept, beside=[work / "parts" / "tokenizer.model", work / "parts" / "mask_vae.npz"])


# Learning.


def masked(batch: Batch, form: Form) -> Batch:
    """The same rows with another rule of who may see whom: `mask_ar` is 1 where a token is hidden from those before."""
    if form == "prefix-LM":
        return batch
    causal = batch.mask_input & ~batch.mask_image if form == "causal on the text" else batch.mask_input
    return dataclasses.replace(batch, mask_ar=causal.long())


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to learn.

    Attributes:
        form: of the mask, in training and when judged.
        frozen: components that do not learn.
        change: what is done to the model before.
        of_batch: what is done to every batch of training after the mask.
        kind, lr: of the optimiser.
        cosine: the course of transfers, in place of stage 1's (constant, falling at the end).
    """

    form: Form = "prefix-LM"
    frozen: tuple[str, ...] = ()
    change: Callable[[PaliGemmaModel, int], None] | None = None
    of_batch: Callable[[Batch], Batch] | None = None
    kind: Literal["adam", "muon"] = "muon"
    lr: float = STAGE1_LR
    cosine: bool = False
    label_smoothing: float = 0.0
    dropout: float = 0.0


def opened(folder: Path, device: torch.device) -> PaliGemma:
    """A model of the studies with all its weights ready to learn."""
    pg = paligemma.load(folder, device=str(device), dtype="float32")
    pg.model.requires_grad_(True)
    return pg


def learn(
    pg: PaliGemma, rows: Rows, arm: Arm, *, steps: int, batch_size: int, seed: int, shuffle: bool = False
) -> float:
    """Teach a model in place; seconds that it took."""
    model = pg.model
    if arm.change is not None:
        arm.change(model, seed)
    if arm.cosine:
        schedule = Schedule(kind="cosine", warmup=Duration(percent=0.05))
    else:
        warmup = Duration(steps=max(1, min(50, steps // 5)))
        schedule = Schedule(kind="constant", warmup=warmup, cooldown=Duration(percent=0.35))
    frozen: tuple[tuple[str, Schedule | None], ...] = tuple((name, None) for name in arm.frozen)
    optim = OptimOptions(
        kind=arm.kind, lr=arm.lr, betas=(0.9, 0.98) if arm.kind == "muon" else (0.9, 0.999), schedule=schedule,
        schedules=frozen,
    )  # fmt: skip
    optimizer = Optimizer(model.named_parameters(), optim, total_steps=steps, batch_size=batch_size)
    loader = Loader(
        rows, pg.processor, LoaderOptions(batch_size=batch_size, shuffle=shuffle, arrange="pack", seed=seed)
    )  # fmt: skip
    options = FitOptions(
        steps=steps, save_minutes=None, seed=seed, dropout=arm.dropout, label_smoothing=arm.label_smoothing
    )  # fmt: skip
    of_tokens = coordinate_loss(model.config.tokens, sigma=SIGMA, step=LOC_STEP) if not arm.label_smoothing else None
    plain = default_loss(options, of_tokens)

    def loss(given: PaliGemmaModel, batch: Batch) -> LossSums:
        batch = masked(batch, arm.form)
        return plain(given, batch if arm.of_batch is None else arm.of_batch(batch))

    started = time.perf_counter()
    if not fit(TrainState(model, optimizer), loader, options, loss=loss).finished:
        raise SystemExit("stopped in the middle of a run, of which nothing is kept; the same command goes on")
    model.eval()
    return time.perf_counter() - started


def stage1(
    pg: PaliGemma, pool: Pool, arm: Arm, sizes: Sizes, *, seed: int, steps: int | None = None
) -> float:  # fmt: skip
    """Stage 1 in place; seconds. The seed gives the order of the pictures, and what a changed model draws."""
    steps = sizes.steps if steps is None else steps
    order = np.random.default_rng([seed, 92]).permutation(len(pool.rows))
    # A longer run than the pool begins it again, in the same order.
    rows = Rows(pool, np.resize(order, steps * sizes.n_images), N_QUESTIONS)
    return learn(pg, rows, arm, steps=steps, batch_size=sizes.n_images * N_QUESTIONS, seed=seed)


# The metric.


@dataclass(frozen=True)
class Exam:
    """Held-out questions laid out for a model: kinds of the rows of each batch, and the batch."""

    batches: tuple[tuple[tuple[str, ...], Batch], ...]


def exam_of(pool: Pool, pg: PaliGemma) -> Exam:
    """All questions of a pool for models of one resolution."""
    rows = [
        (pixels, kind, prefix, suffix)
        for pixels, asked in zip(pool.pixels, pool.rows, strict=True)
        for kind, prefix, suffix in asked
    ]
    rows.sort(key=lambda row: (row[1], len(row[3])))  # rows of one batch are alike in length
    made = []
    for start in range(0, len(rows), 50):
        images, kinds, prefixes, suffixes = zip(*rows[start : start + 50], strict=True)
        batch = pg.processor([[image] for image in images], list(prefixes), list(suffixes), padding_side="right")
        made.append((kinds, batch))
    return Exam(tuple(made))


@torch.no_grad()
def judge(pg: PaliGemma, exam: Exam, form: Form = "prefix-LM") -> dict[str, Any]:
    """What a model knows of the held-out questions.

    Every true answer is shown to the model up to each of its tokens. An answer is right where every token, the end
    included, is the likeliest one: exactly then greedy decoding gives the true answer, and nothing else.

    Returns:
        "exact": kind -> share of right answers; "score": their mean over kinds other than "detect"; "loss": plain
        cross-entropy a token, mean of those questions; "places": mean distance in 1/1024 of a side between a true
        place and the likeliest one (nan where nothing asks for places).
    """
    model, tokens = pg.model.eval(), pg.model.config.tokens
    device = model.projector.weight.device
    first, last = tokens.loc_start, tokens.loc_start + tokens.n_loc
    exact: dict[str, list[float]] = {}
    losses: list[float] = []
    misses: list[float] = []
    for kinds, batch in exam.batches:
        batch = masked(batch.to(device), form)
        keep = F.pad(batch.mask_loss[:, 1:], (0, 1))
        logits_NV = model(**batch.model_inputs(), keep=keep).float()
        targets, row = batch.tokens[:, 1:][batch.mask_loss[:, 1:]], keep.nonzero()[:, 0]
        wrong = torch.zeros(len(kinds), device=device).index_add_(0, row, (logits_NV.argmax(-1) != targets).float())
        cost = torch.zeros(len(kinds), device=device).index_add_(
            0, row, F.cross_entropy(logits_NV, targets, reduction="none")
        )
        cost /= torch.bincount(row, minlength=len(kinds))
        for kind, n_wrong, mean in zip(kinds, wrong.tolist(), cost.tolist(), strict=True):
            exact.setdefault(kind, []).append(float(n_wrong == 0))
            losses += [mean] if kind != "detect" else []
        is_place = (targets >= first) & (targets < last)
        said = logits_NV[is_place, first:last].argmax(-1)
        misses += (said - (targets[is_place] - first)).abs().tolist()
    shares = {kind: float(np.mean(values)) for kind, values in exact.items()}
    return {
        "exact": shares,
        "score": float(np.mean([share for kind, share in shares.items() if kind != "detect"])),
        "loss": float(np.mean(losses)),
        "places": float(np.mean(misses)) if misses else float("nan"),
    }


def print_of(model: PaliGemmaModel) -> str:
    """All weights, bit by bit, as one short word."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def n_parameters(model: PaliGemmaModel) -> int:
    return sum(p.numel() for p in model.parameters())
