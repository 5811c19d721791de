"""What the three methods share: packed rows, length-normalised scores, flags. No loss lives here.

The one idea of the shared computation: what sequences begin with in common, the prompt of n candidates or the examples
before several prompts, is read once. A row is a prefix tree, depth first: a prompt, its candidates, the next prompt. A
token sees its ancestors and itself; its position is its depth; logits are made where a response token is predicted.

    encode(tokenizer, record)        one prompt and its candidates as token ids
    pack(encoded_records)            a row of one or more of them; pack_padded: the plain way, one sequence a candidate
    candidate_logprobs(model, batch) sum of token log-probabilities and token count of every candidate
    check_packing(model, encoded)    whether the model's forward can take such rows
"""

import argparse
import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

HUMAN = ("human", "reference")  # sources written by people (or given with the data) rather than sampled


class UserError(Exception):
    """A mistake the user can mend: shown as one sentence on stderr, exit code 2, no traceback."""


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        plain = action.default in (None, []) or action.default is False or "default:" in action.help
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def in_range(kind, low=-math.inf, high=math.inf, above=-math.inf, also=None):
    """An argparse type: a finite number with low <= x <= high and x > above, or the word `also`."""

    def parse(text):
        if text == also:
            return text
        x = kind(text)
        if not (low <= x <= high and x > above and abs(x) < 2**63):  # not so of nan
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return x

    parse.__name__ = kind.__name__
    return parse


@dataclasses.dataclass
class Encoded:
    """One record as token ids. Candidate i is `prompt_ids + responses[i]`; a whole response ends with EOS."""

    id: str | None
    prompt_ids: list[int]
    responses: list[list[int]]
    prompt_cut: int  # tokens cut from the left of the prompt
    responses_cut: int  # responses that were cut from the right

    @property
    def num_tokens(self):
        return len(self.prompt_ids) + sum(map(len, self.responses))


def encode(tokenizer, record, max_length=512, max_prompt_length=None):
    """Tokenise a record's prompt (with the tokenizer's own special tokens) and its responses (without) apart, so that
    the boundary never merges; space_before says what stands between. A whole response ends with EOS: one that is
    neither cut here nor marked `finished: false`.

    A prompt keeps its last `max_prompt_length` tokens, its BOS and one more always; then a response its first ones that
    fit `max_length` with it. Without `max_prompt_length` responses go first: the prompt has what they leave.
    """
    prompt = prompt_ids(tokenizer, record["prompt"])
    limit = max_length - min(len(prompt), max_prompt_length or 2, max_length - 2)
    twice = tokenizer("a a", add_special_tokens=False).input_ids
    own_space = twice[: len(twice) // 2] == twice[len(twice) // 2 :]  # SentencePiece begins each text with a space
    responses = []
    for c in record["candidates"]:
        text = c["text"] if own_space else space_before(record["prompt"], c["text"]) + c["text"]
        ids = tokenizer(text, add_special_tokens=False).input_ids
        whole = c.get("finished") is not False or not ids  # of nothing there would be nothing to score
        responses.append(ids + [tokenizer.eos_token_id] * whole)
    longest = min(limit, max(map(len, responses)))
    kept = cut_left(tokenizer, prompt, min(max_prompt_length or max_length, max_length - longest))
    cut = sum(len(r) > limit for r in responses)
    return Encoded(record.get("id"), kept, [r[:limit] for r in responses], len(prompt) - len(kept), cut)


def space_before(prompt, text):
    """The rule of the join, in training, scoring, and export: a space between prompt and response, unless there is
    white space already or no response. Generation strips it off again."""
    return "" if not text or prompt[-1:].isspace() or text[0].isspace() else " "


def prompt_ids(tokenizer, text):
    """The prompt's tokens with the tokenizer's own special tokens, BOS once and no EOS."""
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)  # a chat template wrote it
    ids = tokenizer(text, add_special_tokens=not has_bos).input_ids
    if not ids:
        raise UserError(f"the prompt {text!r} has no tokens in this tokenizer: leave its record out")
    closed = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if closed else ids  # some tokenizers close every text with EOS


def cut_left(tokenizer, ids, room):
    """The last `room` tokens of a prompt, its BOS kept in front where it has one."""
    bos = ids[:1] if ids[:1] == [tokenizer.bos_token_id] and room > 1 else []
    return ids if len(ids) <= room else bos + ids[len(ids) - room + len(bos) :]


@dataclasses.dataclass
class PackedBatch:
    """One row: the prefix tree of some prompts and their candidates (or, padded: one sequence a candidate).

    input_ids [1, T]   position_ids [1, T]   attention_mask [1, 1, T, T] bool, or what else the attention reads
    logit_positions [R], targets [R]: where token r is predicted, and its id
    token_index [C], candidate_index [C]: prediction token_index[c] counts for candidate candidate_index[c]
    last_positions [N]: where each candidate's last token stands
    sizes: candidates of each prompt; num_candidates N = sum(sizes); longest: tokens of the longest prompt + response
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
    sizes: list[int]
    num_candidates: int
    longest: int

    def to(self, device):  # a BlockMask, or blocks that a copy would lose, are there already
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor) and not hasattr(v, "blocks")}
        if torch.device(device).type == "cuda":  # only pinned memory is copied while the GPU computes
            tensors = {k: v.pin_memory() for k, v in tensors.items()}
        return dataclasses.replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


def sees(end, query, key):
    """Whether the token at row position `query` sees the one at `key`: an ancestor, or itself."""
    return (key <= query) & (query < end[key])


def dense_mask(end):
    """end [T] of a row -> attention mask [1, 1, T, T] bool: what every attention takes."""
    position = torch.arange(len(end))
    return sees(end, position[:, None], position)[None, None]


def shared_start(a, b):
    """How many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def pack(encoded_records, mask_of=dense_mask, block=1):
    """Pack encoded records into one row, a prefix tree -> PackedBatch.

    Sorted, the sequences prompt + response stand beside those that they share most with: each adds to the row what the
    one before it did not begin with. So a token's descendants stand right behind it, up to end[token]. `mask_of` makes
    the mask from end [T]; tokens that no other one sees fill the row up to a multiple of `block`.
    """
    sequences = [(e.prompt_ids + r, len(e.prompt_ids)) for e in encoded_records for r in e.responses]
    ids, positions, end, path, before = [], [], [], [], []  # path: where in the row the tokens of a sequence stand
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
    mask = mask_of(torch.tensor(end + [len(ids) + fill] * fill))
    tensors = [F.pad(torch.tensor(x)[None], (0, fill)) for x in (ids, positions)] + [mask]
    tensors += [*torch.tensor([*predictions]).T, *torch.tensor(uses).T, torch.tensor(last_positions)]
    return PackedBatch(*tensors, [len(e.responses) for e in encoded_records], len(sequences), max(positions) + 1)


def pack_padded(encoded_records, pad_id=0):
    """The plain way, the reference for `pack`: each candidate a sequence of its own, padded right -> PackedBatch."""
    sequences = [(e.prompt_ids + r, len(e.prompt_ids)) for e in encoded_records for r in e.responses]
    L = max(len(tokens) for tokens, _ in sequences)
    input_ids = [tokens + [pad_id] * (L - len(tokens)) for tokens, _ in sequences]
    mask = [[1] * len(tokens) + [0] * (L - len(tokens)) for tokens, _ in sequences]  # by length: pad is often EOS
    uses = [(n * L + k - 1, x[k], n) for n, (x, P) in enumerate(sequences) for k in range(P, len(x))]
    logit_positions, targets, candidate_index = zip(*uses)
    last_positions = [n * L + len(tokens) - 1 for n, (tokens, _) in enumerate(sequences)]
    indices = [logit_positions, targets, range(len(uses)), candidate_index, last_positions]
    tensors = [torch.tensor(input_ids), None, torch.tensor(mask), *map(torch.tensor, indices)]
    return PackedBatch(*tensors, [len(e.responses) for e in encoded_records], len(sequences), L)


def candidate_logprobs(model, batch, max_logits=2**27):
    """-> (logprobs [N], lengths [N]): each candidate's sum of token log-probabilities, EOS included, and token count;
    both fp32. More than `max_logits` logits are made in chunks, if check_packing found that the model allows it.
    Raises UserError where refuse_misread does; check_packing finds other models that would misread a packed row."""
    plain = getattr(model, "module", model)  # what DistributedDataParallel wraps
    refuse_misread(plain.config, batch)
    chunk = max(1, max_logits // plain.config.get_text_config().vocab_size)
    if len(batch.targets) > chunk and getattr(plain, "plain_head", False):
        token_logprobs, _ = chunked_logprobs(model, batch, chunk)
    else:
        logits = logits_of(model, batch).flatten(0, 1)  # [R, V], or padded [N * L, V]
        logits = logits[batch.logit_positions] if batch.position_ids is None else logits
        token_logprobs = -F.cross_entropy(logits.float(), batch.targets, reduction="none")  # [R]
    token_logprobs = token_logprobs[batch.token_index]  # [C]: a token that candidates share counts for each
    zeros = token_logprobs.new_zeros(batch.num_candidates)
    logprobs = zeros.index_add(0, batch.candidate_index, token_logprobs)
    lengths = zeros.index_add(0, batch.candidate_index, torch.ones_like(token_logprobs))
    return logprobs, lengths


def logits_of(model, batch):
    """The model's logits: [1, R, V] where a packed row predicts, [N, L, V] of padded sequences."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if batch.position_ids is not None:  # by logits_to_keep: under fully_shard only the root's forward gathers the head
        inputs |= {"position_ids": batch.position_ids, "logits_to_keep": batch.logit_positions}
    return model(**inputs).logits


def chunked_logprobs(model, batch, chunk):
    """-> (token log-probabilities [R], whether they are right). For this one forward the head scores `chunk` positions
    at a time, again in the backward. Wrong where a model changes what its head gave it (softcapping)."""
    head, given = getattr(model, "module", model).get_output_embeddings(), []
    whole = head.forward

    def score(hidden, targets):
        return -F.cross_entropy(whole(hidden).float(), targets, reduction="none")

    def forward(hidden):  # [1, R, H] -> [1, R, 1]
        parts = zip(hidden[0].split(chunk), batch.targets.split(chunk))
        given.append(torch.cat([checkpoint(score, *x, use_reentrant=False) for x in parts])[None, :, None])
        return given[0]

    head.forward = forward
    try:
        scores = logits_of(model, batch)
    finally:
        del head.forward
    return scores[0, :, 0], scores is given[0]


def refuse_misread(config, batch):
    """Raise UserError where a model of this config would misread a packed row without a word: attention that adds the
    mask to its scores or ignores it, states that run on, a sliding window, whose own mask a packed row's replaces."""
    if batch.position_ids is None:
        return
    attn, text = config._attn_implementation, config.get_text_config()
    fit = ("sdpa", "blocks") if isinstance(batch.attention_mask, torch.Tensor) else ("flex_attention",)
    if attn not in fit[hasattr(batch.attention_mask, "blocks") :]:
        raise UserError(f"attention {attn!r} misreads packed rows: take attn_implementation={fit[0]!r}, or pack_padded")
    if other := {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}:
        raise UserError(f"its layers ({', '.join(sorted(other))}) read a packed row as one text: use pack_padded")
    window = getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None)
    if window and window < batch.longest:
        raise UserError(f"a sliding window of {window} is shorter than {batch.longest} tokens: use pack_padded")


@torch.no_grad()
def check_packing(model, encoded_records, make_batch=pack, score=None):
    """Raise UserError for a model that misreads packed rows, before they spoil a run: what ignores their mask or their
    positions. Finds out for candidate_logprobs whether the logits are what the head gives.

    score(batch) -> [N] or [N, D], by default mean token log-probabilities, must agree packed and padded. Rounding, in
    bf16 coarse, may take them apart a quarter as far as the mask, or the positions, of plain text do."""
    plain, training = getattr(model, "module", model), model.training
    sequences = [e.prompt_ids + r for e in encoded_records for r in e.responses]
    P = min(128, max(map(len, sequences)) // 2)  # a prompt of so many tokens, 16 responses of 8
    text = [*itertools.islice(itertools.cycle(itertools.chain(*sequences)), P + 16 * 8)]
    some = [Encoded(None, text[:P], [text[i : i + 8] for i in range(P, len(text), 8)], 0, 0)]
    packed = make_batch(some)
    row = packed.input_ids[0].tolist()
    as_text = make_batch([Encoded(None, row[:1], [row[1:]], 0, 0)])
    wrong = [dataclasses.replace(packed, **{k: getattr(as_text, k)}) for k in ("attention_mask", "position_ids")]
    batches = [x.to(next(plain.parameters()).device) for x in (pack_padded(some), packed, *wrong)]
    model.eval()
    padded, *scores = map(score or (lambda batch: torch.div(*candidate_logprobs(model, batch))), batches)
    gap, *wrong = ((s - padded).norm().item() for s in scores)
    if not gap <= max(1e-3, min(wrong) / 4):  # NaN is no pass
        raise UserError(f"packed and padded rows differ by {gap:.2g}; a wrong mask does by {min(wrong):.2g}")
    if not score:
        _, plain.plain_head = chunked_logprobs(model, batches[1], len(batches[1].targets))
    model.train(training)


def length_normalized(logprobs, lengths, exponent):
    """[N], [N] -> [N]; exponent a number or a tensor [N] (lambda of RESCUE Sec. 3, beta of Tuna Eq. 3)."""
    return logprobs / lengths**exponent


def pair_statistics(scores, levels):
    """One prompt's scores [n] and preference levels [n], larger better -> (ordered pairs that the scores put in order,
    ordered pairs, sum of s_better - s_worse over them), scalars. Equal levels are no pair."""
    better = levels[:, None] > levels[None, :]  # [n, n]
    gap = scores[:, None] - scores[None, :]
    return ((gap > 0) & better).sum(), better.sum(), (gap * better).sum()


# fmt: off
def add_training_flags(parser, *, model, lr, schedule, warmup, epochs, batch_size):
    """The flags that all training scripts share; PAPERS.md says which defaults are printed and which are not."""
    add = parser.add_argument_group("data and model").add_argument
    add("--data", help="candidates file, JSONL")
    add("--output", help="folder for the run: log, checkpoints, and the final model in OUTPUT/model")
    add("--model", default=model, help="hub id or folder")
    add("--allow_pickle", action="store_true", help="load .bin weights too: they can run code, so trust their author")
    add("--max_train_samples", type=in_range(int, 1), help="use only the first N records")
    add("--eval_data", help="held-out records: their loss and pair accuracy in the log, the best step in OUTPUT/best")
    add("--eval_every", type=in_range(int, 1), default=100, help="steps between evaluations; the last step always")
    add("--max_length", type=in_range(int, 8), default=512, help="tokens of prompt + response")
    add("--max_prompt_length", type=in_range(int, 2), help="of them, cut on the left (unset: what responses leave)")
    add = parser.add_argument_group("optimisation (PAPERS.md says where each default stands)").add_argument
    add("--lr", type=in_range(float, above=0), default=lr, help="peak learning rate")
    add("--schedule", choices=["cosine", "constant"], default=schedule, help="after the warm-up")
    add("--warmup", type=in_range(float, 0), default=warmup, help="warm-up: steps, or below 1 a share of all steps")
    add("--epochs", type=in_range(int, 1), default=epochs, help="passes over the data")
    add("--batch_size", type=in_range(int, 1), default=batch_size, help="prompts per step over all processes")
    add("--max_grad_norm", type=in_range(float, above=0), default=1.0, help="gradient clipping")
    add("--seed", type=in_range(int, 0, 2**32), default=0, help="order of the data, dropout")
    add = parser.add_argument_group("rows and memory").add_argument
    add("--max_tokens_per_row", type=in_range(int, 1), help="of a packed row (default: CPU 1024, CUDA 8192)")
    add("--padded", action="store_true", help="one sequence a candidate: for sliding windows, state-space layers")
    add("--attn", choices=["auto", "blocks", "flex", "sdpa"], default="auto", help="auto: flex on CUDA, blocks on CPU")
    add("--activation_checkpointing", nargs="?", const=1, default="auto", type=in_range(int, 0, also="auto"),
        metavar="N", help="recompute every N-th layer (1: all, 0: none): less memory (default: all, if need be)")
    add("--bf16", action="store_true", help="compute in bf16 on CPU too: faster if lscpu shows avx512_bf16 or amx_bf16")
    add("--compile", action="store_true", help="torch.compile each layer: faster steps on CUDA, minutes at the start")
    add = parser.add_argument_group("the run's folder").add_argument
    add("--resume", action="store_true", help="continue from OUTPUT's newest checkpoint (or start, if there is none)")
    add("--overwrite", action="store_true", help="delete what an earlier run left in OUTPUT")
    add("--allow_changed", action="store_true", help="with --resume: accept arguments that differ from the run's")
    add("--checkpoint_every", type=in_range(int, 0), default=100, help="steps between checkpoints; 0: when interrupted")
    add("--keep_checkpoints", type=in_range(int, 1), default=1, help="how many of the newest checkpoints stay on disk")
    add("--log_every", type=in_range(int, 1), default=1, help="steps between log lines")
    add("--track", choices=["tensorboard", "wandb"], help="the log's figures there too (pip install it)")
# fmt: on
