"""Processes that a job starts on its nodes, seen from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launchers.cluster import ROOT, Cluster
from tests.launchers.recorded_job import run_recorded, torchrun_option, trainer_arguments
from tests.launchers.test_job_scripts import SCRIPTS
from tests.missing import cannot_run


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
def test_every_node_starts_its_ranks_and_all_meet_at_the_first_node(
    script: str, cluster: Cluster, tmp_path: Path
) -> None:
    job = run_recorded(cluster, script, "training.lr=1e-3", run_dir=tmp_path / "run")
    assert job.fields["JobState"] == "COMPLETED", job.output
    num_nodes = int(job.fields["NumNodes"])
    assert [torchrun_option(node, "--node-rank") for node in job.nodes] == [
        str(rank) for rank in range(num_nodes)
    ]
    assert [node["host"] for node in job.nodes] == cluster.nodes[:num_nodes]
    port = 10000 + int(job.fields["JobId"]) % 20000
    for node in job.nodes:
        assert torchrun_option(node, "--nnodes") == str(num_nodes)
        assert torchrun_option(node, "--nproc-per-node") == "8"
        assert torchrun_option(node, "--master-addr") == job.nodes[0]["host"]
        assert torchrun_option(node, "--master-port") == str(port)
        assert node["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
        assert trainer_arguments(node)[:2] == ["--config-name", script]
        assert trainer_arguments(node)[-1] == "training.lr=1e-3", "the user's word comes last"


def test_a_job_says_what_it_runs_before_it_runs(cluster: Cluster, tmp_path: Path) -> None:
    job = run_recorded(cluster, "llama_125m", "training.lr=1e-3", run_dir=tmp_path / "run")
    assert "command: python -m pretrain.train --config-name llama_125m" in job.output
    assert "'launchers/versions.py'" in job.output
    assert "'--print-config'" in job.output
    assert str(job.log_dir).startswith(str(tmp_path / "run"))
    assert "training.lr=1e-3" in (job.log_dir / "start.txt").read_text()


def test_unhealthy_nodes_are_left_out_and_spares_take_their_place(
    cluster: Cluster, tmp_path: Path
) -> None:
    check = tmp_path / "check"
    check.write_text('#!/bin/sh\n[ "$(hostname)" != node2 ] || { echo "fan is loud"; exit 7; }\n')
    check.chmod(0o755)
    job = run_recorded(
        cluster,
        "llama_7b",
        run_dir=tmp_path / "run",
        options=("--nodes=4", "--nodelist=node[1-4]"),
        variables={"TRAIN_NODES": "2", "HEALTH_CHECK": str(check)},
    )
    assert job.fields["JobState"] == "COMPLETED", job.output
    assert [node["host"] for node in job.nodes] == ["node1", "node3"]
    assert f"left out: node2 ({check} failed with code 7)" in job.output
    assert "fan is loud" in (job.log_dir / "health/node2").read_text()


def test_too_few_healthy_nodes_end_the_job_with_the_remedy(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = run_recorded(
        cluster,
        "llama_7b",
        run_dir=tmp_path / "run",
        options=("--nodes=2",),
        variables={"HEALTH_CHECK": "/bin/false"},
    )
    assert (job.fields["JobState"], job.fields["Restarts"]) == ("FAILED", "0")
    assert "0 healthy nodes of 2; ask for spares" in job.output
    assert job.nodes == []


# What Transformer Engine, cuDNN, Triton, inductor and the kernels of a CPU read.
COMPILING = {
    "NVTE_FUSED_ATTN": "0",
    "CUDNN_LOGLEVEL_DBG": "1",
    "TRITON_CACHE_DIR": "/tmp/triton",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "KMP_BLOCKTIME": "1",
    "CC": "gcc",
    "CXX": "g++",
    "CPATH": "/opt/include",
    "LIBRARY_PATH": "/opt/lib",
}


def test_ranks_see_no_secret_and_nothing_unknown(cluster: Cluster, tmp_path: Path) -> None:
    job = run_recorded(
        cluster,
        "llama_125m",
        run_dir=tmp_path / "run",
        variables={
            "WANDB_API_KEY": "canary-1",
            "HF_TOKEN": "canary-2",
            "AWS_SECRET_ACCESS_KEY": "canary-3",
            "MANYFORMER_TOKEN": "canary-4",
            "MLFLOW_TRACKING_PASSWORD": "canary-5",
            "UNKNOWN": "canary-6",
            "odd.name": "canary-7",
            "BASH_FUNC_odd%%": "() { echo canary-8; }",
            "WANDB_MODE": "offline",
            "NCCL_ALGO": "Ring,a=b c",
            **COMPILING,
            "WANTED_KEY": "kept",
            "KEEP_ENV": "WANTED_KEY,OTHER",
        },
    )
    [node] = job.nodes
    assert "canary" not in str(node["environment"])
    assert node["environment"]["WANDB_MODE"] == "offline"
    assert node["environment"]["NCCL_ALGO"] == "Ring,a=b c"
    assert COMPILING.items() <= node["environment"].items()
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in node["environment"], "torch's default is better"
    assert node["environment"]["WANTED_KEY"] == "kept"
    for path in [*job.log_dir.rglob("*"), Path(job.fields["StdOut"])]:
        assert path.is_dir() or "canary" not in path.read_text(), path


def test_ranks_run_in_the_container_that_a_variable_names(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.takes_containers:
        cannot_run("no headers of Slurm here", needs="a plugin of Slurm")
    job = run_recorded(
        cluster,
        "llama_7b",
        run_dir=tmp_path / "run",
        options=("--nodes=2",),
        variables={
            "CONTAINER_IMAGE": "registry.example/a b:1$(touch x)",
            "CONTAINER_MOUNTS": "/data:/data:ro,/scratch:/scratch",
        },
    )
    assert len(job.nodes) == 2, job.output
    for node in job.nodes:
        assert node["environment"]["ASKED_IMAGE"] == "registry.example/a b:1$(touch x)"
        assert node["environment"]["ASKED_WORKDIR"] == str(ROOT)
        assert node["environment"]["ASKED_NO_HOME"] == "yes"
        mounts = node["environment"]["ASKED_MOUNTS"]
        assert mounts == f"{ROOT}:{ROOT},/data:/data:ro,/scratch:/scratch"


def test_without_the_variable_no_container_is_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    [node] = run_recorded(cluster, "llama_125m", run_dir=tmp_path / "run").nodes
    assert [name for name in node["environment"] if name.startswith("ASKED_")] == []


@pytest.mark.parametrize("fabric", ["infiniband", "roce", "efa", "ethernet"])
def test_a_fabric_sets_its_variables_and_the_users_values_win(
    fabric: str, cluster: Cluster, tmp_path: Path
) -> None:
    job = run_recorded(
        cluster,
        "llama_125m",
        run_dir=tmp_path / "run",
        variables={"FABRIC": fabric, "NCCL_IB_RETRY_CNT": "3", "NCCL_DEBUG": "INFO"},
    )
    [node] = job.nodes
    expected = {
        "infiniband": ("NCCL_IB_TIMEOUT", "22"),
        "roce": ("NCCL_IB_GID_INDEX", "3"),
        "efa": ("FI_PROVIDER", "efa"),
        "ethernet": ("NCCL_IB_DISABLE", "1"),
    }
    name, value = expected[fabric]
    assert node["environment"][name] == value
    assert node["environment"]["NCCL_IB_RETRY_CNT"] == "3"
    assert node["environment"]["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize("fabric", ["token_ring", "../job", "/etc/profile"])
def test_an_unknown_fabric_ends_the_job_with_the_known_ones(
    fabric: str, cluster: Cluster, tmp_path: Path
) -> None:
    variables = {"FABRIC": fabric}
    job = run_recorded(cluster, "llama_125m", run_dir=tmp_path / "run", variables=variables)
    assert job.fields["ExitCode"] == "2:0"
    refusal = f"FABRIC={fabric} is unknown; set it to one of efa ethernet infiniband roce"
    assert refusal in job.output


@pytest.mark.parametrize("number", ["0", "3", "two", "a[$(touch injected)]", ""])
def test_train_nodes_must_fit_the_job(number: str, cluster: Cluster, tmp_path: Path) -> None:
    job = run_recorded(
        cluster,
        "llama_7b",
        run_dir=tmp_path / "run",
        options=("--nodes=2",),
        variables={"TRAIN_NODES": number},
    )
    if number == "":
        assert len(job.nodes) == 2
    else:
        assert job.fields["ExitCode"] == "2:0", job.output
        assert f"TRAIN_NODES={number} " in job.output


@pytest.mark.parametrize(
    ("marker", "state", "code", "said"),
    [("DONE", "COMPLETED", "0:0", "trained to the end"), ("STOP", "FAILED", "75:0", "remove it")],
)
def test_a_finished_or_stopped_run_is_not_started_again(
    marker: str, state: str, code: str, said: str, cluster: Cluster, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / marker).touch()
    job = run_recorded(cluster, "llama_125m", run_dir=run_dir)
    assert (job.fields["JobState"], job.fields["ExitCode"]) == (state, code)
    assert said in job.output
    assert job.nodes == []
