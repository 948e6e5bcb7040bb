"""Text as token ids: the tokenizers that both models are published with, and the small one of the drawn world.

Special tokens are found by their string, never by number, and stay plain text inside a user's text.

    python -m pytest tests/test_text.py
"""

import base64
import functools
import json
import re
import shutil
from pathlib import Path

import sentencepiece
import tokenizers

from parts.settings import InputError, read_json

# ---------------------------------------------------------------------------------------------------------------------
# Special tokens by role
# ---------------------------------------------------------------------------------------------------------------------
# Ids are looked up by string, never assumed: they differ between Janus-Pro 1B and 7B.
SPECIAL = {
    "emu3": {
        "pad": "<|endoftext|>", "eol": "<|extra_200|>", "eof": "<|extra_201|>", "bos": "<|extra_203|>",
        "eos": "<|extra_204|>", "img": "<|image token|>", "boi": "<|image start|>", "eoi": "<|image end|>",
        "placeholder": "<|extra_0|>", "visual": "<|visual token 000000|>",
    },
    "janus": {
        "bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "pad": "<｜▁pad▁｜>",
        "boi": "<begin_of_image>", "eoi": "<end_of_image>", "placeholder": "<image_placeholder>",
        "user": "<|User|>", "assistant": "<|Assistant|>",
    },
}


# Names of a tokenizer's file, the preferred one first, and of files that belong to it.
TOKENIZERS = ("tokenizer.json", "emu3.tiktoken", "tokenizer.model")
TOKENIZER_NOTES = ("emu3_vision_tokens.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "chat_template.json")


def find_tokenizer(folder):
    """The file of the tokenizer in a folder, or None."""
    return next((folder / name for name in TOKENIZERS if (folder / name).exists()), None)


def special_ids(known, kind, origin):
    """{role: id} of the special tokens of a model, from {token: id} of its tokenizer or config.json."""
    if "<image>" in known:                          # transformers' name of Emu3's first reserved token
        known = {SPECIAL["emu3"]["placeholder"]: known["<image>"]} | known
    if kind == "janus":                             # like the authors, add it if missing: its embedding is never used
        known = {SPECIAL[kind]["placeholder"]: max(known.values(), default=0) + 1} | known
    missing = [text for text in SPECIAL[kind].values() if text not in known]
    if missing:
        raise InputError(f"tokenizer {origin} lacks {', '.join(missing)}: give the tokenizer of {kind}")
    return {role: known[text] for role, text in SPECIAL[kind].items()}


def token_ids(file):
    """{token: id} of a tokenizer.json or a sentencepiece .model, with added tokens. Of emu3.tiktoken, special tokens
    only."""
    file = Path(file)
    try:
        if file.suffix == ".tiktoken":              # Emu3's own format: special tokens follow the ranks
            visual = file.with_name("emu3_vision_tokens.txt").read_text(encoding="utf-8").splitlines()
            first = sum(1 for line in file.read_bytes().splitlines() if line.strip())
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
                       *filter(None, map(str.strip, visual))]
            return {token: first + i for i, token in enumerate(special)}
        if file.suffix == ".model":
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
            known = {pieces.id_to_piece(i): i for i in range(len(pieces))}
            added = file.with_name("added_tokens.json")
            return known | read_json(added) if added.exists() else known
        content = json.loads(file.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        return dict(content["model"]["vocab"]) | added
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"tokenizer {file} cannot be read ({error}): download this file again") from error


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------
def is_control(pieces, i):
    """Is a token of a sentencepiece model added, control, unknown, or one that looks like <this>? Bytes such as <0x0A>
    are text."""
    if i >= len(pieces) or pieces.is_control(i) or pieces.is_unknown(i):
        return True
    return bool(re.fullmatch("<.+>", pieces.id_to_piece(i))) and not pieces.is_byte(i)


def core_and_control(file):
    """The tokenizer of a tokenizer.json, and its control tokens: added tokens that it calls special or that look like
    <this>. Other added tokens may be ordinary letters."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] = token.get("special") or bool(re.fullmatch("<.+>", token["content"]))
    try:
        core = tokenizers.Tokenizer.from_str(json.dumps(content))
        core.encode_special_tokens = True
    except Exception as error:                      # the library raises plain Exceptions
        raise InputError(f"tokenizer {file} cannot be used ({error}): it may need a newer version of tokenizers"
                         ) from error
    return core, {token["content"] for token in content["added_tokens"] if token["special"]}


# How Emu3's own tokenizer cuts text before it merges bytes: contractions, words with one preceding character that is
# not a letter, single digits, other signs with a space before and line ends after them, line ends, spaces.
EMU3_CUT = (r"(?i:'(?:s|t|re|ve|m|ll|d))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_bpe(file, special):
    """emu3.tiktoken (in each line, a byte string in base64 and its rank) as a byte-level BPE with these special tokens.

    The file lists no merges: two neighbours may merge if their joint bytes have a rank, the lowest rank first.
    """
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:
        raise InputError(f"tokenizer {file} cannot be read ({error}): download this file again") from error
    # As in GPT-2, each byte is written as a visible letter.
    shown = [b for b in range(256) if chr(b).isprintable() and chr(b) not in " \xa0\xad"]
    hidden = sorted(set(range(256)) - set(shown))
    letter = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    word = {token: "".join(map(letter.get, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(word[a], word[b]) for a, b in halves if a in ranks and b in ranks]
    vocab = {word[token]: rank for token, rank in ranks.items()}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    core.normalizer = tokenizers.normalizers.NFC()
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(EMU3_CUT), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    core.encode_special_tokens = True
    return core


class Text:
    """Encode and decode text with a tokenizer.json, Emu3's own emu3.tiktoken, or a sentencepiece .model.

    Special strings inside a user's text stay text, or are refused if the tokenizer cannot tell them from control
    tokens; allow_special turns them into control tokens instead.
    """

    def __init__(self, file, kind, allow_special=False):
        self.file = Path(file)
        self.allow_special = allow_special
        known = token_ids(file)
        self.ids = special_ids(known, kind, file)
        if self.file.suffix == ".model":
            self.core = sentencepiece.SentencePieceProcessor(model_file=str(file))
            control = {token for token, i in known.items() if is_control(self.core, i)}
        elif self.file.suffix == ".tiktoken":
            self.core = byte_bpe(self.file, known)
            control = set(known)
        else:
            self.core, control = core_and_control(self.file)
        control |= set(SPECIAL[kind].values())
        self.control = {token: known[token] for token in control if token in known}
        self.control_ids = frozenset(self.control.values())
        self.encode = functools.lru_cache(maxsize=100_000)(self._encode)

    def cut(self, text):
        """Ids of text, special strings taken as text where the tokenizer can do so."""
        if self.file.suffix == ".model":
            return self.core.encode(text)
        return self.core.encode(text, add_special_tokens=False).ids

    def _encode(self, text):
        if half := re.search("[\ud800-\udfff]", text):
            raise InputError(f"the text holds half a character, {half[0]!r}: remove it")
        if self.allow_special:
            longest_first = sorted(self.control, key=len, reverse=True)
            ids = []
            for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
                ids += [self.control[part]] if part in self.control else self.cut(part)
            return tuple(ids)
        ids = tuple(self.cut(text))
        if found := self.control_ids.intersection(ids):
            token = next(token for token, i in self.control.items() if i in found)
            raise InputError(f"the text {text[:60]!r} holds the control string {token}: remove it, or pass "
                             "--allow-special to use it as a control token")
        return ids

    def decode(self, ids):
        """Ids up to the first EOS -> text without control tokens."""
        ids = [int(i) for i in ids]
        if self.ids["eos"] in ids:
            ids = ids[:ids.index(self.ids["eos"])]
        return self.core.decode([i for i in ids if i not in self.control_ids])


def store_tokenizer(text, folder):
    """Copy a tokenizer into a run folder: emu3.tiktoken as an equivalent tokenizer.json, all others as they are."""
    if text.file.suffix == ".tiktoken":
        text.core.save(str(folder / "tokenizer.json"))
        return
    for name in (text.file.name, "added_tokens.json"):
        if text.file.with_name(name).exists():
            shutil.copy(text.file.with_name(name), folder / name)


def train_bpe(file, lines, words, frames, size, special):
    """Train a byte-level BPE of `size` tokens on lines of text, add special tokens behind them, and save it as file.

    No merge crosses the border of one of `words`, but the text between two words may become one token, which keeps
    conversations short. Each of `frames`, which begin and end turns, is a piece of its own, and so are numbers, line
    ends and *.
    """
    words = "|".join(sorted(words, key=len, reverse=True))
    frames = "|".join(map(re.escape, frames))
    pieces = rf"{frames}| ?\b({words})\b|[0-9]+|\s*\n|\*"
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pieces), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False, min_frequency=1,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(lines, trainer)
    if core.get_vocab_size() != size:
        raise RuntimeError(f"the text gives {core.get_vocab_size()} tokens instead of {size}")
    core.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    core.save(str(file))


def special_tokens(kind, codebook):
    """All special tokens of a small tokenizer, in the order of their ids. Emu3 has one for each picture code."""
    if kind == "janus":
        return [*SPECIAL[kind].values()]
    # SPECIAL ends with code 0.
    return [*SPECIAL[kind].values(), *(f"<|visual token {code:06d}|>" for code in range(1, codebook))]
