"""Text as token ids: tokenizers of all kinds that the two models are published with, and the small one of the world.

Special tokens are found by their string, never by number, and never act inside a user's text.
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
# Special tokens by role. Ids are looked up by string, never assumed: they differ between Janus-Pro 1B and 7B.
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


TOKENIZERS = ("tokenizer.json", "emu3.tiktoken", "tokenizer.model")             # in this order of preference ...
TOKENIZER_NOTES = ("emu3_vision_tokens.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "chat_template.json")                 # ... and beside them


def find_tokenizer(folder):
    """The tokenizer's file in a folder, or None."""
    return next((folder / name for name in TOKENIZERS if (folder / name).exists()), None)


def special_ids(known, kind, origin):
    """{role: id} of the special tokens, from the {token: id} of a tokenizer or a config.json."""
    if "<image>" in known:                           # how transformers calls Emu3's first reserved token
        known = {SPECIAL["emu3"]["placeholder"]: known["<image>"]} | known
    if kind == "janus":                              # the authors add it where it lacks; its embedding is never used
        known = {SPECIAL[kind]["placeholder"]: max(known.values(), default=0) + 1} | known
    missing = [text for text in SPECIAL[kind].values() if text not in known]
    if missing:
        raise InputError(f"tokenizer {origin} lacks {', '.join(missing)}: is it the tokenizer of {kind}?")
    return {role: known[text] for role, text in SPECIAL[kind].items()}


def token_ids(file):
    """{token: id} of a tokenizer.json or a sentencepiece .model; of emu3.tiktoken its special tokens."""
    file = Path(file)
    try:
        if file.suffix == ".tiktoken":               # Emu3's own: they follow the ranks of this file, in a fixed order
            visual = file.with_name("emu3_vision_tokens.txt").read_text(encoding="utf-8").splitlines()
            first = sum(1 for line in file.read_bytes().splitlines() if line.strip())
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
                       *filter(None, map(str.strip, visual))]
            return {token: first + i for i, token in enumerate(special)}
        if file.suffix == ".model":
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
            added = file.with_name("added_tokens.json")
            return {pieces.id_to_piece(i): i for i in range(len(pieces))} | (read_json(added) if added.exists() else {})
        content = json.loads(file.read_text(encoding="utf-8"))
        return dict(content["model"]["vocab"]) | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"tokenizer {file} cannot be read ({error}): download this file again") from error


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------
class Text:
    """Encode and decode text with a tokenizer.json, with Emu3's own emu3.tiktoken, or with a sentencepiece .model.

    Special ids come from the file, by string. Special strings inside a user's text stay text, or are refused where the
    tokenizer cannot keep them apart; allow_special turns them into control tokens instead.
    """

    def __init__(self, file, kind, allow_special=False):
        self.file, known, control = Path(file), token_ids(file), set(SPECIAL[kind].values())
        self.ids, self.allow_special = special_ids(known, kind, file), allow_special
        if self.file.suffix == ".model":
            self.core = sentencepiece.SentencePieceProcessor(model_file=str(file))
            control |= {token for token, i in known.items() if is_control(self.core, i)}
        elif self.file.suffix == ".tiktoken":
            self.core, control = byte_bpe(self.file, known), set(known)
        else:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            for token in content["added_tokens"]:    # ordinary letters may be among them; control tokens are <...>
                token["special"] = token.get("special") or bool(re.fullmatch("<.+>", token["content"]))
                control |= {token["content"]} if token["special"] else set()
            try:
                self.core = tokenizers.Tokenizer.from_str(json.dumps(content))
                self.core.encode_special_tokens = True
            except Exception as error:               # the library raises nothing more special
                raise InputError(f"tokenizer {file} cannot be used ({error}): was it made for a newer version of "
                                 "tokenizers?") from error
        self.control = {token: known[token] for token in control if token in known}
        self.control_ids = frozenset(self.control.values())
        self.encode = functools.lru_cache(maxsize=100_000)(self._encode)

    def cut(self, text):
        """Ids of text in which no special string acts, as far as the tokenizer can keep them apart."""
        if self.file.suffix == ".model":
            return self.core.encode(text)
        return self.core.encode(text, add_special_tokens=False).ids

    def _encode(self, text):
        if half := re.search("[\ud800-\udfff]", text):
            raise InputError(f"the text holds half a character, {half[0]!r}: take it out")
        if self.allow_special:
            parts = re.split("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")", text)
            return tuple(i for part in parts
                         for i in ([self.control[part]] if part in self.control else self.cut(part)))
        ids = tuple(self.cut(text))
        if found := self.control_ids.intersection(ids):
            token = next(token for token, i in self.control.items() if i in found)
            raise InputError(f"the text {text[:60]!r} holds the control string {token}: take it out, or let it act as "
                             "one with --allow-special")
        return ids

    def decode(self, ids):
        """Ids up to the first EOS -> text without control tokens."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.ids["eos"])] if self.ids["eos"] in ids else ids
        return self.core.decode([i for i in ids if i not in self.control_ids])


def is_control(pieces, i):
    """Is a sentencepiece token control, unknown, or a user's that looks like <this>? Bytes like <0x0A> are text."""
    return i >= len(pieces) or pieces.is_control(i) or pieces.is_unknown(i) or (
        bool(re.fullmatch("<.+>", pieces.id_to_piece(i))) and not pieces.is_byte(i))


# How Emu3's own tokenizer cuts text before merging bytes: contractions in any case, words with one character that is no
# letter before them, single digits, other signs with a space before and line ends after them, line ends, spaces.
EMU3_CUT = (r"(?i:'(?:s|t|re|ve|m|ll|d))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_bpe(file, special):
    """emu3.tiktoken (a byte string in base64 and its rank per line) as a byte-level BPE with special tokens {text: id}.

    Such a file names no merges: any two neighbours whose joint bytes have a rank may merge, the lowest rank first.
    """
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:
        raise InputError(f"tokenizer {file} cannot be read ({error}): download this file again") from error
    shown = [b for b in range(256) if chr(b).isprintable() and chr(b) not in " \xa0\xad"]
    letter = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(shown)))}
    word = {token: "".join(map(letter.get, token)) for token in ranks}
    merges = [(word[token[:i]], word[token[i:]]) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={word[token]: rank for token, rank in ranks.items()}, merges=merges, ignore_merges=True))
    core.normalizer = tokenizers.normalizers.NFC()
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(EMU3_CUT), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    core.encode_special_tokens = True
    return core


def store_tokenizer(text, folder):
    """A run folder's copy of a tokenizer: emu3.tiktoken as the equal tokenizer.json, all others as they are."""
    if text.file.suffix == ".tiktoken":
        text.core.save(str(folder / "tokenizer.json"))
        return
    for name in (text.file.name, "added_tokens.json"):
        if text.file.with_name(name).exists():
            shutil.copy(text.file.with_name(name), folder / name)


def train_bpe(file, lines, words, frames, size, special):
    """A byte-level BPE of `size` tokens made from lines of text, with special tokens behind them, saved as file.

    No merge crosses the edge of one of `words`; what stands between words may become one token, so conversations are
    short. Each of `frames`, which begin and end turns, is cut out first, and numbers, line ends and * are apart.
    """
    words = "|".join(sorted(words, key=len, reverse=True))
    frames = "|".join(map(re.escape, frames))
    cut = rf"{frames}| ?\b({words})\b|[0-9]+|\s*\n|\*"
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(cut), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False, min_frequency=1,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(lines, trainer)
    if core.get_vocab_size() != size:
        raise RuntimeError(f"the text gives {core.get_vocab_size()} tokens, not {size}")
    core.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    core.save(str(file))


def special_tokens(kind, codebook):
    """All special tokens of a small tokenizer, in the order of their ids; Emu3 has one for each picture code."""
    codes = range(1, codebook) if kind == "emu3" else ()                        # code 0 is the last of SPECIAL
    return [*SPECIAL[kind].values(), *(f"<|visual token {code:06d}|>" for code in codes)]
