"""What a mesh's settings mean, and what they refuse."""

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.mesh import MeshConfig, check_launcher
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import SophiaHConfig
from sophia_levanter.config.run import check_mesh
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError


@pytest.mark.parametrize(
    ("settings", "devices", "sizes"),
    [
        ({}, 8, (1, 8, 1, 1)),
        ({"model": 2}, 8, (1, 4, 1, 2)),
        ({"replica": 2, "data": 2, "sequence": 2}, 8, (2, 2, 2, 1)),
        ({"data": 1}, 1, (1, 1, 1, 1)),
    ],
)
def test_sizes(settings, devices, sizes):
    assert MeshConfig(**settings).sizes(devices) == dict(
        zip(("replica", "data", "sequence", "model"), sizes, strict=True)
    )


@pytest.mark.parametrize(
    ("settings", "devices", "needs", "fitting"),
    [
        ({"data": 4}, 8, "data 4 requires 4", "mesh.data 8"),
        ({"data": 4, "model": 4}, 8, "data 4 x model 4 requires 16", "mesh.data 2 with mesh.model 4"),
        ({"model": 3}, 8, "data 2 x model 3 requires 6", "mesh.data 4 with mesh.model 2"),
        (
            {"model": 2, "replica": 3},
            4,
            "replica 3 x model 2 requires 6",
            "mesh.data 1 with mesh.model 2 and mesh.replica 2",
        ),
    ],
)
def test_sizes_that_do_not_fit(settings, devices, needs, fitting):
    with pytest.raises(InputError) as error:
        MeshConfig(**settings).sizes(devices)
    assert str(error.value) == f"mesh: {needs} devices, but there are {devices}; use {fitting}"


def test_more_processes_than_devices():
    message = "^mesh.num_processes is 16, but there are only 8 devices; each process requires at least one$"
    with pytest.raises(InputError, match=message):
        MeshConfig(coordinator="host:1", num_processes=16, process_id=0).sizes(8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": 0}, "^mesh.data is 0; it must be at least 1, or -1 for all remaining devices$"),
        ({"model": -1}, "^mesh.model is -1; it must be at least 1$"),
        ({"fsdp": "width"}, "^mesh.fsdp is 'width'; it must be one of embed, mlp, heads, vocab, layers, or null$"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**settings)


def test_mappings():
    mesh = MeshConfig(fsdp="embed", vocab=None)
    assert mesh.compute_mapping == {
        "batch": ("replica", "data"),
        "heads": ("model",),
        "kv_heads": ("model",),
        "mlp": ("model",),
        "position": ("sequence",),
    }
    assert mesh.parameter_mapping == mesh.compute_mapping | {"embed": ("data",)}
    assert MeshConfig(fsdp="mlp").parameter_mapping["mlp"] == ("model", "data")


MODEL = Gpt2Config(num_layers=6, num_heads=6, embed_dim=96, seq_len=64)


@pytest.mark.parametrize(
    ("mesh", "trainer", "devices", "field", "axes"),
    [
        (MeshConfig(), {}, 8, "trainer.batch_size 12", "mesh.data"),
        (MeshConfig(), {"microbatch_size": 6}, 4, "trainer.microbatch_size 6", "mesh.data"),
        (MeshConfig(replica=4, data=2), {}, 8, "trainer.batch_size 12", "mesh.replica 4 x mesh.data 2"),
        (MeshConfig(model=4), {}, 4, "model.num_heads 6", "mesh.model"),
        (MeshConfig(model=5, heads=None), {}, 5, "model.embed_dim x model.mlp_ratio 384", "mesh.model"),
        (MeshConfig(sequence=3), {}, 3, "model.seq_len 64", "mesh.sequence"),
        (MeshConfig(fsdp="layers"), {}, 4, "model.num_layers 6", "mesh.data"),
        (MeshConfig(fsdp="heads", model=3), {}, 12, "model.num_heads 6", "mesh.model 3 x mesh.data 4"),
        (
            MeshConfig(model=5, heads=None, mlp=None),
            {},
            5,
            "padded vocabulary size (data.tokenizer bytes) 50304",
            "mesh.model",
        ),
    ],
)
def test_what_does_not_divide(mesh, trainer, devices, field, axes):
    config = TrainConfig(model=MODEL, mesh=mesh, trainer=TrainerConfig(batch_size=12, **trainer))
    with pytest.raises(InputError) as error:
        check_mesh(config, devices, 50257)
    assert str(error.value).startswith(f"{field} is not divisible by the {devices} devices on {axes}; use a multiple")


def test_what_divides_is_proposed():
    config = TrainConfig(model=MODEL, mesh=MeshConfig(model=4), trainer=TrainerConfig(batch_size=12))
    with pytest.raises(InputError, match=r"; use a multiple of 4, such as 4, or mesh.heads null$"):
        check_mesh(config, 4)


def test_all_that_does_not_divide_is_said_at_once():
    trainer = TrainerConfig(batch_size=12, microbatch_size=6)
    config = TrainConfig(model=MODEL, mesh=MeshConfig(fsdp="layers"), trainer=trainer)
    with pytest.raises(InputError) as error:
        check_mesh(config, 8)
    said = str(error.value).split("; and ")
    fields = ["model.num_layers 6", "trainer.batch_size 12", "trainer.microbatch_size 6"]
    assert [message.partition(" is not")[0] for message in said] == fields
    # What is proposed fits together.
    assert "use a multiple of 8, such as 8, or" in said[1]
    assert "a multiple of 8 that divides trainer.batch_size 8, such as 8" in said[2]


def test_hutchinsons_own_microbatch_must_divide_too():
    optimizer = SophiaHConfig(curvature_microbatch_size=2)
    config = TrainConfig(model=MODEL, optimizer=optimizer, trainer=TrainerConfig(batch_size=12))
    with pytest.raises(
        InputError, match=r"^optimizer.curvature_microbatch_size 2 is not divisible by the 4 devices on mesh.data"
    ):
        check_mesh(config, 4)


def test_what_fits():
    config = TrainConfig(
        model=MODEL, mesh=MeshConfig(data=2, model=3, fsdp="embed"), trainer=TrainerConfig(batch_size=12)
    )
    check_mesh(config, 6, 50257)


SLURM_TASK = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
STARTED_SEVERAL_TIMES = {
    "srun": ("SLURM_STEP_NUM_TASKS", SLURM_TASK),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}),
    "MPICH": ("PMI_SIZE", {"PMI_SIZE": "2", "PMI_RANK": "1"}),
    "torchrun": ("WORLD_SIZE", {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}),
}


@pytest.mark.parametrize("launcher", STARTED_SEVERAL_TIMES)
def test_one_of_several_processes_that_do_not_meet_is_refused(launcher):
    name, environment = STARTED_SEVERAL_TIMES[launcher]
    with pytest.raises(
        InputError, match=rf"^{name} is 2, but mesh.coordinator is null, .*; for separate runs, unset {name}$"
    ):
        check_launcher(MeshConfig(), environment)


def test_processes_that_meet_are_welcome():
    check_launcher(MeshConfig(coordinator="auto"), SLURM_TASK)


ONE_PROCESS = {
    "no launcher": {},
    "sbatch script": {name: value for name, value in SLURM_TASK.items() if "STEP" not in name},
    # The shell of salloc may be a step of one task in an allocation for several.
    "salloc shell": SLURM_TASK | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
    "srun": SLURM_TASK | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    "a size without a rank": {"WORLD_SIZE": "8"},
    "a size that is not a number": {"WORLD_SIZE": "large", "RANK": "0", "LOCAL_RANK": "0"},
}


@pytest.mark.parametrize("started_by", ONE_PROCESS)
def test_one_process_is_welcome(started_by):
    check_launcher(MeshConfig(), ONE_PROCESS[started_by])
