"""The mixture-of-experts layer: route, dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lightning_tex.layers.mlp import Activation
from lightning_tex.moe.capacity import Capacity, CapacityDispatcher, Precedence
from lightning_tex.moe.dispatch import Dispatcher, DispatchMetadata
from lightning_tex.moe.dropless import DroplessDispatcher
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.experts import Experts
from lightning_tex.moe.free_experts import FreeExperts
from lightning_tex.moe.held_experts import HeldExperts
from lightning_tex.moe.layer_options import require_together
from lightning_tex.moe.losses import Coefficients, LossLedger, count_choices, routing_loss
from lightning_tex.moe.output_biases import OutputBiases
from lightning_tex.moe.own_experts import ExpertChoice, OwnExperts, expert_maker
from lightning_tex.moe.residual import ResidualBranch
from lightning_tex.moe.rounds import BoundedDroplessDispatcher
from lightning_tex.moe.router import Route
from lightning_tex.moe.routers import RouterChoice, make_router
from lightning_tex.moe.sequence_balance import sequence_balance_loss
from lightning_tex.moe.sequence_parallel import SequenceShardedCapacityDispatcher
from lightning_tex.moe.shared import SharedExpert
from lightning_tex.moe.steps import ActsAfterStep
from lightning_tex.moe.tokens import Tokens
from lightning_tex.parallel.activation_checkpointing import first_forward_only
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.expert_load import ExpertLoad
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.replay import decided, recomputing
from lightning_tex.parallel.sharding import TexModule
from lightning_tex.parallel.topology import Topology

# T tokens, D model width, E experts, k choices per token


class MoE(TexModule, ActsAfterStep):
    """A feed-forward layer of E experts of which each token uses k: [.., dim] -> [.., dim].

    Alone in one process it is the plain layer; the strategy spreads its experts over the expert axis and shards them
    over the expert_tensor axis. A token's output is the sum of its chosen experts' outputs times their weights, and of
    the shared expert's if there is one; an overflowed choice adds nothing (add the residual outside).

    Args:
        dim: model width D.
        hidden_dim: hidden width of one expert; divisible by the expert_tensor axis.
        num_experts: E; divisible by the expert axis.
        top_k: experts per token, k.
        capacity_factor: an expert takes ceil(factor * k * T / E) choices of a data rank's T tokens in a micro-step,
            first choices first, earlier tokens first; further ones overflow. ``None``: dropless, all are served.
        activation: see :class:`lightning_tex.layers.ParallelMLP`.
        router: ``"softmax"``, ``"sigmoid"``, ``"switch"``, ``"gshard"``, ``"sparsemixer"``, ``"sinkhorn"``, ``"hash"``,
            ``"expert_choice"``; ``"forced_balance"``, which chooses by the token's place, for benches; one of these
            with arguments of its own, ``{"name": .., "init_args": {..}}``; a :class:`Router` subclass, or its import
            path, or an instance.
        norm_topk_prob: rescale a token's k weights to sum to 1.
        load_balance_coefficient: weight of E * sum_e f_e P_e.
        z_loss_coefficient: weight of the mean of logsumexp(logits)^2.
        round_factor: of dropless routing over an expert axis: rows at a rank's experts at once, relative to their mean
            over ranks; what is beyond is served in further rounds, to the same numbers. ``None``: all at once, whatever
            memory the fullest rank needs.
        shared_hidden_dim: hidden width of an expert that every token uses beside its k; divisible by the tensor axis.
            ``None``: there is none.
        bias: biases of all matrices of the experts; dropless only, as each choice has to be served.
        shared_gate: the shared expert's output is multiplied by a sigmoid gate of its own.
        sequence_balance_coefficient: weight of load balance of each sequence by itself (:mod:`.sequence_balance`).
        step_balance_coefficient: weight of load balance by the choices of an optimizer step, not of a micro-step
            (:class:`.losses.Coefficients`).
        entropy_coefficient: weight of the mean entropy of a token's scores; a negative one keeps routers undecided.
        eval_capacity_factor: of evaluation; ``None``: the same.
        min_capacity: an expert takes as many choices at least, where there are as many tokens.
        overflow_by: which tokens overflow, ``"position"``: later ones; ``"score"``: those with a smaller largest score.
        expert_module: a class of experts of your own, or what makes one: called with (dim, hidden_dim) once for each
            expert it gives a module, [N, D] -> [N, D] (:class:`.own_experts.OwnExperts`); or its import path, alone or
            with arguments, ``{"name": .., "init_args": {..}}``. Experts are whole on their ranks then. ``None``: MLPs.
        residual_hidden_dim: hidden width of an MLP that is mixed with the experts by two learned shares of each token
            (:class:`.residual.ResidualBranch`); ``None``: there is none.
        zero_experts, identity_experts: further experts, behind the E, that give nothing or the token itself, and for
            which no token travels (:class:`.free_experts.FreeExperts`).

    Raises:
        ValueError: sizes or names that are not legal.
    """

    axes = ("tensor", "data", "expert", "expert_tensor")

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 1,
        capacity_factor: float | None = None,
        activation: Activation = "gelu",
        router: RouterChoice = "softmax",
        norm_topk_prob: bool = False,
        load_balance_coefficient: float = 0.01,
        z_loss_coefficient: float = 0.0,
        round_factor: float | None = None,
        *,
        shared_hidden_dim: int | None = None,
        shared_gate: bool = False,
        bias: bool = False,
        sequence_balance_coefficient: float = 0.0,
        step_balance_coefficient: float = 0.0,
        entropy_coefficient: float = 0.0,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 0,
        overflow_by: Precedence = "position",
        expert_module: ExpertChoice | None = None,
        residual_hidden_dim: int | None = None,
        zero_experts: int = 0,
        identity_experts: int = 0,
    ) -> None:
        super().__init__()
        require_together(
            capacity_factor, round_factor, bias, expert_module is not None, shared_hidden_dim, residual_hidden_dim
        )
        self.hidden_dim, self.num_experts, self.top_k = hidden_dim, num_experts, top_k
        self.round_factor = round_factor
        self.capacity = Capacity.of_options(capacity_factor, eval_capacity_factor, min_capacity, overflow_by)
        self.load_balance_coefficient, self.z_loss_coefficient = load_balance_coefficient, z_loss_coefficient
        self.entropy_coefficient, self.step_balance_coefficient = entropy_coefficient, step_balance_coefficient
        self.sequence_balance_coefficient = sequence_balance_coefficient
        self._step_counts: Tensor | None = None
        free = FreeExperts(num_experts, zero_experts, identity_experts)
        self.free = free if free.count else None
        self.router = make_router(router, dim, num_experts + free.count, top_k, norm_topk_prob)
        if capacity_factor is not None and self.router.experts_choose:
            raise UserValueError(
                f"capacity_factor={capacity_factor} with {type(self.router).__name__}, whose experts take "
                f"top_k={top_k} x tokens / experts each; legal: capacity_factor=None"
            )
        self.shared = None
        if shared_hidden_dim is not None:
            self.shared = SharedExpert(dim, shared_hidden_dim, activation, shared_gate)
        self.residual = None
        if residual_hidden_dim is not None:
            self.residual = ResidualBranch(dim, residual_hidden_dim, activation)
        self.output_biases = OutputBiases(num_experts, dim, hidden_dim) if bias else None
        self.experts: HeldExperts = (
            Experts(dim, hidden_dim, num_experts, activation, bias)
            if expert_module is None
            else OwnExperts(dim, num_experts, expert_maker(expert_module, dim, hidden_dim))
        )
        self.ledger = LossLedger()
        self.load = ExpertLoad()
        self._arrived_rows = self._routed_choices = 0
        self.dispatcher = self.make_dispatcher(Topology.single())

    def check(self, name: str, layout: Layout) -> None:
        self.experts.require_shardable(name, layout)

    def bind(self, topology: Topology) -> None:
        super().bind(topology)
        self.dispatcher = self.make_dispatcher(topology)

    def make_dispatcher(self, topology: Topology) -> Dispatcher:
        """How tokens get to the experts and back; override it to send them otherwise.

        Called last in ``__init__``, for one process, and again when the strategy shards the layer.

        Args:
            topology: all axes of the run; ``ExpertAxes.of(topology)`` are those that tokens pass.
        """
        axes, sparse = ExpertAxes.of(topology), self.router.experts_choose or self.free is not None
        if self.round_factor is not None:
            return BoundedDroplessDispatcher(self.num_experts, axes, self.round_factor, sparse=sparse)
        if self.capacity is None:
            return DroplessDispatcher(self.num_experts, axes, sparse=sparse)
        if topology.communication.sequence_parallel:
            return SequenceShardedCapacityDispatcher(self.num_experts, axes, self.capacity, topology.tensor)
        return CapacityDispatcher(self.num_experts, axes, self.capacity)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        beside: Callable[[Tensor], Tensor] | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """Mix experts.

        Args:
            x: [.., D].
            token_mask: boolean, shaped as x without its last dim (over whole sequences, if x holds a rank's part of
                them); False for padding, which uses no expert, takes no capacity, counts in no routing loss, and
                gives 0, but for the shared expert.
            beside: a branch of the same tokens, such as a dense or shared expert, whose outcome for x is added. It is
                computed while rows are on their way between ranks, forward and backward.
            token_ids: of the vocabulary, shaped as ``token_mask``, for routers that choose by them.
        """
        tokens = self._tokens(x, token_mask, token_ids)
        route = self.router(x.reshape(-1, x.shape[-1]), tokens)
        if self.capacity is not None:
            self.capacity.training = self.training
            route = self._with_priority(route, self.capacity)
        routed, branches = self._with_branches(x, route, beside)
        # What is added to the experts' output comes before their last product, where a recomputation may end.
        added = [] if self.output_biases is None else [self.output_biases(routed, x.dtype).view_as(x)]
        arrived, metadata = self.dispatcher.dispatch(x, routed)
        self._arrived_rows, self._routed_choices = arrived.here, len(route.indices) * self.top_k
        between = (lambda: added.extend(branch(x) for branch in branches)) if branches else None
        y = self.dispatcher.combine(self.experts(arrived, between), metadata).view_as(x)
        self._record(route, tokens, metadata, y)
        return sum(added, y)

    def _with_branches(
        self, x: Tensor, route: Route, beside: Callable[[Tensor], Tensor] | None
    ) -> tuple[Route, list[Callable[[Tensor], Tensor]]]:
        """The route to the experts, and what is made of the same tokens and added to their output."""
        branches = [branch for branch in (self.shared, beside) if branch is not None]
        if self.residual is not None:
            of_experts, own = self.residual.shares(x)
            route = self.residual.of_experts(route, of_experts)
            branches.append(partial(self.residual.scaled, share=own))
        if self.free is not None:
            route, kept = self.free.taken_out(route)
            branches.append(partial(self.free.given, kept=kept))
        return route, branches

    def _tokens(self, x: Tensor, mask: Tensor | None, ids: Tensor | None) -> Tokens:
        def own(of_tokens: Tensor | None) -> Tensor | None:
            return None if of_tokens is None else self.activation_layout.shard_mask(of_tokens, x).reshape(-1)

        mask = own(mask)
        return Tokens(
            None if mask is None else mask.bool(), own(ids) if self.router.needs_ids else None, x.shape[:-2].numel()
        )

    @property
    def capacity_factor(self) -> float | None:
        """Of training; may be set to another one where there is one."""
        return None if self.capacity is None else self.capacity.factor

    @capacity_factor.setter
    def capacity_factor(self, factor: float) -> None:
        if self.capacity is None or factor <= 0:
            raise UserValueError(
                f"capacity_factor={factor} for a layer with capacity_factor={self.capacity_factor}; legal: above 0, "
                "where the layer was made with one"
            )
        self.capacity.factor = factor

    @property
    def loss_coefficients(self) -> Coefficients:
        """Weights of the losses over a micro-step."""
        return Coefficients(
            self.load_balance_coefficient,
            self.z_loss_coefficient,
            self.entropy_coefficient,
            self.step_balance_coefficient,
        )

    @property
    def last_arrived_rows(self) -> int:
        """Rows that arrived at this rank's experts in the last forward."""
        return self._arrived_rows

    def imbalance(self) -> float | None:
        """Rows that arrived at this rank's experts in the last forward, relative to the mean over ranks.

        ``None`` before any, and with a capacity, which is the same for all.
        """
        if self.capacity_factor is not None or not self._routed_choices:
            return None
        copies = self.expert_tensor.size * self.activation_layout.shard_axis.size / self.tensor.size
        return self._arrived_rows / (self._routed_choices * copies)

    def _with_priority(self, route: Route, capacity: Capacity) -> Route:
        if capacity.precedence == "position":
            return route
        largest = route.scores.detach().amax
        return route._replace(
            priority=decided("which tokens come first", lambda: self.activation_layout.agree(largest(-1)))
        )

    def step_is_over(self, taken: bool) -> None:
        self._step_counts = None

    def _record(self, route: Route, tokens: Tokens, metadata: DispatchMetadata, y: Tensor) -> None:
        if not self.training or recomputing():
            return
        counts = None if self.free else metadata.counts  # the dispatcher's are of those that compute
        if counts is None:
            counts = count_choices(route.indices, self.router.num_experts)
        self.load.add(counts, metadata.overflowed)
        self.load.look(route.scores, tokens.mask)
        self.router.chose(counts)
        if torch.is_grad_enabled():
            with first_forward_only():  # a recomputation does not come here and must not miss what is saved here
                for loss in self._losses(route, tokens, counts):
                    self.load.look_at_loss(loss)
                    self.ledger.record(loss, y)

    def _losses(self, route: Route, tokens: Tokens, counts: Tensor) -> Iterator[Tensor]:
        """Of the routing, weighted."""
        if coefficients := self.loss_coefficients:
            loss, counts_so_far = routing_loss(
                route, counts, tokens.mask, self.data, self.activation_layout, coefficients, self._step_counts
            )
            self._step_counts = counts_so_far if coefficients.step_balance else None
            yield loss
        if self.sequence_balance_coefficient:
            loss = sequence_balance_loss(route, tokens, self.data, self.activation_layout)
            yield self.sequence_balance_coefficient * loss
