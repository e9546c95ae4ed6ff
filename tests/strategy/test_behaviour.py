"""What a user of the strategy relies on beside equality of the grid: Lightning's own features, each on four ranks."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from behaviour_modules import (
    DictLogger,
    PublicNames,
    Unequal,
    batches,
    gathered,
    loader,
    new_trainer,
    on_data_axis,
    on_ranks,
    own_slices,
)
from layout_runs import distance
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics import MeanMetric

from lightning_tex import drawing
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.moe import Router, auxiliary_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*")

TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
FOLDED = {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}
LAYOUTS = {"ted": TED, "folded": FOLDED, "data": {}}


def assert_equal_to_one_process(function: Callable[..., dict[str, Tensor]], *args: Any, layout: Any = TED) -> None:
    """``function(layout, *args)`` gives named tensors; on four ranks the same ones as under ``strategy="auto"``."""
    (reference,) = on_ranks(1, function, None, *args)
    for rank, got in enumerate(on_ranks(4, function, layout, *args)):
        assert got.keys() == reference.keys()
        for name, value in reference.items():
            error = distance(got[name].double(), value.double())
            # torchmetrics keeps its states in fp32 whatever the module's precision is.
            tolerance = 1e-6 if value.dtype == torch.float32 else 1e-10
            assert error <= tolerance, f"rank {rank}, {name}: {error:.1e}"


# --- a module that knows public names only


def fit_public_names(layout: Any, **flags: Any) -> dict[str, Tensor]:
    module = PublicNames()
    trainer = new_trainer(layout, **flags)
    trainer.fit(module, on_data_axis(trainer, batches(8)))
    return gathered(module, trainer) | {"losses": module.mean_losses(trainer)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_module_of_public_names_trains_under_both(layout: dict[str, int]) -> None:
    assert_equal_to_one_process(fit_public_names, layout=layout)


def fit_clipped_by_value(layout: Any) -> dict[str, Tensor]:
    return fit_public_names(layout, gradient_clip_val=0.01, gradient_clip_algorithm="value")


def fit_clipped_by_norm(layout: Any) -> dict[str, Tensor]:
    return fit_public_names(layout, gradient_clip_val=0.1, accumulate_grad_batches=2)


@pytest.mark.parametrize("function", [fit_clipped_by_value, fit_clipped_by_norm])
def test_gradient_clipping(function: Any) -> None:
    assert_equal_to_one_process(function)
    (clipped,), (free,) = on_ranks(1, function, None), on_ranks(1, fit_public_names, None)
    assert distance(clipped["plain.weight"], free["plain.weight"]) > 1e-4, "nothing was clipped"


def fit_one_device(strategy: str) -> dict[str, Tensor]:
    module = PublicNames()
    trainer = new_trainer(None, strategy=strategy)
    trainer.fit(module, loader(batches(8)))
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_one_device_by_alias() -> None:
    (auto,), (ours,) = on_ranks(1, fit_one_device, "auto"), on_ranks(1, fit_one_device, "tex_moe")
    assert auto.keys() == ours.keys()
    assert max(distance(ours[name], auto[name]) for name in auto) <= 1e-12


# --- manual optimization


class Manual(PublicNames):
    """Accumulates two batches and clips, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


def fit_manually(layout: Any) -> dict[str, Tensor]:
    module = Manual()
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, batches(8)))
    return gathered(module, trainer)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_manual_optimization(layout: dict[str, int]) -> None:
    assert_equal_to_one_process(fit_manually, layout=layout)


# --- logging and metrics


class Logs(PublicNames):
    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        number = batch[0].sum().double()
        self.log("mean", number, sync_dist=True, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        self.log("sum", number, sync_dist=True, reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("max", number, sync_dist=True, reduce_fx="max", on_step=False, on_epoch=True)
        self.metric.update(batch[0].double())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("metric", self.metric.compute())
        self.metric.reset()


def fit_logging(layout: Any) -> dict[str, Tensor]:
    module = Logs()
    trainer = new_trainer(layout)
    data = batches(8)
    trainer.fit(module, on_data_axis(trainer, data))
    return {name: trainer.callback_metrics[name] for name in ("mean", "sum", "metric", "max")}


def test_logged_values_count_every_sample_once() -> None:
    ids = torch.cat([batch[0] for batch in batches(8)]).double()
    halves = ids.view(8, 2, 4, -1).sum((2, 3))  # [batch, data rank]
    for values in on_ranks(4, fit_logging, TED):
        assert float(values["sum"]) == pytest.approx(float(ids.sum()))
        assert float(values["mean"]) == pytest.approx(float(halves.mean()))
        assert float(values["max"]) == float(halves.max())
        assert float(values["metric"]) == pytest.approx(float(ids.mean()))


# --- schedulers


class Scheduled(PublicNames):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit_scheduled(layout: Any) -> dict[str, Tensor]:
    module, logger = Scheduled(), DictLogger()
    trainer = new_trainer(layout, logger=logger, callbacks=[LearningRateMonitor("step")], log_every_n_steps=1)
    trainer.fit(module, on_data_axis(trainer, batches(4)))
    rates = torch.tensor([value for name, value in logger.logged if name == "lr-SGD"])
    return gathered(module, trainer) | {"rates": trainer.strategy.broadcast(rates)}


def test_scheduler_acts_on_the_sharded_optimizer_and_the_monitor_sees_it() -> None:
    assert_equal_to_one_process(fit_scheduled)
    (values,) = on_ranks(1, fit_scheduled, None)
    assert values["rates"].tolist() == pytest.approx([0.2, 0.1, 0.05, 0.025])


# --- validation, test and predict


class Evaluates(PublicNames):
    """Remembers what it saw, and logs means over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()
        self.seen = 0

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen += 1
        losses = F.cross_entropy(self.whole_logits(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("loss", losses, sync_dist=True, batch_size=len(batch[0]))
        self.metric.update(losses, weight=len(batch[0]))
        self.log("metric", self.metric)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.whole_logits(batch[0])


def fit_with_validation(layout: Any) -> dict[str, Tensor]:
    module = Evaluates()
    trainer = new_trainer(layout, val_check_interval=2)
    data = on_data_axis(trainer, batches(6))
    trainer.fit(module, data, on_data_axis(trainer, batches(2, seed=5)))
    metrics = {name: trainer.callback_metrics[name] for name in ("loss", "metric")}
    return gathered(module, trainer) | metrics | {"seen": torch.tensor(module.seen)}


def test_validation_in_the_middle_of_training() -> None:
    assert_equal_to_one_process(fit_with_validation)


def evaluate_unequal(layout: Any, iterable: bool) -> dict[str, Any]:
    module = Evaluates()
    trainer = new_trainer(layout)
    everything = batches(5, samples=2)
    # Data rank 0 has batches 0 to 3, data rank 1 only batch 4.
    rank = trainer.distributed_sampler_kwargs["rank"] if layout else None
    own = everything if rank is None else everything[:4] if rank == 0 else everything[4:]
    given = DataLoader(Unequal(own), batch_size=None) if iterable else loader(own)
    found: dict[str, Any] = {}
    for stage in ("validate", "test"):
        (found[stage],) = getattr(trainer, stage)(module, given, verbose=False)
    predictions = trainer.predict(module, given)
    found["predictions"] = torch.cat(predictions)
    found["count"] = len(predictions)
    return found


@pytest.mark.parametrize("iterable", [False, True], ids=["sampler", "iterable"])
@pytest.mark.parametrize("layout", [TED, FOLDED], ids=["ted", "folded"])
def test_evaluation_with_unequal_numbers_of_batches(layout: dict[str, int], iterable: bool) -> None:
    (reference,) = on_ranks(1, evaluate_unequal, None, iterable)
    parts = {0: reference["predictions"][:8], 1: reference["predictions"][8:]}
    for rank, found in enumerate(on_ranks(4, evaluate_unequal, layout, iterable)):
        assert found["count"] == (4, 1)[rank // 2]
        torch.testing.assert_close(found["predictions"], parts[rank // 2], rtol=1e-10, atol=1e-10)
        for stage in ("validate", "test"):
            for name, value in reference[stage].items():
                assert found[stage][name] == pytest.approx(value, rel=1e-10), (rank, stage, name)


def train_unequal(layout: Any, iterable: bool) -> dict[str, Any]:
    module = PublicNames()
    trainer = new_trainer(layout, max_epochs=2)
    own = batches(5)[: (5, 3)[trainer.distributed_sampler_kwargs["rank"]]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(Unequal(own), batch_size=None) if iterable else loader(own))
    texts = [str(w.message) for w in caught]
    return {"steps": trainer.global_step, "warned": any("end" in t and "rank" in t for t in texts), "texts": texts}


@pytest.mark.parametrize("iterable", [False, True], ids=["sampler", "iterable"])
def test_training_with_unequal_numbers_of_batches_ends_together(iterable: bool) -> None:
    outcomes = on_ranks(4, train_unequal, TED, iterable)
    assert [outcome["steps"] for outcome in outcomes] == [6] * 4
    assert outcomes[0]["warned"], outcomes[0]["texts"]


def fit_short_last_batch(layout: Any, uneven: bool) -> dict[str, Tensor]:
    module = PublicNames(capacity_factor=None if not uneven else 1.0)
    trainer = new_trainer(layout)
    data = [*batches(3), [part[:4] for part in batches(1, seed=9)[0]]]
    mine = own_slices(trainer, data)
    if uneven and trainer.strategy.distributed_sampler_kwargs["rank"]:
        mine[-1] = [part[:1] for part in mine[-1]]
    trainer.fit(module, loader(mine))
    return gathered(module, trainer) | {"steps": torch.tensor(trainer.global_step)}


def test_short_last_batch() -> None:
    assert_equal_to_one_process(fit_short_last_batch, False)


def test_last_batch_that_is_shorter_on_some_ranks() -> None:
    outcomes = on_ranks(4, fit_short_last_batch, TED, True)
    for outcome in outcomes:
        assert int(outcome["steps"]) == 4
        assert all(bool(value.isfinite().all()) for value in outcome.values())
        assert all(torch.equal(value, outcomes[0][name]) for name, value in outcome.items())


# --- data: samplers, workers, batches


class Numbers(Dataset):
    """Sample i is i, and what the worker's random states give."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        drawn = [int(torch.randint(2**30, ())), int(np.random.randint(2**30))]  # noqa: NPY002
        return {"index": torch.tensor(index), "drawn": torch.tensor(drawn)}


class SeesSamples(PublicNames):
    def __init__(self) -> None:
        super().__init__()
        self.indices: list[int] = []
        self.drawn: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.indices += batch["index"].tolist()
        self.drawn += batch["drawn"].flatten().tolist()
        return self.loss([batch["index"][:, None], batch["index"][:, None]])


def fit_numbers(layout: Any, workers: int, seeded: bool) -> dict[str, Any]:
    L.seed_everything(7, workers=seeded, verbose=False)
    module = SeesSamples()
    trainer = new_trainer(layout, use_distributed_sampler=True)
    trainer.fit(module, DataLoader(Numbers(), batch_size=2, shuffle=True, num_workers=workers))
    sampler = trainer.train_dataloader.sampler
    assert isinstance(sampler, DistributedSampler)
    return {"indices": module.indices, "drawn": module.drawn, "replicas": sampler.num_replicas, "rank": sampler.rank}


def test_lightning_injects_a_sampler_over_the_data_axis() -> None:
    found = on_ranks(4, fit_numbers, TED, 0, False)
    assert [f["replicas"] for f in found] == [2] * 4
    assert [f["rank"] for f in found] == [0, 0, 1, 1]
    assert found[0]["indices"] == found[1]["indices"]
    assert found[2]["indices"] == found[3]["indices"]
    assert sorted(found[0]["indices"] + found[2]["indices"]) == list(range(16))


@pytest.mark.parametrize("seeded", [False, True])
def test_workers_draw_alike_over_tensor_and_differently_over_data(seeded: bool) -> None:
    found = on_ranks(4, fit_numbers, TED, 2, seeded)
    assert found[0]["drawn"] == found[1]["drawn"]
    assert found[2]["drawn"] == found[3]["drawn"]
    everything = found[0]["drawn"] + found[2]["drawn"]
    assert len(set(everything)) == len(everything), "two samples drew the same numbers"


def fit_differing(layout: Any, odd: int) -> str:
    module = PublicNames()
    trainer = new_trainer(layout)
    data = own_slices(trainer, batches(4))
    if trainer.global_rank == odd:
        data[0] = [data[0][0].flip(0), data[0][1]]
    try:
        trainer.fit(module, loader(data))
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_batches_that_differ_over_tensor_are_refused_on_all_ranks() -> None:
    for text in on_ranks(4, fit_differing, TED, 3):
        assert "rank(s) 3 " in text
        assert "trainer.distributed_sampler_kwargs" in text


# --- dropout


class Dropout(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        config = DecoderConfig(61, 16, 2, 4, hidden_dim=16, num_experts=4, dropout=0.4)
        self.model, self.activations = Decoder(config), []
        self.model.norm.register_forward_hook(lambda module, args, y: self.activations.append(y.detach().clone()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])[..., :30].square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_dropout(layout: Any) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    module = Dropout()
    trainer = new_trainer(layout)
    trainer.fit(module, loader(batches(3)))  # the same batches on every data rank
    return {"activations": torch.cat(module.activations), "state": torch.random.get_rng_state()}


def test_dropout_is_alike_over_tensor_and_different_over_data() -> None:
    found = on_ranks(4, fit_dropout, TED)
    for first, second in ((0, 1), (2, 3)):
        torch.testing.assert_close(found[first]["activations"], found[second]["activations"], rtol=1e-12, atol=1e-12)
        assert torch.equal(found[first]["state"], found[second]["state"])
    assert distance(found[0]["activations"], found[2]["activations"]) > 0.1
    assert not torch.equal(found[0]["state"], found[2]["state"])


# --- several stages on one trainer


def fit_test_fit(layout: Any) -> dict[str, Tensor]:
    module = Evaluates()
    trainer = new_trainer(layout)
    data = on_data_axis(trainer, batches(4))
    trainer.fit(module, data)
    (tested,) = trainer.test(module, data, verbose=False)
    trainer.fit_loop.max_epochs += 1
    trainer.fit(module, data)
    steps = torch.tensor(trainer.global_step)
    return gathered(module, trainer) | {"tested": torch.tensor(tested["loss"]), "steps": steps}


@pytest.mark.parametrize("layout", [TED, FOLDED], ids=["ted", "folded"])
def test_fit_then_test_then_fit_again(layout: dict[str, int]) -> None:
    assert_equal_to_one_process(fit_test_fit, layout=layout)


# --- where weights come from


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


class Lazy(L.LightningModule):
    """Built on the meta device in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Decoder | None = None
        self.initial: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("meta"):
                self.model = Decoder(DecoderConfig(61, 16, 2, 4, hidden_dim=64, num_experts=8))

    def on_fit_start(self) -> None:
        self.initial = gathered(self, self.trainer)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])[..., :15].square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_lazily(layout: Any) -> dict[str, Any]:
    L.seed_everything(11, verbose=False)
    module = Lazy()
    trainer = new_trainer(layout)
    largest, materialise = Largest(), drawing.materialise

    def watched(*args: Any) -> None:
        with largest:
            materialise(*args)

    drawing.materialise = watched
    configure = module.configure_model

    def watched_configure() -> None:
        with largest:
            configure()

    module.configure_model = watched_configure
    trainer.fit(module, on_data_axis(trainer, batches(2)))
    part = max(p.numel() for p in module.parameters())
    expert = trainer.strategy.topology.expert.size
    return {"initial": module.initial, "largest": largest.numel, "part": part, "expert": expert}


def test_model_built_on_meta_is_drawn_part_by_part_and_equally_on_every_layout() -> None:
    (reference,) = on_ranks(1, fit_lazily, {})
    whole = max(value.numel() for value in reference["initial"].values())
    layouts = [TED, FOLDED, {"tensor_parallel_size": 4}, {"expert_parallel_size": 4}]
    for layout in layouts:
        for found in on_ranks(4, fit_lazily, layout):
            assert found["part"] * 4 == whole
            assert found["largest"] <= found["part"], "more than this rank's part of a parameter existed"
            for name, value in reference["initial"].items():
                assert torch.equal(found["initial"][name], value), name


def test_automatic_expert_size_waits_for_a_model_built_in_configure_model() -> None:
    for layout, expected in ({}, 4), ({"tensor_parallel_size": 2}, 2), ({**FOLDED, "expert_parallel_size": "auto"}, 4):
        assert [found["expert"] for found in on_ranks(4, fit_lazily, layout)] == [expected] * 4


class OwnWeights(PublicNames):
    """Initialises itself, differently on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(100 + int(os.environ["RANK"]))
        self.normalised = nn.BatchNorm1d(16)
        for tensor in (*self.parameters(), self.normalised.running_mean):
            nn.init.normal_(tensor, std=0.2)
        self.before = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.buffer_before = self.normalised.running_mean.clone()

    def on_fit_start(self) -> None:
        self.after, self.buffer_after = gathered(self, self.trainer), self.normalised.running_mean.clone()


def fit_own_weights(layout: Any) -> dict[str, Any]:
    module = OwnWeights()
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, batches(1)))
    return {
        "before": module.before | {"buffer": module.buffer_before},
        "after": module.after | {"buffer": module.buffer_after},
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_existing_weights_survive_and_are_those_of_rank_0_everywhere(layout: dict[str, int]) -> None:
    found = on_ranks(4, fit_own_weights, layout)
    assert not torch.equal(found[0]["before"]["plain.weight"], found[1]["before"]["plain.weight"])
    for each in found:
        for name, value in found[0]["before"].items():
            assert torch.equal(each["after"][name].double(), value.double()), name


# --- modules of other kinds


class PlainModules(L.LightningModule):
    """No TEX layer at all: ordinary modules, a buffer, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.norm = nn.Embedding(61, 16), nn.LayerNorm(16)
        self.hidden, self.out = nn.Linear(16, 16), nn.Linear(16, 61)
        self.embedding.requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.norm(self.embedding(batch[0]))
        return F.cross_entropy(self.out(torch.tanh(self.hidden(x))).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit_plain_modules(layout: Any) -> dict[str, Tensor]:
    module = PlainModules()
    frozen = module.embedding.weight.detach().clone().double()
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, batches(6)))
    assert torch.equal(module.embedding.weight.double(), frozen)
    return gathered(module, trainer)


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}], ids=str)
def test_model_without_tex_layers_is_replicated(layout: dict[str, int]) -> None:
    assert_equal_to_one_process(fit_plain_modules, layout=layout)


def fit_frozen(layout: Any) -> dict[str, Tensor]:
    module = PublicNames()
    for part in (module.embedding, module.moe.router, module.up):
        part.requires_grad_(False)
    before = {name: p.detach().clone().double() for name, p in module.named_parameters() if not p.requires_grad}
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, batches(4)))
    after = gathered(module, trainer)
    assert before
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    return after


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_frozen_parameters_stay_and_the_others_train_equally(layout: dict[str, int]) -> None:
    assert_equal_to_one_process(fit_frozen, layout=layout)


def fit_and_look(layout: Any) -> dict[str, Any]:
    module = PublicNames()
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, batches(2)))
    mesh = module.device_mesh
    twin, part = copy.deepcopy(module), copy.deepcopy(module.moe)
    ids = batches(1, seed=4)[0][0]
    with torch.no_grad():
        same = torch.equal(twin.cpu().double()(ids), module(ids))
        x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        same_part = torch.equal(part(x), module.moe(x))
    with torch.no_grad():
        twin.plain.weight.add_(1)
    apart = not torch.equal(twin.plain.weight, module.plain.weight)
    names = mesh.mesh_dim_names, tuple(mesh.shape), mesh is trainer.strategy.device_mesh
    return {"same": same, "same_part": same_part, "apart": apart, "mesh": names}


def test_device_mesh_is_exposed_and_a_cut_module_can_be_copied() -> None:
    for found in on_ranks(4, fit_and_look, TED):
        assert found["mesh"] == (("data", "tensor"), (2, 2), True)
        assert found["same"]
        assert found["same_part"]
        assert found["apart"]


# --- bf16


class Falls(L.LightningModule):
    """Learns to copy one batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        from lightning_tex.layers import VocabParallelCrossEntropy

        self.model = Decoder(DecoderConfig(61, 32, 2, 4, hidden_dim=32, num_experts=4, top_k=2))
        self.cross_entropy, self.losses = VocabParallelCrossEntropy(), []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss + auxiliary_loss(self)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit_in(layout: Any, precision: str) -> dict[str, Any]:
    module = Falls()
    trainer = new_trainer(layout, precision=precision)
    trainer.fit(module, on_data_axis(trainer, batches(1) * 40))
    kept = (Router, nn.RMSNorm)
    full = {p.dtype for part in module.modules() if isinstance(part, kept) for p in part.parameters(recurse=False)}
    low = {p.dtype for part in module.modules() if not isinstance(part, kept) for p in part.parameters(recurse=False)}
    masters = {tile.dtype for shard in trainer.strategy.optimizers[0].shards for tile in shard.tiles}
    losses = trainer.strategy.reduce(torch.tensor(module.losses), reduce_op="mean")
    return {"full": full, "low": low, "masters": masters, "losses": losses}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bf16_mixed(layout: dict[str, int]) -> None:
    exact = on_ranks(4, fit_in, layout, "32-true")[0]["losses"]
    for found in on_ranks(4, fit_in, layout, "bf16-mixed"):
        assert (found["full"], found["low"]) == ({torch.float32}, {torch.bfloat16})
        assert found["masters"] == {torch.float32}
        assert found["losses"][-1] < 0.6 * found["losses"][0]
        assert distance(found["losses"], exact) < 0.02, (found["losses"], exact)
