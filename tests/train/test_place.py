"""Every launcher's variables give each process its own place, and what contradicts itself is refused by name."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from engine.train.place import DEFAULT_PORT, Place, expand_nodes, place_from_environment

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
STEP = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "node[01-03,07]",
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "head",
            "MASTER_PORT": "1234", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def numbers(env: dict[str, str]) -> tuple[int, int, int, int]:
    found = place_from_environment(env)
    return found.rank, found.world, found.local_rank, found.local_world


@pytest.mark.parametrize(("env", "wanted"), [
    ({}, (0, 1, 0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1, 2)),
    (TORCHRUN, (5, 8, 1, 4)),
    (OPEN_MPI, (1, 2, 1, 2)),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "head"}, (1, 4, 1, 2)),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, (0, 1, 0, 1)),
    ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1",
      "MV2_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2, 1, 2)),
    (MPICH, (3, 4, 3, 4)),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2, 1, 2)),
    (STEP, (3, 4, 1, 2)),
    ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4, 1, 2)),  # srun --mpi=pmi2
    ({**STEP, **OPEN_MPI}, (1, 2, 1, 2)),  # mpirun in a batch job: Slurm's step is that of mpirun's helpers
    ({**STEP, "SLURM_STEP_NODELIST": "node01"}, (3, 4, 1, 4)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]"}, (0, 1, 0, 1)),  # sbatch, no step
    ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1, 0, 1)),  # srun --pty bash
    ({**STEP, **TORCHRUN}, (5, 8, 1, 4)),  # srun starts one torchrun a node
    ({**OPEN_MPI, "RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 2)),  # a wrapper that exports what mpirun says
    ({**OPEN_MPI, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8",
      "MASTER_ADDR": "head"}, (9, 16, 1, 8)),  # another launcher inside mpirun, one a machine
])
def test_a_process_knows_its_place(env: dict[str, str], wanted: tuple[int, int, int, int]) -> None:
    assert numbers(env) == wanted


@pytest.mark.parametrize(("env", "words"), [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment and RANK is not"),
    ({"RANK": "1"}, "RANK=1 is set in the environment and WORLD_SIZE is not"),
    ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h"},
     "LOCAL_RANK=2, LOCAL_WORLD_SIZE=2, RANK=0, WORLD_SIZE=4: these contradict each other"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, "contradict each other"),
    ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "set MASTER_ADDR to the machine"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun has started 4 processes, 2 of them on this machine"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "contradict each other; start with mpirun"),
    ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "the launcher says rank 1 of 2 processes: unset RANK"),
    ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "2"}, "the launcher says rank 1 of 2 processes: unset RANK"),
    ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "the launcher says rank 3 of 4 processes"),
    ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_PROCID is not"),
    ({**STEP, "SLURM_PROCID": "4"}, "SLURM_PROCID 4 must be below SLURM_STEP_NUM_TASKS 4"),
    ({**STEP, "SLURM_STEP_NODELIST": ""}, "no list of nodes tells where rank 0 is; set MASTER_ADDR"),
    ({**STEP, "SLURM_DISTRIBUTION": "arbitrary"}, "set MASTER_ADDR"),
    ({**STEP, "SLURM_STEP_NODELIST": "n[1-"}, "SLURM_STEP_NODELIST='n[1-' in the environment is not a list of nodes"),
    ({**STEP, "SLURM_STEP_NODELIST": "n[1-x]"}, "SLURM_STEP_NODELIST: '1-x' is not a range of nodes"),
    ({"PMI_RANK": "one", "PMI_SIZE": "2"}, "PMI_RANK='one' in the environment is not a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "is not a whole number"),
])
def test_what_contradicts_itself_is_refused_by_name(env: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        place_from_environment(env)
    assert words in str(caught.value)


@pytest.mark.parametrize(("env", "host", "port"), [
    ({"RANK": "1", "WORLD_SIZE": "2"}, "127.0.0.1", DEFAULT_PORT),
    (TORCHRUN, "head", 1234),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "[::1]"}, "::1", DEFAULT_PORT),
    (OPEN_MPI, "127.0.0.1", DEFAULT_PORT),
    (STEP, "node01", None),
    ({**STEP, "SLURM_STEP_NODELIST": "alone"}, "127.0.0.1", None),
    ({**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}, "head", 1234),
])
def test_where_ranks_meet(env: dict[str, str], host: str, port: int | None) -> None:
    found = place_from_environment(env)
    assert found.host == host and (port is None or found.port == port)


def test_two_jobs_of_one_machine_meet_at_two_ports() -> None:
    def port(**more: str) -> int:
        return place_from_environment({**OPEN_MPI, **more}).port

    assert port(PMIX_NAMESPACE="prterun-a-1@1") != port(PMIX_NAMESPACE="prterun-a-2@1")
    assert port(PMIX_NAMESPACE="prterun-a-1@1") == port(PMIX_NAMESPACE="prterun-a-1@1", OMPI_COMM_WORLD_RANK="0")


def test_one_process_needs_no_port() -> None:
    assert place_from_environment({"MASTER_PORT": "http"}) == Place(0, 1, 0, 1)


@pytest.mark.parametrize(("text", "hosts"), [
    ("a", ["a"]), ("a,b", ["a", "b"]), ("n[01-03,07]", ["n01", "n02", "n03", "n07"]),
    ("n-a[9-11],m", ["n-a9", "n-a10", "n-a11", "m"]), ("r[1-2]c[3-4]x", ["r1c3x", "r1c4x", "r2c3x", "r2c4x"]),
])
def test_a_list_of_nodes_is_expanded(text: str, hosts: list[str]) -> None:
    assert expand_nodes(text) == hosts
