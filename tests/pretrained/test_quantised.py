"""Quantised weights are read as their formats define them, by every rank what its shard needs, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published_folders import changed_config, loaded, tensors, token_ids
from helpers.quantised_folders import FORMATS, plain_fp8, plain_mxfp4, quantised
from helpers.ranks import together
from helpers.trainers import quiet
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models.exporting import export
from lightning_tex.parallel.errors import UserError
from lightning_tex.parallel.extent import Extent
from lightning_tex.pretrained.folder import INDEX
from lightning_tex.pretrained.quantised import multiplied_out
from lightning_tex.pretrained.tensor_file import TensorFiles, read_table

formats = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    return {kind: quantised(kind, folder / kind) for kind in FORMATS}


def plain(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}, plain")


def of_a_file(path: Path, content: dict[str, Tensor], given: dict[str, Any]) -> Any:
    save_file(content, path)
    found, problems = multiplied_out(
        {stored.name: stored for stored in read_table(path)}, {"quantization_config": given}
    )
    assert not problems and list(found) == ["w"]
    return found["w"]


def test_any_rectangle_of_fp8_in_blocks_of_128_is_read_with_its_own_factors_alone(tmp_path):
    values = (torch.randn(300, 200) * 50).to(torch.float8_e4m3fn)
    values.view(torch.uint8)[:2, :128] = torch.arange(256, dtype=torch.uint8).view(2, 128)  # every number that there is
    scales = torch.rand(3, 2) * 3
    content = {"w": values, "w_scale_inv": scales}
    tensor = of_a_file(tmp_path / "x.safetensors", content, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    whole = plain_fp8(values, scales, (128, 128))
    for offsets, sizes, blocks in (
        ((0, 0), (300, 200), 6), ((127, 127), (2, 2), 4), ((128, 0), (128, 128), 1), ((299, 199), (1, 1), 1),
        ((5, 130), (280, 7), 3),
    ):  # fmt: skip
        extent = Extent(offsets, sizes)
        with TensorFiles() as files:
            read = tensor.read(files, extent)
            assert files.moved_bytes == extent.numel + 4 * blocks
        assert torch.equal(read.nan_to_num(7.5), whole[extent.slices].nan_to_num(7.5)), (offsets, sizes)


def test_any_rectangle_of_mxfp4_is_read_with_its_own_blocks_alone(tmp_path):
    blocks = torch.randint(0, 256, (2, 86, 3, 16), dtype=torch.uint8)
    scales = torch.arange(2 * 86 * 3).remainder(253).to(torch.uint8)  # every power of which six times fits fp32
    scales[-1] = 255  # NaN
    scales = scales.view(2, 86, 3)
    content = {"w_blocks": blocks, "w_scales": scales}
    tensor = of_a_file(tmp_path / "x.safetensors", content, {"quant_method": "mxfp4"})
    whole = plain_mxfp4(blocks, scales)
    assert tensor.shape == (2, 96, 86)
    for offsets, sizes, groups in (
        ((0, 0, 0), (2, 96, 86), 3), ((1, 31, 5), (1, 2, 7), 2), ((0, 32, 0), (2, 32, 1), 1),
        ((1, 95, 85), (1, 1, 1), 1),
    ):  # fmt: skip
        extent = Extent(offsets, sizes)
        with TensorFiles() as files:
            read = tensor.read(files, extent)
            assert files.moved_bytes == 17 * groups * sizes[0] * sizes[2]
        assert torch.equal(read.nan_to_num(7.5), whole[extent.slices].nan_to_num(7.5)), (offsets, sizes)


@formats
def test_transformers_multiplies_out_to_the_same_numbers(kind, published):
    pytest.importorskip("transformers")
    ours = LanguageModel.from_pretrained(published[kind]).pretrained.folder
    count = 0
    for name, tensor in ours.tensors.items():
        if name in ours.stored and ours.stored[name] == tensor:
            continue
        with TensorFiles() as files:
            read = tensor.read(files, Extent.whole(tensor.shape))
        if (theirs := _by_transformers(kind, name, tensors(published[kind]))) is not None:
            assert torch.equal(read, theirs), name
            count += 1
    assert count >= 3


def _by_transformers(kind: str, name: str, stored: dict[str, Tensor]) -> Tensor | None:
    from transformers.integrations import finegrained_fp8, mxfp4

    if kind == "mxfp4":
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        return mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    values, scales = stored[name], stored[f"{name}_scale_inv"]
    if any(size % of for size, of in zip(values.shape, scales.shape, strict=True)):
        return None  # it takes whole blocks alone
    if (values.shape[0] // scales.shape[0], values.shape[1] // scales.shape[1]) != (16, 24):
        return None
    return finegrained_fp8.Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)


@formats
@torch.no_grad()
def test_logits_are_those_of_transformers_that_multiplies_out_what_it_reads(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    # It takes whole blocks alone.
    sizes = {"block": (2, 2), "q_lora_rank": 8} if kind == "fp8" else {}
    folder = quantised(kind, tmp_path / kind, **sizes)
    made = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}[kind](dequantize=True)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=made, **options)
    ours = LanguageModel.from_pretrained(folder)
    ours.configure_model()
    ids = token_ids(2)[:, :-1]
    expected = theirs(ids).logits
    assert (ours(ids) - expected).norm() < 1e-5 * expected.norm()


# --- in a model

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2 x expert 2": {"tensor_parallel_size": 2},
    "folding": {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1},
}


def test_every_rank_reads_what_its_shard_needs_of_the_same_numbers(published, tmp_path):
    runs = {(kind, layout): (_read, published[kind], LAYOUTS[layout], tmp_path / f"{kind}, {layout}")
            for kind in FORMATS for layout in LAYOUTS}  # fmt: skip
    for (kind, layout), ranks in together(4, runs).items():
        read, expected = tensors(tmp_path / f"{kind}, {layout}"), tensors(plain(published[kind]))
        assert read.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(read[name], value.float()), (layout, name)
        size = sum(file.stat().st_size for file in published[kind].glob("*.safetensors"))
        # What is whole on all ranks, and what lies between rows of a gate and of its way up, included.
        assert max(ranks) < 0.5 * size, (kind, layout, ranks, size)


def _read(folder: Path, layout: dict[str, Any], out: Path) -> int:
    model = LanguageModel.from_pretrained(folder)
    trainer = quiet(devices=4, strategy=TexMoEStrategy(**layout), limit_val_batches=0)
    trainer.validate(model, [token_ids(4)], verbose=False)
    model.save_pretrained(out, dtype="float32")
    return model.pretrained.read_bytes


@formats
def test_an_export_is_in_16_bits_and_says_nothing_of_a_quantisation(kind, published, tmp_path):
    if kind == "mxfp4":  # as it was published, without a word of its other weights' dtype
        changed_config(published[kind], lambda config: config.pop("dtype", None))
    model = LanguageModel.from_pretrained(published[kind])
    trainer = quiet(devices=1, limit_val_batches=0)
    trainer.validate(model, [token_ids(4)], verbose=False)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.warns(UserWarning, match="no tokenizer goes to"):
        export(tmp_path / "run.ckpt", tmp_path / "out")
    assert "quantization_config" not in (config := json.loads((tmp_path / "out/config.json").read_text()))
    assert config["dtype"] == "bfloat16"
    expected, written = tensors(plain(published[kind])), tensors(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        kept = value.dtype if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert written[name].dtype == kept and torch.equal(written[name], value.to(kept)), name
    ids = token_ids(2)[:, :-1]
    with torch.no_grad():
        again = LanguageModel.from_pretrained(tmp_path / "out")
        again.configure_model()
        ours, theirs = again(ids), loaded(tmp_path / "out")(ids).logits
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


# --- refusals


def rewritten(folder: Path, change: Any) -> None:
    """All files in one, changed."""
    content = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink(missing_ok=True)
    change(content)
    save_file(content, folder / "model.safetensors")


FP8 = "model.layers.0.self_attn.o_proj.weight"
MX = "model.layers.0.mlp.experts.down_proj"
WRONG: dict[str, tuple[str, Any, str]] = {
    "no scales of fp8": ("fp8", lambda c: c.pop(f"{FP8}_scale_inv"), rf"{FP8}_scale_inv is missing, the scales of"),
    "other scales of fp8": (
        "fp8",
        lambda c: c.update({f"{FP8}_scale_inv": torch.ones(1, 1)}),
        rf"{FP8}_scale_inv is of float32 of shape \[1, 1\]; legal, as the scales of {FP8}: "
        r"float32, bfloat16, float16 of shape \[3, 2\]",
    ),
    "scales of fp8 in integers": (
        "fp8",
        lambda c: c.update({f"{FP8}_scale_inv": torch.ones(3, 2, dtype=torch.int32)}),
        rf"{FP8}_scale_inv is of int32",
    ),
    "scales of nothing": (
        "fp8",
        lambda c: c.update({FP8: c[FP8].to(torch.bfloat16)}),
        rf"{FP8}_scale_inv of shape \[3, 2\] is no part of the model",
    ),
    "fp8 of one dim": (
        "fp8",
        lambda c: c.update({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}),
        r"model.norm.weight of shape \[48\] is in float8_e4m3fn; legal: at least two dims",
    ),
    "fp8 of another kind": (
        "fp8",
        lambda c: c.update({FP8: c[FP8].to(torch.float8_e5m2)}),
        rf"1 tensors are quantised, such as {FP8} \(float8_e5m2\)",
    ),
    "no scales of mxfp4": ("mxfp4", lambda c: c.pop(f"{MX}_scales"), rf"{MX}_scales is missing, the scales of"),
    "no blocks of mxfp4": ("mxfp4", lambda c: c.pop(f"{MX}_blocks"), rf"1 tensors are quantised, such as {MX}_scales"),
    "other scales of mxfp4": (
        "mxfp4",
        lambda c: c.update({f"{MX}_scales": c[f"{MX}_scales"][:, :-1].contiguous()}),
        rf"{MX}_scales is of uint8 of shape \[4, 63, 3\]; legal, as the scales of {MX}_blocks: uint8 of shape "
        r"\[4, 64, 3\]",
    ),
    "blocks of 32 bytes": (
        "mxfp4",
        lambda c: c.update({f"{MX}_blocks": torch.zeros(4, 64, 3, 32, dtype=torch.uint8)}),
        rf"{MX}_blocks is of uint8 of shape \[4, 64, 3, 32\]; legal: uint8 of shape .experts, rows, columns / 32, 16.",
    ),
    "another size": (
        "mxfp4",
        lambda c: c.update({f"{MX}_blocks": torch.zeros(4, 64, 2, 16, dtype=torch.uint8),
                            f"{MX}_scales": torch.zeros(4, 64, 2, dtype=torch.uint8)}),
        rf"{MX} has shape \[4, 64, 64\], by \S+/config.json and the options it is \[4, 96, 64\]",
    ),
    "both forms": (
        "mxfp4",
        lambda c: c.update({MX: torch.zeros(4, 96, 64)}),
        rf"{MX} is there besides {MX}_blocks",
    ),
}  # fmt: skip


def wrong(name: str, published: dict[str, Path], here: Path) -> tuple[Path, str]:
    """A folder that does not fit, and what is told of it."""
    kind, change, told = WRONG[name]
    folder = Path(shutil.copytree(published[kind], here / kind))
    rewritten(folder, change)
    return folder, told


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_name(name, published, tmp_path):
    folder, told = wrong(name, published, tmp_path)
    with pytest.raises(UserError, match=told):
        LanguageModel.from_pretrained(folder)


@pytest.mark.full
@pytest.mark.parametrize("name", WRONG)
def test_nothing_is_written_where_something_does_not_fit(name, published, tmp_path, fit_in):
    folder, told = wrong(name, published, tmp_path)
    words = "--model.init_args.pretrained", str(folder), "--data.tokenizer", "null"
    assert re.search(told, fit_in(tmp_path, *words))


def test_a_quantisation_that_is_not_known_is_refused_by_name(published, tmp_path):
    for number, (given, told) in enumerate((
        ({"quant_method": "awq"}, r"quantization_config has quant_method='awq'; legal: 'fp8', 'mxfp4'"),
        ({"quant_method": "fp8"}, r"quantization_config of 'fp8' has weight_block_size=None; legal: two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [16, 0]}, r"has weight_block_size=\[16, 0\]; legal: two sizes"),
    )):  # fmt: skip
        folder = Path(shutil.copytree(published["fp8"], tmp_path / str(number)))
        changed_config(folder, lambda config, given=given: config.update(quantization_config=given))
        with pytest.raises(UserError, match=told):
            LanguageModel.from_pretrained(folder)
