"""Options of the MoE layer that a decoder's configuration passes on."""

import torch

from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.layers import Moe

SIZES = {"vocab_size": 32, "dim": 8, "num_layers": 2, "num_heads": 2, "num_experts": 4, "top_k": 2}


def test_forced_balance_gives_every_expert_as_many_tokens():
    model = Decoder(DecoderConfig(**SIZES, router="forced_balance"))
    [(_, layer)] = model.moe_layers()
    model(torch.randint(32, (2, 6)))
    assert layer.load.take().tolist() == [6, 6, 6, 6, 0]


def test_rounds_reach_the_layer_and_the_plan():
    config = DecoderConfig(**SIZES, round_factor=1.5)
    [(_, layer)] = Decoder(config).moe_layers()
    [planned] = [placed.layer for placed in describe_decoder(config).layers if isinstance(placed.layer, Moe)]
    assert layer.round_factor == planned.round_factor == 1.5
