"""collecting/files.py and common.py's records: what is broken is one sentence, in bounded
memory; what is written is whole."""

import gzip
import itertools
import json
import tracemalloc

import pytest
from conftest import change, make_records, refused, write_jsonl

import common
from collecting import files
from collecting.files import read_rows
from common import UserError

LOADERS = pytest.mark.parametrize("load", [common.load_candidates, files.load_candidates], ids=["common", "collecting"])


class TestReaders:
    def test_formats_agree(self, tmp_path):
        rows = [{"a": "1", "b": "x,y\nz"}, {"a": "ü", "b": ""}]
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (tmp_path / "r.jsonl").write_text("\ufeff" + text.replace("\n", "\r\n"))  # BOM, CRLF
        (tmp_path / "r.json").write_text(json.dumps(rows))
        (tmp_path / "r.csv").write_text('\ufeffa,b\n1,"x,y\nz"\nü,\n')
        with gzip.open(tmp_path / "g.jsonl.gz", "wt") as f:
            f.write(text)
        for name in ("r.jsonl", "r.json", "r.csv", "g.jsonl.gz"):
            assert [row for _, row in files.read_rows(tmp_path / name)] == rows, name

    @pytest.mark.parametrize(
        "name, content, words",
        [
            ("a.jsonl", b'{"a": 1}\n{"a": \n', ["a.jsonl:2"]),
            ("a.jsonl", b"[1]\n", ["a.jsonl:1", "list"]),
            ("a.jsonl", b'{"a": NaN}\n', ["a.jsonl:1", "not JSON compliant"]),
            ("a.jsonl", b'{"a": "\xff"}\n', ["a.jsonl:1"]),
            ("a.jsonl", b'{"a": "\\ud800"}\n', ["a.jsonl:1"]),
            ("a.jsonl", b'{"a": "\x00"}\n', ["a.jsonl:1"]),
            ("a.jsonl", b'"' + b"x" * (11 << 20), ["a.jsonl:1", "10 MiB"]),
            ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ["a.jsonl:1"]),
            ("a.json", b"[1]", ["a.json:1", "object"]),
            ("a.csv", b"a,b\n1\n", ["a.csv:2"]),
            ("a.csv", b"a,b\n1,2,3\n", ["a.csv:2"]),
            ("a.csv", b"a\n\xff\n", ["a.csv"]),
            ("a.jsonl.gz", b"not gzip", ["a.jsonl.gz"]),
            ("a.txt", b"x", [".jsonl"]),
        ],
    )
    def test_refused_by_name(self, tmp_path, name, content, words):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as e:
            list(files.read_rows(tmp_path / name))
        assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)

    @pytest.mark.parametrize(
        "change, word",
        [
            *[({"id": x}, "id") for x in ("", 7)],
            *[({"prompt": x}, "prompt") for x in (" \n", None)],
            *[({"candidates": x}, "candidates") for x in ([], "x")],
            ({"candidates": ["x"]}, "candidates[0]"),
            ({"candidates": [{"text": 1, "source": "m"}]}, "candidates[0].text"),
            ({"candidates": [{"text": "x"}]}, "candidates[0].source"),
            ({"candidates": [{"text": " ", "source": "human"}]}, "candidates[0].text of 'human'"),
            *[
                ({"candidates": [{"text": "x", "source": "m", field: x}]}, f"candidates[0].{field}")
                for field, x in {"reward": "0.5", "correct": 1, "rank": -1, "num_tokens": 0}.items()
            ],
        ],
    )
    @LOADERS
    def test_bad_records(self, tmp_path, change, word, load):
        path = write_jsonl(tmp_path / "c.jsonl", [make_records(1)[0], make_records(2)[1] | change])
        with pytest.raises(UserError) as e:
            load(path)
        assert "c.jsonl:2" in str(e.value) and word in str(e.value)

    @LOADERS
    def test_duplicates_and_limits(self, tmp_path, load):
        path = write_jsonl(tmp_path / "c.jsonl", make_records(2) + make_records(1))
        with pytest.raises(UserError, match=r"c.jsonl:3.*'r0'.*c.jsonl:1"):
            load(path)
        assert len(load(path, limit=2)) == 2

    @pytest.mark.parametrize("content", [b"\n\n", b'{"id": "a"', b'{"id": "\xff"}', b"[1]", b'{"a": ' + b"[" * 100_000])
    def test_broken_files_for_training(self, tmp_path, content):
        (tmp_path / "c.jsonl").write_bytes(content + b"\n")
        with pytest.raises(UserError, match="c.jsonl:") as e:
            common.load_candidates(tmp_path / "c.jsonl")
        assert "\n" not in str(e.value)

    @LOADERS
    def test_bom_crlf_and_blank_lines(self, tmp_path, load):
        text = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in make_records(2))
        (tmp_path / "c.jsonl").write_text("\ufeff" + text.replace("\n", "\r\n"))
        with gzip.open(tmp_path / "c.jsonl.gz", "wt") as f:
            f.write(text)
        assert load(tmp_path / "c.jsonl") == make_records(2) == load(tmp_path / "c.jsonl.gz")


def record(**fields):
    return make_records(1)[0] | fields


WRONG = [{"label": 7}, {"answers": [5]}, {"documents": [{"title": "x"}]}, {"messages": [{"role": "wizard"}]}]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_field_of_another_type(cli, tmp_path, wrong):
    data = write_jsonl(tmp_path / "d.jsonl", [record(**wrong)])
    done = cli("collect_candidates", "hindsight", "--input", data, "--output", tmp_path / "o.jsonl")
    refused(done, "d.jsonl:1", *wrong)


@pytest.mark.parametrize("number", ["1e999", "9" * 400])
def test_numbers_that_no_float_holds(cli, tiny, tmp_path, number):
    row = json.dumps(record(reward="here")).replace('"here"', number)
    row = row.replace('"correct": true', f'"correct": true, "reward": {number}')
    (tmp_path / "d.jsonl").write_text(row + "\n")
    flags = ["--model", tiny, "--data", tmp_path / "d.jsonl", "--output", tmp_path / "o"]
    refused(cli("rescue", "--ordering", "reward", *flags), "d.jsonl:1")


def test_damaged_gzip(cli, tiny, tmp_path):
    content = bytearray(gzip.compress(json.dumps(record()).encode() * 50))
    content[60:80] = bytes(20)
    (tmp_path / "d.jsonl.gz").write_bytes(content)
    flags = ["--model", tiny, "--data", tmp_path / "d.jsonl.gz", "--output", tmp_path / "o"]
    refused(cli("rescue", "--ordering", "label", *flags), "d.jsonl.gz")


class TestArrays:
    def rows(self, tmp_path, text):
        (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return [row for _, row in read_rows(tmp_path / "a.json")]

    def test_whatever_the_layout(self, tmp_path):
        rows = [{"a": "é" * k, "b": [1, {"c": "]},["}]} for k in (1, 70_000, 3, 140_000)]
        for indent in (None, 1):
            assert self.rows(tmp_path, json.dumps(rows, indent=indent)) == rows
        assert self.rows(tmp_path, "\ufeff [ ] ") == []

    @pytest.mark.parametrize("text", ["[{}", "[{},", "[{}][{}]", "[1]", '[{"a": NaN}]', "[", b"[{\xff}]"])
    def test_what_is_none(self, tmp_path, text):
        with pytest.raises(UserError, match="a.json"):
            self.rows(tmp_path, text)


def test_memory_stays_bounded(tmp_path):
    """10,000 objects of an array that unpacks to 400 MB are read in less than 300 MB."""
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(b"[") + gzip.compress(b"{}," * 2**20) * 130)
    tracemalloc.start()
    try:
        assert sum(1 for _ in itertools.islice(read_rows(path), 10_000)) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "flag, value", [("seed", 10**400), ("temperature", 1e-40), ("max_new_tokens", 10**30), ("stop", "")]
)
def test_absurd_numbers(cli, tiny, tmp_path, flag, value):
    data = write_jsonl(tmp_path / "d.jsonl", [record()])
    flags = [f"--{flag}", value, "--model", tiny, "--input", data, "--output", tmp_path / "o.jsonl"]
    refused(cli("collect_candidates", "sample", *flags))


def test_a_chat_template_that_raises(cli, own, data, tmp_path):
    change(own / "tokenizer_config.json", chat_template="{{ raise_exception('not this way') }}")
    refused(cli("collect_candidates", "teacher", "--model", own, "--input", data, "--output", tmp_path / "o.jsonl"))
