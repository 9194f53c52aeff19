"""The documentation is true: its commands run, its links lead somewhere, its tables list what there is.

A fenced `bash` or `console` block is executed line by line, the blocks of a page in order and in one folder, shrunk to `debug=tiny`.
A comment before a block changes that: `file: NAME` writes it to a file, `not run: WHY` only composes and validates its commands,
`append: PATH` and `new: PATH` are edits of the package, tried in a copy.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from rlhf_cli import catalog, cli
from rlhf_cli.usage import VERBS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>[a-z ]+): (?P<what>[^\n]*?) -->\n)?^```(?P<lang>\w+)\n(?P<body>.*?)^```$", re.M | re.S
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
SMALL = ("hardware.threads=1",)
TINY_MODEL = ("rollout.max_tokens=8", "dataset.max_prompt_tokens=4096", "eval.prompts=4", "eval.bootstrap=200")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the comment that stands before it."""

    kind: str
    what: str
    lang: str
    body: str

    @property
    def runs(self) -> bool:
        return self.lang in ("bash", "console")


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(m["kind"] or "", m["what"] or "", m["lang"], m["body"]) for m in found]


def commands(block: Block) -> Iterator[list[str]]:
    """The words after `rlhf` of each command line."""
    for line in block.body.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words and words != ["export", "PYTHONPATH=."]:
            assert words[0] == "rlhf", f"only rlhf commands can be executed: {line}"
            yield words[1:]


def shrunk(words: list[str]) -> list[str]:
    """The command at the size of a test. What the page says stays, except for the model and the number of steps."""
    verb, *rest = words
    if verb == "train":
        rest = [w for w in rest if not w.startswith(("steps=", "batch."))]
        debug = [] if any(w.startswith("debug=") for w in rest) or "--cfg" in rest else ["debug=tiny"]
        return [verb, *rest, *debug, "tracker=none", *SMALL]
    if verb in ("eval", "generate"):
        own = [w for w in rest if not w.startswith("model=")]
        named = own and "=" not in own[0]
        # another rollout option would undo the sizes, so they come last
        return [verb, *own, *([] if named else ["model=tiny_random"]), *TINY_MODEL, *SMALL]
    return words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; environment, module path and signal handlers are put back afterwards."""
    from rlhf_cli.record import rundir

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(os.environ)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield tmp_path
    rundir._forget_locks()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    for s, handler in handlers.items():
        signal.signal(s, handler)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.runs for b in blocks(p))], ids=lambda p: p.stem)
def test_every_command_runs(page: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from rlhf_cli.record import rundir

    write_files(page, folder)
    failed = []
    for words in [w for b in blocks(page) if b.runs and b.kind != "not run" for w in commands(b)]:
        code = cli.main(shrunk(words))
        rundir._forget_locks()  # each command is a process of its own where people type them
        out, err = capfd.readouterr()
        if code:
            failed.append(f"rlhf {' '.join(words)} -> {code}: {err.strip()[-500:] or out[-500:]}")
    assert not failed, "\n".join(failed)


def write_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.kind == "file":
            path = folder / block.what
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body, encoding="utf-8")


@each_page
def test_commands_that_are_not_run_compose(page: Path) -> None:
    from rlhf_cli.compose import compose
    from rlhf_cli.plan import validate

    for block in (b for b in blocks(page) if b.runs and b.kind == "not run"):
        assert len(block.what) > 10, "say why it is not run"
        for verb, *words in commands(block):
            if verb == "train" and "scratch copy" not in block.what:
                validate(compose("train", words, None))


@each_page
def test_commands_inside_sentences_can_be_typed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those without a placeholder: `train` and `plan` compose, `show` and `list` answer."""
    from rlhf_cli.compose import compose
    from rlhf_cli.plan import validate

    for text in re.findall(r"`rlhf ([a-z]+(?: [a-z0-9+][a-z0-9_.=,/@+-]*)*)`", page.read_text(encoding="utf-8")):
        verb, *words = text.split()
        if "..." in text or words == ["algo=pppo"]:  # an example of a typo
            continue
        if verb in ("train", "plan"):
            validate(compose("train", words, None))
        elif verb in ("show", "list"):
            assert cli.main([verb, *words]) == 0, f"rlhf {text}: {capsys.readouterr().err}"


@each_page
def test_verbs_groups_options_and_keys_exist(page: Path) -> None:
    """Inside code: every `rlhf VERB` is one, every GROUP=OPTION too, every dotted key has a first part that is a section."""
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *(b.body for b in blocks(page) if b.runs)])
    for verb in re.findall(r"\brlhf ([a-z]+)", code):
        assert verb in VERBS, f"rlhf {verb}"
    groups = catalog.groups()
    own = {f"{Path(b.what).parent.name}={Path(b.what).stem}" for b in blocks(page) if b.what.endswith(".yaml")}
    own |= {"algo=mine", "algo=pppo"}  # an example of a user's own, and of a typo
    for group, names in re.findall(r"(?<![\w.@])([a-z]+)=(\[?[a-z_][\w,]*\]?)", code):
        for name in names.strip("[]").split(",") if group in groups else []:
            assert name in groups[group] or f"{group}={name}" in own, f"{group}={name}"
    sections = {key.split(".")[0] for key in catalog.fields()}
    for key in re.findall(r"(?<![\w./@=:])([a-z]+)\.[a-z_.]+=", code):
        assert key in sections, f"{key}: no such section"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
        anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
        assert not anchor or anchor in anchors, f"{page.name}: {target}"


def test_readme_starts_with_the_two_commands() -> None:
    lines = [x for x in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if x]
    assert lines[0].startswith("# ") and [x.split("#")[0].strip() for x in lines[1:3]] == ["make train", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"


# Where each group's options stand, as `option` or group=option.
LISTED = {
    "algo": "README", "reward": "README", "hardware": "hardware", "dataset": "data", "correction": "rollouts", "launcher": "launching",
    **dict.fromkeys(("objective", "credit", "reduce", "shaping", "select"), "algorithms"),
}  # fmt: skip


@pytest.mark.parametrize("group", LISTED)
def test_every_option_is_documented(group: str) -> None:
    page = next(p for p in PAGES if p.stem == LISTED[group])
    text = page.read_text(encoding="utf-8")
    known = re.findall(r"`(?:[a-z]+=)?([a-z0-9_]+)`", text)
    shipped = {p.stem for p in (ROOT / "conf" / group).glob("*.yaml")} - {"none"}
    assert not shipped - set(known), f"{page.name} lacks {group} {sorted(shipped - set(known))}"


def test_every_reward_and_setting_is_documented() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "conf" / "reward").glob("*.yaml")):
        assert f"| `{path.stem}` |" in text
        settings = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get(path.stem, {})
        line = "".join(re.findall(rf"^- `{path.stem}`:.*?(?=^- |^$)", text, re.M | re.S))
        missing = [k for k in settings if k not in ("_target_", "weight") and f"`{k}`" not in line]
        assert not missing, f"rewards.md: {path.stem} lacks {missing}"


def test_every_reward_has_a_command_and_a_cost() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    tried = text.partition("\n## One command for each\n")[2].partition("\n## ")[0]
    commands_ = set(re.findall(r"^rlhf [a-z]+ .*?\breward=(\w+)", tried, re.M))
    options = {p.stem for p in (ROOT / "conf" / "reward").glob("*.yaml")}
    assert commands_ == options, f"rewards.md: {sorted(commands_ ^ options)}"
    costs = {row.partition("`")[0] for row in table("rewards", "cost of")}
    assert costs == options - {"none"}, f"rewards.md: {sorted(costs ^ (options - {'none'}))}"


def table(page: str, head: str) -> dict[str, list[str]]:
    """Rows of the table whose first header cell is `head`: first cell -> the others."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    body = text.split(f"| {head} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in body]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_table_of_algorithms_is_what_yaml_says() -> None:
    spec = importlib.util.spec_from_file_location("algorithm_table", ROOT / "scripts" / "algorithm_table.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["algorithm_table"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert script.page(text) == text, "type: python scripts/algorithm_table.py --write"
    rows = table("algorithms", "`algo=`")
    assert set(rows) == {p.stem for p in (ROOT / "conf" / "algo").glob("*.yaml")}
    assert rows["grpo"][2:8] == [
        "token", "eps_low=0.2 eps_high=0.2", "`sequence_mean`", "`group_norm`", "`none`", "loss: `kl_k3` x 0.04"
    ]  # fmt: skip


def test_the_table_of_root_keys_is_the_schema() -> None:
    rows = table("configuration", "key")
    fields = {k: f for k, f in catalog.fields().items() if "." not in k}
    assert list(rows) == list(fields)
    for key, (meaning,) in rows.items():
        assert meaning == fields[key].doc.replace("|", "or"), key


def test_every_gate_limit_is_documented() -> None:
    text = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")
    absent = [k for k in catalog.fields() if k.startswith("gates.") and f"`{k}" not in text]
    assert not absent


def test_every_metric_is_documented() -> None:
    from rlhf_cli.diagnostics import DIAGNOSTICS

    text = (ROOT / "docs" / "run-directory.md").read_text(encoding="utf-8")
    absent = [k for k in DIAGNOSTICS if f"`LEARNER/{k}`" not in text]
    source = (ROOT / "rlhf_cli" / "record" / "describe.py").read_text(encoding="utf-8")
    absent += [k for k in re.findall(r'"((?:score|count|response|advantage)/\w+)"', source) if f"`{k}`" not in text]
    assert not absent


@pytest.mark.slow
def test_extending_the_package_works_as_written(tmp_path: Path) -> None:
    for name in ("rlhf_cli", "conf", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "rlhf_cli" / "conf").symlink_to("../conf")
    page = ROOT / "docs" / "extending.md"
    for block in blocks(page):
        if block.kind == "append":
            with (tmp_path / block.what).open("a", encoding="utf-8") as f:
                f.write(block.body)
        elif block.kind == "new":
            (tmp_path / block.what).write_text(block.body, encoding="utf-8")
    names = tmp_path / "rlhf_cli" / "objectives" / "__init__.py"
    text = names.read_text(encoding="utf-8").replace(
        "    sequence_ratio_clip,", "    sapo,\n    sequence_ratio_clip,", 1
    )
    names.write_text(
        text.replace('    "sequence_ratio_clip"', '    "sapo",\n    "sequence_ratio_clip"', 1), encoding="utf-8"
    )

    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*argv: str) -> None:
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    new = [
        "tests/objectives/test_sapo.py",
        "tests/rewards/test_overlap.py",
        "tests/test_common.py",
        "tests/test_options.py",
    ]
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *new)
    scratch = [b for b in blocks(page) if "scratch copy" in b.what]
    assert len(scratch) == 2
    for words in (w for b in scratch for w in commands(b)):
        run("-m", "rlhf_cli.cli", *shrunk(words))
