"""Data sets as they are downloaded: rows of CSV, a JSON array, or JSONL."""

import csv
import io
import json

from collecting import files
from common import UserError


def read_rows(path):
    """files.read_rows, also for CSV and a JSON array: yield (where, dict); streams."""
    with files.open_data(path, ["jsonl", "json", "csv"]) as (kind, f):
        if kind == "jsonl" or kind == "json" and f.peek(16).lstrip(b"\xef\xbb\xbf \r\n\t")[:1] != b"[":
            yield from files.read_rows(path, [kind])  # data sets call lines of JSON .json too
        elif kind == "csv":
            yield from csv_rows(path, f)
        else:
            yield from array_rows(path, f)


def array_rows(path, f):
    """The objects of a JSON array, one after the other: a few megabytes of it are in memory at once."""
    text, decoder, number, after = io.TextIOWrapper(f, encoding="utf-8-sig"), json.JSONDecoder(), 0, "["
    try:
        rest = text.read(2**16).lstrip()[1:]
        while True:
            rest = rest.lstrip() or text.read(2**16).lstrip()
            if rest[:1] == "]" and after != ",":
                if rest[1:].strip() or text.read(2**16).strip():
                    raise UserError(f"{path}: something follows the array")
                return
            number, where = number + 1, f"{path}:{number + 1}"
            while True:  # read on until the object and the sign behind it are there
                try:
                    _, end = decoder.raw_decode(rest)
                    after = rest[end:].lstrip()[:1]
                except ValueError:
                    after = ""
                more = "" if after else text.read(max(2**16, len(rest)))
                if not more or len(rest) > files.MAX_LINE:
                    break
                rest += more
            if after not in ("]", ","):
                files.parse_json(rest[: files.MAX_LINE].encode(), where)  # says what is wrong
                raise UserError(f"{where}: not a JSON array of objects of at most {files.MAX_LINE >> 20} MiB")
            yield where, files.as_object(files.parse_json(rest[:end].encode(), where), where)
            rest = rest[end:].lstrip()
            rest = rest[1:] if after == "," else rest
    except (UnicodeError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON in UTF-8 ({e})") from e


def csv_rows(path, f):
    csv.field_size_limit(files.MAX_LINE)
    text = io.TextIOWrapper(f, encoding="utf-8-sig", errors="strict", newline="")
    reader = csv.DictReader(bounded_lines(path, text), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: the row has more or fewer fields than the header")
            yield where, row
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{path}:{reader.line_num + 1}: not valid CSV in UTF-8 ({e})") from e


def bounded_lines(path, text):
    for line in iter(lambda: text.readline(files.MAX_LINE + 1), ""):
        if len(line) > files.MAX_LINE:
            raise UserError(f"{path}: a line is longer than {files.MAX_LINE >> 20} MiB")
        yield line
