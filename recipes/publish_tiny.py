"""A small OLMoE with random weights and a tokenizer of its own, in place of a published model to download.

    python recipes/publish_tiny.py [FOLDER]

writes FOLDER (runs/published) as transformers does. Needs `pip install -c constraints.txt -e '.[transformers]'`.
"""

import sys
from pathlib import Path

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from lightning_tex.data.corpus import Source
from lightning_tex.data.prepared import default_cache_dir
from lightning_tex.data.tokenizer import END_OF_DOCUMENT, texts_of, train_bpe

VOCABULARY = 2048


def main(folder: str = "runs/published", **sizes: int) -> None:
    """Write the folder: a model of 1.4 million parameters and a byte-level BPE of this Python's own sources."""
    documents = Source(None).load(default_cache_dir() / "sources", None).train
    bpe = train_bpe(texts_of(documents), VOCABULARY)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_DOCUMENT)
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_experts=8, num_experts_per_tok=2, max_position_embeddings=256, pad_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).to(torch.bfloat16)
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="1MB")
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
