"""The command `bigembed`: help, exit statuses, info and verify."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import bigembed
from bigembed import Table
from bigembed.cli import main as cli
from bigembed.cli import values


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
    assert "3 rows in 1 chunks, 2 records in the journal" in out


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
