"""Models that begin with the weights of a Qwen2 model, written by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from models import convert
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint, parameter_table
from models.dynamic import DTFForCausalLM, MoDForCausalLM
from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.hf.mapping import DTF_HF, MOD_HF
from models.hf.base_model import import_base_weights, read_base_config
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.models.checkpoints import write_checkpoint
from tests.models.dynamic.settled import settled
from tests.models.families import CASES
from tests.models.hf.base_models import rewrite_tensors
from tests.refusals import assert_refused
from tests.tiers import tiered

CLASSES = {"mod": MoDForCausalLM, "dtf": DTFForCausalLM}
FAMILIES = sorted(CLASSES)
VOCAB_SIZE = 301
TOKENS = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
NUM_LAYERS = 5


@pytest.fixture(scope="module", params=tiered(["tied", "untied"], ["tied"]))
def qwen(request, tmp_path_factory) -> Path:
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=request.param == "tied",
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp(request.param) / "qwen"
    model.save_pretrained(directory, max_shard_size="30KB")
    return directory


@torch.no_grad()
def _logits(directory: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(directory)(TOKENS).logits


def _imported(qwen: Path, output: Path, family: str, **changes) -> torch.Tensor:
    convert.from_hf(qwen, output, family=family, changes=changes)
    model = load_model(open_checkpoint(output), device="cpu")
    with torch.no_grad():
        return model(TokenInputs(TOKENS)).logits.transpose(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_every_token_is_computed_the_model_is_qwen2(family, qwen, tmp_path):
    logits = _imported(qwen, tmp_path / "all", family, capacity_gamma=1.0)
    torch.testing.assert_close(logits, _logits(qwen), rtol=1e-5, atol=1e-5)
    # Thresholds that have seen nothing leave nothing out, and the gate has the value 1.
    routed = _imported(qwen, tmp_path / "routed", family, capacity_gamma=0.5)
    torch.testing.assert_close(routed, _logits(qwen), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_tokens_are_left_out_it_is_another_function(family, qwen, tmp_path):
    routed = _imported(qwen, tmp_path / "a", family, capacity_gamma=0.5, causal_router="topk")
    assert (routed - _logits(qwen)).abs().max() > 0.1
    scaled = {"mod": "sigmoid", "dtf": "value"}[family]
    gated = _imported(qwen, tmp_path / "b", family, gate_fn=scaled)
    assert (gated - _logits(qwen)).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_layers", [NUM_LAYERS, 3])
def test_every_tensor_of_the_base_is_taken_once_and_nothing_else_is_left_to_chance(
    family, num_layers, qwen, tmp_path
):
    model = read_base_config(qwen, family, {"num_layers": num_layers})
    taken = import_base_weights(model, tmp_path, dtype=None)
    theirs = Qwen2ForCausalLM.from_pretrained(qwen)
    expected = {
        name
        for name, _ in theirs.named_parameters()  # a tied tensor once
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < num_layers
    }
    assert sorted(taken.values()) == sorted(expected)
    table = parameter_table(model.family, model.config)
    rest = set(table) - set(taken)
    assert all(".router." in n or ".prior" in n for n in rest)
    ours = load_file(tmp_path / "pp_00_tp_00.safetensors")
    assert set(ours) == set(table)
    tensors = theirs.state_dict()
    for name, source in taken.items():
        assert torch.equal(ours[name], tensors[source]), name
    # What is new begins as in a model that is built from nothing.
    fresh = _fresh(model.config, family)
    for name in rest:
        assert torch.equal(ours[name], fresh[name]), name


def _fresh(config, family: str) -> dict[str, torch.Tensor]:
    specs = get_family(family).layer_specs(config)
    return SequentialModel(specs, ParallelContext.single(), seed=torch.initial_seed()).state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_are_those_of_the_base_with_a_gate_of_one(family, qwen):
    config = read_base_config(qwen, family, {"capacity_gamma": 0.25}).config
    assert (config.gate_fn, config.force_first, config.capacity_gamma) == ("st", True, 0.25)
    assert (config.rope_theta, config.rms_norm_eps, config.qkv_bias) == (5e5, 1e-5, True)
    assert (config.num_layers, config.num_kv_heads, config.head_size) == (NUM_LAYERS, 2, 8)
    chosen = read_base_config(qwen, family, {"force_first": False}).config
    assert not chosen.force_first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=32 .*64"),
        ({"intermediate_size": 64}, "intermediate_size=48 .*64"),
        ({"num_heads": 2}, "num_heads=4 .*2"),
        ({"num_kv_heads": 4}, "num_kv_heads=2 .*4"),
        ({"vocab_size": 300}, "vocab_size=301 .*300"),
        ({"head_dim": 16}, "head_size=8 .*16"),
        ({"qkv_bias": False}, "qkv_bias=True .*False"),
        ({"num_layers": 6}, "num_layers=5 .*6"),
        ({"num_kv_heads": 3}, "num_heads=4 .*num_kv_heads=3"),
        ({"capacity_gama": 0.5}, "capacity_gama"),
        ({"capacity_gamma": 0.0}, "greater than 0"),
    ],
)
def test_weights_that_do_not_fit_are_not_taken(changes, message, qwen, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_base_config(qwen, "mod", changes)
    with pytest.raises(ValueError, match=message):
        MoDForCausalLM.from_pretrained(qwen, changes)


def test_other_sizes_begin_from_scratch_when_that_is_asked_for(qwen, tmp_path, capsys):
    line = ["from-hf", "--model", str(qwen), "--output", str(tmp_path / "new"), "--family", "dtf"]
    line += ["--set", "hidden_size=48", "--set", "num_layers=7", "--set", "gate_fn=value"]
    assert convert.main(line) == 2
    assert "hidden_size=32 there, but 48 is asked for" in capsys.readouterr().err
    assert convert.main([*line, "--from-scratch"]) == 0
    assert f"0 tensors are those of {qwen}" in capsys.readouterr().out
    stored = open_checkpoint(tmp_path / "new")
    assert (stored.config.hidden_size, stored.config.num_layers) == (48, 7)
    fresh = _fresh(stored.config, "dtf")
    for name, tensor in load_model(stored, device="cpu").state_dict().items():
        assert torch.equal(tensor, fresh[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "capacity_gamma=0.5"], "no effect without --family"),
        (["--family", "mod", "--set", "capacity_gamma"], "as KEY=VALUE"),
        (["--family", "llama"], "llama family extends no base model"),
        (["--family", "mud"], "did you mean 'mod'"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why(arguments, message, qwen, tmp_path, capsys):
    line = ["from-hf", "--model", str(qwen), "--output", str(tmp_path / "new"), *arguments]
    assert convert.main(line) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _changed(qwen: Path, directory: Path, change) -> Path:
    """The same model in one file, after `change` of its tensors."""
    shutil.copytree(qwen, directory)
    rewrite_tensors(directory, change)
    return directory


_LAST = f"model.layers.{NUM_LAYERS - 1}.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(_LAST), f"lacks {_LAST}"),
        (lambda t: t.update({"model.layers.0.extra": torch.ones(1)}), "unexpected model.layers.0"),
        (lambda t: t.update({_LAST: torch.ones(48, 31)}), r"has shape \[48, 31\]"),
        (lambda t: t[_LAST].fill_(torch.inf), "not finite"),
    ],
)
def test_a_damaged_base_is_refused(change, message, qwen, tmp_path):
    directory = _changed(qwen, tmp_path / "qwen", change)
    with pytest.raises(ValueError, match=message):
        convert.from_hf(directory, tmp_path / "out", family="dtf")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_begins_with_the_weights_of_a_base(family, qwen):
    model = CLASSES[family].from_pretrained(qwen, {"capacity_gamma": 0.25, "num_layers": 4})
    assert (model.config.capacity_gamma, model.config.num_hidden_layers) == (0.25, 4)
    assert not model.training
    config = Qwen2Config.from_pretrained(
        qwen, num_hidden_layers=4, layer_types=4 * ["full_attention"]
    )
    theirs = Qwen2ForCausalLM.from_pretrained(qwen, config=config)
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=2e-5)
    taken = model.copy_base_weights(Qwen2ForCausalLM.from_pretrained(qwen))
    assert len(taken) == len(set(taken.values()))
    assert set(taken.values()) == {name for name, _ in theirs.named_parameters()}


@torch.no_grad()
def test_a_base_is_found_by_its_name_on_the_hub(qwen, tmp_path):
    repository = tmp_path / "models--Qwen--Tiny"
    shutil.copytree(qwen, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    options = {"cache_dir": tmp_path, "local_files_only": True, "dtype": torch.bfloat16}
    model = DTFForCausalLM.from_pretrained("Qwen/Tiny", {"capacity_gamma": 1.0}, **options)
    assert model.dtype == torch.bfloat16
    theirs = Qwen2ForCausalLM.from_pretrained(qwen, dtype=torch.bfloat16)
    assert torch.equal(model.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


def test_another_model_is_no_base(qwen, tmp_path):
    directory = shutil.copytree(qwen, tmp_path / "gpt2")
    contents = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(contents | {"model_type": "llama"}))
    with assert_refused(
        "model_type", value="llama", constraint="no base model of the mod", remedy="qwen2"
    ):
        convert.from_hf(directory, tmp_path / "out", family="mod")


# And back.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_value_one_gates_is_exported_as_qwen2(family, qwen, tmp_path, capsys):
    convert.from_hf(qwen, tmp_path / "step_0", family=family, changes={"capacity_gamma": 0.25})
    line = ["to-hf", "--checkpoint", str(tmp_path / "step_0"), "--output", str(tmp_path / "hf")]
    assert convert.main([*line, "--plain", "--no-tokenizer"]) == 0
    assert "computes every token in every layer" in capsys.readouterr().out
    model, loading = Qwen2ForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values())
    expected = Qwen2ForCausalLM.from_pretrained(qwen).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not list((tmp_path / "hf").glob("*.py"))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_of_four_ranks_the_plain_export_is_the_model_with_every_token(family, tmp_path):
    kind, config = CASES[family]
    config = config.model_copy(update={"capacity_gamma": 1.0})
    whole = write_checkpoint(
        tmp_path / "step_1", config, family=kind, pipeline=2, tensor=2, tokenizer=None
    )
    convert.to_hf(tmp_path / "step_1", tmp_path / "hf", plain=True)
    tokens = TOKENS % config.vocab_size
    expected = whole(TokenInputs(tokens)).logits.transpose(0, 1)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "gate_fn=.*gate_fn=st"), ({"qkv_bias": False}, "Qwen2 has biases")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_not_qwen2_is_not_exported_as_it(family, changes, message, tmp_path):
    kind, config = CASES[family]
    if changes:
        changes = {**changes, "gate_fn": "st"}
    config = config.model_copy(update=changes)
    whole = settled(config, kind)
    write_checkpoint(tmp_path / "step_1", config, family=kind, tokenizer=None, whole=whole)
    with pytest.raises(ValueError, match=message):
        convert.to_hf(tmp_path / "step_1", tmp_path / "hf", plain=True)
    assert not (tmp_path / "hf").exists()


# The published sizes.

# hidden, layers, heads, key and value heads, intermediate, vocabulary, tied, millions of parameters
QWEN2_5 = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True, 494.03),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True, 1543.71),
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3085.94),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 7615.62),
    "14B": (5120, 48, 40, 8, 13824, 152064, False, 14770.03),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 32763.88),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 72706.20),
}


@pytest.mark.parametrize("size", tiered(QWEN2_5, ["0.5B", "7B"]))
def test_the_published_sizes_have_their_number_of_parameters_and_every_name(size):
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied, millions = QWEN2_5[size]
    # As Qwen publishes it: no head_dim, no rope_parameters, windows that are not used.
    contents = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(Qwen2Config(**contents))
    named = dict(theirs.named_parameters())
    for family, hf, config_class in (("mod", MOD_HF, MoDConfig), ("dtf", DTF_HF, DTFConfig)):
        config = hf.base.from_config(contents, {**hf.base.defaults, "capacity_gamma": 0.125})
        assert isinstance(config, config_class)
        names = hf.base.names(config)
        table = parameter_table(get_family(family), config)
        assert set(names.values()) == set(named)
        assert all(table[ours].shape == named[name].shape for ours, name in names.items())
        plain = sum(table[ours].shape.numel() for ours in names)
        assert round(plain / 1e6, 2) == millions
        dense = config.model_copy(update={"capacity_gamma": 1.0})
        assert get_family(family).num_parameters(dense) == plain
