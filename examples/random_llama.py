"""Write a LLaMA with random weights, and a tokenizer for it, into a folder: a model to try the examples on.

    python examples/random_llama.py tiny-llama              (two layers, which a CPU trains)
    python examples/random_llama.py llama-1b --size 1b      (the shape of Llama 3.2 1B, to measure without a download)

The tokenizer is trained on Python's language reference, in a second; of a large vocabulary most ids never occur.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from python_help import pages

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "tie_word_embeddings": True, "dtype": torch.bfloat16,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "dtype": torch.bfloat16,
    },
}  # fmt: skip


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most so many ids; any text can be encoded."""
    bytes_and_pairs = Tokenizer(models.BPE())
    bytes_and_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_and_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytes_and_pairs.train_from_iterator((text for _, text in pages()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_and_pairs, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description="Write a LLaMA with random weights and a tokenizer for it.")
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    options = parser.parse_args()
    shape = dict(SIZES[options.size])
    dtype = shape.pop("dtype", torch.float32)
    torch.manual_seed(0)
    tokens = tokenizer(shape["vocab_size"])
    config = LlamaConfig(
        **shape,
        pad_token_id=tokens.pad_token_id,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(options.folder)
    tokens.save_pretrained(options.folder)
    print(f"written: {options.folder}")


if __name__ == "__main__":
    main()
