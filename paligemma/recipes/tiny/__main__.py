"""One command that makes the embedded models again: python -m paligemma.recipes.tiny --work runs/tiny"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from paligemma.presets import TINY, TINY_HI
from paligemma.recipes.tiny.codes import train_mask_vae
from paligemma.recipes.tiny.loop import LessonOptions
from paligemma.recipes.tiny.vision import PairOptions, train_vision
from paligemma.recipes.tiny.vocabulary import train_tokenizer
from paligemma.recipes.tiny.words import WordOptions, train_words

LESSONS = ("vision", "words", "tiny", "tiny-hi")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paligemma.recipes.tiny", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny"), help="state of the run; goes on where it stopped"
    )
    parser.add_argument("--until", choices=LESSONS, default="tiny-hi", help="last lesson (default: tiny-hi)")
    parser.add_argument("--first", choices=LESSONS, help="first lesson (default: vision; with --start: tiny)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long, state saved")
    parser.add_argument("--vision-steps", type=int, default=1500, help="pictures with captions, 96 a step")
    parser.add_argument("--word-steps", type=int, default=1500, help="text alone, 64 rows a step")
    parser.add_argument("--steps", type=int, default=5000, help="of stage 1, 32 pictures with five questions each")
    parser.add_argument("--simple-steps", type=int, default=600, help="first of them that ask the simplest things only")
    parser.add_argument("--hi-steps", type=int, default=1500, help="of stage 2, at 224 pixels, 16 pictures a step")
    parser.add_argument("--lr", type=float, help="of stages 1 and 2 (default: 1.5e-3 and 7e-4)")
    parser.add_argument("--warmup", type=int, help="steps of stages 1 and 2 over which it grows (default: 100)")
    parser.add_argument("--cooldown", type=float, help="share of stages 1 and 2 over which it falls (default: 0.35)")
    parser.add_argument("--start", type=Path, help="a model to teach further, in place of what stage 0 would make")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="a fifth faster; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work: Path = options.work
    ends = time.monotonic() + 60 * options.minutes
    options.first = options.first or ("vision" if options.start is None else "tiny")
    if options.start is not None and options.first not in ("tiny", "tiny-hi"):
        raise SystemExit(f"--start with --first {options.first}: a model is there already: expected tiny or tiny-hi.")
    if options.start is not None:
        _take_over(options.start, work)
    if not (work / "tokenizer.model").exists():
        train_tokenizer(work / "tokenizer.model", seed=options.seed)
    if not (work / "mask_vae.npz").exists():
        train_mask_vae(work / "mask_vae.npz", seed=options.seed)
    for lesson in LESSONS[LESSONS.index(options.first) : LESSONS.index(options.until) + 1]:
        if not _taught(lesson, work, options, (ends - time.monotonic()) / 60):
            print("stopped before the end; the same command goes on")
            return
    print(f"done: {work}")


def _take_over(folder: Path, work: Path) -> None:
    """Tokens and mask codes mean what they meant to the earlier model: its tokenizer and codes are kept."""
    if not (folder / "config.json").is_file():
        raise SystemExit(f"--start {folder}: no config.json there: expected the folder of a model of this recipe.")
    work.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "mask_vae.npz"):
        shutil.copy(folder / name, work / name)


def _taught(lesson: str, work: Path, options: argparse.Namespace, minutes: float) -> bool:
    """Teach one lesson, or go on with it; whether it is over."""
    device = torch.device(options.device)
    if lesson == "vision":
        lesson_options = LessonOptions(
            steps=options.vision_steps, minutes=minutes, workers=options.workers, seed=options.seed
        )
        return (work / "siglip").exists() or train_vision(
            TINY, work, lesson_options, PairOptions(seed=options.seed), device
        )
    if lesson == "words":
        lesson_options = LessonOptions(steps=options.word_steps, minutes=minutes, workers=0, seed=options.seed)
        return (work / "gemma").exists() or train_words(
            TINY, work, lesson_options, WordOptions(seed=options.seed), device
        )
    from paligemma.recipes.tiny.export import export, history_of, lesson_of  # these load the whole package
    from paligemma.recipes.tiny.stages import TinyOptions, stage0, teach

    limit = None if minutes == float("inf") else minutes
    given: dict[str, Any] = {"workers": options.workers, "compile": options.compile}
    said = {"lr": options.lr, "warmup_steps": options.warmup, "cooldown": options.cooldown}
    given |= {name: value for name, value in said.items() if value is not None}
    if lesson == "tiny":
        first = TinyOptions(steps=options.steps, simple_steps=options.simple_steps, seed=options.seed, **given)
        base, run, config = options.start or stage0(work, seed=options.seed), work / "stage1", TINY
        before = history_of(options.start) if options.start is not None else _unimodal(options)
        result = teach("stage1", base, run, TINY.vision.resolution, first, device=options.device, minutes=limit)
    else:
        given = {"lr": 7e-4, **given}
        second = TinyOptions(steps=options.hi_steps, n_images=16, loc_step=4, seed=options.seed + 1, **given)
        own = options.start is not None and options.first == "tiny-hi"
        base, run, config = options.start if own else work / "stage1" / "model", work / "stage2", TINY_HI
        before = history_of(options.start if own else work / "tiny")
        result = teach("stage2_448", base, run, TINY_HI.vision.resolution, second, device=options.device, minutes=limit)
    if result.finished and not (work / lesson / "README.md").exists():
        stage = "stage 1" if lesson == "tiny" else "stage 2"
        export(config, run / "model", work / lesson, [*before, lesson_of(stage, run)])
        _score(work / lesson, lesson)
    return result.finished


def _unimodal(options: argparse.Namespace) -> list[dict[str, object]]:
    """The lessons of stage 0, as `export` tells them."""
    return [
        {
            "lesson": "stage 0, pictures with captions",
            "steps": options.vision_steps,
            "resolution": TINY.vision.resolution,
            "seed": options.seed,
        },
        {"lesson": "stage 0, text alone", "steps": options.word_steps, "seed": options.seed},
    ]


def _score(folder: Path, name: str) -> None:
    from paligemma.api import load
    from paligemma.evals.tiny import evaluate
    from paligemma.recipes.tiny.export import write_card

    print(f"wrote {folder}; scoring")
    report = evaluate(load(folder))
    print(report.table())
    write_card(folder, report, name)


if __name__ == "__main__":
    main()
