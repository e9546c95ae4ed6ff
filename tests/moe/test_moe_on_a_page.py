"""The layer on a page is the layer."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

from lightning_tex.moe import MoE, auxiliary_loss

PAGE = Path(__file__).parents[2] / "docs" / "moe_on_a_page.py"


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def page():
    spec = importlib.util.spec_from_file_location("moe_on_a_page", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("capacity_factor", [None, 2.0, 1.0, 0.5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_output_loss_and_gradients_are_those_of_the_layer(page, top_k, capacity_factor):
    torch.manual_seed(top_k)
    layer = MoE(
        8, 16, num_experts=4, top_k=top_k, capacity_factor=capacity_factor, load_balance_coefficient=1.0
    ).double()
    on_page = page.MoEOnAPage(8, 16, 4, top_k, capacity_factor).double()
    pairs = {"router": layer.router.weight, "up": layer.experts.up, "down": layer.experts.down}
    with torch.no_grad():
        for name, parameter in pairs.items():
            getattr(on_page, name).copy_(parameter)
    x = torch.randn(37, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    direction = torch.randn_like(x)

    expected = layer(inputs[0])
    expected_loss = auxiliary_loss(layer)
    ((expected * direction).sum() + expected_loss).backward()
    output, loss = on_page(inputs[1])
    ((output * direction).sum() + loss).backward()

    assert relative(output, expected) < 1e-12
    assert abs((loss - expected_loss).item()) < 1e-12
    assert relative(inputs[1].grad, inputs[0].grad) < 1e-12, "gradient of the input"
    for name, parameter in pairs.items():
        assert relative(getattr(on_page, name).grad, parameter.grad) < 1e-12, f"gradient of {name}"
    overflowed = int((~on_page.served((x @ on_page.router.T).topk(top_k).indices)).sum())
    assert overflowed == int(layer.load.overflowed)
    assert overflowed > 0 or capacity_factor != 0.5  # the smallest capacity is one that matters


def test_the_page_runs_by_itself_in_under_eighty_lines(capsys):
    runpy.run_path(str(PAGE), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["dropless", "capacity factor 1.0"]
    assert "(64, 32)" in printed[0]
    assert " 0 of 128 choices overflowed" in printed[0]
    assert len(PAGE.read_text().splitlines()) < 80
