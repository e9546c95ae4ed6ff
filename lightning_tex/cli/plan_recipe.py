"""A recipe as the planner sees it: its model on the meta device, numbers of the job, and what it tells the strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import Namespace
from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, instantiate_class
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_tex.data import FineTuningDataModule, MixtureDataModule, TextDataModule, TokenDataModule
from lightning_tex.lora import LoRAConfig
from lightning_tex.models import DecoderConfig, LanguageModel
from lightning_tex.models.pretrained_model import read_config
from lightning_tex.optim import optimized_parameters
from lightning_tex.optim.by_pattern import own_groups
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.expert_chunks import chunks_on
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.topology import Axis
from lightning_tex.planner.batches import Batches, TokenBlocks, batches_of
from lightning_tex.planner.describe import describe, describe_decoder
from lightning_tex.planner.layouts import ActivationSource, Candidate, Job
from lightning_tex.planner.model import ModelDescription
from lightning_tex.planner.optimizer_trial import describe_optimizer, read_optimizer
from lightning_tex.planner.optimizers import LANGUAGE_MODELS_OWN, OptimizerDescription, one_group
from lightning_tex.planner.pretended_trainer import PretendedTrainer
from lightning_tex.planner.states_only import StatesOnly
from lightning_tex.planner.traced import TracedActivations

if TYPE_CHECKING:
    from lightning_tex.recipe import Recipe


# A folder beside a recipe with configurations of published models, which are not here yet when a plan is made.
PUBLISHED = "published"


@dataclass(frozen=True)
class PlannedRecipe:
    """What a recipe says.

    Args:
        model: its model.
        numbers: the job's, as far as they are known, by the name of Job's arguments, and ``gpus``.
        strategy: the strategy's arguments, and ``accumulate_grad_batches``.
        cluster: the GPUs that it is made for; ``None``: it names none.
    """

    model: ModelDescription
    numbers: dict[str, Any]
    strategy: dict[str, Any]
    cluster: str | None


def read_recipe(path: str, more: Sequence[str] = (), sizes: Mapping[str, Any] | None = None) -> PlannedRecipe:
    """Read a recipe. A LanguageModel is described by its sizes; any other module is built on the meta device.

    Args:
        path: the recipe.
        more: further words of the command line.
        sizes: of a LanguageModel's decoder, which take precedence.

    Raises:
        ValueError: there is no such file, or its model cannot be built without memory.
    """
    if not Path(path).is_file():
        raise UserValueError(f"--config {path}: there is no such file")
    from lightning_tex.recipe import Recipe  # takes seconds to import, which sizes do not need

    recipe = Recipe(path, list(more))
    config = recipe.config
    data, trainer = config.get("data.init_args") or {}, config.trainer
    given = config.get("model.init_args.config")
    if isinstance(given, Namespace) and "vocab_size" in given and data.get("vocab_size") is not None:
        given.vocab_size = data["vocab_size"]  # the model's is the data's
    accumulation = int(trainer.get("accumulate_grad_batches") or 1)
    module = None if _is_language_model(recipe) else _built_on_meta(path, config.model)
    if module is None:
        arguments = config.get("model.init_args") or Namespace()
        decoder, trained = _decoder(arguments, sizes or {}, Path(path).parent / PUBLISHED), _trained(arguments)
        length = decoder.max_sequence_length
        if trained:
            module = _on_meta(decoder, **trained)
            model = describe(module, _policy(recipe))
        else:
            model = describe_decoder(decoder)
    elif sizes:
        raise UserValueError(
            f"recipe {path}: its model is no lightning_tex.LanguageModel, whose sizes could be set by "
            f"{', '.join(sizes)}; legal: the model's own options, such as --model.init_args.dim 64"
        )
    else:
        model, length = describe(module, _policy(recipe)), 1
    numbers: dict[str, Any] = {
        "sequence_length": data.get("sequence_length") or length,
        "precision": str(trainer.get("precision") or "32-true"),
        "optimizer": _optimizer(module, config.get("optimizer"), model.config),
        "document_mask": bool(data.get("document_mask")),
        "activations": None if model.declared else _traced(module or language_model_on_meta(model), recipe),
    }
    if data.get("global_batch_size"):  # of a micro-step over all ranks
        numbers["global_batch_size"] = data["global_batch_size"] * accumulation
    devices = str(trainer.get("devices"))
    if devices.isdigit():
        numbers["gpus"] = int(devices) * int(trainer.get("num_nodes") or 1)
    own = {**recipe.strategy_options(), "accumulate_grad_batches": accumulation}
    return PlannedRecipe(model, numbers, own, config.get("cluster"))


def _decoder(options: Namespace, sizes: Mapping[str, Any], copies: Path) -> DecoderConfig:
    """What a LanguageModel of these options has; of a published model its configuration is read, and no weights."""
    given = options.get("config")
    if options.get("pretrained") is None:
        return DecoderConfig(**{**(given.as_dict() if given is not None else {}), **sizes})
    overrides = {**(options.get("overrides") or {}), **sizes}
    return read_config(options.pretrained, options.get("revision"), overrides, copies)


def language_model_on_meta(model: ModelDescription) -> LanguageModel:
    """The module whose training step shows what a decoder keeps, where no formula does."""
    assert model.config is not None
    return _on_meta(model.config)


def _trained(options: Namespace) -> dict[str, Any]:
    """What a LanguageModel of these options trains otherwise than all parameters at one rate."""
    given = {name: options.get(name) for name in ("lora", "trainable", "frozen", "lr_scale")}
    given = {name: value.as_dict() if isinstance(value, Namespace) else value for name, value in given.items()}
    if given["lora"] is not None:
        given["lora"] = LoRAConfig(**given["lora"])
    return {name: value for name, value in given.items() if value}


def _on_meta(config: DecoderConfig, **trained: Any) -> LanguageModel:
    module = LanguageModel(config, **trained)
    module.build_on_meta()
    return module


def _optimizer(module: LightningModule | None, given: Any, decoder: DecoderConfig | None) -> OptimizerDescription:
    """The recipe's optimizer, over all parameters, or its model's own; without a module, the decoder's."""

    def named(own: LightningModule) -> Any:
        return instantiate_class(optimized_parameters(own, given), given)

    if module is None and decoder is not None and given and own_groups(given):
        module = _on_meta(decoder)
    if module is not None:
        return read_optimizer(module, named if given else None)
    if not given:
        return LANGUAGE_MODELS_OWN
    return describe_optimizer(instantiate_class([torch.nn.Parameter(torch.zeros(1))], given), one_group)


def _traced(module: LightningModule, recipe: Recipe) -> ActivationSource:
    """The module's own training step on batches of the recipe's data."""
    try:
        return TracedActivations(module, _policy(recipe), _batches(module, recipe))
    except Exception as error:
        return StatesOnly(f"no batch of its data: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


# By which option data modules keep documents of one row apart.
_MASKS = {TextDataModule: "document_mask", MixtureDataModule: "document_mask", FineTuningDataModule: "packing"}


def _batches(module: LightningModule, recipe: Recipe) -> Batches:
    trainer: Any = PretendedTrainer(Axis("data"), 1)
    of_data = None if is_overridden("train_dataloader", module) else recipe.config.get("data")
    if of_data and isinstance(module, LanguageModel) and (mask := _MASKS.get(_imported(of_data.class_path))):
        return TokenBlocks(module.config.vocab_size, bool(of_data.get(f"init_args.{mask}")))
    data = recipe.datamodule() if of_data else None
    if data is None:
        module.trainer = trainer
        return batches_of(module.train_dataloader(), may_iterate=True)
    if isinstance(data, TokenDataModule):
        return TokenBlocks(data.vocab_size, data.document_mask)
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    return batches_of(data.train_dataloader(), may_iterate=True)


def _is_language_model(recipe: Recipe) -> bool:
    return _imported(recipe.config.model.class_path) is LanguageModel


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _policy(recipe: Recipe) -> set[type[torch.nn.Module]] | None:
    names = recipe.strategy_options().get("activation_checkpointing_policy")
    return None if names is None else {_imported(name) if isinstance(name, str) else name for name in names}


def _built_on_meta(path: str, config: Namespace) -> LightningModule:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    try:
        with torch.device("meta"):
            module = parser.instantiate_classes(Namespace(model=config)).model
            module.configure_model()
    except Exception as error:
        raise UserValueError(
            f"recipe {path}: its model {config.class_path} cannot be built on the meta device "
            f"({type(error).__name__}: {error}); legal: __init__ and configure_model() that read no tensor's values"
        ) from error
    assert isinstance(module, LightningModule)
    return module


def own_candidate(job: Job, own: dict[str, Any], ranks_per_node: int | None = None) -> Candidate | None:
    """What a recipe itself says; ``None`` where it would not run so on these ranks, or there is none.

    Args:
        job: the recipe's.
        own: the strategy's arguments, and ``accumulate_grad_batches``.
        ranks_per_node: of the cluster; ``None``: all are on one.
    """
    accumulation = own.get("accumulate_grad_batches")
    if accumulation is None:
        return None
    sizes = "tensor_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size", "duplicate_token_dropping"
    try:
        layout = Layout.resolve(job.world, **_given(own, *sizes), num_experts=job.model.experts)
        job.model.check(layout)
    except ValueError:
        return None
    micro_batch = job.global_batch_size // (accumulation * layout.data)
    if micro_batch * accumulation * layout.data != job.global_batch_size:
        return None
    chunks = chunks_on(layout, own.get("expert_chunks", "auto"), ranks_per_node or job.world)
    communication = Communication(**_given(own, "duplicate_token_dropping", "sequence_parallel"), expert_chunks=chunks)
    options = _given(own, "zero_stage", "activation_checkpointing", "optimizer_state_format")
    return Candidate(layout, micro_batch, accumulation, communication=communication, **options)


def _given(own: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Of these arguments those that are given; the others have their defaults."""
    return {name: own[name] for name in names if name in own}
