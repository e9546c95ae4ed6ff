"""The options that strategies of the Trainer and of Fabric have in common, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from torch import nn

from lightning_tex.layers.vocab import require_both_ends
from lightning_tex.optim import OptimizerStateConfig, OptimizerStateFormat, ZeroStage
from lightning_tex.parallel.activation_checkpointing import ActivationCheckpointing, recompute_blocks, require_legal
from lightning_tex.parallel.expert_chunks import ExpertChunks, chunks_on, require_legal_chunks
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.requested_layout import RequestedLayout
from lightning_tex.parallel.sharding import check_shardable
from lightning_tex.parallel.topology import Topology
from lightning_tex.strategy.set_up import experts_of_layers


@dataclass(kw_only=True)
class ShardingOptions:
    """How a model is sharded, communicates, is recomputed and stepped: as :class:`lightning_tex.TexMoEStrategy` says.

    Raises:
        ValueError: an option that is legal on no world and for no model, by name.
    """

    tensor_parallel_size: int
    expert_parallel_size: int | Literal["auto"]
    expert_tensor_parallel_size: int | None
    sequence_parallel: bool
    zero_stage: ZeroStage
    tile_size: int | None
    optimizer_state_format: OptimizerStateFormat
    duplicate_token_dropping: bool
    expert_chunks: ExpertChunks
    activation_checkpointing: ActivationCheckpointing
    activation_checkpointing_policy: set[type[nn.Module]] | None
    max_skipped_steps: int | None
    elastic: bool = False

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Self:
        """Those of a constructor's arguments that are of these names."""
        return cls(**{one.name: arguments[one.name] for one in fields(cls) if one.name in arguments})

    def __post_init__(self) -> None:
        require_legal_chunks(self.expert_chunks)
        require_legal(self.activation_checkpointing, self.activation_checkpointing_policy)
        self.requested_layout = RequestedLayout(
            tensor_parallel_size=self.tensor_parallel_size,
            expert_parallel_size=self.expert_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            duplicate_token_dropping=self.duplicate_token_dropping,
            elastic=self.elastic,
        )
        self.communication = Communication(
            duplicate_token_dropping=self.duplicate_token_dropping, sequence_parallel=self.sequence_parallel
        )
        self.state_config = OptimizerStateConfig(
            zero_stage=self.zero_stage,
            optimizer_state_format=self.optimizer_state_format,
            tile_size=self.tile_size,
            max_skipped_steps=self.max_skipped_steps,
        )

    def recompute(self, model: nn.Module) -> None:
        """Wrap the blocks whose activations are not kept."""
        recompute_blocks(model, self.activation_checkpointing, self.activation_checkpointing_policy)

    def layout_of(self, model: nn.Module, world: int) -> Layout:
        """The layout of a model.

        Raises:
            ValueError: one that the world or the model does not allow, naming the option and the legal values.
        """
        experts = experts_of_layers(model)
        layout = self.requested_layout.resolve(world, experts)
        if self.expert_parallel_size != "auto":
            layout.require_experts(experts)
        check_shardable(model, layout)
        return layout

    def communication_of(
        self, model: nn.Module, layout: Layout, ranks_per_node: int, communication: Communication
    ) -> Communication:
        """What a model communicates on a layout, of ``communication`` and the chunks that are asked for.

        Raises:
            ValueError: sequence parallelism that the model is not made for.
        """
        if communication.sequence_parallel:
            require_both_ends(model)
        return replace(communication, expert_chunks=chunks_on(layout, self.expert_chunks, ranks_per_node))

    def sampler_place(self, topology: Topology | None, world: int, rank: int) -> dict[str, int]:
        """A distributed sampler's arguments: data are split over data, and ranks of one tensor group see one batch."""
        layout = topology.layout if topology is not None else self.requested_layout.resolve(world)
        return {"num_replicas": layout.data, "rank": layout.coordinates(rank)["data"]}
