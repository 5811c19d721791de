"""The verb convert: weights that are published as .bin alone -> safetensors, once."""

import pathlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import collecting.reward_models  # noqa: F401  registers the type of OpenAssistant's reward models
import common
from common import UserError, say


def convert_flags(add):
    add("--model", required=True, help="hub id or folder. Its pickles are read, which can run code: trust their author")
    add("--output", required=True, help="a new folder")


def convert(args):
    """Read a model's .bin weights once and write a folder with safetensors, which all other commands load."""
    output = pathlib.Path(args.output)
    part = output.with_name(output.name + ".part")
    if (output / "config.json").exists():
        return say(f"{output} is there")
    if output.exists():
        raise UserError(f"--output {output} holds something else: name a new folder")
    names = common.load_pretrained(AutoConfig, args.model).architectures or ()
    causal = any(name.endswith(("CausalLM", "LMHeadModel")) for name in names)
    auto_class = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = common.load_pretrained(auto_class, args.model, allow_pickle=True, dtype="auto")
    with torch.inference_mode():
        model.save_pretrained(part)
    common.load_tokenizer(args.model).save_pretrained(part)
    part.rename(output)
    return say(f"{args.model} in {output}")
