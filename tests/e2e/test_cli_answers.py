"""Every picture verb from words to output, on a model of random weights: what is printed is what Python answers."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import paligemma
from paligemma.cli.main import main
from tests.tiny_folder import write_folder

SHORT = ("--max-new-tokens", "90")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("models") / "random"))


@pytest.fixture(scope="module")
def pg(model: str) -> paligemma.PaliGemma:
    return paligemma.load(model)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four pictures of unlike sizes in the folder `photos` of the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (30 + 9 * i, 60 - 5 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_json_is_one_object_per_picture_equal_to_the_python_result(
    model: str, pg: paligemma.PaliGemma, photos: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, err = run(capsys, "segment", "photos", "cat", "--model", model, "--json", "--batch-size", "3", *SHORT)
    assert (status, err) == (0, "")
    answers = objects(out)
    assert [answer["image"] for answer in answers] == [f"photos/{i}.png" for i in range(4)]
    assert any(answer["segments"] for answer in answers)
    for answer in answers:
        expected = pg.segment(answer.pop("image"), "cat", max_new_tokens=90).to_dict()
        assert answer["raw"] == expected["raw"]
        assert [s["mask"] for s in answer["segments"]] == [s["mask"] for s in expected["segments"]]
        assert answer["size_hw"] == expected["size_hw"]


def test_a_table_shows_label_score_and_box_of_everything_found(
    model: str, pg: paligemma.PaliGemma, photos: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, _ = run(capsys, "segment", "photos", "--label", "cat", "--model", model, *SHORT)
    assert status == 0
    found = {name: pg.segment(f"photos/{name}.png", "cat", max_new_tokens=90) for name in "0123"}
    assert any(found.values())
    blocks = out.split("photos/")[1:]
    for block in blocks:
        detections = found[block[0]]
        rows = block.splitlines()[2:] if detections else block.splitlines()
        assert "nothing found" in block or all(
            f"{d.score:.2f}" in row and f"{d.box_xyxy_px[0]:.0f}" in row
            for d, row in zip(detections, rows, strict=False)
        )


def test_one_picture_answers_with_its_text_alone_and_several_with_their_names(
    model: str, pg: paligemma.PaliGemma, photos: Path, capsys: pytest.CaptureFixture[str]
):
    word = ["--model", model, "--max-new-tokens", "3"]
    expected = [pg.caption(f"photos/{i}.png", "de", max_new_tokens=3).text for i in range(2)]
    _, alone, _ = run(capsys, "caption", "photos/0.png", "--lang", "de", *word)
    assert alone == expected[0] + "\n"
    _, both, _ = run(capsys, "caption", "photos/0.png", "photos/1.png", "--lang", "de", "--json", *word)
    assert [answer["text"] for answer in objects(both)] == expected


def test_a_question_is_answered_and_choices_are_weighed(
    model: str, pg: paligemma.PaliGemma, photos: Path, capsys: pytest.CaptureFixture[str]
):
    _, out, _ = run(
        capsys, "ask", "what is this?", "photos/2.png", "--choice", "cat", "--choice", "dog", "--model", model, "--json"
    )
    (answer,) = objects(out)
    assert answer["text"] == pg.answer("photos/2.png", "what is this?", choices=["cat", "dog"]).text
    assert sum(choice["probability"] for choice in answer["choices"]) == pytest.approx(1)
    status, out, _ = run(capsys, "ask", "photos/2.png", "--question", "photos/2.png", "--model", model, "--json")
    assert status == 0, "--question says outright that a word is text"
    _, out, _ = run(capsys, "ask", "photos/2.png", "a?", "--choice", "cat", "--choice", "dog", "--model", model)
    assert out.split()[0] in ("cat", "dog")


def test_read_prints_text_or_words_with_boxes(
    model: str, pg: paligemma.PaliGemma, photos: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, _ = run(capsys, "read", "photos", "--json", "--model", model, *SHORT)
    assert status == 0
    assert [a["raw"] for a in objects(out)] == [pg.read(f"photos/{i}.png", max_new_tokens=90).raw for i in range(4)]
    assert run(capsys, "read", "photos", "--model", model, *SHORT)[0] == 0


def test_generate_passes_its_options_on(
    model: str, pg: paligemma.PaliGemma, photos: Path, capsys: pytest.CaptureFixture[str]
):
    def generated(*words: str) -> Any:
        status, out, _ = run(capsys, "generate", *words, "--model", model, "--json", "--max-new-tokens", "12")
        assert status == 0
        return objects(out)

    from paligemma.engine.sampling import Sampling

    one = "photos/0.png"
    sampling = Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=4)
    expected = pg.generate(one, "caption en", max_new_tokens=12, sampling=sampling)[0]
    (sampled,) = generated(one, "--prompt", "caption en", "--temperature=1.3", "--top_k=50", "--top-p=0.9", "--seed=4")
    assert sampled["tokens"] == list(expected.tokens)
    (beams,) = generated(one, "--prompt", "caption en", "--beams", "3", "--beam", "hf")
    expected = pg.generate(one, "caption en", max_new_tokens=12, n_beams=3, beam="hf")[0]
    assert beams["tokens"] == list(expected.tokens)
    (together,) = generated(one, "photos/1.png", "--together", "--prompt", "caption en")
    expected = pg.generate([one, "photos/1.png"], "caption en", max_new_tokens=12)[0]
    assert together["tokens"] == list(expected.tokens)
    assert together["image"] == "photos/0.png + photos/1.png"
    (blind,) = generated("--no-picture", "--prompt", "")
    assert blind["tokens"] == list(pg.generate(None, "", max_new_tokens=12)[0].tokens)
    assert blind["image"] is None


def test_a_stream_prints_the_same_text(
    model: str, pg: paligemma.PaliGemma, photos: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["generate", "photos/0.png", "--prompt", "answer en what?", "--stream", "--model", model, *SHORT]
    expected = pg.generate("photos/0.png", "answer en what?", max_new_tokens=90)[0].text
    assert run(capsys, *words)[1] == expected + "\n"
    pieces = objects(run(capsys, *words, "--json")[1])
    assert "".join(piece["piece"] for piece in pieces) == expected
    assert len(pieces) > 1


def test_logprobs_list_every_token(model: str, pg: paligemma.PaliGemma, photos: Path, capsys: Any):
    _, out, _ = run(
        capsys, "generate", "photos/3.png", "--prompt", "b", "--logprobs", "--max-new-tokens", "6", "--model", model
    )
    expected = pg.generate("photos/3.png", "b", max_new_tokens=6)[0]
    for token, logprob in zip(expected.tokens, expected.logprobs, strict=True):
        assert f" {token}  {logprob:.4f}" in out


def test_scores_are_those_of_python(model: str, pg: paligemma.PaliGemma, photos: Path, capsys: Any):
    words = ["score", "photos/1.png", "--prompt", "caption en", "--suffix", "a cat", "--suffix", "", "--model", model]
    (scored,) = objects(run(capsys, *words, "--json")[1])
    expected = pg.score("photos/1.png", "caption en", ["a cat", ""])
    assert [s["logprob"] for s in scored["scores"]] == pytest.approx(list(expected), abs=1e-4)
    assert f"{expected[0]:.3f}" in run(capsys, *words)[1]


def test_a_picture_comes_through_stdin(
    model: str, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    _, direct, _ = run(capsys, "caption", "photos/2.png", "--max-new-tokens", "9", "--model", model)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((photos / "2.png").read_bytes())))
    assert run(capsys, "caption", "-", "--max-new-tokens", "9", "--model", model)[1] == direct


def test_overlays_masks_and_coco_results_are_saved(
    model: str, pg: paligemma.PaliGemma, photos: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "twin").mkdir()
    (photos / "twin" / "0.png").write_bytes((photos / "0.png").read_bytes())
    words = ["segment", "photos", "photos/twin", "cat", "--save", "out", "--coco", "coco.json", *SHORT]
    status, _, err = run(capsys, *words, "--model", model)
    assert status == 0
    assert "saved" in err
    saved = sorted(path.name for path in Path("out").iterdir())
    assert {"0.segment.png", "0.segment-2.png", "1.segment.png", "2.segment.png", "3.segment.png"} <= set(saved)
    found = [pg.segment(f"photos/{i}.png", "cat", max_new_tokens=90) for i in (0, 1, 2, 3, 0)]
    assert sum(".mask-" in name for name in saved) == sum(map(len, found)) > 0
    i, first = next((i, segments[0]) for i, segments in enumerate(found) if segments)
    name = next(name for name in saved if name.startswith(f"{i}.segment.mask-01"))
    mask = np.asarray(Image.open(Path("out") / name).convert("L")) > 127
    assert np.array_equal(mask, first.mask)
    rows = json.loads(Path("coco.json").read_text())
    assert len(rows) == sum(map(len, found))
    left, top, right, bottom = first.box_xyxy_px
    assert rows[0]["bbox"] == pytest.approx([left, top, right - left, bottom - top])
    assert rows[0]["file_name"] == f"photos/{i}.png"


def test_an_overlay_never_overwrites_the_picture_beside_it(model: str, photos: Path, capsys: Any):
    before = (photos / "1.png").read_bytes()
    assert run(capsys, "detect", "photos/1.png", "cat", "--save", "photos", "--model", model, *SHORT)[0] == 0
    assert (photos / "1.png").read_bytes() == before
    assert (photos / "1.detect.png").exists()


def test_choices_of_the_references_reach_the_model(model: str, pg: paligemma.PaliGemma, photos: Path, capsys: Any):
    words = ["score", "photos/1.png", "--prompt", "a", "--suffix", "cat", "--json", "--model", model]
    (scored,) = objects(run(capsys, *words, "--set", "resize=bv_bilinear", "--set", "final_logits_softcap=none")[1])
    other = paligemma.load(model, resize="bv_bilinear", final_logits_softcap=None)
    assert scored["scores"][0]["logprob"] == pytest.approx(other.score("photos/1.png", "a", ["cat"])[0], abs=1e-4)
    assert scored["scores"][0]["logprob"] != pytest.approx(pg.score("photos/1.png", "a", ["cat"])[0], abs=1e-4)


def test_a_short_name_finds_the_model_in_the_hub_cache_without_a_network(model: str, pg: Any, photos: Path):
    snapshot = Path("cache", "models--google--paligemma2-3b-mix-448", "snapshots", "c" * 40)
    shutil.copytree(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c" * 40)
    words = ["caption", "photos/0.png", "--model", "paligemma2-3b-mix-448", "--max-new-tokens", "5"]
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "HF_HUB_CACHE": str(Path("cache").resolve()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "paligemma", *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == pg.caption("photos/0.png", max_new_tokens=5).text + "\n"


def test_eval_prints_a_table_and_saves_the_scores(model: str, photos: Path, capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "eval", "tiny", "--limit", "1", "--out", "scores.json", "--model", model)
    assert status == 0
    assert "saved scores.json" in err
    saved = json.loads(Path("scores.json").read_text())
    assert saved["plain"].keys() == saved["full"].keys()
    assert "AP50" in out
    assert "plain" in out.splitlines()[0]


def test_eval_scores_models_beside_each_other_on_what_they_never_saw(model: str, photos: Path, capsys):
    words = ["eval", "tiny", "--limit", "1", "--unseen", "--model", model]
    status, out, _ = run(capsys, *words, "--beside", "tiny", "--json")
    assert status == 0
    untaught, taught = json.loads(out)
    assert (untaught["from"], taught["from"], taught["model"]) == (model, "tiny", "tiny")
    assert untaught.keys() >= {"plain", "full", "shapes", "backgrounds", "texts", "fonts"}
    assert untaught["plain"]["answers"] < taught["plain"]["answers"]
    status, out, err = run(capsys, *words, "--beside", "no/such/folder")
    assert status != 0
    assert "no/such/folder" in err
    assert out == ""  # said before anything was scored
    assert run(capsys, "eval", "photos", "--unseen", "--model", model)[0] != 0


def test_the_program_leaves_quietly_when_its_reader_does(model: str, photos: Path):
    words = ["generate", *["photos"] * 10, "--prompt", "a", "--max-new-tokens", "2", "--json", "--model", model]
    command = [sys.executable, "-m", "paligemma", *words, "--batch-size", "1"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert program.stdout is not None
    assert json.loads(program.stdout.readline())["image"] == "photos/0.png"
    program.stdout.close()
    assert program.stderr is not None
    assert program.stderr.read() == b""
    assert program.wait() == 0
