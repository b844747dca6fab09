"""DeepSpeed's ZeRO-3 under Lightning, on GPUs (NCCL) and on CPUs (gloo), with checkpoints that every strategy reads.

Policy, gradients, optimizer and a sharded reference each lie in equal shares on the ranks (Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054, section 5). Importing this file makes `trainer.strategy: zero3` known to Lightning;
DeepSpeed itself is imported when the strategy is built.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
from collections.abc import Generator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from transformers.optimization import Adafactor
from typing_extensions import override

from trainer.policy.sharded import is_sharded, kept, sharding, share_of
from trainer.schema import UserError


class Zero3(DeepSpeedStrategy):
    """ZeRO-3: each of n ranks holds 1/n of every large tensor, and gathers a layer's weights as it computes with them.

    Args:
        param_persistence_threshold: parameters of at most so many elements stay whole on each rank (norms, IA³ scales):
            gathering them would cost more time than it saves memory.
        offload: keep the `optimizer`, or also all `parameters`, in the CPU's memory.
        hpz_partition_size: ranks that hold a second copy of the weights among them, normally those of one node, so that
            the backward pass gathers within the node (ZeRO++, https://arxiv.org/abs/2306.10209, section 3.2); 1: none.
        timeout: seconds after which a rank that waits for another gives up.
        config: further settings of DeepSpeed's `zero_optimization`, over ours.

    Raises:
        UserError: settings that cannot work together.
    """

    strategy_name = "zero3"

    def __init__(
        self,
        param_persistence_threshold: int = 100_000,
        offload: Literal["none", "optimizer", "parameters"] = "none",
        hpz_partition_size: int = 1,
        timeout: float = 600.0,
        config: dict[str, Any] | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
    ) -> None:
        for name, value in (
            ("param_persistence_threshold", param_persistence_threshold),
            ("timeout", timeout),
        ):
            if value < 0:
                raise UserError(f"zero3.{name}: {value} is below 0")
        if hpz_partition_size < 1:
            raise UserError(
                f"zero3.hpz_partition_size: {hpz_partition_size} is below 1; 1 keeps no second copy"
            )
        if "stage" in (config or {}):
            raise UserError("zero3.config: stage is 3 here; leave it out")
        self.hpz_partition_size = hpz_partition_size
        if not torch.cuda.is_available():
            # Read when DeepSpeed is imported: it would look for a device that is not there.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        zero = {
            "stage": 3,
            "stage3_param_persistence_threshold": param_persistence_threshold,
            "contiguous_gradients": True,
            # DeepSpeed's own 500 million elements would be 2 GB on each GPU, for gradients of a few MB.
            "reduce_bucket_size": 20_000_000,
            "overlap_comm": True,
            "zero_hpz_partition_size": hpz_partition_size,
            **({"offload_optimizer": {"device": "cpu"}} if offload != "none" else {}),
            **({"offload_param": {"device": "cpu"}} if offload == "parameters" else {}),
            **(config or {}),
        }
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
            config={
                "zero_allow_untested_optimizer": True,  # the optimizers are torch's
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": zero,
                # The number of rows varies; DeepSpeed needs one for its timers only.
                "train_micro_batch_size_per_gpu": 1,
            },
        )

    # What Lightning 2.6 and DeepSpeed 0.19 do for GPUs alone

    @override
    def setup_environment(self) -> None:
        # DeepSpeedStrategy's own refuses everything but CUDA here.
        self._check()
        if self.on_cpu:
            _compute_on_cpu()
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        if self.on_cpu:
            self._process_group_backend = "gloo"
        self._init_deepspeed_distributed()
        # Lightning does this for its other strategies; an open gloo group can abort an interpreter that leaves.
        atexit.register(_leave_group)

    @property
    def on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @override
    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        # A private method of Lightning 2.6.6, whose own passes the CUDA device's index: None on the CPU.
        import deepspeed

        refuse_adafactor(isinstance(optimizer, Adafactor))
        engine, sharded_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, sharded_optimizer

    @override
    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        # The same in validation: Lightning's own passes the CUDA device's index.
        assert isinstance(self.config, dict)
        self.model = _engine(model, self.config)

    def _check(self) -> None:
        refuse_hpz(self.hpz_partition_size, self.num_processes)
        if not self.on_cpu and self.root_device.index != self.local_rank:
            # DeepSpeed 0.19 takes the local rank for the device.
            raise UserError(
                "trainer.devices: zero3 uses a machine's first GPUs; say which are there by CUDA_VISIBLE_DEVICES=0,2"
                " and trainer.devices: 2"
            )

    # One dtype policy: what is trained is float32, the base's weights are what policy.dtype says

    @property
    @override
    def precision_plugin(self) -> Any:
        return self._precision_plugin or FullPrecision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        if plugin is not None and plugin.precision != "32-true":
            raise UserError(f"trainer.precision: {plugin.precision} is not possible with zero3; use 32-true")
        self._precision_plugin = plugin and FullPrecision()

    # Models are sharded as they are loaded; what is small and trained is sharded by the engine

    @contextlib.contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        self._init_config_if_needed()
        assert isinstance(self.config, dict)
        with sharding(self.config):
            yield
        self._limit_second_copies()

    def _limit_second_copies(self) -> None:
        """DeepSpeed 0.19 makes the groups of second copies with torch's default timeout, half an hour."""
        from deepspeed.utils import groups
        from torch.distributed.distributed_c10d import _set_pg_timeout

        if (group := groups._get_zero_param_intra_parallel_group()) is not None and self._timeout is not None:
            _set_pg_timeout(self._timeout, group)

    @override
    def setup(self, trainer: Any) -> None:
        assert self.lightning_module is not None
        # The engine moves nothing once a part of the model is sharded.
        for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
            if not is_sharded(tensor):
                tensor.data = tensor.data.to(self.root_device)
        for module in self.lightning_module.modules():
            if isinstance(module, Metric):  # its sums are neither parameters nor buffers
                module.to(self.root_device)
        super().setup(trainer)
        _gather_with_owner(self.lightning_module)

    # Checkpoints: the same as of every strategy. DeepSpeed's own are pickles in shards, and are not used.

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as the unsharded optimizer would have it: tensors by parameter, in the parameters' shapes.

        Every rank must ask; rank zero gets them, the others empty ones.
        """
        sharded, trained = self.deepspeed_engine.optimizer, self._trained()
        (group,) = sharded.param_groups
        example = sharded.optimizer.state.get(_flat(sharded)[0], {})
        states = {index: _whole_state(parameter, example) for index, parameter in enumerate(trained)}
        return {
            "state": {index: state for index, state in states.items() if state},
            "param_groups": [{**group, "params": list(range(len(trained)))}],
        }

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (saved,) = checkpoint["optimizer_states"]
        sharded = self.deepspeed_engine.optimizer
        (group,), (values,) = sharded.param_groups, saved["param_groups"]
        group.update({key: value for key, value in values.items() if key != "params"})
        for index, parameter in enumerate(self._trained()):
            if index in saved["state"]:
                _load_state(parameter, saved["state"][index], sharded)

    def _trained(self) -> list[nn.Parameter]:
        assert self.lightning_module is not None
        return [parameter for parameter in self.lightning_module.parameters() if parameter.requires_grad]


StrategyRegistry.register(
    Zero3.strategy_name, Zero3, description="DeepSpeed ZeRO-3, on GPU and CPU", override=True
)


class FullPrecision(DeepSpeedPrecision):
    """Leaves batches and modules as they are, and the loss's scale to Lightning's accumulation alone."""

    def __init__(self) -> None:
        super().__init__("32-true")

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    @override
    def convert_input(self, data: Any) -> Any:
        return data

    @override
    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning 2.6 has divided the loss by the accumulated micro-batches, and DeepSpeed would once more.
        model.trainer.model.backward(tensor, scale_wrt_gas=False)


def refuse_hpz(size: int, ranks: int) -> None:
    """`UserError` where second copies of the weights do not spread evenly over a node's ranks."""
    if ranks % size:
        raise UserError(
            f"zero3.hpz_partition_size: {size} does not divide the {ranks} ranks of a node; give {ranks}, or 1 for no"
            " second copy"
        )


def refuse_adafactor(asked: bool) -> None:
    """`UserError` where it was asked for: it looks at whole tensors, of which ZeRO-3 has flat shares."""
    if asked:
        raise UserError(
            "optimizer.name: adafactor needs whole tensors, and ZeRO-3 has flat shares; use adamw or rmsprop"
        )


def _compute_on_cpu() -> None:
    """Where there is a GPU that this run is not to use, DeepSpeed has chosen it already."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())


def answering(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Have a model that was loaded sharded gather its weights as it computes, without any training.

    Args:
        config: the strategy's, under which the model was loaded.
    """
    _engine(model, config)
    _gather_with_owner(model)
    return model


def _engine(model: nn.Module, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around a model that is not trained."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    return engine


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _gather_with_owner(model: nn.Module) -> None:
    """Have parameters that stand in a ParameterDict (IA³ scales) gathered whenever the layer that holds it runs.

    DeepSpeed 0.19 gathers what stands in a module whose `forward` runs, which a ParameterDict's never does. By itself
    it finds such parameters inside the engine's own forward only, not when a model generates.
    """
    from deepspeed import zero

    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ParameterDict | nn.ParameterList):
                for parameter in child.parameters():
                    zero.register_external_parameter(module, parameter)


def _flat(sharded: Any) -> list[Tensor]:
    # DeepSpeed 0.19 keeps the float32 shares that torch's optimizer steps here, and takes them out of the optimizer's
    # groups between steps. The optimizer itself, and its state by share, is `sharded.optimizer`.
    return sharded.fp32_partitioned_groups_flat


def _whole_state(parameter: Any, example: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state whole and in its shape; `example`, the state of a share, says which names there are."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state: dict[str, Any] = {}
    for name, value in example.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            gathered = safe_get_full_optimizer_state(parameter, name)
            state[name] = kept(gathered.view(parameter.ds_shape), parameter).cpu()
        else:
            state[name] = value.clone() if isinstance(value, Tensor) else value
    return state


def _load_state(parameter: Any, saved: Mapping[str, Any], sharded: Any) -> None:
    from deepspeed.utils import safe_set_local_optimizer_state

    for name, value in saved.items():
        whole = isinstance(value, Tensor) and value.dim() > 0
        for flat in _flat(sharded):
            # Torch's optimizers make their state at the first step, which is still to come.
            state = sharded.optimizer.state[flat]
            if not whole:
                state[name] = value.clone() if isinstance(value, Tensor) else value
            elif name not in state:
                state[name] = torch.zeros_like(flat)
        if whole:
            share = share_of(value.to(parameter.ds_tensor.device, torch.float32), parameter)
            safe_set_local_optimizer_state(parameter, share, name)
