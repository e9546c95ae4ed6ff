"""Every router on the quickstart's corpus, same steps and tokens, beside the dense model of equal active size.

    python benchmarks/routers.py --results routers.json                # all of them, then the table
    python benchmarks/routers.py softmax dense --results routers.json  # some; others come from the file

One process. Blocks of the dense model have an MLP as wide as what a token uses of the others: ``k`` experts of
``width / k`` hidden units, of as many as make ``--experts`` whole ones. Loads are of the last quarter of the steps: the
variation of experts' counts over it and the share of experts that nobody chose, both the mean over layers, and the
share of choices that would overflow a capacity factor of 1.25 in their steps. Runs that the file has are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_tex as tex
from lightning_tex.models import DecoderConfig
from lightning_tex.moe import MoE, Route
from lightning_tex.moe.capacity import capacity
from lightning_tex.parallel.replay import recomputing

OVERFLOW_FACTOR = 1.25
NO_LOSS = {"load_balance_coefficient": 0.0}


@dataclass(frozen=True)
class Contestant:
    """A way to route.

    Args:
        top_k: experts of a token.
        options: fields of the decoder's configuration.
        remark: of its losses.
    """

    top_k: int
    options: dict[str, Any]
    remark: str = ""


def named(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "init_args": arguments}


CONTESTANTS: dict[str, Contestant] = {
    "dense": Contestant(1, {"num_experts": 1}),
    "softmax": Contestant(1, {"router": "softmax"}),
    "softmax, no loss": Contestant(1, {"router": "softmax", **NO_LOSS}),
    "switch": Contestant(1, {"router": named("switch", jitter_eps=0.01)}),
    "sigmoid, bias": Contestant(1, {"router": named("sigmoid", bias_update_rate=0.01), **NO_LOSS}),
    "sinkhorn": Contestant(1, {"router": "sinkhorn", **NO_LOSS}),
    "hash": Contestant(1, {"router": "hash", **NO_LOSS}),
    "softmax, k=2": Contestant(2, {"router": "softmax", "norm_topk_prob": True}),
    "gshard": Contestant(2, {"router": "gshard"}),
    "sparsemixer": Contestant(2, {"router": "sparsemixer"}),
    "expert_choice": Contestant(1, {"router": "expert_choice", **NO_LOSS}, "sees later tokens"),
}


class Loads(L.Callback):
    """Counts choices of each step of the last part of a training.

    Args:
        first: step from which it counts.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.steps: list[list[Tensor]] = []

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for layer in (each for each in module.modules() if isinstance(each, MoE)):
            layer.router.register_forward_hook(self._see)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.first:
            self.steps.append([])

    def _see(self, router: nn.Module, _: Any, route: Route) -> None:
        if router.training and self.steps and not recomputing():
            experts = route.scores.shape[1]
            self.steps[-1].append(torch.bincount(route.indices.flatten(), minlength=experts + 1)[:experts].double())

    def measures(self) -> dict[str, float]:
        counts = torch.stack([torch.stack(of_layers) for of_layers in self.steps])  # [steps, layers, E]
        total, experts = counts.sum(0), counts.shape[-1]
        allowed = torch.tensor([[capacity(OVERFLOW_FACTOR, 1, int(n), experts) for n in row] for row in counts.sum(-1)])
        return {
            "variation": float((total.std(-1, correction=0) / total.mean(-1)).mean()),
            "dead": float((total == 0).double().mean()),
            "overflow": float((counts - allowed[..., None]).clamp(min=0).sum() / counts.sum()),
        }


def run(contestant: Contestant, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One training and its validation."""
    L.seed_everything(seed, verbose=False)
    k = contestant.top_k
    sizes = {
        "vocab_size": 2048, "dim": options.dim, "num_layers": 2, "num_heads": 4, "hidden_dim": options.width,
        "expert_hidden_dim": options.width // k, "num_experts": options.experts * k, "top_k": k, "moe_every": 1,
        "max_sequence_length": 128,
    }  # fmt: skip
    model = tex.LanguageModel(DecoderConfig(**{**sizes, **contestant.options}))
    data = tex.TextDataModule(vocab_size=2048, sequence_length=128, global_batch_size=options.batch, seed=seed)
    loads = Loads(options.steps - options.steps // 4)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, strategy="auto", max_steps=options.steps, max_epochs=-1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            limit_val_batches=options.validation, val_check_interval=options.steps, gradient_clip_val=1.0,
            callbacks=[loads], default_root_dir=folder,
        )  # fmt: skip
        model.configure_optimizers = lambda: optimizers(model)  # type: ignore[method-assign]
        trainer.fit(model, data)
    found = {"loss": float(trainer.callback_metrics["val_loss"])}
    return found if contestant.options.get("num_experts") == 1 else {**found, **loads.measures()}


def optimizers(model: nn.Module) -> dict[str, Any]:
    """AdamW as in the quickstart, with a shorter warm-up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=30)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def table(results: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """Means over seeds, and of losses the spread."""
    lines = [
        "| router | experts, k | validation loss | load variation | dead | overflow at 1.25 |",
        "|---|---|---|---|---|---|",
    ]
    for name, contestant in CONTESTANTS.items():
        runs = [found for key, found in results.items() if key == f"{name}/{key.rpartition('/')[2]}"]
        if not runs:
            continue
        losses = [found["loss"] for found in runs]
        spread = f" +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        fewer = f"{len(runs)} of {options.seeds} seeds" if len(runs) < options.seeds else ""
        remarks = ", ".join(filter(None, (contestant.remark, fewer)))
        remark = f" ({remarks})" if remarks else ""
        if name == "dense":
            rest = ["-"] * 4
        else:
            mean = {what: statistics.mean(found[what] for found in runs) for what in ("variation", "dead", "overflow")}
            sizes = f"{options.experts * contestant.top_k}, {contestant.top_k}"
            rest = [sizes, f"{mean['variation']:.2f}", f"{100 * mean['dead']:.0f} %", f"{100 * mean['overflow']:.1f} %"]
        lines.append(f"| {name} | {rest[0]} | {statistics.mean(losses):.3f}{spread}{remark} | {' | '.join(rest[1:])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(CONTESTANTS)}; none: all")
    parser.add_argument("--results", type=Path, help="a JSON file that runs are kept in")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--width", type=int, default=128, help="hidden units of the dense MLP")
    parser.add_argument("--experts", type=int, default=8, help="of k=1")
    parser.add_argument("--validation", type=int, default=16, help="batches")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.names) - set(CONTESTANTS)):
        parser.error(f"{', '.join(unknown)}; legal: {', '.join(CONTESTANTS)}")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kept = options.results is not None and options.results.exists()
    results: dict[str, dict[str, float]] = json.loads(options.results.read_text()) if kept else {}
    for name in options.names or CONTESTANTS:
        for seed in range(options.seeds):
            if (key := f"{name}/{seed}") not in results:
                results[key] = run(CONTESTANTS[name], seed, options)
                if options.results is not None:
                    options.results.write_text(json.dumps(results, indent=1))
    text = table(results, options)
    print(text)
    return text


if __name__ == "__main__":
    main()
