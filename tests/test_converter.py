"""convert: any source becomes a whole table or nothing; options, provenance, interruption, the command line."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

import bigembed
from bigembed import Table
from bigembed.cli.main import main
from bigembed.convert.converter import ConvertOptions, convert
from bigembed.convert.formats import FORMATS, open_source
from bigembed.convert.source import ReadOptions
from bigembed.errors import BadSource, InvalidArgument, TableExists, UnknownFormat, UnknownToken
from bigembed.vocab.vocabulary import Vocabulary

ROWS = np.random.default_rng(0).standard_normal((1000, 6)).astype(np.float32)
WORDS = [f"word{i}" for i in range(len(ROWS))]


@pytest.fixture
def npy(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, ROWS)
    return path


@pytest.fixture
def glove(tmp_path):
    path = tmp_path / "rows.txt"
    lines = [" ".join([word, *map(repr, row.tolist())]) for word, row in zip(WORDS, ROWS, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def rows_of(path):
    with Table.open(path, mode="r") as table:
        return table.read(np.arange(table.shape[0]))


def test_rows_arrive_bit_for_bit_and_any_zarr_reader_sees_them(npy, tmp_path):
    target = tmp_path / "t.bigembed"
    report = convert(npy, target)
    assert (report.rows, report.num_rows, report.dim, report.format, report.vocabulary) == (1000, 1000, 6, "npy", None)
    assert rows_of(target).tobytes() == ROWS.tobytes()
    assert zarr.open_array(str(target / "weight"), mode="r")[:].tobytes() == ROWS.tobytes()
    with Table.open(target) as table:
        assert table.verify().written_rows == 1000
        table.write([3], np.ones((1, 6), np.float32))
        table.commit("goes on")
    assert rows_of(target)[3].tolist() == [1] * 6


def test_tokens_arrive_with_their_rows(glove, tmp_path):
    target = tmp_path / "t.bigembed"
    report = convert(glove, target)
    assert (report.format, report.vocabulary.num_tokens, report.vocabulary.duplicates) == ("glove", 1000, 0)
    assert rows_of(target).tobytes() == ROWS.tobytes()
    with Table.open(target, mode="r") as table:
        words = Vocabulary.open(table)
        assert words.rows(["word7", b"word999"]).tolist() == [7, 999]
        assert words.tokens([0, 999]) == [b"word0", b"word999"]
        with pytest.raises(UnknownToken, match="nobody"):
            words.rows(["nobody"])


def test_a_token_that_comes_twice_keeps_both_rows_and_means_the_first(tmp_path):
    (tmp_path / "v.txt").write_text("3 2\na 1 2\nb 3 4\na 5 6\n")
    report = convert(tmp_path / "v.txt", tmp_path / "t")
    assert (report.vocabulary.duplicates, report.vocabulary.first_duplicates) == (1, [(b"a", 2, 0)])
    assert rows_of(tmp_path / "t").tolist() == [[1, 2], [3, 4], [5, 6]]
    with Table.open(tmp_path / "t", mode="r") as table:
        assert Vocabulary.open(table).rows(["a", "b"]).tolist() == [0, 1]
        assert Vocabulary.open(table).tokens([2]) == [b"a"]


def test_the_unknown_token(tmp_path):
    (tmp_path / "v.txt").write_text("a 1 2\n<unk> 3 4\n")
    convert(tmp_path / "v.txt", tmp_path / "t", unknown="<unk>")
    with Table.open(tmp_path / "t", mode="r") as table:
        assert Vocabulary.open(table).rows(["a", "nobody"]).tolist() == [0, 1]
    with pytest.raises(InvalidArgument, match="<oov>"):
        convert(tmp_path / "v.txt", tmp_path / "other", unknown="<oov>")
    assert left_in(tmp_path) == ["t", "v.txt"]


def test_limit_and_rows(npy, glove, tmp_path):
    assert convert(npy, tmp_path / "a", limit=10).num_rows == 10
    assert rows_of(tmp_path / "a").tobytes() == ROWS[:10].tobytes()
    report = convert(glove, tmp_path / "b", limit=10, rows=50_000)
    assert (report.rows, report.num_rows, report.vocabulary.num_tokens) == (10, 50_000, 10)
    with Table.open(tmp_path / "b") as table:
        assert table.shape == (50_000, 6)
        assert table.read([9])[0].tobytes() == ROWS[9].tobytes()
        assert np.abs(table.read([10, 49_999])).min() > 0  # at their initial values
    with pytest.raises(InvalidArgument, match="more than rows=999"):
        convert(npy, tmp_path / "c", rows=999)
    assert not (tmp_path / "c").exists()


def test_normalize(npy, tmp_path):
    convert(npy, tmp_path / "t", normalize=True)
    norms = np.linalg.norm(rows_of(tmp_path / "t").astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_rows_that_are_not_finite_are_kept_and_told(tmp_path):
    rows = np.float32([[1, np.nan], [2, 3], [np.inf, 0]])
    np.save(tmp_path / "r.npy", rows)
    report = convert(tmp_path / "r.npy", tmp_path / "t")
    assert report.notes == ["2 rows hold NaN or infinity; they are kept as they are."]
    assert rows_of(tmp_path / "t").tobytes() == rows.tobytes()


@pytest.mark.parametrize(("name", "columns"), [("Adam", 12), ("RowwiseAdagrad", 1), ("SGD", 0), ("Adagrad", 6)])
def test_an_optimizer_attaches_for_free(npy, tmp_path, name, columns):
    convert(npy, tmp_path / "t", optimizer=name)
    with Table.open(tmp_path / "t", mode="r") as table:
        assert table.spec.state_dim == columns
    emb = bigembed.Embedding.open(tmp_path / "t")
    before = emb.table.generation
    optimizer = getattr(bigembed.optim, name)(emb, lr=0.1)
    assert emb.table.generation == before  # nothing was rewritten
    assert emb.weight[0].numpy().tobytes() == ROWS[0].tobytes()
    del optimizer
    emb.close()


def test_dry_run_reads_everything_and_writes_nothing(npy, tmp_path):
    report = convert(npy, tmp_path / "t", dry_run=True)
    assert (report.rows, report.dim, report.is_dry) == (1000, 6, True)
    (tmp_path / "v.txt").write_text("a 1 2\nb 3\nc 4 5\n")
    with pytest.raises(BadSource, match="line 2"):
        convert(tmp_path / "v.txt", tmp_path / "t", dry_run=True)
    assert left_in(tmp_path) == ["rows.npy", "v.txt"]


def test_provenance_is_in_the_attributes(npy, tmp_path):
    convert(npy, tmp_path / "t")
    content = npy.read_bytes()
    attributes = json.loads((tmp_path / "t" / "zarr.json").read_text())["attributes"]["bigembed"]
    assert attributes["source"]["format"] == "npy"
    assert attributes["source"]["files"] == [
        {"name": "rows.npy", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ]


def test_standard_input_has_its_sum_too(glove, tmp_path):
    code = f"from bigembed.convert.converter import convert; convert('-', {str(tmp_path / 't')!r})"
    content = glove.read_bytes()
    subprocess.run([sys.executable, "-c", code], input=content, check=True)
    with Table.open(tmp_path / "t", mode="r") as table:
        files = table.spec.attributes["source"]["files"]
    assert files == [{"name": "standard input", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}]
    assert rows_of(tmp_path / "t").tobytes() == ROWS.tobytes()


def test_a_source_that_changes_meanwhile_gives_nothing(npy, tmp_path):
    def touch(done, total):
        os.utime(npy, ns=(1, 1))

    with pytest.raises(BadSource, match="changed while it was read"):
        convert(npy, tmp_path / "t", progress=touch)
    assert left_in(tmp_path) == ["rows.npy"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(glove, tmp_path, error):
    def stop(done, total):
        raise error

    with pytest.raises(error):
        convert(glove, tmp_path / "t", progress=stop)
    assert left_in(tmp_path) == ["rows.txt"]


def test_a_killed_conversion_is_swept_away_by_the_next(glove, tmp_path):
    target = tmp_path / "t"
    code = (
        "import os, signal; from bigembed.convert.converter import convert; "
        f"convert({str(glove)!r}, {str(target)!r}, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not target.exists()
    assert len(left_in(tmp_path)) == 2
    convert(glove, target)
    assert left_in(tmp_path) == ["rows.txt", "t"]
    assert rows_of(target).tobytes() == ROWS.tobytes()


def test_ctrl_c_on_the_command_line_leaves_nothing(tmp_path):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "bigembed.cli.main", "convert", "-", str(tmp_path / "t")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    line = b"a " + b" ".join([b"1.5"] * 6) + b"\n"
    child.stdin.write(line * 50_000)
    child.stdin.flush()
    for _ in range(1200):
        if any(name.startswith("t.new-") for name in left_in(tmp_path)):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the conversion never began")
    child.send_signal(signal.SIGINT)
    err = child.communicate()[1]
    assert child.returncode == 130, err
    assert b"interrupted" in err
    assert left_in(tmp_path) == ["pipe"]


def test_an_existing_target_is_kept_unless_told(npy, glove, tmp_path):
    convert(npy, tmp_path / "t")
    with pytest.raises(TableExists, match="overwrite=True"):
        convert(glove, tmp_path / "t")
    assert not (tmp_path / "t" / "vocab").exists()
    convert(glove, tmp_path / "t", overwrite=True)
    assert (tmp_path / "t" / "vocab").is_dir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(TableExists):
        convert(npy, tmp_path / "folder", overwrite=True)
    assert (tmp_path / "folder" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "word3vec"}, "use one of"),
        ({"dtype": "float16"}, "float32"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"rows": 5, "limit": 6}, "need room"),
        ({"optimizer": "Adamax"}, "Adagrad, Adam, AdamW, RowwiseAdagrad, SGD"),
        ({"speed": 3}, "The options are format, dim"),
    ],
)
def test_options_that_cannot_be(npy, tmp_path, options, message):
    with pytest.raises((InvalidArgument, UnknownFormat), match=message):
        convert(npy, tmp_path / "t", **options)
    assert left_in(tmp_path) == ["rows.npy"]


def test_options_by_name_and_as_an_object(npy, tmp_path):
    convert(npy, tmp_path / "a", ConvertOptions(limit=3))
    convert(npy, tmp_path / "b", limit=3)
    assert rows_of(tmp_path / "a").tobytes() == rows_of(tmp_path / "b").tobytes()
    with pytest.raises(InvalidArgument, match="twice"):
        convert(npy, tmp_path / "c", ConvertOptions(), limit=3)


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html><body>Sign in</body></html>", b"\x00" * 64, b"PK\x03\x04"]
)
def test_what_is_no_embedding_is_said_to_be_none(tmp_path, content):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises((BadSource, UnknownFormat), match=r"v\.txt"):
        convert(tmp_path / "v.txt", tmp_path / "t")
    assert left_in(tmp_path) == ["v.txt"]


def test_missing_and_folder_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "t")
    with pytest.raises(UnknownFormat, match="is a folder"):
        convert(tmp_path, tmp_path / "t")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_refuses_noise_with_an_error_of_ours(tmp_path, format):
    path = tmp_path / "noise"
    path.write_bytes(np.random.default_rng(0).bytes(2000))
    with pytest.raises((bigembed.BigembedError, OSError)), open_source(str(path), format, ReadOptions()) as source:
        for _ in source.blocks():
            pass


@pytest.mark.parametrize("name", ["back.npy", "back.safetensors", "back.pt"])
def test_tokens_make_the_round_trip_through_formats_without_any(glove, tmp_path, name):
    convert(glove, tmp_path / "t")
    bigembed.export_file(tmp_path / "t", tmp_path / name)
    report = convert(tmp_path / name, tmp_path / "again")
    assert f"the tokens are those of {tmp_path / name}.vocab.txt." in report.notes
    assert rows_of(tmp_path / "again").tobytes() == ROWS.tobytes()
    with Table.open(tmp_path / "again", mode="r") as table:
        assert Vocabulary.open(table).rows(WORDS).tolist() == list(range(1000))
        assert [one["name"] for one in table.spec.attributes["source"]["files"]] == [name, f"{name}.vocab.txt"]
    assert convert(tmp_path / name, tmp_path / "few", limit=5).vocabulary.num_tokens == 5
    (tmp_path / f"{name}.vocab.txt").write_text("a\nb\n")
    with pytest.raises(BadSource, match="has 2 tokens, but there are 1000 rows"):
        convert(tmp_path / name, tmp_path / "short")
    assert convert(tmp_path / name, tmp_path / "plain", vocabulary=False).vocabulary is None


def test_exported_parts_are_read_again(npy, tmp_path):
    convert(npy, tmp_path / "t")
    bigembed.export_file(tmp_path / "t", tmp_path / "parts", format="safetensors", part_bytes=8000)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    for source in (tmp_path / "parts", tmp_path / "parts" / "model.safetensors.index.json"):
        convert(source, tmp_path / "again", overwrite=True)
        assert rows_of(tmp_path / "again").tobytes() == ROWS.tobytes()


def test_the_first_rows_of_a_pipe(glove, tmp_path):
    code = f"from bigembed.convert.converter import convert; convert('-', {str(tmp_path / 't')!r}, limit=2)"
    subprocess.run([sys.executable, "-c", code], input=glove.read_bytes() + b"bad", check=True)
    assert rows_of(tmp_path / "t").tobytes() == ROWS[:2].tobytes()


def test_a_source_inside_the_target_is_kept(npy, tmp_path):
    convert(npy, tmp_path / "t")
    inside = tmp_path / "t" / "rows.npy"
    inside.write_bytes(npy.read_bytes())
    with pytest.raises(InvalidArgument, match="inside the target"):
        convert(inside, tmp_path / "t", overwrite=True)
    assert inside.exists()
    with pytest.raises(InvalidArgument, match="outside of the table's folder"):
        bigembed.export_file(tmp_path / "t", tmp_path / "t" / "w.npy")
    with pytest.raises(UnknownFormat, match="is a table already"):
        convert(tmp_path / "t", tmp_path / "other")


def test_options_that_mean_nothing_for_a_source(npy, glove, tmp_path):
    with pytest.raises(InvalidArgument, match="there is no vocabulary"):
        convert(npy, tmp_path / "t", unknown="a")
    with pytest.raises(InvalidArgument, match="without a name"):
        convert(glove, tmp_path / "t", tensor="x")
    with pytest.raises(InvalidArgument, match="no row of the table"):
        convert(glove, tmp_path / "t", unknown=50_000, rows=2000)
    with pytest.raises(UnknownFormat, match="that of a folder"):
        convert(npy, tmp_path / "t", format="huggingface")
    with pytest.raises(UnknownFormat, match="Did you mean word2vec-text or word2vec-binary"):
        convert(glove, tmp_path / "t", format="word2vec")
    for name in ("limit", "rows", "dim"):
        with pytest.raises(InvalidArgument, match="must be an integer"):
            convert(npy, tmp_path / "t", **{name: 1.5})


def test_tokens_of_another_table_do_not_stay_beside_an_export(npy, glove, tmp_path):
    convert(glove, tmp_path / "words")
    convert(npy, tmp_path / "plain")
    bigembed.export_file(tmp_path / "words", tmp_path / "out.npy")
    assert (tmp_path / "out.npy.vocab.txt").exists()
    bigembed.export_file(tmp_path / "plain", tmp_path / "out.npy", overwrite=True)
    assert not (tmp_path / "out.npy.vocab.txt").exists()
    (tmp_path / "out.npy.vocab.txt").write_text("a\n" * 1001)
    with pytest.raises(BadSource, match="has 1001 tokens, but there are 1000 rows"):
        convert(tmp_path / "out.npy", tmp_path / "t")


def test_new_rows_have_the_spread_of_those_read(glove, tmp_path):
    small = tmp_path / "small.txt"
    small.write_text("".join(f"w{i} 0.02 -0.02 0.02\n" for i in range(100)))
    convert(small, tmp_path / "t")
    emb = bigembed.Embedding.open(tmp_path / "t")
    emb.vocab.add([f"new{i}" for i in range(2000)])
    spread = float(emb.embed([f"new{i}" for i in range(2000)]).detach().std())
    assert 0.018 < spread < 0.022
    emb.commit()
    emb.close()


FASTTEXT = [["running", "runs", "runner", "run"], ["swimming", "swims", "swimmer", "swim"]] * 100


@pytest.fixture
def fasttext(tmp_path):
    """A fastText file of gensim's, and gensim's vectors of it."""
    models = pytest.importorskip("gensim.models.fasttext")
    model = models.FastText(FASTTEXT, vector_size=12, min_count=1, bucket=300, epochs=3, workers=1, seed=1)
    models.save_facebook_model(model, str(tmp_path / "model.bin"))
    return tmp_path / "model.bin", models.load_facebook_vectors(str(tmp_path / "model.bin"))


def test_fasttext_words_are_compared_and_exported_as_gensim_has_them(fasttext, tmp_path, capsys):
    path, vectors = fasttext
    convert(path, tmp_path / "t")
    status, out, _ = run(["nearest", tmp_path / "t", "running", "--count", "5"], capsys)
    assert status == 0
    found = [line.split("\t") for line in out.splitlines()]
    expected = vectors.most_similar("running", topn=5)
    assert [word for _, word in found] == [word for word, _ in expected]
    np.testing.assert_allclose([float(s) for s, _ in found], [s for _, s in expected], atol=1e-4)
    report = bigembed.export_file(tmp_path / "t", tmp_path / "out.vec")
    assert (report.rows, len(report.notes)) == (8, 1)
    from gensim.models import KeyedVectors

    exported = KeyedVectors.load_word2vec_format(str(tmp_path / "out.vec"))
    assert sorted(exported.key_to_index) == sorted(vectors.key_to_index)
    for word in exported.key_to_index:
        np.testing.assert_allclose(exported[word], vectors[word], rtol=1e-5, atol=1e-7)
    assert "not composed" in bigembed.export_file(tmp_path / "t", tmp_path / "out.npy").notes[0]
    for options in ({"normalize": True}, {"unknown": "run"}):
        with pytest.raises(InvalidArgument):
            convert(path, tmp_path / "u", **options)
    assert "left out" in " ".join(convert(path, tmp_path / "few", limit=3).notes)


# -- the command line -------------------------------------------------------------------------------------------


def run(line, capsys):
    status = main([str(word) for word in line])
    return status, *capsys.readouterr()


def test_convert_info_lookup_nearest_export_copy(glove, tmp_path, capsys):
    target = tmp_path / "t"
    status, out, err = run(["convert", glove, target], capsys)
    assert (status, err) == (0, "")
    assert "1,000 rows x 6" in out
    assert "1,000 tokens" in out
    status, out, _ = run(["info", target], capsys)
    assert status == 0
    assert "glove: rows.txt" in out
    facts = json.loads(run(["info", "--json", target], capsys)[1])
    assert facts["vocabulary"]["tokens"] == 1000
    assert facts["source"]["files"][0]["name"] == "rows.txt"
    status, out, _ = run(["lookup", target, "word3", "word4"], capsys)
    assert status == 0
    read = np.loadtxt(io.StringIO(out), dtype=np.float32, usecols=range(1, 7), delimiter=None)
    assert read.tobytes() == ROWS[3:5].tobytes()
    status, out, _ = run(["nearest", target, "word3", "--count", "4"], capsys)
    unit = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit[3]))[1:5]
    assert [line.split("\t")[1] for line in out.splitlines()] == [WORDS[row] for row in order]
    assert run(["verify", target], capsys)[0] == 0
    assert run(["copy", target, tmp_path / "copy"], capsys)[0] == 0
    assert rows_of(tmp_path / "copy").tobytes() == ROWS.tobytes()
    status, out, _ = run(["export", tmp_path / "copy", tmp_path / "back.npy"], capsys)
    assert status == 0
    assert np.load(tmp_path / "back.npy").tobytes() == ROWS.tobytes()


def test_bad_lines_are_counted_and_listed(tmp_path, capsys):
    (tmp_path / "v.txt").write_text("a 1 2\nb 3\nc 5 6\nd x 7\ne 8 9\n")
    status, out, err = run(["convert", tmp_path / "v.txt", tmp_path / "t"], capsys)
    assert (status, out) == (2, "")
    assert "line 2" in err
    status, out, err = run(["convert", tmp_path / "v.txt", tmp_path / "t", "--skip-bad-lines"], capsys)
    assert status == 0
    assert "2 lines were skipped" in out
    assert "line 2" in err
    assert "line 4" in err
    assert rows_of(tmp_path / "t").tolist() == [[1, 2], [5, 6], [8, 9]]


def test_lookup_of_an_unknown_token_and_of_rows(npy, glove, tmp_path, capsys):
    run(["convert", glove, tmp_path / "t"], capsys)
    status, out, err = run(["lookup", tmp_path / "t", "nobody"], capsys)
    assert (status, out) == (2, "")
    assert "nobody" in err
    run(["convert", npy, tmp_path / "plain"], capsys)
    status, out, err = run(["lookup", tmp_path / "plain", "word3"], capsys)
    assert (status, out) == (2, "")
    assert "--rows" in err
    status, out, _ = run(["lookup", tmp_path / "plain", "3", "--rows"], capsys)
    assert status == 0
    assert out.startswith("3\t")
    assert run(["lookup", tmp_path / "plain", "3", "x", "--rows"], capsys)[0] == 2
    assert run(["nearest", tmp_path / "plain", "3", "--rows", "--count", "2"], capsys)[0] == 0


def test_the_tool_is_the_command(npy, tmp_path):
    tool = os.path.join(os.path.dirname(os.path.dirname(__file__)), "tools", "convert.py")
    done = subprocess.run([sys.executable, tool, str(npy), str(tmp_path / "t")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,000 rows x 6" in done.stdout


def test_a_glove_file_of_phrases_comes_back_with_dim_and_a_byte_order_mark_is_refused(tmp_path):
    for n, words in enumerate((["chapter 1", "chapter 2", "chapter 3", "end"], ["\ufeffx", "y"])):
        with Table.create(tmp_path / f"t{n}", len(words), 3, init="zeros") as table:
            table.write(np.arange(len(words)), ROWS[: len(words), :3])
            table.commit()
            Vocabulary.create(table, words)
    bigembed.export_file(tmp_path / "t0", tmp_path / "phrases.txt", format="glove")
    convert(tmp_path / "phrases.txt", tmp_path / "again", dim=3)
    assert rows_of(tmp_path / "again").tobytes() == ROWS[:4, :3].tobytes()
    with Table.open(tmp_path / "again", mode="r") as table:
        assert Vocabulary.open(table).rows(["chapter 2", "end"]).tolist() == [1, 3]
    with pytest.raises(InvalidArgument, match="byte order mark"):
        bigembed.export_file(tmp_path / "t1", tmp_path / "marked.txt", format="glove")
    assert not (tmp_path / "marked.txt").exists()
