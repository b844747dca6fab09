"""What launchers leave in the environment becomes the trainer's settings, or one line that names both sides."""

from __future__ import annotations

from datetime import timedelta

import pytest
import yaml

from launch.cli import main
from launch.fit import TandemCLI
from launch.launchers import launched, origin, settle, strategy_of
from launch.lightning_run import words_for_fabric
from tests.launch.helpers import fit_config
from trainer.schema import UserError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
FABRIC = {**TORCHRUN, "LT_CLI_USED": "1", "LT_DEVICES": "2", "LT_NUM_NODES": "1"}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
}


@pytest.fixture
def settled(tmp_path, tiny_llama):
    """`settled(env, *flags, **trainer)`: the config's trainer and policy after the launcher's word."""
    path = fit_config(tmp_path, tiny_llama)

    def go(env: dict[str, str], *flags: str, policy: dict | None = None, **trainer):
        content = yaml.safe_load(path.read_text())
        content["trainer"].pop("devices", None)
        content["trainer"].pop("accelerator", None)
        content["trainer"] |= trainer
        content["model"]["init_args"]["policy"] |= policy or {}
        path.write_text(yaml.safe_dump(content))
        words = ["--config", str(path), *flags]
        config = TandemCLI(words, "inspect").config
        settle(config, words, env)
        return config.trainer, config.model.init_args.policy

    return go


def refused(settled, *args, **settings) -> str:
    with pytest.raises(UserError) as caught:
        settled(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_launcher_nothing_changes(settled):
    trainer, policy = settled({})
    assert (trainer.devices, trainer.num_nodes, trainer.accelerator, trainer.strategy) == (
        "auto",
        1,
        "auto",
        "auto",
    )
    assert policy.dtype == "float32"


def test_fabric_s_flags_mean_what_they_say(settled):
    flags = {"LT_ACCELERATOR": "cpu", "LT_STRATEGY": "deepspeed_stage_3", "LT_PRECISION": "32-true"}
    trainer, _ = settled({**FABRIC, **flags, "WORLD_SIZE": "4", "LT_NUM_NODES": "2"})
    assert (trainer.devices, trainer.num_nodes, trainer.accelerator) == (2, 2, "cpu")
    assert (trainer.strategy, trainer.precision) == ("zero3", "32-true")


def test_torchrun_and_srun_say_how_many_and_several_ranks_are_ddp(settled):
    trainer, _ = settled({**TORCHRUN, "WORLD_SIZE": "6"})
    assert (trainer.devices, trainer.num_nodes, trainer.strategy) == (2, 3, "ddp")
    trainer, _ = settled(SRUN)
    assert (trainer.devices, trainer.num_nodes, trainer.strategy) == (2, 2, "ddp")
    # torchrun inside a job step has made this process.
    assert settled({**SRUN, **TORCHRUN})[0].num_nodes == 1
    assert settled({**SRUN, "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"})[
        0
    ].strategy == ("auto")


@pytest.mark.parametrize("env", [TORCHRUN, FABRIC])
@pytest.mark.parametrize("devices", [2, "2", "auto", -1])
def test_a_config_that_agrees_is_no_conflict(settled, env, devices):
    assert int(settled(env, devices=devices)[0].devices) == 2


def test_a_conflict_names_both_sides(settled, tmp_path):
    told = refused(settled, FABRIC, devices=4)
    assert f"{tmp_path}/preference.yaml: trainer.devices contradicts LT_DEVICES=2" in told
    assert "--trainer.devices 4 contradicts LOCAL_WORLD_SIZE=2 (torchrun" in refused(
        settled, TORCHRUN, "--trainer.devices", "4", devices=2
    )
    assert "--trainer.num_nodes 1 contradicts SLURM_NNODES=2" in refused(
        settled, SRUN, "--trainer.num_nodes=1", devices=2
    )
    told = refused(settled, {**FABRIC, "LT_STRATEGY": "deepspeed_stage_3"}, strategy="ddp", devices=2)
    assert "trainer.strategy contradicts LT_STRATEGY=deepspeed_stage_3 (--strategy of" in told
    told = refused(
        settled, {**FABRIC, "LT_ACCELERATOR": "cuda"}, accelerator="cpu", strategy="auto", devices=2
    )
    assert "trainer.accelerator contradicts LT_ACCELERATOR=cuda" in told


def test_gpu_numbers_are_kept(settled):
    env = {**FABRIC, "LT_DEVICES": "1,3", "LT_ACCELERATOR": "cuda"}
    assert settled(env, accelerator="gpu")[0].devices == "1,3"
    assert "contradicts LT_DEVICES=1,3" in refused(settled, env, devices=2)
    # Which two of the node's devices is the config's to say.
    assert settled(FABRIC, devices=[1, 3])[0].devices == [1, 3]


@pytest.mark.parametrize(
    "name", ["deepspeed", "deepspeed_stage_2", "fsdp", "dp", "deepspeed_stage_3_offload"]
)
def test_other_strategies_are_refused_with_what_to_use(settled, name):
    for told in (
        refused(settled, {**FABRIC, "LT_STRATEGY": name}),
        refused(settled, {}, strategy=name),
    ):
        assert f"{name} is not supported; " in told
        assert "zero3" in told


def test_deepspeed_s_name_for_zero3_is_known_in_a_config_too(settled):
    assert settled({}, strategy="deepspeed_stage_3")[0].strategy == "zero3"


def test_precision_is_of_the_base(settled, capsys):
    trainer, policy = settled({**FABRIC, "LT_PRECISION": "bf16-true"}, precision="32-true")
    assert (policy.dtype, trainer.precision) == ("bfloat16", "32-true")
    assert "policy.dtype bfloat16" in capsys.readouterr().err
    _, policy = settled({**FABRIC, "LT_PRECISION": "32"}, policy={"dtype": "bfloat16"})
    assert policy.dtype == "bfloat16"


def test_a_precision_that_cannot_be_is_refused(settled):
    for precision in ("16-mixed", "bf16-mixed", "bf16", "64-true"):
        assert f"LT_PRECISION={precision} " in refused(settled, {**FABRIC, "LT_PRECISION": precision})
    bfloat16 = {**FABRIC, "LT_PRECISION": "bf16-true"}
    assert "policy.adapter is null" in refused(settled, bfloat16, policy={"adapter": None})
    told = refused(settled, bfloat16, "--model.policy.dtype", "float32", policy={"adapter": {"kind": "ia3"}})
    assert "--model.policy.dtype float32 contradicts LT_PRECISION=bf16-true" in told


def test_processes_that_would_wait_for_ever_are_refused(settled):
    batch = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    assert "write `srun tandem ...`" in refused(settled, batch)
    assert "add --job-name=train to `srun`" in refused(
        settled, {**SRUN, "SLURM_JOB_NAME": "interactive", "SLURM_STEP_NUM_TASKS": "4"}
    )
    without = {key: value for key, value in SRUN.items() if key != "SLURM_NTASKS_PER_NODE"}
    assert "give --ntasks-per-node," in refused(settled, without)
    assert "(now SLURM_NTASKS_PER_NODE=2)" in refused(settled, {**SRUN, "SLURM_NTASKS": "3"})
    assert "--nproc-per-node" in refused(settled, {**TORCHRUN, "WORLD_SIZE": "3"})
    assert "MASTER_ADDR, MASTER_PORT and NODE_RANK" in refused(settled, {}, num_nodes=2)
    assert settled({"MASTER_ADDR": "n1"}, num_nodes=2)[0].strategy == "ddp"


def test_a_shell_inside_a_job_is_no_task_of_it():
    assert launched({**SRUN, "SLURM_JOB_NAME": "bash"}) == {}
    assert launched({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}) == {}


def test_the_last_word_has_it(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("trainer: {devices: 2}")
    b.write_text("trainer: {max_steps: 2}\nmodel: {init_args: {policy: {dtype: float32}}}")
    words = ["--trainer.devices=3", "--config", str(a), f"--config={b}"]
    assert origin("trainer.devices", words) == f"{a}: trainer.devices"
    assert origin("trainer.devices", [*words, "--trainer.devices", "4"]) == "--trainer.devices 4"
    assert origin("model.policy.dtype", words) == f"{b}: model.policy.dtype"
    assert origin("trainer.strategy", words) is None


def test_ranks_wait_no_longer_than_they_are_told(settled):
    # Lightning 2.6 keeps it under this name.
    assert strategy_of("ddp", 90.0)._timeout == timedelta(seconds=90)
    assert strategy_of("zero3", 90.0)._timeout == timedelta(seconds=90)
    given = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {}}
    trainer, _ = settled({}, "--rank_timeout", "45", strategy=given)
    assert trainer.strategy.init_args.timeout == timedelta(seconds=45)
    given["init_args"] = {"timeout": "0:00:30"}
    trainer, _ = settled({}, "--rank_timeout", "45", strategy=given)
    assert trainer.strategy.init_args.timeout == timedelta(seconds=30)
    given = {"class_path": "trainer.strategy.Zero3", "init_args": {"hpz_partition_size": 8}}
    trainer, _ = settled({}, "--rank_timeout", "45", strategy=given)
    assert type(trainer.strategy.init_args.timeout) is float  # or the config cannot be written
    assert trainer.strategy.init_args.timeout == 45


def test_lightning_run_speaks_fabric():
    port = "--main-port=7"
    assert words_for_fabric(["run", "model", "fit.py", "--strategy=zero3"], 7) == [
        *["run", port, "fit.py", "--strategy=deepspeed_stage_3"]
    ]
    assert words_for_fabric(
        ["run", "fit.py", "--num_nodes", "1", "--strategy", "zero3", "--run", "x"], 7
    ) == [
        *["run", port, "fit.py", "--num_nodes", "1", "--strategy", "deepspeed_stage_3"],
        *["--trainer.default_root_dir", "x"],
    ]
    # Where the ranks are on several nodes, all must be told of the same port.
    for words in (["run", "--num-nodes=2", "fit.py"], ["run", "--main_port", "9", "fit.py"], ["--help"]):
        assert words_for_fabric(words, 7) == words


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("trainer.precision", "bf16-mixed", "bf16-mixed is not supported; 32-true"),
        ("trainer.precision", "16-mixed", "16-mixed is not supported; 32-true"),
        ("trainer.devices", "abc", "trainer.devices: abc is no number of devices"),
        ("trainer.devices", "-1", "trainer: "),
        ("trainer.num_nodes", "0", "trainer: "),
    ],
)
@pytest.mark.parametrize("strategy", ["auto", "zero3"])
def test_what_is_not_possible_is_one_line(
    tmp_path, tiny_llama, capsys, strategy, setting, value, said
) -> None:
    words = ["--config", str(fit_config(tmp_path, tiny_llama)), "--run", str(tmp_path / "run")]
    assert main(["fit", *words, "--trainer.strategy", strategy, f"--{setting}", value]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
