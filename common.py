"""What the method scripts share: packed rows, length-normalised scores, and what a training loop needs around it.

It holds no loss and nothing of one paper alone. A method script and this file train in an empty folder.

All candidates of a prompt begin with the same tokens, and so do prompts with the same template. A packed row stores
such a prefix once: it is a prefix tree, and the model reads it in one forward. A token attends to its ancestors and to
itself, and its position id is its depth. Logits are computed only where a response token is predicted.

    flags     Parser, in_range, add_training_flags, run_cli
    records   load_candidates, check_record
    rows      encode, pack, pack_padded, plan_rows, rows, shuffled_batches
    scores    candidate_logprobs, length_normalized, pair_statistics, means, check_packing
    machine   init_distributed, load_model, attention over packed rows, clip_grad_norm
    run       open_run, open_log, on_stop, load_checkpoint, save_checkpoint, save_model, learning_rate
"""

import argparse
import bisect
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.attention.flex_attention import create_block_mask
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

HUMAN = ("human", "reference")  # sources of responses that people wrote
GIVEN = ("chosen", "rejected", "release", *HUMAN)  # sources of responses that the data came with
CPU_BLOCK = 64  # queries that attend_blocks computes at a time
FLEX_BLOCK = 128  # FlexAttention's block size; packed rows are padded to a multiple of it

# -------------------- flags


class UserError(Exception):
    """A mistake that the user can correct. It is shown as one sentence on stderr, with exit code 2."""


# Errors that bad input or the environment can cause. Anything else is a bug.
OUTSIDE = (OSError, ValueError, KeyError, EOFError, RecursionError, MemoryError, SafetensorError)
OUTSIDE += (torch.OutOfMemoryError,)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        plain = action.default in (None, []) or action.default is False or "default:" in action.help
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, takes no abbreviated flags, and raises UserError."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def error(self, message):
        message = re.sub(r"(--\S*key)[ =]\S+", r"\1 ***", message)  # --api_key VALUE, typed by mistake
        raise UserError(f"{message} (see --help)")


def in_range(kind, low=-math.inf, high=2**63, above=-math.inf):
    """An argparse type: a number with low <= x <= high and x > above."""

    def parse(text):
        x = kind(text)
        if not (low <= x <= high and x > above):  # NaN is out of every range
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return x

    parse.__name__ = kind.__name__
    return parse


# fmt: off
def add_training_flags(parser, *, model, lr, schedule, warmup, epochs, batch_size):
    """Add the flags that all training scripts share. PAPERS.md says where each default comes from."""
    add = parser.add_argument_group("data and model").add_argument
    add("--data", help="candidates file, JSONL")
    add("--output", help="folder of the run: log, checkpoints, and the final model in OUTPUT/model")
    add("--model", default=model, help="hub id or folder")
    add("--allow_pickle", action="store_true", help="load .bin weights too; they can run code, so trust their author")
    add("--max_train_samples", type=in_range(int, 1), help="use only the first N records")
    add("--eval_data", help="held-out records: their figures go to the log, the best model to OUTPUT/best")
    add("--eval_every", type=in_range(int, 1), default=100, help="steps between evaluations; one is after the last")
    add("--max_length", type=in_range(int, 8), default=512, help="most tokens of prompt + response")
    add("--max_prompt_length", type=in_range(int, 2), help="most tokens of the prompt, cut on the left")
    add = parser.add_argument_group("optimisation (PAPERS.md says where each default comes from)").add_argument
    add("--lr", type=in_range(float, above=0), default=lr, help="peak learning rate")
    add("--schedule", choices=["cosine", "constant"], default=schedule, help="after the warm-up")
    add("--warmup", type=in_range(float, 0), default=warmup, help="warm-up: steps, or below 1 a share of all steps")
    add("--epochs", type=in_range(int, 1, 10_000), default=epochs, help="passes over the data")
    add("--batch_size", type=in_range(int, 1), default=batch_size, help="prompts per step over all processes")
    add("--max_grad_norm", type=in_range(float, above=0), default=1.0, help="gradient clipping")
    add("--seed", type=in_range(int, 0, 2**32), default=0, help="order of the data, dropout")
    add = parser.add_argument_group("rows and memory").add_argument
    add("--max_tokens_per_row", type=in_range(int, 1), help="size of a packed row (default: CPU 1024, CUDA 8192)")
    add("--padded", action="store_true", help="one sequence per candidate, for models that cannot read packed rows")
    add("--attn", choices=["auto", "flex", "blocks", "sdpa"], default="auto", help="auto: flex on CUDA, blocks on CPU")
    add("--activation_checkpointing", nargs="?", const=1, type=in_range(int, 0), metavar="N",
        help="recompute every N-th layer in the backward; 0: none (default: CUDA 1, CPU 0)")
    add("--bf16", action="store_true", help="compute in bf16 on CPU too: faster if lscpu shows avx512_bf16 or amx_bf16")
    add("--compile", action="store_true", help="torch.compile each layer: faster steps on CUDA, minutes at the start")
    add = parser.add_argument_group("the run's folder").add_argument
    add("--resume", action="store_true", help="continue from OUTPUT's newest checkpoint (or start, if there is none)")
    add("--checkpoint_every", type=in_range(int, 0), default=100, help="steps between checkpoints; 0: when interrupted")
    add("--track", choices=["tensorboard", "wandb", "trackio"], help="send the log there too (pip install it)")
# fmt: on


def run_cli(main):
    """Call `main` as a command. An error is one sentence on stderr, with exit code 2, or 1 if it is a bug. --debug adds
    the traceback."""
    debug, name = "--debug" in sys.argv, pathlib.Path(sys.argv[0]).name
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        main()
    except (Exception, KeyboardInterrupt) as e:
        if debug:
            traceback.print_exc()
        code, said = 2, f"error: {type(e).__name__}: {' '.join(str(e).split())[:500]}"
        if isinstance(e, KeyboardInterrupt):
            code, said = 130, "interrupted: what was written stays, and the same command continues"
        elif isinstance(e, UserError):
            said = f"error: {e}"
        elif isinstance(e, OUTSIDE) or "can't allocate memory" in said:  # torch's RuntimeError on CPU
            said += " (check files, flags, memory and disk; --debug shows where)"
        elif isinstance(e, RuntimeError) and re.search("gloo|NCCL|[Cc]onnection|[Tt]imed out", said):
            said = f"error: another process ended or does not answer, see its message ({said[7:]})"
        else:
            code, said = 1, said + " (a bug: please report what --debug prints)"
        if (process := os.environ.get("RANK", "0")) != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)  # process 0 usually says the same, and torchrun then ends this process
            name += f", process {process}"
        print(f"{name}: {printable(said)}", file=sys.stderr, flush=True)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            sys.stdout.flush()
            os._exit(code)  # destroying the process group would wait for the other processes
        sys.exit(code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def say(*text):
    """Print on process 0, above a progress bar."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(printable(" ".join(map(str, text))), file=sys.stdout)


def printable(text):
    """Replace control characters, which file names and servers' messages may hold, before text is printed."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


# -------------------- records


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -1e300 < x < 1e300


CANDIDATE_FIELDS = {  # annotation -> (test, what it must be)
    "label": (lambda x: x is None or isinstance(x, str), "a string or null"),
    "correct": (lambda x: isinstance(x, bool), "true or false"),
    "finished": (lambda x: isinstance(x, bool), "true or false"),
    "logprob": (is_number, "a finite number"),
    "num_tokens": (lambda x: is_number(x) and 0 < x < 1e9, "a positive number"),
    "reward": (is_number, "a finite number"),
    "similarity": (is_number, "a finite number"),
    "rank": (lambda x: x is None or (type(x) is int and 0 <= x < 2**31), "an integer from 0, or null"),
}


def load_candidates(path, limit=None, how=""):
    """A candidates file, plain or .gz -> its records, all or the first `limit`. Raises UserError, naming a bad record's
    line. If the file is missing, the message shows `how`: the commands that make it."""
    if not pathlib.Path(path).exists():
        raise UserError(f"{path} is not there" + (f". Make it with:\n{how}" if how else ""))
    records, seen, where = [], {}, path
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if len(records) == limit:
                    break
                if line.strip():
                    where = f"{path}:{number}"
                    record = json.loads(line)
                    check_record(record, where)
                    if (first := seen.setdefault(record["id"], where)) != where:
                        raise UserError(f"{where}: id {record['id']!r} was already on {first}")
                    records.append(record)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:  # torn, not UTF-8, not JSON
        raise UserError(f"{where}: cannot be read as JSON lines ({e})") from e
    if not records:
        raise UserError(f"{path}: holds no records")
    if limit and len(records) < limit:
        say(f"WARNING: {path} holds fewer prompts than --max_train_samples {limit}")
    return records


def check_record(record, where):
    """Raise UserError, naming `where` and the field, unless `record` has the form that all scripts share."""

    def need(good, field, expected):
        if not good:
            raise UserError(f"{where}: {field} must be {expected}")

    need(isinstance(record, dict), "the line", "a JSON object")
    for field in ("id", "prompt"):
        need(isinstance(record.get(field), str) and record[field].strip(), f"field {field!r}", "a non-empty string")
    candidates = record.get("candidates")
    need(isinstance(candidates, list) and candidates, "field 'candidates'", "a non-empty list")
    for i, c in enumerate(candidates):
        need(isinstance(c, dict), f"candidates[{i}]", "an object")
        need(isinstance(c.get("source"), str) and c["source"], f"candidates[{i}].source", "a non-empty string")
        need(isinstance(c.get("text"), str), f"candidates[{i}].text", "a string")
        need(c["text"].strip() or c["source"] not in HUMAN, f"candidates[{i}].text of {c['source']!r}", "not empty")
        for field, (valid, expected) in CANDIDATE_FIELDS.items():
            need(field not in c or valid(c[field]), f"candidates[{i}].{field}", expected)


# -------------------- rows


@dataclasses.dataclass
class Encoded:
    """One record as token ids. Candidate i is `prompt_ids + responses[i]`; a whole response ends with EOS."""

    id: str | None
    prompt_ids: list[int]
    responses: list[list[int]]
    prompt_cut: int  # tokens cut from the left of the prompt
    responses_cut: int  # number of responses that were cut on the right

    @property
    def num_tokens(self):
        return len(self.prompt_ids) + sum(map(len, self.responses))


def encode(tokenizer, record, max_length=512, max_prompt_length=None):
    """Tokenise a record -> Encoded. The prompt gets the tokenizer's own special tokens, a response none. No token
    crosses the boundary between them. A whole response ends with EOS. A response is not whole if it is cut here, or
    marked `finished: false`.

    A prompt keeps its last `max_prompt_length` tokens, BOS among them. A response keeps its first tokens, as many as
    `max_length` leaves after the prompt. Without `max_prompt_length` the responses get room before the prompt.
    """
    prompt = prompt_ids(tokenizer, record["prompt"])
    limit = max_length - min(len(prompt), max_prompt_length or 2, max_length - 2)
    responses = []
    for c in record["candidates"]:
        ids = response_ids(tokenizer, record["prompt"], c["text"])
        whole = c.get("finished") is not False or not ids  # an empty response is EOS alone
        responses.append(ids + [tokenizer.eos_token_id] * whole)
    longest = min(limit, max(map(len, responses)))
    kept = cut_left(tokenizer, prompt, min(max_prompt_length or max_length, max_length - longest))
    cut = sum(len(r) > limit for r in responses)
    return Encoded(record.get("id"), kept, [r[:limit] for r in responses], len(prompt) - len(kept), cut)


def space_before(prompt, text):
    """The text between prompt and response: a space, unless there is white space already or the response is empty."""
    return "" if not text or prompt[-1:].isspace() or text[0].isspace() else " "


def response_ids(tokenizer, prompt, text):
    """The tokens of prompt + join + text that follow the prompt's, without the EOS that a rendered chat ends with.

    A tokenizer may put a space before every text, so a response is not tokenised alone. If one token would cross the
    boundary (a prompt that ends with a space), the response is tokenised after a start with which it does not merge.
    """
    text = re.sub(rf"({re.escape(tokenizer.eos_token)}\s*)+\Z", "", text)  # chat data may bring its own EOS
    text = space_before(prompt, text) + text
    for start in (prompt[-64:], "\n", ":", "a"):
        head, both = tokenizer([start, start + text], add_special_tokens=False).input_ids
        if both[: len(head)] == head:
            return both[len(head) :]
    return tokenizer(text, add_special_tokens=False).input_ids


@functools.cache
def prefix_ids(tokenizer):
    """The special tokens that a tokenizer puts before a text: BOS, or others, or none."""
    ids, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return ids[: ids.index(bare[0])] if bare else ids


def prompt_ids(tokenizer, text):
    """The tokenizer's prefix and the prompt's tokens. The prefix stands once, even if a chat template wrote it too.
    Raises UserError if there are no tokens."""
    ids, prefix = tokenizer(text, add_special_tokens=False).input_ids, prefix_ids(tokenizer)
    ids = ids if ids[: len(prefix)] == prefix else prefix + ids
    if not ids:
        raise UserError(f"the prompt {text!r} has no tokens in this tokenizer: leave its record out")
    return ids


def cut_left(tokenizer, ids, room):
    """The last `room` tokens of a prompt. A prompt that begins with the tokenizer's prefix keeps it."""
    prefix = prefix_ids(tokenizer) or [tokenizer.bos_token_id]
    prefix = prefix if ids[: len(prefix)] == prefix and room > len(prefix) else []
    return ids if len(ids) <= room else prefix + ids[len(ids) - room + len(prefix) :]


def encode_all(tokenizer, records, args):
    """encode() for every record. Prints how much the length limits cut, where there are records."""
    if (args.max_prompt_length or 0) >= args.max_length:
        raise UserError(f"--max_length {args.max_length} must be larger than --max_prompt_length, to hold a response")
    encoded = [encode(tokenizer, r, args.max_length, args.max_prompt_length) for r in records]
    cut = f"{sum(e.prompt_cut > 0 for e in encoded)} prompts (left), {sum(e.responses_cut for e in encoded)} responses"
    if encoded:
        say(f"{len(encoded)} prompts, {sum(e.num_tokens for e in encoded)} tokens; cut to fit: {cut} (right)")
    return encoded


@dataclasses.dataclass
class PackedBatch:
    """One row: the prefix tree of P prompts with N candidates (or, padded, one sequence per candidate).

    input_ids [1, T]   position_ids [1, T]   attention_mask [1, 1, T, T] bool, or a form that the attention reads
    logit_positions [R], targets [R]: where token r is predicted, and its id
    token_index [C], candidate_index [C]: prediction token_index[c] counts for candidate candidate_index[c]
    last_positions [N]: where each candidate's last token stands
    ids: the P records' ids   sizes: how many of the N candidates belong to each prompt
    Padded: input_ids and attention_mask [N, L], position_ids None, positions into the flattened N * L.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: object
    logit_positions: torch.Tensor
    targets: torch.Tensor
    token_index: torch.Tensor
    candidate_index: torch.Tensor
    last_positions: torch.Tensor
    ids: list[str | None]
    sizes: list[int]

    def to(self, device):
        """The batch on `device`. A mask with `blocks` is there already, and a copy would lose them."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor) and not hasattr(v, "blocks")}
        if torch.device(device).type == "cuda":  # only pinned memory is copied while the GPU computes
            tensors = {k: v.pin_memory() for k, v in tensors.items()}
        return dataclasses.replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


def sees(query, key, end, depth, first=None):
    """Whether the token at row position `query` attends to the one at `key`: an ancestor, or itself. In a layer with a
    window, only if the depth of `key` is first[query] or more."""
    tree = (key <= query) & (query < end[key])
    return tree if first is None else tree & (depth[key] >= first[query])


def dense_mask(end, depth, first=None, device="cpu"):
    """The attention mask of a row, [1, 1, T, T] bool, for SDPA."""
    position = torch.arange(len(end))
    return sees(position[:, None], position, end, depth, first)[None, None].to(device)


def added_mask(*tree):
    """The same mask in the form that eager attention adds to its scores: 0 or -inf."""
    return torch.where(dense_mask(*tree), 0.0, -torch.inf)


def shared_start(a, b):
    """The number of tokens that two sequences have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def pack(encoded_records, mask_of=dense_mask, block=1):
    """Pack encoded records into one row, a prefix tree -> PackedBatch. `pack_for` gives it the mask that a model reads.

    Sequences are sorted, so neighbours share the longest prefixes. Each sequence adds only the tokens that it does not
    share with the one before it. So the descendants of a token follow it directly, up to end[token]. `mask_of` makes
    the attention mask from end [T] and the tokens' depth [T]. The row is padded to a multiple of `block` with tokens
    that no candidate attends to.
    """
    sequences = [(e.prompt_ids + r, len(e.prompt_ids)) for e in encoded_records for r in e.responses]
    ids, positions, end, path, before = [], [], [], [], []  # path: the row positions of the current sequence's tokens
    predictions, uses, last_positions = {}, [], [0] * len(sequences)  # predictions: {(position, target): number}
    for n, (tokens, P) in sorted(enumerate(sequences), key=lambda x: x[1]):
        shared = shared_start(tokens, before)
        path = path[:shared] + [*range(len(ids), len(ids) + len(tokens) - shared)]
        ids += tokens[shared:]
        positions += range(shared, len(tokens))
        end += [0] * (len(tokens) - shared)
        for k in path:
            end[k] = len(ids)
        uses += [(predictions.setdefault(x, len(predictions)), n) for x in zip(path[P - 1 : -1], tokens[P:])]
        last_positions[n], before = path[-1], tokens
    fill = -len(ids) % block
    tensors = [F.pad(torch.tensor(x)[None], (0, fill)) for x in (ids, positions)]
    tensors += [mask_of(torch.tensor(end + [len(ids) + fill] * fill), tensors[1][0])]
    tensors += [*torch.tensor([*predictions]).T, *torch.tensor(uses).T, torch.tensor(last_positions)]
    return PackedBatch(*tensors, [e.id for e in encoded_records], [len(e.responses) for e in encoded_records])


def pack_padded(encoded_records, pad_id=0):
    """The reference for `pack`: each candidate is a sequence of its own, padded on the right -> PackedBatch."""
    sequences = [(e.prompt_ids + r, len(e.prompt_ids)) for e in encoded_records for r in e.responses]
    L = max(len(tokens) for tokens, _ in sequences)
    input_ids = [tokens + [pad_id] * (L - len(tokens)) for tokens, _ in sequences]
    mask = [[1] * len(tokens) + [0] * (L - len(tokens)) for tokens, _ in sequences]  # by length: pad is often EOS
    uses = [(n * L + k - 1, x[k], n) for n, (x, P) in enumerate(sequences) for k in range(P, len(x))]
    logit_positions, targets, candidate_index = zip(*uses)
    last_positions = [n * L + len(tokens) - 1 for n, (tokens, _) in enumerate(sequences)]
    indices = [logit_positions, targets, range(len(uses)), candidate_index, last_positions]
    tensors = [torch.tensor(input_ids), None, torch.tensor(mask), *map(torch.tensor, indices)]
    return PackedBatch(*tensors, [e.id for e in encoded_records], [len(e.responses) for e in encoded_records])


def plan_rows(encoded_records, max_tokens, world):
    """Divide prompts into rows for `world` processes -> rows[process], a list of (indices, weight).

    Prompts are sorted, so those with a shared prefix are neighbours, and a row stores the prefix once. The number of
    rows is the smallest multiple of `world` for which every row fits `max_tokens` (a longer prompt has its own row).
    For this number of rows, the longest row is as short as possible. All processes get equally many rows, because each
    forward is a collective under FSDP. A process with too few repeats a row with weight 0.
    """
    order, before = [], []  # sorted prompts: (index, tokens, those of them shared with the prompt before)
    for i in sorted(range(len(encoded_records)), key=lambda i: encoded_records[i].prompt_ids):
        e = encoded_records[i]
        order.append((i, e.num_tokens, shared_start(e.prompt_ids, before)))
        before = e.prompt_ids

    def cut(budget):  # -> rows within the budget, [their indices], [their tokens]
        rows, loads = [], []
        for i, tokens, shared in order:
            if rows and loads[-1] + tokens - shared <= budget:
                rows[-1].append(i)
                loads[-1] += tokens - shared
            else:
                rows.append([i])
                loads.append(tokens)
        return rows, loads

    k = math.ceil(len(cut(max_tokens)[0]) / world) * world
    budget = bisect.bisect_left(range(max_tokens), True, key=lambda tokens: len(cut(tokens)[0]) <= k)
    rows, loads = cut(budget)
    rows = [sorted(row) for _, row in sorted(zip(loads, rows), reverse=True)]  # rows of similar length at the same time
    plan = [[(row, 1.0) for row in rows[process::world]] for process in range(world)]
    return [mine + [(rows[-1], 0.0)] * (len(plan[0]) - len(mine)) for mine in plan]


def windows(config, depth):
    """-> {layer type: first [T]}: a token at `depth` [T] attends to ancestors of depth `first` or more; None: to all.
    One entry if all layers attend to all. Raises UserError for layers that are not attention, and for attention that
    depends on the number of tokens in a row."""
    text = config.get_text_config()
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    own = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
    types = {*(getattr(text, "layer_types", None) or [own])}
    first = {"full_attention": None, "sliding_attention": None, "chunked_attention": None}
    if types - first.keys():
        raise UserError(f"its layers ({', '.join(sorted(types))}) read a packed row as one text: add --padded")
    counts = getattr(text, "floor_scale", None) if getattr(text, "attn_temperature_tuning", None) else None  # Llama 4
    if counts and len(depth) >= counts:
        raise UserError(f"its attention counts the tokens of a row: set --max_tokens_per_row below {counts}")
    if window and window <= depth.max():
        first["sliding_attention"] = depth - window + 1
    if chunk and chunk <= depth.max():
        first["chunked_attention"] = depth // chunk * chunk
    return {k: first[k] for k in types} if any(first[k] is not None for k in types) else {"full_attention": None}


def pack_for(model, encoded_records):
    """pack() on the model's device, with the mask that its attention reads. If layers differ in what they see: a dict
    of masks, by layer type."""
    device, attn = next(model.parameters()).device, model.config._attn_implementation
    form = {"flex_attention": block_mask, "blocks": key_blocks, "eager": added_mask}.get(attn, dense_mask)

    def mask_of(end, depth):
        masks = {k: form(end, depth, first, device) for k, first in windows(model.config, depth).items()}
        return masks if len(masks) > 1 else masks.popitem()[1]

    return pack(encoded_records, mask_of, FLEX_BLOCK if attn == "flex_attention" else 1).to(device)


def rows(prompts, model, tokenizer, args):
    """Yield (weight, batch, *columns) for each row of this process's share of `prompts`.

    prompts: (Encoded, column, ...) each, a column a tensor [n] with a value per candidate. The columns of a row's
    prompts are joined to [N]. weight is 1, or 0 where the row only keeps this process in step with the others. While
    the caller computes, a thread packs the next row. Stops the run between two rows if a signal asked for it.
    """
    device = next(model.parameters()).device
    budget = args.max_tokens_per_row or (8192 if device.type == "cuda" else 1024)
    budget = 1 if args.padded else budget  # 1: a prompt per row
    plan = plan_rows([encoded for encoded, *_ in prompts], budget, dist.get_world_size())[dist.get_rank()]
    whole = isinstance(model, FSDPModule) and stays_whole(model)

    def make(row):
        encoded, *columns = zip(*(prompts[i] for i in row))
        batch = pack_padded(encoded, tokenizer.pad_token_id).to(device) if args.padded else pack_for(model, encoded)
        return batch, *(torch.cat(c).to(device, non_blocking=True) for c in columns)

    with ThreadPoolExecutor(1) as thread:
        waiting = [thread.submit(make, plan[0][0])]
        for n, (_, weight) in enumerate(plan, 1):
            made = waiting.pop().result()
            waiting += [thread.submit(make, row) for row, _ in plan[n : n + 1]]
            if whole:  # only the last row sums the gradients over processes and frees the gathered weights
                model.set_requires_gradient_sync(n == len(plan))
                model.set_reshard_after_backward(n == len(plan))
            yield weight, *made
            stop_if_asked()


def shuffled_batches(num_prompts, args):
    """The prompts of every step: lists of indices. Each epoch is a seeded shuffle, cut into batches."""
    batches = []
    for epoch in range(args.epochs):
        order = list(range(num_prompts))
        random.Random(f"{args.seed}-{epoch}").shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, num_prompts, args.batch_size)]
    return batches


# -------------------- scores


def candidate_logprobs(model, batch):
    """-> (logprobs [N], lengths [N]), fp32: each candidate's sum of token log-probabilities, EOS included, and its
    number of tokens. check_packing finds the models that misread a packed row."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if batch.position_ids is not None:  # logits_to_keep: under fully_shard only the root's forward gathers the head
        inputs |= {"position_ids": batch.position_ids, "logits_to_keep": batch.logit_positions}
    logits = model(**inputs).logits.flatten(0, 1)  # [R, V], or padded [N * L, V]
    logits = logits[batch.logit_positions] if batch.position_ids is None else logits
    token_logprobs = -F.cross_entropy(logits.float(), batch.targets, reduction="none")  # [R]
    token_logprobs = token_logprobs[batch.token_index]  # [C]: a token that candidates share counts for each
    zeros = token_logprobs.new_zeros(len(batch.last_positions))
    logprobs = zeros.index_add(0, batch.candidate_index, token_logprobs)
    lengths = zeros.index_add(0, batch.candidate_index, torch.ones_like(token_logprobs))
    return logprobs, lengths


@torch.no_grad()
def check_packing(model, encoded_records, score=None):
    """Raise UserError for a model that misreads packed rows: one with a running state, or one that ignores the mask or
    the positions. The row is pack_for's: pack alone knows no window, and makes no mask for eager attention.

    score(batch) -> [N] or [N, D] must be the same for a packed row and for padded ones; by default it is the mean token
    log-probability. It is also computed with two errors: the mask, then the positions, of plain text. Rounding is
    coarse in bf16, so the packed row may differ from the padded ones by a quarter of the smaller error's effect.
    """
    plain, training = getattr(model, "module", model), model.training  # module: what DistributedDataParallel wraps
    text, sequences = plain.config.get_text_config(), [(e.prompt_ids, r) for e in encoded_records for r in e.responses]
    longest = max(len(prompt) + len(r) for prompt, r in sequences)
    P = min(128, longest // 2)  # a prompt of P tokens with 16 responses of 8
    tokens = [*itertools.islice(itertools.cycle(x for s in sequences for ids in s for x in ids), P + 16 * 8)]
    some = [Encoded(None, tokens[:P], [tokens[i : i + 8] for i in range(P, len(tokens), 8)], 0, 0)]
    sizes = {k: getattr(text, k, None) for k in ("sliding_window", "attention_chunk_size")}
    model.eval()
    try:
        for k, size in sizes.items():
            if size and size < longest:
                setattr(text, k, P // 2 + 1)  # the check's sequences are short, and the window must matter in them
        packed = pack_for(plain, some)
        row = packed.input_ids[0].tolist()
        as_text = pack_for(plain, [Encoded(None, row[:1], [row[1:]], 0, 0)])
        wrong = [dataclasses.replace(packed, **{k: getattr(as_text, k)}) for k in ("attention_mask", "position_ids")]
        batches = (pack_padded(some).to(packed.input_ids.device), packed, *wrong)
        padded, *scores = map(score or (lambda batch: torch.div(*candidate_logprobs(model, batch))), batches)
        gap, *wrong = ((s - padded).norm().item() for s in scores)
    except (UserError, MemoryError, torch.OutOfMemoryError, dist.DistError):
        raise
    except Exception as e:  # a model may do anything with a mask that it does not expect
        reason = (str(e).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{type(plain).__name__} cannot read packed rows ({reason}): add --padded") from e
    finally:
        for k, size in sizes.items():
            if size:
                setattr(text, k, size)
        model.train(training)
        reshard(model)
    if not gap <= max(1e-3, min(wrong) / 4):  # false for NaN
        raise UserError(f"packed and padded rows differ by {gap:.2g} (with an error by {min(wrong):.2g}): add --padded")


def length_normalized(logprobs, lengths, exponent):
    """[N], [N] -> [N]: log-likelihood over |y| ** exponent, a number or a tensor [N] (RESCUE's lambda, Tuna's beta)."""
    return logprobs / lengths**exponent


def pair_statistics(scores, levels):
    """One prompt's scores [n] and preference levels [n], larger better -> four scalars: the mean score of its best
    level, the number of ordered pairs whose scores are in order, the number of ordered pairs, and the sum of
    s_better - s_worse over them. Equal levels are no pair. If all levels are NaN (unranked), all are best."""
    better = levels[:, None] > levels[None, :]  # [n, n]
    gap = scores[:, None] - scores[None, :]
    best = ~better.any(0) & (~levels.isnan() | levels.isnan().all())  # nothing is above it
    return (scores * best).sum() / best.sum(), ((gap > 0) & better).sum(), better.sum(), (gap * better).sum()


def means(names, rows, num_prompts):
    """The figures of a step or an evaluation over `num_prompts` prompts, all processes together, for the log.

    rows: (weight, batch, terms [P, len(names) + 4]) per row; a prompt's terms are its losses, then pair_statistics.
    -> {name: mean loss per prompt}, best_score: mean score of a prompt's best level, pair_accuracy: share of ordered
    pairs whose scores are in order, gap: mean of s_better - s_worse. Raises UserError, naming the records, if a term is
    NaN or infinite.
    """
    totals = all_sum(sum(weight * terms.detach().sum(0) for weight, _, terms in rows))
    if not all(map(math.isfinite, totals)):
        finite = [(i, ok) for _, batch, x in rows for i, ok in zip(batch.ids, x.isfinite().all(1).tolist())]
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [i for i, ok in finite if not ok])
        bad = ", ".join(sorted({i for ids in everyone for i in ids}))
        raise UserError(f"the loss is not finite for records {bad}: look at them, or lower --lr")
    *losses, best, in_order, pairs, gap = totals
    figures = {k: v / num_prompts for k, v in zip(("best_score", *names), (best, *losses))}
    return figures | {"pair_accuracy": in_order / max(pairs, 1), "gap": gap / max(pairs, 1)}


# -------------------- machine


def attend_blocks(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention over a packed row on CPU: CPU_BLOCK queries at a time, with only the keys that one of them sees.
    (FlexAttention does so on CUDA; it has no backward on CPU.) query [1, H, T, D], key and value [1, KV, T, D] ->
    ([1, T, H, D], None), as transformers' AttentionInterface asks. Other masks go to SDPA."""
    blocks = getattr(attention_mask, "blocks", None)
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    out = []
    for queries, (keys, mask) in zip(query.split(CPU_BLOCK, dim=2), blocks, strict=True):
        k, v, mask = key.index_select(2, keys), value.index_select(2, keys), mask.to(query.dtype)
        out.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, **options))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("blocks", attend_blocks)
transformers.AttentionMaskInterface.register("blocks", sdpa_mask)  # the mask of padded rows and of generation


def key_blocks(end, depth, first=None, device="cpu"):
    """The mask of a row for attend_blocks. `blocks` holds, for each CPU_BLOCK queries, the keys that one of them sees,
    and 0 or -inf [queries, keys]. The tensor itself is a single number, expanded to [1, 1, T, T]."""
    position = torch.arange(len(end))
    mask = torch.ones((), dtype=torch.bool, device=device).expand(1, 1, len(end), len(end))
    mask.blocks = []
    for queries in position.split(CPU_BLOCK):
        keys = position[: queries[-1] + 1]
        keys = keys[end[keys] > queries[0]]
        seen = sees(queries[:, None], keys, end, depth, first)
        keys, seen = keys[seen.any(0)], seen[:, seen.any(0)]  # a window leaves out some
        visible = torch.where(seen, 0.0, -torch.inf)
        mask.blocks.append(tuple(x.to(device, non_blocking=True) for x in (keys, visible)))
    return mask


def block_mask(end, depth, first=None, device="cpu"):
    """FlexAttention's mask of a row. Its length is a multiple of FLEX_BLOCK."""
    tree = [x if x is None else x.to(device) for x in (end, depth, first)]
    T, sees_it = len(end), lambda b, h, query, key: sees(query, key, *tree)
    return create_block_mask(sees_it, None, None, T, T, device=device, BLOCK_SIZE=FLEX_BLOCK)


def init_distributed(minutes=30):
    """-> (process, world, device). NCCL on CUDA, gloo on CPU; without torchrun a group of one process. A process that
    waits longer than `minutes` for the others ends with an error."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which torch reads first
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # rows differ in length
        torch.cuda.set_device(device)
    transformers.utils.logging.disable_progress_bar()  # one bar per process for loading and saving weights
    options = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    options["timeout"] = datetime.timedelta(minutes=minutes)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **options)
    return dist.get_rank(), dist.get_world_size(), device


def load_pretrained(auto_class, name, flag="--model", allow_pickle=False, **kwargs):
    """auto_class.from_pretrained, of safetensors only (a pickle can run code) and without remote code. Raises
    UserError, naming `flag`, if a model cannot be loaded or its weights do not fit its config."""
    try:
        if not auto_class.__name__.startswith("AutoModel"):
            return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)
        options = {"trust_remote_code": False, "use_safetensors": None if allow_pickle else True}
        model, info = auto_class.from_pretrained(name, **kwargs | options | {"output_loading_info": True})
    except Exception as e:  # a folder may hold anything
        reason = str(e).strip().splitlines()[0][:300] if str(e).strip() else type(e).__name__
        folder, hub = pathlib.Path(name), re.search("use_safetensors|safetensors conversion", str(e))
        if reason.startswith("Repo id must"):
            reason = "there is no such folder, and it is not the name of a model at the hub"
        if (folder / "adapter_config.json").exists():
            reason = "it is an adapter: merge it into its base model (peft's merge_and_unload), and give that"
        if hub or list(folder.glob("*.bin")) and not list(folder.glob("*.safetensors")):
            reason = "its weights are pickles, which can run code. If you trust their author, add --allow_pickle, or "
            reason += f"make safetensors of them: python collect_candidates.py convert --model {name} --output FOLDER"
        hint = f"; python demo/get_{name[5:]}.py makes it" if name in ("demo/model", "demo/encoder") else ""
        raise UserError(f"{flag} {name}: cannot be loaded ({reason}){hint}") from e
    whole = auto_class is AutoModelForCausalLM  # other tasks have other heads, but the same numbered layers
    odd = {*info["missing_keys"], *info["unexpected_keys"]}
    if odd := [k for k in odd if (whole or re.search(r"\.\d+\.", k)) and not k.endswith(".masked_bias")]:  # old GPT-2s
        raise UserError(f"{flag} {name}: its weights do not fit its config.json: {', '.join(sorted(odd)[:3])}")
    return (model, info) if kwargs.get("output_loading_info") else model


def load_tokenizer(name, flag="--model", model=None):
    """A tokenizer with a padding token. UserError if it has no EOS, or tokens that `model` has no embedding for."""
    tokenizer = load_pretrained(AutoTokenizer, name, flag)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {name}: the tokenizer has no EOS token, which must end every response")
    rows = model.get_input_embeddings().num_embeddings if model else math.inf
    if (tokens := max(tokenizer.get_vocab().values(), default=0) + 1) > rows:
        raise UserError(f"{flag} {name}: its tokenizer has {tokens} tokens, its embedding {rows}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by id
    return tokenizer


def load_model(args, device, auto_class=AutoModelForCausalLM, **kwargs):
    """-> (model, tokenizer) for training: fp32 weights, sharded with FSDP2. The processes of a machine load one after
    the other, so that its memory holds one whole model at a time."""
    for turn in range(dist.get_world_size()):  # as many turns on every machine: all processes join each barrier
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            options = {"allow_pickle": args.allow_pickle, "dtype": torch.float32}
            if getattr(load_pretrained(AutoConfig, args.model), "quantization_config", None):
                raise UserError(f"--model {args.model}: its weights are quantised: give the model that is not")
            model = load_pretrained(auto_class, args.model, **options, **kwargs)
            tokenizer = load_tokenizer(args.model, model=model)
            check_positions(model, args)
            settle_config(model, tokenizer)
            if args.attn == "flex" and device.type == "cpu":
                raise UserError("--attn flex: FlexAttention has no backward on CPU: leave --attn out")
            if not args.padded:
                set_attention(model, device, args.attn)
            every = args.activation_checkpointing
            if every := int(device.type == "cuda") if every is None else every:
                old = model.gradient_checkpointing_enable  # its name in transformers 5.17
                enable = getattr(model, "activation_checkpointing_enable", old)
                enable({"use_reentrant": False}, every_n_layers=every)
            for layer in decoder_layers(model) if args.compile else ():
                layer.compile(dynamic=True)  # rows differ in length
            model = shard(model.train(), device, args.bf16)
        dist.barrier()
    return model, tokenizer


def check_positions(model, args):
    """Raise UserError if --max_length is more than the model's positions. It is also an error beyond the length where
    rotary frequencies change: there the longest sequence of a row would change the scores of the others."""
    config = model.config.get_text_config()
    rope, limit = getattr(config, "rope_parameters", None) or {}, getattr(config, "max_position_embeddings", None)
    kind = rope.get("rope_type")
    limit = rope["original_max_position_embeddings"] if kind == "longrope" else limit
    if limit and args.max_length > limit and (not rope or kind in ("dynamic", "longrope")):
        why = f"beyond {limit} tokens its {kind} positions change with the row" if rope else f"it has {limit} positions"
        raise UserError(f"--max_length {args.max_length}: {why}: set --max_length {limit}")


def settle_config(model, tokenizer):
    """Make the config agree with what is trained and saved. The router loss is off: it is no part of the objective. The
    head is tied only if it is one tensor with the embedding. Generation ends at the EOS that training teaches. Sampling
    settings that transformers would refuse to save are dropped."""
    config, own = model.config.get_text_config(), getattr(model, "generation_config", None)  # a reward model has none
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
        say("the router loss that its config asks for is no part of the objective: it is left out")
    pairs = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {a: b for a, b in pairs.items() if model.get_parameter(a) is model.get_parameter(b)}
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = config.tie_word_embeddings = False
    if own:
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        if tokenizer.eos_token_id not in ends:
            own.eos_token_id = [tokenizer.eos_token_id, *(t for t in ends if t is not None)]
        try:
            own.validate(strict=True)
        except ValueError:
            say("its generation_config.json is not valid: only the special tokens in it are kept")
            tokens = {k: v for k, v in own.to_dict().items() if k.endswith("_token_id")}
            model.generation_config = transformers.GenerationConfig(**tokens)


def has_sdpa(model):
    """Whether SDPA computes the model's attention. It cannot cap scores, which transformers 5.17 overlooks."""
    return model._supports_sdpa and not getattr(model.config.get_text_config(), "attn_logit_softcapping", None)


def set_attention(model, device, asked="auto"):
    """Give the model the attention that reads packed rows: FlexAttention on CUDA, else attend_blocks. FlexAttention
    needs heads of 16 or more and no dropout. A model without SDPA (soft-capped scores, attention sinks) has eager
    attention. Raises UserError if the model does not have the attention that was `asked` for."""
    own, config = model.config._attn_implementation, model.config.get_text_config()
    if asked == "auto":
        flex = device.type == "cuda" and model._supports_flex_attn and not getattr(config, "attention_dropout", 0)
        flex = flex and (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) >= 16
        packed = "blocks" if has_sdpa(model) else "eager"
        asked = "flex" if flex else packed if own == "sdpa" else own
    elif not (model._supports_flex_attn if asked == "flex" else has_sdpa(model)):
        raise UserError(f"--attn {asked}: {type(model).__name__} has no such attention: leave --attn out")
    model.set_attn_implementation({"flex": "flex_attention"}.get(asked, asked))


def shard(model, device, bf16=False):
    """FSDP2 over all processes: layer by layer, then the rest. Computes in bf16 on CUDA and with --bf16; gradients are
    summed in fp32. One process in fp32 needs no FSDP."""
    dtype = torch.bfloat16 if bf16 or device.type == "cuda" else torch.float32
    if dist.get_world_size() > 1 or dtype is torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        again = False if stays_whole(model) else None  # None: the layers reshard, the root does not
        for part in (*decoder_layers(model), model):  # embedding and head stay with the root: they may be tied
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    return model


def stays_whole(model):
    """Whether each process keeps all weights and gradients of `model` during a step. It saves most of the traffic
    between processes (benchmarks/SCALE.md) and takes 6 bytes a parameter in bf16, 8 in fp32."""
    return sum(p.numel() for p in model.parameters()) < 1.5e9


def reshard(model):
    """Free the weights that FSDP2 leaves gathered after a forward without a backward."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def decoder_layers(model):
    """The transformer's layers: the longest ModuleList of the model, whatever the architecture calls it."""
    return max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len, default=[])


def all_sum(values):
    """Sum each number of a list or tensor [n] over all processes -> n floats."""
    total = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    dist.all_reduce(total)
    return total.tolist()


def clip_grad_norm(model, max_norm, records):
    """Clip the gradient to `max_norm` -> its norm before clipping. UserError, naming `records`, if it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        raise UserError(f"the gradient of records {', '.join(records)} is not finite: look at them, or lower --lr")
    return norm


# -------------------- run
# OUTPUT/args.json     the arguments, the digest of the data, the versions
# OUTPUT/log.jsonl     a line per step, and a line per evaluation on --eval_data
# OUTPUT/checkpoints/  step-N: shards of weights and optimizer, safetensors
# OUTPUT/model, best   Hugging Face folders: the trained model; the model of the best evaluation
#
# The order of the data and the dropout seeds derive from (seed, step). So the step number is all that a checkpoint
# needs to know about data and random numbers.

# Arguments that may change when a run is resumed.
FREE = {"output", "resume", "checkpoint_every", "track"}
FREE |= {"attn", "max_tokens_per_row", "activation_checkpointing", "compile"}


def open_run(args, doc):
    """-> the folder OUTPUT as a Path, locked while the process lives. Ends the program if the run is finished. Raises
    UserError if the folder holds something else than a run, or if its run has other arguments or data. `doc`: the
    script's docstring; what stands above its commands goes to args.json and the model card."""
    output, file = pathlib.Path(args.output), pathlib.Path(args.output) / "args.json"
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    for path in filter(None, (args.data, args.eval_data)):
        with open(path, "rb") as f:
            settings[f"content of {path}"] = hashlib.file_digest(f, "sha256").hexdigest()
    if dist.get_rank() == 0:
        content = {p.name for p in output.iterdir()} if output.exists() else set()
        if content and "lock" not in content:
            raise UserError(f"--output {output} holds something else than a run: name another folder")
        begun = bool(content - {"lock", "args.json"})  # a run that failed at its start left nothing to lose
        if begun and not args.resume:
            raise UserError(f"--output {output} is not empty: continue its run with --resume, or name another folder")
        open_run.lock = lock(output / "lock", f"--output {output}")
        before = run_settings(output / "model") if begun else settings
        if different := changed(before, settings, "--"):
            raise UserError(f"--resume {output}: arguments differ from the run's: {different}")
        if not begun:
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            about = {"command": shlex.join(sys.argv), "settings": settings, "versions": versions}
            about["paper"] = doc.partition("\n\n    ")[0]
            file.write_text(json.dumps(about, indent=1))
            sync(file)
    dist.barrier()
    if run_settings(output / "model") != settings:
        raise UserError(f"--output {output}: this process has other arguments, or sees another folder, than process 0")
    if (output / "model").exists():
        drop_checkpoints(output)  # they are there if it was killed at its very end
        say(f"{output} is finished: its model is in {output / 'model'}")
        sys.exit(0)
    return output


def lock(path, output):
    """-> a locked file; the lock lasts while it is open. Raises UserError, beginning with `output`, if another process
    holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{output}: another run is writing there") from None
    return file


def changed(before, settings, prefix=""):
    """-> "name old -> new, ..." for the settings that differ from those before, or ""."""
    return ", ".join(f"{prefix}{k} {before.get(k)!r} -> {v!r}" for k, v in settings.items() if before.get(k) != v)


def run_settings(model):
    """The arguments of the run that made this model (RUN/model or RUN/best) -> dict, empty for any other model."""
    found = {}
    if pathlib.Path(model).name in ("model", "best"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # other projects have an args.json too
            found = json.loads((pathlib.Path(model).parent / "args.json").read_text())["settings"]
    return found if isinstance(found, dict) else {}


def run_name(model):
    """What a model is called in records and reports: the name of its run, or else of its folder."""
    path = pathlib.Path(model)
    return path.parent.name + "-best" * (path.name == "best") if run_settings(model) else path.name


def sync(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


@contextlib.contextmanager
def whole_folder(folder):
    """Give all processes a temporary folder to write to, then rename it on process 0. So `folder` is complete or
    missing, even after a power loss. Raises UserError if it cannot be written."""
    part = folder.with_name(folder.name + ".part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    dist.barrier()
    try:
        yield part
        dist.barrier()
        if dist.get_rank() == 0:
            for path in (*part.iterdir(), part):
                sync(path)
            shutil.rmtree(folder, ignore_errors=True)  # an earlier best model
            os.replace(part, folder)
            sync(folder.parent)
    except (*OUTSIDE, dcp.api.CheckpointException) as e:  # a full disk raises different errors
        reason = (str(e).strip().splitlines() or [type(e).__name__])[-1]
        raise UserError(f"{folder} could not be saved ({reason})") from e
    dist.barrier()


def checkpoints(output):
    return sorted(p for p in (output / "checkpoints").glob("step-*") if p.suffix != ".part")


def drop_checkpoints(output):
    if dist.get_rank() == 0:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)


def training_state(model, optimizer):
    """-> (the tensors of a checkpoint, the optimizer's settings; these come from the flags and are not saved)."""
    reshard(model)  # after a stop between two rows the weights are gathered
    weights, of_optimizer = states.get_state_dict(model, optimizer)
    return {"model": untied(model, weights), "optimizer": of_optimizer["state"]}, of_optimizer["param_groups"]


def untied(model, weights):
    """A state dict that holds a tied weight once; safetensors refuse it twice."""
    return {k: v for k, v in weights.items() if k not in getattr(model, "all_tied_weights_keys", {})}


def save_checkpoint(output, step, model, optimizer):
    """Write OUTPUT/checkpoints/step-N, each process its shards, then delete the one before."""
    before, folder = checkpoints(output), output / "checkpoints" / f"step-{step:08d}"
    if step == 0 or folder in before:  # before the first step the optimizer has no state that could be saved
        return
    with whole_folder(folder) as part:
        writer = dcp.HuggingFaceStorageWriter(part, save_distributed=True)  # safetensors: reading them runs no code
        dcp.save(training_state(model, optimizer)[0], storage_writer=writer)
    for old in before if dist.get_rank() == 0 else ():
        os.replace(old, old.with_suffix(".part"))  # a half-deleted folder does not keep the name of a whole one
        shutil.rmtree(old.with_suffix(".part"))


def load_checkpoint(output, model, optimizer):
    """Load the newest checkpoint, on any number of processes -> the number of steps taken, 0 where there is none."""
    if not (found := checkpoints(output)):
        return 0
    state, groups = training_state(model, optimizer)
    reader = dcp.HuggingFaceStorageReader(found[-1])
    try:
        saved = reader.read_metadata().state_dict_metadata  # without parameters that never had a gradient
        state["optimizer"] = {k: v for k, v in state["optimizer"].items() if f"optimizer.{k}.step" in saved}
        dcp.load(state, storage_reader=reader)
    except (Exception, dcp.api.CheckpointException) as e:  # the latter is no Exception
        raise UserError(f"{found[-1]} is damaged ({type(e).__name__}): delete it and start again") from e
    some = states.StateDictOptions(strict=False)  # tied weights were saved once
    states.set_model_state_dict(model, state["model"], options=some)
    moments = {"state": state["optimizer"], "param_groups": groups}
    states.set_optimizer_state_dict(model, optimizer, moments, options=some)
    say(f"resuming after step {int(found[-1].name[5:])} from {found[-1]}")
    return int(found[-1].name[5:])


def save_model(model, tokenizer, folder):
    """Gather the weights and write a Hugging Face folder, in fp32. In bf16 the small updates of a next stage would be
    rounded away (the neighbours of 0.02 are 1.2e-4 away)."""
    state = states.get_model_state_dict(model, options=states.StateDictOptions(full_state_dict=True, cpu_offload=True))
    with whole_folder(folder) as part:
        if dist.get_rank() == 0:
            model.save_pretrained(part, state_dict=untied(model, state))
            tokenizer.save_pretrained(part)
            (part / "README.md").write_text(model_card(folder.parent))


def model_card(output):
    """The model card of a run's model, which push_to_hub keeps: the method, the base model, the command, args.json."""
    about = json.loads((output / "args.json").read_text())
    base, paper = about["settings"]["model"], about.get("paper", "")
    paper = re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1) ", paper)
    base_model = "" if os.path.isdir(base) else f"base_model: {base}\n"  # the hub takes no local folder there
    head = f"---\n{base_model}library_name: transformers\n---\n\n# {output.name}\n\n{paper}\n\nPlease cite the paper.\n"
    command = f"\nTrained from `{base}`:\n\n```sh\n{about['command']}\n```\n"
    return (
        f"{head}{command}\nAll arguments, and the digest of the data:\n\n```json\n{json.dumps(about, indent=1)}\n```\n"
    )


def learning_rate(step, total, args):
    """Linear warm-up, then constant or a cosine to 0. `step` counts from 0; the first step already learns."""
    warmup = args.warmup if args.warmup >= 1 else math.ceil(args.warmup * total)
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def open_log(args, output, start):
    """Open OUTPUT/log.jsonl -> ({step: line} of the evaluations until step `start`, a function log(line)).

    log appends a line, prints it, and sends it to the tracker. Lines after `start` are dropped, because their steps are
    taken again. Raises UserError if the package for --track is not installed.
    """
    file, track, kept = output / "log.jsonl", None, []
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else ():
        if not line.endswith(b"}\n") or json.loads(line)["step"] > start:  # the last line may be torn
            break
        kept.append(line)
    dist.barrier()
    if dist.get_rank() == 0:
        track = args.track and open_tracker(args, output, start)
        file.touch()
        os.truncate(file, sum(map(len, kept)))

    def log(line):
        if dist.get_rank() == 0:
            with open(file, "a") as f:
                f.write(json.dumps(line) + "\n")
            if track:
                track(line)
        say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))

    return {x["step"]: x for x in map(json.loads, kept) if "eval_loss" in x}, log


def is_best(evaluations, step):
    """Whether the model after `step` steps is the best so far, by eval_reward if there is one, else by eval_loss. The
    untrained model does not compete."""
    values = {s: x.get("eval_reward", -x["eval_loss"]) for s, x in evaluations.items() if s > 0}
    return step > 0 and values.pop(step) > max(values.values(), default=-math.inf)


def open_tracker(args, output, start):
    """-> track(line). A resumed run continues its curves."""
    try:
        module = importlib.import_module("torch.utils.tensorboard" if args.track == "tensorboard" else args.track)
    except ImportError as e:
        raise UserError(f"--track {args.track}: not installed: pip install {args.track}") from e
    if args.track == "tensorboard":
        writer = module.SummaryWriter(output / "tensorboard", purge_step=start + 1, flush_secs=10)
        return lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in line.items()]
    own = {"id": hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]} if args.track == "wandb" else {}
    run = module.init(project="ranking", name=output.name, config=vars(args), resume="allow", **own)
    return lambda line: run.log(line, step=line["step"])  # trackio has wandb's interface


STOP = {"asked": False, "save": None}  # whether a signal came; the function that saves the run


def on_stop(save):
    """From now on SIGTERM, SIGINT and SIGHUP stop the run after the current row: `save` is called, the command that
    continues is printed, and the exit code is 0."""
    STOP.update(asked=False, save=save)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, lambda *_: STOP.update(asked=True))


def stop_if_asked():
    """Stop the run if any process received a signal. A collective: all processes call it at the same place."""
    if STOP["save"] and any(all_sum([STOP["asked"]])):
        STOP["save"]()
        each = os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())  # processes on each machine
        torchrun = f"torchrun --nproc_per_node {each} " if "RANK" in os.environ else "python "
        command = torchrun + shlex.join([*(a for a in sys.argv if a != "--resume"), "--resume"])
        say(f"stopped by a signal; continue with: {command}")
        sys.exit(0)
