"""Every input that users mistype, over all commands: one line, exit code 2, nothing written; and no model loaded to find it out, where none is needed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from families import tiny_folder
from prunescope.cli import main

# --- files of rows -------------------------------------------------------------------------------------------------------

Spoil = Callable[[dict[str, object], str], bytes]  # of a good row and its main field


def dumped(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def with_value(value: object) -> Spoil:
    return lambda good, field: dumped(good | {field: value})


def in_place_of(text: str) -> Spoil:
    """The value of the main field as raw JSON."""
    return lambda good, field: json.dumps(good | {field: "@@"}).replace('"@@"', text).encode()


def again(good: dict[str, object]) -> dict[str, object]:
    return good | {key: "the same" for key in good if key in ("id", "_id")}


LONG = "x" * 10 * 2**20
FILES: dict[str, Spoil] = {
    "empty": lambda good, field: b"",
    "empty lines": lambda good, field: b"\n \n\t\r\n\n",
    "a byte order mark alone": lambda good, field: b"\xef\xbb\xbf",
    "UTF-16, little end first": lambda good, field: dumped(good).decode().encode("utf-16"),
    "UTF-16, big end first": lambda good, field: b"\xfe\xff" + dumped(good).decode().encode("utf-16-be"),
    "UTF-16 without a mark": lambda good, field: dumped(good).decode().encode("utf-16-le"),
    "UTF-32": lambda good, field: dumped(good).decode().encode("utf-32"),
    "Latin-1": lambda good, field: dumped(good).replace(b'"w', b'"caf\xe9 w'),
    "a null byte": lambda good, field: dumped(good).replace(b'"w', b'"\0w'),
    "a null byte at the end": lambda good, field: dumped(good) + b"\0",
    "a picture": lambda good, field: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a line of 10 MB": lambda good, field: dumped(good) + LONG.encode(),
    "a text of 10 MB without its end": lambda good, field: b'{"' + field.encode() + b'": "' + LONG.encode(),
    "a line break in a text": lambda good, field: dumped(good).replace(b'"w', b'"w\n'),
    "a tab in a text": lambda good, field: dumped(good).replace(b'"w', b'"w\t'),
    "half of a surrogate pair": in_place_of('"w5 \\ud83d"'),
    "the other half": in_place_of('"w5 \\udE00 w6"'),
    "NaN": in_place_of("NaN"),
    "NaN in a field that is not read": lambda good, field: dumped(good).replace(b"{", b'{"score": NaN, '),
    "infinity": in_place_of("-Infinity"),
    "a number of 5000 digits": in_place_of("1" * 5000),
    "deep nesting": in_place_of("[" * 100_000 + "]" * 100_000),
    "deep nesting that does not end": lambda good, field: b"[" * 100_000,
    "deep objects": in_place_of('{"a":' * 100_000 + "1" + "}" * 100_000),
    "cut off": lambda good, field: dumped(good, good)[:-9],
    "an array without its end": lambda good, field: b"[" + dumped(good).strip(),
    "an empty array": lambda good, field: b"[]\n",
    "an array in a line": lambda good, field: dumped(good) + b"[1]\n",
    "single quotes": lambda good, field: repr(good).encode(),
    "a comma after a line": lambda good, field: dumped(good).strip() + b",\n" + dumped(good),
    "two objects in a line": lambda good, field: dumped(good).strip() + b" " + dumped(good),
    "a comment": lambda good, field: b"// mine\n" + dumped(good),
    "CSV": lambda good, field: b"a,b\n1,2\n",
    "YAML": lambda good, field: b"- prompt: w5\n",
    "a line that is a number": lambda good, field: dumped(good, 7),
    "a line that is a text": lambda good, field: dumped(good, "w5"),
    "a line that is null": lambda good, field: dumped(good, None),
    "no field of the name": lambda good, field: dumped({key: good[key] for key in good if key != field}),
    "a field in capitals": lambda good, field: dumped({key.upper(): value for key, value in good.items()}),
    "null in its place": with_value(None),
    "a number in its place": with_value(5),
    "true in its place": with_value(True),
    "a list in its place": with_value(["w5"]),
    "an object in its place": with_value({"text": "w5"}),
    "an empty text": with_value(""),
    "blanks alone": with_value(" \t\n"),
    "an id twice": lambda good, field: dumped(again(good), again(good)),
}  # fmt: skip
GZIPPED: dict[str, Callable[[bytes], bytes]] = {
    "not gzip at all": lambda content: content,
    "gzip that is cut off": lambda content: gzip.compress(content * 50)[:-20],
    "gzip with a wrong sum": lambda content: gzip.compress(content)[:-8] + b"\1\2\3\4\5\6\7\10",
}

Argv = Callable[[str], list[str]]  # of the path of the bad file
ABSENT = "/nowhere/model"  # an input that is found bad before the model is looked at


class Kind:
    """Files of one kind: a good row, the field that matters, commands that read it before any model, and spoilt forms that are no mistake here."""

    def __init__(self, good: dict[str, object], field: str, commands: list[Argv], fine: tuple[str, ...] = ()) -> None:
        self.good, self.field, self.commands, self.fine = good, field, commands, fine


KINDS = {
    "prompts": Kind({"prompt": "w5 w6", "id": "p"}, "prompt", [
        lambda path: ["layerwise", ABSENT, "--prompts", path],
        lambda path: ["generate", ABSENT, "drop:attn=1", "--prompts", path],
        lambda path: ["sweep", ABSENT, "--n", "1", "--prompts", path],
    ]),
    "questions": Kind({"question": "w5?", "choices": ["w6", "w7"], "answer": 0, "id": "q"}, "question", [
        lambda path: ["mcq", ABSENT, "drop:attn=1", "--questions", path],
    ]),
    "corpus": Kind({"text": "w5 w6", "_id": "d"}, "text", [
        lambda path: ["retrieve", ABSENT, "drop:attn=1", "--corpus", path, "--queries", path, "--qrels", path],
    ]),
    "tasks": Kind({"question": "w5?", "answer": "w6"}, "question", [
        lambda path: ["evaluate", ABSENT, "--tasks", path],
    ], ("an id twice",)),
}  # fmt: skip
ROW_CASES = [
    (kind, name, index % len(KINDS[kind].commands))
    for kind in KINDS
    for index, name in enumerate([*FILES, *GZIPPED])
    if name not in KINDS[kind].fine
]


def refused(argv: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that is said; nothing is written."""
    before = sorted(folder.rglob("*"))
    capfd.readouterr()
    code = main(argv if "--out" in argv else [*argv, "--out", str(folder / "out")])
    told = capfd.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("prunescope: ")]
    assert "Traceback" not in told.err, told.err[-3000:]
    assert code == 2, told
    assert len(lines) == 1
    assert len(lines[0]) < 900, lines[0][:900]
    assert sorted(folder.rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize(("kind", "name", "command"), ROW_CASES)
def test_a_bad_file_of_rows(
    kind: str, name: str, command: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = KINDS[kind]
    path = tmp_path / ("bad.jsonl.gz" if name in GZIPPED else "bad.jsonl")
    path.write_bytes(GZIPPED[name](dumped(one.good)) if name in GZIPPED else FILES[name](one.good, one.field))
    assert str(path) in refused(one.commands[command](str(path)), tmp_path, capfd)


# --- texts, tables, YAML -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder("llama", tmp_path_factory.mktemp("model") / "dense"))


CALIBRATION = [
    name
    for name in FILES
    if name not in ("an array in a line", "a line that is a text", "an id twice", "a comma after a line", "cut off")
]


@pytest.mark.parametrize(("name", "command"), [(name, i % 3) for i, name in enumerate(CALIBRATION)])
def test_a_bad_calibration_text(
    name: str, command: int, dense: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, prompts = tmp_path / "bad.jsonl", tmp_path / "prompts.txt"
    path.write_bytes(FILES[name]({"text": "w5 w6", "id": "t"}, "text"))
    prompts.write_text("w5 w6")
    argv = [
        ["drop", dense, "--n", "1", "--calibration", str(path)],
        ["sparsify", dense, "--sparsity", "0.5", "--calibration", str(path)],
        ["sweep", dense, "--n", "1", "--calibration", str(path), "--prompts", str(prompts), "--max-new-tokens", "2"],
    ][command]
    assert str(path) in refused(argv, tmp_path, capfd)


TABLES: dict[str, tuple[str, bytes]] = {
    "an empty CSV": ("q.csv", b""),
    "a CSV of a header": ("q.csv", b"question,choice0,choice1,answer\n"),
    "a CSV of one column": ("q.csv", b"what?\nwho?\n"),
    "a CSV with an answer out of range": ("q.csv", b"what?,a,b,C\n"),
    "a CSV with an answer of 5000 digits": ("q.csv", b"what?,a,b," + b"1" * 5000 + b"\n"),
    "a CSV in UTF-16": ("q.csv", "what?,a,b,A\n".encode("utf-16")),
    "a CSV with a null byte": ("q.csv", b"what?,a,b\0,A\n"),
    "a CSV with a field of 10 MB": ("q.csv", b"what?," + LONG.encode() + b",b,A\n"),
    "a CSV with a quote that does not end": ("q.csv", b'what?,"a,b,A\nwho?,a,b,A\n'),
    "a CSV with an empty question": ("q.csv", b" ,a,b,A\n"),
    "a CSV with an empty line first": ("q.csv", b"\n\n"),
    "a TSV of nothing": ("q.tsv", b""),
    "a TSV of a header": ("q.tsv", b"query-id\tcorpus-id\tscore\n"),
    "a TSV with blanks for tabs": ("q.tsv", b"q d 1\n"),
    "a TSV with a fraction": ("q.tsv", b"q\td\t0.5\n"),
    "a TSV with a word for a number": ("q.tsv", b"q\td\tyes\n"),
    "a TSV with a grade of 5000 digits": ("q.tsv", b"q\td\t" + b"9" * 5000 + b"\n"),
    "a TSV with a grade of 30 digits": ("q.tsv", b"q\td\t" + b"9" * 30 + b"\n"),
    "a TSV with a negative grade alone": ("q.tsv", b"q\td\t-1\n"),
    "a TSV of zeros": ("q.tsv", b"q\td\t0\n"),
    "a TSV with an unknown query": ("q.tsv", b"x\td\t1\n"),
    "a TSV with an unknown passage": ("q.tsv", b"q\tx\t1\n"),
    "a TSV that judges twice": ("q.tsv", b"q\td\t1\nq\td\t0\n"),
    "a TSV in UTF-16": ("q.tsv", "q\td\t1\n".encode("utf-16")),
    "a TSV with a null byte": ("q.tsv", b"q\td\0\t1\n"),
    "a TSV with a line of 10 MB": ("q.tsv", LONG.encode() + b"\td\t1\n"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_bad_table(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, content = TABLES[name]
    path = tmp_path / file
    path.write_bytes(content)
    (tmp_path / "docs.jsonl").write_text('{"_id": "d", "text": "w5"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "w5"}\n')
    argv = {
        ".csv": ["mcq", ABSENT, "drop:attn=1", "--questions", str(path)],
        ".tsv": ["retrieve", ABSENT, "drop:attn=1", "--corpus", str(tmp_path / "docs.jsonl"), "--queries", str(tmp_path / "queries.jsonl"), "--qrels", str(path)],
    }  # fmt: skip
    assert file in refused(argv[path.suffix], tmp_path, capfd)


YAML: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- 0.5\n",
    "a number": b"0.5\n",
    "a text": b"'*.up_proj'\n",
    "a word for a share": b"'*.up_proj': half\n",
    "NaN": b"'*.up_proj': .nan\n",
    "infinity": b"'*.up_proj': .inf\n",
    "a negative share": b"'*.up_proj': -0.5\n",
    "per cent": b"'*.up_proj': 50\n",
    "true": b"'*.up_proj': true\n",
    "a list of shares": b"'*.up_proj': [0.5]\n",
    "a number for a pattern": b"3: 0.5\n",
    "null for a pattern": b"~: 0.5\n",
    "a star that is not quoted": b"*.up_proj: 0.5\n",
    "tabs": b"'*.up_proj':\n\t'x': 1\n",
    "UTF-16": "'*.up_proj': 0.5\n".encode("utf-16"),
    "Latin-1": b"'*.caf\xe9': 0.5\n",
    "a null byte": b"'*.up_\0proj': 0.5\n",
    "two documents": b"'*.up_proj': 0.5\n---\n'*.up_proj': 0.6\n",
    "deep nesting": b"[" * 5000 + b"]" * 5000,
    "an anchor without an end": b"&a [*a]\n",
    "an object of Python": b"!!python/object/apply:os.system ['true']\n",
    "a pattern twice that matches nothing": b"'*.nothing': 0.5\n'*.nothing': 0.5\n",
}


@pytest.mark.parametrize("name", YAML)
def test_a_bad_sparsity_map(name: str, dense: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "map.yaml"
    path.write_bytes(YAML[name])
    argv = ["sparsify", dense, "--sparsity", "0.5", "--calibration", "none", "--method", "magnitude"]
    refused([*argv, "--sparsity-map", str(path)], tmp_path, capfd)


CONFIGS = {name: content for name, content in YAML.items() if name != "empty"} | {
    "an unknown option": b"sparsety: 0.5\n",
    "a word for a number": b"batch_size: many\n",
    "a list for a text": b"device: [cpu]\n",
    "another command's options": b"prompts: x\nquestions: x\ncorpus: x\n",
    "JSON cut off": b'{"device": "cpu"',
}
COMMANDS = {
    "drop": [ABSENT],
    "sparsify": [ABSENT],
    "layerwise": [ABSENT],
    "generate": [ABSENT, "drop:attn=1"],
    "mcq": [ABSENT, "drop:attn=1"],
    "retrieve": [ABSENT, "drop:attn=1"],
    "evaluate": [ABSENT],
    "sweep": [ABSENT],
    "advise": [ABSENT],
    "speed": [ABSENT],
    "report": [ABSENT],
    "demo": [],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config_file(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [*COMMANDS][[*CONFIGS].index(name) % len(COMMANDS)]
    path = tmp_path / "config.yaml"
    path.write_bytes(CONFIGS[name])
    refused([command, *COMMANDS[command], "--config", str(path)], tmp_path, capfd)


# --- options and MODEL ---------------------------------------------------------------------------------------------------

OPTIONS = [
    *(("batch-size", value) for value in ("0", "-1", "1.5", "ten", "", "1e3", "1" * 5000)),
    *(("seed", value) for value in ("-1", "2147483648", "x", "0.5", "")),
    *(("device", value) for value in ("gpu", "cuda:99", "meta", "", "cpu:x")),
    *(("dtype", value) for value in ("int8", "fp8", "", "float", "Float32")),
    ("colour", "red"),
    *(("out", value) for value in ("/", "/proc/1/nothing", "/dev/null", "")),
]


@pytest.mark.parametrize(
    ("option", "value", "command"), [(*pair, [*COMMANDS][i % 9]) for i, pair in enumerate(OPTIONS)]
)
def test_a_bad_value_of_an_option(
    option: str, value: str, command: str, dense: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [command, *(dense if word == ABSENT else word for word in COMMANDS[command])]
    refused([*argv, f"--{option}", value], tmp_path, capfd)


MODELS = [
    "", " ", ".", "..", "/", "/dev/null", "~nobody-here/model", "a/b/c", "a b", "org/", "/org", "-", "x" * 5000, "org/" + "x" * 300, "nul\0l",
    "caf\udce9", "https://huggingface.co/org/name", "file:///tmp/model", "model.gguf", "model.safetensors", "drop:", "drop:attn=1", "org/name@main", "C:\\model",
    "\n", "org\n/name", "smollm2", "*", "[red]x[/red]",
]  # fmt: skip


@pytest.mark.parametrize(("ref", "command"), [(ref, [*COMMANDS][i % 9]) for i, ref in enumerate(MODELS)])
def test_a_model_that_is_none(ref: str, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused([command, ref, *COMMANDS[command][1:]], tmp_path, capfd)


@pytest.mark.parametrize("ref", MODELS)
def test_a_target_that_is_none(ref: str, dense: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["layerwise", "generate", "mcq", "retrieve", "evaluate", "speed"][MODELS.index(ref) % 6]
    if ref != "drop:attn=1":
        refused([command, dense, ref], tmp_path, capfd)


# --- damaged folders -----------------------------------------------------------------------------------------------------

JSON: dict[str, Callable[[dict[str, object]], bytes]] = {
    "empty": lambda good: b"",
    "cut off": lambda good: dumped(good)[:-20],
    "a list": lambda good: b"[]",
    "a number": lambda good: b"1",
    "null": lambda good: b"null",
    "an empty object": lambda good: b"{}",
    "UTF-16": lambda good: json.dumps(good).encode("utf-16"),
    "Latin-1": lambda good: dumped(good | {"note": "x"}).replace(b'"x"', b'"\xe9"'),
    "null bytes": lambda good: b"\0" * 100,
    "deep nesting": lambda good: b"[" * 100_000,
    "a number of 5000 digits": lambda good: dumped(good | {"x": 1}).replace(b'"x": 1', b'"x": ' + b"1" * 5000),
}  # fmt: skip
MODEL_FILES = {
    "config.json": ["layerwise"],
    "prunescope.json": ["generate", "drop:attn=1"],
    "adapter_config.json": ["drop"],
    "tokenizer.json": ["mcq", "drop:attn=1"],
    "model.safetensors.index.json": ["sparsify", "--sparsity", "0.5"],
}


@pytest.mark.parametrize("file", MODEL_FILES)
@pytest.mark.parametrize("name", JSON)
def test_a_damaged_file_of_a_model(file: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder("llama", tmp_path / "dense")
    if file == "adapter_config.json":
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    if file == "model.safetensors.index.json":
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    path = folder / file
    path.write_bytes(JSON[name](json.loads(path.read_text()) if path.is_file() else {"schema_version": 1}))
    command, *rest = MODEL_FILES[file]
    refused([command, str(folder), *rest], tmp_path, capfd)


@pytest.mark.parametrize("name", JSON)
def test_a_damaged_run(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_bytes(JSON[name]({"schema_version": 1, "command": "layerwise"}))
    refused(["report", str(run)], tmp_path, capfd)


def test_there_are_many() -> None:
    """Of those in test_cli.py there are a hundred more."""
    assert (
        len(ROW_CASES) + len(CALIBRATION) + len(TABLES) + len(YAML) + len(CONFIGS) + len(OPTIONS) + 2 * len(MODELS)
        + len(JSON) * (len(MODEL_FILES) + 1)
    ) > 450  # fmt: skip
