"""`paligemma plan`: numbers without a model, and one line for every mistake."""

import json
import re

import pytest
import yaml

from paligemma.cli.main import main
from paligemma.presets import EMBEDDED, MODEL_PRESETS

WORDS = ["plan", "transfer", "--model", "paligemma2-3b-pt-224"]


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main([*WORDS, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_weights_gradients_and_moments_are_those_of_the_arithmetic(capsys):
    n = 3_032_094_960
    plan = planned(capsys, "--device", "h100", "--method", "full", "--set", "loader.part_size=1")
    assert plan["parameters"] == plan["trained"] == n
    memory = plan["memory_bytes"]
    assert memory["weights"] == 4 * n
    assert memory["moments"] == 8 * n
    assert plan["fits"] is (memory["total"] <= memory["available"])
    shared = planned(capsys, "--device", "h100", "--method", "full", "--devices", "8", "--set", "strategy=fsdp")
    assert shared["memory_bytes"]["moments"] == n
    lora = planned(capsys, "--device", "h100", "--method", "lora")
    assert lora["memory_bytes"]["weights"] == pytest.approx(2 * n + 4 * lora["trained"], rel=1e-6)
    qlora = planned(capsys, "--device", "h100", "--method", "qlora")
    assert qlora["memory_bytes"]["weights"] < 0.5 * lora["memory_bytes"]["weights"]


def test_recomputation_saves_memory_and_costs_time(capsys):
    words = ["--device", "h200", "--method", "full", "--set", "loader.batch_size=16"]
    plain = planned(capsys, *words)
    again = planned(capsys, *words, "--set", "recompute=true")
    assert again["memory_bytes"]["activations"] < 0.3 * plain["memory_bytes"]["activations"]
    assert again["step_s"] > plain["step_s"]
    assert again["largest_part"] > plain["largest_part"]


def test_total_time_and_cost_follow_from_the_step(capsys):
    plan = planned(capsys, "--device", "h100", "--devices", "4", "--examples", "1600", "--price", "3", "--epochs", "5")
    assert plan["steps"] == 1600 * 5 / 8
    assert plan["total_s"] == pytest.approx(plan["steps"] * plan["step_s"])
    assert plan["cost"] == pytest.approx(plan["total_s"] / 3600 * 3 * 4)


@pytest.mark.parametrize(
    ("words", "image_tokens", "steps"),
    [
        (["stage1", "--model", "paligemma2-3b-pt-224"], 256, 122_070),
        (["stage2_448", "--model", "paligemma2-3b-pt-224"], 1024, 6104),
        (["stage2_896", "--model", "paligemma2-3b-pt-448", "--steps", "9"], 4096, 9),
        (["transfer.msrvtt_cap", "--examples", "5000"], 16 * 256, 5000 * 20 / 128),
        (["transfer.nlvr2", "--model", "paligemma2-3b-pt-448"], 2 * 1024, None),
        (["transfer.notebook", "--model", "paligemma2-3b-pt-224", "--examples", "80"], 256, 64),
        (["transfer.notebook", "--model", "tiny", "--examples", "80", "--epochs", "2"], 64, 20),
    ],
)
def test_what_a_recipe_sees_and_how_long_it_lasts_is_planned(words, image_tokens, steps, capsys):
    assert main(["plan", *words, "--device", "h200", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["image_tokens"], plan["steps"]) == (image_tokens, None if steps is None else round(steps))


def test_fields_of_a_stage_can_be_set_and_what_follows_from_them_follows(capsys):
    words = ["train", "stage1", "--model", "paligemma2-3b-pt-224", "--show", "--set", "image_ramp=5000000"]
    assert main(words) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["optim"]["schedules"][0][1]["warmup"]["examples"] == 5_000_000
    assert main(["train", "stage1", "--model", "tiny", "--show", "--set", "image_rampp=1"]) == 2
    assert "image_ramp" in capsys.readouterr().err


def test_fields_and_columns_are_added_to_a_recipe_and_not_put_in_its_place(capsys, tmp_path):
    words = [
        "--set",
        "task_fields=[[n_absent, 1]]",
        "--set",
        "data_options=[[streaming, true], [columns, [[image, x]]]]",
    ]
    more = ["--task-field", "order=raster", "--column", "suffix={answer}", "--column", "prefix=answer en {question}"]
    assert main(["train", "transfer", "--data", "d", "--task", "detect", *words, *more, "--show"]) == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert shown["task_fields"] == [["n_absent", 1], ["order", "raster"]]
    columns = [["image", "x"], ["suffix", "{answer}"], ["prefix", "answer en {question}"]]
    assert shown["data_options"] == [["streaming", True], ["columns", columns]]
    (tmp_path / "r.yaml").write_text(text)
    assert main(["train", str(tmp_path / "r.yaml"), "--column", "image=y", "--show"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)["data_options"]
    assert again == [["streaming", True], ["columns", [["image", "y"], *columns[1:]]]]
    assert main(["train", "transfer", "--data", "d", "--task-field", "order", "--show"]) == 2
    assert "expected NAME=VALUE" in capsys.readouterr().err


def test_the_largest_batch_fits_and_one_more_does_not(capsys):
    words = ["--device", "l40s", "--method", "lora"]
    most = planned(capsys, *words)["largest_part"]
    for n, fits in ((most, True), (most + 1, False)):
        sizes = ["--set", f"loader.batch_size={n}", "--set", f"loader.part_size={n}"]
        assert planned(capsys, *words, *sizes)["fits"] is fits


def test_every_published_size_can_be_planned_by_its_hub_name(capsys):
    for name, config in MODEL_PRESETS.items():
        if name in EMBEDDED:
            continue
        size, resolution = name.rsplit("-", 1)
        assert (
            main(["plan", "transfer", "--model", f"google/{size}-pt-{resolution}", "--device", "h200", "--json"]) == 0
        )
        plan = json.loads(capsys.readouterr().out)
        assert plan["text_tokens"] == 129, (name, config.name)


def test_what_does_not_fit_is_answered_with_what_does(capsys):
    assert main([*WORDS, "--device", "rtx4090", "--method", "full"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"It does not fit: .*What fits, best first: method=lora", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*WORDS, "--device", "h10"], "Did you mean 'h100'"),
        ([*WORDS, "--device", "h100", "--devices", "0"], "expected at least 1"),
        (["plan", "transfr"], "Did you mean 'transfer'"),
        (["plan", "transfer", "--model", "/nowhere/at/all", "--device", "h100"], "nowhere"),
    ],
)
def test_mistakes_are_answered_in_one_line(words, message, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_recipe_is_shown_only_if_its_task_exists(capsys):
    words = ["train", "transfer", "--model", "tiny", "--show", "--task"]
    assert main([*words, "detect"]) == 0
    capsys.readouterr()
    assert main([*words, "detct"]) == 2
    assert "Did you mean 'detect'" in capsys.readouterr().err
    assert main([*words, "detect", "--task-field", "n_absnt=1"]) == 2
    assert "n_absent" in capsys.readouterr().err


def test_the_part_that_is_advised_fits_and_one_more_does_not(capsys):
    """A whole batch of 256 in one part adds no gradients up; cut into parts it does, which takes memory of its own."""
    words = ["plan", "transfer.vqav2", "--model", "paligemma2-3b-pt-224", "--device", "h100"]
    assert main(words) == 0
    advised = int(re.search(r"best first: loader\.part_size=(\d+) ", capsys.readouterr().out)[1])
    for n, fits in ((advised, True), (advised + 1, False)):
        assert main([*words, "--set", f"loader.part_size={n}", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["fits"] is fits
