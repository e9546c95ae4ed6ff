"""Every router on the quickstart's corpus, same steps and tokens, beside the dense model of equal active size.

    python benchmarks/routers.py --write docs/routing.md  # runs that docs/routers.json lacks, then the page's table
    python benchmarks/routers.py softmax dense            # of some alone: runs may be made in pieces

One process. Blocks of the dense model have an MLP as wide as what a token uses of the others: ``k`` experts of
``width / k`` hidden units, of as many as make ``--experts`` whole ones. Optimizer, schedule, batches of a seed and
validation are the same for all, and so is the learning rate: of ``RATES`` the one with which the dense model has the
lowest validation loss, on a seed that is not in the table.

Loads are of the last quarter of the steps: the variation of experts' counts over it and the share of experts that
nobody chose, both the mean over layers, and the share of choices that would overflow a capacity factor of 1.25 in their
steps. A run that the file has is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
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

RESULTS = Path(__file__).parents[1] / "docs" / "routers.json"
OVERFLOW_FACTOR = 1.25
RATES = (6e-3, 1.2e-2, 2.4e-2)
RATE_SEED = 0  # of the runs that choose one of them
SEEDS = (1, 2, 3)  # of the table
NO_LOSS = {"load_balance_coefficient": 0.0}
Measures = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """What all runs have alike.

    Args:
        steps: of the optimizer.
        batch: sequences of 128 tokens in a step.
        vocab: tokens that there are.
        dim: model width.
        width: hidden units of the dense MLP.
        experts: of those that use one.
        validation: batches.
    """

    steps: int = 200
    batch: int = 8
    vocab: int = 1024
    dim: int = 64
    width: int = 128
    experts: int = 8
    validation: int = 16


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
    "softmax, weight x 8": Contestant(1, {"router": named("softmax", routed_scaling_factor=8.0)}),
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


def run(contestant: Contestant, rate: float, seed: int, sizes: Sizes) -> Measures:
    """One training and its validation."""
    L.seed_everything(seed, verbose=False)
    k = contestant.top_k
    options = {
        "vocab_size": sizes.vocab, "dim": sizes.dim, "num_layers": 2, "num_heads": 4, "hidden_dim": sizes.width,
        "expert_hidden_dim": sizes.width // k, "num_experts": sizes.experts * k, "top_k": k, "moe_every": 1,
        "max_sequence_length": 128,
    }  # fmt: skip
    model = tex.LanguageModel(DecoderConfig(**{**options, **contestant.options}))
    data = tex.TextDataModule(vocab_size=sizes.vocab, sequence_length=128, global_batch_size=sizes.batch, seed=seed)
    loads = Loads(sizes.steps - sizes.steps // 4)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, strategy="auto", max_steps=sizes.steps, max_epochs=-1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            limit_val_batches=sizes.validation, val_check_interval=sizes.steps, check_val_every_n_epoch=None,
            gradient_clip_val=1.0, callbacks=[loads], default_root_dir=folder,
        )  # fmt: skip
        model.configure_optimizers = lambda: optimizers(model, rate, sizes.steps)  # type: ignore[method-assign]
        trainer.fit(model, data)
    found = {"loss": float(trainer.callback_metrics["val_loss"])}
    return found if contestant.options.get("num_experts") == 1 else {**found, **loads.measures()}


def optimizers(model: nn.Module, rate: float, steps: int) -> dict[str, Any]:
    """AdamW as in the quickstart; the rate rises over a tenth of the steps and falls to 0 over the others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    rising = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / (steps - rising))
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Runs:
    """The runs that there are, in a file if there is one.

    Args:
        sizes: of all of them.
        file: JSON; one of other sizes is refused.

    Raises:
        ValueError: a file of runs of other sizes.
    """

    def __init__(self, sizes: Sizes, file: Path) -> None:
        self.sizes, self.file = sizes, file
        self.found = self._kept()

    def _kept(self) -> dict[str, Measures]:
        kept = json.loads(self.file.read_text()) if self.file.exists() else {"sizes": asdict(self.sizes), "runs": {}}
        if kept["sizes"] != asdict(self.sizes):
            raise ValueError(f"{self.file} has runs of {kept['sizes']}; legal: these sizes, or another --results")
        runs: dict[str, Measures] = kept["runs"]
        return runs

    def lacking(self, name: str) -> Iterator[tuple[str, float, int]]:
        """What a row needs and is not there yet: rows, learning rates and seeds, each made before the next is asked."""
        for rate in RATES:
            if _key("dense", rate, RATE_SEED) not in self.found:
                yield "dense", rate, RATE_SEED
        for seed in SEEDS:
            if _key(name, self.rate, seed) not in self.found:
                yield name, self.rate, seed

    def make(self, name: str, rate: float, seed: int) -> None:
        """A run."""
        measures = run(CONTESTANTS[name], rate, seed, self.sizes)
        self.found = {**self._kept(), _key(name, rate, seed): measures}  # others may run beside
        self.file.write_text(json.dumps({"sizes": asdict(self.sizes), "runs": self.found}, indent=1) + "\n")

    @property
    def rate(self) -> float:
        """The dense model's best, when all were tried."""
        return min(RATES, key=lambda rate: self.found[_key("dense", rate, RATE_SEED)]["loss"])

    def of(self, name: str) -> list[Measures]:
        """A row's runs by seed; none where they are not complete."""
        if not all(_key("dense", rate, RATE_SEED) in self.found for rate in RATES):
            return []
        keys = [_key(name, self.rate, seed) for seed in SEEDS]
        return [self.found[key] for key in keys] if set(keys) <= set(self.found) else []


def _key(name: str, rate: float, seed: int) -> str:
    return f"{name}/{rate:g}/{seed}"


def table(runs: Runs) -> str:
    """Means over seeds and their spread; differences are of the same seeds. Rows whose runs are complete."""
    return "\n".join([
        "| router | experts, k | validation loss | beside dense | load variation | dead | overflow at 1.25 |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in _rows(runs)),
    ])  # fmt: skip


def told(runs: Runs) -> str:
    """What all runs of the table have alike."""
    sizes, rates = runs.sizes, ", ".join(f"{rate:g}" for rate in RATES)
    return (
        f"{sizes.steps} steps of {128 * sizes.batch:,} tokens of a vocabulary of {sizes.vocab:,}, two blocks of width "
        f"{sizes.dim}, {sizes.width} hidden units for a token, seeds {', '.join(map(str, SEEDS))}; a learning rate of "
        f"{runs.rate:g}, the dense model's best of {rates}."
    )


def text_of(runs: Runs) -> str:
    """What is printed, and written into a page."""
    return f"{told(runs)}\n\n{table(runs)}"


def _rows(runs: Runs) -> Iterator[list[str]]:
    dense = [found["loss"] for found in runs.of("dense")]
    for name, contestant in CONTESTANTS.items():
        of_seeds = runs.of(name)
        if not of_seeds:
            continue
        losses = [found["loss"] for found in of_seeds]
        title = f"{name} ({contestant.remark})" if contestant.remark else name
        size, beside, loads = "-", "-", ["-"] * 3
        if name != "dense":
            size = f"{runs.sizes.experts * contestant.top_k}, {contestant.top_k}"
            beside = _spread([loss - other for loss, other in zip(losses, dense, strict=True)], "+") if dense else "-"
            mean = {what: statistics.mean(f[what] for f in of_seeds) for what in ("variation", "dead", "overflow")}
            loads = [f"{mean['variation']:.2f}", f"{mean['dead']:.1%}", f"{mean['overflow']:.1%}"]
        yield [title, size, _spread(losses), beside, *loads]


def _spread(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.3f} +- {statistics.stdev(values):.3f}"


def written(page: str, text: str) -> str:
    """A page with the table in the place of the one that it has."""
    begin, end = "<!-- routers -->", "<!-- /routers -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{text}\n\n{end}", page, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(CONTESTANTS)}; none: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a JSON file that runs are kept in")
    parser.add_argument("--most", type=int, help="so many runs at most, of those that lack; none: all")
    parser.add_argument("--write", type=Path, help="a page whose table becomes this one")
    for name, size in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.names) - set(CONTESTANTS)):
        parser.error(f"{', '.join(unknown)}; legal: {', '.join(CONTESTANTS)}")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    runs = Runs(Sizes(**{name: getattr(options, name) for name in asdict(Sizes())}), options.results)
    lacking = (one for name in options.names or CONTESTANTS for one in runs.lacking(name))
    for name, rate, seed in islice(lacking, options.most):
        runs.make(name, rate, seed)
    if not runs.of("dense"):
        return ""
    text = text_of(runs)
    print(text)
    if options.write is not None:
        options.write.write_text(written(options.write.read_text(), text))
    return text


if __name__ == "__main__":
    main()
