"""collecting/journal.py: files that survive a kill and hold what was asked for."""

import fcntl
import os
import zlib

import pytest
from conftest import make_records, read_jsonl, write_jsonl

from collecting import generation
from collecting.files import content_of
from collecting.journal import Journal
from common import UserError


def begin(path, ids="ab", settings=(), **processes):
    return Journal(path, ids, dict(settings), **processes)


def journaled(path, *done, ids="ab"):
    """A whole run on PATH, in which the records `done` are written."""
    journal = begin(path, ids)
    journal.write({"id": i} for i in done)
    return journal.finish()


def ids_of(path):
    return [r["id"] for r in read_jsonl(path)]


class TestJournal:
    def test_two_writers_refuse_each_other(self, tmp_path):
        with open(tmp_path / "o.jsonl.args.json", "a+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="another run"):
                begin(tmp_path / "o.jsonl")

    def test_a_run_that_failed_at_its_start_is_in_nobodys_way(self, tmp_path):
        """A mistyped --model is known only after the output is claimed; the corrected command then begins anew."""
        begin(tmp_path / "o.jsonl", settings={"--model": "mistyped"})
        begin(tmp_path / "o.jsonl", settings={"--model": "right"}).write([{"id": "a"}])
        with pytest.raises(UserError, match="'right' -> 'other'.*or delete .*o.jsonl.part0"):
            begin(tmp_path / "o.jsonl", settings={"--model": "other"})

    def test_a_file_of_unknown_origin(self, tmp_path):
        (tmp_path / "o.jsonl").write_text('{"id": "a"}\n')
        with pytest.raises(UserError, match="not written by this script"):
            begin(tmp_path / "o.jsonl")

    def test_order_and_what_is_missing(self, tmp_path, capfd):
        path = tmp_path / "out[1].jsonl"
        assert journaled(path, "c", "a", ids="abc") == 2 and "1 missing" in capfd.readouterr().out
        assert ids_of(path) == ["a", "c"]  # usable as it is
        assert begin(path, "abc").done == {"a", "c"}
        assert journaled(path, "b", ids="abc") == 3 and ids_of(path) == ["a", "b", "c"]

    def test_nothing_new_is_an_error(self, tmp_path):
        """As where every request failed; what an earlier run did stays."""
        with pytest.raises(UserError, match="0 of 2 done, 2 missing, and nothing new was done"):
            journaled(tmp_path / "o.jsonl")
        journaled(tmp_path / "o.jsonl", "a")
        with pytest.raises(UserError, match="1 of 2 done, 1 missing"):
            journaled(tmp_path / "o.jsonl")
        assert ids_of(tmp_path / "o.jsonl") == ["a"]

    def test_a_number_that_is_not_finite(self, tmp_path):
        journal = begin(tmp_path / "o.jsonl")
        journal.write([{"id": "a", "logprob": -1.0}])
        with pytest.raises(UserError, match="record 'b': .*not finite"):
            journal.write([{"id": "b", "logprob": float("nan")}])
        del journal
        assert begin(tmp_path / "o.jsonl").done == {"a"}

    def test_a_name_that_no_verb_reads_is_refused_before_the_work(self, tmp_path):
        os.mkfifo(tmp_path / "null")  # a device, as /dev/null
        for name in ("null", "o.jsonl.gz", "o.csv"):
            with pytest.raises(UserError, match=f"{name}: the name must end in .jsonl"):
                begin(tmp_path / name)
        assert [p.name for p in tmp_path.iterdir()] == ["null"]

    def test_a_process_that_differs(self, tmp_path, monkeypatch):
        """As the second of two processes sees it: process 0 has other settings, or another folder."""
        monkeypatch.setattr("torch.distributed.barrier", lambda: None)
        path, second = tmp_path / "o.jsonl", {"process": 1, "processes": 2}
        first = begin(path, settings={"--seed": 0})
        assert begin(path, settings={"--seed": 0}, **second).done == first.done
        for output, seed in ((path, 1), (tmp_path / "else/o.jsonl", 0)):
            with pytest.raises(UserError, match="other arguments or files than process 0"):
                begin(output, settings={"--seed": seed}, **second)

    def test_a_record_that_is_not_in_the_input(self, tmp_path):
        begin(tmp_path / "o.jsonl")
        (tmp_path / "o.jsonl.part0").write_text('{"id": "c"}\n')
        with pytest.raises(UserError, match="part0:1: id 'c' is not in the input"):
            begin(tmp_path / "o.jsonl")

    def test_a_file_of_the_users_stays(self, tmp_path):
        mine = tmp_path / "keep.jsonl.part0.backup"
        mine.write_text("mine")
        assert journaled(tmp_path / "keep.jsonl", "a") == 1 and mine.read_text() == "mine"


def test_the_content_of_a_model_is_its_weights(tmp_path):
    """Changed where a training changes them; not by an output that is written beside them. A file's is all of it."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 * 2**20))
    before = content_of(tmp_path), content_of(weights)
    (tmp_path / "nli.jsonl").write_text("x")
    assert content_of(str(tmp_path)) == before[0]
    weights.write_bytes(b"x" + bytes(3 * 2**20 - 1))
    assert content_of(tmp_path) == before[0] and content_of(weights) != before[1]
    weights.write_bytes(bytes(3 * 2**20 - 1) + b"x")
    assert content_of(tmp_path) != before[0]


@pytest.mark.parametrize("what", ["teacher", "flip --concurrency 1", "rank --by contextual"])
def test_a_local_model_is_asked_the_same_after_a_kill(cli, tiny, tmp_path, monkeypatch, what):
    """The same batches, those of the whole input, also where the first run was killed inside one: the same samples."""

    def usable(text):  # what a random model replies is of use by chance, but always the same
        return zlib.crc32(text.encode()) % 4 > 0

    def verdict(text, n):
        if not usable(text):
            raise ValueError("by chance")
        return [*range(n)], {}

    monkeypatch.setattr("collecting.flip.one_label", lambda text: "neutral" if usable(text) else None)
    monkeypatch.setattr("collecting.rank_asked.parse_contextual", verdict)
    asked, generate = [], generation.generate
    monkeypatch.setattr(generation, "generate", lambda *a, **k: asked.append(a[2]) or generate(*a, **k))
    records = make_records(16)
    for i, r in enumerate(records):  # prompts of three sizes, so that batches are not in the input's order
        r["prompt"] *= 1 + i % 3
    argv = ["collect_candidates", *what.split(), "--input", write_jsonl(tmp_path / "data.jsonl", records)]
    argv += ["--model", tiny, "--max_new_tokens", 6, "--batch_size", 4, "--output"]
    assert cli(*argv, tmp_path / "whole.jsonl").code == 0
    whole = list(asked)
    with monkeypatch.context() as context:
        write, part = Journal.write, tmp_path / "parts.jsonl.part0"

        def killed(journal, records):
            if len(read_jsonl(part)) >= 6:
                raise KeyboardInterrupt
            write(journal, records)

        context.setattr(Journal, "write", killed)
        assert cli(*argv, tmp_path / "parts.jsonl").code == 130
    part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:6]))  # within a batch
    asked.clear()
    assert cli(*argv, tmp_path / "parts.jsonl").code == 0
    assert asked and all(batch in whole for batch in asked)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
