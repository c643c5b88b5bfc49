"""The pages say what is so: links lead somewhere, code parses, names exist, sizes are those of the presets."""

import ast
import re
from itertools import product
from pathlib import Path

import pytest

from paligemma.cli.main import VERBS
from paligemma.config import PaliGemmaConfig
from paligemma.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_leads_to_a_file(page: Path):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_python_block_parses(page: Path):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        ast.parse(block)


def test_every_page_is_in_the_index():
    index = "".join((ROOT / "docs" / name).read_text() for name in ("README.md", "decisions/README.md"))
    pages = [path for path in PAGES if (ROOT / "docs") in path.parents and path.name != "README.md"]
    assert [page.name for page in pages if f"{page.name})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_command_line_uses_a_verb_that_exists(page: Path):
    verbs = re.findall(r"^(?:    |\$ )paligemma ([a-z]\w*)", page.read_text(), flags=re.MULTILINE)
    assert set(verbs) <= set(VERBS)


def test_every_make_target_in_the_pages_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", page.read_text(), flags=re.MULTILINE)
        assert set(named) <= targets, page


def expanded(cell: str) -> list[str]:
    """`a-{1,2}` → a-1, a-2."""
    parts = [part.split(",") for part in re.split(r"[{}]", cell)]
    return ["".join(choice) for choice in product(*parts)]


def test_the_page_of_models_names_every_preset_and_no_other():
    page = (ROOT / "docs" / "models.md").read_text()
    table = page[page.index("| preset |") : page.index("Published checkpoints")]
    named = [name for cell in re.findall(r"`([^`]+)`", table) for name in expanded(cell)]
    assert sorted(named) == sorted(PRESETS)


@pytest.mark.parametrize(
    ("column", "preset"),
    [(1, "paligemma-3b-224"), (2, "paligemma2-3b-224"), (3, "paligemma2-10b-224"), (4, "paligemma2-28b-224")],
)
def test_the_table_of_decoders_agrees_with_the_presets(column: int, preset: str):
    page = (ROOT / "docs" / "models.md").read_text()
    config = PRESETS[preset]
    assert isinstance(config, PaliGemmaConfig)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    cells = {row[0]: row[column] for row in rows if len(row) == 5}
    text = config.text
    assert cells["`width`"] == str(text.width)
    assert cells["`depth`"] == str(text.depth)
    assert cells["`mlp_dim`, gate and up each"] == str(text.mlp_dim)
    assert cells["`n_heads` / `n_kv_heads`"] == f"{text.n_heads} / {text.n_kv_heads}"
    assert cells["`head_dim`"] == str(text.head_dim)
    assert cells["query scale"] == f"{text.query_pre_attn_scalar}^-½"
    caps = f"{text.attn_logits_softcap:g} / {text.final_logits_softcap:g}" if text.attn_logits_softcap else "–"
    assert cells["attention cap / final cap"] == caps
    assert cells["norms per block"] == ("4" if text.post_norms else "2")


@pytest.mark.parametrize(
    ("page", "name"), [("README.md", "tiny"), ("docs/tiny.md", "tiny"), ("docs/tiny.md", "tiny-hi")]
)
def test_the_scores_of_the_embedded_models_are_those_beside_their_weights(page: str, name: str):
    card = (ROOT / "paligemma" / "assets" / name / "README.md").read_text()
    (table,) = re.findall(r"```\n(held-out.*?)```", card, flags=re.DOTALL)
    assert table in (ROOT / page).read_text()
