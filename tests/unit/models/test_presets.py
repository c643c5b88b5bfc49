"""Every published size has the number of parameters that its report and its checkpoint have."""

import pytest
import torch

from paligemma.models.gemma import GemmaDecoder
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.models.siglip import SiglipTower
from paligemma.presets import HF_TABLE_ROWS, MODEL_PRESETS, N_TOKENS, TEXT_PRESETS, VISION_PRESETS, with_table_rows

COUNTS = {  # rows of the table -> model -> parameters at 224, 448, 896
    N_TOKENS: {
        "paligemma-3b": (2_923_335_408, 2_924_220_144, 2_927_759_088),
        "paligemma2-3b": (3_032_094_960, 3_032_979_696, 3_036_518_640),
        "paligemma2-10b": (9_662_409_456, 9_663_294_192, 9_666_833_136),
        "paligemma2-28b": (27_650_192_112, 27_651_076_848, 27_654_615_792),
    },
    HF_TABLE_ROWS: {
        "paligemma-3b": (2_923_466_480, 2_924_351_216, 2_927_890_160),
        "paligemma2-3b": (3_032_242_416, 3_033_127_152, 3_036_666_096),
        "paligemma2-10b": (9_662_638_832, 9_663_523_568, 9_667_062_512),
        "paligemma2-28b": (27_650_487_024, 27_651_371_760, 27_654_910_704),
    },
}
CASES = [
    (rows, f"{model}-{resolution}", count)
    for rows, models in COUNTS.items()
    for model, counts in models.items()
    for resolution, count in zip((224, 448, 896), counts, strict=True)
]


def n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("rows", "name", "count"), CASES)
def test_a_preset_has_the_published_number_of_parameters(rows: int, name: str, count: int) -> None:
    config = with_table_rows(MODEL_PRESETS[name], rows)
    assert n_parameters(PaliGemmaModel(config, device="meta")) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gemma-2b", 2_506_172_416),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-2-27b", 27_227_128_320),
    ],
)
def test_a_raw_gemma_has_the_published_number_of_parameters(name: str, count: int) -> None:
    assert n_parameters(GemmaDecoder(TEXT_PRESETS[name], device=torch.device("meta"))) == count


@pytest.mark.parametrize(
    ("resolution", "count"), [(224, 412_442_352), (384, 412_987_248), (448, 413_327_088), (896, 416_866_032)]
)
def test_a_raw_siglip_tower_has_the_published_number_of_parameters(resolution: int, count: int) -> None:
    config = VISION_PRESETS[f"siglip-so400m-patch14-{resolution}"]
    assert n_parameters(SiglipTower(config, device=torch.device("meta"))) == count


def test_image_tokens_per_resolution_are_those_of_the_report() -> None:
    tokens = {r: MODEL_PRESETS[f"paligemma2-3b-{r}"].vision.n_image_tokens for r in (224, 448, 896)}
    assert tokens == {224: 256, 448: 1024, 896: 4096}
    assert VISION_PRESETS["siglip-so400m-patch14-384"].n_image_tokens == 27 * 27
