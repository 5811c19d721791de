"""Finished records, a line each, in a file from which a second run goes on; what a second run must
share with the first."""

import contextlib
import json
import os
import pathlib
import re
from collections import Counter

import torch

from collecting.files import MAX_LINE, Claim, agree, on_process0, provenance, read_json, read_records
from common import UserError, say


class Journal:
    """Appends finished records, one whole line each, and joins them in the input's order at the end.

    path: the output. ids: the input's ids in order. settings: what must not change between two runs on one output.
    `done` holds the ids already there. A torn last line is cut off; two runs on one output refuse each other (flock
    on PATH.args.json).
    """

    def __init__(self, path, ids, settings, rank=0, world=1):
        self.path, self.ids, self.rank = pathlib.Path(path), list(ids), rank
        if world > 1:
            on_process0(lambda: self._claim(settings))
            agree(settings, f"{self.path}.args.json", f"--output {self.path}")
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
        self._lock = Claim(f"{self.path}.args.json", f"--output {self.path}")
        before = self._lock.before
        begun = [file for file in self._files() if file.stat().st_size]  # a run that failed at its start left nothing
        if begun:
            if before is None:
                raise UserError(f"--output {self.path} exists and was not written by this script: name another file")
            if changed := Claim.changed(before, settings):
                hint = f"name another file, or delete {', '.join(map(str, begun))}"
                raise UserError(f"--output {self.path} was begun with other arguments ({changed}): {hint}")
            for file in begun:
                self._cut_torn_line(file)
            return
        self._lock.write(settings)

    def _files(self):
        part = re.compile(re.escape(self.path.name) + r"\.part\d+")
        parts = sorted(p for p in self.path.parent.iterdir() if part.fullmatch(p.name))
        return [p for p in [self.path, *parts] if p.exists()]

    def _cut_torn_line(self, file):
        with open(file, "r+b") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - MAX_LINE))
            end = f.tell() + f.read().rfind(b"\n") + 1
            if end < size:
                say(f"{file}: cut off a torn last line of {size - end} bytes")
                f.truncate(end)

    def _lines(self, file):
        with open(file, "rb") as f:
            offset = 0
            for line in f:
                record = read_json(line)
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

        Where some are missing (requests failed, --max_requests is spent) PATH holds the others: a usable file, which
        the next run with the same arguments completes.
        """
        self._part.close()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.rank != 0:
            return None
        where = {}
        for file in self._files():
            where |= {record["id"]: (file, offset) for offset, record in self._lines(file)}
        if missing := len(self.ids) - len(where):
            say(f"{len(where)} of {len(self.ids)} done, {missing} missing: run the same command again")
        if not where:
            return 0
        whole = self.path.with_name(self.path.name + ".whole")
        with contextlib.ExitStack() as stack, open(whole, "wb") as out:
            opened = {file: stack.enter_context(open(file, "rb")) for file in self._files()}
            for file, offset in (where[i] for i in self.ids if i in where):
                opened[file].seek(offset)
                out.write(opened[file].readline())
            out.flush()
            os.fsync(out.fileno())
        os.replace(whole, self.path)
        for file in self._files():
            if file != self.path:
                file.unlink()
        say(f"{len(where)} records in {self.path}")
        return len(where)


def settings_of(args):
    """What a second run on the same output must share: the arguments and the content of every file that they name."""
    free = {"output", "verb", "run", "batch_size", "bertscore", "bertscore_layer"}  # scores are no part of the answers
    # how a server is asked, not what
    free |= {"base_url", "label_base_url", "concurrency", "max_requests", "retries", "timeout"}
    settings = {f"--{k}": v for k, v in vars(args).items() if k not in free}
    return settings | provenance(settings)


def open_collected(args, before, after, read=read_records, process=0, processes=1):
    """The records of --input and the journal of --output, both with their default paths -> (records, journal)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > processes:
        raise UserError(f"{args.verb} runs in one process: start it with python, not torchrun")
    args.input = args.input or f"data/{args.task}/{before}.jsonl"
    records = list(read(args.input))
    args.output = args.output or f"data/{args.task}/{after}.jsonl"
    return records, Journal(args.output, [r["id"] for r in records], settings_of(args), process, processes)
