"""What a training run needs around its loop: processes, loading, FSDP2, attention backends, row plan, the
run's folder, checkpoints."""

import bisect
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import pathlib
import random
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

import common
from common import UserError, dense_mask, encode, pack, pack_padded, sees, shared_start

FREE_ARGS = {"output", "resume", "overwrite", "allow_changed", "checkpoint_every", "keep_checkpoints", "log_every"}


CPU_BLOCK = 64  # queries that attend_blocks takes at a time


FLEX_BLOCK = 128  # FlexAttention's block: packed rows are filled up to whole ones


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, for the MFU of the log line


def run_cli(main):
    """Call `main` as a command: UserError becomes one line and exit code 2, on process 0 alone."""
    try:
        main()
    except UserError as e:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{pathlib.Path(sys.argv[0]).name}: error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        where = f" ({e.filename})" if e.filename else ""
        print(f"error: {e.strerror}{where}: free some space and run the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what is written stays; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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


def key_blocks(end):
    """The mask for attend_blocks, from end [T] of a row: `blocks` holds, for CPU_BLOCK queries each, the keys that one
    of them sees and 0 or -inf [queries, keys]. The tensor itself is one number seen as [1, 1, T, T]."""
    position = torch.arange(len(end))
    mask = torch.ones((), dtype=torch.bool).expand(1, 1, len(end), len(end))
    mask.blocks = []
    for queries in position.split(CPU_BLOCK):
        keys = position[: queries[-1] + 1]
        keys = keys[end[keys] > queries[0]]
        mask.blocks.append((keys, torch.where(sees(end, queries[:, None], keys), 0.0, -torch.inf)))
    return mask


def block_mask(end, device):
    """FlexAttention's mask on `device`, from end [T] of a row of whole blocks: nothing of size T x T."""
    from torch.nn.attention.flex_attention import BlockMask

    ends = end.view(-1, FLEX_BLOCK)
    first = torch.arange(0, len(end), FLEX_BLOCK)[:, None]  # the first query of each block
    seen = (ends.amax(1) > first).tril()  # [blocks of queries, blocks of keys]: some pair is visible
    whole = (ends.amin(1) >= first + FLEX_BLOCK).tril(-1)  # all are
    end = end.to(device)
    ordered = []
    for blocks in (seen & ~whole, whole):
        order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
        ordered += [x.int()[None, None].to(device) for x in (blocks.sum(-1), order)]
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
    for process in range(world):
        plan[process] += [(rows[-1], 0.0)] * (len(plan[0]) - len(plan[process]))
    return plan


def describe_plan(plan, encoded_records, max_tokens):
    """-> "7 rows each, 93% full, the slowest process 2% over the mean": processes wait for each other at every row."""
    loads = [[unique_tokens([encoded_records[i] for i in row]) for row, _ in rows] for rows in plan]  # [world][rows]
    steps, total = list(zip(*loads)), sum(map(sum, loads))
    full = total / (len(plan) * len(steps) * max(max_tokens, *map(max, steps)))
    over = sum(map(max, steps)) * len(plan) / total - 1
    return f"{len(steps)} rows each, {full:.0%} full, the slowest process {over:.0%} over the mean"


def init_distributed():
    """-> (process, world, device): nccl on CUDA, gloo on CPU, a group of one without torchrun."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    transformers_logging.disable_progress_bar()  # a bar a process for loading and saving weights says nothing
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # gloo also on CUDA: flags and objects travel without a GPU sync
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
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
    safe = {} if auto_class is AutoTokenizer else {"use_safetensors": None if allow_pickle else True}
    try:
        return auto_class.from_pretrained(name, **safe, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        reason = str(e).strip().splitlines()[0][:300] if str(e).strip() else type(e).__name__
        if list(pathlib.Path(name).glob("*.bin")) and not list(pathlib.Path(name).glob("*.safetensors")):
            reason = (
                "its weights are pickles, which can run code: convert them to safetensors, or train with --allow_pickle"
            )
        raise UserError(f"{flag} {name}: cannot be loaded ({reason})") from e


def load_tokenizer(name, flag="--model"):
    tokenizer = load_pretrained(AutoTokenizer, name, flag)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {name}: the tokenizer has no EOS token, which must end every response")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by id
    return tokenizer


def run_name(model):
    """What a model is called in records and reports: its folder's name, or its run's where that is RUN/model (or
    RUN/best: RUN-best)."""
    path = pathlib.Path(model)
    return path.parent.name + "-best" * (path.name == "best") if run_settings(model) else path.name


def run_settings(model):
    """The arguments of the run that left this model, RUN/model or RUN/best -> dict, empty where it is no run's."""
    path = pathlib.Path(model)
    args_file = path.parent / "args.json"
    ours = path.name in ("model", "best") and args_file.is_file()
    return (read_json(args_file.read_text()) or {}).get("settings", {}) if ours else {}


def load_for_training(args, device, auto_class=AutoModelForCausalLM, **kwargs):
    """-> (model, tokenizer). fp32 master weights, computing in bf16 on CUDA; FSDP2-sharded over all processes, layer by
    layer, then the root. Process 0 alone reads the checkpoint and gives the others their shards."""
    tokenizer = load_tokenizer(args.model)
    if args.attn == "auto":
        args.attn = "sdpa" if args.padded else "flex" if device.type == "cuda" else "blocks"
    attn = {"attn_implementation": "flex_attention"} if args.attn == "flex" else {}
    loaded = []

    def load():
        options = {"allow_pickle": args.allow_pickle, "dtype": torch.float32} | attn | kwargs
        loaded.append(load_pretrained(auto_class, args.model, **options))
        return loaded[0].config, getattr(loaded[0], "generation_config", None)

    config, generation_config = on_process0(load)
    model = loaded[0] if loaded else unfilled(auto_class, config, generation_config)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window and getattr(model.config, "use_sliding_window", True) and window < args.max_length and not args.padded:
        raise UserError(
            f"--model {args.model}: its sliding window of {window} tokens is below --max_length; add --padded"
        )
    model.config.use_cache = False
    if args.attn == "blocks" and model.config._attn_implementation == "sdpa":  # some models need their own
        model.set_attn_implementation("blocks")
    args.attn = model.config._attn_implementation  # make_batch's masks are for it
    if args.activation_checkpointing:
        options = {"use_reentrant": False}  # before fully_shard
        old = model.gradient_checkpointing_enable  # its name in transformers 5.17; 5.23 warns of it
        getattr(model, "activation_checkpointing_enable", old)(options, every_n_layers=args.activation_checkpointing)
    weights = model.state_dict() if loaded else {}
    model = shard(model.train(), device)
    if dist.get_world_size() > 1:
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        for buffer in model.buffers():  # rotary frequencies and their like are in no state dict
            dist.broadcast(buffer, src=0)
    return model, tokenizer


def unfilled(auto_class, config, generation_config):
    """A model whose weights are memory that nobody has touched, so it takes none: process 0 fills it after sharding.
    Were each of 8 processes to read a 7B checkpoint, the machine would hold 216 GB of fp32 weights."""
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.generation_config = generation_config
    return model


def shard(model, device, policy=None):
    """FSDP2 over all processes, layer by layer, then the root, with mixed precision `policy` (BF16 on CUDA); alone on a
    CPU the model stays as it is."""
    if dist.get_world_size() > 1 or device.type == "cuda":
        policy = policy or (BF16 if device.type == "cuda" else MixedPrecisionPolicy())
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)  # embedding and head stay with the root: they may be tied
    return model


@contextlib.contextmanager
def gathered(model):
    """Within it every process holds all weights, in the computing dtype: each may generate on its own, without the
    others. Under no_grad alone: inference mode would leave weights behind that cannot be trained."""
    parts = [m for m in model.modules() if hasattr(m, "unshard")]
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield model
    finally:
        for m in parts:
            m.set_reshard_after_forward(m is not model, recurse=False)  # as fully_shard sets them up
            m.reshard()


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
    return pack(encoded_records, key_blocks if attn == "blocks" else dense_mask).to(device)


def make_batch(encoded_records, args, tokenizer, device):
    """pack_for() the model's attention or, with --padded, pack_padded(), on `device`."""
    if args.padded:
        return pack_padded(encoded_records, tokenizer.pad_token_id).to(device)
    return pack_for(args.attn, encoded_records, device)


def check_packing(model, encoded, args, tokenizer, device):
    """common.check_packing on a run's two shortest prompts in its rows: a model that cannot take them: --padded."""
    if args.padded:
        return
    some, tolerance = sorted(encoded, key=lambda e: e.num_tokens)[:2], 1e-3 if device.type == "cpu" else 0.1  # bf16
    try:
        common.check_packing(model, some, tolerance, lambda row: make_batch(row, args, tokenizer, device))
    except UserError as e:
        raise UserError(f"--model {args.model}: {e}; add --padded") from e
    if hasattr(model, "reshard"):
        model.reshard()  # a forward leaves the root gathered: an optimizer made now would hold the gathered weights


def say(*text):
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, text)), file=sys.stdout)
        sys.stdout.flush()


def learning_rate(step, total, args):
    """Linear warm-up, then constant or a cosine to 0. `step` counts from 0; the first step already learns."""
    warmup = args.warmup if args.warmup >= 1 else math.ceil(args.warmup * total)
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def shuffled_batches(num_prompts, args):
    """The prompts of every step: each epoch a seeded shuffle in slices of --batch_size, its last one shorter."""
    batches = []
    for epoch in range(args.epochs):
        order = list(range(num_prompts))
        random.Random(f"{args.seed}-{epoch}").shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, num_prompts, args.batch_size)]
    return batches


def with_held_out(load_data, args):
    """load_data(args, path, limit) -> lists in step, for --data and --eval_data -> (the lists joined, the indices of
    the prompts to train on, of the held-out ones)."""
    columns = load_data(args, args.data, args.max_train_samples)
    train = range(len(columns[0]))
    if args.eval_data:
        columns = [own + more for own, more in zip(columns, load_data(args, args.eval_data, None))]
    return columns, train, range(len(train), len(columns[0]))


def all_sum(values):
    """Sum a list of tensors or numbers over all processes, each by itself -> floats. One collective, one sync."""
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in values])
    dist.all_reduce(total)
    return total.tolist()


def clip_grad_norm(model, max_norm):
    """Clip to `max_norm` -> the norm before clipping, a float that every process agrees on."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def speed(model, tokens, seconds, device):
    """-> {"tok/s": unique tokens a second over all processes}, and on a known GPU "MFU": 6 FLOPs a parameter and token
    against the dense bf16 peak."""
    peak = next(
        (f for name, f in PEAK_FLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None
    )
    flops = 6 * sum(p.numel() for p in model.parameters()) * tokens / seconds / dist.get_world_size()
    return {"tok/s": tokens / seconds} | ({"MFU": flops / peak} if peak else {})


def require_data(path, how):
    """Raise UserError with `how`, the commands that make `path`, where it is missing."""
    if not pathlib.Path(path).exists():
        raise UserError(f"--data {path} is not there. Make it with:\n{how}")


def file_digest(path):
    with open(path, "rb") as f:
        return (
            hashlib.file_digest(f, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(f.read()).hexdigest()
        )


class Claim:
    """A settings file that stays locked while its holder lives, so that two runs on one output refuse each other.

    before: what it held, or None. Raises UserError, beginning with `output` (the flag and its value), where another
    process holds it or it cannot be written.
    """

    def __init__(self, path, output):
        path = pathlib.Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+")  # noqa: SIM115, it stays open, locked
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another run is writing there") from None
        except OSError as e:
            raise UserError(f"{output}: cannot be written ({e.strerror})") from e
        self._file.seek(0)
        self.before = read_json(self._file.read())

    @staticmethod
    def changed(before, settings, prefix=""):
        """-> "name old -> new, ..." for the settings that differ from those before, or ""."""
        different = {k: v for k, v in settings.items() if before.get(k) != v}
        return ", ".join(f"{prefix}{k} {before.get(k)!r} -> {v!r}" for k, v in different.items())

    def write(self, content):
        self._file.truncate(0)
        json.dump(content, self._file, indent=1)
        self._file.flush()


class Run:
    """A training run: its folder, its place in time, and what surrounds each step.

    OUTPUT/args.json      the arguments, the data's digest, the versions; locked while the run lives
    OUTPUT/log.jsonl      one line a logged step, and one an evaluation on --eval_data
    OUTPUT/checkpoints/step-N/   DCP shards of weights and optimizer, meta.json written last
    OUTPUT/latest         names the newest checkpoint
    OUTPUT/model/         the trained model, a Hugging Face folder; best/: the same after the best evaluation

    The order of the data and the dropout seed derive from (seed, step), so a checkpoint's step number is its whole
    data and RNG state. In a script's loop:

        run.begin(model, optimizer, tokenizer, encoded)
        for step, prompts in run.steps(batches, held_out):          # sets the learning rate, saves checkpoints
            for row, weight, batch, levels in run.rows(prompts, all_levels):
                ...
                run.count(weight, pair_statistics(s, l), loss=loss)  # each prompt, for the log line
            if run.training:                                         # not where the prompts are the held-out ones
                run.check_finite(grad_norm)
                optimizer.step()
                run.log(grad_norm)
        run.finish()
    """

    def __init__(self, args, device):
        self.args, self.device, self.process, self.world = args, device, dist.get_rank(), dist.get_world_size()
        if args.batch_size < self.world:
            raise UserError(f"--batch_size {args.batch_size} is below the {self.world} processes")
        self.output = pathlib.Path(args.output)
        self.settings = {k: v for k, v in vars(args).items() if k not in FREE_ARGS}
        for flag in ("data", "eval_data"):
            if path := getattr(args, flag):
                self.settings[f"{flag}_sha256"] = on_process0(lambda path=path: file_digest(path))
        self.signal = None
        on_process0(self._claim_folder)
        if self.finished:
            say(f"{self.output} is finished: its model is in {self.model_folder}")
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    # -- the loop

    def begin(self, model, optimizer, tokenizer, encoded):
        """What the steps train and on which encoded prompts (a list that may change between steps); restores the newest
        checkpoint and sets `start`, the first step to take."""
        self.model, self.optimizer, self.tokenizer, self.encoded = model, optimizer, tokenizer, encoded
        a_row = self.args.max_tokens_per_row or (8192 if self.device.type == "cuda" else 1024)
        self.row_budget = 1 if self.args.padded else a_row  # padded: a prompt a row
        self.start = self.restore(model, optimizer)
        self.evaluated = on_process0(self._evaluations)  # step -> what the best is chosen by

    def plan(self, prompts):
        """-> each process's rows over these prompts, as plan_rows gives them, and the encoded prompts."""
        encoded = [self.encoded[i] for i in prompts]
        return plan_rows(encoded, self.row_budget, self.world), encoded

    def steps(self, batches, held_out=()):
        """Yield (step, the prompts of its global batch) from `start` on, its learning rate set; after each one save a
        checkpoint where it is due. Before a step that --eval_every divides and after the last one yield the held-out
        prompts, for which there are no gradients; `training` says which they are."""
        rows = describe_plan(*self.plan(batches[0]), self.row_budget)
        say(f"{len(batches)} steps of {self.args.batch_size} prompts on {self.world} processes; the first: {rows}")
        self.total, every = len(batches), self.args.checkpoint_every
        todo = range(self.start, self.total)
        for step in tqdm(todo, "training", initial=self.start, total=self.total, disable=self.process != 0):
            if held_out and step % self.args.eval_every == 0:
                yield from self._evaluate(step, held_out)
            self._start(step, batches[step], training=True)
            self.learning_rate = learning_rate(step, self.total, self.args)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate
            yield step, batches[step]
            if every and (step + 1) % every == 0 and step + 1 < self.total:
                self.save(step + 1, self.model, self.optimizer)
        if held_out:
            yield from self._evaluate(self.total, held_out)

    def _start(self, step, prompts, training):
        self.step, self.prompts, self.training, self.began = step, list(prompts), training, time.perf_counter()
        self.seen, self.losses, self.sums, self.figures = [], [], 0, {}

    def _evaluate(self, step, held_out):
        """Yield the held-out prompts, log what was counted, and the script's own `figures`, after so many steps, and
        keep the model where it is the best so far: by the reward if there is one, else by the loss."""
        if step in self.evaluated:
            return
        self._start(step, held_out, training=False)
        self.model.eval()
        with torch.no_grad():  # in the script's loop too, until it asks for the next prompts
            yield step, held_out
        self.model.train()
        if hasattr(self.model, "reshard"):
            self.model.reshard()  # a forward leaves the root gathered
        figures = self._means() | {"pairs": int(all_sum(self.sums[-2:-1])[0])} | self.figures
        line = {f"eval_{k}": v for k, v in figures.items()}
        value = line["eval_reward"] if "eval_reward" in line else -line["eval_loss"]
        line["best"] = all(value > before for before in self.evaluated.values())
        if line["best"]:
            self._save_model(self.output / "best")
        self.evaluated[step] = value
        self._write({"step": step} | line)

    def rows(self, prompts, *columns):
        """Yield (row, weight, batch, *values) for each row of this process's share of the step's `prompts`.

        row: the indices of its prompts. weight: 1, or 0 for a row that is repeated because other processes have one
        more. batch: their PackedBatch; batch.sizes says how many candidates each prompt has. values: each of `columns`
        (a tensor [n] for every prompt of the data) joined over the row's candidates, [N], on the device.
        A thread packs the next row meanwhile. Leaves the run after a row where it was told to stop.
        """
        torch.manual_seed(self.args.seed * 1_000_003 + self.step * self.world + self.process)  # dropout
        plan = [([prompts[i] for i in row], weight) for row, weight in self.plan(prompts)[0][self.process]]

        def make(row):
            values = [torch.cat([column[i] for i in row]) for column in columns]
            batch = make_batch([self.encoded[i] for i in row], self.args, self.tokenizer, self.device)
            return batch, *(v.to(self.device, non_blocking=True) for v in values)

        with ThreadPoolExecutor(1) as thread:
            waiting = [thread.submit(make, plan[0][0])]
            for n, (row, weight) in enumerate(plan, 1):
                batch, *values = waiting.pop().result()
                waiting += [thread.submit(make, row) for row, _ in plan[n : n + 1]]
                self.seen += [self.encoded[i].id for i in row]
                yield row, weight, batch, *values
                if self.interrupted():
                    self.stop()

    def count(self, weight, pair_statistics, **losses):
        """Add one prompt's losses (`loss` among them) and pair statistics to the step's log line."""
        self.names = list(losses)
        self.losses.append(losses["loss"].detach())
        self.sums = self.sums + weight * torch.stack([*losses.values(), *pair_statistics]).detach()

    def check_finite(self, grad_norm):
        """Raise UserError, naming the records, unless every prompt's loss and the gradient norm are finite."""
        finite = torch.stack(self.losses).isfinite().tolist()
        if all_sum([finite.count(False)])[0] == 0 and math.isfinite(grad_norm):
            return
        bad, everyone = [i for i, ok in zip(self.seen, finite) if not ok], [None] * self.world
        dist.all_gather_object(everyone, (bad, self.seen))
        names = sorted({i for b, _ in everyone for i in b} or {i for _, ids in everyone for i in ids})
        raise UserError(
            f"step {self.step + 1}: the loss or the gradient is not finite (records {', '.join(names)}); "
            f"the last checkpoint ({self.latest() or 'none yet'}) is good: look at these records, or lower --lr"
        )

    def log(self, grad_norm):
        """Where the step has a log line, append it to log.jsonl and print it, on process 0: losses a prompt, the share
        of ordered pairs that are scored in order, the mean gap of a pair's scores, better - worse."""
        if (self.step + 1) % self.args.log_every and self.step + 1 < self.total:
            return
        line = {"step": self.step + 1} | self._means() | {"grad_norm": grad_norm, "lr": self.learning_rate}
        tokens = unique_tokens([self.encoded[i] for i in self.prompts])
        self._write(line | speed(self.model, tokens, time.perf_counter() - self.began, self.device))

    def _means(self):
        *losses, in_order, pairs, gap = all_sum(self.sums)
        means = {k: v / len(self.prompts) for k, v in zip(self.names, losses)}
        return means | {"pair_accuracy": in_order / max(pairs, 1), "gap": gap / max(pairs, 1)}

    def _write(self, line):
        if self.process == 0:
            with open(self.output / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))

    def interrupted(self):
        """Whether any process was told to stop (SIGTERM, SIGINT); all learn it together, so call it on all."""
        return all_sum([self.signal is not None])[0] > 0

    def stop(self):
        """Save after an interruption, say how to go on, and leave with exit code 0."""
        if self.step > 0:  # before the first one there is nothing to save; AdamW's state is empty: DCP cannot load that
            self.save(self.step, self.model, self.optimizer)
        torchrun = f"torchrun --nproc_per_node {self.world} " if "RANK" in os.environ else "python "
        argv = [a for a in sys.argv if a not in ("--overwrite", "--resume")] + ["--resume"]
        say(f"stopped after step {self.step}; continue with: {torchrun}{shlex.join(argv)}")
        sys.exit(0)

    def _on_signal(self, number, frame):
        if self.signal:
            os._exit(128 + number)  # asked twice: leave at once
        self.signal = number

    # -- the folder

    @property
    def model_folder(self):
        return self.output / "model"

    @property
    def finished(self):
        return (self.model_folder / "config.json").exists()

    def _claim_folder(self):
        out, args_file = self.output, self.output / "args.json"
        content = {p.name for p in out.iterdir()} if out.is_dir() else {"a file"} if out.exists() else set()
        if content and "args.json" not in content:
            raise UserError(f"--output {out} holds something else than a run (no args.json): name another folder")
        begun = content > {"args.json"}  # a run that failed before its first step left nothing to lose
        if begun and not (self.args.resume or self.args.overwrite):
            raise UserError(
                f"--output {out} is not empty: continue it with --resume, replace it with --overwrite, "
                "or name another folder"
            )
        self._claim = Claim(args_file, f"--output {out}")
        if self.args.overwrite:
            for name in ("checkpoints", "model", "model.part", "best", "best.part", "bootstrap"):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in ("log.jsonl", "latest"):
                (out / name).unlink(missing_ok=True)
        before = self._claim.before
        if begun and before and not self.args.overwrite:
            changed = self._claim.changed(before["settings"], self.settings, "--")
            if changed and not self.args.allow_changed:
                hint = f"{changed} (--allow_changed accepts them)"
                raise UserError(f"--resume {out}: arguments differ from the run's: {hint}")
            if before["settings"] == self.settings:
                return
        versions = {m: sys.modules[m].__version__ for m in ("torch", "transformers")}
        versions["python"] = sys.version.split()[0]
        about = {"command": shlex.join(sys.argv), "settings": self.settings, "versions": versions, "world": self.world}
        self._claim.write(about)

    # -- checkpoints

    def save(self, step, model, optimizer):
        """Write OUTPUT/checkpoints/step-N under a temporary name, rename it, change `latest`, drop old ones."""
        folder = self.output / "checkpoints" / f"step-{step:08d}"
        part = folder.with_name(f"part-{step:08d}")
        on_process0(lambda: shutil.rmtree(part, ignore_errors=True))
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        try:
            if not on_process0(folder.exists):  # it does after a kill between the renaming and the next step
                dcp.save(state, checkpoint_id=part)
            on_process0(lambda: self._publish(part, folder, step))
        except (OSError, RuntimeError, dcp.api.CheckpointException) as e:
            # torch's zip writer says "unexpected pos" when a write came back short
            full = any(x in str(e) for x in ("No space left", "File too large", "Disk quota", "unexpected pos"))
            reason = "the disk is full" if full else str(e).strip().splitlines()[-1]
            latest = self.latest()
            whole = f"the one before, {latest}, is whole" if latest else "there is no older one"
            raise UserError(f"the checkpoint of step {step} could not be saved ({reason}); {whole}") from e

    def _publish(self, part, folder, step):
        try:
            if not folder.exists():
                write_atomically(part / "meta.json", json.dumps({"step": step, "world": self.world}))
                sync_folder(part)
                os.replace(part, folder)
            write_atomically(self.output / "latest", folder.name + "\n")
        except OSError as e:
            raise UserError(f"the checkpoint of step {step} could not be saved ({e.strerror})") from e
        for old in self._whole()[: -self.args.keep_checkpoints]:
            os.replace(old, doomed := old.with_name(f"part-{old.name}"))  # never half deleted under a whole one's name
            shutil.rmtree(doomed)

    def _whole(self):
        folders = (self.output / "checkpoints").glob("step-*")
        return sorted(p for p in folders if (p / "meta.json").exists() and (p / ".metadata").exists())

    def latest(self):
        """The newest whole checkpoint's folder, or None; an incomplete one is passed over with a word."""
        for part in (self.output / "checkpoints").glob("part-*"):
            say(f"{part} is incomplete: passed over")
        return (self._whole() or [None])[-1]

    def restore(self, model, optimizer):
        """Load the newest whole checkpoint, on any number of processes -> the step to go on from (0: none)."""
        folder = on_process0(self.latest)
        if folder is None:
            on_process0(lambda: self._cut_log(0))
            return 0
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        step = json.loads((folder / "meta.json").read_text())["step"]
        on_process0(lambda: self._cut_log(step))
        say(f"resuming after step {step} from {folder}")
        return step

    def _cut_log(self, step):
        """Drop the log's lines after `step`: these steps are about to be taken again."""
        log = self.output / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
        if len(kept) < len(lines):
            write_atomically(log, "".join(kept))

    def _evaluations(self):
        log = self.output / "log.jsonl"
        lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
        return {x["step"]: x.get("eval_reward", -x["eval_loss"]) for x in lines if "eval_loss" in x}

    def _save_model(self, folder):
        """Gather the weights and write a folder: safetensors in the computing dtype, tokenizer, generation config."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on process 0 alone, one tensor at a time
        state = get_model_state_dict(self.model, options=options)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        state = {k: v.to(dtype) for k, v in state.items()}
        on_process0(lambda: save_model(self.model, state, self.tokenizer, folder, dtype))

    def finish(self):
        """Write OUTPUT/model, then drop the checkpoints."""
        self._save_model(self.model_folder)
        if self.evaluated:
            say(f"best on --eval_data: step {max(self.evaluated, key=self.evaluated.get)}, in {self.output / 'best'}")
        on_process0(lambda: shutil.rmtree(self.output / "checkpoints", ignore_errors=True))
        on_process0(lambda: (self.output / "latest").unlink(missing_ok=True))
        say(f"model saved in {self.model_folder}")


def save_model(model, state, tokenizer, folder, dtype):
    """Write a Hugging Face folder from a full state dict, under a temporary name, then renamed."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    config = type(model.config).from_dict(model.config.to_dict() | {"use_cache": True})
    plain_class = next(c for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))
    with torch.device("meta"):
        blank = plain_class(config).to(dtype)  # the architecture without FSDP's wrapping
    tied = blank.all_tied_weights_keys  # {name: the weight it shares}: a full state dict holds both
    if blank.can_generate():  # reward models cannot
        blank.generation_config = model.generation_config
    try:
        blank.save_pretrained(part, state_dict={k: v for k, v in state.items() if k not in tied})
        tokenizer.save_pretrained(part)
        if folder.exists():
            shutil.rmtree(folder)  # a best one; killed here, the resumed run makes it again
        os.replace(part, folder)
    except (OSError, RuntimeError) as e:
        raise UserError(
            f"the model could not be saved in {folder} ({str(e).splitlines()[-1]}); "
            "the checkpoint is whole: --resume tries again"
        ) from e


def read_json(text):
    """The value of a JSON text, or None where it is empty or torn."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def write_atomically(path, text):
    """Replace a file's content so that a crash leaves the old or the new text, never a part."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def sync_folder(folder):
    """fsync every file of a folder: after a rename it must hold whole files even when the power goes."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
