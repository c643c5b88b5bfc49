"""The door of the command line: finds the verb, runs it, and turns what went wrong into one line and a status.

    0    done
    1    our fault
    2    the user can mend it: one line says what was wrong, what was expected and how to fix it
    130  Ctrl-C

A verb is a module of this folder with `add_arguments(parser)` and `run(args) -> status`; only the one that is asked
for is imported, so that `--help` and typing errors answer at once.
"""

import argparse
import codecs
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from paligemma.cli.args import Parser, with_dashes
from paligemma.errors import OptionError, PaliGemmaError, nearest

VERBS = {
    "caption": "describe pictures, or the region in a box",
    "ask": "answer a question about pictures",
    "detect": "find things: labels, boxes, scores",
    "segment": "find things: labels, boxes, masks, scores",
    "read": "read the text in pictures",
    "generate": "any prompt: sampling, beams, streaming, several pictures at once",
    "score": "log-likelihood of given answers",
    "train": "teach a model: from a folder of examples to tuned weights",
    "plan": "memory, time and cost of a training run, before it is started",
    "data": "check, preview, convert, generate: examples in every format",
    "checkpoint": "info, assemble, convert, merge, verify: every format of weights",
    "eval": "measure a model on a fixed suite",
    "doctor": "what this machine can do",
}
DONE, OURS, YOURS, INTERRUPTED = 0, 1, 2, 130


ESCAPED = "paligemma.escaped"


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What a terminal cannot show, half a character or a letter that its encoding lacks, as JSON writes it: \\ud800."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)), error.end


codecs.register_error(ESCAPED, _escaped)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; nothing escapes as a traceback without `--debug`."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    verb = next((word for word in words if not word.startswith("-")), "")
    name = f"paligemma {verb}" if verb in VERBS else "paligemma"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except PaliGemmaError as error:
        return _tell(name, " ".join(str(error).split()), YOURS, debug)
    except KeyboardInterrupt:
        return _tell(name, "interrupted.", INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Point stdout elsewhere, or Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if _out_of_memory(error):
            message = (
                "the device ran out of memory: the model, its cache and the pictures must fit. "
                "Try --batch-size 1, --dtype bfloat16, a smaller model, or --device cpu."
            )
            return _tell(name, message, YOURS, debug)
        message = (
            f"a fault in paligemma, not in what you typed ({type(error).__name__}: {' '.join(str(error).split())}). "
            "Please report it with the output of the same command and --debug."
        )
        return _tell(name, message, OURS, debug)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return DONE
    if words[0] in ("-V", "--version", "version"):
        import paligemma

        print(f"paligemma {paligemma.__version__}")
        return DONE
    verb, rest = words[0], words[1:]
    if verb.startswith("-"):
        raise OptionError(f"{verb} comes before the verb: expected `paligemma VERB … {verb}`. Put the verb first.")
    if verb not in VERBS:
        raise OptionError(
            f"there is no verb '{verb}': expected one of {', '.join(VERBS)}.{nearest(verb, VERBS)} "
            "See `paligemma --help`."
        )
    module = importlib.import_module(f"paligemma.cli.{verb}")
    parser = Parser(
        prog=f"paligemma {verb}",
        description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".",
        epilog=module.__doc__.split("\n\n", 1)[1] if module.__doc__ and "\n\n" in module.__doc__ else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    try:
        args = parser.parse(with_dashes(rest))
    except SystemExit as stop:  # --help has printed its page
        return int(stop.code or 0)
    return int(module.run(args))


def _tell(name: str, message: str, status: int, debug: bool) -> int:
    if debug and status != INTERRUPTED:
        traceback.print_exc()
    print(f"{name}: {message}", file=sys.stderr)
    return status


def _out_of_memory(error: Exception) -> bool:
    # By name: torch.OutOfMemoryError may not be imported here, and a CPU allocation fails with a plain RuntimeError.
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
    )


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: paligemma VERB [PICTURES …] [--model M] [--json] …\n\n"
        f"{verbs}\n\n"
        "  paligemma detect photo.jpg cat dog --model paligemma2-3b-mix-448 --save out/\n"
        '  paligemma ask photos/ "what is this?" --json\n'
        "  paligemma detect                      the embedded model on a bundled picture\n\n"
        "Pictures are files, folders, globs, or - for stdin. `paligemma VERB --help` lists a verb's options."
    )


if __name__ == "__main__":
    status = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Under torchrun: threads of a process group whose other members have left can abort an ordinary end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
