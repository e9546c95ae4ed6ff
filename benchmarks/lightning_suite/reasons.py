"""Why tests of Lightning's fail under this project's strategy that pass under DDP, one by one."""

from __future__ import annotations

LBFGS = "LBFGS computes the loss several times in a step; refused by name"
MOCK = "a mock in the place of `SGD.step` steps nothing, which a trial of the class finds; refused by name"
HIDDEN = (
    "lists the folder: `last.ckpt`, and a name that is written again, are links to hidden folders beside them, and a "
    "directory that is being written has a hidden name"
)
HOOKS = (
    "compares the checkpoint that hooks are given: a directory's has no `optimizer_states`, and where a fit resumes no "
    "`state_dict`, of which every rank reads its own part"
)
# What a test's name begins with, without its parameters -> why it fails. The first that fits counts.
REASONS = {
    "core/test_lightning_optimizer.py::test_lightning_optimizer_automatic_optimization_lbfgs_zero_grad": LBFGS,
    "trainer/optimization/test_backward_calls.py::test_backward_count_with_closure": LBFGS,
    "core/test_lightning_optimizer.py::test_lightning_optimizer_automatic_optimization_optimizer_step": MOCK,
    "core/test_lightning_optimizer.py::test_lightning_optimizer_manual_optimization_and_accumulated_gradients": MOCK,
    "trainer/optimization/test_manual_optimization.py::test_step_with_optimizer_closure_with_different": MOCK,
    "trainer/test_trainer.py::test_train_loop_system": (
        "the class's own `step` is called for every tile, after the closure, not once around it"
    ),
    "callbacks/test_lr_monitor.py::test_multiple_optimizers_basefinetuning": (
        "asks for `type(optimizer) is Adam`; the Trainer's optimizers are instances of a subclass"
    ),
    "checkpointing/test_trainer_checkpoint.py::test_trainer_save_checkpoint_storage_options": (
        "`save_checkpoint(storage_options=)` is refused by name, with a remedy"
    ),
    "models/test_amp.py::test_precision_16_clip_gradients": (
        "a mock in the place of `torch.nn.utils.clip_grad_norm_`, which knows a rank's own gradients alone"
    ),
    "trainer/connectors/test_checkpoint_connector.py::test_stateful_trainer_ckpt_path_support": (
        "resumes from a file without optimizer states; refused by name"
    ),
    "trainer/test_trainer.py::test_keyboard_interrupt": (
        "puts a launcher in the place of the strategy's, which opens the frame of a run"
    ),
    "loops/optimization/test_closure.py::test_optimizer_step_no_closure_raises": (
        "wants an error where a class's `step` forgets its closure; here the backward is done, whatever that does"
    ),
    "trainer/test_trainer.py::test_checkpoint_path_input_last": (
        "`ckpt_path='last'` where there is no checkpoint is an error by name, not a warning and a new run"
    ),
    "checkpointing/test_checkpoint_callback_frequency.py": (
        "a mock in the place of `torch.save`, so that the checkpoint cannot be read back"
    ),
    "core/test_saving.py::test_load_from_checkpoint_warn_on_empty_state_dict": "writes a file to the directory's name",
    "models/test_hparams.py::test_load_past_checkpoint": "writes a file to the directory's name",
    "models/test_hooks.py::test_load_from_checkpoint_hook_calls": HOOKS,
    "models/test_hooks.py::test_trainer_model_hook_system_fit_no_val_and_resume": HOOKS,
    "trainer/connectors/test_checkpoint_connector.py::test_local_cross_device_checkpoint": (
        "a mock in the place of `os.rename`, by which a directory gets its name"
    ),
    "checkpointing/test_model_checkpoint.py::test_ckpt_version_counter_disabled_after_rerun_new_trainer": HIDDEN,
    "checkpointing/test_model_checkpoint.py::test_model_checkpoint_file_extension": HIDDEN,
    "checkpointing/test_model_checkpoint.py::test_model_checkpoint_save_last_none_monitor": HIDDEN,
    "checkpointing/test_model_checkpoint.py::test_model_checkpoint_topk_zero": HIDDEN,
    "checkpointing/test_model_checkpoint.py::test_none_monitor_not_alternating": HIDDEN,
    "checkpointing/test_model_checkpoint.py::test_resume_training_preserves_old_ckpt_last": HIDDEN,
    "checkpointing/test_model_checkpoint.py::test_save_last_versioning": HIDDEN,
}
# Of tests that look at checkpoint directories.
SEVERAL = "others"
WANTS_A_FILE = "takes the checkpoint for a file; passes where loads and `os.path.isfile` know directories"


def reason(test: str, error: str, wants_a_file: bool) -> tuple[str, str]:
    """What a test's row of the table is called, and why it fails; the error where that is not known.

    Args:
        test: its name below ``tests_pytorch``.
        error: the first line.
        wants_a_file: it fails with directories, and passes where its loads know these.
    """
    if wants_a_file:
        return SEVERAL, WANTS_A_FILE
    for name, why in REASONS.items():
        if test.startswith(name):
            return name, why
    return test.split("[")[0], error
