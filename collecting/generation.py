"""Responses of a model on this machine, with their log-probabilities."""

import functools
import zlib

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, StopStringCriteria
from transformers.generation import TopPLogitsWarper

import common
from common import UserError

TURNS = ("Human:", "human:", "Assistant:", "assistant:")  # a response to a dialogue ends before these (PRO's code)


@functools.cache
def load_generator(name, device, bf16=False):
    """-> (model, tokenizer) for inference on `device`: bf16 on CUDA and with --bf16, else fp32.

    Loaded at the first call: what is all done loads none.
    """
    dtype = torch.bfloat16 if bf16 or device.type == "cuda" else torch.float32
    model = common.load_pretrained(AutoModelForCausalLM, name, dtype=dtype)
    return model.to(device).eval(), common.load_tokenizer(name, model=model)


class ChosenLogprobs:
    """A logits processor that changes nothing.

    It keeps each chosen token's log-probability, before temperature and top_p, instead of all logits.
    """

    def __init__(self):
        self.last, self.chosen = None, []

    def __call__(self, input_ids, logits):
        """input_ids [B, L + t], logits [B, V] of the next token."""
        self._keep(input_ids)
        self.last = logits.float().log_softmax(-1)
        return logits

    def _keep(self, input_ids):
        if self.last is not None:
            self.chosen.append(self.last.gather(1, input_ids[:, -1:]))

    def all(self, sequences):
        """sequences [B, L + T], all that was generated -> [B, T]."""
        self._keep(sequences)
        return torch.cat(self.chosen, 1)


class Draw:
    """The last logits processor: torch.multinomial's draw, as the largest of what it returns. It draws the noise of all
    rows of a batch, of which `left` are left: a seed gives the same responses wherever the batch is cut."""

    def __init__(self, temperature, top_p, rows, left):
        self.temperature, self.rows, self.left = temperature, rows, left
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else lambda _, logits: logits

    def __call__(self, input_ids, logits):
        """input_ids [B, L + t], logits [B, V] of the rows that are left."""
        noise = torch.empty(self.rows, logits.shape[1], device=logits.device).exponential_()
        return self.top_p(input_ids, logits / self.temperature).softmax(-1) / noise[self.left]


class Ended:
    """A stopping criterion that knows which rows have ended, by EOS or a stop string. Once half have, it stops all."""

    def __init__(self, model, tokenizer, ends, stop):
        self.ends, self.cut = torch.tensor(ends, device=model.device), is_plain(model)
        self.rows = torch.zeros_like(self.ends[0], dtype=torch.bool)
        self.stop = StopStringCriteria(tokenizer, list(stop)) if stop else lambda *_: self.rows

    def __call__(self, input_ids, scores, **kwargs):
        """-> [B]"""
        self.rows = self.rows | torch.isin(input_ids[:, -1], self.ends) | self.stop(input_ids, scores)
        return self.rows | (self.cut & (2 * self.rows.sum() >= len(self.rows)))


def generate_rows(model, tokenizer, input_ids, mask, cache, *, length, temperature, top_p, stop, options):
    """-> (new tokens, their log-probabilities), a list a row: until it has ended or is `length` tokens long. A batch
    waits for its longest response; so each time half of its rows have ended, the others go on without them."""
    left = torch.arange(len(input_ids), device=model.device)
    tokens, logprobs, rows = [[] for _ in left], [[] for _ in left], len(left)
    while len(left) and input_ids.shape[1] < length:
        chosen, ended = ChosenLogprobs(), Ended(model, tokenizer, options["eos_token_id"], stop)
        draw, start = [Draw(temperature, top_p, rows, left)] * (temperature > 0), input_ids.shape[1]
        own = {"logits_processor": [chosen, *draw], "stopping_criteria": [ended], "past_key_values": cache}
        own |= {"max_new_tokens": length - start, "return_dict_in_generate": True}
        out = model.generate(input_ids=input_ids, attention_mask=mask, **own, **options)
        found = zip(left.tolist(), out.sequences[:, start:].tolist(), chosen.all(out.sequences).tolist())
        for row, ids, theirs in found:
            tokens[row] += ids
            logprobs[row] += theirs
        on, cache = (~ended.rows).nonzero()[:, 0], out.past_key_values
        left, input_ids = left[on], out.sequences[on]
        mask = F.pad(mask[on], (0, input_ids.shape[1] - start), value=1)
        if ended.cut:
            cache.batch_select_indices(on)
    return tokens, logprobs


def is_plain(model):
    """Whether the model's cache is keys and values of every token, neither a state nor a window."""
    return not (getattr(model.config.get_text_config(), "sliding_window", None) or model._is_stateful)


def shared_tokens(model, ids):
    """How many tokens the prompts begin with in common, each keeping one of its own, where that is worth a pass by
    itself. None for a model whose cache is a state or a window: padding will stand behind these tokens."""
    shared = min(common.shared_start(ids[0], x[:-1]) for x in ids)
    return shared if len(ids) > 1 and shared >= 32 and is_plain(model) else 0


def text_behind(tokenizer, prompt, new):
    """The text of new tokens behind a prompt's. Alone they could lose a space: SentencePiece drops it at a start."""
    head, both = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt[-8:], prompt[-8:] + new))
    return both[len(head) :]


def without_join(prompt, text):
    """`text` without the space that common.encode puts before it again. All other white space was drawn, and stays."""
    return text[1:] if text == common.space_before(prompt, text[1:]) + text[1:] else text


# fmt: off
@torch.inference_mode()
def generate(model, tokenizer, prompts, *, max_new_tokens, num_samples=1, temperature=0.0, top_p=1.0, num_beams=1,
             max_prompt_length=None, min_new_tokens=0, stop=()):
    # fmt: on
    """Generate `num_samples` responses to each prompt -> a list per prompt of {text, logprob, num_tokens, finished}.

    temperature 0 is greedy (or beam search). What the prompts begin with in common, and each prompt for all its
    samples, is read once: its cache is repeated. logprob is the sum of the model's own log-probabilities, before
    temperature and top_p, of the num_tokens tokens. EOS counts in neither (an empty response is its EOS): servers
    leave it out too, and `rank --by logprob`. finished: it ended by itself within max_new_tokens. EOS cannot be
    among the first min_new_tokens. The text ends before the first of the `stop` strings, and then without white
    space. Otherwise it is what was drawn: common.encode gives its tokens.
    """
    if 0 < temperature < 1e-3:
        raise UserError(f"--temperature {temperature} is too small to divide by: 0 is greedy")
    ids = [common.cut_left(tokenizer, common.prompt_ids(tokenizer, p), max_prompt_length or 2**30) for p in prompts]
    L, S = max(map(len, ids)), shared_tokens(model, ids) if num_beams == 1 else 0
    pad = tokenizer.eos_token_id  # it ends a row that a stop string ended
    input_ids = torch.tensor([x[:S] + [pad] * (L - len(x)) + x[S:] for x in ids], device=model.device)
    mask = torch.tensor([[1] * S + [0] * (L - len(x)) + [1] * (len(x) - S) for x in ids], device=model.device)
    cache = None
    if S:
        cache = model(input_ids[:1, :S], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(ids))
    if num_samples > 1 and num_beams == 1:
        if L > 1 + S:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, S:-1]
            inputs = {"input_ids": input_ids[:, S:-1], "attention_mask": mask[:, :-1], "position_ids": positions}
            cache = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        if L > 1:
            cache.batch_repeat_interleave(num_samples)
        input_ids, mask = input_ids.repeat_interleave(num_samples, 0), mask.repeat_interleave(num_samples, 0)
    own = model.generation_config  # its min_p, suppress_tokens, ... would shape the candidates: only its EOS ids count
    listed = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({pad, *listed} - {None})  # Llama-3 and Qwen list several
    model.generation_config = GenerationConfig()  # generate() would fill in from the model's what is not said here
    # under FSDP the weights are gathered (on_policy.gathered): ranks do not wait for each other
    options = {"pad_token_id": pad, "eos_token_id": ends, "synced_gpus": False}
    options |= {"min_length": L + min_new_tokens} if min_new_tokens else {}
    if num_beams == 1:
        more = {"length": L + max_new_tokens, "temperature": temperature, "top_p": top_p, "stop": stop}
        tokens, logprobs = generate_rows(model, tokenizer, input_ids, mask, cache, options=options, **more)
    else:
        options |= {"num_beams": num_beams, "num_return_sequences": num_samples, "max_new_tokens": max_new_tokens}
        options |= {"stop_strings": list(stop) or None, "tokenizer": tokenizer}
        tokens = model.generate(input_ids=input_ids, attention_mask=mask, **options)[:, L:].tolist()
    model.generation_config = own
    responses = []
    for row, sequence in enumerate(tokens):
        end = next((i for i, token in enumerate(sequence) if token in ends), len(sequence))
        text = text_behind(tokenizer, ids[row // num_samples], sequence[:end])
        cut = min((text.index(s) for s in stop if s in text), default=None)
        text = text if cut is None else text[:cut].rstrip()
        num_tokens = max(1, end)
        response = {
            "text": without_join(prompts[row // num_samples], text),
            "num_tokens": num_tokens,
            "finished": cut is not None or end < len(sequence),
        }
        if num_beams == 1:
            response["logprob"] = sum(logprobs[row][:num_tokens])
        responses.append(response)
    return [responses[i : i + num_samples] for i in range(0, len(responses), num_samples)]


OPTIONS = ("max_new_tokens", "min_new_tokens", "max_prompt_length", "num_samples", "temperature", "top_p", "num_beams")


def options_of(args):
    """What a command's flags say about `generate`, as far as it has them -> keyword arguments."""
    return {k: getattr(args, k) for k in OPTIONS if hasattr(args, k)} | {"stop": unescape(args.stop)}


def new_tokens(args, default):
    """--max_new_tokens, else 512 for Alpaca's responses (Tuna's released code), else the verb's own default."""
    return args.max_new_tokens or {"alpaca": 512}.get(args.task, default)


def unescape(strings):
    """The --stop strings; UserError for an empty one, before which every response would end."""
    if "" in strings:
        raise UserError("--stop: an empty string would end every response at once")
    return tuple(s.replace("\\n", "\n") for s in strings)


def batches_by_length(records, batch_size):
    """The records in batches of similar prompt length, longest first, so that too little memory shows at once."""
    order = sorted(records, key=lambda r: -len(r["prompt"]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def seeded_batches(args, records, journal, batch_size, process, processes, device):
    """Yield (batch, model, tokenizer) for every batch of this process that is not all done, the draw seeded by the
    batch's own content and planned over all prompts: a restart, or another number of processes, samples the same."""
    batches = [b for b in batches_by_length(records, batch_size) if not all(r["id"] in journal.done for r in b)]
    for batch in tqdm(batches[process::processes], desc=args.verb, disable=process != 0):
        model, tokenizer = load_generator(args.model, device, args.bf16)
        torch.manual_seed(zlib.crc32(f"{args.seed} {batch[0]['id']}".encode()))
        yield batch, model, tokenizer
