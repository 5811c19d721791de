"""Responses of a model on this machine, with their log-probabilities."""

import functools
import zlib

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StopStringCriteria
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.generation import TopPLogitsWarper

import common
from common import UserError

TURNS = ("Human:", "human:", "Assistant:", "assistant:")  # a response to a dialogue ends before these (PRO's code)


def local_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def load_generator(name, device, bf16=False):
    """-> (model, tokenizer) for inference on `device`: bf16 on CUDA and with --bf16, else fp32.

    Loaded at the first call: what is all done loads none.
    """
    dtype = torch.bfloat16 if bf16 or device.type == "cuda" else torch.float32
    model = common.load_pretrained(AutoModelForCausalLM, name, dtype=dtype)
    return model.to(device).eval(), common.load_tokenizer(name, model=model)


def kept_by(model):
    """What a model keeps of the tokens it has read: "all" their keys and values, those in a "window", or a "state"."""
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if model._is_stateful or any(issubclass(layer, LinearAttentionLayer) for layer in layers):
        return "state"
    return "all" if layers == {DynamicLayer} else "window"


def padded(ids, pad, shared=0):
    """Prompts of different lengths -> (input_ids [B, L], mask [B, L]), padded behind the `shared` tokens."""
    L = max(map(len, ids))
    input_ids = [x[:shared] + [pad] * (L - len(x)) + x[shared:] for x in ids]
    mask = [[1] * shared + [0] * (L - len(x)) + [1] * (len(x) - shared) for x in ids]
    return torch.tensor(input_ids), torch.tensor(mask)


def read(model, input_ids, mask, cache=None):
    """Read input_ids [B, n], the last tokens of the sequences of mask [B, L]; the cache holds those before.
    -> (logits [B, V] of the next token, fp32; the cache)"""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if out.get("past_key_values") is None:
        raise UserError(f"{type(model).__name__} cannot generate here: it keeps no keys and values")
    return out.logits[:, -1].float(), out.past_key_values


# fmt: off
def draw(model, tokenizer, ids, ends, *, num_samples, max_new_tokens, min_new_tokens, temperature, top_p, stop):
    # fmt: on
    """num_samples responses to each prompt -> for each a list of (token, log-probability), EOS behind its end.

    The prompts' common start is read once. Each prompt is read once for all its samples: the cache is repeated.
    Finished rows are removed from the batch whenever half of it has finished.
    """
    device, pad, keeps_all = model.device, tokenizer.eos_token_id, kept_by(model) == "all"
    shared = min(common.shared_start(ids[0], x[:-1]) for x in ids)  # each prompt keeps a token of its own
    shared = shared if keeps_all and len(ids) > 1 and shared >= 32 else 0  # fewer are not worth a pass
    sequences, mask = (x.to(device) for x in padded(ids, pad, shared))
    cache, unread = None, sequences[:, shared:]
    if shared:
        _, cache = read(model, sequences[:1, :shared], mask[:1, :shared])
        cache.batch_repeat_interleave(len(ids))
    if num_samples > 1 and sequences.shape[1] > 1:
        if unread.shape[1] > 1:
            _, cache = read(model, unread[:, :-1], mask[:, :-1], cache)
        cache.batch_repeat_interleave(num_samples)
        unread = unread[:, -1:]
    sequences, mask, unread = (x.repeat_interleave(num_samples, 0) for x in (sequences, mask, unread))
    likeliest = TopPLogitsWarper(top_p) if top_p < 1 else lambda _, logits: logits
    stops = StopStringCriteria(tokenizer, list(stop)) if stop else lambda *_: False
    ends, left = torch.tensor(ends, device=device), torch.arange(len(sequences), device=device)
    ended, drawn = torch.zeros_like(left, dtype=torch.bool), [[] for _ in left]
    for step in range(max_new_tokens):
        logits, cache = read(model, unread, mask, cache)
        if step < min_new_tokens:
            logits[:, ends] = -torch.inf
        if step == 0 and min_new_tokens:
            logits[:, never_first(tokenizer, stop)] = -torch.inf
        logprobs = logits.log_softmax(-1)
        if temperature:  # torch.multinomial's draw; the noise of a row does not depend on which rows are left
            noise = torch.empty(len(drawn), logits.shape[1], device=device).exponential_()[left]
            logits = likeliest(None, logits / temperature).softmax(-1) / noise
        unread = logits.argmax(-1, keepdim=True)
        unread[ended] = pad
        found = left, unread[:, 0], logprobs.gather(1, unread)[:, 0]
        for row, token, logprob in zip(*(x.tolist() for x in found)):
            drawn[row].append((token, logprob))
        sequences, mask = torch.cat([sequences, unread], 1), F.pad(mask, (0, 1), value=1)
        ended = ended | torch.isin(unread[:, 0], ends) | stops(sequences, None)
        number = ended.sum().item()
        if number == len(ended):
            break
        if keeps_all and 2 * number >= len(ended):
            on = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(on)
            left, ended, sequences, mask, unread = (x[on] for x in (left, ended, sequences, mask, unread))
    return drawn


# fmt: off
def draw_by_library(model, tokenizer, ids, ends, *, num_samples, max_new_tokens, min_new_tokens, temperature, top_p,
                    stop, num_beams):
    # fmt: on
    """The same by transformers' generate: beams, whose log-probabilities are None, and models that keep a state."""
    input_ids, mask = (x.to(model.device) for x in padded(ids, tokenizer.eos_token_id))
    options = {"num_beams": num_beams, "num_return_sequences": num_samples, "output_logits": num_beams == 1}
    options |= {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens or None, "eos_token_id": ends}
    options |= {"stop_strings": list(stop) or None, "tokenizer": tokenizer, "pad_token_id": tokenizer.eos_token_id}
    options |= {"begin_suppress_tokens": never_first(tokenizer, stop)} if min_new_tokens else {}
    options |= {"synced_gpus": False}  # under FSDP the weights are gathered (on_policy.gathered): ranks do not wait
    if temperature and num_beams == 1:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    own, model.generation_config = model.generation_config, GenerationConfig()  # it fills in what is not said here
    out = model.generate(input_ids, attention_mask=mask, return_dict_in_generate=True, **options)
    model.generation_config = own
    tokens = out.sequences[:, input_ids.shape[1] :]
    if num_beams > 1:
        return [[(token, None) for token in row] for row in tokens.tolist()]
    logprobs = torch.stack(out.logits, 1).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    return [[*zip(*both)] for both in zip(tokens.tolist(), logprobs.tolist())]


@functools.cache
def never_first(tokenizer, stop):
    """The tokens that leave a response empty if they are its first: special ones, blank ones, and those that hold one
    of the `stop` strings."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
    return [i for i, text in enumerate(texts) if not text.strip() or any(s in text for s in stop)]


def text_behind(tokenizer, prompt, new):
    """The text of new tokens behind a prompt's. Alone they could lose a space: SentencePiece drops it at a start."""
    head, both = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt[-8:], prompt[-8:] + new))
    return both[len(head) :]


# fmt: off
@torch.inference_mode()
def generate(model, tokenizer, prompts, *, max_new_tokens, num_samples=1, temperature=0.0, top_p=1.0, num_beams=1,
             max_prompt_length=None, min_new_tokens=0, stop=()):
    # fmt: on
    """Generate `num_samples` responses to each prompt -> a list per prompt of {text, logprob, num_tokens, finished}.

    temperature 0 is greedy (or beam search). logprob is the sum of the model's own log-probabilities, before
    temperature and top_p, of the num_tokens tokens. EOS counts in neither (an empty response is its EOS): servers
    leave it out too, and `rank --by logprob`. finished: it ended by itself within max_new_tokens. EOS cannot be
    among the first min_new_tokens; where that is not 0, the first token is neither blank nor holds a `stop` string.
    The text ends before the first of the `stop` strings, and then without white space. Otherwise it is what was drawn:
    common.encode gives its tokens.
    """
    if 0 < temperature < 1e-3:
        raise UserError(f"--temperature {temperature} is too small to divide by: 0 is greedy")
    ids = [common.cut_left(tokenizer, common.prompt_ids(tokenizer, p), max_prompt_length or 2**30) for p in prompts]
    own = model.generation_config.eos_token_id  # Llama-3 and Qwen list several. Nothing else of it shapes a response
    ends = sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})
    options = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    options |= {"temperature": temperature, "top_p": top_p, "stop": tuple(stop)}
    if num_beams > 1 or kept_by(model) == "state":
        rows = draw_by_library(model, tokenizer, ids, ends, num_beams=num_beams, **options)
    else:
        rows = draw(model, tokenizer, ids, ends, **options)
    responses = []
    for row, drawn in enumerate(rows):
        tokens, prompt = [token for token, _ in drawn], prompts[row // num_samples]
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = text_behind(tokenizer, ids[row // num_samples], tokens[:end])
        cut = min((text.index(s) for s in stop if s in text), default=None)
        text = text if cut is None else text[:cut].rstrip()
        if text == common.space_before(prompt, text[1:]) + text[1:]:
            text = text[1:]  # common.encode puts this space there again
        num_tokens = max(1, end)
        response = {"text": text, "num_tokens": num_tokens, "finished": cut is not None or end < max_new_tokens}
        if num_beams == 1:
            response["logprob"] = sum(logprob for _, logprob in drawn[:num_tokens])
        responses.append(response)
    return [responses[i : i + num_samples] for i in range(0, len(responses), num_samples)]


OPTIONS = ("max_new_tokens", "min_new_tokens", "max_prompt_length", "num_samples", "temperature", "top_p", "num_beams")


def options_of(args):
    """What a command's flags say about `generate`, as far as it has them -> keyword arguments."""
    return {k: getattr(args, k) for k in (*OPTIONS, "stop") if hasattr(args, k)}


def new_tokens(args, default):
    """--max_new_tokens, else 512 for Alpaca's responses (Tuna's released code), else the verb's own default."""
    return args.max_new_tokens or {"alpaca": 512}.get(args.task, default)


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
