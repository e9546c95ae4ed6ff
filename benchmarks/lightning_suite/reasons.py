"""Why tests of Lightning's fail under this project's strategy that pass under DDP, one by one."""

from __future__ import annotations

# What a test's name begins with, without its parameters -> why it fails. The first that fits counts.
REASONS = {
    "core/test_lightning_optimizer.py::test_lightning_optimizer_automatic_optimization_lbfgs_zero_grad": (
        "LBFGS computes the loss several times in a step; refused by name"
    ),
    "trainer/optimization/test_backward_calls.py::test_backward_count_with_closure": "LBFGS, as above",
    "core/test_lightning_optimizer.py::test_lightning_optimizer_automatic_optimization_optimizer_step": (
        "a mock in the place of `SGD.step` steps nothing, so a trial finds that it is not elementwise; refused by name"
    ),
    "core/test_lightning_optimizer.py::test_lightning_optimizer_manual_optimization_and_accumulated_gradients": (
        "a mock in the place of `SGD.step`, as above"
    ),
    "trainer/optimization/test_manual_optimization.py::test_step_with_optimizer_closure_with_different_frequencies": (
        "a mock in the place of `SGD.step`, as above"
    ),
    "trainer/test_trainer.py::test_train_loop_system": (
        "the class's own `step` is called for every tile, after the closure, not once around it"
    ),
    "callbacks/test_pruning.py": "`ModelPruning` is refused by name",
    "callbacks/test_lr_monitor.py::test_multiple_optimizers_basefinetuning": (
        "asks for `type(optimizer) is Adam`; the Trainer's optimizers are instances of a subclass"
    ),
    "checkpointing/test_trainer_checkpoint.py::test_trainer_save_checkpoint_storage_options": (
        "`save_checkpoint(storage_options=)` is refused by name, with a remedy"
    ),
    "trainer/connectors/test_checkpoint_connector.py::test_preloaded_checkpoint_lifecycle": (
        "loads before there is a model"
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
}
# Of tests that look at checkpoint directories.
WANTS_A_FILE = "reads the checkpoint as one file; `save_distributed_checkpoint=False` writes such"
_FILE_ERRORS = ("IsADirectoryError", "[Errno 21]", "UnpicklingError: invalid load key", "is a directory")


def reason(test: str, error: str) -> tuple[str, str]:
    """What a test's row of the table is called, and why it fails; the error where that is not known.

    Args:
        test: its name below ``tests_pytorch``.
        error: the first line.
    """
    for name, why in REASONS.items():
        if test.startswith(name):
            return name, why
    wants_a_file = any(word in error for word in _FILE_ERRORS)
    return ("several", WANTS_A_FILE) if wants_a_file else (test.split("[")[0], error)
