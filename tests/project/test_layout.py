"""Check that imports point from the upper packages to the lower ones only, and form no circle."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "bupo"
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))

# from the top floor down: a room imports from its own floor's rooms below it in this list only, or from lower floors
FLOORS = [
    ("cli",),
    ("experiments", "planning"),
    ("training",),
    ("analysis", "evaluation"),
    ("reports", "generation"),
    ("models", "data", "rewards"),
    ("run_files",),
    ("options",),
    ("utils", "version"),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    return path.parts[0].removesuffix(".py")


def imports(path):
    """Rooms that a file imports from, wherever in the file; not for types alone."""
    tree = ast.parse((SOURCE / path).read_text())
    types_only = {
        inner for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        if node in types_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bupo."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "bupo":
            yield from (alias.name for alias in node.names if alias.name in FLOOR)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bupo."))
            if any(alias.name == "bupo" for alias in node.names):
                yield FLOORS[0][0]  # the face of the whole house


@pytest.mark.parametrize("path", [path for path in FILES if len(path.parts) > 1 or path.stem in FLOOR], ids=str)
def test_imports_point_down(path):
    mine = FLOOR[room_of(path)]
    up = {room for room in imports(path) if FLOOR[room] < mine}
    assert not up, f"{path} imports from above: {', '.join(sorted(up))}"


def test_rooms_form_no_circle():
    arrows = {}
    for path in FILES:
        arrows.setdefault(room_of(path), set()).update(room for room in imports(path) if room != room_of(path))
    done = set()

    def visit(room, trail):
        assert room not in trail, " -> ".join([*trail, room])
        if room not in done:
            for other in arrows.get(room, ()):
                visit(other, [*trail, room])
            done.add(room)

    for room in arrows:
        visit(room, [])


def test_prompts_and_answers_are_joined_in_one_place():
    joining = [
        str(path)
        for path in FILES
        if '["completion_ids"]' in (SOURCE / path).read_text() and "torch.cat" in (SOURCE / path).read_text()
    ]
    assert joining == ["training/objective/rollout_batch.py"]
