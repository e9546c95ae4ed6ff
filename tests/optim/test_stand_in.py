"""What stands in the place of the user's optimizer: its hooks, its name, and what it refuses."""

import pytest
import torch
from helpers.optimizer_alone import KINDS, backward, network, pair, tiled
from jsonargparse import ArgumentParser
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_tex.optim import TiledOptimizer


def test_step_hooks_are_called_once_in_a_step_however_many_tiles():
    model, called = network(), []
    users = torch.optim.AdamW(model.parameters(), lr=0.1)
    users.register_step_pre_hook(lambda *_: called.append("users pre"))
    optimizer = tiled(model, users, 64)
    optimizer.register_step_post_hook(lambda *_: called.append("ours post"))
    everywhere = register_optimizer_step_post_hook(lambda *_: called.append("global post"))
    try:
        backward(model, 0)
        optimizer.step()
    finally:
        everywhere.remove()
    assert len(optimizer.shards[0].states.spans) > 5
    assert sorted(called) == ["global post", "ours post", "users pre"]


def test_a_part_of_the_states_is_no_state_dict():
    model = network()
    optimizer = tiled(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(RuntimeError, match="are sharded over ranks; trainer"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="ckpt_path"):
        optimizer.load_state_dict({})


def test_command_lines_find_the_users_optimizer_by_its_name_and_not_the_tiled_one():
    _, optimizer, _, _ = pair(KINDS["AdamW"])
    assert type(optimizer).__name__ == "AdamW" and isinstance(optimizer, TiledOptimizer)
    parser = ArgumentParser()
    parser.add_subclass_arguments(Optimizer, "optimizer", skip={"params"})
    assert parser.parse_args(["--optimizer", "AdamW"]).optimizer.class_path == "torch.optim.AdamW"
