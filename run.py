"""A training run: its folder, its steps, its checkpoints."""

import importlib
import json
import math
import os
import pathlib
import random
import secrets
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

import runtime
from common import UserError
from files import Claim, agree, as_dict, file_digest, provenance, read_json, remove, rename_synced, write_atomically
from runtime import all_sum, on_process0, plan_rows, say, unique_tokens

FREE_ARGS = {"output", "resume", "overwrite", "allow_changed", "checkpoint_every", "keep_checkpoints"}
FREE_ARGS |= {"log_every", "track"}
# dense bf16, the first name that is in the device's: half of what NVIDIA's product pages print with sparsity for A100,
# H100 and H200, as torchtitan's get_peak_flops has them; H200 NVL, which it lacks: H100 NVL's, and as users measure it
PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


class Run:
    """A training run: its folder, its place in time, and what surrounds each step.

    OUTPUT/args.json      the arguments, the data's digest, the versions; locked while the run lives
    OUTPUT/log.jsonl      one line a logged step, and one an evaluation on --eval_data
    OUTPUT/tensorboard/   --track tensorboard: the same figures; wandb.id: of --track wandb, which run this is
    OUTPUT/checkpoints/step-N/   DCP shards of weights and optimizer, safetensors; meta.json, their checksums, last
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
        self.settings |= provenance(self.settings)
        self.signal = self.track = None
        on_process0(self._import_tracker)
        on_process0(self._claim_folder)
        agree(self.settings, self.output / "args.json", f"--output {self.output}")
        if self.finished:
            on_process0(self._drop_checkpoints)  # a run killed at its very end left them
            say(f"{self.output} is finished: its model is in {self.model_folder}")
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    # -- the loop

    def begin(self, model, optimizer, tokenizer, encoded):
        """What the steps train and on which encoded prompts (a list that may change between steps); restores the newest
        checkpoint and sets `start`, the first step to take."""
        self.model, self.optimizer, self.tokenizer, self.encoded = model, optimizer, tokenizer, encoded
        self.row_budget = 1 if self.args.padded else runtime.row_tokens(self.args, self.device)  # 1: a prompt a row
        self.start = self.restore(model, optimizer) if self.args.resume and not self.args.overwrite else 0
        self.evaluated = on_process0(self._evaluations)  # step -> what the best is chosen by
        if self.args.track and self.process == 0:
            self._open_tracker()

    def plan(self, prompts):
        """-> each process's rows over these prompts, as plan_rows gives them, and the encoded prompts."""
        encoded = [self.encoded[i] for i in prompts]
        return plan_rows(encoded, self.row_budget, self.world), encoded

    def steps(self, batches, held_out=()):
        """Yield (step, the prompts of its global batch) from `start` on, its learning rate set; after each one save a
        checkpoint where it is due. Before a step that --eval_every divides and after the last one yield the held-out
        prompts, for which there are no gradients; `training` says which they are."""
        rows = runtime.describe_plan(*self.plan(batches[0]), self.row_budget)
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
        before = [v for s, v in self.evaluated.items() if s > 0]  # the untrained model is no candidate
        line["best"] = step > 0 and value > max(before, default=-math.inf)
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
            batch = runtime.make_batch([self.encoded[i] for i in row], self.args, self.tokenizer, self.device)
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
            if self.track:
                self.track(line)
            tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))

    def _import_tracker(self):
        """Import what --track asks for, and say at once if it is not there."""
        name = self.args.track
        try:
            self._tracking = name and importlib.import_module(f"torch.utils.{name}" if name == "tensorboard" else name)
        except ImportError as e:
            raise UserError(f"--track {name}: {name} is not installed: pip install {name}") from e

    def _open_tracker(self):
        """Set `track`, which is given each line of the log. TensorBoard's files are written anew from the lines that
        are there; Weights & Biases passes over steps that its run has already."""
        if self.args.track == "tensorboard":
            remove(self.output / "tensorboard")
            writer, lines = self._tracking.SummaryWriter(self.output / "tensorboard"), self._log_lines()

            def log(figures, step):
                for name, value in figures.items():
                    writer.add_scalar(name, value, step)
                writer.flush()  # a killed run's too

        else:
            known = self.output / "wandb.id"
            lines = [] if known.exists() else self._log_lines()
            if not known.exists():
                write_atomically(known, secrets.token_hex(8))
            about = {"name": self.output.name, "dir": str(self.output), "config": self.settings}
            log = self._tracking.init(id=known.read_text(), resume="allow", **about).log
        self.track = lambda line: log({k: float(v) for k, v in line.items() if k != "step"}, step=line["step"])
        for line in lines:
            self.track(line)

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
        before = self._claim.before
        if before is not None and "settings" not in as_dict(before):
            raise UserError(f"--output {out}: its args.json is no run's: name another folder")
        if self.args.overwrite:
            ours = ("checkpoints", "model", "model.part", "best", "best.part", "bootstrap", "log.jsonl", "latest")
            for name in (*ours, "tensorboard", "wandb", "wandb.id"):
                remove(out / name)
        elif begun and not self.args.allow_changed:
            changed = Claim.changed(before["settings"], self.settings, "--") if before else "args.json is empty or torn"
            if changed:
                hint = f"{changed} (--allow_changed accepts them)"
                raise UserError(f"--resume {out}: arguments differ from the run's: {hint}")
            return
        versions = {m: sys.modules[m].__version__ for m in ("torch", "transformers")}
        versions["python"] = sys.version.split()[0]
        about = {"command": shlex.join(sys.argv), "settings": self.settings, "versions": versions, "world": self.world}
        self._claim.write(about)

    # -- checkpoints

    def _state(self, model, optimizer):
        """-> the tensors of a checkpoint, and the optimizer's whole state: its settings are the flags', not saved. A
        tied weight is there once."""
        tied, of_optimizer = getattr(model, "all_tied_weights_keys", {}), get_optimizer_state_dict(model, optimizer)
        weights = {k: v for k, v in get_model_state_dict(model).items() if k not in tied}
        return {"model": weights, "optimizer": of_optimizer["state"]}, of_optimizer

    def save(self, step, model, optimizer):
        """Write OUTPUT/checkpoints/step-N under a temporary name, rename it, change `latest`, drop old ones.
        Safetensors only: reading a checkpoint runs no code."""
        folder = self.output / "checkpoints" / f"step-{step:08d}"
        part = folder.with_name(f"part-{step:08d}")
        infinite = sum(not getattr(p, "_local_tensor", p).isfinite().all() for p in model.parameters())
        if all_sum([infinite])[0]:
            good = self.latest() or "none yet"
            raise UserError(f"the weights after step {step} are not finite; the last checkpoint ({good}): lower --lr")
        if on_process0(lambda: folder.exists() or remove(part)):
            return  # as after a kill between the renaming and the next step
        try:
            writer = dcp.HuggingFaceStorageWriter(part, save_distributed=True)
            dcp.save(self._state(model, optimizer)[0], storage_writer=writer)
            digests = self._digests(part)
            on_process0(lambda: self._publish(part, folder, step, digests))
        except (OSError, RuntimeError, SafetensorError, dcp.api.CheckpointException) as e:
            raise UserError(f"the checkpoint of step {step} could not be saved ({self._reason(e)}") from e

    def _reason(self, e):
        """The end of a sentence about what could not be saved: why, and what is left."""
        full = any(x in str(e) for x in ("No space left", "File too large", "Disk quota"))
        reason = "the disk is full" if full else str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
        latest = self._whole()[-1:]
        return f"{reason}); " + (f"the one before, {latest[0]}, is whole" if latest else "there is no older one")

    def _digests(self, folder):
        """{file: sha256} of a checkpoint's shards; each process reads its share."""
        shards, everyone = sorted(p.name for p in folder.glob("*.safetensors")), [None] * self.world
        own = {name: file_digest(folder / name) for name in shards[self.process :: self.world]}
        dist.all_gather_object(everyone, own)
        return {name: digest for some in everyone for name, digest in some.items()}

    def _publish(self, part, folder, step, digests):
        try:
            meta = {"step": step, "world": self.world, "sha256": digests}
            write_atomically(part / "meta.json", json.dumps(meta))
            rename_synced(part, folder)
            write_atomically(self.output / "latest", folder.name + "\n")
        except OSError as e:
            raise UserError(f"the checkpoint of step {step} could not be saved ({self._reason(e)}") from e
        for old in self._whole()[: -self.args.keep_checkpoints]:
            os.replace(old, doomed := old.with_name(f"part-{old.name}"))  # never half deleted under a whole one's name
            remove(doomed)

    def _whole(self):
        folders = (self.output / "checkpoints").glob("step-*")
        return sorted(p for p in folders if (p / "meta.json").exists())

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
        meta = on_process0(lambda: as_dict(read_json((folder / "meta.json").read_bytes())))
        step, damaged = meta.get("step"), self._digests(folder) != meta.get("sha256")
        if damaged or type(step) is not int:
            raise UserError(f"{folder} is damaged (its checksums differ): delete it; --resume takes the one before")
        state, of_optimizer = self._state(model, optimizer)
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder))
        set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))  # a tied weight once
        set_optimizer_state_dict(model, optimizer, of_optimizer | {"state": state["optimizer"]})
        on_process0(lambda: self._cut_log(step))
        say(f"resuming after step {step} from {folder}")
        return step

    def _cut_log(self, step):
        """Drop the log's lines after `step`: these steps are about to be taken again."""
        log = self.output / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        steps = [as_dict(read_json(x)).get("step") for x in lines]  # a torn line has none
        kept = [x for x, s in zip(lines, steps) if x.endswith("\n") and type(s) is int and s <= step]
        if len(kept) < len(lines):
            write_atomically(log, "".join(kept))

    def _log_lines(self):
        log = self.output / "log.jsonl"
        return [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []

    def _evaluations(self):
        return {x["step"]: x.get("eval_reward", -x["eval_loss"]) for x in self._log_lines() if "eval_loss" in x}

    def _save_model(self, folder):
        """Gather the weights and write a folder: safetensors, tokenizer, generation config. In fp32: of bf16 weights a
        next stage at a small --lr would move hardly any (one of 0.02 has its neighbours 1.2e-4 away)."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on process 0 alone, one tensor at a time
        state = get_model_state_dict(self.model, options=options)
        try:
            on_process0(lambda: save_model(self.model, state, self.tokenizer, folder))
        except UserError as e:
            raise UserError(f"the model could not be saved in {folder} ({self._reason(e)}: --resume goes on") from e

    def finish(self):
        """Save a last checkpoint, should the disk be full now; write OUTPUT/model; then drop the checkpoints."""
        self.save(self.total, self.model, self.optimizer)
        self._save_model(self.model_folder)
        if self.evaluated:
            best = max((s for s in self.evaluated if s > 0), key=self.evaluated.get)
            say(f"best on --eval_data: step {best}, in {self.output / 'best'}")
        on_process0(self._drop_checkpoints)
        say(f"model saved in {self.model_folder}")

    def _drop_checkpoints(self):
        for name in ("checkpoints", "latest", "latest.part", "log.jsonl.part"):  # .part: of a run killed while writing
            remove(self.output / name)


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


def speed(model, tokens, seconds, device):
    """-> {"tok/s": unique tokens a second over all processes}, and on a known GPU "MFU": 6 FLOPs a token and parameter
    of the layers, against the dense bf16 peak; embedding and head, read at few positions, are not counted."""
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    flops = 6 * sum(p.numel() for m in runtime.decoder_layers(model) for p in m.parameters()) * tokens / seconds
    return {"tok/s": tokens / seconds} | ({"MFU": flops / dist.get_world_size() / peak} if peak else {})


def peak_flops(name):
    """-> the dense bf16 FLOP/s of a GPU by its name, None of one that PEAK_FLOPS lacks."""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def save_model(model, state, tokenizer, folder):
    """Write a Hugging Face folder from a full state dict, under a temporary name, then renamed."""
    part = folder.with_name(folder.name + ".part")
    remove(part)
    config = type(model.config).from_dict(model.config.to_dict() | {"use_cache": True})
    plain_class = next(c for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))
    with torch.device("meta"):
        blank = plain_class(config)  # the architecture without FSDP's wrapping
    tied = blank.all_tied_weights_keys  # {name: the weight it shares}: a full state dict holds both
    if blank.can_generate():  # reward models cannot
        blank.generation_config = model.generation_config
    try:
        blank.save_pretrained(part, state_dict={k: v for k, v in state.items() if k not in tied})
        tokenizer.save_pretrained(part)
        remove(folder)  # a best one; killed here, the resumed run makes it again
        rename_synced(part, folder)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise UserError(str(e)) from e
