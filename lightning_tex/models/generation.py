"""Text that goes on: tokens drawn one after the other, by a cache of what came before, on every layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_tex.layers import CachedContext, KVCache
from lightning_tex.layers.kv_cache import PromptTokens
from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.decoder import Decoder, require_token_mask
from lightning_tex.models.sampling import Sampling
from lightning_tex.moe.serving import every_choice_served, require_tokenwise_routers
from lightning_tex.parallel.collectives import all_gather, broadcast
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.host_numbers import highest
from lightning_tex.parallel.sharding import TexModule
from lightning_tex.parallel.topology import Axis, Topology

# B sequences, S positions, N new tokens, V vocabulary


class GeneratingRanks(TexModule):
    """How ranks that generate go on together: experts on other ranks are reached in every step by all or by none."""

    axes = ("tensor", "data")

    def __init__(self) -> None:
        super().__init__()
        self.host = Axis("world")
        self.same_everywhere = True

    def bind(self, topology: Topology) -> None:
        super().bind(topology)
        self.host = topology.host

    def compare(self, asked: int, device: torch.device) -> None:
        """See who is asked for the same; ``asked`` is a hash of it.

        Raises:
            ValueError: ranks of one tensor group, which compute one result together, are not.
        """
        self.same_everywhere = highest(asked, self.host) == -highest(-asked, self.host)
        if self.same_everywhere:
            return
        of_group = all_gather(torch.tensor([asked], device=device), 0, self.tensor)
        if bool((of_group != asked).any()):
            raise UserValueError(
                f"ranks {', '.join(map(str, self.tensor.ranks))} share the model's matrices (tensor_parallel_size="
                f"{self.tensor.size}) and were asked to continue different prompts, or with different options; legal: "
                "the same on the ranks of a tensor group, different ones or none on those of the data axis"
            )

    def most(self, number: int) -> int:
        """The highest of all ranks' numbers."""
        return number if self.same_everywhere else highest(number, self.host)

    def decided(self, tokens: Tensor) -> Tensor:
        """One choice of tokens where all ranks were asked for the same: a near tie is nobody's own affair."""
        return broadcast(tokens, self.data) if self.same_everywhere else tokens


def prompts_of(ids: Tensor, attention_mask: Tensor | None, segments: Tensor | None) -> list[Tensor]:
    """The tokens that each row of a batch is continued by: without padding, of its last document. On the CPU.

    Raises:
        ValueError: a mask or segments that are not of tokens, or a row without any.
    """
    if ids.dim() != 2 or ids.is_floating_point():
        raise UserValueError(f"ids are {ids.dtype} of shape {list(ids.shape)}; legal: integers of shape [B, S]")
    tokens, mask = ids.cpu(), torch.ones_like(ids, dtype=torch.bool, device="cpu")
    if attention_mask is not None:
        mask = require_token_mask(attention_mask, ids).bool().cpu()
    if segments is not None and segments.shape != ids.shape:
        raise UserValueError(f"segments are of shape {list(segments.shape)} for ids of shape {list(ids.shape)}")
    rows = [row[kept] for row, kept in zip(tokens, mask, strict=True)]
    if segments is not None:
        documents = (document[kept] for document, kept in zip(segments.cpu(), mask, strict=True))
        rows = [row[len(row) - _last_document(own) :] for row, own in zip(rows, documents, strict=True)]
    if empty := [number for number, row in enumerate(rows) if not len(row)]:
        raise UserValueError(
            f"rows {', '.join(map(str, empty))} have no token to continue; legal: at least one token in each row "
            "(a rank without prompts passes ids of shape [0, S])"
        )
    return rows


def _last_document(segments: Tensor) -> int:
    """How many tokens at the end are of one document: [S] -> a number."""
    return int((segments == segments[-1:]).flip(0).long().cumprod(0).sum())


def require_room(longest: int, new_tokens: int, config: DecoderConfig) -> None:
    """Refuse positions that the model is not made for.

    Raises:
        ValueError: naming how many tokens there may be.
    """
    most = config.max_sequence_length
    if longest + new_tokens > most:
        legal = f"new_tokens of at most {most - longest}" if longest < most else f"prompts of less than {most} tokens"
        raise UserValueError(
            f"a prompt of {longest} tokens and new_tokens={new_tokens} are {longest + new_tokens} positions, and the "
            f"model's max_sequence_length={most}; legal: {legal}"
        )


def continued(
    decoder: Decoder,
    ranks: GeneratingRanks,
    prompts: Sequence[Tensor],
    new_tokens: int,
    sampling: Sampling,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
) -> Tensor:
    """New tokens of each prompt. Collective over all ranks; see :meth:`LanguageModel.generate`.

    Ranks of the data axis may have other prompts, or none, and other options: who is done goes on with tokens of nobody
    until all are.

    Args:
        decoder: in evaluation mode.
        ranks: of the layout.
        prompts: [S] each, of any lengths, on the CPU.
        new_tokens: at most.
        sampling: how they are chosen.
        stop_tokens: after any of them a sequence is over.
        pad_token: what stands after it.

    Returns:
        [B, N], N being ``new_tokens`` or where the last sequence is over.
    """
    device = decoder.embedding.weight.device
    ranks.compare(_hash(prompts, new_tokens, sampling, stop_tokens), device)
    steps = ranks.most(new_tokens if prompts else 0)
    may_stop, own_steps = bool(ranks.most(int(bool(stop_tokens)))), 0
    writing = Writing(decoder, prompts, steps)
    stops = torch.tensor(stop_tokens, dtype=torch.int64, device=device)
    going = torch.ones(len(writing.sequences), dtype=torch.bool, device=device)
    chosen: list[Tensor] = []
    shown: list[Tensor] = []
    goes_on, ours_goes_on = steps > 0, bool(prompts) and new_tokens > 0
    while goes_on:
        tokens = ranks.decided(sampling.choose(writing.logits(chosen, going if stop_tokens else None), len(chosen)))
        chosen.append(tokens)
        shown.append(tokens.masked_fill(~going, pad_token) if stop_tokens else tokens)
        own_steps += ours_goes_on
        ours_goes_on = ours_goes_on and own_steps < new_tokens
        if stop_tokens and ours_goes_on:
            going &= ~torch.isin(tokens, stops)
            ours_goes_on = bool(going.any())
        goes_on = len(chosen) < steps and (not may_stop or ranks.most(int(ours_goes_on)) > 0)
    new = torch.stack(shown, 1) if shown else torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)
    return new[: len(prompts), :own_steps]


class Writing:
    """Sequences that grow, and the cache that knows them: a forward a step, of new tokens alone.

    Args:
        decoder: in evaluation mode.
        prompts: what sequences begin with; where there are none, a token of nobody.
        steps: how many tokens there will be.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Tensor], steps: int) -> None:
        self.decoder, self.is_real = decoder, bool(prompts)
        self.device = decoder.embedding.weight.device
        self.parts = decoder.embedding.activation_layout.shard_axis.size
        self.sequences = list(prompts) or [torch.zeros(1, dtype=torch.int64)]
        self.positions = max(map(len, self.sequences)) + steps
        self._context: CachedContext | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache on this rank."""
        return 0 if self._context is None else self._context.cache.nbytes

    def logits(self, chosen: Sequence[Tensor], going: Tensor | None) -> Tensor:
        """Of what follows the prompts and the tokens that were chosen, [B] in each step: [B, V].

        Args:
            chosen: all so far; they are those of the last call and one more.
            going: [B] boolean, False for sequences that are over; ``None``: all go on.
        """
        scaling = self.decoder.rotary.scaling
        if self._context is None or (scaling is not None and scaling.turns_anew(self._context.longest + 1)):
            sequences = self.sequences
            if chosen:
                new = torch.stack(list(chosen), 1).cpu()
                sequences = [torch.cat(both) for both in zip(sequences, new, strict=True)]
            lengths, cache = [len(sequence) for sequence in sequences], KVCache(self.positions - 1)
            self._context = PromptTokens.of(cache, lengths, self.device, self.is_real, self.parts)
            ids = torch.cat(sequences).to(self.device)
        else:
            if not self.is_real:
                going = torch.zeros(1, dtype=torch.bool, device=self.device)
            self._context = self._context.next(going, self.parts)
            ids = chosen[-1]
        filled = torch.nn.functional.pad(ids, (0, -len(ids) % self.parts))
        return self.decoder.next_logits(filled[None], self._context)


def cache_bytes(config: DecoderConfig, sequences: int, positions: int, element_bytes: int, tensor: int = 1) -> int:
    """Bytes of a rank's cache, as of :class:`lightning_tex.layers.KVCache`.

    Args:
        config: of the decoder.
        sequences: of the batch.
        positions: of the longest of them with its new tokens, but for the last, which nobody follows.
        element_bytes: of an activation.
        tensor: ranks that share the heads.
    """
    if config.kv_lora_rank is not None:
        assert config.qk_nope_head_dim and config.qk_rope_head_dim and config.v_head_dim, config
        width = config.num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    else:
        width = config.kv_heads * 2 * config.head
    windows = [config.window(layer) if config.kv_lora_rank is None else None for layer in range(config.num_layers)]
    slots = sum(positions if window is None else min(positions, window) for window in windows)
    return sequences * slots * width // tensor * element_bytes


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Meanwhile, all modules inside are in evaluation mode and layers with a capacity serve all choices.

    Raises:
        ValueError: a router that does not choose token by token.
    """
    require_tokenwise_routers(module)
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with every_choice_served(module):
            yield
    finally:
        for each, mode in modes:
            each.training = mode


def _hash(prompts: Sequence[Tensor], *options: object) -> int:
    return stable_hash([prompt.tolist() for prompt in prompts], *options)
