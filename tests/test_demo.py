"""bigembed demo: its text, its ids, its model, and whole runs of it on a small text."""

import math
import signal
import tempfile

import numpy as np
import pytest
import torch

from bigembed import Embedding, Table
from bigembed.cli import main as cli
from bigembed.demo import text as text_module
from bigembed.demo.model import Learner, NextToken
from bigembed.demo.ngrams import (
    CONTEXT,
    ORDERS,
    context_symbols,
    make_batch,
    ngram_ids,
    random_positions,
    spread_positions,
)
from bigembed.demo.options import DemoOptions
from bigembed.demo.report import aligned, in_bytes
from bigembed.demo.run import run_demo
from bigembed.demo.text import Document, find_sources, read_documents, split_documents
from bigembed.demo.tokens import Tokens, load_corpus

SENTENCES = [f"the {a} {b} under a {c}" for a in ("red", "old") for b in ("cat", "fox") for c in ("tree", "moon")]


@pytest.fixture
def folder(tmp_path):
    """Forty small files of sentences, some of them in a folder below."""
    rng = np.random.default_rng(0)
    where = tmp_path / "books"
    (where / "old").mkdir(parents=True)
    for number in range(40):
        lines = [SENTENCES[i] for i in rng.integers(0, len(SENTENCES), 20)]
        (where / ("old" if number % 4 == 0 else "") / f"{number}.txt").write_text("\n".join(lines))
    return where


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary tables go, to look for what is left behind."""
    where = tmp_path / "scratch"
    where.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(where))
    return where


def tiny(folder, *more):
    return ["demo", "--text", str(folder), "--rows", "5000", "--dim", "8", "--steps", "3", "--batch", "64", *more]


# -- ids --------------------------------------------------------------------------------------------------------


def naive_ngram_id(hashes, num_rows):
    """The id of one n-gram, oldest token first, with Python's integers."""
    salt, wrap = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(x):
        x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & wrap
        return x ^ (x >> 32)

    mixed = salt
    for token in reversed(hashes):
        mixed = mix(mixed ^ token)
    return mix((mixed + salt) & wrap) % num_rows


def test_ngram_ids_are_these_numbers_on_every_machine():
    context = np.frombuffer(b"the cat ", np.uint8).astype(np.uint64)[None]
    assert ngram_ids(context, 200_000_000).tolist() == [[80_122_359, 192_203_075, 54_791_307]]
    assert ngram_ids(context, 1 << 40).tolist() == [[497_836_496_375, 806_375_228_227, 855_330_330_251]]


@pytest.mark.parametrize("num_rows", [1, 2, 5000, 1 << 20, 200_000_000, 1 << 48])
def test_ngram_ids_equal_their_twin_and_are_rows(num_rows):
    hashes_NC = np.random.default_rng(1).integers(0, 1 << 64, (200, CONTEXT), dtype=np.uint64)
    ids_NG = ngram_ids(hashes_NC, num_rows)
    assert ids_NG.dtype == np.int64
    assert ids_NG.shape == (200, len(ORDERS))
    assert ids_NG.min() >= 0
    assert ids_NG.max() < num_rows
    twin = [[naive_ngram_id([int(h) for h in hashes[-n:]], num_rows) for n in ORDERS] for hashes in hashes_NC]
    assert ids_NG.tolist() == twin


def test_ngram_ids_spread_like_chance():
    letters = np.array(np.meshgrid(*[np.arange(97, 123)] * 3)).reshape(3, -1).T  # all 17576 words of three letters
    context_NC = np.zeros((len(letters), CONTEXT), np.uint64)
    context_NC[:, -3:] = letters
    rows = 1 << 20  # a power of two: only the low bits count
    expected = rows * (1 - (1 - 1 / rows) ** len(letters))
    assert abs(len(np.unique(ngram_ids(context_NC, rows)[:, 1])) - expected) < 60  # five standard deviations


def test_ngram_ids_of_tokens_further_back_do_not_matter():
    context_NC = np.zeros((1, CONTEXT), np.uint64)
    before = ngram_ids(context_NC, 1 << 40)[0]
    for back in range(1, CONTEXT + 1):
        changed_NC = context_NC.copy()
        changed_NC[0, -back] = 7
        same = ngram_ids(changed_NC, 1 << 40)[0] == before
        assert same.tolist() == [back > order for order in ORDERS]


def test_context_ends_where_its_document_begins():
    tokens = Tokens(np.frombuffer(b"abcdefghijklmnoxyz", np.uint8), np.array([0, 15, 16]))
    symbols_NC = context_symbols(tokens, np.array([0, 2, 8, 14, 15, 16, 17]), outside=256)
    shown = ["".join("." if symbol == 256 else chr(symbol) for symbol in row) for row in symbols_NC]
    assert shown == ["........", "......ab", "abcdefgh", "ghijklmn", "........", "........", ".......y"]


def test_ngram_ids_at_a_documents_start_do_not_depend_on_the_document_before(tmp_path):
    (tmp_path / "a").write_bytes(b"first document")
    (tmp_path / "b").write_bytes(b"second one")
    corpus = load_corpus([str(tmp_path)], "bytes", seed=0)
    both = Tokens(np.frombuffer(b"zzzzzzabc", np.uint8), np.array([0, 6]))
    alone = Tokens(np.frombuffer(b"abc", np.uint8), np.array([0]))
    here, there = (make_batch(corpus, t, p, 1 << 40) for t, p in ((both, np.arange(6, 9)), (alone, np.arange(3))))
    assert torch.equal(here.ids_NG, there.ids_NG)
    assert torch.equal(here.context_NC, there.context_NC)
    assert here.target_N.tolist() == list(b"abc")
    assert len(np.unique(here.ids_NG)) == here.ids_NG.numel()


def test_positions():
    tokens = Tokens(np.zeros(1000, np.uint8), np.array([0]))
    first, again = (next(random_positions(tokens, 50, seed=3)) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert first.min() >= 0
    assert first.max() < 1000
    assert spread_positions(tokens, 4).tolist() == [0, 333, 666, 999]
    assert spread_positions(tokens, 5000).tolist() == list(range(1000))


# -- text -------------------------------------------------------------------------------------------------------


def test_sources_are_the_visible_text_files(folder):
    (folder / ".hidden").write_text("no")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "link.txt").symlink_to(folder / "1.txt")
    names = {source.name for source in find_sources([str(folder), str(folder / "2.txt")])}
    assert len(names) == 40
    assert {"2.txt", "old/0.txt"} <= names
    assert not {".hidden", "picture.png"} & names


def test_default_text_is_the_standard_library():
    names = {source.name for source in find_sources([])}
    assert {"os.py", "json/decoder.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not {"site-packages", "test", "tests"} & {part for name in names for part in name.split("/")[:-1]}


def test_held_out_files_are_whole_disjoint_and_stable():
    documents = [Document(f"folder/{number}.txt", b"text") for number in range(1000)]
    train, held_out = split_documents(documents, seed=0)
    names = [{document.name for document in side} for side in (train, held_out)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 1000
    assert len(held_out) == 57
    assert sorted(names[1])[:3] == ["folder/100.txt", "folder/133.txt", "folder/142.txt"]
    fewer = split_documents(documents[:500], seed=0)[1]
    assert {document.name for document in fewer} == {d.name for d in documents[:500]} & names[1]
    assert {document.name for document in split_documents(documents, seed=1)[1]} != names[1]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_either_side_of_the_split_has_a_file(count):
    for seed in range(50):
        sides = split_documents([Document(str(number), b"text") for number in range(count)], seed)
        assert all(sides)


def test_of_a_single_file_the_last_tenth_is_held_out():
    (train,), (held_out,) = split_documents([Document("book", bytes(range(100)))], seed=0)
    assert (train.data, held_out.data) == (bytes(range(90)), bytes(range(90, 100)))


def test_text_is_read_up_to_a_limit_in_an_order_drawn_from_the_seed(folder):
    sources = find_sources([str(folder)])
    for seed in (0, 1):
        documents = read_documents(sources, seed, 2000)
        assert sum(len(document.data) for document in documents) == 2000
        backwards = read_documents(sources[::-1], seed, 2000)
        assert [d.name for d in documents] == [d.name for d in backwards]
    assert {d.name for d in documents} != {d.name for d in read_documents(sources, 0, 2000)}


def test_bytes_are_their_own_classes(tmp_path):
    (tmp_path / "book").write_bytes(bytes(range(200)))
    corpus = load_corpus([str(tmp_path / "book")], "bytes", seed=0)  # a file that is named may look binary
    assert corpus.num_classes == 256
    assert corpus.train.symbols_T.tobytes() == bytes(range(180))
    assert corpus.held_out.symbols_T.tobytes() == bytes(range(180, 200))


def test_words_have_classes_by_frequency_and_hashes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("bigembed.demo.tokens.NUM_WORD_CLASSES", 3)
    (tmp_path / "book").write_text("näh näh, näh! foo " * 10 + "bar baz" * 4)
    corpus = load_corpus([str(tmp_path)], "words", seed=0)
    symbols = corpus.train.symbols_T[:8]
    assert symbols.tolist() == [1, 2, 1, 3, 2, 1, 4, 2]  # näh, space, ",", "!" and foo, in order of appearance
    assert corpus.num_classes == 3
    assert corpus.class_of_symbol[symbols].tolist() == [2, 1, 2, 0, 1, 2, 0, 1]
    assert corpus.class_of_symbol[-1] == 3
    assert len(set(corpus.hash_of_symbol.tolist())) == len(corpus.hash_of_symbol)
    assert corpus.hash_of_symbol[1] == 17_687_888_766_678_470_944  # blake2b of "näh", little-endian


def test_later_new_words_share_a_symbol_when_too_many_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr("bigembed.demo.tokens.MAX_KNOWN_WORDS", 4)
    (tmp_path / "book").write_text("a b c d e a b c" + " " * 30)
    corpus = load_corpus([str(tmp_path)], "words", seed=0)
    assert corpus.train.symbols_T.tolist()[:13] == [1, 2, 3, 2, 0, 2, 0, 2, 0, 2, 1, 2, 3]
    assert corpus.class_of_symbol[0] == 0


# -- model ------------------------------------------------------------------------------------------------------


def test_both_models_start_from_the_same_dense_weights_and_say_the_same(folder):
    corpus = load_corpus([str(folder)], "bytes", seed=0)
    without = Learner(corpus.num_classes, None, seed=5).model
    torch.manual_seed(5)
    with_table = NextToken(corpus.num_classes, table_dim=8)
    for name, values in without.state_dict().items():
        assert torch.equal(values, with_table.state_dict()[name])
    batch = make_batch(corpus, corpus.train, np.arange(20), 100)
    assert torch.equal(with_table(batch.context_NC, torch.zeros(20, 3, 8)), without(batch.context_NC, None))


def test_making_a_learner_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    Learner(256, None, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_hits_count_lookups_and_not_the_optimizers_visits(folder):
    corpus = load_corpus([str(folder)], "bytes", seed=0)
    table = Embedding(1 << 40, 4, init="zeros", seed=0)
    learner = Learner(corpus.num_classes, table, seed=0)
    batch = make_batch(corpus, corpus.train, np.arange(50), 1 << 40)
    distinct = len(batch.ids_NG.unique())
    for step in range(3):
        learner.step(batch)
        cache = table.stats()["cache"]
        assert (cache["hits"], cache["misses"]) == (step * distinct, distinct)
    table.commit()
    table.close()


# -- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["bytes", "words"])
def test_demo_runs_end_to_end_and_leaves_nothing(folder, scratch, capsys, tokens):
    assert cli.main(tiny(folder, "--tokens", tokens)) == 0
    out, err = capsys.readouterr()
    assert "5,000 rows x 8 float32, 160 kB of weights" in out
    assert "3 steps of 64 tokens" in out
    assert "the same to the last bit" in out
    assert "every checksum right" in out
    assert err == ""  # no progress bar where there is no terminal
    assert not list(scratch.iterdir())


def test_table_learns_what_the_dense_model_alone_does_not(tmp_path, scratch):
    rng = np.random.default_rng(0)
    facts = ["{}{}{}={};".format(*(chr(97 + letter) for letter in four)) for four in rng.integers(0, 26, (500, 4))]
    text = tmp_path / "facts"
    text.write_text("".join(facts[i] for i in rng.integers(0, len(facts), 5_000)))
    options = DemoOptions(rows=1 << 20, dim=16, steps=60, batch=256, text=(str(text),))
    result = run_demo(options)
    assert result.before.with_table == result.before.without
    assert result.after.with_table.nats < 0.8 * result.after.without.nats
    assert result.after.without.nats < result.before.without.nats
    assert result.reopened.nats == result.after.with_table.nats
    assert result.after.with_table.bits == pytest.approx(result.after.with_table.nats / math.log(2))
    assert result.cache["hits"] > 0
    assert result.logical_bytes == 4 * 16 << 20
    assert 0 < result.disk_bytes < 4 << 20
    assert result.peak_bytes >= result.imported_bytes > 0


def test_table_at_a_path_stays_with_its_commit(folder, tmp_path, scratch, capsys):
    path = tmp_path / "ngrams.bigembed"
    assert cli.main(tiny(folder, "--path", str(path))) == 0
    assert f"bigembed info {path}" in capsys.readouterr().out
    with Table.open(path, mode="r") as table:
        assert table.shape == (5000, 8)
        assert table.spec.owner == "rowwise_adagrad"
        last = table.generations()[-1]
        assert last.note == "bigembed demo"
        assert last.payload["steps"] == 3
        assert table.read(np.arange(5000)).any()
    assert not list(scratch.iterdir())


def test_keep_keeps_the_temporary_folder(folder, scratch, capsys):
    assert cli.main(tiny(folder, "--keep")) == 0
    (path,) = scratch.glob("*/ngrams.bigembed")
    assert str(path) in capsys.readouterr().out
    Table.open(path, mode="r").close()


def test_budget_in_seconds(folder, scratch, capsys):
    line = tiny(folder, "--seconds", "0.01")
    at = line.index("--steps")
    assert cli.main(line[:at] + line[at + 2 :]) == 0
    assert "both models in turn" in capsys.readouterr().out


def test_a_table_that_lost_something_is_noticed(folder, scratch, capsys, monkeypatch):
    commit = Table.commit

    def forgetful(self, note="", payload=None):
        number = commit(self, note, payload)
        self.write(np.arange(5000), np.ones((5000, 8), np.float32))
        return commit(self, "not what was trained") or number

    monkeypatch.setattr(Table, "commit", forgetful)
    assert cli.main(tiny(folder)) == 1
    assert "NOT the same" in capsys.readouterr().out


@pytest.mark.parametrize(("times", "status"), [(1, 0), (2, 130)])
def test_first_interrupt_ends_training_and_the_second_the_run(
    folder, tmp_path, scratch, capsys, monkeypatch, times, status
):
    step, path = Learner.step, tmp_path / "t"

    def interrupted(self, batch):
        nats = step(self, batch)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return nats

    monkeypatch.setattr(Learner, "step", interrupted if times == 2 else _only_without_table(interrupted, step))
    before = signal.getsignal(signal.SIGINT)
    assert cli.main([*tiny(folder, "--steps", "100000"), "--path", str(path)]) == status
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capsys.readouterr()
    assert ("stopped by Ctrl-C" in out) == (status == 0)
    assert ("bigembed: interrupted" in err) == (status == 130)
    assert path.exists() == (status == 0)
    assert not list(scratch.iterdir())


def _only_without_table(interrupted, step):
    return lambda learner, batch: (interrupted if learner.table is None else step)(learner, batch)


# -- errors -----------------------------------------------------------------------------------------------------


def assert_refused(line, capsys, *parts):
    assert cli.main(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bigembed: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_text_that_cannot_be_used_is_refused_and_nothing_is_left(tmp_path, scratch, capsys):
    path = tmp_path / "t"
    nothing, binary, empty, single = (tmp_path / name for name in ("nothing", "binary", "empty", "single"))
    for folder in (nothing, binary, empty, single):
        folder.mkdir()
    (binary / "a").write_bytes(b"\0\1")
    (empty / "a").write_bytes(b"")
    (single / "a").write_bytes(b"x")
    for where, message in [
        (tmp_path / "missing", "missing is no file and no folder"),
        (nothing, "no text files in"),
        (binary, "no text files in"),
        (empty, "the text is empty"),
        (single, "a has a single byte"),
    ]:
        assert_refused(tiny(where, "--path", str(path)), capsys, message, "--text")
        assert not path.exists()
    assert not list(scratch.iterdir())


def test_unreadable_text_is_refused(folder, tmp_path, scratch, capsys, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(text_module, "open", refuse, raising=False)
    assert_refused(tiny(folder), capsys, "cannot read", "Permission denied")
    assert not list(scratch.iterdir())


def test_a_path_that_is_taken_is_refused_and_left_alone(folder, tmp_path, scratch, capsys):
    path = tmp_path / "precious"
    path.write_text("mine")
    assert_refused(tiny(folder, "--path", str(path)), capsys, "precious exists", "--path")
    assert path.read_text() == "mine"
    assert_refused(tiny(folder, "--path", str(path / "below")), capsys, "is not a folder")


def test_sizes_that_cannot_be_are_refused_and_nothing_is_left(folder, tmp_path, scratch, capsys):
    path = tmp_path / "t"
    assert_refused(tiny(folder, "--rows", str(1 << 60), "--path", str(path)), capsys, "num_rows")
    assert not path.exists()
    assert not list(scratch.iterdir())


def test_a_failure_in_training_leaves_nothing(folder, tmp_path, scratch, capsys, monkeypatch):
    def fail(self, batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Learner, "step", fail)
    for more in ([], ["--path", str(tmp_path / "t")]):
        assert cli.main(tiny(folder, *more)) == 1
        assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
    assert not list(scratch.iterdir())


# -- report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (51_200_000_000, "51.2 GB"), (999_600, "1 MB")],
)
def test_in_bytes(count, text):
    assert in_bytes(count) == text


def test_aligned():
    assert aligned([("a", "b"), ("long", "c", "end"), ("x",)]) == "a     b\nlong  c  end\nx"


def test_options_default_to_the_run_that_the_readme_promises():
    assert (DemoOptions().rows, DemoOptions().dim, DemoOptions().tokens) == (200_000_000, 64, "bytes")
