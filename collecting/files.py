"""Data sets as they are downloaded: rows of CSV, a JSON array, or JSONL."""

import csv
import io

import common
from common import UserError

MAX_ARRAY = 2**30  # bytes of a .json file, the one format that cannot be streamed line by line


def read_rows(path):
    """common.read_rows, also for CSV and a JSON array: yield (where, dict); streams, a JSON array excepted."""
    with common.open_data(path, ["jsonl", "json", "csv"]) as (kind, f):
        if kind == "jsonl" or kind == "json" and f.peek(16).lstrip(b"\xef\xbb\xbf \r\n\t")[:1] != b"[":
            yield from common.read_rows(path, [kind])  # data sets call lines of JSON .json too
        elif kind == "csv":
            yield from csv_rows(path, f)
        else:
            content = f.read(MAX_ARRAY + 1)
            if len(content) > MAX_ARRAY:
                raise UserError(f"{path}: an array of more than {MAX_ARRAY >> 20} MiB is not read: make it JSONL")
            rows = common.parse_json(content, f"{path}:1")
            if not isinstance(rows, list):
                raise UserError(f"{path}:1: expected a JSON array of objects")
            yield from ((f"{path}:{i}", common.as_object(row, f"{path}:{i}")) for i, row in enumerate(rows, 1))


def csv_rows(path, f):
    csv.field_size_limit(common.MAX_LINE)
    reader = csv.DictReader(io.TextIOWrapper(f, encoding="utf-8-sig", errors="strict", newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: the row has more or fewer fields than the header")
            yield where, row
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{path}:{reader.line_num + 1}: not valid CSV in UTF-8 ({e})") from e
