"""Makes DeepSpeed engines for healing, and stores their state as whole tensors for any number of workers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from layerboost.healing.spec import Phase
from layerboost.healing.training import ADAM_BETAS, accumulation_rounds
from tasks.healing.job import HealingJob

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


def make_engine(
    trainee: nn.Module, job: HealingJob, phase: Phase, world_size: int, restored: Path | None = None
) -> Any:
    """Wraps a trainee in a DeepSpeed engine for `run_phase`; every worker must call it.

    Args:
        trainee: the result of `make_trainee`; it is changed permanently.
        restored: a file of `save_state` to continue from.
    """
    import deepspeed

    # DeepSpeed would compile this at first use. A worker killed meanwhile leaves a lock that blocks all others.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trainable = [parameter for _, parameter in _trainable(trainee)]
    in_bfloat16 = trainable[0].dtype == torch.bfloat16
    if restored is not None:
        _copy_masters(trainee, restored)
    offload = {"offload_optimizer": {"device": "cpu"}} if job.zero.offload_optimizer else {}
    # Stage 0 runs as stage 1: without ZeRO a NaN gradient goes unnoticed, and bfloat16 gives another loss.
    stage = max(job.zero.stage, 1)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # used only for DeepSpeed's log: `run_phase` deals out the batches
        "gradient_accumulation_steps": accumulation_rounds(job.spec, world_size),
        "gradient_clipping": phase.gradient_clip,
        "zero_optimization": {"stage": stage, **offload, **(job.zero.options or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": in_bfloat16},
        "steps_per_print": 10**9,
    }
    if stage == 3:
        # Partition before anything moves to a GPU, because a GPU may be too small for the whole model.
        deepspeed.zero.Init(module=trainee, config_dict_or_path=config)
    engine, *_ = deepspeed.initialize(
        model=trainee,
        optimizer=torch.optim.AdamW(trainable, lr=0.0, betas=ADAM_BETAS, weight_decay=job.spec.weight_decay),
        model_parameters=trainable,
        dist_init_required=False,
        config=config,
    )
    if restored is not None:
        _restore_moments(engine, restored)
    return engine


def release(engine: Any) -> None:
    """Ends an engine and frees its memory, which references inside DeepSpeed would otherwise keep."""
    module = engine.module
    engine.destroy()
    for parameter in module.parameters():
        for held in (parameter, getattr(parameter, "ds_tensor", None)):
            if held is not None:
                held.data = held.data.new_empty(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trained_parameters(engine: Any, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Returns the whole trained parameters by the student's names, in their dtype, on the CPU.

    Every worker must call it; only those with `keep` receive the parameters.
    """
    import deepspeed

    trained = {}
    for name, parameter in _trainable(engine.module):
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            if keep:
                trained[name] = parameter.detach().cpu().clone()
    return trained


def save_state(engine: Any, file: Path | None) -> None:
    """Writes the whole fp32 masters, AdamW's moments and its step count to a safetensors file.

    Every worker must call it, and the one with a file writes. The others never hold more than one parameter at a time.
    """
    tensors = {}
    for name, parameter in _trainable(engine.module):
        for key in (MASTER, *MOMENTS):
            whole = _whole_state(engine, parameter, key)
            if file is not None:
                tensors[f"{key}/{name}"] = whole.to("cpu", torch.float32, copy=True).contiguous()
    if file is not None:
        optimizer, masters = _stepped(engine)
        steps = int(optimizer.state[masters[0]]["step"])
        save_file(tensors, file, metadata={"optimizer_steps": str(steps)})


def saved_parameters(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Reads the parameters in a file of `save_state`, by the student's names."""
    with safe_open(file, "pt") as state:
        masters = [name for name in state.keys() if name.startswith(f"{MASTER}/")]  # noqa: SIM118
        return {name.removeprefix(f"{MASTER}/"): state.get_tensor(name).to(dtype, copy=True) for name in masters}


def _trainable(trainee: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in trainee.student.named_parameters() if p.requires_grad)  # type: ignore[union-attr]


def _copy_masters(trainee: nn.Module, file: Path) -> None:
    """Copies the saved masters into the parameters before an engine is made of them.

    The parameters are the masters, rounded to their dtype.
    """
    with safe_open(file, "pt") as state:
        for name, parameter in _trainable(trainee):
            parameter.data.copy_(state.get_tensor(f"{MASTER}/{name}"))


def _restore_moments(engine: Any, file: Path) -> None:
    """Gives a new engine the masters, moments and step count of a file of `save_state`."""
    optimizer, masters = _stepped(engine)
    with safe_open(file, "pt") as state:
        steps = float(state.metadata()["optimizer_steps"])
        for master in masters:  # AdamW creates its state only in its first step
            zeros = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS}
            optimizer.state[master] = {"step": torch.tensor(steps), **zeros}
        if engine.zero_optimization_stage() in (1, 2):
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # links the parameters to that state
        for name, parameter in _trainable(engine.module):
            for key in (MASTER, *MOMENTS):
                _set_whole_state(engine, parameter, key, state.get_tensor(f"{key}/{name}"))


def _stepped(engine: Any) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Returns the engine's AdamW and the tensors that it steps, which are flat parts of the fp32 masters."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return engine.optimizer.optimizer, engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.optimizer, engine.optimizer.single_partition_of_fp32_groups


def _whole_state(engine: Any, parameter: nn.Parameter, key: str) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if key == MASTER:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


def _set_whole_state(engine: Any, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    stage = engine.zero_optimization_stage()
    if stage == 3:  # safe_set_full_* fail if a parameter is not divisible by the workers
        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()  # type: ignore[attr-defined]
        mine = value.flatten()[rank * size : (rank + 1) * size]
        mine = nn.functional.pad(mine, (0, size - len(mine)))
        if key == MASTER:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)
    elif key == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
