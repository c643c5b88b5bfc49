"""`paligemma checkpoint`

paligemma checkpoint info paligemma2-3b-mix-448
paligemma checkpoint convert paligemma2-3b-pt-224.b16.npz ./pt-224 --tokenizer tokenizer.model
paligemma checkpoint convert ./pt-224 pt-448.npz --resolution 448 --dtype bfloat16
paligemma checkpoint merge paligemma2-3b-pt-448 ./my-adapter ./my-model
paligemma checkpoint verify ./my-model
paligemma checkpoint assemble --vision google/siglip-so400m-patch14-224 --text google/gemma-2-2b --out ./stage0
paligemma checkpoint push runs/digits me/digits --create --private
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma.cli.args import add_output_options
from paligemma.cli.run import PATIENCE_S, note, table

if TYPE_CHECKING:
    from paligemma.checkpoints import Checkpoint
    from paligemma.config import Resize

ACTIONS = {
    "info": "what a checkpoint holds",
    "convert": "write it in another format, layout, dtype or resolution",
    "merge": "merge a LoRA adapter into its base model",
    "verify": "read it from end to end: structure, checksums, NaN and Inf",
    "assemble": "stage 0: a raw SigLIP and a raw Gemma become one model",
    "push": "send a result folder with its card to the hub",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    parsers = {name: actions.add_parser(name, help=text, description=text) for name, text in ACTIONS.items()}
    _add_push_arguments(parsers["push"])
    _add_assemble_arguments(parsers["assemble"])
    for name, sub in parsers.items():
        if name in ("push", "assemble"):
            continue
        place = "BASE" if name == "merge" else "PATH"
        sub.add_argument("path", metavar=place, help="folder, .npz file, hub id or short name")
        sub.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub repository")
        sub.add_argument("--no-strict", action="store_true", help="drop tensors that no part of the model uses")
        add_output_options(sub)
    parsers["merge"].add_argument("adapter", metavar="ADAPTER", help="LoRA folder as PEFT writes it, or its hub id")
    for sub in (parsers["convert"], parsers["merge"]):
        sub.add_argument("out", metavar="OUT", help="folder, or a file ending in .npz")
        sub.add_argument("--to", choices=("hf", "npz"), help="format (default: by the name of OUT)")
        sub.add_argument("--layout", default="A", choices=tuple("ABCD"), help="tensor names of a folder (default: A)")
        sub.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16 (default: as it is)")
        sub.add_argument("--resolution", type=int, metavar="R", help="resample the position embeddings, e.g. 448")
        sub.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default: 5)")
        sub.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model or tokenizer.json to put into the folder")
        sub.add_argument("--overwrite", action="store_true", help="replace what stands at OUT")


def _add_assemble_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--vision", required=True, metavar="SIGLIP", help="image tower: folder, file, hub id")
    sub.add_argument("--text", required=True, metavar="GEMMA", help="decoder: folder, file, hub id")
    sub.add_argument("--out", required=True, metavar="OUT", help="folder, or a file ending in .npz")
    sub.add_argument("--format", choices=("hf", "npz"), help="default: by the name of OUT")
    sub.add_argument("--resolution", type=int, metavar="R", help="side of the pictures (default: 224, or the preset's)")
    sub.add_argument("--init", default="normal", metavar="HOW", help="new rows: normal, mean, zeros (default: normal)")
    sub.add_argument("--projector", default="zeros", metavar="HOW", help="zeros or normal (default: zeros)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    sub.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16 (default: as each part has it)")
    sub.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model or tokenizer.json not beside the text part")
    sub.add_argument("--preset", metavar="M", help="whole model whose sizes and choices the result has")
    sub.add_argument("--vision-preset", metavar="M", help="of the tower, where no config.json tells the heads")
    sub.add_argument("--text-preset", metavar="M", help="of the decoder, where no config.json tells the heads")
    sub.add_argument("--layout", default="A", choices=tuple("ABCD"), help="tensor names of a folder (default: A)")
    sub.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default: 5)")
    sub.add_argument("--no-strict", action="store_true", help="drop tensors that no part of the model uses")
    sub.add_argument("--overwrite", action="store_true", help="replace what stands at OUT")
    add_output_options(sub)


def _add_push_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", metavar="FOLDER", help="of a run, or with weights and README.md")
    sub.add_argument("repo", metavar="REPO", help="owner/name on the hub")
    sub.add_argument("--revision", metavar="B", help="branch (default: main)")
    sub.add_argument("--private", action="store_true", help="a new repository is private; a public one is refused")
    sub.add_argument("--message", metavar="TEXT", help="of the commit")
    sub.add_argument("--create", action="store_true", help="make the repository and the branch where there are none")
    sub.add_argument("--dry-run", action="store_true", help="check everything, list what would be sent, send nothing")
    add_output_options(sub)


def run(args: argparse.Namespace) -> int:
    actions = {"info": _info, "convert": _convert, "merge": _convert, "verify": _verify, "push": _push}
    actions["assemble"] = _assemble
    return actions[args.action](args)


def _locate(name: str, revision: str | None = None) -> Path:
    from importlib.resources import files

    from paligemma.checkpoints import resolve
    from paligemma.presets import EMBEDDED

    # Weights are looked at without building a model, so `paligemma.api` stays out of this.
    return Path(str(files("paligemma") / "assets" / name)) if name in EMBEDDED else resolve(name, revision)


def _info(args: argparse.Namespace) -> int:
    facts = describe(_locate(args.path, args.revision), strict=not args.no_strict)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    parts = facts.pop("parameters", None)
    print(table([[key, _text(value)] for key, value in facts.items()]))
    if parts:
        print("\n" + table([["parameters", ""], *([key, f"{n:,}"] for key, n in parts.items())], right=(1,)))
    return 0


def describe(path: Path, *, strict: bool = True) -> dict[str, Any]:
    """What a checkpoint or an adapter holds, as plain values; only headers are read."""
    from paligemma.checkpoints import identify, open_checkpoint

    if identify(path) == "adapter":
        return _describe_adapter(path)
    with open_checkpoint(path, strict=strict) as checkpoint:
        return _describe(checkpoint)


def _describe_adapter(path: Path) -> dict[str, Any]:
    from paligemma.checkpoints.adapter_config import parse_adapter_config

    config = parse_adapter_config(path)
    targets = config.target_modules
    return {
        "path": str(path),
        "format": "PEFT adapter, DoRA" if config.use_dora else "PEFT adapter, LoRA",
        "base": config.base or "not stated",
        "rank, alpha": f"{config.r}, {config.alpha:g}{' (rank-stabilised)' if config.use_rslora else ''}",
        "modules": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        "trained in full": ", ".join(config.modules_to_save) or "nothing",
    }


def _describe(checkpoint: "Checkpoint") -> dict[str, Any]:
    from paligemma.checkpoints.big_vision import preset_name
    from paligemma.checkpoints.files import dtype_name

    config = checkpoint.config
    vision, text, processing = config.vision, config.text, config.processing
    dtypes = Counter(dtype_name(checkpoint.spec(name).dtype) for name in checkpoint)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    names = ("tokenizer.json", "tokenizer.model", "paligemma_tokenizer.model", "gemma_tokenizer.model")
    tokenizers = [name for name in names if (folder / name).is_file()]
    kind = f"Hugging Face, layout {checkpoint.layout}" if checkpoint.format == "hf" else "big_vision .npz"
    size = preset_name(config)
    return {
        "path": str(checkpoint.path),
        "format": kind,
        "model": f"PaliGemma{' 2' if text.post_norms else ''}{f', the size of {size}' if size else ''}",
        "name": config.name or "not stated",
        "resolution": f"{vision.resolution} px, {vision.n_image_tokens} image tokens",
        "dtype": ", ".join(f"{dtype} ({n} tensors)" if len(dtypes) > 1 else dtype for dtype, n in dtypes.items()),
        "size": f"{checkpoint.n_bytes / 1e6:,.1f} MB in {len(checkpoint)} tensors",
        "image tower": f"width {vision.width}, depth {vision.depth}, heads {vision.n_heads}, MLP {vision.mlp_dim}",
        "decoder": f"width {text.width}, depth {text.depth}, heads {text.n_heads} ({text.n_kv_heads} key/value) of "
        f"{text.head_dim}, MLP {text.mlp_dim}",
        "table": f"{text.vocab_size:,} rows, {config.tokens.n_tokens:,} of them tokens",
        "tokenizer": ", ".join(tokenizers) or "none beside the weights",
        "query scale": f"{text.query_pre_attn_scalar:g} ** -0.5",
        "soft caps": f"attention {text.attn_logits_softcap or 'off'}, final {text.final_logits_softcap or 'off'} "
        f"({text.final_cap})",
        "sliding window": f"{text.sliding_window:,} on even layers" if text.sliding_window else "none",
        "resize": processing.resize,
        "choices": f"separator {processing.separator}, special tokens as {processing.special_tokens}, alpha "
        f"{processing.alpha}, embedding scale in {text.embed_scale}, beams {config.beams}",
        "dropped": [f"{name}: {why}" for name, why in checkpoint.dropped.items()],
        "changed": [f"{name}: {change.what}" for name, change in checkpoint.changes.items()],
        "parameters": _count(checkpoint),
    }


def _count(checkpoint: "Checkpoint") -> dict[str, int]:
    parts = {"image tower": "vision.", "projector": "projector.", "embedding": "text.embedding.", "decoder": "text."}
    counts = dict.fromkeys(parts, 0)
    for name in checkpoint:
        part = next(part for part, prefix in parts.items() if name.startswith(prefix))
        counts[part] += checkpoint.spec(name).n_values
    return counts | {"all": sum(counts.values())}


def _text(value: Any) -> str:
    if isinstance(value, list):
        more = f", and {len(value) - 3} more" if len(value) > 3 else ""
        return ("; ".join(value[:3]) + more) or "nothing"
    return str(value)


def _convert(args: argparse.Namespace) -> int:
    from paligemma.checkpoints import convert

    adapter = _locate(args.adapter) if args.action == "merge" else None
    with _progress("merging" if adapter else "converting") as advance:
        out = convert(
            _locate(args.path, args.revision), args.out, to=args.to, adapter=adapter, layout=args.layout,
            dtype=args.dtype, resolution=args.resolution, max_shard_bytes=int(args.max_shard_gb * 1e9),
            tokenizer=args.tokenizer, strict=not args.no_strict, overwrite=args.overwrite, progress=advance,
        )  # fmt: skip
    if args.json:
        print(json.dumps({"out": str(out)}, ensure_ascii=False))
    else:
        print(out)
    return 0


def _assemble(args: argparse.Namespace) -> int:
    from paligemma.checkpoints import assemble, save_assembly

    is_npz = args.format == "npz" or (args.format is None and args.out.endswith(".npz"))
    resize: Resize | None = "bv_bilinear_aa" if is_npz else "hf_bicubic"  # each format implies its own
    if args.preset and not is_npz:
        resize = None
    config, state = assemble(
        _locate(args.vision), _locate(args.text), resolution=args.resolution, init=args.init, seed=args.seed,
        projector=args.projector, dtype=args.dtype, resize=resize, preset=args.preset, strict=not args.no_strict,
        vision_preset=args.vision_preset, text_preset=args.text_preset,
    )  # fmt: skip
    with state, _progress("assembling") as advance:
        report = save_assembly(
            args.out, config, state, to="npz" if is_npz else "hf", layout=args.layout, tokenizer=args.tokenizer,
            max_shard_bytes=int(args.max_shard_gb * 1e9), overwrite=args.overwrite, progress=advance,
        )  # fmt: skip
    if args.json:
        print(json.dumps({"out": args.out, **report.to_dict()}, ensure_ascii=False))
        return 0
    facts = report.to_dict()
    dropped = facts.pop("dropped")
    lines = [[name, text] for name, text in facts.items()]
    lines += [["dropped", f"{len(names)} tensors, {names[0]} …: {why}"] for why, names in dropped.items()]
    note(table(lines))
    print(args.out)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from paligemma.checkpoints import verify

    path = _locate(args.path, args.revision)
    with _progress("verifying") as advance:
        verdict = verify(path, strict=not args.no_strict, progress=advance)
    if args.json:
        facts = {"path": str(path), "sound": verdict.is_sound, "problems": verdict.problems}
        print(json.dumps(facts, ensure_ascii=False))
    else:
        for problem in verdict.problems:
            note(f"paligemma checkpoint verify: {problem}")
        what = "sound" if verdict.is_sound else f"{len(verdict.problems)} problems"
        print(f"{what}: {verdict.n_tensors} tensors, {verdict.n_values:,} values; checked {', '.join(verdict.checked)}")
    return 0 if verdict.is_sound else 2


def _push(args: argparse.Namespace) -> int:
    from paligemma.checkpoints.push import pack, push

    with _progress("verifying") as advance:
        if args.dry_run:
            sizes = pack(args.folder, args.repo, progress=advance).sizes
        else:
            done = push(
                args.folder, args.repo, revision=args.revision, private=args.private, message=args.message,
                create=args.create, progress=advance,
            )  # fmt: skip
    if args.dry_run:
        if args.json:
            print(json.dumps({"repo": args.repo, "files": sizes}))
        else:
            print(table([[name, f"{n_bytes:,} bytes"] for name, n_bytes in sizes.items()], right=(1,)))
        return 0
    for name in done.removed:
        note(f"paligemma checkpoint push: {name} of an earlier push was removed")
    print(json.dumps(dataclasses.asdict(done)) if args.json else f"{done.url} at {done.commit[:10]}")
    return 0


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr once the work takes longer than people wait; told (bytes done, bytes in all)."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, delay=PATIENCE_S, file=sys.stderr, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
