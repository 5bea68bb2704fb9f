"""Small tasks of lm_eval in a folder of their own: a task file and its data for every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ("local_choice", "local_letters", "local_text", "local_answer")
TEXT = "river stone carries the cold water over a bridge, caf\u00e9 \u4f60\u597d 12\t\n"
_QUESTIONS = [
    {
        "question": "river stone",
        "choices": [" carries", " carries the cold", " bridge"],
        "answer": 1,
    },
    {"question": "Where is the water? ", "choices": ["cold", "over a bridge", "12"], "answer": 0},
    {"question": TEXT, "choices": ["caf\u00e9", "a bridge", " \u4f60"], "answer": 2},
    {"question": "", "choices": ["the cold water", "a", "over"], "answer": 0},
    {"question": "a bridge, the", "choices": [" water", " cold", " \u597d"], "answer": 1},
]
_TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    # One token a choice, and examples before the question.
    "local_letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "answer",
        "doc_to_choice": [" a", " b", " c"],
        "fewshot_split": "test",
        "num_fewshot": 2,
        "metric_list": [{"metric": "acc"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question * 3 + choices[0]}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "local_answer": {
        "output_type": "generate_until",
        # Without a begin token lm_eval gives transformers a row of padding for an empty prompt.
        "doc_to_text": "{{question or 'over'}}",
        "doc_to_target": "{{choices[answer]}}",
        # lm_eval finds a stop string in the names of special tokens, too: "e" ends at <|begin|>.
        "generation_kwargs": {"until": ["\n", "a"], "max_gen_toks": 11},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """Write the tasks, whose data are read from `folder` and cached in it; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in _QUESTIONS))
    for name, settings in _TASKS.items():
        source = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
        }
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(source | settings))
    return folder
