"""Text from a model, on this machine or behind an OpenAI-compatible server, and output that survives a kill.

    Journal    finished records, a line each, from which a second run goes on
    fill       a prompt template's {names}; read_template: the user's own template
    generate   responses of a local model with their log-probabilities
    complete   answers of a model that takes instructions: a server's, or a local one's

For rankers.py, collect_candidates.py, evaluate.py, and PRO's bootstrapping. It knows records and prompts, no data set.
"""

import asyncio
import contextlib
import email.utils
import fcntl
import functools
import itertools
import json
import math
import os
import pathlib
import random
import re
import time
import urllib.parse
import zlib
from collections import Counter

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import common
import runtime
from common import UserError, in_range
from runtime import say

# ----------------------------------------------------------------------------------------------------------------------
# Files that survive a kill


class Journal:
    """Appends finished records, one whole line each, and joins them in the input's order at the end.

    path: the output. ids: the input's ids in order. settings: what must not change between two runs on one output.
    `done` holds the ids already there. A torn last line is cut off; two runs on one output refuse each other (flock
    on PATH.args.json).
    """

    def __init__(self, path, ids, settings, rank=0, world=1):
        self.path, self.ids, self.rank = pathlib.Path(path), list(ids), rank
        if world > 1:
            runtime.on_process0(lambda: self._claim(settings))
        else:
            self._claim(settings)
        wanted = set(self.ids)
        if len(wanted) < len(self.ids):
            raise UserError(f"id {Counter(self.ids).most_common(1)[0][0]!r} occurs twice in the input")
        self.done = set()
        for file in self._files():
            ids = [record["id"] for _, record in self._lines(file)]
            if strangers := sorted(set(ids) - wanted):
                raise UserError(f"{file}: id {strangers[0]!r} is not in the input: name another --output")
            if len(ids) > len(set(ids)):
                raise UserError(
                    f"{file}: id {Counter(ids).most_common(1)[0][0]!r} occurs twice: delete one of the lines"
                )
            self.done |= set(ids)
        if world > 1:
            torch.distributed.barrier()  # nobody writes while another still reads
        self._part = open(f"{self.path}.part{rank}", "ab")  # noqa: SIM115

    def _claim(self, settings):
        args_file = pathlib.Path(f"{self.path}.args.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(args_file, "a+")  # noqa: SIM115
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {self.path}: another run is writing there") from None
        except OSError as e:
            raise UserError(f"--output {self.path}: cannot be written ({e.strerror})") from e
        self._lock.seek(0)
        before = runtime.read_json(self._lock.read())
        if self._files():
            if before is None:
                raise UserError(f"--output {self.path} exists and was not written by this script: name another file")
            changed = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in settings.items() if before.get(k) != v]
            if changed:
                raise UserError(
                    f"--output {self.path} was begun with other arguments ({', '.join(changed)}): "
                    "name another file, or delete it"
                )
            for file in self._files():
                self._cut_torn_line(file)
            return
        self._lock.truncate(0)
        json.dump(settings, self._lock, indent=1)
        self._lock.flush()

    def _files(self):
        parts = sorted(self.path.parent.glob(self.path.name + ".part*"))
        return [p for p in [self.path, *parts] if p.exists()]

    def _cut_torn_line(self, file):
        with open(file, "r+b") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - common.MAX_LINE))
            end = f.tell() + f.read().rfind(b"\n") + 1
            if end < size:
                say(f"{file}: cut off a torn last line of {size - end} bytes")
                f.truncate(end)

    def _lines(self, file):
        with open(file, "rb") as f:
            offset = 0
            for line in f:
                record = runtime.read_json(line)
                if not isinstance(record, dict) or "id" not in record:
                    raise UserError(f"{file}: the line at byte {offset} is no record: delete the file to begin anew")
                yield offset, record
                offset += len(line)

    def write(self, records):
        """Append records, then flush and sync: from here on they survive a kill."""
        for record in records:
            self._part.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._part.flush()
        os.fsync(self._part.fileno())

    def finish(self):
        """Join everything in the input's order into PATH -> number of records there, on rank 0.

        Parts stay where some are missing.
        """
        self._part.close()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.rank != 0:
            return None
        where = {}
        for file in self._files():
            where |= {record["id"]: (file, offset) for offset, record in self._lines(file)}
        missing = len(self.ids) - len(where)
        if missing:
            say(f"{len(where)} of {len(self.ids)} done, {missing} missing: run the same command again")
            return len(where)
        whole = self.path.with_name(self.path.name + ".whole")
        with contextlib.ExitStack() as stack, open(whole, "wb") as out:
            files = {file: stack.enter_context(open(file, "rb")) for file in self._files()}
            for i in self.ids:
                file, offset = where[i]
                files[file].seek(offset)
                out.write(files[file].readline())
            out.flush()
            os.fsync(out.fileno())
        os.replace(whole, self.path)
        for file in self._files():
            if file != self.path:
                file.unlink()
        say(f"{len(where)} records in {self.path}")
        return len(where)


def settings_of(args):
    """What a second run on the same output must share: the arguments and the content of the input files."""
    free = {"output", "verb", "run", "batch_size"}
    # how a server is asked, not what
    free |= {"base_url", "label_base_url", "concurrency", "max_requests", "retries", "timeout"}
    inputs = args.input if isinstance(args.input, list) else [args.input]
    digests = {f"sha256 of {p}": runtime.file_digest(p) for p in inputs if p and pathlib.Path(p).is_file()}
    return {f"--{k}": v for k, v in vars(args).items() if k not in free} | digests


def read_records(path):
    """Yield records (id and prompt checked, candidates optional) from JSONL; duplicate ids are errors."""
    seen = {}
    for where, record in common.read_rows(path):
        none_yet = record.get("candidates", []) == []
        common.check_record(record | {"candidates": [{"text": "-", "source": "-"}]} if none_yet else record, where)
        if record["id"] in seen:
            raise UserError(f"{where}: id {record['id']!r} was already on {seen[record['id']]}")
        seen[record["id"]] = where
        yield record
    if not seen:
        raise UserError(f"{path}: holds no records")


def open_collected(args, before, after, read=read_records):
    """The records of --input and the journal of --output, both with their default paths -> (records, journal)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{args.verb} runs in one process: start it with python, not torchrun")
    args.input = args.input or f"data/{args.task}/{before}.jsonl"
    records = list(read(args.input))
    output = args.output or f"data/{args.task}/{after}.jsonl"
    return records, Journal(output, [r["id"] for r in records], settings_of(args))


# ----------------------------------------------------------------------------------------------------------------------
# Prompt templates


def fill(template, fields, where):
    """Put fields into a template's {names}, once: text that holds braces itself is left alone."""
    names = set(re.findall(r"{(\w+)}", template))
    if names - fields.keys():
        raise UserError(f"{where}: the template asks for {sorted(names - fields.keys())}; there are {sorted(fields)}")
    return re.sub(r"{(\w+)}", lambda m: fields[m[1]], template)


def read_template(args, default):
    """The text of --prompt_file, or the built-in template."""
    if not args.prompt_file:
        return default
    try:
        return pathlib.Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt_file {args.prompt_file}: cannot be read ({e})") from e


# ----------------------------------------------------------------------------------------------------------------------
# A model on this machine

TURNS = ("Human:", "Assistant:")  # a response to a dialogue ends before these


@functools.cache
def load_generator(name, device, flag="--model", auto_class=AutoModelForCausalLM):
    """-> (model, tokenizer) for inference on `device`, bf16 on CUDA, fp32 on CPU.

    Loaded at the first call: what is all done loads none.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = runtime.load_pretrained(auto_class, name, flag, dtype=dtype)
    return model.to(device).eval(), runtime.load_tokenizer(name, flag)


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


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    prompts,
    *,
    max_new_tokens,
    num_samples=1,
    temperature=0.0,
    top_p=1.0,
    num_beams=1,
    max_prompt_length=None,
    stop=(),
):
    """Generate `num_samples` responses to each prompt -> a list per prompt of {text, logprob, num_tokens, finished}.

    temperature 0 is greedy (or beam search). The prompt is read once: its cache is repeated for the samples. logprob is
    the sum of the model's own log-probabilities, before temperature and top_p, of the num_tokens tokens, EOS included
    where it came; finished: it ended by itself within max_new_tokens. The text ends before the first of the `stop`
    strings.
    """
    ids = [common.cut_left(tokenizer, common.prompt_ids(tokenizer, p), max_prompt_length or 2**30) for p in prompts]
    L = max(map(len, ids))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (L - len(x)) + x for x in ids], device=model.device)
    mask = torch.tensor([[0] * (L - len(x)) + [1] * len(x) for x in ids], device=model.device)
    chosen, cache = ChosenLogprobs(), None
    if num_samples > 1 and L > 1 and num_beams == 1:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
        inputs = {"input_ids": input_ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": positions}
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(num_samples)
        input_ids, mask = input_ids.repeat_interleave(num_samples, 0), mask.repeat_interleave(num_samples, 0)
    out = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=top_p if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        pad_token_id=pad,
        num_return_sequences=1 if cache is not None else num_samples,
        repetition_penalty=1.0,  # a model's generation_config may ask for one: candidates come from the model itself
        logits_processor=[chosen] * (num_beams == 1),
        synced_gpus=False,  # under FSDP the weights are gathered (runtime.gathered): ranks do not wait for each other
        stop_strings=list(stop) or None,
        tokenizer=tokenizer,
    )
    tokens = out[:, L:].tolist()
    if num_beams == 1:
        logprobs = chosen.all(out).tolist()
    responses = []
    for row, sequence in enumerate(tokens):
        end = sequence.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in sequence else len(sequence)
        text = tokenizer.decode(sequence[:end], skip_special_tokens=True)
        cut = min((text.index(s) for s in stop if s in text), default=None)
        # after a stop string EOS is padding, not the model's
        num_tokens = end if cut is not None else min(end + 1, len(sequence))
        response = {
            "text": text[:cut].strip(),
            "num_tokens": num_tokens,
            "finished": cut is not None or end < len(sequence),
        }
        if num_beams == 1:
            response["logprob"] = sum(logprobs[row][:num_tokens])
        responses.append(response)
    return [responses[i : i + num_samples] for i in range(0, len(responses), num_samples)]


def generation_flags(add, max_new_tokens):
    add("--max_new_tokens", type=in_range(int, 1), default=max_new_tokens, help="tokens of a response")
    add("--max_prompt_length", type=in_range(int, 1), help="cut longer prompts from the left")
    add(
        "--stop",
        nargs="*",
        default=[],
        help="a response ends before any of these strings, which newline is written \\n",
    )
    add("--batch_size", type=in_range(int, 1), default=16, help="prompts at once")


def unescape(strings):
    return tuple(s.replace("\\n", "\n") for s in strings)


def batches_by_length(records, batch_size):
    """Indices in batches of similar prompt length, longest first, so that too little memory shows at once."""
    order = sorted(range(len(records)), key=lambda i: -len(records[i]["prompt"]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


# ----------------------------------------------------------------------------------------------------------------------
# A model that answers instructions: behind an OpenAI-compatible server, or on this machine

MAX_REPLY = 8 * 2**20  # bytes of one reply
LONGEST_WAIT = 600  # seconds that a server may ask us to wait
FAILURES_IN_A_ROW = 20  # then the server or the request is at fault, not a prompt
RE_ASKS = 2  # after an answer that could not be used
BUDGET_SPENT = "--max_requests is reached"


def api_flags(add, max_new_tokens, required=True):
    add(
        "--model",
        required=required,
        help="a model's name at --base_url; without --base_url: hub id or folder, run here",
    )
    add("--base_url", help="OpenAI-compatible server, e.g. https://api.openai.com/v1; its key: OPENAI_API_KEY")
    add("--concurrency", type=in_range(int, 1), default=8, help="requests under way at once")
    add("--max_requests", type=in_range(int, 1), help="stop after this many requests, repeated ones counted")
    add("--retries", type=in_range(int, 0), default=5, help="repeat a failed request this often, with growing pauses")
    add("--timeout", type=in_range(float, above=0), default=120.0, help="seconds a request may take in all")
    add("--seed", type=int, default=0, help="of a local model's samples")
    generation_flags(add, max_new_tokens)


def complete(
    args,
    prompts,
    *,
    temperature=0.0,
    top_p=1.0,
    num_samples=1,
    logprobs=False,
    completions=False,
    follow_up=None,
    count=None,
):
    """Ask the model of `api_flags` each prompt -> yields (index, responses, error) as they finish, each index once.

    prompts: texts, sent as one user message each (locally: through the chat template where there is one), or, with
    completions=True, continued as they stand. responses: num_samples of {text, finished, num_tokens and logprob where
    known} (logprobs=True asks a server for them), or None with `error`, a sentence: such prompts failed and may be
    asked again another time. follow_up(index, text) -> None, or the message to re-ask with when `text` is no use:
    RE_ASKS times, the dialogue so far before it. What concerns all prompts (a refused key, an unknown model, no
    server) is a UserError. count: a Counter that several calls share, so that --max_requests bounds them together.
    """
    options = {"temperature": temperature, "top_p": top_p, "num_samples": num_samples, "completions": completions}
    ask = functools.partial(_ask_server, logprobs=logprobs) if args.base_url else _ask_local
    dialogues = {i: [{"role": "user", "content": prompt}] for i, prompt in enumerate(prompts)}
    count = Counter() if count is None else count
    with tqdm(total=len(prompts), desc=f"asking {args.model}", leave=False) as bar:
        for turn in range(1 + RE_ASKS):
            again = {}
            for i, responses, error in ask(args, dialogues, count, **options):
                bar.set_postfix(count)
                more = follow_up(i, responses[0]["text"]) if follow_up and responses and turn < RE_ASKS else None
                if more is None:
                    bar.update()
                    yield i, responses, error
                else:
                    answer = {"role": "assistant", "content": responses[0]["text"]}
                    again[i] = [*dialogues[i], answer, {"role": "user", "content": more}]
            dialogues = again
            if not again:
                break


def _ask_local(args, dialogues, count, *, completions, **options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_generator(args.model, device)
    prompts = {
        i: dialogue[0]["content"]
        if completions
        else tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        if tokenizer.chat_template
        else "\n\n".join(message["content"] for message in dialogue) + "\n"
        for i, dialogue in dialogues.items()
    }
    options |= {k: getattr(args, k) for k in ("max_new_tokens", "max_prompt_length")} | {"stop": unescape(args.stop)}
    order = sorted(prompts, key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), args.batch_size):
        batch = order[start : start + args.batch_size]
        torch.manual_seed(zlib.crc32(f"{args.seed} {prompts[batch[0]]}".encode()))
        responses = generate(model, tokenizer, [prompts[i] for i in batch], **options)
        for i, samples in zip(batch, responses):
            count["tokens"] += sum(r["num_tokens"] for r in samples)
            yield i, samples, None


def _ask_server(args, dialogues, count, **options):
    """`complete` through the server: at most --concurrency requests under way, results as they come."""
    import openai

    key = check_server(args.base_url)
    loop, waiting, running, failures = asyncio.new_event_loop(), iter(dialogues.items()), set(), 0
    client = openai.AsyncOpenAI(
        base_url=args.base_url,
        api_key=key or "none",  # servers of one's own often want none
        max_retries=0,  # ours below: they also repeat what is no JSON, and count
        timeout=args.timeout,
        default_headers={"Accept-Encoding": "identity"},  # so that MAX_REPLY bounds what arrives
        http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [bound_reply]}),
    )
    try:
        while True:
            for i, dialogue in itertools.islice(waiting, args.concurrency - len(running)):
                running.add(loop.create_task(_request(client, args, i, dialogue, count, **options)))
            if not running:
                return
            done, running = loop.run_until_complete(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
            for task in sorted(done, key=lambda task: task.exception() is None):  # errors first: all are fetched
                i, responses, error = task.result()
                failures = 0 if responses or count["requests"] == args.max_requests else failures + 1
                if failures == FAILURES_IN_A_ROW:
                    raise UserError(
                        f"--base_url {args.base_url}: {failures} prompts in a row failed; the last: {error}"
                    )
                count["failed"] += responses is None
                yield i, responses, error
    finally:
        for task in running:
            task.cancel()
        loop.run_until_complete(asyncio.wait([*running, loop.create_task(client.close())]))
        _ = [task.cancelled() or task.exception() for task in running]  # fetched, or asyncio prints them
        loop.close()


async def _request(client, args, i, dialogue, count, *, num_samples, logprobs, completions, temperature, top_p):
    """One prompt's samples -> (i, responses, None) or (i, None, error). A server that gives fewer is asked again."""
    import openai

    responses, failed = [], 0
    endpoint = client.completions if completions else client.chat.completions
    body = {"prompt": dialogue[0]["content"]} if completions else {"messages": dialogue}
    body |= {"model": args.model, "temperature": temperature, "top_p": top_p}
    body |= {"stop": list(unescape(args.stop))} if args.stop else {}
    body |= {"logprobs": 1 if completions else True} if logprobs else {}  # the older endpoint takes a number
    while len(responses) < num_samples:
        if count["requests"] == args.max_requests:
            return i, None, BUDGET_SPENT
        count["requests"] += 1
        missing = num_samples - len(responses)
        body["n"] = missing if missing > 1 else openai.omit
        limit = "max_completion_tokens" if count["new names"] else "max_tokens"
        pause = min(60, 2**failed / 2) * random.uniform(0.75, 1)
        try:
            request = endpoint.with_raw_response.create(**body, **{limit: args.max_new_tokens})
            reply = await asyncio.wait_for(request, args.timeout)
            responses += read_reply(reply.text, count)[:missing]
            continue
        except openai.APIStatusError as e:
            if e.status_code == 400 and "max_completion_tokens" in e.message and limit == "max_tokens":
                count["new names"] = 1  # OpenAI's newer models know only this name, many servers only the old one
                continue
            error, wait = status_error(e, args)
            if wait is None:
                return i, None, error
            pause = max(wait, pause)
        except (openai.OpenAIError, asyncio.TimeoutError, ValueError, OverflowError) as e:
            reason = str(e.__cause__ or e) if isinstance(e, openai.APIConnectionError) else str(e)
            error = f"{type(e).__name__} {hide_key(reason)}".strip()
        count["errors"] += 1
        failed += 1
        if failed > args.retries:
            return i, None, error
        await asyncio.sleep(pause)
    return i, responses, None


def check_server(url):
    """Raise UserError unless `url` and OPENAI_API_KEY can be used -> the key, empty where there is none."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("--base_url must be http(s)://host/path, such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("--base_url must hold no user, password, or query: a key belongs in OPENAI_API_KEY")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):  # the HTTP library would quote it in its complaint
        raise UserError("OPENAI_API_KEY holds characters that no key has")
    return key


async def bound_reply(response):
    """A hook on every response, errors too: reading stops at MAX_REPLY bytes."""
    read = response.aiter_raw

    async def bounded(*args, **kwargs):
        size = 0
        async for chunk in read(*args, **kwargs):
            size += len(chunk)
            if size > MAX_REPLY:
                raise OverflowError(f"the reply is longer than {MAX_REPLY >> 20} MiB")
            yield chunk

    if response.headers.get("content-encoding", "identity") != "identity":
        raise ValueError("the reply is compressed, which was not asked for")
    response.aiter_raw = bounded


def read_reply(text, count):
    """A completion's JSON, chat or text -> its responses; counts its tokens. ValueError on anything else."""
    try:
        reply = json.loads(text)
        tokens = (reply.get("usage") or {}).get("completion_tokens")
        responses = []
        for choice in reply["choices"]:
            content = choice["message"]["content"] if "message" in choice else choice["text"]
            responses.append({"text": (content or "").strip(), "finished": choice.get("finish_reason") == "stop"})
            responses[-1]["text"].encode()  # a lone surrogate cannot be written to a file
            logprobs = choice.get("logprobs") or {}
            values = logprobs.get("token_logprobs") or [token["logprob"] for token in logprobs.get("content") or ()]
            if values:
                responses[-1] |= {"logprob": math.fsum(values), "num_tokens": len(values)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise ValueError(f"the reply is no completion ({type(e).__name__})") from e
    if not responses or not all(common.is_number(r.get("logprob", 0)) for r in responses):
        raise ValueError("the reply holds no choices, or a log-probability that is no number")
    if len(responses) == 1 and common.is_number(tokens) and tokens > 0:
        responses[0].setdefault("num_tokens", tokens)
    count["tokens"] += tokens if common.is_number(tokens) else 0
    return responses


def status_error(e, args):
    """An HTTP status other than 200 -> (error, seconds to wait before asking again, or None: asking again is useless).

    Raises UserError where no prompt can succeed. The server's own words are quoted short, and never the key.
    """
    code = e.status_code
    said = hide_key(" ".join(str(e.message).split())[:200])
    if code in (401, 403):
        raise UserError(f"--base_url {args.base_url}: the key in OPENAI_API_KEY is missing or refused (HTTP {code})")
    if code == 404 or 300 <= code < 400 or getattr(e, "code", None) == "insufficient_quota":
        hint = "redirects are not followed" if code < 400 else said
        raise UserError(f"--base_url {args.base_url}, --model {args.model}: HTTP {code} ({hint})")
    if code not in (408, 409, 425, 429) and code < 500:
        return f"HTTP {code} ({said})", None
    wait = retry_after(e.response.headers.get("retry-after", "0"))
    if wait > LONGEST_WAIT:
        return f"HTTP {code}, and the server asks to wait {wait:.0f} s", None
    return f"HTTP {code} ({said})", wait


def retry_after(header):
    """The header's seconds or HTTP date -> seconds from now, 0 for what is neither."""
    with contextlib.suppress(ValueError, OverflowError):
        if header.strip().replace(".", "", 1).isdigit():
            return float(header)
        date = email.utils.parsedate_tz(header)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0
    return 0.0


def hide_key(text):
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return text.replace(key, "***") if key else text
