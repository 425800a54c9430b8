"""Which tensor is the table: the named one, the known one, the only one, or an error that lists them."""

import pytest

from bigembed.convert.candidates import Candidate, choose, is_split_table, join_numbered, note_of_choice
from bigembed.errors import BadSource, InvalidArgument


def tensors(*names: str, shape: tuple[int, ...] = (10, 4), dtype: str = "float32") -> list[Candidate]:
    return [Candidate(name, shape, dtype) for name in names]


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "embed_tokens.weight",
        "transformer.wte.weight",
        "bert.embeddings.word_embeddings.weight",
        "tok_embeddings.weight",
        "text_model.embeddings.token_embedding.weight",
        "gpt_neox.embed_in.weight",
        "shared.weight",
        "embeddings",
        "embedding.weight",
        "token_embd.weight",
        "embedding/embedding/embeddings:0",
    ],
)
def test_known_names_of_input_embeddings(name: str) -> None:
    others = tensors("lm_head.weight", "bert.embeddings.position_embeddings.weight", "embed_tokens_per_layer.weight")
    assert choose("f", [*others, *tensors(name)], None).name == name


def test_the_only_table_is_taken_whatever_its_name() -> None:
    found = [*tensors("x", shape=(3, 2)), *tensors("bias", shape=(3,)), *tensors("cube", shape=(1, 2, 3))]
    assert choose("f", found, None).name == "x"
    assert note_of_choice(found[0], found, None) == []


def test_floats_go_before_integers_and_scales_are_no_tables() -> None:
    found = [*tensors("ids", dtype="int64"), *tensors("x"), *tensors("x_scale", shape=(10, 1))]
    assert choose("f", found, None).name == "x"
    assert choose("f", found[:1], None).name == "ids"


def test_shared_weight_stands_for_its_copies() -> None:
    found = tensors("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "shared.weight")
    assert choose("f", found, None).name == "shared.weight"
    with pytest.raises(InvalidArgument, match="several have the name of an input embedding"):
        choose("f", [*found, *tensors("vision.shared.weight")], None)


def test_several_tables_are_listed_with_their_shapes() -> None:
    with pytest.raises(InvalidArgument) as error:
        choose("a.npz", [*tensors("left", shape=(100, 3)), *tensors("emb", shape=(7, 5), dtype="bfloat16")], None)
    assert str(error.value) == (
        "a.npz holds 2 possible tables, and none has the name of an input embedding. Say which one with --tensor NAME "
        "(tensor=NAME in Python):\n  emb  (7, 5)  bfloat16\n  left  (100, 3)  float32"
    )


def test_long_lists_are_cut() -> None:
    with pytest.raises(InvalidArgument, match=r"and 30 more$"):
        choose("f", tensors(*(f"t.{chr(97 + n % 26)}{n * 7}" for n in range(50))), None)


def test_a_named_tensor_is_taken_or_the_reason_said() -> None:
    found = [*tensors("model.embed_tokens.weight", "x"), *tensors("b", shape=(3,)), *tensors("q", dtype="bool")]
    assert choose("f", found, "x").name == "x"
    with pytest.raises(InvalidArgument, match=r"holds no 'y'; it holds:\n  model\.embed_tokens\.weight"):
        choose("f", found, "y")
    with pytest.raises(BadSource, match=r"b cannot be a table: its shape is \(3,\), but a table has two dimensions"):
        choose("f", found, "b")
    with pytest.raises(BadSource, match="q cannot be a table: its values are bool"):
        choose("f", found, "q")
    assert choose("f", found, "q", readable=["bool"]).name == "q"


def test_nothing_to_choose_from() -> None:
    with pytest.raises(BadSource, match="nothing in it is a table"):
        choose("f", tensors("bias", shape=(3,)), None)
    with pytest.raises(BadSource, match="it holds:\n  nothing"):
        choose("f", [], None)


def test_a_choice_among_tables_is_told() -> None:
    found = tensors("wte.weight", "lm_head.weight")
    assert note_of_choice(found[0], found, None) == [
        "wte.weight was taken, one of 2 tables in it; --tensor NAME takes another."
    ]
    assert note_of_choice(found[0], found, "wte.weight") == []


def test_parts_are_joined_in_the_order_of_their_numbers() -> None:
    found = tensors(*(f"layers.3.ngram_embedding.shard_{n}.weight" for n in reversed(range(12))))
    (group,) = join_numbered(found)
    assert group.name == "layers.3.ngram_embedding.shard_*.weight"
    assert group.shape == (120, 4)
    assert group.members == tuple(f"layers.3.ngram_embedding.shard_{n}.weight" for n in range(12))
    assert is_split_table(group)
    assert choose("f", found, None, [group]) == group
    assert choose("f", found, found[0].name, [group]) == found[0]
    assert str(group) == "layers.3.ngram_embedding.shard_*.weight  (120, 4)  float32  in 12 tensors"


@pytest.mark.parametrize("name", ["ple.shards.{}", "table_part_{}", "rows.partition.{}", "chunk{}"])
def test_words_that_tell_of_parts(name: str) -> None:
    (group,) = join_numbered(tensors(*(name.format(n) for n in range(1, 4))))
    assert is_split_table(group)


def test_layers_are_not_joined_unless_asked() -> None:
    found = tensors("layers.0.up.weight", "layers.1.up.weight")
    (group,) = join_numbered(found)
    with pytest.raises(InvalidArgument, match=r"layers.\*.up.weight  \(20, 4\)  float32  in 2 tensors"):
        choose("f", found, None, [group])
    assert choose("f", found, "layers.*.up.weight", [group]) == group


@pytest.mark.parametrize(
    "found",
    [
        tensors("shard_0", "shard_1", "shard_3"),
        tensors("shard_2", "shard_3"),
        tensors("shard_0", "shard_00", "shard_1"),
        tensors("shard_0"),
        [*tensors("shard_0"), *tensors("shard_1", shape=(10, 5))],
        [*tensors("shard_0"), *tensors("shard_1", dtype="float16")],
        tensors("shard_0", "shard_1", shape=(10,)),
    ],
)
def test_what_does_not_belong_together_is_not_joined(found: list[Candidate]) -> None:
    assert join_numbered(found) == []
    with pytest.raises(InvalidArgument, match="numbers from 0 or 1 on without a gap"):
        choose("f", found, "shard_*", [])


def test_a_known_embedding_goes_before_a_split_table() -> None:
    found = tensors("model.embed_tokens.weight", "shard_0", "shard_1")
    assert choose("f", found, None, join_numbered(found)).name == "model.embed_tokens.weight"
