"""The same numbers as lm_eval's own backend for transformers has with the exported model."""

from __future__ import annotations

import importlib
import json
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from models import convert, evaluate
from models.checkpoint import load_model, open_checkpoint
from models.evaluate import evaluate_checkpoint
from models.evaluation.texts import load_texts
from parallel.checkpoint.manifest import UNKNOWN_TEXT, TextRecord
from tests.data_tools.tokenization.tokenizer_folders import byte_level, declare
from tests.models.checkpoints import model, write_checkpoint
from tests.models.evaluation.local_tasks import NAMES, write_tasks
from tests.models.families import CASES, evaluated
from tests.refusals import assert_refused, error_line

pytestmark = pytest.mark.ecosystem
FAMILIES = ("agiformer", "amrpa", "daria_former", "dart", "dtf", "llama", "mod")
MAX_LENGTH = 40  # less than the longest questions, so that contexts are cut and texts windowed
PLAIN = TextRecord(eod_id=301, bos_ids=(), special_tokens="plain")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    warnings.simplefilter("ignore")  # of packages that miss what no test needs


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def _tokenizer(folder: Path) -> str:
    """<|begin|> 300, which its post-processor adds, <|end|> 301."""
    made = byte_level(folder, ["<|begin|>", "<|end|>"], begin="<|begin|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    return str(declare(made, tokenizer_config={**settings, "bos_token": "<|begin|>"}))


class Stored(NamedTuple):
    checkpoint: Path
    hf: Path


def store(folder: Path, name: str, *, text: TextRecord = UNKNOWN_TEXT) -> Stored:
    """A checkpoint of a small model, and its export."""
    family, config = CASES[name]
    is_bytes = name == "agiformer"
    config = config.model_copy(update={"vocab_size": 257 if is_bytes else 302})
    whole = evaluated(model(config, family).train(), torch.arange(48).view(2, 24)).float()
    tokenizer = "bytes" if is_bytes else _tokenizer(folder / "tokenizer")
    write_checkpoint(
        folder / "step_1", config, family=family, tokenizer=tokenizer, text=text, whole=whole
    )
    convert.to_hf(folder / "step_1", folder / "hf")
    return Stored(folder / "step_1", folder / "hf")


def theirs(hf: Path, tasks: Path, **options: Any) -> dict[str, Any]:
    """What lm_eval's backend finds with an exported directory."""
    evaluator = importlib.import_module("lm_eval.evaluator")
    backend = importlib.import_module("lm_eval.models.huggingface")
    harness = importlib.import_module("models.evaluation.harness")
    loaded = harness.load_tasks(NAMES, include_path=tasks)
    lm = backend.HFLM(
        pretrained=str(hf),
        device="cpu",
        dtype="float32",
        batch_size=3,
        trust_remote_code=True,
        max_length=MAX_LENGTH,
        **options,
    )
    return evaluator.evaluate(lm, loaded, bootstrap_iters=0)


def ours(checkpoint: Path, tasks: Path, **options: Any) -> dict[str, Any]:
    return evaluate_checkpoint(
        checkpoint,
        NAMES,
        include_path=tasks,
        max_length=MAX_LENGTH,
        bootstrap_iters=0,
        log_samples=True,
        **{"batch_size": 4, **options},
    )


def assert_agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every answer of every question, and every metric."""
    for name in NAMES:
        pairs = zip(found["samples"][name], expected["samples"][name], strict=True)
        for mine, other in pairs:
            assert mine["arguments"] == other["arguments"]
            for a, b in zip(_flat(mine["resps"]), _flat(other["resps"]), strict=True):
                assert a == (pytest.approx(b, abs=1e-4) if isinstance(b, float) else b)
        mine, other = found["results"][name], expected["results"][name]
        assert mine == {
            key: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            for key, value in other.items()
        }


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [x for each in value for x in _flat(each)]
    return [value]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_that_of_transformers_with_the_export(
    tmp_path: Path, tasks: Path, name: str
) -> None:
    stored = store(tmp_path, name)
    assert_agree(ours(stored.checkpoint, tasks), theirs(stored.hf, tasks))


def test_texts_begin_as_in_training_and_the_remark_says_how_transformers_does_so(
    tmp_path: Path, tasks: Path
) -> None:
    stored = store(tmp_path, "llama", text=PLAIN)
    found = ours(stored.checkpoint, tasks)
    (remark,) = found["manyformer"]["remarks"]
    assert remark.endswith("add_bos_token=False,prefix_token_id=301")
    assert_agree(found, theirs(stored.hf, tasks, add_bos_token=False, prefix_token_id=301))
    with pytest.raises(AssertionError):
        assert_agree(found, theirs(stored.hf, tasks))


def test_white_space_and_nothing_are_contexts_alike(tmp_path: Path) -> None:
    """Of a model whose texts begin without a token: lm_eval gives both spaces to the answer."""
    stored = store(tmp_path, "llama", text=PLAIN)
    harness = importlib.import_module("models.evaluation.harness")
    opened = open_checkpoint(stored.checkpoint)
    lm = harness.CheckpointLM(
        load_model(opened, device="cpu"),
        load_texts(opened),
        max_length=MAX_LENGTH,
        batch_size=2,
        quiet=True,
    )
    pairs = [SimpleNamespace(args=pair) for pair in (("  ", "river"), ("", "  river"))]
    assert len(set(lm.loglikelihood(pairs))) == 1
    for given, parts in (
        ({"until": [3], "max_gen_toks": 5}, ("until", 3, "string", "quotation")),
        ({"max_gen_toks": 0}, ("max_gen_toks", 0, "1 or more", "leave")),
    ):
        with assert_refused(*parts):
            lm.generate_until([SimpleNamespace(args=("river", given))])


def test_the_command_writes_the_results_and_refuses_what_it_cannot_use(
    tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = store(tmp_path, "llama").checkpoint
    output = tmp_path / "results.json"
    line = ["--checkpoint", str(checkpoint), "--include-path", str(tasks), "--device", "cpu"]
    known = [*line, "--tasks", "local_choice,local_letters", "--limit", "2"]
    assert evaluate.main([*known, "--num-fewshot", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed[:4]] == [
        ["task", "n-shot", "metric"],
        ["local_choice", "0", "acc"],
        ["local_choice", "0", "acc_norm"],
        ["local_letters", "1", "acc"],
    ]
    results = json.loads(output.read_text())
    assert results["n-samples"]["local_letters"] == {"original": 5, "effective": 2}
    assert results["n-shot"] == {"local_choice": 0, "local_letters": 1}
    assert results["manyformer"]["prefix_token_id"] == 300
    assert "samples" not in results
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for changed, parts in (
        (["--batch-size", "0"], ("--batch-size", 0, "1 or more", "raise")),
        (["--num-fewshot", "-1"], ("--num-fewshot", -1, "0 or more", "raise")),
        (["--num-fewshot", "5"], ("num_fewshot", 5, ("local_letters", "4 examples"), "lower")),
        (["--limit", "1.5"], ("--limit", 1.5, "between 0 and 1", "leave")),
        (["--max-length", "257"], ("--max-length", 257, "256", "leave")),
        (["--output", str(tmp_path)], ("--output", str(tmp_path), "file", "make")),
        (["--tokenizer", "bytes", "--tasks", ","], ("--tasks", "no", "task", "names")),
    ):
        assert evaluate.main([*known, *changed]) == 2
        with assert_refused(*parts):
            raise ValueError(error_line(capsys).removeprefix("error: ").rstrip("\n"))
