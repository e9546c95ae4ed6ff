"""A dense model made into experts: the same logits at the start, in transformers too; noise and routers by the seed."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.published_folders import loaded, publish, tensors, token_ids

from lightning_tex import LanguageModel
from lightning_tex.cli import main
from lightning_tex.models.upcycling import upcycle
from lightning_tex.parallel.errors import UserValueError

# By the case of a dense model, the family that has it with a shared expert: GLM-4-MoE has no windows.
FAMILY_WITH_SHARED = {"llama, tied head": "glm4_moe", "mistral, windows": "qwen2_moe", "qwen3": "glm4_moe"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return {case: publish(case, folder / case) for case in ("llama, tied head", "mistral, windows", "qwen3")}


@pytest.mark.parametrize("granularity", [1, 3])
@pytest.mark.parametrize("case", ["llama, tied head", "mistral, windows", "qwen3"])
@torch.no_grad()
def test_logits_at_the_start_are_those_of_the_dense_model(case, granularity, dense, tmp_path):
    made = upcycle(dense[case], tmp_path / "out", num_experts=4, top_k=2, granularity=granularity)
    assert (made["num_experts"], made["top_k"]) == (4 * granularity, 2 * granularity)
    ids = token_ids(3)
    expected = loaded(dense[case])(ids).logits
    model = LanguageModel.from_pretrained(tmp_path / "out")
    model.configure_model()
    for logits in (model(ids), loaded(tmp_path / "out")(ids).logits):
        assert (logits - expected).norm() / expected.norm() < 1e-5
    routed = [layer for layer, _ in model.decoder.moe_layers()]
    assert routed == [0, 1, 2] and model.config.expert_hidden == 36 // granularity


@pytest.mark.parametrize(
    ("shared", "granularity"),
    [(1, 3), pytest.param(1, 1, marks=pytest.mark.full), pytest.param(2, 1, marks=pytest.mark.full)],
)
@pytest.mark.parametrize("case", FAMILY_WITH_SHARED)
@torch.no_grad()
def test_logits_with_a_shared_part_are_those_of_the_dense_model(case, shared, granularity, dense, tmp_path):
    words = ["--num_experts", "4", "--granularity", str(granularity), "--shared_experts", str(shared)]
    main(["upcycle", str(dense[case]), str(tmp_path / "out"), *words])
    ids = token_ids(3)
    expected = loaded(dense[case])(ids).logits
    model = LanguageModel.from_pretrained(tmp_path / "out")
    model.configure_model()
    for logits in (model(ids), loaded(tmp_path / "out")(ids).logits):
        assert (logits - expected).norm() / expected.norm() < 1e-5
    width, config = 36 // (shared + granularity), model.config
    assert (config.expert_hidden, config.shared_expert_hidden_dim) == (width, shared * width)
    assert (config.num_experts, config.top_k) == (4 * granularity, 2 * granularity)
    assert model.origin.config["model_type"] == FAMILY_WITH_SHARED[case]


def test_noise_is_of_routed_experts_alone(dense, tmp_path):
    for name, noise in (("plain", 0.0), ("noisy", 0.1)):
        upcycle(dense["qwen3"], tmp_path / name, num_experts=2, top_k=1, shared_experts=1, noise=noise)
    plain, noisy = tensors(tmp_path / "plain"), tensors(tmp_path / "noisy")
    differing = {name.split(".")[4] for name in plain if not torch.equal(plain[name], noisy[name])}
    assert differing == {"experts"}


def test_noise_is_of_each_expert_and_repeats_with_the_seed(dense, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        words = [str(dense["qwen3"]), str(tmp_path / name), "--num_experts", "3", "--noise", "0.1", "--seed", str(seed)]
        main(["upcycle", *words])
    one, again, other = (tensors(tmp_path / name) for name in ("one", "again", "other"))
    plain = tensors(dense["qwen3"])["model.layers.1.mlp.up_proj.weight"]
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(3)]
    for name in names:
        assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])
        assert ((one[name] - plain).std() / plain.std()).item() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(one[names[0]], one[names[1]])
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"] and config["num_experts_per_tok"] == 2


def test_what_cannot_be_made_into_experts_is_refused_by_name(dense, tmp_path):
    routed = publish("mixtral", tmp_path / "mixtral")
    biased = publish("llama, biases", tmp_path / "llama")
    for folder, options, told in (
        (routed, {}, "is a mixtral, which is not made into experts; legal: llama, mistral, qwen3"),
        (biased, {}, "mixtral has no decoder with attention_bias=True"),
        (biased, {"shared_experts": 1}, "glm4_moe has no decoder with attention_out_bias=True .*; qwen2_moe has no"),
        (dense["qwen3"], {"granularity": 5}, "granularity=5 does not divide the MLPs' hidden_dim=36"),
        (dense["qwen3"], {"granularity": 4, "shared_experts": 1}, "shared_experts=1, 5 parts, does not divide"),
        (dense["qwen3"], {"top_k": 9}, "num_experts=4, top_k=9"),
    ):
        with pytest.raises(UserValueError, match=told):
            upcycle(folder, tmp_path / "out", **{"num_experts": 4, "top_k": 2, **options})
    assert not (tmp_path / "out").exists()
