"""Which kinds of parallelism a gradient can be seen whole under."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor


def check_parallelism(trainer: Any) -> None:
    """Refuses what would make the window's mean or the gradient's norm wrong in silence."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    refused = {
        f"nn.DataParallel over {trainer.args.n_gpu} GPUs": trainer.args.n_gpu > 1,
        "FSDP version 1": trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 1,
        "XLA, DeepSpeed or Megatron": trainer.accelerator.distributed_type
        in (DistributedType.XLA, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM),
        "tensor, context or sequence parallelism": parallelism is not None
        and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled),
    }
    for setting, is_on in refused.items():
        if is_on:
            raise NotImplementedError(
                f"This run uses {setting}, where a process does not see whole micro-batches or whole gradients. One "
                "device, DDP and FSDP2 are supported: start the script with `torchrun --nproc_per_node N`, or show "
                "it one device by CUDA_VISIBLE_DEVICES."
            )


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are DTensors (FSDP2): each process has a part of each."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
