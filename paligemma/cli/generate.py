"""`paligemma generate`

paligemma generate photo.jpg --prompt "caption en"
paligemma generate left.jpg right.jpg --together --prompt "answer en are these the same?"
paligemma generate photo.jpg --prompt "describe en" --temperature 0.7 --top-p 0.9 --seed 1 --stream
paligemma generate photo.jpg --prompt "caption en" --beams 4 --logprobs --json

The prompt goes to the model as it stands. Without --together every picture is asked on its own.
"""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from paligemma.cli.args import add_model_options, add_output_options, add_picture_options
from paligemma.cli.run import Gallery, answer_pictures, load_model, stream_pictures, table
from paligemma.errors import OptionError

if TYPE_CHECKING:
    from paligemma.api import PaliGemma
    from paligemma.results import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files, folders, globs, or - for stdin")
    parser.add_argument("--prompt", metavar="TEXT", help="the prefix; may be empty")
    parser.add_argument("--no-picture", action="store_true", help="ask without any picture")
    parser.add_argument(
        "--allow-special", action="store_true", help="let control tokens such as <eos> stand in the prompt"
    )
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens")
    group.add_argument("--stream", action="store_true", help="print the text while it is written")
    group.add_argument("--beams", type=int, default=1, metavar="N", help="beam search over N beams (default: 1, none)")
    group.add_argument("--beam", metavar="KIND", help="which beam search: bv (JAX original) or hf (transformers)")
    group.add_argument("--temperature", type=float, metavar="T", help="sample; 1.0 is the model's own distribution")
    group.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that make up P")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    group.add_argument("--best-of", type=int, default=1, metavar="N", help="sample N answers, keep the most likely")
    group.add_argument("--logprobs", action="store_true", help="every token with its log-probability")
    add_output_options(parser)
    add_picture_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.prompt is None:
        raise OptionError('no prompt: expected --prompt TEXT, for example --prompt "caption en".')
    if args.stream and (args.beams != 1 or args.best_of != 1):
        raise OptionError("--stream shows one answer while it is written: it does not go with --beams or --best-of.")
    options = decoding_options(args)
    if args.no_picture:
        return _without_picture(args, options)
    gallery = Gallery.of(args, args.pictures)
    if args.stream:
        streamed = {key: options[key] for key in ("max_new_tokens", "sampling", "allow_special") if key in options}
        return stream_pictures(args, gallery, args.prompt, **streamed)

    def ask(pg: "PaliGemma", images: list[Any]) -> list[Any]:
        return pg.generate(images, [args.prompt] * len(images), batch_size=args.batch_size, **options)

    return answer_pictures(args, gallery, ask, show_tokens if args.logprobs else show)


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of this verb as keyword arguments of `PaliGemma.generate`."""
    options: dict[str, Any] = {"n_beams": args.beams, "best_of": args.best_of, "allow_special": args.allow_special}
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    if args.beam is not None:
        options["beam"] = args.beam
    given = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    given = {name: value for name, value in given.items() if value is not None}
    if given or args.best_of > 1:
        from paligemma.engine.sampling import Sampling

        options["sampling"] = Sampling(seed=args.seed, **given)
    return options


def show(generation: "Generation") -> str:
    return generation.text


def show_tokens(generation: "Generation") -> str:
    """The text, then a row per token: its place, piece, id, log-probability and probability."""
    head = ["", "piece", "id", "logprob", "prob"]
    rows = [
        [str(i), json.dumps(piece, ensure_ascii=False), str(token), f"{logprob:.4f}", f"{math.exp(logprob):.3f}"]
        for i, (piece, token, logprob) in enumerate(
            zip(generation.pieces, generation.tokens, generation.logprobs, strict=True)
        )
    ]
    body = table([head, *rows], right=(0, 2, 3, 4))
    return f"{generation.text}\n{body}\nsum {generation.logprob:.4f}, finish: {generation.finish_reason}"


def _without_picture(args: argparse.Namespace, options: dict[str, Any]) -> int:
    if args.pictures:
        raise OptionError("--no-picture was given together with pictures: expected one or the other.")
    generation = load_model(args).generate(None, args.prompt, **options)[0]
    if args.json:
        print(json.dumps({"image": None, **generation.to_dict()}, ensure_ascii=False))
    else:
        print((show_tokens if args.logprobs else show)(generation))
    return 0
