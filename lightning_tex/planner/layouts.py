"""Every legal layout of a world, by the topology's own rules, and the options that go with each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lightning_tex.optim.state_config import OPTIMIZER_STATE_FORMATS, ZERO_STAGES
from lightning_tex.parallel.activation_checkpointing import ACTIVATION_CHECKPOINTING, ActivationCheckpointing
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.expert_chunks import ExpertChunks, chunks_on
from lightning_tex.parallel.layout import Communication, Layout, divisors
from lightning_tex.parallel.precision import PRECISIONS, StoredDtypes
from lightning_tex.planner.instants import Instant
from lightning_tex.planner.model import ModelDescription
from lightning_tex.planner.optimizers import LANGUAGE_MODELS_OWN, OptimizerDescription


@dataclass(frozen=True)
class Job:
    """What is trained, whatever the layout.

    Args:
        model: the model.
        world: ranks.
        sequence_length: tokens of a sequence, S.
        global_batch_size: sequences of one optimizer step over all ranks.
        precision: the Trainer's.
        imbalance: rows at the fullest expert rank over their mean, in dropless routing; 1: balanced.
        optimizer: its groups, and what it keeps.
        activations: where activations are known from; ``None``: from formulas, where the model's layers declare them.
        document_mask: sequences hold documents that do not see each other.

    Raises:
        ValueError: naming the option and what is legal.
    """

    model: ModelDescription
    world: int
    sequence_length: int
    global_batch_size: int
    precision: str = "bf16-mixed"
    imbalance: float = 1.0
    optimizer: OptimizerDescription = LANGUAGE_MODELS_OWN
    activations: ActivationSource | None = None
    document_mask: bool = False

    def __post_init__(self) -> None:
        for name in ("world", "sequence_length", "global_batch_size"):
            if getattr(self, name) < 1:
                raise UserValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.precision not in PRECISIONS:
            raise UserValueError(f"precision={self.precision!r}; legal: {', '.join(map(repr, PRECISIONS))}")
        if self.imbalance < 1:
            raise UserValueError(f"imbalance={self.imbalance} must be at least 1, which is balanced")

    @property
    def dtypes(self) -> StoredDtypes:
        """Of parameters and activations."""
        return PRECISIONS[self.precision]

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch_size * self.sequence_length


@dataclass(frozen=True)
class Candidate:
    """One way to run a job: the arguments of TexMoEStrategy, and the micro-batch.

    Args:
        layout: sizes of the axes.
        micro_batch: sequences of one data rank in a micro-step.
        accumulation: micro-steps of an optimizer step.
        zero_stage, activation_checkpointing, optimizer_state_format: as the strategy's.
        communication: duplicates, fusion, sequence parallelism, overlap.
    """

    layout: Layout
    micro_batch: int = 1
    accumulation: int = 1
    zero_stage: int = 1
    activation_checkpointing: ActivationCheckpointing = None
    optimizer_state_format: str = "fp32"
    communication: Communication = field(default_factory=Communication)

    @property
    def sequence_parallel(self) -> bool:
        return self.communication.sequence_parallel

    def options(self) -> dict[str, object]:
        """The arguments of TexMoEStrategy that this stands for, with the micro-batch and the accumulation."""
        layout = self.layout
        return {
            "tensor_parallel_size": layout.tensor,
            "expert_parallel_size": layout.expert,
            "expert_tensor_parallel_size": layout.expert_tensor,
            "zero_stage": self.zero_stage,
            "sequence_parallel": self.sequence_parallel,
            "activation_checkpointing": self.activation_checkpointing,
            "optimizer_state_format": self.optimizer_state_format,
            "duplicate_token_dropping": self.communication.duplicate_token_dropping,
            "expert_chunks": self.communication.expert_chunks,
            "micro_batch": self.micro_batch,
            "accumulate_grad_batches": self.accumulation,
        }


class ActivationSource(ABC):
    """Where a plan has it from what forwards keep for backwards.

    Attributes:
        name: as a report names it.
        reason: why it is not a better one.
        costly: asking takes longer than everything else that is foreseen of a candidate.
    """

    name: ClassVar[str]
    reason: str = ""
    costly: ClassVar[bool] = False

    @abstractmethod
    def instants(self, job: Job, candidate: Candidate, device: str) -> Iterator[Instant]:
        """The instants of a micro-step at which a rank may be fullest, without gradients on their way.

        Args:
            job, candidate: what is trained, and how.
            device: ``cuda`` or ``cpu``.
        """

    def at_least(self, job: Job, candidate: Candidate, device: str) -> int:
        """Bytes that are held at some instant, as far as that is known without asking; arguments as above."""
        return 0


@dataclass(frozen=True)
class Choices:
    """What is varied beside the layout; ``None`` or a whole tuple: everything legal.

    Args:
        tensor, expert, expert_tensor, micro_batch: sizes to keep to.
        zero_stage, sequence_parallel, activation_checkpointing, optimizer_state_format: values to try.
        duplicate_token_dropping: duplicate-token dropping where it is a choice.
        expert_chunks: as the strategy's.
        ranks_per_node: decides of ``"auto"`` chunks; ``None``: there is one node.
        most_tensor: no larger tensor axis, such as the GPUs of a node.
    """

    tensor: int | None = None
    expert: int | None = None
    expert_tensor: int | None = None
    micro_batch: int | None = None
    zero_stage: Sequence[int] = ZERO_STAGES
    sequence_parallel: Sequence[bool] = (False, True)
    activation_checkpointing: Sequence[ActivationCheckpointing] = ACTIVATION_CHECKPOINTING
    optimizer_state_format: Sequence[str] = OPTIMIZER_STATE_FORMATS
    duplicate_token_dropping: bool = True
    expert_chunks: ExpertChunks = "auto"
    ranks_per_node: int | None = None
    most_tensor: int | None = None


def layouts(model: ModelDescription, world: int, choices: Choices | None = None) -> list[Layout]:
    """Every layout that the world, the topology's rules and the model's layers allow.

    Raises:
        ValueError: none is; with what the topology says of the one that was asked for.
    """
    choices = choices or Choices()
    found: list[Layout] = []
    refusal = UserValueError(f"no layout of {world} ranks is possible")
    most = choices.most_tensor or world
    tensors = [t for t in divisors(world) if t <= most] if choices.tensor is None else [choices.tensor]
    for tensor in tensors:
        for folded in dict.fromkeys((tensor, 1) if choices.expert_tensor is None else (choices.expert_tensor,)):
            legal = Layout.legal_expert_sizes(world, max(1, folded), model.experts) if model.experts else [1]
            for expert in legal if choices.expert is None else [choices.expert]:
                try:
                    layout = Layout.resolve(
                        world, tensor, expert, folded, model.experts, choices.duplicate_token_dropping
                    )
                    model.check(layout)
                    layout.require_experts(model.experts)
                except UserValueError as error:
                    refusal = error
                else:
                    found.append(layout)
    if not found:
        raise refusal
    return found


def candidates(job: Job, choices: Choices | None = None) -> Iterator[Candidate]:
    """Every legal way to run a job.

    Micro-batches are the powers of two, and all of a rank's sequences, that divide those. Sequence parallelism needs a
    model that has both its ends, and a length that the tensor axis divides; recomputation needs blocks; formats other
    than fp32 need bf16 parameters; ZeRO needs replicas; fewer bytes of communication at a recomputation need a
    recomputation: what would be another candidate's equal is left out.

    Raises:
        ValueError: nothing is legal, with the reason.
    """
    choices = choices or Choices()
    if not job.model.blocks.order and None not in choices.activation_checkpointing:
        raise UserValueError(
            f"activation_checkpointing={choices.activation_checkpointing[0]!r}: the model has no blocks to recompute, "
            "which are elements of nn.ModuleLists that hold TEX layers; legal: None"
        )
    none = True
    for layout in layouts(job.model, job.world, choices):
        for micro, accumulation in _micro_batches(job, layout, choices):
            for options in _options(job, layout, choices):
                none = False
                yield Candidate(layout, micro, accumulation, *options)
    if none:
        raise UserValueError(
            f"global_batch_size={job.global_batch_size} sequences cannot be shared evenly over the data axis of any "
            f"layout of {job.world} ranks"
            + ("" if choices.micro_batch is None else f" with micro_batch={choices.micro_batch}")
        )


def _micro_batches(job: Job, layout: Layout, choices: Choices) -> Iterator[tuple[int, int]]:
    if job.global_batch_size % layout.data:
        return
    share = job.global_batch_size // layout.data
    sizes = {1 << i for i in range(share.bit_length())} if choices.micro_batch is None else {choices.micro_batch}
    for micro in sorted(sizes, reverse=True):
        if micro <= share and share % micro == 0:
            yield micro, share // micro


def _options(
    job: Job, layout: Layout, choices: Choices
) -> Iterator[tuple[int, ActivationCheckpointing, str, Communication]]:
    only_plain = not job.precision.startswith("bf16") or job.optimizer.steps_matrices
    formats = [f for f in choices.optimizer_state_format if f == "fp32" or not only_plain]
    replicated = layout.data > 1
    chunks = chunks_on(layout, choices.expert_chunks, choices.ranks_per_node or layout.world)
    recomputations = choices.activation_checkpointing if job.model.blocks.order else (None,)
    for sequence in choices.sequence_parallel:
        indivisible = layout.tensor == 1 or job.sequence_length % layout.tensor
        if sequence and (indivisible or not job.model.sequence_can_be_split):
            continue
        communication = Communication(
            choices.duplicate_token_dropping, sequence_parallel=sequence, expert_chunks=chunks
        )
        for stage in choices.zero_stage if replicated else list(choices.zero_stage)[:1]:
            for checkpointing in recomputations:
                if (
                    checkpointing == "communication_aware"
                    and job.world == 1
                    and "full" in choices.activation_checkpointing
                ):
                    continue
                for optimizer_state_format in formats:
                    yield stage, checkpointing, optimizer_state_format, communication
