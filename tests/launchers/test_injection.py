"""Names, overrides, paths and variables are text: they arrive as they were sent and never run."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.launchers.cluster import Cluster
from tests.launchers.hostile import hostile_strings
from tests.launchers.recorded_job import RecordedJob, run_recorded, trainer_arguments


def test_the_strings_are_hostile(tmp_path: Path) -> None:
    executed = 0
    strings = hostile_strings(tmp_path / "canary")
    assert len(strings) == len(set(strings)) == 50
    for string in strings:
        for start, end in (
            ("echo ", ""),
            ('echo "', '"'),
            ("echo '", "'"),
            ("((", "))"),
            ("! :", ""),
        ):
            line = f"{start}{string}{end}"
            subprocess.run(["bash", "-c", line], capture_output=True, cwd=tmp_path, check=False)
        executed += (tmp_path / "canary").exists()
        (tmp_path / "canary").unlink(missing_ok=True)
    assert executed >= 40, "unquoted in one way or another, most of them run"


def test_hostile_names_overrides_paths_and_variables_arrive_unchanged_and_are_not_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    strings = hostile_strings(canary)

    def run(index: int) -> RecordedJob:
        text = strings[index]
        return run_recorded(
            cluster,
            "llama_125m",
            *("training.lr=1e-3", text, f"run.name={text}", "--", f"--flag={text}"),
            # A path component has no slash.
            run_dir=tmp_path / str(index) / text.replace("/", "\\"),
            options=(f"--job-name={text}", f"--comment={text}"),
            variables={"NCCL_ALGO": text, "MANYFORMER_NOTE": text},
        )

    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(run, range(len(strings))))
    assert not canary.exists()
    assert [path.name for path in tmp_path.iterdir() if not path.name.isdecimal()] == []
    for text, job in zip(strings, jobs, strict=True):
        [node] = job.nodes
        assert trainer_arguments(node)[-5:] == [
            *("training.lr=1e-3", text, f"run.name={text}", "--", f"--flag={text}")
        ]
        assert node["environment"]["NCCL_ALGO"] == text
        assert node["environment"]["MANYFORMER_NOTE"] == text
        assert node["environment"]["RUN_DIR"] == str(job.log_dir.parents[2])


SETTINGS = (
    *("TRAIN_NODES", "RANKS_PER_NODE", "MAX_STALLED_LAUNCHES", "FABRIC"),
    *("HEALTH_CHECK", "HEALTH_TIMEOUT", "KEEP_ENV", "PYTHON", "OMP_NUM_THREADS"),
)


def test_a_hostile_setting_of_a_job_is_not_run(cluster: Cluster, tmp_path: Path) -> None:
    """Among them the strings that bash runs where it expects a number."""
    canary = tmp_path / "canary"
    strings = [text for text in hostile_strings(canary) if text.startswith(("$(", "a["))]
    cases = [(setting, text) for setting in SETTINGS for text in strings]

    def run(index: int) -> RecordedJob:
        setting, text = cases[index]
        return run_recorded(
            cluster, "llama_125m", run_dir=tmp_path / str(index), variables={setting: text}
        )

    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(run, range(len(cases))))
    assert not canary.exists()
    for (setting, _), job in zip(cases, jobs, strict=True):
        refused = setting not in ("KEEP_ENV", "OMP_NUM_THREADS")
        assert job.fields["JobState"] == ("FAILED" if refused else "COMPLETED"), job.output
