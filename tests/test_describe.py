"""`rlhf list` and `rlhf show`."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli import catalog, cli
from rlhf_cli.describe import list_text, show_text
from rlhf_cli.errors import ConfigError


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "credit").mkdir()
    text = "# My credit. Me, arXiv:0000.00000\n_target_: rlhf_cli.credit.group.group_norm\n"
    text += "scale: none\nddof: 0\neps: 0.5\n"
    (tmp_path / "credit" / "mine.yaml").write_text(text)
    (tmp_path / "flavour").mkdir()
    (tmp_path / "flavour" / "sweet.yaml").write_text("# @package _global_\n# Sweet\nsteps: 3\n")
    return tmp_path


def test_list_counts_the_options_of_every_group() -> None:
    lines = list_text(None).splitlines()
    for group in (p for p in catalog.conf_dir().iterdir() if p.is_dir() and list(p.glob("*.yaml"))):
        count = len(list(group.glob("*.yaml")))
        assert any(
            x.startswith(f"  {group.name} ({count})  ") and x.endswith(catalog.GROUPS[group.name]) for x in lines
        )


def test_list_group_shows_first_comment_lines_and_marks_the_default() -> None:
    text = list_text("hardware")
    assert "  auto *              What this machine has" in text
    assert "  zero2               ZeRO stage 2, gradients are sharded too. Rajbhandari et al., ZeRO," in text
    assert "  zero2 *" not in text


def test_list_includes_the_users_groups(mine: Path) -> None:
    assert "  flavour (1)" in list_text(None, str(mine))
    assert "  sweet  Sweet" in list_text("flavour", str(mine))
    assert "My credit. Me, arXiv:0000.00000" in list_text("credit", str(mine))


def test_list_names_the_nearest_group() -> None:
    with pytest.raises(ConfigError, match=r"^crdit: no such group; did you mean 'credit'\? groups: model, dataset, "):
        list_text("crdit")


def test_show_prints_value_type_and_doc_of_each_parameter(mine: Path) -> None:
    text = show_text("credit=mine", str(mine))
    head, _, body = text.partition("\n\n")
    assert head.splitlines()[:2] == ["credit=mine", "My credit. Me, arXiv:0000.00000"]
    lines = body.splitlines()
    assert lines[0] == "credit:  rlhf_cli.credit.group.group_norm"
    assert any(x.startswith("  # reads ") for x in lines)
    assert any(x.startswith("  scale: none  (std | none)  ") for x in lines)
    assert any(x.startswith("  eps: 0.5     (float)  ") for x in lines)


def test_show_of_a_section_prints_the_schemas_comments() -> None:
    text = show_text("hardware=zero3_offload")
    assert "Ren et al., ZeRO-Offload" in text
    assert "\n  zero: 3                (int)  DeepSpeed ZeRO stage 0-3\n" in text
    assert (
        "\n  offload: cpu           (str)  none | cpu (optimizer state; parameters too under ZeRO-3) | nvme\n" in text
    )


def test_show_of_a_recipe_prints_what_it_sets_and_chooses() -> None:
    text = show_text("debug=tiny")
    assert "\nsteps: 2     (int)  optimisation steps\n" in text
    assert "\n  source: tiny " in text, "a chosen group is shown whole"
    assert "\n  max_tokens: 8  (int)  new tokens per response\n" in text
    assert "temperature" not in text, "of a section only what the recipe sets"


def test_show_algo_explains_its_parts() -> None:
    text = show_text("algo=grpo")
    assert "arXiv:2402.03300" in " ".join(text.split())
    assert "credit:  rlhf_cli.credit." in text and "objective:  rlhf_cli.objectives." in text
    assert "(float)  how far the ratio may rise above 1" in text
    assert "coefficient of this term in the loss" in text
    assert "@" not in text, "an option put into a term is shown there, not as a key of its own"


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(f"{g}={o}", marks=pytest.mark.xdist_group(f"{g}-{o}"))  # where test_configs.py composes it
        for g, options in catalog.groups().items()
        for o in options
    ],
)
def test_every_option_can_be_shown_within_the_width(choice: str) -> None:
    text = show_text(choice)
    assert text.startswith(choice + "\n")
    group, _, name = choice.partition("=")
    assert catalog.groups()[group][name].line.split()[0] in text
    long = [x for x in text.splitlines() if len(x) > 100 and " " in x.strip() and not x.startswith("file: ")]
    assert not [x for x in long if ": " not in x[:60]], "only a value that cannot be broken may be longer"


def test_show_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as wrong:
        show_text("algo=grop")
    options = ", ".join(catalog.groups()["algo"])
    assert str(wrong.value) == f"algo=grop: no such option; did you mean 'grpo'? options: {options}"
    with pytest.raises(ConfigError, match=r"^alg: no such group; did you mean 'algo'\? groups: "):
        show_text("alg=grpo")
    with pytest.raises(ConfigError, match=r"^show credit: which option\? type rlhf show credit=OPTION; options: "):
        show_text("credit")


def test_show_through_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "hardware=cpu", "debug=none"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("hardware=cpu\n") and "\n\ndebug=none\n" in out
    assert cli.main(["show"]) == 2
    assert capsys.readouterr().err == (
        "rlhf: error: show: which option? type rlhf show GROUP=OPTION, e.g. rlhf show algo=grpo\n"
    )


def test_fields_read_comments_and_defaults_of_the_schema() -> None:
    fields = catalog.fields()
    assert fields["optim.lr"] == catalog.Field("float", "peak learning rate", "1e-06")
    assert fields["optim.betas"].default == "[0.9,0.999]"
    assert fields["rollout.stop"].default == "[]" and fields["dataset.columns"].default == "{}"
    assert fields["model.trust_remote_code"].default == "false" and fields["model.path"].default == "''"
    assert fields["optim"].doc == "AdamW and its schedule."
    head = catalog.field_of("learners.critic.head")
    assert head is not None and head.type == "str" and "value (a number per token)" in head.doc
    assert catalog.field_of("learners.critic.zzz") is None


def test_fields_agree_with_the_dataclasses() -> None:
    from omegaconf import OmegaConf

    from rlhf_cli.config import schema

    root = schema()
    for key, field in catalog.fields().items():
        if "*" in key or not field.default:
            continue
        assert (
            catalog.typed(OmegaConf.to_container(OmegaConf.create({"x": OmegaConf.select(root, key)}))["x"])
            == field.default
        )  # type: ignore[index,call-overload]


def test_table_wraps_under_its_column() -> None:
    assert catalog.table([("a", "x " * 60), ("bbb", "y")])[0].startswith("  a    x x")
    assert catalog.table([("a", "x " * 60), ("bbb", "y")])[1].startswith("       x x")
    long = "k" * 40
    assert catalog.table([(long, "doc"), ("a", "y")]) == ["  " + long, "     doc", "  a  y"]
