"""The shape of the code, checked by reading it: who imports whom, how long things are, that methods are values."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlhf_cli"
CONF = ROOT / "conf"
FILES = sorted(PACKAGE.rglob("*.py"))
OPTIONS = sorted(p for p in CONF.rglob("*.yaml") if p.parent != CONF)
PURE_FOLDERS = ("objectives", "credit", "shaping")
PURE_FILES = ("reduce.py", "kl.py", "select.py", "correction.py", "combine.py")
PURE_IMPORTS = ("types", "inject", "objectives", "credit", "shaping", "reduce", "kl", "select", "correction", "combine")
STDLIB = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "typing"}
LONG_FUNCTIONS = {"wiring.make_run": 100, "loop.train": 80}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a tree; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """What importing the module imports: not what functions import when called, nor what only the type checker sees."""
    for node in tree.body:
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.Import | ast.ImportFrom | ast.If | ast.Try) and not typing_only:
            yield from imports(node)


def pure() -> list[Path]:
    inside = [p for folder in PURE_FOLDERS for p in sorted((PACKAGE / folder).glob("*.py"))]
    return inside + [PACKAGE / f for f in PURE_FILES]


@pytest.mark.parametrize("path", pure(), ids=name_of)
def test_pure_ring_imports_only_torch_and_itself(path: Path) -> None:
    for name in imports(parse(path)):
        top, *rest = name.split(".")
        allowed = top == "torch" or top in STDLIB or (top == "rlhf_cli" and rest[0] in PURE_IMPORTS)
        assert allowed, f"{name_of(path)} imports {name}"
        assert not name.startswith("torch.distributed"), f"{name_of(path)}: no collective in the pure ring"


@pytest.mark.parametrize("path", pure(), ids=name_of)
def test_pure_ring_never_leaves_the_device(path: Path) -> None:
    calls = [n.attr for n in ast.walk(parse(path)) if isinstance(n, ast.Attribute)]
    assert not {"item", "tolist", "numpy"} & set(calls)


def test_loop_knows_only_the_vocabulary() -> None:
    path = PACKAGE / "loop.py"
    ours = {name.split(".")[1] for name in imports(parse(path)) if name.startswith("rlhf_cli.")}
    assert ours <= {"types", "inject"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, f"{path} is too long: split it"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            limit = LONG_FUNCTIONS.get(f"{name_of(path)}.{node.name}", 60)
            assert lines <= limit, f"{name_of(path)}.{node.name} has {lines} lines, {limit} are allowed"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_branch_on_a_method_name(path: Path) -> None:
    methods = {p.stem for p in CONF.glob("algo/*.yaml")}
    assert "grpo" in methods
    found = [text for node in ast.walk(parse(path)) for text in compared(node) if text in methods]
    assert not found, f"{name_of(path)} compares with {found}: a method is a value in conf/algo, never a branch"


def compared(node: ast.AST) -> Iterator[str]:
    """String constants that a comparison or a match case tests against."""
    if isinstance(node, ast.Compare):
        parts: list[ast.AST] = [node.left, *node.comparators]
    elif isinstance(node, ast.MatchValue):
        parts = [node.value]
    else:
        return
    for part in parts:
        yield from (n.value for n in ast.walk(part) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = {"torch", "hydra", "omegaconf", "transformers", "datasets", "deepspeed", "yaml", "rich", "numpy"}
    todo, seen = ["rlhf_cli.cli"], set()
    while todo:
        module = todo.pop()
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        for name in at_import_time(parse(path)):
            assert name.split(".")[0] not in heavy, f"{module} imports {name}"
            todo += [name, name.rpartition(".")[0]]
    assert {"rlhf_cli.usage", "rlhf_cli.errors"} <= seen


def test_every_package_is_shipped() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {"rlhf_cli." + name_of(p.parent) for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE}
    assert set(tool["packages"]) == packages | {"rlhf_cli", "rlhf_cli.conf"}
    assert not [p for p in FILES if not (p.parent / "__init__.py").exists()]
    for package, patterns in tool["package-data"].items():
        folder = ROOT / tool["package-dir"].get(package, package.replace(".", "/"))
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"package-data {package}: {pattern} matches nothing"


@pytest.mark.parametrize("path", OPTIONS, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_options_are_short_and_say_what_they_are(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    limit = {"algo": 25, "experiment": 30, "launcher": 16, "debug": 20}.get(path.parent.name, 12)
    assert len(lines) <= limit, f"{path} has {len(lines)} lines, {limit} are allowed"
    # Hydra reads the header only down to the first line that is not one, and ignores it below without a word.
    assert not [i for i, line in enumerate(lines) if line.startswith("# @package") and i > 0], "# @package is line 1"
    about = next((line for line in lines if not line.startswith("# @package")), "")
    assert about.startswith("# ") and len(about) > 3, "the first comment line says what the option is"


@pytest.mark.parametrize("verb", ["train", "eval", "generate", "score"])
def test_primary_configs_let_options_win(verb: str) -> None:
    lines = [x.strip() for x in (CONF / f"{verb}.yaml").read_text(encoding="utf-8").splitlines()]
    # With _self_ last, keys of the primary config would silently beat every option.
    assert lines[1:4] == ["defaults:", "- run_schema", "- _self_"]


def test_every_key_has_a_comment() -> None:
    from rlhf_cli.catalog import GROUPS, fields

    bare = [key for key, f in fields().items() if not f.doc and key not in GROUPS]
    assert not bare, f"config.py: no comment behind {bare}"
