"""A random mixture-of-experts student, and a dense discriminator of another architecture with the same vocabulary.

python examples/gad/moe_gspo/tiny.py TOKENIZER STUDENT DISCRIMINATOR    the tokenizer's folder, two folders to write
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3MoeConfig

from recipe.gad.quickstart.problem import tiny_llama

TINY = (
    {"hidden_size": 64, "intermediate_size": 192},
    {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
)
SLICE = (
    {
        "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "dtype": "bfloat16",
    },
    {
        "hidden_size": 2048, "intermediate_size": 6144, "num_key_value_heads": 4, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
)  # fmt: skip
SHAPES = {"tiny": TINY, "slice": SLICE}
"""Name -> sizes of the discriminator; sizes of the student that differ. slice: Qwen3-8B's and Qwen3-30B-A3B's."""


def configs(tokenizer, shape: str, layers: int) -> tuple[Qwen3MoeConfig, LlamaConfig]:
    """Student and discriminator: Qwen3-MoE and a Llama."""
    dense_sizes, sparse_sizes = SHAPES[shape]
    dense = tiny_llama(tokenizer, num_hidden_layers=layers, **dense_sizes)
    sizes = {name: value for name, value in dense.to_diff_dict().items() if name != "model_type"}
    return Qwen3MoeConfig(**{**sizes, **sparse_sizes}), dense


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for folder in ("tokenizer", "student", "discriminator"):
        parser.add_argument(folder)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, default=2, help="of each model")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokenizer.add_tokens("\n")  # verl asks the tokenizer of a qwen3_moe model for this token
    student, discriminator = configs(tokenizer, options.shape, options.layers)
    torch.manual_seed(0)
    for folder, config in ((options.student, student), (options.discriminator, discriminator)):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
