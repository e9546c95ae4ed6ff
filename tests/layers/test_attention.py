"""Operations that norms and the rotation of queries and keys take, and what they keep, counted without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tex.layers import Context, DocumentContext, ParallelAttention, RMSNorm, Rotary, TokenContext
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.parallel.activation_checkpointing import recompute_blocks

# Operations that only look at a tensor in another shape, or make one without writing to it.
_VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "slice",
    "select",
    "unsqueeze",
    "expand",
    "alias",
    "detach",
    "split",
}
_VIEWS |= {"empty", "empty_like", "empty_strided", "new_empty", "unbind", "permute", "as_strided", "squeeze"}


class Launches(TorchDispatchMode):
    """Names of the operations inside, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_rotation_of_queries_and_keys() -> None:
    query, key = (torch.randn(2, 7, heads, 8, requires_grad=True) for heads in (4, 2))
    tables = Rotary(8).tables(7, query)
    with Launches() as forward:
        turned = tables.turn(query, key)
    upstream = [torch.ones_like(x) for x in turned]
    with Launches() as backward:
        torch.autograd.backward(turned, upstream)
    assert (len(forward.names), len(backward.names)) == (6, 6), (forward.names, backward.names)


def test_attention_without_its_tables() -> None:
    layer, x = ParallelAttention(32, 4, 2), torch.randn(2, 7, 32, requires_grad=True)
    tables = layer.rotary.tables(7, x)
    with Launches() as forward:
        y = layer(x, rotary=tables)
    with Launches() as backward:
        y.sum().backward()
    assert len(forward.names) <= 12, forward.names
    assert len(backward.names) <= 20, backward.names


@pytest.mark.parametrize("mode", [None, "full", "communication_aware"])
def test_tables_are_made_once_a_forward(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    tables = Rotary.tables
    monkeypatch.setattr(Rotary, "tables", lambda self, *given: made.append(1) or tables(self, *given))
    decoder = Decoder(DecoderConfig(61, 16, 3, 4, hidden_dim=16))
    recompute_blocks(decoder, mode)
    decoder(torch.randint(61, (2, 6)), token_mask=torch.ones(2, 6).bool()).sum().backward()
    assert len(made) == 1


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        yield tensors


def test_a_norm_keeps_no_copy_of_narrow_activations() -> None:
    norm, x = RMSNorm(16), torch.randn(4, 16).bfloat16().requires_grad_()
    with kept() as tensors:
        norm(x)
    copies = [t for t in tensors if t.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr())]
    assert [t.shape for t in copies] == [(4, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_norms_gradients_are_those_of_the_wide_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, reference = RMSNorm(16, eps=1e-5), torch.nn.RMSNorm(16, eps=1e-5).double()
    torch.nn.init.normal_(norm.weight)
    reference.weight.data.copy_(norm.weight)
    norm.to(torch.promote_types(dtype, torch.float32))
    x, upstream = torch.randn(3, 4, 16).to(dtype).requires_grad_(), torch.randn(3, 4, 16).to(dtype)
    wide = x.detach().double().requires_grad_()
    y, expected = norm(x), reference(wide)
    y.backward(upstream)
    expected.backward(upstream.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    pairs = (y, expected), (x.grad, wide.grad), (norm.weight.grad, reference.weight.grad)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)


# --- padding: what reaches torch's attention, and that it is what a mask gives


class Given:
    """What scaled_dot_product_attention is called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
        real = torch.nn.functional.scaled_dot_product_attention

        def noted(*tensors: Tensor, **options: Any) -> Tensor:
            self.calls.append((tensors, options))
            return real(*tensors, **options)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_asks_for_what_flash_kernels_take(
    padded: bool, kv_heads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take no mask; any head width up to 256 in eights, 16-bit numbers, and last dims without gaps."""
    given = Given(monkeypatch)
    decoder = Decoder(DecoderConfig(61, 32, 2, 4, kv_heads, hidden_dim=16)).bfloat16()
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0]]) if padded else None
    decoder(torch.randint(61, (2, 6)), token_mask=mask).sum().backward()
    assert len(given.calls) == 2
    for tensors, options in given.calls:
        assert options["attn_mask"] is None and options["is_causal"]
        assert options["enable_gqa"] == (kv_heads is not None)
        for tensor in tensors:
            assert tensor.stride(-1) == 1 and tensor.dtype == torch.bfloat16
            assert tensor.shape[-1] == 8 and all(stride % 8 == 0 for stride in tensor.stride()[:-1])


def test_grouped_heads_under_a_mask_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that takes a mask takes no heads in groups."""
    given = Given(monkeypatch)
    ParallelAttention(32, 4, 2)(torch.randn(2, 6, 32), torch.ones(2, 6).bool())
    ((tensors, options),) = given.calls
    assert [tensor.shape[1] for tensor in tensors] == [4, 4, 4]
    assert options["attn_mask"] is not None and not options["enable_gqa"]


PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0], [1] * 6, [0] * 6]).bool()


SEGMENTS = torch.tensor([[9, 9, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 5, 0, 5, 6, 5], [0, 1, 2, 2, 0, 0], [3] * 6])
ALL = torch.ones_like(PADDING)
CONTEXTS: dict[str, tuple[Context, Tensor]] = {
    "padding": (TokenContext.causal(PADDING), PADDING),
    "documents": (DocumentContext.of(SEGMENTS), ALL),
    "documents and padding": (DocumentContext.of(SEGMENTS, PADDING), PADDING),
    "whole documents and padding": (DocumentContext.of(torch.zeros_like(SEGMENTS), PADDING), PADDING),
}


def test_positions_and_lengths_of_documents() -> None:
    context = CONTEXTS["documents and padding"][0]
    assert isinstance(context, DocumentContext)
    # In the third row two tokens of one document stand around padding that has another number.
    assert context.lengths == (6, 2, 4, 2, 4, 1, 1, 2, 2, 6)
    assert context.ends.tolist() == [0, 6, 8, 12, 14, 18, 19, 20, 22, 24, 30]
    assert context.position_ids[PADDING].tolist() == [0, 1, 2, 3, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_context_is_what_its_mask_and_positions_say(kind: str, kv_heads: int | None) -> None:
    """At real tokens, in value and gradients; what padding holds, NaN or not, is nobody's."""
    torch.manual_seed(0)
    layer, (context, real) = ParallelAttention(32, 4, kv_heads).double(), CONTEXTS[kind]
    x = torch.randn(5, 6, 32).double().requires_grad_()
    upstream = torch.randn(5, 6, 32).double() * real[..., None]
    query, key, value = layer.heads(x)
    tables = layer.rotary.tables(6, x)
    # Tables of each sequence, by the positions of its tokens.
    cos, sin = (table[0, :, 0][context.position_ids][:, :, None] for table in (tables.cos, tables.sin))
    query, key = type(tables)(cos, sin).turn(query, key)
    expected = layer.out(layer._attend(query, key, value, context.visible, None).flatten(-2))
    leaves = [x, *layer.parameters()]
    mine = layer(x, context=context)
    torch.testing.assert_close(mine[real], expected[real], rtol=1e-12, atol=1e-12)
    for found, reference in zip(
        torch.autograd.grad(mine, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)
    changed = torch.where(real[..., None], x, 1e6)
    assert torch.equal(layer(changed, context=context)[real], mine[real])


def test_what_is_packed_comes_back() -> None:
    context, x = TokenContext.causal(PADDING), torch.randn(5, 6, 3)
    packed = context.pack(x)
    assert torch.equal(context.unpack(packed), x)
    for row, real in enumerate(PADDING):
        assert torch.equal(packed[row, : int(real.sum())], x[row, real])
