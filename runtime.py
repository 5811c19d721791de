"""What training and inference need of the machine: processes, loading, FSDP2, attention backends, the row plan."""

import bisect
import contextlib
import csv
import datetime
import errno
import math
import os
import pathlib
import signal
import sys
import time
import traceback
import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention.flex_attention import BlockMask
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

import common
from common import UserError, dense_mask, encode, pack, pack_padded, sees, shared_start
from files import read_json

CPU_BLOCK = 64  # queries that attend_blocks takes at a time
FLEX_BLOCK = 128  # FlexAttention's block: packed rows are filled up to whole ones
# what a file, a folder, a flag or the machine may be at fault for; any other error is a mistake of this program
OUTSIDE = (OSError, ValueError, KeyError, EOFError, RecursionError, MemoryError, zlib.error)
OUTSIDE += (csv.Error, SafetensorError, TemplateError)


def run_cli(main):
    """Call `main` as a command. A UserError, and what else files and flags are at fault for, is one line and exit code
    2; an error of this program's own is one line and exit code 1; --debug adds the traceback. Every process leaves at
    once: the others may wait for it in a collective."""
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        main()
    except KeyboardInterrupt:
        leave("interrupted: what is written stays; the same command goes on from there", 130)
    except Exception as e:
        if debug:
            traceback.print_exc()
        said = " ".join(str(e).split())[:500]
        if isinstance(e, UserError):
            leave(f"error: {e}", 2)
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            where = f" ({e.filename})" if e.filename else ""
            leave(f"error: {e.strerror}{where}: free some space and run the same command again", 2)
        if isinstance(e, torch.OutOfMemoryError):
            help = "for training add --activation_checkpointing or lower --max_tokens_per_row, for answers --batch_size"
            leave(f"error: out of GPU memory: {help} ({said[:160]})", 2)
        if isinstance(e, OUTSIDE):
            leave(f"error: {type(e).__name__}: {said} (a file or a flag is not as expected; --debug shows where)", 2)
        leave(f"error: {type(e).__name__}: {said} (this program's mistake: please report what --debug prints)", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def leave(message, code):
    """Print `message` and end this process. A process other than 0 waits first: mostly process 0 says the same, and
    torchrun ends the others."""
    process = int(os.environ.get("RANK", 0))
    if process:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    name = pathlib.Path(sys.argv[0]).name + (f", process {process}" if process else "")
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        os._exit(code)  # not by way of the process group: its end would wait for the others
    sys.exit(code)


def attend_blocks(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention over a packed row, CPU_BLOCK queries at a time over the keys that one of them sees: what no token sees
    is hardly computed; FlexAttention does so on CUDA but has no backward on CPU. query [1, H, T, D], key and value
    [1, KV, T, D] -> ([1, T, H, D], None), as transformers' AttentionInterface asks; SDPA for any other mask."""
    blocks = getattr(attention_mask, "blocks", None)
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    out = []
    for queries, (keys, mask) in zip(query.split(CPU_BLOCK, dim=2), blocks, strict=True):
        k, v, mask = key.index_select(2, keys), value.index_select(2, keys), mask.to(query.dtype)
        out.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, **options))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("blocks", attend_blocks)
AttentionMaskInterface.register("blocks", sdpa_mask)  # of padded rows


def key_blocks(end, device="cpu"):
    """The mask for attend_blocks, from end [T] of a row: `blocks` holds, for CPU_BLOCK queries each, the keys that one
    of them sees and 0 or -inf [queries, keys]. The tensor itself is one number seen as [1, 1, T, T]."""
    position = torch.arange(len(end))
    mask = torch.ones((), dtype=torch.bool, device=device).expand(1, 1, len(end), len(end))
    mask.blocks = []
    for queries in position.split(CPU_BLOCK):
        keys = position[: queries[-1] + 1]
        keys = keys[end[keys] > queries[0]]
        visible = torch.where(sees(end, queries[:, None], keys), 0.0, -torch.inf)
        mask.blocks.append(tuple(x.to(device, non_blocking=True) for x in (keys, visible)))
    return mask


def block_mask(end, device):
    """FlexAttention's mask on `device`, from end [T] of a row of whole blocks: nothing of size T x T."""
    ends = end.view(-1, FLEX_BLOCK)
    first = torch.arange(0, len(end), FLEX_BLOCK)[:, None]  # the first query of each block
    seen = (ends.amax(1) > first).tril()  # [blocks of queries, blocks of keys]: some pair is visible
    whole = (ends.amin(1) >= first + FLEX_BLOCK).tril(-1)  # all are
    end = end.to(device, non_blocking=True)
    ordered = []
    for blocks in (seen & ~whole, whole):
        order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
        ordered += [x.int()[None, None].to(device, non_blocking=True) for x in (blocks.sum(-1), order)]
    return BlockMask.from_kv_blocks(*ordered, BLOCK_SIZE=FLEX_BLOCK, mask_mod=lambda b, h, q, k: sees(end, q, k))


def added_tokens(encoded_records):
    """The records' numbers in the order that puts shared prompts side by side -> [(number, its tokens, those of them
    that the one before it began with)]."""
    order, before = [], []
    for i in sorted(range(len(encoded_records)), key=lambda i: encoded_records[i].prompt_ids):
        e = encoded_records[i]
        order.append((i, e.num_tokens, shared_start(e.prompt_ids, before)))
        before = e.prompt_ids
    return order


def unique_tokens(encoded_records):
    """What a row of these records holds, but for starts that the candidates of a prompt share."""
    return sum(tokens - shared for _, tokens, shared in added_tokens(encoded_records))


def plan_rows(encoded_records, max_tokens, world):
    """Share out prompts over the rows of `world` processes -> rows[process], a list of (indices, weight).

    Prompts that share a start stand in one row, which reads it once. The number of rows is the smallest multiple of
    `world` with every row within `max_tokens` (a prompt longer than that has a row of its own), and the longest of them
    is then as short as it can be. Processes get equally many rows, since each forward is a collective under FSDP: one
    that runs out repeats a row with weight 0.
    """
    order = added_tokens(encoded_records)

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
    rows = [sorted(row) for _, row in sorted(zip(loads, rows), reverse=True)]  # equally long ones side by side
    plan = [[(row, 1.0) for row in rows[process::world]] for process in range(world)]
    return [mine + [(rows[-1], 0.0)] * (len(plan[0]) - len(mine)) for mine in plan]


def describe_plan(plan, encoded_records, max_tokens):
    """-> "7 rows each, 93% full, the slowest process 2% over the mean": processes wait for each other at every row."""
    loads = [[unique_tokens([encoded_records[i] for i in row]) for row, _ in rows] for rows in plan]  # [world][rows]
    steps, total = list(zip(*loads)), sum(map(sum, loads))
    full = total / (len(plan) * len(steps) * max(max_tokens, *map(max, steps)))
    over = sum(map(max, steps)) * len(plan) / total - 1
    return f"{len(steps)} rows each, {full:.0%} full, the slowest process {over:.0%} over the mean"


def init_distributed():
    """-> (process, world, device): nccl on CUDA, gloo on CPU, a group of one without torchrun."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which torch 2.9 to 2.13 reads first
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # rows differ in length: no fragments
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    transformers_logging.disable_progress_bar()  # a bar a process for loading and saving weights says nothing
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # gloo also on CUDA: flags and objects travel without a GPU sync
    options = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    options["timeout"] = datetime.timedelta(days=7)  # one that has collected its share waits for the slowest
    dist.init_process_group(backend, **options)
    return dist.get_rank(), dist.get_world_size(), device


def on_process0(fn):
    """Call fn on process 0 and give every process its result, or its UserError."""
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = fn()
        except UserError as e:
            box[1] = str(e)
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def load_pretrained(auto_class, name, flag="--model", allow_pickle=False, **kwargs):
    """auto_class.from_pretrained from safetensors only (a pickle can run code), no remote code; errors name `flag`."""
    try:
        if not auto_class.__name__.startswith("AutoModel"):
            return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)
        options = {"trust_remote_code": False, "use_safetensors": None if allow_pickle else True}
        loaded = auto_class.from_pretrained(name, **kwargs | options | {"output_loading_info": True})
        check_weights(*loaded, whole=auto_class is AutoModelForCausalLM)
        return loaded if kwargs.get("output_loading_info") else loaded[0]
    except Exception as e:  # a folder may hold anything
        reason = str(e).strip().splitlines()[0][:300] if str(e).strip() else type(e).__name__
        if list(pathlib.Path(name).glob("*.bin")) and not list(pathlib.Path(name).glob("*.safetensors")):
            reason = "its weights are pickles, which can run code: convert them to safetensors, or add --allow_pickle"
        hint = f"; python demo/get_{name[5:]}.py makes it" if name in ("demo/model", "demo/encoder") else ""
        raise UserError(f"{flag} {name}: cannot be loaded ({reason}){hint}") from e


def check_weights(model, info, whole):
    """Raise ValueError where weights and config do not fit: what lacks would begin at random, what has no place would
    be left out. Outside the layers only a `whole` model must be complete: other tasks' models have other heads."""
    place = next((n for n, m in model.named_modules() if m is decoder_layers(model)), None)
    layers = tuple(p + "." for p in (place, place and place.removeprefix(f"{model.base_model_prefix}.")) if p)
    buffers = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq")  # of older checkpoints
    if lacks := sorted(k for k in info["missing_keys"] if whole or k.startswith(layers)):
        raise ValueError(f"its weights lack {', '.join(lacks[:3])}")
    if over := sorted(k for k in info["unexpected_keys"] if k.startswith(layers) and not k.endswith(buffers)):
        raise ValueError(f"its config.json has no place for {len(over)} of its weights: {', '.join(over[:3])}")


def load_tokenizer(name, flag="--model"):
    tokenizer = load_pretrained(AutoTokenizer, name, flag)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {name}: the tokenizer has no EOS token, which must end every response")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by id
    return tokenizer


def check_vocabulary(model, tokenizer, name):
    """Raise UserError where the tokenizer knows tokens that the model has no embedding of."""
    rows = model.get_input_embeddings().num_embeddings
    if (tokens := max(tokenizer.get_vocab().values(), default=0) + 1) > rows:
        raise UserError(f"{name}: its tokenizer has {tokens} tokens, its embedding {rows}: they do not belong together")


def run_name(model):
    """What a model is called in records and reports: its folder's name, or its run's where that is RUN/model (or
    RUN/best: RUN-best)."""
    path = pathlib.Path(model)
    return path.parent.name + "-best" * (path.name == "best") if run_settings(model) else path.name


def run_settings(model):
    """The arguments of the run that left this model, RUN/model or RUN/best -> dict, empty where it is no run's."""
    path = pathlib.Path(model)
    ours = path.name in ("model", "best") and (path.parent / "args.json").is_file()
    found = read_json((path.parent / "args.json").read_bytes()) if ours else {}  # a foreign file may hold anything
    return found["settings"] if isinstance(found, dict) and isinstance(found.get("settings"), dict) else {}


def load_for_training(args, device, auto_class=AutoModelForCausalLM, **kwargs):
    """-> (model, tokenizer). fp32 master weights, computing_dtype; FSDP2-sharded over all processes, layer by layer,
    then the root. Process 0 alone reads the checkpoint and gives the others their shards."""
    tokenizer = load_tokenizer(args.model)
    auto = "sdpa" if args.padded else "flex" if device.type == "cuda" else "blocks"
    attn = auto if args.attn == "auto" else args.attn
    loaded = []

    def load():
        options = {"allow_pickle": args.allow_pickle, "dtype": torch.float32} | kwargs
        loaded.append(load_pretrained(auto_class, args.model, **options))
        return loaded[0].config, getattr(loaded[0], "generation_config", None)

    config, generation_config = on_process0(load)
    if loaded:
        check_vocabulary(loaded[0], tokenizer, f"--model {args.model}")
    model = loaded[0] if loaded else unfilled(auto_class, config, generation_config)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window and getattr(model.config, "use_sliding_window", True) and window < args.max_length and not args.padded:
        raise UserError(f"--model {args.model}: its sliding window of {window} is below --max_length; add --padded")
    model.config.use_cache = False
    args.attn = set_attention(model, attn, args.attn)
    every = args.activation_checkpointing
    every = decide_checkpointing(model, args, device) if every == "auto" else every
    if every:
        checkpoint_layers(model, every)
    weights = model.state_dict() if loaded else {}
    if args.compile:
        compile_layers(model)
    model = shard(model.train(), device, args.bf16)
    if dist.get_world_size() > 1:
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        for buffer in model.buffers():  # rotary frequencies and their like are in no state dict
            dist.broadcast(buffer, src=0)
    return model, tokenizer


def set_attention(model, attn, asked="auto"):
    """Give the model the attention `attn`: flex, blocks, or sdpa -> its name in the config, which pack_for's masks are
    for. A model that FlexAttention is not for gets blocks; where --attn `asked` for flex, a UserError."""
    text, why = model.config.get_text_config(), None
    if attn == "flex":
        if not model._supports_flex_attn:
            why = "has no FlexAttention"
        elif dropout := getattr(text, "attention_dropout", 0):
            why = f"has attention_dropout {dropout}, which FlexAttention lacks"
        elif head_size(text) < 16:
            why = f"has heads of {head_size(text)}, where FlexAttention on CUDA wants 16 or more"
        if why and asked == "flex":
            raise UserError(f"--attn flex: {type(model).__name__} {why}; leave the flag out, or take --attn blocks")
    if attn == "flex" and not why:
        model.set_attn_implementation("flex_attention")
    elif attn in ("blocks", "flex") and model.config._attn_implementation == "sdpa":  # some models need their own
        model.set_attn_implementation("blocks")
    return model.config._attn_implementation


def head_size(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def row_tokens(args, device):
    """Tokens of a packed row: --max_tokens_per_row."""
    return args.max_tokens_per_row or (8192 if device.type == "cuda" else 1024)


def decide_checkpointing(model, args, device):
    """--activation_checkpointing auto -> 1 (every layer) or 0: benchmarks/SCALE.md's arithmetic against nine tenths of
    the free memory of the GPU that has the least; a CPU has nothing to decide."""
    if device.type != "cuda":
        return 0
    free = torch.tensor(torch.cuda.mem_get_info(device)[0])
    dist.all_reduce(free, dist.ReduceOp.MIN)
    need, less = training_bytes(model, row_tokens(args, device), dist.get_world_size())
    every = int(need > 0.9 * free.item())
    has = f"{free / 1e9:.0f} GB free: {'every' if every else 'no'} layer is checkpointed"
    say(f"a GPU needs {need / 1e9:.0f} GB as it is, {less / 1e9:.0f} GB with activation checkpointing, and has {has}")
    return every


def checkpoint_layers(model, every):
    """Recompute every `every`-th layer in the backward; before fully_shard."""
    old = model.gradient_checkpointing_enable  # its name in transformers 5.17; 5.23 warns of it
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False}, every_n_layers=every)


def training_bytes(model, tokens, world):
    """-> (bytes that a GPU needs for a row of so many tokens, bytes with activation checkpointing): the sum of what
    benchmarks/scale.py names and lets torch count, for Llama's kind of layer."""
    config, layers = model.config.get_text_config(), decoder_layers(model)
    layer, total = (sum(p.numel() for p in m.parameters()) for m in (layers[0], model))
    root = total - layer * len(layers)
    heads, H = config.num_attention_heads, config.hidden_size
    width = (heads + (getattr(config, "num_key_value_heads", None) or heads)) * head_size(config)  # q, output; k, v
    kept = tokens * (16 * H + 4 * width + 8 * (getattr(config, "intermediate_size", None) or 4 * H) + 4 * heads + 8)
    fixed = 16 * total / world + 2 * root + 10 * layer + 10 * 2**27  # state, gathered, reduced, logits
    return fixed + kept * len(layers), fixed + kept + 2 * H * tokens * len(layers)


def compile_layers(model, **options):
    """torch.compile each layer, before fully_shard: norms, rotary embedding and the MLP's products in one kernel each.
    Rows differ in length: their number of tokens is dynamic."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, **options)


def unfilled(auto_class, config, generation_config):
    """A model whose weights are memory that nobody has touched, so it takes none: process 0 fills it after sharding.
    Were each of 8 processes to read a 7B checkpoint, the machine would hold 216 GB of fp32 weights."""
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.generation_config = generation_config
    return model


def computing_dtype(device, bf16=False):
    """bf16 on CUDA and under --bf16, else fp32."""
    return torch.bfloat16 if bf16 or device.type == "cuda" else torch.float32


def shard(model, device, bf16=False):
    """FSDP2 over all processes, layer by layer, then the root; gradients are summed in fp32. Alone in fp32: no FSDP."""
    dtype = computing_dtype(device, bf16)
    if dist.get_world_size() > 1 or dtype is torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for part in (*decoder_layers(model), model):  # embedding and head stay with the root: they may be tied
            fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


@contextlib.contextmanager
def gathered(model):
    """Within it every process holds all weights, in the computing dtype: each may generate on its own, without the
    others. Under no_grad alone: inference mode would leave weights behind that cannot be trained. FlexAttention would
    compile anew as the cache grows: SDPA reads it."""
    parts, attention = [m for m in model.modules() if hasattr(m, "unshard")], model.config._attn_implementation
    if attention == "flex_attention":
        model.set_attn_implementation("sdpa")
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield model
    finally:
        for m in parts:
            m.set_reshard_after_forward(m is not model, recurse=False)  # as fully_shard sets them up
            m.reshard()
        if attention == "flex_attention":
            model.set_attn_implementation(attention)


def decoder_layers(model):
    """The transformer's blocks: the longest ModuleList of the model, whatever the architecture calls it."""
    return max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len, default=[])


def encode_all(tokenizer, records, args):
    """encode() for every record; prints how much the length limits cut."""
    bar = tqdm(records, desc="tokenising", leave=False, disable=dist.get_rank() != 0)
    if (args.max_prompt_length or 0) >= args.max_length:
        raise UserError(f"--max_length {args.max_length} leaves no response beside --max_prompt_length's prompts")
    encoded = [encode(tokenizer, r, args.max_length, args.max_prompt_length) for r in bar]
    prompts, responses = sum(e.prompt_cut > 0 for e in encoded), sum(e.responses_cut for e in encoded)
    candidates, tokens = sum(len(e.responses) for e in encoded), sum(e.num_tokens for e in encoded)
    say(
        f"{len(encoded)} prompts, {candidates} candidates, {tokens} tokens; "
        f"cut to fit: {prompts} prompts (left), {responses} responses (right)"
    )
    return encoded


def pack_for(attn, encoded_records, device):
    """pack() on `device` with the mask that the attention `attn` of a model's config reads."""
    if attn == "flex_attention":
        return pack(encoded_records, lambda end: block_mask(end, device), FLEX_BLOCK).to(device)
    return pack(encoded_records, (lambda end: key_blocks(end, device)) if attn == "blocks" else dense_mask).to(device)


def make_batch(encoded_records, args, tokenizer, device):
    """pack_for() the model's attention or, with --padded, pack_padded(), on `device`."""
    if args.padded:
        return pack_padded(encoded_records, tokenizer.pad_token_id).to(device)
    return pack_for(args.attn, encoded_records, device)


def check_packing(model, encoded, args, tokenizer, device, score=None):
    """common.check_packing in a run's rows: a model that cannot take them: --padded."""
    if args.padded:
        return
    try:
        common.check_packing(model, encoded, lambda row: make_batch(row, args, tokenizer, device), score)
    except UserError as e:
        raise UserError(f"--model {args.model}: {e}; add --padded") from e
    if hasattr(model, "reshard"):
        model.reshard()  # a forward leaves the root gathered: an optimizer made now would hold the gathered weights


def say(*text):
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, text)), file=sys.stdout)
        sys.stdout.flush()


def all_sum(values):
    """Sum numbers, or a tensor [n], over all processes, each by itself -> floats. One collective, one GPU sync."""
    total = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    dist.all_reduce(total)
    return total.tolist()


def clip_grad_norm(model, max_norm):
    """Clip to `max_norm` -> the norm before clipping, a float that every process agrees on."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def require_data(path, how):
    """Raise UserError with `how`, the commands that make `path`, where it is missing."""
    if not pathlib.Path(path).exists():
        raise UserError(f"--data {path} is not there. Make it with:\n{how}")
