"""Leaf functions: compiled equal to eager, chosen by one setting, giving up once and by name."""

import warnings

import pytest
import torch

from lightning_tex.parallel.compiled import Leaf, compile_leaves, leaf


@pytest.fixture(autouse=True)
def _auto():
    yield
    compile_leaves("auto")


@leaf
def swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


@pytest.mark.full  # a compiler takes its seconds
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch itself, while it loads the compiler
def test_compiled_equals_eager_at_changing_sizes_and_no_rows():
    compile_leaves(True)
    for rows in (7, 5, 1, 0):
        gate, up = torch.randn(rows, 8), torch.randn(rows, 8)
        torch.testing.assert_close(swiglu(gate, up), swiglu.eager(gate, up))
    assert swiglu._compiled is not None


def test_another_number_of_rows_compiles_nothing_anew(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counter, **options))
    compile_leaves(True)
    function = leaf(lambda x, weight: x.square() * weight)
    for rows, width, compiled in [(7, 8, 1), (5, 8, 1), (9, 8, 1), (9, 4, 2), (6, 4, 2)]:
        function(torch.randn(rows, width), weight=torch.ones(width))
        assert counter.frame_count == compiled, (rows, width)


def test_auto_compiles_nothing_on_cpu(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    fresh = leaf(swiglu.eager)
    gate = torch.randn(3, 4)
    torch.testing.assert_close(fresh(gate, gate), swiglu.eager(gate, gate))


def failing(monkeypatch) -> Leaf:
    def broken(*_):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    monkeypatch.setattr(Leaf, "_compiles", lambda self, args: not self._gave_up)
    return leaf(swiglu.eager)


def test_auto_gives_up_once_by_name(monkeypatch):
    function, gate = failing(monkeypatch), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="swiglu runs uncompiled .* RuntimeError: no compiler found"):
        torch.testing.assert_close(function(gate, gate), swiglu.eager(gate, gate))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(gate, gate)


def test_true_fails_where_it_cannot_compile(monkeypatch):
    function, gate = failing(monkeypatch), torch.randn(3, 4)
    compile_leaves(True)
    with pytest.raises(RuntimeError, match="no compiler"):
        function(gate, gate)


@pytest.mark.parametrize("mode", ["yes", 1, None])
def test_other_settings_are_refused(mode):
    with pytest.raises(ValueError, match=r"compile=.*legal: 'auto', True, False"):
        compile_leaves(mode)
