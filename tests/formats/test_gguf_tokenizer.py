"""Tokenizers: rebuilt from a GGUF vocabulary, told in GGUF keys, or refused by name."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest

from lowbit.errors import CheckpointError
from lowbit.metadata import Metadata, SideFile
from lowbit_formats.gguf import tokenizer_files, tokenizer_json
from lowbit_formats.gguf.pre_hashes import CHECK_TEXT, NAMES, fingerprint
from lowbit_formats.gguf.pretokenizers import BY_NAME, recognise
from lowbit_formats.gguf.vocabulary import Vocabulary

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def bytes_vocabulary(gguf_models):
    return Vocabulary(
        "gpt2",
        gguf_models.byte_tokens,
        gguf_models.byte_types,
        "smollm",
        merges=list(gguf_models.merges),
        roles={"bos": 0, "eos": 1},
    )


@pytest.fixture
def pieces_vocabulary(gguf_models):
    return Vocabulary(
        "llama",
        gguf_models.piece_tokens,
        gguf_models.piece_types,
        "default",
        gguf_models.piece_scores,
        roles={"bos": 1, "eos": 2, "unk": 0},
    )


def metadata_of(files, vocab_size, **config):
    side_files = tuple(SideFile(name, content=content) for name, content in files.items())
    return Metadata({"vocab_size": vocab_size, **config}, side_files)


def rebuilt(vocabulary, architecture="llama"):
    files = tokenizer_files.build(vocabulary, architecture, 128)
    return files, tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())


def read_back(files, vocab_size, **changes):
    """Read the files again, with changes to the tokenizer.json."""
    tokenizer = {**json.loads(files["tokenizer.json"]), **changes}
    return tokenizer_json.read(metadata_of({**files, "tokenizer.json": json.dumps(tokenizer).encode()}, vocab_size))


def refusal(files, vocab_size, **changes):
    with pytest.raises(CheckpointError) as raised:
        read_back(files, vocab_size, **changes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_byte_level_bpe_splits_as_its_pre_tokenizer_says(bytes_vocabulary):
    _, tokenizer = rebuilt(bytes_vocabulary)
    assert tokenizer.encode("the the 12").tokens == ["t", "he", "Ġthe", "Ġ", "1", "2"]
    _, tokenizer = rebuilt(replace(bytes_vocabulary, pre="gpt-2"))
    assert tokenizer.encode("the 12").tokens == ["t", "he", "Ġ", "12"]


def test_control_and_user_tokens_are_taken_whole(bytes_vocabulary):
    _, tokenizer = rebuilt(bytes_vocabulary)
    assert tokenizer.encode("<|end|>a<tool>").ids == [1, bytes_vocabulary.tokens.index("a"), 2]
    assert tokenizer.decode([1, 2]) == "<tool>"


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "ids"), [(True, False, [0, 2]), (True, True, [0, 2, 1]), (None, None, [2])]
)
def test_bos_and_eos_are_added_as_the_file_says(bytes_vocabulary, add_bos, add_eos, ids):
    _, tokenizer = rebuilt(replace(bytes_vocabulary, add_bos=add_bos, add_eos=add_eos))
    assert tokenizer.encode("<tool>").ids == ids


def test_llama_bpe_adds_bos_unless_told_otherwise(bytes_vocabulary):
    _, tokenizer = rebuilt(replace(bytes_vocabulary, pre="llama-bpe"))
    assert tokenizer.encode("<tool>").ids == [0, 2]


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(pieces_vocabulary):
    _, tokenizer = rebuilt(pieces_vocabulary)
    assert tokenizer.encode("the a").tokens == ["<s>", "▁the", "▁a"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("the é").ids) == "the é"


def test_no_space_prefix(pieces_vocabulary):
    _, tokenizer = rebuilt(replace(pieces_vocabulary, add_space_prefix=False))
    assert tokenizer.encode("he", add_special_tokens=False).tokens == ["he"]
    assert tokenizer.decode(tokenizer.encode("he the").ids) == "he the"


def test_gemma_ranks_by_position(pieces_vocabulary):
    """Gemma's scores do not follow the order of its merges: with equal scores the ids decide anyway, here they are reversed."""
    reverse = replace(pieces_vocabulary, scores=[-score for score in pieces_vocabulary.scores])
    by_score = list(tokenizer_files.merges_by_score(reverse))
    by_position = list(tokenizer_files.merges_by_score(reverse, by_position=True))
    assert by_score[0][2] == "▁a"
    assert by_position[0][2] == "▁t"


def test_configs_name_the_special_tokens(bytes_vocabulary):
    vocabulary = replace(bytes_vocabulary, templates={"": "{{ messages }}"}, roles={"bos": 0, "eos": 1, "eot": 2})
    files, _ = rebuilt(vocabulary)
    config = json.loads(files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|begin|>", "<|end|>", None)
    assert (config["chat_template"], config["model_max_length"]) == ("{{ messages }}", 128)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [1, 2]
    assert read_back(files, 263).roles == {"bos": 0, "eos": 1, "eot": 2}


@pytest.mark.parametrize("pre", sorted({found.names[0] for found in BY_NAME.values()}))
def test_byte_level_vocabularies_come_back_whole(bytes_vocabulary, pre):
    vocabulary = replace(bytes_vocabulary, pre=pre, add_bos=False, add_eos=False, templates={"": "x", "tools": "y"})
    files, _ = rebuilt(vocabulary)
    assert read_back(files, len(vocabulary.tokens)) == vocabulary


def test_sentencepiece_vocabularies_come_back_whole(pieces_vocabulary):
    vocabulary = replace(pieces_vocabulary, add_bos=True, add_eos=False, add_space_prefix=True)
    files, _ = rebuilt(vocabulary)
    assert read_back(files, len(vocabulary.tokens)) == vocabulary


def test_scores_follow_merges_when_ids_do_not(pieces_vocabulary):
    """A tokenizer whose merges come in another order than its ids gets scores by merge."""
    files, _ = rebuilt(pieces_vocabulary)
    model = json.loads(files["tokenizer.json"])["model"]
    model["merges"] = [*reversed(model["merges"])]
    size = len(pieces_vocabulary.tokens)
    scores = read_back(files, size, model=model).scores
    ranked = sorted(
        (token for token in ("▁t", "he", "▁the", "▁a")),
        key=lambda token: -scores[pieces_vocabulary.tokens.index(token)],
    )
    assert ranked == ["▁a", "▁the", "he", "▁t"]


def test_holes_in_the_ids_are_filled_and_emptied_again(bytes_vocabulary):
    padded = replace(
        bytes_vocabulary,
        tokens=[*bytes_vocabulary.tokens, "[PAD263]", "[PAD264]"],
        types=[*bytes_vocabulary.types, 5, 5],
        add_bos=False,
        add_eos=False,
    )
    files, _ = rebuilt(padded)
    assert "[PAD263]" not in json.loads(files["tokenizer.json"])["model"]["vocab"]
    assert read_back(files, 265) == padded


def test_a_published_tokenizer_is_known_by_its_hash(bytes_vocabulary, monkeypatch):
    """The name of this very tokenizer wins over the name of the way it splits."""
    files, tokenizer = rebuilt(bytes_vocabulary)
    monkeypatch.setitem(NAMES, fingerprint(tokenizer.encode(CHECK_TEXT).ids), "starcoder")
    assert read_back(files, 263).pre == "starcoder"


def test_fingerprints_are_llama_cpps():
    """SHA-256 of the printed list of ids; the text is pinned, because one other character would make every name unknown."""
    assert fingerprint([1, 2, 3]) == "a36b1f2c3f84522dd1005145646617d7054c0851e97c72a039c0bdfac9fa07f3"
    text = sha256(CHECK_TEXT.encode()).hexdigest()
    assert text == "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
    assert NAMES["855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"] == "smollm"


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_pre_tokenizers_are_recognised_by_what_they_do(name):
    found = BY_NAME[name]
    tokenizer = {
        "pre_tokenizer": found.to_json(),
        "normalizer": {"type": found.normalizer} if found.normalizer else None,
        "model": {"ignore_merges": found.ignore_merges},
    }
    assert recognise(tokenizer) == found
    assert recognise({**tokenizer, "model": {"ignore_merges": not found.ignore_merges}}) != found
    assert recognise({**tokenizer, "normalizer": {"type": "Lowercase"}}) is None


@pytest.mark.parametrize("pre", [None, {"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": True}])
def test_other_pre_tokenizers_are_not_recognised(pre):
    assert recognise({"pre_tokenizer": pre, "model": {}}) is None


@pytest.mark.parametrize(
    ("vocabulary", "words"),
    [
        (Vocabulary("bert", ["a"], [1]), "'bert'"),
        (Vocabulary("llama", ["a"], [1]), "without scores"),
        (Vocabulary("gpt2", ["a"], [1], "klingon"), "'klingon'"),
    ],
)
def test_vocabularies_that_cannot_be_rebuilt(vocabulary, words):
    assert words in tokenizer_files.why_not(vocabulary)


def test_a_piece_of_absurd_length_is_refused(pieces_vocabulary):
    tokens = [*pieces_vocabulary.tokens[:-1], "x" * 100_000]
    with pytest.raises(CheckpointError, match="100,000 characters"):
        rebuilt(replace(pieces_vocabulary, tokens=tokens))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"model": None}, "unknown model"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, "no name for this tokenizer"),
        ({"added_tokens": [{"id": 400, "content": "<far>", "special": True}]}, "'<far>' has id 400"),
        ({"added_tokens": [{"id": 5, "content": "<same>", "special": True}]}, "share the id 5"),
        ({"added_tokens": [{"id": 5}]}, "malformed"),
        ({"added_tokens": 7}, "malformed"),
    ],
)
def test_byte_level_tokenizers_that_are_refused(bytes_vocabulary, changes, words):
    files, _ = rebuilt(bytes_vocabulary)
    assert words in refusal(files, 263, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre_tokenizer": {"type": "Metaspace", "split": True}}, "'Metaspace'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "'Whitespace'"),
    ],
)
def test_sentencepiece_tokenizers_that_are_refused(pieces_vocabulary, changes, words):
    files, _ = rebuilt(pieces_vocabulary)
    assert words in refusal(files, len(pieces_vocabulary.tokens), **changes)


def test_merges_that_scores_cannot_tell_are_refused(pieces_vocabulary):
    """One way of making a token is missing, so this is no SentencePiece model: ggml would merge where it does not."""
    files, _ = rebuilt(pieces_vocabulary)
    model = json.loads(files["tokenizer.json"])["model"]
    model["merges"] = [merge for merge in model["merges"] if merge != ["▁t", "he"]]
    assert "no SentencePiece merges" in refusal(files, len(pieces_vocabulary.tokens), model=model)


def test_a_template_with_other_tokens_is_refused(bytes_vocabulary):
    files, _ = rebuilt(replace(bytes_vocabulary, add_bos=True))
    post = json.loads(files["tokenizer.json"])["post_processor"]
    post["single"][0]["SpecialToken"]["id"] = "<tool>"
    assert "'<tool>'" in refusal(files, 263, post_processor=post)


def test_missing_and_broken_files():
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        tokenizer_json.read(metadata_of({}, 10))
    with pytest.raises(CheckpointError, match=r"only tokenizer\.model"):
        tokenizer_json.read(metadata_of({"tokenizer.model": b""}, 10))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        tokenizer_json.read(metadata_of({"tokenizer.json": b"{"}, 10))


def test_the_tokenizers_package_is_asked_for_by_name(bytes_vocabulary, monkeypatch):
    files, _ = rebuilt(bytes_vocabulary)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert 'pip install "lowbit[hf]"' in refusal(files, 263)


def test_chat_templates_are_found_in_every_place(bytes_vocabulary):
    files, _ = rebuilt(bytes_vocabulary)
    jinja = {**files, "chat_template.jinja": b"one"}
    assert tokenizer_json.read(metadata_of(jinja, 263)).templates == {"": "one"}
    document = {**files, "chat_template.json": json.dumps({"chat_template": "two"}).encode()}
    assert tokenizer_json.read(metadata_of(document, 263)).templates == {"": "two"}
