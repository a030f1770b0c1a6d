"""A random mixture-of-experts student and a dense discriminator, two layers each, for a CPU.

python examples/gad/moe_gspo/tiny.py TOKENIZER STUDENT DISCRIMINATOR    the tokenizer's folder, two folders to write
"""

import sys

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from recipe.gad.quickstart.problem import tiny_llama


def write_models(tokenizer_folder: str, student_folder: str, discriminator_folder: str) -> None:
    """Qwen3-MoE with four experts, of which a token uses two, and a larger Llama with the same vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens("\n")  # verl asks the tokenizer of a qwen3_moe model for this token
    dense = tiny_llama(tokenizer, hidden_size=64, intermediate_size=192)
    sizes = {name: value for name, value in dense.to_diff_dict().items() if name != "model_type"}
    sparse = Qwen3MoeConfig(**sizes, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    models = {student_folder: Qwen3MoeForCausalLM(sparse), discriminator_folder: LlamaForCausalLM(dense)}
    for folder, model in models.items():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    write_models(*sys.argv[1:])
