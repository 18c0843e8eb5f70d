"""What the scripts say and refuse before they submit; no SLURM is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from dry_runs import assert_refused, start
from tiny_models import ROOT
from tiny_runs import Layout, Runs

CPT = ROOT / "examples" / "slurm_quickstart" / "cpt.sh"


def dry_run(script: Path = CPT, **variables: str) -> subprocess.CompletedProcess[str]:
    return start(script, **variables)


def test_a_dry_run_says_all_and_submits_nothing(runs: Runs, tmp_path: Path) -> None:
    save = tmp_path / "run"
    done = start(
        CPT,
        CONFIG=runs.configure("dry", Layout(tp=2, dp=2)),
        SAVE=str(save),
        CHECK="1",
        DEVICE="a100-80g",
        TIME="4:00:00",
        SBATCH_OPTIONS="--exclusive --qos=long",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "quickstart-cpt\n"
    assert "layout: 4 ranks = TP 2 x PP 1 x CP 1 x DP 2; a global batch of 8 samples is 2 micro-batches of 2" in done.stderr
    assert "token budget: 2,560 tokens = 5 steps of 512" in done.stderr
    assert "ALMR asked 0.3300" in done.stderr, "the ledger of --check_only"
    assert "4 x a100-80g" in done.stderr
    *_, srun, sbatch = done.stderr.splitlines()
    assert srun.startswith("srun --nodes=2 ")
    assert srun.rstrip().endswith(f"--checkpoint.save {save}")
    assert sbatch.startswith("sbatch ")
    for option in ("--nodes=2", "--ntasks-per-node=2", "--time=4:00:00", "--signal=B:USR1@300", "--exclusive", "--qos=long"):
        assert f" {option} " in sbatch
    assert " --requeue " in sbatch
    assert not save.exists()


def test_a_job_that_nobody_may_queue_again(runs: Runs) -> None:
    """Nor SLURM itself, whose default may be to do so."""
    done = dry_run(CONFIG=runs.configure("dry", Layout(tp=2, dp=2)), REQUEUE="0")
    assert done.returncode == 0, done.stderr
    assert " --no-requeue " in done.stderr.splitlines()[-1]
    assert " --requeue " not in done.stderr


def test_torchrun_and_containers_in_a_dry_run(runs: Runs) -> None:
    config = {
        "CONFIG": runs.configure("dry", Layout(tp=2)),
        "RANKS_PER_NODE": "4",
        "GPUS_PER_NODE": "4",
        "LAUNCHER": "torchrun",
    }
    done = dry_run(**config, CONTAINER_IMAGE="nvcr.io#nvidia/pytorch:25.03-py3", CONTAINER_MOUNTS="/data:/data")
    assert done.returncode == 0, done.stderr
    srun, sbatch = done.stderr.splitlines()[-2:]
    assert "exec torchrun " in srun
    assert " --nnodes=2 --nproc-per-node=4 --master-addr=FIRST_NODE" in srun
    assert "--container-image=nvcr.io#nvidia/pytorch:25.03-py3 --container-mounts=/data:/data" in srun
    assert " --gpus-per-node=4 " in sbatch
    done = dry_run(**config, CONTAINER_IMAGE="/images/p.sif", CONTAINER_RUNTIME="apptainer", CONTAINER_MOUNTS="/data:/data")
    assert f" apptainer exec --bind /data:/data --pwd {ROOT} --nv /images/p.sif bash -c " in done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NODES": "two"}, "NODES is 'two'; expected a whole number above 0"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER is 'mpirun'; expected srun, torchrun or accelerate"),
        ({"REQUEUE": "yes"}, "REQUEUE is 'yes'; expected 0 or 1"),
        ({"LAUNCHER": "accelerate"}, "ACCELERATE is ''; expected accelerate's configuration"),
        ({"TIME": "soon"}, "TIME is 'soon'; expected hours:minutes:seconds"),
        ({"TIME": "00:06:00"}, "SIGNAL_SECONDS is 300 and TIME 00:06:00; expected less than that by more than a minute"),
        ({"JOB_NAME": "runs/a"}, "JOB_NAME is 'runs/a'; expected a name without /"),
        ({"CONTAINER_RUNTIME": "docker"}, "CONTAINER_RUNTIME is 'docker'; expected pyxis or apptainer"),
        ({"GPUS_PER_NODE": "8"}, "GPUS_PER_NODE is 8 and RANKS_PER_NODE 2; expected the same number, or GPUS_PER_NODE 0"),
        ({"DRY_RUN": "0", "CONFIG": "tiny"}, "sbatch is not there; expected a machine that submits to SLURM, or DRY_RUN=1"),
        (
            {"NODES": "3", "CONFIG": "tiny"},
            "training.global_batch_size is 8; expected a multiple of 6, micro_batch_size 2 x data-parallel size 3",
        ),
        ({"NODES": "1", "RANKS_PER_NODE": "3", "CONFIG": "tiny"}, "3 processes cannot hold tensor_model_parallel_size 2"),
        ({"DEVICE": "a100-40g", "MODEL": "70B", "CONFIG": "tiny"}, "dry.yaml does not fit into 4 x a100-40g: "),
    ],
)
def test_what_is_refused(variables: dict[str, str], message: str, runs: Runs) -> None:
    if "CONFIG" in variables:
        variables = variables | {"CONFIG": runs.configure("dry", Layout(tp=2, dp=2))}
    if variables.get("DRY_RUN") == "0" and Path("/usr/bin/sbatch").exists():
        pytest.skip("sbatch is there")
    assert_refused(dry_run(**variables), message)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("2", 120), ("2:05", 125), ("08:09:10", 29350), ("1-2", 93600), ("1-2:3", 93780), ("1-2:3:4", 93784), ("UNLIMITED", 0)],
)
def test_a_time_limit_in_seconds(limit: str, seconds: int) -> None:
    """As sbatch reads it; 0: there is none."""
    source = f"source {ROOT}/examples/lib/launch.sh; seconds_of {limit}"
    done = subprocess.run(["bash", "-euc", source, str(CPT)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == seconds


def test_from_a_shell_of_salloc(runs: Runs, tmp_path: Path) -> None:
    """Where SLURM has set its variables, and the folder is another."""
    allocation = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = start(CPT, CONFIG=runs.configure("dry", Layout(tp=2, dp=2)), cwd=tmp_path, **allocation)
    assert (done.returncode, done.stdout) == (0, "quickstart-cpt\n"), done.stderr


def test_wrong_variables_of_the_quickstart() -> None:
    """Nothing is fetched first."""
    assert_refused(dry_run(CPT.parent / "quickstart.sh", DRY_RUN="yes"), "DRY_RUN is 'yes'; expected 0 or 1")
    assert_refused(dry_run(CPT.parent / "convert.sh", DIRECTION="back"), "DIRECTION is 'back'; expected hf-to-megatron or")


def test_the_chain_of_the_quickstart() -> None:
    done = dry_run(CPT.parent / "quickstart.sh")
    assert done.returncode == 0, done.stderr
    submitted = [line for line in done.stderr.splitlines() if line.startswith("sbatch ")]
    waits = [[word for word in line.split() if word.startswith("--dependency=")] for line in submitted]
    assert waits == [
        [],
        ["--dependency=afterok:preprocess"],
        [],
        ["--dependency=afterok:merge:hf-to-megatron"],
        ["--dependency=afterok:quickstart-cpt"],
    ]
