"""The studies run from stage 0 to their page, and what they count means what the pages say."""

import json
import math
import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import paligemma
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.presets import STUDY, TINY

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

STUDIES = Path(__file__).parents[2] / "studies"
NAMES = {
    "stage_one": ("mask_form", "frozen_parts"),
    "transfers": ("shorter_stage1", "transfer_examples", "repeatability"),
    "ready": (
        "prefix_loss", "projector", "no_tower", "new_tokens", "resolution", "simple_setting", "lr_by_width",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The scripts and what they share, imported as they are when one of them is run."""
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "helpers"}
    sys.path.insert(0, str(STUDIES))
    try:
        names = ("helpers.pages", "helpers.pictures", "helpers.small", "helpers.bench", *NAMES)
        return SimpleNamespace(**{name.split(".")[-1]: import_module(name) for name in names})
    finally:
        sys.path.remove(str(STUDIES))
        for name in [name for name in sys.modules if name.split(".")[0] in ("helpers", *NAMES)]:
            del sys.modules[name]
        sys.modules.update(others)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def untaught(scripts: Any, work: Path) -> Any:
    """The model of stage 0, its projector drawn so that pictures are seen."""
    device = torch.device("cpu")
    pg = scripts.small.opened(scripts.small.stage0(work / "work", scripts.pictures.QUICK, device), device)
    torch.nn.init.normal_(pg.model.projector.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return pg


def test_the_preset_is_as_small_as_studies_need_and_speaks_as_tiny_does() -> None:
    assert sum(p.numel() for p in PaliGemmaModel(STUDY, device="meta").parameters()) <= 2_000_000
    assert 56 <= STUDY.vision.resolution <= 84
    assert STUDY.tokens == TINY.tokens
    assert STUDY.text.vocab_size == TINY.text.vocab_size


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, names in NAMES.items() for name in names])
def test_a_study_runs_to_its_page_and_goes_on_where_it_stopped(
    scripts: Any, work: Path, script: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = getattr(scripts, script).main
    command = [name, "--quick", "--seeds", "2", "--work", str(work / "work"), "--out", str(work / "out")]
    assert main(command) == 0
    page = (work / "out" / f"{name}.md").read_text()
    assert page.startswith("# Study: ")
    assert not re.search(r"\bnan\b|\bNone\b|[{}]", page.replace("{colour}", ""))
    assert max(len(line) for line in page.splitlines() if line[0:1] not in ("|", "-")) <= 120
    for picture in re.findall(r"\]\((.*?\.png)\)", page):
        assert (work / "out" / picture).stat().st_size < 100_000
    assert f"`python studies/{script}.py {name} --seeds 2`" in page
    before = json.loads((work / "out" / f"{name}.json").read_text())
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().err == ""  # every run is told on stderr: there was none
    assert json.loads((work / "out" / f"{name}.json").read_text()) == before
    assert (work / "out" / f"{name}.md").read_text() == page
    if name == "repeatability":
        assert " ".join(page.split()).count("the same weights, bit by bit") == 2


def test_runs_of_other_sizes_are_not_mixed(scripts: Any, tmp_path: Path) -> None:
    args = SimpleNamespace(out=tmp_path)
    scripts.pages.results_of(args, "x", {"steps": 2})["a"] = 1
    assert scripts.pages.results_of(args, "x", {"steps": 2})["a"] == 1
    with pytest.raises(SystemExit, match=r"holds runs of .*2.*: expected .*3"):
        scripts.pages.results_of(args, "x", {"steps": 3})


def test_an_unknown_study_is_refused_by_name(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scripts.stage_one.main(["mask_from"])
    assert "mask_form" in capsys.readouterr().err


def test_an_answer_is_right_exactly_where_greedy_decoding_gives_it(scripts: Any, work: Path) -> None:
    pictures = scripts.pictures
    pg = paligemma.load("tiny", device="cpu")
    pool = pictures.exam_pool(work / "tiny", replace(pictures.QUICK, held_out=120), TINY.vision.resolution)
    rows = [asked[0] for asked in pool.rows]
    said = pg.generate([[picture] for picture in pool.pixels], [prefix for _, prefix, _ in rows], max_new_tokens=48)
    by_kind: dict[str, list[bool]] = {}
    for (kind, _, suffix), answer in zip(rows, said, strict=True):
        by_kind.setdefault(kind, []).append(answer.text == suffix)
    found = scripts.small.judge(pg, scripts.small.exam_of(pool, pg))
    assert found["exact"] == {kind: float(np.mean(hits)) for kind, hits in by_kind.items()}
    assert 0 < found["score"] < 1  # or the test would show nothing
    assert found["places"] < 100


def test_masks_hide_what_they_say(scripts: Any, work: Path, untaught: Any) -> None:
    """Which slots notice that another picture, another first word or another last word of a prompt stands there."""
    small, model = scripts.small, untaught.model.eval()
    rng = np.random.default_rng(0)
    image, other = (rng.integers(0, 256, (84, 84, 3), dtype=np.uint8) for _ in range(2))
    other[:42] = image[:42]  # only the lower half is another
    n = STUDY.vision.n_image_tokens

    def hidden(form: str, picture: np.ndarray, prefix: str) -> torch.Tensor:
        batch = small.masked(untaught.processor([picture], prefix, "yes"), form)
        with torch.no_grad():
            embeds = model.embed_image(batch.pixels)
        if picture is other:  # the tower sees everything at once: only the decoder is asked here
            with torch.no_grad():
                embeds[:, : n // 2] = model.embed_image(untaught.processor([image], prefix, "yes").pixels)[:, : n // 2]
        with torch.no_grad():
            out: torch.Tensor = model.pre_logits(**batch.with_image_embeds(embeds).model_inputs())[0]
        return out

    def differs(form: str, a: tuple[np.ndarray, str], b: tuple[np.ndarray, str]) -> list[bool]:
        return (hidden(form, *a) - hidden(form, *b)).abs().amax(dim=-1).gt(1e-5).tolist()

    prompts = ("ocr <loc0000>", "ocr <loc0500>")
    whole, text, everywhere = (differs(f, (image, prompts[0]), (image, prompts[1])) for f in small.FORMS)
    assert all(whole)  # a later word of the prompt is seen by picture and prompt alike
    assert not any(text[: n + 1])
    assert not any(everywhere[: n + 1])
    assert text[-1]
    assert everywhere[-1]
    whole, text, everywhere = (differs(f, (image, prompts[0]), (other, prompts[0])) for f in small.FORMS)
    assert all(whole)
    assert all(text)  # image tokens see each other
    assert not any(everywhere[: n // 2])
    assert all(everywhere[n // 2 :])


def test_masks_mean_the_same_in_packed_rows(scripts: Any, untaught: Any) -> None:
    small, model = scripts.small, untaught.model.eval()
    rng = np.random.default_rng(1)
    pictures = [[rng.integers(0, 256, (84, 84, 3), dtype=np.uint8)] for _ in range(3)]
    given = (pictures, ["ocr", "caption en", "answer en how many circles?"], ["a", "red circle", "2"])
    for form in small.FORMS:
        losses = []
        for is_packed in (False, True):
            batch = untaught.processor(*given, padding_side="right", pack=is_packed, row_length=200)
            assert batch.is_packed == is_packed
            batch = small.masked(batch, form)
            keep = F.pad(batch.mask_loss[:, 1:], (0, 1))
            with torch.no_grad():
                logits = model(**batch.model_inputs(), keep=keep)
            losses.append(F.cross_entropy(logits, batch.tokens[:, 1:][batch.mask_loss[:, 1:]], reduction="sum"))
        assert torch.allclose(*losses, rtol=1e-4)


def test_a_loss_on_the_prompt_learns_all_text_but_its_first_token(scripts: Any, untaught: Any) -> None:
    batch = untaught.processor([np.zeros((84, 84, 3), np.uint8)], "caption en", "a red circle")
    targets = batch.tokens[scripts.ready.with_prefix(batch).mask_loss].tolist()
    text = batch.tokens[batch.mask_input & ~batch.mask_image].tolist()
    assert text[0] == STUDY.tokens.bos
    assert targets == text[1:]


def test_raw_patches_see_nothing_of_one_another(scripts: Any, work: Path) -> None:
    device = torch.device("cpu")
    pg = scripts.small.opened(scripts.small.stage0(work / "work", scripts.pictures.QUICK, device), device)
    scripts.ready.raw_patches(pg.model, 0)
    pixels = torch.zeros(2, 3, 84, 84)
    pixels[1, :, :14, :14] = 1.0
    with torch.no_grad():
        seen = pg.model.vision(pixels)
    assert (seen[0] - seen[1]).abs().amax(dim=-1).gt(1e-6).tolist() == [True] + [False] * 35


def test_every_picture_is_shown_once_in_an_order_of_the_seed(scripts: Any, work: Path) -> None:
    pictures = scripts.pictures
    pool = pictures.stage1_pool(work / "work", pictures.QUICK)
    again = pictures.stage1_pool(work / "work", pictures.QUICK)  # read, not drawn
    assert np.array_equal(pool.pixels, again.pixels)
    assert pool.rows == again.rows
    rows = pictures.Rows(pool, np.array([2, 0, 1]), pictures.N_QUESTIONS)
    examples = [rows[i] for i in range(len(rows))]
    assert [example.suffix for example in examples] == [suffix for i in (2, 0, 1) for *_, suffix in pool.rows[i]]
    assert all(examples[i].images[0] is examples[i + 1].images[0] for i in range(len(rows)) if i % 5 < 4)


def test_tasks_of_transfers_are_answered_by_the_scene(scripts: Any) -> None:
    from paligemma.data.world import render, sample_scene

    rng, n_asked = np.random.default_rng(0), 0
    for seed in range(40):
        scene = sample_scene(seed, "plain")
        drawn = render(scene)
        for kind, prefix, suffix in scripts.pictures._largest(scene, drawn, rng, 0):
            n_asked += 1
            assert (kind, prefix) == ("largest", scripts.pictures.PROMPTS["largest"])
            areas = {i: drawn.masks[i].sum() for i in scene.shapes}
            assert suffix == scene.things[max(areas, key=areas.__getitem__)].colour
        ((_, prefix, suffix),) = scripts.pictures._colours(scene, drawn, rng, 0)
        colour = prefix.split()[4]
        assert int(suffix) == sum(thing.colour == colour for thing in scene.things)
    assert n_asked > 5


def test_intervals_are_students_and_verdicts_follow_from_them(scripts: Any) -> None:
    pages = scripts.pages
    mean, half = pages.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)  # t of two degrees of freedom
    assert math.isnan(pages.interval([1.0])[1])
    base = [0.5, 0.6, 0.7]
    assert pages.change(base, [b + 0.1 + e for b, e in zip(base, (0.0, 0.01, -0.01), strict=True)])[0] == "higher"
    assert pages.change(base, [b - 0.1 + e for b, e in zip(base, (0.0, 0.01, -0.01), strict=True)])[0] == "lower"
    assert pages.change(base, [0.4, 0.6, 0.8])[0] == "not seen"
    assert pages.change([0.5], [0.9])[0] == "unknown"
    values = {"a": base, "b": [b - 0.1 for b in base], "c": [0.4, 0.6, 0.8], "d": [b + 0.1 for b in base]}
    reported = {"b": "slightly lower", "c": "lower", "d": "lower"}
    told = pages.compare(values, dict.fromkeys(reported, "a"), reported, "right", "a report").splitlines()[2:]
    assert told == [
        "- *b* against *a*: -0.100 ± 0.000: lower. The report: slightly lower; as here.",
        "- *c* against *a*: +0.000 ± 0.248: no difference seen. The report: lower; neither confirmed nor contradicted "
        "here, where 0.248 lower would be possible.",
        "- *d* against *a*: +0.100 ± 0.000: higher. The report: lower; the opposite of what is seen here.",
    ]
    higher = {"a": [0.50, 0.52, 0.54], "b": [0.515, 0.52, 0.57]}  # +0.015 ± 0.037: a fall is possible by the difference
    told = pages.compare(higher, {"b": "a"}, {"b": "lower"}, "right", "a report")
    assert told.endswith("where 0.022 lower would be possible.")
    assert pages.verdict("not seen", "the same", "0.02") == "here at most 0.02 either way"
    assert pages.verdict("lower", "the same", "0.02") == "not what is seen here"
    assert pages.verdict("unknown", "the same", "nan") == "one seed decides nothing"


def test_a_page_says_the_command_that_goes_on_from_its_results(scripts: Any) -> None:
    """Threads are a part of what results are known by: the command without them would be refused."""
    parser = scripts.pages.parser_of("", ["a"])
    parser.add_argument("--lr", type=float, default=3e-4)
    threads = torch.get_num_threads()
    try:
        args = scripts.pages.parsed(parser, ["--threads", "1", "--lr", "1e-3", "--seeds", "4"])
    finally:
        torch.set_num_threads(threads)
    assert scripts.pages.repeat(args, "s.py", "a") == "python studies/s.py a --seeds 4 --threads 1 --lr 0.001"
    plain = scripts.pages.parsed(parser, [])
    assert scripts.pages.repeat(plain, "s.py", "a") == "python studies/s.py a"


def test_a_run_that_is_stopped_leaves_nothing(scripts: Any, work: Path, untaught: Any) -> None:
    """A half-taught model must not be judged, or taken for a whole one later."""
    import os
    import signal

    small, pictures = scripts.small, scripts.pictures
    pool = pictures.stage1_pool(work / "work", pictures.QUICK)

    def stopped(batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return batch

    pg = small.opened(small.stage0(work / "work", pictures.QUICK, torch.device("cpu")), torch.device("cpu"))
    with pytest.raises(SystemExit, match="nothing is kept"):
        small.stage1(pg, pool, small.Arm(of_batch=stopped), pictures.QUICK, seed=0)


def test_parts_that_are_reset_begin_as_they_did_before_stage_0(scripts: Any, work: Path) -> None:
    device = torch.device("cpu")
    pg = scripts.small.opened(scripts.small.stage0(work / "work", scripts.pictures.QUICK, device), device)
    before = {name: tensor.clone() for name, tensor in pg.model.state_dict().items()}
    scripts.stage_one.reset_tower(pg.model, 1)
    scripts.stage_one.reset_decoder(pg.model, 1)
    after = pg.model.state_dict()
    tokens = pg.model.config.tokens
    table = "text.embedding.weight"
    places = slice(tokens.loc_start, tokens.loc_start + tokens.n_loc)
    one, other = (F.normalize(weights[table][places], dim=1) for weights in (before, after))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(before[table][: tokens.loc_start], after[table][: tokens.loc_start])
    fresh = PaliGemmaModel(STUDY)
    from paligemma.recipes.tiny.patches import position_waves

    position_waves(fresh.vision)
    assert torch.equal(after["vision.position_embedding"], fresh.vision.position_embedding)


def test_trials_leave_nothing_where_runs_look(scripts: Any) -> None:
    parser = scripts.pages.parser_of("", ["a"])
    quick, whole = (scripts.pages.parsed(parser, words) for words in (["--quick"], []))
    assert whole.work == Path("runs/studies")
    assert whole.work not in (quick.work, *quick.work.parents)
    assert scripts.pages.DOCS not in (quick.out, *quick.out.parents)
    assert not quick.sizes.is_whole_stage0
    assert whole.sizes.is_whole_stage0


def test_seeds_draw_other_examples_even_of_the_most(scripts: Any) -> None:
    bench = scripts.bench
    rows = np.arange(bench.POOL * bench.N_EXAMPLES[-1])
    first, second = (set(bench.subset(rows, bench.N_EXAMPLES[-1], seed).tolist()) for seed in (0, 1))
    assert len(first & second) < 0.5 * len(first)
