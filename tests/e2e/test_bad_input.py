"""What users get wrong, from the command line: strange pictures just work, bad ones are refused in one clear line."""

import io
import json
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from paligemma.checkpoints import read, write
from paligemma.cli.main import main
from tests.tiny_folder import write_folder

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line that a command is refused with."""
    status, out, err = run(capsys, *words)
    assert status == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def png(mode: str, **options: Any) -> bytes:
    picture = Image.fromarray(PIXELS)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode != "RGB" else picture).save(buffer, **{"format": "png", **options})
    return buffer.getvalue()


def sixteen_bit() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 65536, (24, 32), dtype=np.uint16)).save(buffer, "png")
    return buffer.getvalue()


def animated() -> bytes:
    frames = [Image.fromarray(RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)) for _ in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "gif", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


JUST_WORKS: dict[str, Callable[[], bytes]] = {
    "grey.png": lambda: png("L"),
    "grey-alpha.png": lambda: png("LA"),
    "transparent.png": lambda: png("RGBA"),
    "palette.png": lambda: png("P"),
    "black-white.png": lambda: png("1"),
    "cmyk.jpg": lambda: png("CMYK", format="jpeg"),
    "sixteen-bit.png": sixteen_bit,
    "animated.gif": animated,
    "really-a-png.jpg": lambda: png("RGB"),
    "no-suffix": lambda: png("RGB"),
    "ünïcode näme 图.webp": lambda: png("RGB", format="webp"),
}


def test_strange_pictures_just_work(model: Path, capsys: pytest.CaptureFixture[str]):
    for name, make in JUST_WORKS.items():
        Path(name).write_bytes(make())
    status, out, err = run(capsys, "caption", *JUST_WORKS, "--json", "--model", model, "--max-new-tokens", "2")
    assert (status, err) == (0, "")
    assert [json.loads(line)["image"] for line in out.splitlines()] == list(JUST_WORKS)


def test_an_empty_prompt_and_any_language_just_work(model: Path, capsys: pytest.CaptureFixture[str]):
    Path("a.png").write_bytes(png("RGB"))
    short = ["--max-new-tokens", "2", "--model", model]
    assert run(capsys, "generate", "a.png", "--prompt", "", *short)[0] == 0
    for lang in ("de", "zh", "quz", "xx"):
        assert run(capsys, "caption", "a.png", "--lang", lang, *short)[0] == 0


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated.png": (lambda: png("RGB")[:-60], "truncated"),
    "truncated.jpg": (lambda: png("RGB", format="jpeg")[:300], "damaged"),
    "empty.png": (lambda: b"", "empty"),
    "text.png": (lambda: b"this is no picture at all", "not a picture"),
    "bomb.png": (bomb, "max_pixels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_refused_by_name(model: Path, capsys: pytest.CaptureFixture[str], name: str):
    make, text = BROKEN[name]
    Path(name).write_bytes(make())
    err = refusal(capsys, "caption", name, "--model", model)
    assert name in err
    assert text in err


def test_the_limit_on_pixels_can_be_raised_and_lowered(model: Path, capsys: pytest.CaptureFixture[str]):
    Path("a.png").write_bytes(png("RGB"))
    assert "768 pixels" in refusal(capsys, "caption", "a.png", "--max-pixels", "500", "--model", model)
    assert run(capsys, "caption", "a.png", "--max-pixels", "768", "--max-new-tokens", "2", "--model", model)[0] == 0


def test_broken_pictures_among_good_ones_are_named_and_the_others_answered(
    model: Path, capsys: pytest.CaptureFixture[str]
):
    Path("mixed").mkdir()
    for name in ("a.png", "c.png", "e.png"):
        Path("mixed", name).write_bytes(png("RGB"))
    Path("mixed", "b.png").write_bytes(png("RGB")[:-60])
    Path("mixed", "d.png").write_bytes(b"")
    words = ["caption", "mixed", "--json", "--batch-size", "2", "--max-new-tokens", "2", "--model", model]
    status, out, err = run(capsys, *words)
    assert status == 2
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["mixed/a.png", "mixed/c.png", "mixed/e.png"]
    assert [name in line for name, line in zip(("b.png", "d.png"), err.splitlines(), strict=True)] == [True, True]


PROMPTS: dict[str, tuple[list[str], str]] = {
    "control token": (["generate", "a.png", "--prompt", "caption <eos> en"], "<eos>"),
    "control token in a question": (["ask", "a.png", "what <bos>?"], "allow_special"),
    "over-long": (["generate", "a.png", "--prompt", "why " * 9000], "expected at most 8192"),
    "no question": (["ask", "a.png"], "expected one question"),
    "two questions": (["ask", "a.png", "what?", "why?"], "got 2"),
    "no label": (["detect", "a.png"], "nothing to look for"),
    "forbidden label": (["detect", "a.png", "cat<loc0001>"], "holds '<'"),
    "no prompt": (["generate", "a.png"], "--prompt"),
    "no suffix": (["score", "a.png", "--prompt", "a"], "--suffix"),
    "two words as language": (["caption", "a.png", "--lang", "en de"], "language code"),
    "box": (["caption", "a.png", "--box", "1,2,3"], "four numbers"),
    "box without area": (["caption", "a.png", "--box", "9,9,2,2"], "box"),
    "temperature": (["generate", "a.png", "--prompt", "a", "--temperature", "-1"], "temperature=-1"),
    "stream of beams": (["generate", "a.png", "--prompt", "a", "--stream", "--beams", "2"], "--stream"),
    "best of greedy": (["generate", "a.png", "--prompt", "a", "--beams", "2", "--best-of", "2"], "best_of=2"),
    "picture and none": (["generate", "a.png", "--no-picture", "--prompt", "a"], "one or the other"),
    "missing picture": (["caption", "b.png"], "no such picture"),
    "batch size": (["caption", "a.png", "--batch-size", "0"], "--batch-size 0"),
    "together with unlike sizes": (
        ["detect", "a.png", "w.png", "--together", "--label", "a"],
        "one of one size|one size",
    ),
    "place to save": (["detect", "a.png", "x", "--save", "a.png"], "--save a.png"),
    "place of coco": (["detect", "a.png", "x", "--coco", "nowhere/x.json"], "does not exist"),
    "choice": (["caption", "a.png", "--set", "resise=x"], "Did you mean 'resize'"),
    "dtype": (["caption", "a.png", "--dtype", "float23"], "Did you mean 'float32'"),
    "device": (["caption", "a.png", "--device", "gpu"], "not a device"),
    "quantise": (["caption", "a.png", "--quantize", "int8"], "quantize='int8'"),
    "suite": (["eval", "tinny"], "Did you mean"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_request_that_cannot_be_right_is_refused(model: Path, capsys: pytest.CaptureFixture[str], case: str):
    Path("a.png").write_bytes(png("RGB"))
    Image.new("RGB", (50, 20)).save("w.png")
    words, text = PROMPTS[case]
    err = refusal(capsys, *words, "--model", model)
    assert any(part in err for part in text.split("|"))


def damaged(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """A folder whose tensors were changed."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if "up_proj" in name)


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 48
    (folder / "config.json").write_text(json.dumps(config))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (damaged(lambda t: t.__delitem__(first(t))), "up_proj"),
    "misshapen tensor": (damaged(lambda t: t.update({first(t): torch.zeros(3, 4)})), "up_proj"),
    "unknown tensor": (damaged(lambda t: t.update({"strange": torch.zeros(3)})), "strange"),
    "NaN": (damaged(lambda t: t.update({first(t): t[first(t)] * torch.nan})), "NaN"),
    "truncated": (truncated, "model.safetensors"),
    "config of another model": (other_config, "48"),
    "pickle": (as_pickle, "It was not opened"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "no tokenizer"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.model").write_bytes(b"x" * 99) and None, "tokenizer"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_models_are_refused(model: Path, capsys: pytest.CaptureFixture[str], case: str):
    change, text = DAMAGE[case]
    change(Path(shutil.copytree(model, "damaged")))
    Path("a.png").write_bytes(png("RGB"))
    assert text in refusal(capsys, "caption", "a.png", "--check", "--model", "damaged")


def test_a_truncated_archive_is_refused(model: Path, capsys: pytest.CaptureFixture[str]):
    config, state = read(model)
    write("model.npz", config, state, "npz")
    shutil.copy(model / "tokenizer.model", ".")
    Path("a.png").write_bytes(png("RGB"))
    assert run(capsys, "caption", "a.png", "--model", "model.npz", "--max-new-tokens", "2")[0] == 0
    Path("model.npz").write_bytes(Path("model.npz").read_bytes()[:-5000])
    assert "model.npz" in refusal(capsys, "caption", "a.png", "--model", "model.npz")


def test_a_model_name_with_a_typing_error_is_answered_with_the_nearest_name(capsys: pytest.CaptureFixture[str]):
    Path("a.png").write_bytes(png("RGB"))
    assert "Did you mean 'tiny'" in refusal(capsys, "caption", "a.png", "--model", "tinny")
    assert "no such file or folder" in refusal(capsys, "caption", "a.png", "--model", "./nowhere")


def test_debug_shows_where_an_error_came_from(model: Path, capsys: pytest.CaptureFixture[str]):
    status, _, err = run(capsys, "caption", "missing.png", "--debug", "--model", model)
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("paligemma caption: no such picture")


def test_a_fault_of_ours_is_told_apart(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fall_over(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("paligemma.cli.doctor.examine", fall_over)
    status, out, err = run(capsys, "doctor")
    assert (status, out) == (1, "")
    assert "not in what you typed (ZeroDivisionError: division by zero)" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_with_one_line_and_status_130(model: Path):
    Path("a.png").write_bytes(png("RGB"))
    # Far more answers than a pipe holds: it cannot be done before it is interrupted.
    words = ["generate", *["a.png"] * 5000, "--prompt", "a", "--batch-size", "1", "--json", "--model", str(model)]
    root = str(Path(__file__).parents[2])
    # A shell that put the tests into the background has them ignore Ctrl-C, which children inherit.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.path.insert(0, {root!r}); from paligemma.cli.main import main; sys.exit(main({words!r}))"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout is not None
    assert program.stdout.readline()  # at work
    program.send_signal(signal.SIGINT)
    _, err = program.communicate()
    assert program.returncode == 130
    assert err == "paligemma generate: interrupted.\n"
