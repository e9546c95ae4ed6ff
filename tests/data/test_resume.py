"""A run that was interrupted reads the samples that an undisturbed one reads."""

import itertools
import types

import pytest
from helpers.cases import case
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

STEPS = 5  # micro-steps of an epoch: 5 * 8 samples, and a few that are left over

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


@pytest.fixture
def make(make):
    def make_data(**options):
        return make(**({"sequence_length": 72, "global_batch_size": 8} | options))

    return make_data


class SaveAt(Callback):
    """Saves a checkpoint whenever one of some hooks runs."""

    def __init__(self, folder, *hooks):
        self.folder, self.saved = folder, []
        for hook in hooks:
            setattr(self, hook, self.save_at(hook))

    def save_at(self, hook):
        def save(trainer, *_, **__):
            path = self.folder / f"{hook}-{len(self.saved)}.ckpt"
            trainer.save_checkpoint(path)
            self.saved.append((str(path), len(trainer.lightning_module.seen)))

        return save


def fit(trainer, data, module, ckpt_path=None, **options):
    run = trainer(**options)
    run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return run


def flat(steps):
    return [sample for step in steps for sample in step]


@pytest.fixture
def epochs(make):
    data = make()
    data.setup()
    loader = data.train_dataloader()
    orders = []
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        orders += [batch["sample"].tolist() for batch in loader]
    assert len(loader) == len(orders) // 4 == STEPS
    assert len(data.prepared.train) % 8
    return orders


@pytest.mark.parametrize("workers", [(0, 0), (2, 0), (0, 2)])
def test_checkpoints_of_every_step(make, trainer, recorder, epochs, tmp_path, workers):
    first, second = workers
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = recorder()
    fit(trainer, make(num_workers=first), whole, max_epochs=3, callbacks=[saver])
    assert whole.seen == epochs[: 3 * STEPS]
    for step in [3, STEPS, STEPS + 2] if any(workers) else [1, 3, STEPS - 1, STEPS, STEPS + 2, 2 * STEPS]:
        with case(step=step):
            rest = recorder()
            fit(trainer, make(num_workers=second), rest, str(tmp_path / f"step={step}.ckpt"), max_epochs=3)
            assert rest.seen == whole.seen[step:]


@pytest.mark.parametrize(
    "hooks",
    [
        ["on_train_epoch_start", "on_train_epoch_end"],
        ["on_train_batch_start", "on_train_batch_end"],
        ["on_validation_start", "on_validation_end"],
        ["on_train_start", "on_train_end"],
    ],
)
@pytest.mark.parametrize("how", [{"max_epochs": 2}, {"max_steps": 2 * STEPS}], ids=["epochs", "steps"])
def test_checkpoints_at_hooks(make, trainer, recorder, epochs, tmp_path, hooks, how):
    # Within an epoch Lightning validates after steps 2 and 4.
    saver = SaveAt(tmp_path, *hooks)
    fit(trainer, make(), recorder(), callbacks=[saver], val_check_interval=2, **how)
    assert len(saver.saved) >= 2
    longer = {"max_epochs": 3} if "max_epochs" in how else {"max_steps": 3 * STEPS}
    for path, done in saver.saved:
        with case(path):
            rest = recorder()
            fit(trainer, make(), rest, path, val_check_interval=2, **longer)
            # Lightning itself shortens an epoch that is resumed from its start hook; no sample is lost by that.
            end = done + len(rest.seen) if "on_train_epoch_start" in path else 3 * STEPS
            assert rest.seen == epochs[done:end]
            assert len(rest.seen) > 0 or done == 3 * STEPS


def test_stopping_in_an_epoch_by_max_steps(make, trainer, recorder, epochs, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}")
    fit(trainer, make(), recorder(), max_steps=STEPS + 2, callbacks=[saver])
    rest = recorder()
    fit(trainer, make(), rest, saver.best_model_path, max_steps=3 * STEPS)
    assert rest.seen == epochs[STEPS + 2 : 3 * STEPS]


def test_an_error_in_a_step_does_not_lose_its_samples(make, trainer, recorder, epochs, tmp_path):
    class Failing(recorder):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 3:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    module, run = Failing(), trainer(max_epochs=1)
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(module, datamodule=make())
    run.save_checkpoint(tmp_path / "failed.ckpt")
    rest = recorder()
    fit(trainer, make(), rest, str(tmp_path / "failed.ckpt"), max_epochs=1)
    assert rest.seen == epochs[3:STEPS]


def test_limited_epochs_and_accumulation(make, trainer, recorder, epochs, tmp_path):
    options = {"max_epochs": 3, "limit_train_batches": 4, "accumulate_grad_batches": 2}
    saver, whole = SaveAt(tmp_path, "on_train_batch_end"), recorder()
    fit(trainer, make(), whole, callbacks=[saver], **options)
    assert whole.seen == epochs[0:4] + epochs[STEPS : STEPS + 4] + epochs[2 * STEPS : 2 * STEPS + 4]
    for path, done in saver.saved[1::2]:
        with case(path):
            rest = recorder()
            fit(trainer, make(), rest, path, **options)
            assert rest.seen == whole.seen[done:]


def test_two_fits_of_one_trainer(make, trainer, recorder, epochs):
    data, module = make(), recorder()
    run = fit(trainer, data, module, max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(module, datamodule=data)
    fit(trainer, data, module, max_epochs=1)
    assert module.seen == epochs[: 2 * STEPS] + epochs[:STEPS]


def test_validating_a_checkpoint_leaves_training_alone(make, trainer, recorder, epochs, tmp_path):
    run = fit(trainer, make(), recorder(), max_steps=2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    data, module = make(), recorder()
    trainer().validate(module, datamodule=data, ckpt_path=str(tmp_path / "two.ckpt"))
    assert len(module.validated) == len(data.val_dataloader())
    fit(trainer, data, module, max_steps=2)
    assert module.seen == epochs[:2]


def test_overfitting_repeats_the_same_batches(make, trainer, recorder, epochs):
    module = recorder()
    fit(trainer, make(), module, max_epochs=2, overfit_batches=2)
    assert module.seen == epochs[:2] * 2


def test_predicting_covers_every_held_out_block(make, trainer, recorder):
    data = make()
    predictions = trainer().predict(recorder(), datamodule=data)
    assert flat(predictions)[: len(data.prepared.validation)] == list(range(len(data.prepared.validation)))
    assert set(flat(predictions)[len(data.prepared.validation) :]) <= {-1}


def pretend_trainer(rank, ranks):
    """What the data module asks of a Trainer, on one of several data ranks."""
    progress = types.SimpleNamespace(
        total=types.SimpleNamespace(processed=0),
        current=types.SimpleNamespace(processed=0, ready=0),
        is_last_batch=False,
    )
    loop = types.SimpleNamespace(epoch_loop=types.SimpleNamespace(batch_progress=progress))
    return types.SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank},
        num_training_batches=STEPS,
        state=types.SimpleNamespace(fn="fit"),
        fit_loop=loop,
    )


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_resuming_on_another_data_axis(make, trainer, recorder, epochs, ranks):
    data = make()
    fit(trainer, data, recorder(), max_steps=2)
    state = data.state_dict()
    assert (state["epoch"], state["samples"]) == (0, 16)
    shares = []
    for rank in range(ranks):
        with case(rank=rank):
            mine = make()
            mine.trainer = pretend_trainer(rank, ranks)
            mine.setup("fit")
            mine.load_state_dict(state)
            loader = mine.train_dataloader()
            assert len(loader) == STEPS
            shares.append([batch["sample"].tolist() for batch in itertools.islice(loader, STEPS)])
    assert [flat(step) for step in zip(*shares, strict=True)] == epochs[2 : STEPS + 2]


def test_a_plain_loop_resumes_too(make, epochs):
    data = make()
    iterator = iter(data.train_dataloader())
    read = [next(iterator)["sample"].tolist() for _ in range(3)]
    again = make()
    again.load_state_dict(data.state_dict())
    assert read + [b["sample"].tolist() for b in again.train_dataloader()] == epochs[:STEPS]
    assert (again.state_dict()["epoch"], again.state_dict()["samples"]) == (1, 0)


def test_state_is_plain_and_small(make):
    state = make().state_dict()
    assert set(map(type, state.values())) <= {int, str}
    assert (state["epoch"], state["samples"]) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed=1 but the checkpoint was trained with seed=0"),
        ({"global_batch_size": 4}, "global_batch_size=4 but the checkpoint stands 16 samples into an epoch of .*=8"),
        ({"vocab_size": 290}, "the tokenizer has changed: fingerprint .*, in the checkpoint .*tokenizer="),
        ({"validation_fraction": 0.1}, "changed: fingerprint"),
    ],
)
def test_refuses_to_resume_on_something_else(make, trainer, recorder, tmp_path, change, message):
    saver = SaveAt(tmp_path, "on_train_end")
    fit(trainer, make(), recorder(), max_steps=2, callbacks=[saver])
    with pytest.raises(ValueError, match=message):
        fit(trainer, make(**change), recorder(), saver.saved[0][0], max_steps=4)
