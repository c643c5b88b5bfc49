"""One command that makes `tiny` again: python -m paligemma.recipes.tiny --work runs/tiny"""

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch

from paligemma.checkpoints import read
from paligemma.models.mask_vae import MaskVae
from paligemma.presets import TINY
from paligemma.recipes.tiny.codes import train_mask_vae
from paligemma.recipes.tiny.examples import ExampleOptions
from paligemma.recipes.tiny.export import export, write_card
from paligemma.recipes.tiny.train import TrainOptions, train
from paligemma.recipes.tiny.vocabulary import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paligemma.recipes.tiny.direct", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny"), help="state of the run; goes on where it stopped"
    )
    parser.add_argument("--out", type=Path, help="folder for the finished model (default: WORK/tiny)")
    parser.add_argument("--steps", type=int, default=TrainOptions.steps)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after this long, state saved")
    parser.add_argument("--images", type=int, default=ExampleOptions.n_images, help="pictures per step")
    parser.add_argument("--workers", type=int, default=TrainOptions.workers, help="processes that draw pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="a fifth faster; needs a C++ compiler")
    parser.add_argument("--start-from", type=Path, help="folder of an earlier tiny whose weights to teach further")
    parser.add_argument(
        "--patch-steps", type=int, default=ExampleOptions.patch_steps, help="first steps, image tower only"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-only", action="store_true", help="write the weights as they are now")
    options = parser.parse_args()
    work, out = options.work, options.out or options.work / "tiny"
    if not options.export_only:
        if options.start_from is not None:
            _take_over(options.start_from, work)
        if not (work / "tokenizer.model").exists():
            train_tokenizer(work / "tokenizer.model", seed=options.seed)
        if not (work / "mask_vae.npz").exists():
            train_mask_vae(work / "mask_vae.npz", seed=options.seed)
        finished = train(
            TINY,
            work,
            TrainOptions(steps=options.steps, compile=options.compile, workers=options.workers, seed=options.seed),
            ExampleOptions(n_images=options.images, patch_steps=options.patch_steps, seed=options.seed),
            device=options.device,
            start_from=None if options.start_from is None else read(options.start_from, dtype=torch.float32)[1],
            minutes=options.minutes,
        )
        if not finished:
            print("stopped before the last step; the same command goes on")
            return
    export(TINY, work, out)
    print(f"wrote {out}; scoring")
    # Loaded late: scoring needs the whole package, training only its lower floors.
    from paligemma.api import load
    from paligemma.evals.tiny import evaluate

    report = evaluate(load(out))
    print(report.table())
    write_card(out, report, " ".join(["python -m paligemma.recipes.tiny.direct", *sys.argv[1:]]))


def _take_over(folder: Path, work: Path) -> None:
    """Tokens and mask codes mean what they meant to the earlier model: its tokenizer and codes are kept."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "tokenizer.model", work / "tokenizer.model")
    MaskVae.from_npz(folder / "mask_vae.npz").to_npz(work / "mask_vae.npz")


if __name__ == "__main__":
    main()
