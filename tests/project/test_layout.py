"""Check that imports point only from upper to lower packages, without cycles."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "bupo"
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))

# from top to bottom: a package imports only from lower levels, and without cycles from its own level
LEVELS = [
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
LEVEL = {package: number for number, packages in enumerate(LEVELS) for package in packages}


def package_of(path):
    return path.parts[0].removesuffix(".py")


def imports(path):
    """Yield the packages that a file imports from, anywhere in the file, except imports for types."""
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
            yield from (alias.name for alias in node.names if alias.name in LEVEL)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bupo."))
            if any(alias.name == "bupo" for alias in node.names):
                yield LEVELS[0][0]  # the package's exports import everything


@pytest.mark.parametrize("path", [path for path in FILES if len(path.parts) > 1 or path.stem in LEVEL], ids=str)
def test_imports_point_down(path):
    level = LEVEL[package_of(path)]
    up = {package for package in imports(path) if LEVEL[package] < level}
    assert not up, f"{path} imports from upper packages: {', '.join(sorted(up))}"


def test_packages_form_no_cycle():
    arrows = {}
    for path in FILES:
        arrows.setdefault(package_of(path), set()).update(
            package for package in imports(path) if package != package_of(path)
        )
    done = set()

    def visit(package, trail):
        assert package not in trail, " -> ".join([*trail, package])
        if package not in done:
            for other in arrows.get(package, ()):
                visit(other, [*trail, package])
            done.add(package)

    for package in arrows:
        visit(package, [])


def test_prompts_and_answers_are_joined_in_one_place():
    joining = [
        str(path)
        for path in FILES
        if '["completion_ids"]' in (SOURCE / path).read_text() and "torch.cat" in (SOURCE / path).read_text()
    ]
    assert joining == ["training/objective/rollout_batch.py"]
