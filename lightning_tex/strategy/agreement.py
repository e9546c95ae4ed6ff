"""What the ranks of a run must have alike before it trains: options, versions, environment, model, data, optimizer."""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    Timer,
)
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.parallel import shared_memory
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.sharding import tex_modules
from lightning_tex.resilience.agreement import Comparison
from lightning_tex.resilience.facts import class_name, describe, described, public

_PACKAGES = ("torch", "lightning", "lightning_tex", "torchmetrics")

# Of a Trainer; a dotted name is an attribute's attribute.
_TRAINER_OPTIONS = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "val_check_interval", "_val_check_time_interval", "check_val_every_n_epoch",
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
    "num_sanity_val_steps", "fast_dev_run", "log_every_n_steps", "reload_dataloaders_every_n_epochs", "num_nodes",
    "num_devices", "precision", "barebones", "_detect_anomaly", "_accelerator_connector.use_distributed_sampler",
    "validate_loop.inference_mode",
)  # fmt: skip

# Callbacks that act on all ranks together. Others may be on some ranks alone, such as one that prints.
_TOGETHER = (
    BaseFinetuning, BatchSizeFinder, Checkpoint, EarlyStopping, GradientAccumulationScheduler, LearningRateFinder,
    ModelPruning, Timer,
)  # fmt: skip
# What only rank 0 uses of a checkpoint callback, or what only says more or less.
_OF_ONE_RANK = {"self", "dirpath", "filename", "verbose"}

# They change numbers, or which collectives match. Names of interfaces and paths may differ between nodes.
_ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NCCL_ALGO", "NCCL_PROTO",
    shared_memory.SETTING,
)  # fmt: skip

_REMEDY = "Give every rank the same options, code, data, versions and environment"


def start(arguments: Mapping[str, Any], trainer: Trainer, device_type: str) -> Comparison:
    """What is known before anything is built: options, versions, flags of torch and environment.

    Args:
        arguments: what the strategy was constructed with, by name.
        trainer: the Trainer.
        device_type: of this rank.
    """
    facts = {"the accelerator": device_type, **_strategy_options(arguments), **_trainer_options(trainer)}
    facts |= {f"the version of {name}": str(import_module(name).__version__) for name in _PACKAGES}
    facts["the version of Python"] = ".".join(platform.python_version_tuple()[:2])
    facts |= {f"the version of {name}": str(number) for name, number in _device_versions(device_type)}
    facts |= described(_torch_flags())
    facts |= {f"the environment's {name}": os.environ.get(name, "not set") for name in _ENVIRONMENT}
    facts["the seed (seed_everything, PL_GLOBAL_SEED)"] = os.environ.get("PL_GLOBAL_SEED", "not set")
    together, others = _callbacks(trainer)
    advised = {"the list of callbacks": ", ".join(others) or "empty"} | {
        f"the environment's {name}": value
        for name, value in os.environ.items()
        if name.startswith("TORCH_NCCL_") and not name.endswith("FILE")
    }
    return Comparison(f"the start of {_stage(trainer)}", facts | together, "ranks do not agree", _REMEDY, advised)


def resuming(ckpt_path: str | None) -> Comparison:
    """What a run resumes from: a word, or any path, which may read otherwise on another host; ``None``: nothing."""
    return Comparison("the loading of a checkpoint", {"ckpt_path": str(ckpt_path)}, "ranks do not agree", _REMEDY, {})


def _stage(trainer: Trainer) -> str:
    return f"trainer.{trainer.state.fn.value}" if trainer.state.fn is not None else "the Trainer"


def _strategy_options(arguments: Mapping[str, Any]) -> dict[str, str]:
    """All arguments but those that say where a rank runs."""
    where = ("accelerator", "parallel_devices", "cluster_environment")
    return {name: describe(value) or class_name(type(value)) for name, value in arguments.items() if name not in where}


def _trainer_options(trainer: Trainer) -> dict[str, str]:
    options: dict[str, str] = {}
    for path in _TRAINER_OPTIONS:
        value: Any = trainer
        for name in path.split("."):
            value = getattr(value, name, None)  # of the two val_check_intervals there is one
        options[f"the Trainer's {path.rsplit('.')[-1].lstrip('_')}"] = describe(value) or class_name(type(value))
    return options


def _device_versions(device_type: str) -> Iterator[tuple[str, Any]]:
    if device_type == "cuda":
        yield "CUDA", torch.version.cuda
        yield "NCCL", torch.cuda.nccl.version()


def _torch_flags() -> dict[str, Any]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.backends.cuda.matmul.fp32_precision": _fp32_precision(matmul),
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction": describe(
            matmul.allow_bf16_reduced_precision_reduction
        ),
        "torch.backends.cudnn.conv.fp32_precision": _fp32_precision(cudnn.conv),  # type: ignore[attr-defined]
        "torch.backends.cudnn.benchmark": cudnn.benchmark,
        "torch.backends.cudnn.deterministic": cudnn.deterministic,
        "the debug level of torch.distributed": dist.get_debug_level().name,
    }


def _fp32_precision(operation: Any) -> str:
    """Which precision is in force, by the attributes that may always be read, however it was set."""
    chosen = [operation.fp32_precision, torch.backends.fp32_precision]  # type: ignore[attr-defined]
    return next((precision for precision in chosen if precision != "none"), "ieee")


def _callbacks(trainer: Trainer) -> tuple[dict[str, str], list[str]]:
    """Options of those that act on all ranks together, and the classes of the others."""
    facts: dict[str, str] = {}
    others: list[str] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, _TOGETHER) and not _is_known(type(callback)):
            others.append(type(callback).__name__)
            continue
        name = type(callback).__name__
        while f"the callback {name}" in facts:
            name += "'"
        facts[f"the callback {name}"] = "there"
        facts |= described(_constructor_options(callback), f"{name}.")
    return facts, others


def _constructor_options(callback: Callback) -> dict[str, Any]:
    names = [name for name in inspect.signature(type(callback).__init__).parameters if name not in _OF_ONE_RANK]
    kept = [(name, attribute) for name in names for attribute in (name, f"_{name}") if attribute in vars(callback)]
    return {name: vars(callback)[attribute] for name, attribute in kept}


def _is_known(kind: type) -> bool:
    """Whether what the attributes of a class mean is known here."""
    return kind.__module__.startswith(("torch.nn.", "lightning_tex.")) and kind is not nn.Module


def model(module: LightningModule, trainer: Trainer) -> Comparison:
    """Names, shapes, dtypes, classes and options of a model, as they are before this stage shards anything.

    Numbers and words of a user's own classes may differ by rank for a reason, and are only advised to be alike, before
    the first training: after it they may be what a rank has seen. A module's own ``alike_on_all_ranks()`` takes part.
    """
    facts = {name: _tensor(tensor) for name, tensor in module.named_parameters()}
    facts |= {name: _tensor(tensor) for name, tensor in module.named_buffers()}
    advised: dict[str, str] = {}
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        facts[f"the class of {name or 'the module'}"] = class_name(type(part))
        facts[f"{prefix}training"] = str(part.training)
        if _is_known(type(part)):
            facts |= public(part, prefix)
        else:
            known = _inherited_options(type(part))
            facts |= described({n: v for n, v in vars(part).items() if n in known}, prefix)
            own = {n: v for n, v in vars(part).items() if n not in known and _is_own_option(n, v)}
            advised |= described(own, prefix)
    (facts if _is_known(type(module)) else advised).update(described(_flat(module.hparams), "hparams."))
    own_facts: Any = getattr(module, "alike_on_all_ranks", dict)
    facts |= described(own_facts())
    if any(part.bound for _, part in tex_modules(module)):
        advised = {}
    remedy = (
        "Build and load alike on every rank: no condition on the rank, the same options, pretrained weights on all "
        "ranks or on none"
    )
    return Comparison(f"the set-up of {_stage(trainer)}", facts, "ranks have built different models", remedy, advised)


def _inherited_options(kind: type) -> set[str]:
    """What a user's class has of the options of a known layer that it extends."""
    layer = next((base for base in kind.__mro__ if _is_known(base)), None)
    return set() if layer is None else set(inspect.signature(layer).parameters)


def _is_own_option(name: str, value: object) -> bool:
    return not name.startswith("_") and isinstance(value, (bool, int, float, str))


def _tensor(tensor: Tensor) -> str:
    traits = [str(tuple(tensor.shape)), str(tensor.dtype)]
    traits += ["on the meta device"] if tensor.is_meta else []
    traits += ["frozen"] if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else []
    return " ".join(traits)


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat.update(_flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value})
    return flat


def data(trainer: Trainer) -> Comparison:
    """What the data module says that ranks must have alike; of another one, its options are advised to be."""
    module = trainer.datamodule  # type: ignore[attr-defined]
    facts: dict[str, str] = {"the data module": class_name(type(module))}
    advised: dict[str, str] = {}
    if hasattr(module, "alike_on_all_ranks"):
        facts |= described(module.alike_on_all_ranks())
    elif module is not None:
        advised = described(_flat(module.hparams), "the data module's hparams.")
    remedy = "Give every rank the same data and data options"
    return Comparison(f"the data of {_stage(trainer)}", facts, "ranks have different data", remedy, advised)


def optimization(
    optimizers: Iterable[Optimizer],
    schedulers: Iterable[LRSchedulerConfig],
    parameters: Mapping[str, nn.Parameter],
    trainer: Trainer,
) -> Comparison:
    """Classes, options and parameters of the user's optimizers and schedulers.

    Args:
        optimizers: as ``configure_optimizers`` returned them.
        schedulers: likewise.
        parameters: the model's, by name.
        trainer: the Trainer.
    """
    facts: dict[str, str] = {}
    names = {parameter: name for name, parameter in parameters.items()}
    for number, optimizer in enumerate(optimizers):
        facts[f"the class of optimizer {number}"] = class_name(type(optimizer))
        facts[f"the number of groups of optimizer {number}"] = str(len(optimizer.param_groups))
        facts |= _groups(f"optimizer {number}", optimizer, names)
    for number, config in enumerate(schedulers):
        facts[f"the class of scheduler {number}"] = class_name(type(config.scheduler))
        facts |= public(config, f"scheduler {number}'s ")
        facts |= _scheduler(f"scheduler {number}'s ", config.scheduler)
    remedy = "configure_optimizers must do the same on every rank"
    return Comparison("the optimizers' set-up", facts, "ranks have built different optimizers", remedy, {})


def _groups(title: str, optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, str]:
    facts: dict[str, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        options = {name: value for name, value in group.items() if name != "params"}
        facts |= described(options, f"{title}, group {number}: ")
        members = [names.get(parameter, "a parameter that is not the module's") for parameter in group["params"]]
        facts |= {f"the group of {name} in {title}": str(number) for name in members}
        facts[f"the order of parameters in {title}, group {number}"] = f"{stable_hash(*members):x}"
    return facts


def _scheduler(title: str, scheduler: Any) -> dict[str, str]:
    facts = public(scheduler, title)
    for number, inner in enumerate(getattr(scheduler, "_schedulers", ())):  # of a chain or a sequence
        facts[f"{title}part {number}"] = class_name(type(inner))
        facts |= _scheduler(f"{title}part {number}'s ", inner)
    return facts
