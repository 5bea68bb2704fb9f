"""The published command lines, as processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from data_tools.corpus.indexed import IndexedDataset
from models.daria_former import DariaFormerForCausalLM, DariaFormerModel
from models.daria_former.standalone import cli
from models.daria_former.standalone.checkpoint_io import load_checkpoint
from models.daria_former.standalone.cli import export, generate, train
from models.daria_former.standalone.training import Trainer
from models.standalone import train_command
from pretrain import train as pretraining
from tests.distributed import free_port
from tests.forked_command import run_forked
from tests.models.daria_former.shrunk import shrunk

ROOT = Path(__file__).parents[4]


MODULE = "models.daria_former.standalone.cli"


def _train(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """In a new process: the command becomes the trainer's."""
    command = [sys.executable, *launcher, "-m", MODULE, "train", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _call_trainer(program: str, command: list[str]) -> None:
    raise SystemExit(pretraining.main(command[2:]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("daria")
    (folder / "text.txt").write_text("One word after another, and so on. " * 400)
    (folder / "model.yaml").write_text(yaml.safe_dump(shrunk(lora_rank=2).to_dict()))
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    options = ["--train_data", folder / "text.txt", "--eval_data", folder / "text.txt"]
    options += ["--config", folder / "model.yaml", "--save_dir", folder / "run", "--seq_len", 64]
    options += ["--batch_size", 2, "--warmup_steps", 1, "--save_every", 2, "--eval_every", 2]
    options += ["--lr", 1e-3, "--log_every", 1, "--no_amp"]
    done = _train(*options, "--max_steps", 2)
    assert done.returncode == 0, done.stderr
    # Forked, the trainer called: that it takes the place of the command was shown above.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "execv", _call_trainer)
        more = run_forked(MODULE, "train", *options, "--max_steps", 3, "--resume", folder / "run")
    assert more.returncode == 0, more.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def by_trainer(folder) -> Path:
    """A checkpoint of Trainer."""
    config = shrunk()
    stream = torch.randint(0, 257, (2, 25))
    batches = [(stream[:, :-1], stream[:, 1:])]
    Trainer(DariaFormerModel(config), config, batches, max_steps=1, save_dir=folder).train()
    return folder / "checkpoint-1"


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory, by_trainer) -> Path:
    """A working directory with what mistakes refer to."""
    folder = tmp_path_factory.mktemp("mistaken")
    (folder / "unknown.yaml").write_text("num_layer: 3\n")
    (folder / "heads.yaml").write_text("num_heads: 5\n")
    (folder / "broken.yaml").write_text("a: [1\n")
    (folder / "empty.yaml").write_text("")
    _tokenizer(folder / "t.json", " ".join(f"w{i}" for i in range(300)))
    for name in ("checkpoint-1", "damaged"):
        shutil.copytree(by_trainer, folder / name)
    weights = folder / "damaged" / "weights" / "pp_00_tp_00.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return folder


def test_training_goes_on_where_it_was(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert any("eval_loss" in line for line in lines)


def test_text_is_generated_from_a_checkpoint_by_its_published_name(trained):
    options = ["--prompt", "One word", "--max_new_tokens", 9]
    done = run_forked(MODULE, "generate", "--checkpoint", trained / "checkpoint-3", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("One word")


def test_an_export_with_merged_adapters_has_none(trained, folder):
    done = run_forked(
        MODULE, "export", "--checkpoint", trained, "--output", folder / "hf", "--merge_lora"
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert config["lora_rank"] == 0
    assert (folder / "hf" / "modeling_daria_former.py").is_file()


def _text(capsys, *arguments: object) -> str:
    options = ["--prompt", "One", "--max_new_tokens", 10, "--tokenizer", "bytes", *arguments]
    assert generate([*map(str, options)]) == 0
    return capsys.readouterr().out


def test_generation_follows_its_options(trained, by_trainer, capsys):
    for checkpoint in (trained, trained / "checkpoints" / "step_3", by_trainer):
        given = ("--checkpoint", checkpoint)
        assert _text(capsys, *given) == _text(capsys, *given)
        assert _text(capsys, *given, "--seed", 1) != _text(capsys, *given)
        greedy = _text(capsys, *given, "--greedy", "--no_variability")
        assert _text(capsys, *given, "--greedy", "--no_variability", "--seed", 1) == greedy
        assert _text(capsys, *given, "--top_k", 1, "--no_variability") == greedy


@torch.no_grad()
def test_a_checkpoint_of_the_trainer_is_exported_in_half_precision(by_trainer, folder, capsys):
    output = folder / "half"
    arguments = ["--checkpoint", str(by_trainer), "--output", str(output), "--half", "--hf"]
    assert export(arguments) == 0
    assert f"wrote {output}" in capsys.readouterr().out
    model = DariaFormerForCausalLM.from_pretrained(output, dtype="auto").eval()
    assert next(model.parameters()).dtype == torch.float16
    tokens = torch.randint(0, 257, (2, 30))
    expected = load_checkpoint(by_trainer, device="cpu")[0](tokens)["logits"]
    assert (model.float()(tokens).logits - expected).norm() < 0.01 * expected.norm()


@pytest.mark.slow
def test_two_ranks_train_on_text_that_the_first_one_tokenizes(folder):
    tokenizer = _tokenizer(folder / "t.json", " ".join(f"w{i}" for i in range(300)))
    run = folder / "tokens"
    options = ["--train_data", folder / "text.txt", "--tokenizer", tokenizer, "--save_dir", run]
    options += ["--config", folder / "model.yaml", "--seq_len", 32, "--batch_size", 1]
    options += ["--warmup_steps", 0, "--max_steps", 2, "--log_every", 1, "--use_amp"]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    done = _train(*options, launcher=(*launcher, "--master_port", str(free_port())))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["vocab_size"] == 302
    assert config["training"]["precision"] == "bf16"
    assert len(list((run / "data").glob("train-*.bin"))) == 1
    model, spec, _ = load_checkpoint(run, device="cpu")
    assert spec == str(tokenizer)
    assert model.config.lora_rank == 2


PROMPT = ["--checkpoint", "checkpoint-1", "--prompt", "a", "--tokenizer", "bytes"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (train, ["--train_data", "x.txt", "--config", "tiny"], "none of small, base"),
        (train, ["--train_data", "x.txt", "--wandb_project", "p"], "no effect without --wandb"),
        (train, ["--train_data", "x.txt", "--resume", "elsewhere"], "no weights in"),
        (train, ["--train_data", "x.txt", "--seq_len", "9999"], "1 to max_seq_len=8192"),
        (train, ["--train_data", "x.txt", "--tokenizer", "/nowhere/t.json"], "--tokenizer"),
        (train, [], "required: --train_data"),
        (train, ["--train_data", "x.txt", "--lr", "fast"], "invalid float value: 'fast'"),
        (train, ["--train_data", "x.txt", "--rate", "1"], "unrecognized arguments: --rate"),
        (train, ["--train_data", "x.txt", "--config", "unknown.yaml"], "num_layer=3: Extra inputs"),
        (train, ["--train_data", "x.txt", "--config", "heads.yaml"], "num_heads=5"),
        (train, ["--train_data", "x.txt", "--config", "broken.yaml"], "not a YAML file of"),
        (train, ["--train_data", "x.txt", "--config", "empty.yaml"], "holds no settings"),
        (generate, ["--checkpoint", "/nowhere", "--prompt", "a"], "/nowhere"),
        (generate, PROMPT[:-2], "names no tokenizer"),
        (generate, [*PROMPT, "--temperature", "0"], "use --greedy"),
        (generate, [*PROMPT, "--top_p", "2"], "top_p=2.0 must be above 0 and at most 1"),
        (generate, [*PROMPT, "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (generate, [*PROMPT, "--max_new_tokens", "512"], "longer than max_seq_len=512"),
        (generate, [*PROMPT[:3], "w299", "--tokenizer", "t.json"], "the model 257 ids"),
        (generate, ["--checkpoint", "damaged", *PROMPT[2:]], "is damaged: sha256"),
        (export, ["--checkpoint", "checkpoint-1", "--output", "o", "--merge_lora"], "no adapters"),
        (export, ["--checkpoint", "checkpoint-1", "--output", "."], "is not empty"),
    ],
)
def test_mistakes_are_one_line(command, arguments, message, capsys, mistaken, monkeypatch):
    monkeypatch.chdir(mistaken)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert command(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_training_goes_on_from_the_newest_checkpoint_only(trained, capsys):
    older = str(trained / "checkpoint-2")
    options = ["--train_data", "x.txt", "--save_dir", str(trained), "--resume", older]
    assert train(options) == 2
    assert "is not the newest checkpoint" in capsys.readouterr().err


def test_another_start_in_the_same_directory_has_a_run_file_of_its_own(
    trained, folder, capsys, monkeypatch
):
    assert len(list((trained / "run_file").iterdir())) == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train_command, "_WAIT_SECONDS", 0)
    options = ["--train_data", str(folder / "text.txt"), "--save_dir", str(trained), "--lr", "1"]
    assert train(options) == 2
    assert "was not written by the first rank" in capsys.readouterr().err


def _tokenizer(path: Path, words: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<eos>", "[UNK]", *words.split()]
    backend = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(path))
    return path


def _corpus(folder: Path, text: object, tokenizer: Path) -> list[int]:
    options = ["--train_data", str(text), "--tokenizer", str(tokenizer), "--config", "small"]
    parsed = cli.train_parser().parse_args([*options, "--save_dir", str(folder / "run")])
    config = cli.read_config("small")
    values = train_command.run_values(parsed, config, folder / "run", project=cli.PROJECT)
    corpus = IndexedDataset(values["data"]["train"])
    return corpus.document(0).tolist()


def test_a_corpus_is_that_of_the_text_as_it_is_and_of_the_tokenizer(tmp_path, monkeypatch):
    # Other ranks take no part in it, whoever started them.
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # restored, since tokenizing changes it
    texts, first = tmp_path / "texts", _tokenizer(tmp_path / "first.json", "a b")
    texts.mkdir()
    (texts / "1.txt").write_text("a b a")
    (tmp_path / "older.txt").write_text("b b")
    os.utime(tmp_path / "older.txt", (0, 0))
    assert _corpus(tmp_path, texts, first) == [2, 3, 2, 0]
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "data").iterdir()}
    assert _corpus(tmp_path, f"{texts}/*.txt", first) == [2, 3, 2, 0]
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert _corpus(tmp_path, tmp_path / "older.txt", first) == [3, 3, 0]
    (texts / "1.txt").write_text("b a")
    assert _corpus(tmp_path, texts, first) == [3, 2, 0]
    assert _corpus(tmp_path, texts, _tokenizer(tmp_path / "second.json", "b a")) == [2, 3, 0]


def test_the_published_names_of_the_size_files_are_the_sizes():
    published = cli.read_config("configs/daria_former_small.yaml")
    assert published == cli.read_config("small")
    assert published != cli.read_config("configs/daria_former_base.yaml")
