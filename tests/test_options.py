"""The options of the pure ring: each builds, documents its settings, and reaches every public function."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlhf_cli.correction
import rlhf_cli.credit
import rlhf_cli.objectives
import rlhf_cli.shaping
from rlhf_cli.config import build, check_node
from rlhf_cli.inject import is_rowwise
from rlhf_cli.signature import signature
from rlhf_cli.types import COLUMNS, OUTPUTS

CONF = Path(__file__).parents[1] / "conf"
FILES = [
    p
    for g in ("objective", "credit", "correction", "reduce", "shaping", "select")
    for p in sorted((CONF / g).glob("*.yaml"))
]
each_option = pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")


def nodes(path: Path) -> list[dict[str, Any]]:
    """The option's targets; shapers lie under their name, so that several compose."""
    text = path.read_text().replace("${rollout.max_tokens}", "64").replace("${reward.environment.weight}", "1.0")
    option = yaml.safe_load(text) or {}
    if path.parent.name != "shaping":
        return [option] if option else []
    assert list(option) in ([], [path.stem]), "keyed by the option's name"
    return list(option.values())


@each_option
def test_builds_and_documents_itself(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 12
    assert all(len(line) <= 140 for line in lines)
    for node in nodes(path):
        assert callable(build(node, path.stem))
        sig, settings = check_node(node, path.stem)
        assert settings.keys() == sig.params.keys()
        undocumented = [p.name for p in sig.params.values() if not p.doc]
        assert not undocumented, f"{sig.target}: Args does not describe {undocumented}"


def test_only_none_is_empty() -> None:
    assert sorted(f"{p.parent.name}/{p.stem}" for p in FILES if not nodes(p)) == [
        "correction/none",
        "credit/none",
        "shaping/none",
    ]


@pytest.mark.parametrize(
    "package", [rlhf_cli.objectives, rlhf_cli.credit, rlhf_cli.correction, rlhf_cli.shaping], ids=lambda m: m.__name__
)
def test_every_public_function_is_reachable(package: Any) -> None:
    assert package.__all__ == sorted(package.__all__)
    reached = {node["_target_"].rpartition(".")[2] for p in FILES for node in nodes(p)}
    assert set(package.__all__) <= reached, f"no option for {set(package.__all__) - reached}"


PUBLIC = [
    getattr(m, n)
    for m in (rlhf_cli.objectives, rlhf_cli.credit, rlhf_cli.correction, rlhf_cli.shaping)
    for n in m.__all__
]


def documented(fn: Any) -> str:
    """The docs of a function, or of a class, how it is made and how it is called."""
    parts = [fn, *((fn.__init__, fn.__call__) if isinstance(fn, type) else ())]
    found = [inspect.getdoc(part) or "" for part in parts]
    return "\n".join(f.replace("\n", "\n    ") if f.startswith("Args:") else f for f in found)


def parameters(fn: Any) -> dict[str, inspect.Parameter]:
    """Columns and settings of a function, or of a class's calls and its making."""
    if not isinstance(fn, type):
        return dict(inspect.signature(fn).parameters)
    call = dict(inspect.signature(fn.__call__).parameters)
    call.pop("self")
    return call | dict(inspect.signature(fn).parameters)


@pytest.mark.parametrize("fn", PUBLIC, ids=lambda f: f.__name__)
def test_docs_give_shape_source_and_every_parameter(fn: Any) -> None:
    doc = documented(fn)
    assert any(shape in doc for shape in ("[N, T]", "[N]", "[M]")), "say the shape"
    assert "See " in doc or "arXiv:" in doc or fn.__name__ in ("batch_mean", "group_norm_to_go", "scale"), (
        "cite the source"
    )
    for name, p in parameters(fn).items():
        assert f"\n    {name}: " in doc, f"Args: {name} is not described"
        assert p.default is p.empty, f"{name}: defaults live in YAML"
        assert p.kind is p.KEYWORD_ONLY or name in COLUMNS | OUTPUTS or name.endswith("_logp"), (
            f"{name} is not in the vocabulary"
        )
    read = signature(f"{fn.__module__}.{fn.__name__}")
    assert read.rowwise == is_rowwise(fn) and read.gives == getattr(fn, "gives", ())


@pytest.mark.parametrize(
    ("option", "columns", "given"),
    [
        ("select/best_vs_worst", ("score", "group"), ("pairs",)),
        ("select/all_pairs", ("score", "group"), ("pairs",)),
        ("select/best_of_n", ("score", "group"), ()),
        ("credit/gae", ("reward", "value", "mask"), ("advantage", "returns")),
        ("credit/group_norm", ("score", "mask", "group"), ("advantage",)),
        ("shaping/kl", ("behavior_logp", "ref_logp", "mask"), ()),
        ("objective/dpo", ("logp", "ref_logp", "mask", "pairs"), ()),
    ],
)
def test_columns_taken_and_given_are_read_from_source(
    option: str, columns: tuple[str, ...], given: tuple[str, ...]
) -> None:
    sig, _ = check_node(nodes(CONF / f"{option}.yaml")[0], option)
    assert sig.columns == columns and sig.gives == given
