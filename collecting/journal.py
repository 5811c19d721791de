"""Finished records, a line each, in files from which a second run goes on."""

import json
import os
import pathlib
import re
from collections import Counter

import torch.distributed as dist

import common
from collecting.files import content_of, read_lines, read_records, write_atomically
from common import UserError, say

# Arguments that a second run on the same output may change: how a server is asked, not what.
FREE = {"output", "verb", "run", "batch_size"}
FREE |= {"base_url", "label_base_url", "concurrency", "max_requests", "retries", "timeout"}

LONGEST_WAIT = 24 * 60  # minutes that a process which has done its share waits for the others


class Journal:
    """Each process appends finished records to PATH.partN, where N is its number. `finish` joins them in PATH.

    ids: the input's ids, in order. settings: what a second run on PATH must share with the first; it is kept in
    PATH.args.json, which is locked while the process lives. done: the ids that are there already. Raises UserError.
    """

    def __init__(self, path, ids, settings, process=0, processes=1):
        self.path, self.ids, self.process, self.processes = pathlib.Path(path), list(ids), process, processes
        if self.path.suffix != ".jsonl":
            raise UserError(f"--output {path}: the name must end in .jsonl")
        if twice := [i for i, n in Counter(self.ids).items() if n > 1]:
            raise UserError(f"id {twice[0]!r} occurs twice in the input")
        about = self.path.with_name(f"{self.path.name}.args.json")
        if process == 0:
            self._claim(about, settings)
        self._wait()
        if processes > 1 and not (about.exists() and json.loads(about.read_text()) == settings):
            raise UserError(f"--output {path}: this process has other arguments or files than process 0")
        self.done = set(self._records())
        self._wait()  # nobody writes while another still reads
        self._part = open(f"{path}.part{process}", "ab")  # noqa: SIM115

    def _claim(self, about, settings):
        """Lock the output by its file `about`, and compare its settings with those before."""
        self._lock = common.lock(about, f"--output {self.path}")
        begun = [str(file) for file in self._files() if file.stat().st_size]  # a run that failed at its start: none
        if not begun:
            about.write_text(json.dumps(settings, indent=1))
            common.sync(about)
        elif not (before := about.read_text()):
            raise UserError(f"--output {self.path} exists and was not written by this script: name another file")
        elif changed := common.changed(json.loads(before), settings):
            hint = f"name another file, or delete {', '.join(begun)}"
            raise UserError(f"--output {self.path} was begun with other arguments ({changed}): {hint}")
        for file in self._files():
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # a kill may tear the last line

    def _wait(self):
        if self.processes > 1:
            dist.barrier()

    def _files(self):
        ours = re.compile(re.escape(self.path.name) + r"(\.part\d+)?")
        return [p for p in self.path.parent.iterdir() if ours.fullmatch(p.name)]

    def _records(self):
        """-> {id: record} of all files."""
        records, wanted = {}, set(self.ids)
        for file in self._files():
            with open(file, "rb") as f:
                for where, record in read_lines(file, f):
                    if record.get("id") not in wanted:
                        raise UserError(f"{where}: id {record.get('id')!r} is not in the input: name another --output")
                    records[record["id"]] = record
        return records

    def write(self, records):
        """Append the records that were not there at the start, and sync the file: now they survive a kill."""
        for record in (r for r in records if r["id"] not in self.done):
            try:
                self._part.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            except ValueError as e:
                raise UserError(f"record {record['id']!r}: the model gave a number that is not finite ({e})") from e
        self._part.flush()
        os.fsync(self._part.fileno())

    def finish(self):
        """Join all records in the input's order in PATH -> their number, on process 0.

        Where some are missing, PATH holds the others, and the next run with the same arguments adds them. Where nothing
        new was done, it is a UserError.
        """
        self._part.close()
        self._wait()
        if self.process != 0:
            return None
        records = self._records()
        missing = f"{len(records)} of {len(self.ids)} done, {len(self.ids) - len(records)} missing"
        if len(self.ids) > len(records) == len(self.done):
            raise UserError(f"--output {self.path}: {missing}, and nothing new was done: see the messages above")
        if len(self.ids) > len(records):
            say(f"{missing}: run the same command again")
        lines = (json.dumps(records[i], ensure_ascii=False) + "\n" for i in self.ids if i in records)
        write_atomically(self.path, "".join(lines))
        for file in self._files():
            if file != self.path:
                file.unlink()
        say(f"{len(records)} records in {self.path}")
        return len(records)


def settings_of(args):
    """What a second run on the same output must share: the arguments, and the content of the files that they name."""
    settings = {f"--{k}": v for k, v in vars(args).items() if k not in FREE}
    values = [x for v in settings.values() for x in (v if isinstance(v, list) else [v])]
    return settings | {f"content of {x}": content_of(x) for x in values if isinstance(x, str) and os.path.exists(x)}


def write_all(path, records, args):
    """Write finished records in PATH, by a journal."""
    journal = Journal(path, [r["id"] for r in records], settings_of(args))
    journal.write(records)
    journal.finish()


def open_collected(args, before, after, read=read_records, process=0, processes=1):
    """The records of --input and the journal of --output, both with their default paths -> (records, journal)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > processes:
        raise UserError(f"{args.verb} runs in one process: start it with python, not torchrun")
    args.input = args.input or f"data/{args.task}/{before}.jsonl"
    records = list(read(args.input))
    args.output = args.output or f"data/{args.task}/{after}.jsonl"
    return records, Journal(args.output, [r["id"] for r in records], settings_of(args), process, processes)
