"""Files in and out: what is read is checked, line by line; what is written is whole, or not there at all."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import zlib

import common
from common import UserError, sync

MAX_LINE = 10 * 2**20  # bytes of one JSONL line: more is a broken file, and reading it whole would not be bounded
CHUNK = 2**16  # characters of a JSON array that are read at once


def read_source(name, split="train", config=None, subset=None):
    """Yield (where, row) of a data file, of a folder of data files, or of a data set of the hub; streams.

    split, config, subset: which files of a folder or of a data set, as datasets' load_dataset calls them (split, name,
    data_dir). datasets says which files these are, and read_rows reads them. Raises UserError, also where a folder's
    README.md names a file outside the folder.
    """
    folder = os.path.realpath(name) if os.path.isdir(name) else None
    if not folder and (os.path.isfile(name) or kind_of(name) in READERS):
        yield from read_rows(name)
        return
    import datasets

    try:
        builder = datasets.load_dataset_builder(folder or name, config, data_dir=subset)
        files = builder.config.data_files or {}
        if split not in files:
            raise UserError(f"{name} has the splits {', '.join(map(str, files))}, not {split}: choose one by --split")
        for file in files[split]:
            file = os.path.normpath(file) if folder else file
            if not file.startswith(folder + os.sep if folder else "hf://"):
                raise UserError(f"{name} names a file outside of it, {file}: name that file by --input")
            yield from read_rows(file if folder else datasets.DownloadManager().download(file))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        reason = str(e.__cause__ or e).strip().partition("\n")[0]
        raise UserError(f"{name} cannot be read ({reason}): name files by --input, a part by --split, --config") from e


def kind_of(path):
    return pathlib.Path(path).name.removesuffix(".gz").rpartition(".")[2].lower()


def read_rows(path):
    """Yield (where, dict) for every row of a data file: JSONL, JSON (an array, or a row a line), CSV, also .gz; and
    Parquet. `where` is "file:line" for messages.

    Streams: no line, and no object of an array, is longer than MAX_LINE. No value is guessed: a text stays as the file
    has it. Raises UserError on what is missing, torn, not UTF-8, not an object, or NaN.
    """
    path, kind = pathlib.Path(path), kind_of(path)
    if kind not in READERS:
        raise UserError(f"{path}: expected .{', .'.join(READERS)}, plain or .gz")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            yield from READERS[kind](path, f)
    except (EOFError, OSError, ValueError, RecursionError, zlib.error, csv.Error) as e:  # torn, a false .gz, not UTF-8
        raise UserError(f"{path}: cannot be read ({e})") from e


def bounded_lines(path, f):
    for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), 1):
        if len(line) > MAX_LINE:
            raise UserError(f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB")
        yield f"{path}:{number}", line


def read_lines(path, f):
    yield from ((where, parse_object(line, where)) for where, line in bounded_lines(path, f) if line.strip())


def read_array(path, f):
    """The objects of a JSON array, one after the other."""
    if f.peek(16).lstrip(b"\xef\xbb\xbf \r\n\t")[:1] != b"[":
        yield from read_lines(path, f)  # data sets call a row a line .json too
        return
    text, decoder, number = io.TextIOWrapper(f, encoding="utf-8-sig"), json.JSONDecoder(), 1
    rest = text.read(CHUNK).lstrip()[1:]
    while not (rest := rest.lstrip(", \r\n\t")).startswith("]"):
        where = f"{path}:{number}"
        try:
            end = decoder.raw_decode(rest)[1]
        except ValueError as e:  # read on: the object goes on behind the chunk
            more = text.read(max(CHUNK, len(rest)))
            if not more or len(rest) > MAX_LINE:
                raise UserError(f"{where}: no JSON array of objects of at most {MAX_LINE >> 20} MiB ({e})") from e
            rest += more
        else:
            yield where, parse_object(rest[:end].encode(), where)
            rest, number = rest[end:], number + 1
    if (rest[1:] + text.read(CHUNK)).strip():
        raise UserError(f"{path}: something follows the array")


def read_csv(path, f):
    csv.field_size_limit(MAX_LINE)
    reader = csv.DictReader((line.decode("utf-8-sig") for _, line in bounded_lines(path, f)), strict=True)
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{where}: the row has more or fewer fields than the header")
        yield where, row


def read_parquet(path, f):
    import pyarrow.parquet

    batches = pyarrow.parquet.ParquetFile(f).iter_batches(batch_size=128)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))


READERS = {"jsonl": read_lines, "json": read_array, "csv": read_csv, "parquet": read_parquet}


def row_id(row, default):
    """A row's own id as a text, or `default` where it has none."""
    return default if row.get("id") in (None, "") else str(row["id"])


def text_field(row, name, where, optional=False, strip=str.strip):
    """A row's text, stripped; UserError where it has none, unless optional."""
    value = "" if optional and row.get(name) is None else row.get(name)
    if not isinstance(value, str) or not (optional or value.strip()):
        raise UserError(f"{where}: field {name!r} must be a non-empty string")
    return strip(value)


def parse_object(line, where):
    """The object of JSON in UTF-8; UserError, naming `where`, for anything else, and for what could not be written
    back: NaN, the infinity that 1e999 becomes, a lone surrogate."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: cannot be read as JSON in UTF-8 ({str(e).splitlines()[0]})") from e
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def as_dict(value):
    return value if isinstance(value, dict) else {}


def is_message(m):
    roles = ("user", "assistant", "system")
    return isinstance(m, dict) and m.get("role") in roles and isinstance(m.get("content"), str)


TEXT = (lambda x: x is None or isinstance(x, str), "a string or null")
TEXTS = ("label", "task", "instruction", "input", "premise", "hypothesis", "question", "subset")
RECORD_FIELDS = dict.fromkeys(TEXTS, TEXT) | {
    "answers": (
        lambda x: x is None or isinstance(x, list) and all(isinstance(a, str) and a.strip() for a in x),
        "null or a list of non-empty strings",
    ),
    "messages": (lambda x: x is None or isinstance(x, list) and all(map(is_message, x)), "a list of {role, content}"),
    "documents": (
        lambda x: isinstance(x, list) and all(isinstance(d, dict) and {"title", "text", "gold"} <= {*d} for d in x),
        "a list of {title, text, gold}",
    ),
}


def read_records(path, bare=True):
    """Yield the records of a JSONL file, each checked; with `bare` they may have no candidates yet. An id that comes
    twice, or no record at all, is a UserError."""
    seen = {}
    for where, record in read_rows(path):
        check_record(record, where, bare)
        if record["id"] in seen:
            raise UserError(f"{where}: id {record['id']!r} was already on {seen[record['id']]}")
        seen[record["id"]] = where
        yield record
    if not seen:
        raise UserError(f"{path}: holds no records")


def load_candidates(path, limit=None):
    """A candidates file -> its records, all or the first `limit`, each checked."""
    return list(itertools.islice(read_records(path, bare=False), limit))


def check_record(record, where, bare=False):
    """common.check_record, and the fields that only collecting and evaluating read. With `bare` a record may have no
    candidates yet."""
    none_yet = bare and record.get("candidates", []) == []
    common.check_record(record | {"candidates": [{"text": "-", "source": "-"}]} if none_yet else record, where)
    for field, (valid, expected) in RECORD_FIELDS.items():
        if field in record and not valid(record[field]):
            raise UserError(f"{where}: field {field!r} must be {expected}")


def content_of(path):
    """A digest of a file, or of a model folder's weights: of each file the last MiB, because training changes all."""
    if os.path.isfile(path):
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(path).glob("*.safetensors")):
        with open(file, "rb") as f:
            f.seek(max(0, file.stat().st_size - 2**20))
            digest.update(f.read())
    return digest.hexdigest()


def write_atomically(path, text):
    """Replace a file. After a crash or a power loss it has the old or the new content, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)
