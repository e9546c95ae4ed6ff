"""What stands in the place of the user's optimizer: its hooks, its name, and what it refuses."""

import pytest
import torch
from helpers.optimizer_alone import KINDS, backward, network, pair, tiled
from jsonargparse import ArgumentParser
from lightning.pytorch.core.optimizer import LightningOptimizer
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


def test_it_is_of_the_users_class_and_has_nothing_of_it():
    class Averaging(torch.optim.SGD):
        averages = True

        def __getattr__(self, name):
            if name != "other":
                raise AttributeError(name)
            return 1

        def eval(self):
            self.param_groups.clear()

        def add_param_group(self, group):
            super().add_param_group({**group, "averaged": True})

    model = network()
    users = Averaging(model.parameters(), lr=0.1)
    optimizer = tiled(model, users)
    assert isinstance(optimizer, Averaging) and isinstance(optimizer, TiledOptimizer)
    assert type(optimizer).add_param_group is TiledOptimizer.add_param_group
    assert type(optimizer).__setstate__ is Optimizer.__setstate__
    assert not hasattr(optimizer, "averages") and not hasattr(optimizer, "other")
    with pytest.raises(AttributeError, match="its attribute `inner`"):
        optimizer.eval()
    assert optimizer.param_groups[0]["averaged"] and optimizer.inner is users
    wrapped = LightningOptimizer(optimizer)
    assert isinstance(wrapped, Averaging) and type(wrapped).zero_grad is TiledOptimizer.zero_grad
