"""The command `bigembed`: help, exit statuses, what it prints and where, signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import bigembed
from bigembed import HashBuckets, Table, Vocabulary
from bigembed.cli import main as cli
from bigembed.cli import values
from bigembed.cli.output import counted, printable


@pytest.fixture
def table(tmp_path):
    """The path of a table of 5000 rows: three in the base, two in the journal."""
    path = str(tmp_path / "words.bigembed")
    with Table.create(path, 5000, 4, init="zeros", seed=7) as made:
        made.write([1, 2, 4999], np.ones((3, 4), np.float32))
        made.commit("first")
        made.merge()
        made.write([3, 4], np.full((2, 4), 2, np.float32))
        made.commit("second", payload={"epoch": 2})
    return path


def run(line, capsys):
    status = cli.main(line)
    return status, *capsys.readouterr()


def run_child(line, **options):
    """The command in a process of its own: (status, output, errors), as bytes."""
    command = [sys.executable, "-m", "bigembed.cli.main", *line]
    child = subprocess.run(command, capture_output=True, timeout=120, **options)
    return child.returncode, child.stdout, child.stderr


def run_by_shell(text, *args):
    """A line of shell, in which "$@" is the command: (status, output, errors), as bytes."""
    command = ["bash", "-c", text, "bash", sys.executable, "-m", "bigembed.cli.main", *args]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    child = subprocess.run(command, capture_output=True, timeout=120, env=buffered)
    return child.returncode, child.stdout, child.stderr


@pytest.fixture
def words(tmp_path):
    """The path of a table of four rows and their tokens."""
    path = str(tmp_path / "tokens.bigembed")
    with Table.create(path, 4, 2, init="zeros") as made:
        made.write([0, 1, 2, 3], np.array([[1, 0], [1, 1], [0, 1], [-1, 0]], np.float32))
        made.commit()
        Vocabulary.create(made, ["king", "queen", "\u00e9", "<unk>"])
    return path


def damage(path, offset):
    """Flip one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 255]))


def test_version(capsys):
    assert run(["--version"], capsys) == (0, f"bigembed {bigembed.__version__}\n", "")


def test_help_lists_every_command_with_examples(capsys):
    status, out, err = run(["--help"], capsys)
    assert (status, err) == (0, "")
    commands = ("demo", "convert", "export", "copy", "info", "verify", "lookup", "nearest")
    for word in (*commands, "examples:", "bigembed info glove.bigembed"):
        assert word in out


@pytest.mark.parametrize("command", ["demo", "convert", "export", "copy", "info", "verify", "lookup", "nearest"])
def test_each_command_has_help(command, capsys):
    status, out, err = run([command, "--help"], capsys)
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: bigembed {command}")


def test_demo_help_names_its_options(capsys):
    out = run(["demo", "--help"], capsys)[1]
    for option in ["text", "tokens", "rows", "dim", "seconds", "steps", "batch", "cache-bytes", "path", "keep", "seed"]:
        assert f"--{option}" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["info"], "required: TABLE"),
        (["demo", "--rows", "many"], "--rows: 'many' is not a whole number"),
        (["demo", "--rows", "0"], "--rows: must be at least 1"),
        (["demo", "--rows", "-5"], "--rows: '-5' is not a whole number"),
        (["demo", "--seed", "1.5"], "--seed: '1.5' is not a whole number"),
        (["demo", "--seconds", "0"], "--seconds: '0' is not a positive number"),
        (["demo", "--seconds", "nan"], "--seconds: 'nan' is not a positive number"),
        (["demo", "--cache-bytes", "lots"], "--cache-bytes: 'lots' is not a size"),
        (["demo", "--cache-bytes", "3QB"], "--cache-bytes: '3QB' is not a size"),
        (["demo", "--cache-bytes", "0.1"], "--cache-bytes: '0.1' is less than one byte"),
        (["demo", "--tokens", "letters"], "--tokens: invalid choice: 'letters'"),
    ],
)
def test_wrong_use_has_status_2(line, message, capsys):
    status, out, err = run(line, capsys)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1_000", 1000),
        ("512MiB", 512 << 20),
        ("2gib", 2 << 30),
        ("1.5 KiB", 1536),
        ("3MB", 3_000_000),
        ("7b", 7),
        ("1TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert values.size(text) == size


def test_info_shows_the_table(table, capsys):
    status, out, err = run(["info", table], capsys)
    assert (status, err) == (0, "")
    shown = dict(line.split("  ", 1) for line in out.splitlines() if not line.startswith(" "))
    shown = {label: value.strip() for label, value in shown.items()}
    assert shown["table"] == table
    assert shown["shape"] == "5,000 x 4 float32"
    assert shown["state columns"].endswith("(1), owned by no optimizer yet")
    assert shown["initial values"] == "constant(0), seed 7"
    assert shown["logical size"] == "80 kB"
    assert shown["base"] == "3 rows written"
    assert shown["journal"].startswith("2 rows, ")
    assert out.splitlines()[-1].endswith("  second")


def test_info_as_json(table, capsys):
    status, out, _ = run(["info", "--json", table], capsys)
    facts = json.loads(out)
    assert status == 0
    assert (facts["shape"], facts["dtype"], facts["owner"]) == ([5000, 4], "float32", None)
    assert facts["logical_bytes"] == 80_000
    assert facts["disk_bytes"] > 0
    assert (facts["base_rows"], facts["journal"]["rows"]) == (3, 2)
    last = facts["generations"][-1]
    assert (last["note"], last["payload"]) == ("second", {"epoch": 2})


def test_info_and_verify_read_beside_a_writer(table, capsys):
    with Table.open(table) as writer:
        writer.write([9], np.ones((1, 4), np.float32))
        for command in ("info", "verify"):
            assert run([command, table], capsys)[0] == 0
        writer.commit("beside")


def test_verify_of_a_sound_table(table, capsys):
    status, out, err = run(["verify", table], capsys)
    assert (status, err) == (0, "")
    assert out.startswith(f"{table}: sound at generation ")
    assert "3 rows in 1 chunk, 2 records in the journal" in out


def test_verify_of_a_damaged_base(table, capsys):
    damage(os.path.join(table, "weight", "c.0.0"), 4 * 6 + 1)  # in row 1, of six words
    status, out, err = run(["verify", table], capsys)
    assert (status, out) == (1, "")
    assert err.startswith("bigembed: error: ")
    assert err.count("\n") == 1
    assert "c.0.0" in err


def test_verify_of_a_table_with_a_lost_chunk(table, capsys):
    os.unlink(os.path.join(table, "weight", "c.0.0"))
    status, out, err = run(["verify", table], capsys)
    assert (status, out) == (1, "")
    assert "c.0.0" in err


@pytest.mark.parametrize("command", ["info", "verify"])
def test_what_is_no_table_has_status_1(command, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no table")
    for path, message in [(tmp_path / "missing", "does not exist"), (tmp_path, ""), (tmp_path / "notes.txt", "")]:
        status, out, err = run([command, str(path)], capsys)
        assert (status, out) == (1, "")
        assert err.startswith("bigembed: error: ")
        assert err.count("\n") == 1
        assert str(path) in err
        assert message in err


def test_interrupt_has_status_130(table, capsys, monkeypatch):
    monkeypatch.setattr(Table, "verify", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(["verify", table], capsys) == (130, "", "bigembed: interrupted\n")


def test_commands_that_need_no_torch_do_not_import_it(table):
    code = (
        "import sys; from bigembed.cli import main as cli; assert 'torch' not in sys.modules; "
        f"assert cli.main(['info', {table!r}]) == 0; assert cli.main(['verify', {table!r}]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# -- what is printed --------------------------------------------------------------------------------------------


def test_printable_shows_controls_and_keeps_spaces():
    assert printable("a  b\t\x1b[31m\u202e\udce9\u00e9") == "a  b\\t\\x1b[31m\\u202e\\udce9\u00e9"


def test_counts_have_their_nouns():
    assert [counted(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]


def test_an_error_keeps_its_spaces(tmp_path, capsys):
    path = str(tmp_path / "a  b.bigembed")
    assert f"{path} does not exist" in run(["info", path], capsys)[2]


def test_an_error_keeps_its_lines(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {"first\x1b[31m": np.ones((3, 2), np.float32), "second": np.ones((3, 2), np.float32)}
    path = str(tmp_path / "two.safetensors")
    safetensors.save_file(tensors, path)
    status, out, err = run(["convert", path, str(tmp_path / "t")], capsys)
    assert (status, out) == (2, "")
    assert [line.split()[0] for line in err.splitlines()[1:3]] == ["first\\x1b[31m", "second"]


@pytest.mark.parametrize("command", ["info", "verify", "copy", "export", "convert"])
def test_no_escape_of_a_path_reaches_the_terminal(command, words, tmp_path, capsys):
    red = str(tmp_path / "a\x1b[31m b")
    np.save(tmp_path / "rows.npy", np.eye(2, dtype=np.float32))
    if command in ("info", "verify"):
        os.rename(words, red)
    line = {
        "copy": ["copy", words, red],
        "export": ["export", words, red, "--format", "npy"],
        "convert": ["convert", str(tmp_path / "rows.npy"), red],
    }.get(command, [command, red])
    for expected in (0, 0 if command in ("info", "verify") else 2):  # made, and then in the way
        status, out, err = run(line, capsys)
        assert status == expected
        assert "\x1b" not in out + err
        assert f"{tmp_path}/a\\x1b[31m b" in out + err


def test_no_escape_of_a_wrong_command_line_reaches_the_terminal(words, capsys):
    status, out, err = run(["info", words, "\x1b[31m"], capsys)
    assert (status, out) == (2, "")
    assert "unrecognized arguments: \\x1b[31m" in err


def test_what_the_output_cannot_encode_is_escaped(words, tmp_path):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    status, out, err = run_child(["lookup", words, "\u00e9"], env=ascii_only)
    assert (status, out, err) == (0, b"\\xe9\t0.0 1.0\n", b"")
    missing = os.fsencode(tmp_path) + b"/caf\xe9"
    status, out, err = run_child(["info", missing], env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert (status, out) == (1, b"")
    assert b"caf\\udce9 does not exist" in err
    assert b"Traceback" not in err


def test_closed_standard_error_is_no_bar_and_no_message(words):
    status, out, err = run_by_shell('"$@" 2>&-', "nearest", words, "king", "--count", "1")
    assert (status, out, err) == (0, b"0.7071\tqueen\n", b"")
    assert run_by_shell('"$@" 2>&-', "info", words + "-not") == (1, b"", b"")


def test_closed_standard_output_is_silent(words):
    assert run_by_shell('"$@" >&-', "verify", words) == (0, b"", b"")


@pytest.mark.parametrize("line", [["info"], ["--help"]])
def test_a_reader_that_has_gone_is_no_error(line, words):
    path = [words] if line == ["info"] else []
    status, out, err = run_by_shell('"$@" | true; exit ${PIPESTATUS[0]}', *line, *path)
    assert (status, out, err) == (141, b"", b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_said_once(words):
    status, out, err = run_by_shell('"$@" >/dev/full', "info", words)
    assert (status, out) == (1, b"")
    assert err == b"bigembed: error: [Errno 28] No space left on device\n"


def test_convert_says_what_it_made(tmp_path, capsys):
    source, target = tmp_path / "w.txt", str(tmp_path / "t")
    source.write_text("2 2\na 1 2\nb 3 4\n")
    out = run(["convert", str(source), target], capsys)[1].splitlines()
    assert out[0].startswith(f"{target}: made from word2vec-text, 2 rows x 2, in ")
    assert out[1:] == ["2 tokens"]
    source.write_text("a 1 2\na 3\na 3 4\n")
    line = ["convert", str(source), target, "--overwrite", "--format", "glove", "--skip-bad-lines", "--rows", "3"]
    out = run(line, capsys)[1].splitlines()
    assert out[1:] == [
        "1 more row starts at its initial values",
        "2 tokens, 1 of them again (the first one counts)",
        "  'a': row 1 again, row 0 counts",
        "1 line was skipped",
    ]
    np.save(tmp_path / "one.npy", np.ones((1, 2), np.float16))
    out = run(["convert", str(tmp_path / "one.npy"), target, "--overwrite"], capsys)[1]
    assert ": made from npy, 1 row x 2 of float16, in " in out


def shown_by_info(path, capsys):
    lines = run(["info", path], capsys)[1].splitlines()
    return {label: value.strip() for label, value in (line.split("  ", 1) for line in lines if line[0] != " ")}


FASTTEXT = {"kind": "fasttext", "minn": 3, "maxn": 6, "bucket": 2_000_000, "first_row": 4}


@pytest.mark.parametrize(
    ("subwords", "shown"),
    [
        (FASTTEXT, "fasttext, 3 to 6 characters, 2,000,000 buckets"),
        ({**FASTTEXT, "pruned": [7, 9]}, "fasttext, 3 to 6 characters, 2 of 2,000,000 buckets"),
        (
            {"kind": "finalfusion", "minn": 3, "maxn": 6, "exponent": 10, "first_row": 4},
            "finalfusion, 3 to 6 characters, 1,024 buckets",
        ),
        (
            {"kind": "floret", "minn": 4, "maxn": 5, "hash_count": 2, "hash_seed": 0, "num_rows": 4, "first_row": 0}
            | {"bow": "<", "eow": ">"},
            "floret, 4 to 5 characters, 2 of 4 rows each",
        ),
        ({"kind": "later"}, "later, which this version does not know"),
    ],
)
def test_info_shows_subwords(subwords, shown, tmp_path, capsys):
    path = str(tmp_path / "t")
    with Table.create(path, 4, 2) as made:
        Vocabulary.create(made, ["a"], subwords=subwords)
    facts = shown_by_info(path, capsys)
    assert (facts["vocabulary"], facts["subwords"]) == ("1 token", shown)
    assert "unknown tokens" not in facts


@pytest.mark.parametrize(
    ("unknown", "shown"),
    [("b", "row 1"), (-1, "no row"), (HashBuckets(2, 2), "hashed into 2 rows from row 2 on"), (None, None)],
)
def test_info_shows_what_stands_for_unknown_tokens(unknown, shown, tmp_path, capsys):
    path = str(tmp_path / "t")
    with Table.create(path, 4, 2) as made:
        Vocabulary.create(made, ["a", "b"], unknown=unknown)
    assert shown_by_info(path, capsys).get("unknown tokens") == shown


def test_info_names_standard_input(tmp_path, capsys):
    path = str(tmp_path / "t")
    assert run_child(["convert", "-", path], input=b"1 2\na 1 2\n")[::2] == (0, b"")
    assert shown_by_info(path, capsys)["converted from"] == "word2vec-text: standard input"


# -- errors in words of the command line ------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["info", "verify", "lookup {} a", "nearest {} a", "export {} x.npy", "copy {} x"])
def test_a_missing_table_is_made_by_a_command(line, tmp_path, capsys):
    path = str(tmp_path / "nosuch.bigembed")
    command = line.format(path).split() if "{}" in line else [line, path]
    status, out, err = run(command, capsys)
    assert (status, out) == (1, "")
    assert f"{path} does not exist" in err
    assert "bigembed convert or bigembed demo" in err
    assert "Table.create" not in err


def test_a_copy_that_is_in_the_way(words, table, capsys):
    status, out, err = run(["copy", words, table], capsys)
    assert (status, out) == (2, "")
    assert err == f"bigembed: error: {table} exists. Choose another target, or pass --overwrite.\n"


@pytest.mark.parametrize("line", [["lookup", "king", "nosuch"], ["nearest", "nosuch"]])
def test_an_unknown_token_prints_nothing_else(line, words, capsys):
    status, out, err = run([line[0], words, *line[1:]], capsys)
    assert (status, out) == (2, "")
    assert f"'nosuch' (at position {len(line) - 2}) is not in the vocabulary" in err
    assert "--unknown TOKEN" in err
    assert "rows(" not in err


@pytest.mark.parametrize("command", ["lookup", "nearest"])
@pytest.mark.parametrize("row", ["4", "99999999999999999999", "9" * 5000])
def test_a_row_that_is_not_there(command, row, words, capsys):
    status, out, err = run([command, words, "--rows", row], capsys)
    assert (status, out) == (2, "")
    assert f"there is no row {row}: this table has 4 rows (valid ids are 0 to 3)" in err


def test_rows_by_number(words, capsys):
    assert run(["lookup", words, "--rows", "3", "0"], capsys) == (0, "3\t-1.0 0.0\n0\t1.0 0.0\n", "")


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("convert", "read and check every row, write nothing"),
        ("convert", "--unknown=-x if it begins with a dash"),
        ("lookup", "after -- if one begins with a dash"),
    ],
)
def test_help_says(command, text, capsys):
    assert text in " ".join(run([command, "--help"], capsys)[1].split())


def test_names_on_demand():
    from bigembed.convert.nearest import nearest
    from bigembed.storage.copy import copy_table

    assert (bigembed.nearest, bigembed.copy_table) == (nearest, copy_table)
    assert {"nearest", "copy_table"} <= set(bigembed.__all__)
    code = "import sys, bigembed; assert not [m for m in sys.modules if m.startswith(('bigembed.convert', 'zarr'))]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_on_what_exists_names_its_own_open(table, tmp_path):
    for path in (table, tmp_path):
        with pytest.raises(
            bigembed.errors.TableExists, match=r"exists. Open it with Embedding.open\(path\), or choose"
        ):
            bigembed.Embedding(5, 4, path=path)


# -- SIGTERM ----------------------------------------------------------------------------------------------------


def test_sigterm_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "bigembed.cli.main", "convert", "-", str(tmp_path / "t")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdin.write(b"1000000 2\n" + b"a 1 2\n" * 100_000)
    child.stdin.flush()  # and stays open, so that the child waits for more
    until = time.monotonic() + 60
    while not os.listdir(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    assert [name for name in os.listdir(tmp_path) if ".new-" in name]
    for _ in range(2):  # as `timeout` does
        child.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    errors = child.stderr.read()
    assert (child.wait(60), errors) == (143, b"bigembed: terminated\n")
    assert os.listdir(tmp_path) == []
    child.stdin.close()
    child.stderr.close()


def test_sigterm_of_a_command_has_status_143(table, capsys, monkeypatch):
    def terminated(*_):
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # which would end the tests
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Table, "verify", terminated)
    assert run(["verify", table], capsys) == (143, "", "bigembed: terminated\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_another_handler_of_sigterm_stays(table, capsys):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Table, "verify", lambda *_: signal.raise_signal(signal.SIGTERM) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(["verify", table], capsys)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


def test_a_command_runs_in_any_thread(table, capsys):
    status = []
    thread = threading.Thread(target=lambda: status.append(cli.main(["info", table])))
    thread.start()
    thread.join()
    assert status == [0]
