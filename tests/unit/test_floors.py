"""The floor plan of the package: draws it, and points at every import arrow that goes up.

Floor 0 holds words, floor 6 the doors. A folder may import every floor below it; folders side by side do not know each
other. The plan below is the one in CONTRIBUTING.md; a new folder or top-level file has to be given its floor here.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "paligemma"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "config", "lazy", "presets", "results"),
    ("models", "processing", "tasks", "metrics"),
    ("checkpoints", "data"),
    ("engine", "train"),
    ("api", "evals", "interop", "draw"),
    ("recipes",),
    ("cli", "demo", "__main__"),
)
GROUND_FLOOR = FLOORS[0]  # its files may use one another; rooms of other floors are closed to their neighbours
FACADE = "__init__"  # `import paligemma`: shows the public names, so only recipes and doors may come in that way
FACADE_FLOOR = 4.5

CORE = {"torch", "numpy", "PIL", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub", "tqdm", "yaml"}
# What a room may need besides the standard library, where that is less than the core dependencies.
DIET: dict[str, set[str]] = {
    **{room: {"numpy"} for room in GROUND_FLOOR},
    "models": {"numpy", "torch"},
    "tasks": {"numpy", "PIL"},  # PIL: pasting a 64×64 mask is defined by Pillow's bilinear resize
    "metrics": {"numpy"},
    "draw": {"numpy", "PIL"},
}
HEAVY = {
    "transformers", "peft", "accelerate", "matplotlib", "supervision", "pandas", "scipy", "sklearn", "cv2", "fontTools",
    "pycocotools", "torchvision", "datasets", "pyarrow", "av", "fsspec", "webdataset",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One import statement: who, whom, where, and whether it runs when the module is loaded."""

    importer: str  # dotted path below the package: "models.gemma"; "__init__" for the facade
    target: str  # dotted path below the package, or the top name of a foreign package
    line: int
    is_ours: bool
    at_load: bool


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package → file; a folder's __init__ stands under the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def imports(package: Path) -> Iterator[Import]:
    """Every import statement of the package, also those inside functions and under TYPE_CHECKING."""
    known = modules(package)
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        lazy = {id(inner) for outer in ast.walk(tree) if _defers(outer) for inner in ast.walk(outer)}
        for node in ast.walk(tree):
            for target in _targets(node, name, path, package.name, known):
                is_ours = target.split(".")[0] == package.name
                short = target.removeprefix(package.name).lstrip(".") or FACADE if is_ours else target.split(".")[0]
                yield Import(name, short, node.lineno, is_ours, id(node) not in lazy)  # type: ignore[attr-defined]


def _defers(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _targets(node: ast.AST, name: str, path: Path, root: str, known: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        here = (
            [root, *name.split(".")] if path.name == "__init__.py" and name != FACADE else [root, *name.split(".")[:-1]]
        )
        here = here[: len(here) - (node.level - 1)]
        base = ".".join([*here, *([base] if base else [])])
    if base.split(".")[0] != root:
        return [base]
    # `from paligemma.models import gemma` names a module, `from paligemma.errors import ShapeError` does not.
    inner = base.removeprefix(root).lstrip(".")
    joined = [f"{inner}.{alias.name}".lstrip(".") for alias in node.names]
    return [f"{root}.{j}" if j in known else base for j in joined]


def floor_of(name: str) -> float:
    room = name.split(".")[0]
    if room == FACADE:
        return FACADE_FLOOR
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    raise LookupError(f"paligemma/{room} has no floor: give it one in FLOORS of {Path(__file__).name}.")


def upward_arrows(package: Path) -> list[str]:
    """Every import that does not go down, as a sentence."""
    wrong = []
    for arrow in imports(package):
        if not arrow.is_ours or arrow.importer == FACADE:
            continue
        room, other = arrow.importer.split(".")[0], arrow.target.split(".")[0]
        here, there = floor_of(arrow.importer), floor_of(arrow.target)
        if room == other or there < here or (room in GROUND_FLOOR and other in GROUND_FLOOR):
            continue
        way = "up to" if there > here else "sideways to"
        wrong.append(
            f"{arrow.importer} (floor {here:g}), line {arrow.line}, goes {way} {arrow.target} (floor {there:g})"
        )
    return wrong


def picture(package: Path) -> str:
    """The house as text, top floor first, with what each room imports."""
    uses: dict[str, set[str]] = {}
    for arrow in imports(package):
        room = arrow.importer.split(".")[0]
        uses.setdefault(room, set())
        if arrow.is_ours and arrow.target.split(".")[0] != room:
            uses[room].add(arrow.target.split(".")[0])
    rows = [
        f"  {floor}  {room:<12} → {', '.join(sorted(uses[room])) or '·'}"
        for floor, rooms in reversed(list(enumerate(FLOORS)))
        for room in rooms
        if room in uses
    ]
    return "\n".join(["floor", *rows])


def circles(package: Path) -> list[str]:
    """Modules that import each other in a ring when they are loaded."""
    graph: dict[str, set[str]] = {name: set() for name in modules(package)}
    for arrow in imports(package):
        if arrow.is_ours and arrow.at_load and arrow.target in graph and arrow.target != arrow.importer:
            graph[arrow.importer].add(arrow.target)
    done: set[str] = set()
    found = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" → ".join((*trail[trail.index(name) :], name)))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return found


def test_every_arrow_points_down():
    wrong = upward_arrows(PACKAGE)
    assert not wrong, "\n".join(["imports that do not go down:", *wrong, "", picture(PACKAGE)])


def test_nobody_goes_round_in_circles():
    assert not circles(PACKAGE)


def test_rooms_import_only_what_their_floor_allows():
    fat = [
        f"{arrow.importer}, line {arrow.line}: {arrow.target}"
        for arrow in imports(PACKAGE)
        if not arrow.is_ours
        and arrow.at_load
        and arrow.target not in sys.stdlib_module_names
        and arrow.target not in DIET.get(arrow.importer.split(".")[0], CORE)
    ]
    assert not fat, "\n".join(["at load, a module may import the core dependencies only, some rooms fewer:", *fat])


def test_importing_the_package_leaves_optional_packages_alone():
    code = "import json, sys, paligemma; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert HEAVY.isdisjoint(json.loads(done.stdout))


@pytest.fixture
def crooked_house(tmp_path: Path) -> Path:
    """A package with one arrow up, one sideways and one circle."""
    files = {
        "errors.py": "import json\n",
        "models/__init__.py": "",
        "models/gemma.py": "from paligemma.errors import X\nfrom paligemma.api import load\nfrom . import rope\n",
        "models/rope.py": "from .gemma import Y\n",
        "tasks/__init__.py": "def f():\n    from paligemma.models import gemma\n",
        "api.py": "from paligemma import errors, models\n",
    }
    for name, text in files.items():
        path = tmp_path / "paligemma" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "paligemma"


def test_this_test_sees_arrows_that_go_up_or_sideways(crooked_house: Path):
    assert upward_arrows(crooked_house) == [
        "models.gemma (floor 1), line 2, goes up to api (floor 4)",
        "tasks (floor 1), line 2, goes sideways to models.gemma (floor 1)",
    ]


def test_this_test_sees_circles(crooked_house: Path):
    assert circles(crooked_house) == ["models.gemma → models.rope → models.gemma"]


def test_a_room_without_a_floor_is_asked_for_one(crooked_house: Path):
    (crooked_house / "attic.py").write_text("import paligemma.errors\n")
    with pytest.raises(LookupError, match="paligemma/attic has no floor"):
        upward_arrows(crooked_house)


def test_the_picture_shows_every_room_on_its_floor(crooked_house: Path):
    assert picture(crooked_house).splitlines() == [
        "floor",
        "  4  api          → errors, models",
        "  1  models       → api, errors",
        "  1  tasks        → models",
        "  0  errors       → ·",
    ]
