"""Claims about text: the tokenizers of both models, stored and read (parts/text.py)."""

import json
import unicodedata

import pytest
import sentencepiece
from made_data import BYTES, PRESET, both_kinds, random, rank_file, training_scenes

import model
from parts.settings import InputError
from parts.text import SPECIAL, Text, find_tokenizer, store_tokenizer
from parts.world import caption


@pytest.fixture(scope="module")
def texts(both_texts):
    """The text tokenizer of each tiny preset."""
    return both_texts


@both_kinds
def test_the_tiny_tokenizer_has_the_ids_of_the_preset(kind, texts):
    """Special tokens stand behind the text, in the preset's order, and code c of a picture is the token visual + c."""
    core, config = texts[kind].core, PRESET[kind]
    assert texts[kind].ids == config.ids and core.get_vocab_size() == config.vocab
    if kind == "emu3":
        last = core.token_to_id(f"<|visual token {config.codebook - 1:06d}|>")
        assert last == config.ids["visual"] + config.codebook - 1 == config.vocab - 1


def test_training_the_tokenizer_is_repeatable(texts):
    """Both kinds learn from the same text, so they cut it alike: a checkpoint's ids mean the same in every run."""
    assert all(texts["emu3"].core.id_to_token(i) == texts["janus"].core.id_to_token(i) for i in range(model.TINY_TEXT))


@both_kinds
def test_any_unicode_text_survives_encoding(kind, texts):
    """Bytes are the alphabet, so nothing is unknown: what is encoded is decoded to the same text."""
    points = random(0).integers(0x110000, size=(200, 12))
    strings = ["".join(chr(p) for p in row if not 0xD800 <= p < 0xE000) for row in points]
    for text in [*strings, "", " ", "\n\n\t\x00", "naïve 漢字 🙂🏽 e\u0301", "a red  circle\r\n"]:
        assert texts[kind].decode(texts[kind].encode(text)) == text


@both_kinds
def test_special_strings_in_a_users_text_stay_text(kind, texts):
    """Else a caption that quotes a control token would end the answer, or open a picture."""
    for special in [*SPECIAL[kind].values(), "<|visual token 000007|>", "<image>"]:
        ids = texts[kind].encode(f"say {special} now")
        assert max(ids) < model.TINY_TEXT and texts[kind].decode(ids) == f"say {special} now"


@both_kinds
def test_special_strings_act_only_where_they_are_allowed(kind, texts):
    """The flag's whole effect: the same string is one control token instead of text."""
    open_text = Text(texts[kind].file, kind, allow_special=True)
    boi = SPECIAL[kind]["boi"]
    assert open_text.encode(f"a{boi}b") == (*texts[kind].encode("a"), texts[kind].ids["boi"], *texts[kind].encode("b"))


def test_emu3s_own_tokenizer_has_the_published_ids(tmp_path):
    """Digits alone, the special tokens behind 151,643 ranks, and the 15 ids of a prompt whose length is published."""
    words = {64: "a", 33033: " portrait", 315: " of", 3908: " young", 3743: " girl", 13: ".", 58731: " masterpiece",
             11: ",", 4531: " film", 1081: " gr", 2627: "ained", 1850: " best", 4271: " quality", 220: " "}
    ranks = dict(enumerate(BYTES)) | {rank: word.encode() for rank, word in words.items()}
    ranks |= {300: b" g", 301: b"ai", 302: b"ain", 303: b"aine"}                # on the way to " grained"
    text = Text(rank_file(tmp_path, ranks, 32768, 151643), "emu3")
    prompt = "a portrait of young girl. masterpiece, film grained, best quality."
    assert [*text.encode(prompt)] == [64, 33033, 315, 3908, 3743, 13, 58731, 11, 4531, 1081, 2627, 11, 1850, 4271, 13]
    assert list(text.encode("64*64")) == [21, 19, 9, 21, 19]
    assert text.ids == model.EMU3_8B.ids
    assert text.control["<|visual token 032767|>"] == 184621 == model.EMU3_8B.vocab - 1
    assert text.decode(text.encode(prompt)) == prompt


def lowest_rank_first(word, ranks):
    """The published merge rule, written out: join the neighbours whose joint bytes have the lowest rank, until none."""
    parts = [word[i:i + 1] for i in range(len(word))]
    while word not in ranks:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[word]]


def test_emu3s_own_tokenizer_merges_as_published(tmp_path):
    """Random words over random ranks, against the rule written out: the file has no list of merges, only ranks."""
    rng, tokens = random(3), []
    while len(tokens) < 120:                            # as training makes them: each of two earlier ones
        pool = [b"a", b"b", b"c", b"d", *tokens]
        joint = pool[rng.integers(len(pool))] + pool[rng.integers(len(pool))]
        tokens += [joint] if joint not in pool and len(joint) < 9 else []
    ranks = {token: rank for rank, token in enumerate([*BYTES, *tokens])}
    text = Text(rank_file(tmp_path, [*BYTES, *tokens]), "emu3")
    for _ in range(300):
        word = "".join("abcd"[i] for i in rng.integers(4, size=rng.integers(1, 20)))
        assert list(text.encode(word)) == lowest_rank_first(word.encode(), ranks), word


@pytest.mark.parametrize("given, cut", [
    ("it's We'LL", ["it", "'s", " We", "'LL"]), ("a1234", ["a", "1", "2", "3", "4"]), ("(word)", ["(word", ")"]),
    ("end!\n\n  next", ["end", "!\n\n", " ", " next"]), ("a  \n b", ["a", "  \n", " b"]), ("e\u0301", ["\u00e9"]),
    ("two  spaces ", ["two", " ", " spaces", " "])])
def test_emu3s_own_tokenizer_cuts_words_as_published(given, cut, tmp_path):
    """Contractions in any case, single digits, line ends with the signs before them; composed characters (NFC)."""
    text = Text(rank_file(tmp_path, BYTES), "emu3")
    core = text.core
    assert [given for given, _ in core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(given))] == [
        "".join(core.id_to_token(i) for i in core.encode(piece, add_special_tokens=False).ids) for piece in cut]
    assert text.decode(text.encode(given)) == unicodedata.normalize("NFC", given)


def test_emu3s_own_tokenizer_is_stored_as_an_equal_tokenizer_json(tmp_path):
    """A run that starts from the original files keeps one that every library reads."""
    text = Text(rank_file(tmp_path, [*BYTES, b"re", b"ed", b"red", b" red"]), "emu3")
    (tmp_path / "run").mkdir()
    store_tokenizer(text, tmp_path / "run")
    again = Text(find_tokenizer(tmp_path / "run"), "emu3")
    assert again.ids == text.ids and again.file.name == "tokenizer.json"
    for given in ("a red cat's 12\n\n!", "<|image start|>"):
        assert again.encode(given) == text.encode(given) and max(text.encode(given)) < 260


@pytest.mark.parametrize("line", [b"not base64 5", b"YQ== x", b"YQ=="])
def test_a_broken_rank_file_is_named(line, tmp_path):
    """One line, with the file and what to do."""
    file = rank_file(tmp_path, BYTES)
    file.write_bytes(file.read_bytes() + line)
    with pytest.raises(InputError, match=r"emu3.tiktoken cannot be read .*download"):
        Text(file, "emu3")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A Llama-type sentencepiece tokenizer with Janus-Pro's control tokens, some in the model and some beside it."""
    folder, special = tmp_path_factory.mktemp("pieces"), list(SPECIAL["janus"].values())
    lines = [caption(scene, random(i)) for i, scene in enumerate(training_scenes(200))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=special[:5], minloglevel=2)
    (folder / "added_tokens.json").write_text(json.dumps({token: 340 + i for i, token in enumerate(special[5:])}))
    return folder / "tokenizer.model"


def test_sentencepiece_models_encode_and_decode(pieces, tmp_path):
    """Ids are those of the library; control tokens are found by string in the model and in the file beside it."""
    text, library = Text(pieces, "janus"), sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    given = "a red circle, 漢\n"
    assert list(text.encode(given)) == library.encode(given)
    assert text.decode([text.ids["boi"], *text.encode(given), text.ids["eos"], 5]) == given
    assert text.ids["bos"] == library.piece_to_id(SPECIAL["janus"]["bos"]) and text.ids["assistant"] == 342
    store_tokenizer(text, tmp_path)
    assert Text(find_tokenizer(tmp_path), "janus").ids == text.ids


def test_a_control_string_that_cannot_be_kept_apart_is_refused(pieces):
    """Sentencepiece finds its own control tokens in any text; they act only where they are allowed."""
    text, special = Text(pieces, "janus"), SPECIAL["janus"]
    with pytest.raises(InputError, match=f"holds the control string {special['boi']}.*--allow-special"):
        text.encode(f"a {special['boi']} b")
    assert 342 not in text.encode(special["assistant"])
    allowed = Text(pieces, "janus", allow_special=True).encode(special["boi"] + special["assistant"])
    assert list(allowed) == [text.ids["boi"], 342]


def test_letters_among_the_added_tokens_stay_letters(texts, tmp_path):
    """Janus-Pro's tokenizer.json lists ordinary letters and control tokens together, and marks few of them."""
    content = json.loads(texts["janus"].file.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 488, "content": "€"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = Text(tmp_path / "tokenizer.json", "janus")
    assert text.encode("€") == (488,) and text.decode([488]) == "€"
    assert max(text.encode(SPECIAL["janus"]["boi"])) < model.TINY_TEXT


def test_a_tokenizer_of_a_newer_library_is_named(texts, tmp_path):
    """It is valid JSON with parts that this version does not know."""
    content = json.loads(texts["emu3"].file.read_text()) | {"pre_tokenizer": {"type": "Invented"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer.json cannot be used .* newer version"):
        Text(tmp_path / "tokenizer.json", "emu3")
