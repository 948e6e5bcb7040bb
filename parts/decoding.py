"""Generation, token by token: the cache of keys and values, steps that a GPU replays, what is drawn from the logits,
and the three ways to go on: with a picture, with words, with both in turn.

    python -m pytest tests/test_decoding.py
"""

import collections
import contextlib
import functools
import math
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from parts.settings import InputError, first_line

# Legend: B rows, T tokens, U keys, cached ones included; H heads, G key/value heads, D head size; V vocabulary.


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------
def visibility(mask, columns, end):
    """Which of `end` keys the tokens in columns (T,) see: (B or 1, 1, T, U) bool, or None: causal where the columns are
    all there are, everything where one token is new. mask (B, U) bool or None: no padding."""
    if mask is None and len(columns) in (1, end):
        return None
    keys = torch.arange(end, device=columns.device)                             # (U,)
    causal = keys <= columns[:, None]                                           # (T, U)
    if mask is None:
        return causal[None, None]
    # A padded row sees at least itself, else its softmax is 0/0 and poisons everything.
    itself = keys == columns[:, None]                                           # (T, U)
    return ((causal & mask[:, None]) | itself)[:, None]                         # (B, 1, T, U)


class Cache:
    """Keys and values of all layers in columns: those of prompts with mask (B, T) bool, then `new` more, and whatever
    `grow` adds. A step fills the same columns for all rows.

    A row may stand still while others go on: its columns are masked, and its position stays. Column, position and mask
    are tensors, so a step of fixed shape can be recorded and replayed (`recorded`).
    """

    def __init__(self, lm, mask, new):
        c, like, device = lm.config, lm.embed_tokens.weight, mask.device
        self.rotations = lm.rotations
        self.mask = F.pad(mask, (0, new), value=True)                           # (B, U): who is real in each column
        self.even = bool(mask.all())                # no row has a masked column so far: attention needs no mask
        self.used = 0                               # columns in use
        self.whole = False                          # whether a step reads all columns, under the mask
        self.now, self.columns = None, None         # where the step under way writes: (first, end), and (new,)
        self.column = torch.zeros((), dtype=torch.long, device=device)          # the next one, where `whole`
        self.position = torch.zeros(len(mask), dtype=torch.long, device=device)         # of each row's next token
        # Of the layers that a task runs through, made when the prompts do. Zeros: a masked column weighs nothing, but
        # nothing times whatever lay in memory may be NaN.
        self.k, self.v = (collections.defaultdict(lambda: like.new_zeros(
            len(mask), c.kv_heads, self.mask.shape[1], c.head_dim)) for _ in range(2))
        self.rope = self.turns()

    def turns(self):
        """Rotations of as many positions as there are columns: (1, 1, U, D) each."""
        return self.rotations(torch.arange(self.mask.shape[1], device=self.mask.device)[None])

    def grow(self, used, more):
        """Make room for more columns; `used` of those so far are in use. Recorded steps end here."""
        self.used = used
        self.mask = F.pad(self.mask, (0, more), value=True)
        for held in (self.k, self.v):
            for layer, columns in held.items():
                held[layer] = F.pad(columns, (0, 0, 0, more))
        self.rope = self.turns()

    def enter(self, new, moving=None):
        """Take the next `new` columns -> rotations (B or 1, 1, new, D), and who sees whom, as attention takes it.
        Where moving (B,) bool is false, a row stands still."""
        first = self.used
        self.used = self.used + new
        end = self.mask.shape[1] if self.whole else self.used
        self.now = first, self.used
        if self.even and moving is None and new == 1:                           # nearly all steps of most answers
            return [part[:, :, first:end] for part in self.rope], None
        self.columns = columns = torch.arange(first, self.used, device=self.mask.device)        # (new,)
        if self.even and moving is None:
            return [part[:, :, first:end] for part in self.rope], visibility(None, columns, end)
        if self.whole:
            self.columns = columns = self.column + columns - first
            self.column += new
        self.leave_even(first)
        if moving is not None:
            self.mask.index_copy_(1, columns, moving[:, None].expand(-1, new))
        real = self.mask.index_select(1, columns)                               # (B, new)
        position = (self.position[:, None] + real.cumsum(1) - 1).clamp(min=0)   # (B, new)
        self.position += real.sum(1)
        rope = [part[0, 0].index_select(0, position.flatten()).view(*position.shape, -1)[:, None] for part in self.rope]
        return rope, visibility(self.mask[:, :end], columns, end)

    def leave_even(self, used):
        """Where all rows were in step so far, their position is the number of columns."""
        if self.even:
            self.position.fill_(used)
        self.even = False

    def add(self, layer, k, v):
        """Write the newest keys and values (rows, G, T, D); return all of this layer so far."""
        if self.whole:
            k, v = k.to(self.k[layer].dtype), v.to(self.v[layer].dtype)         # autocast may give another
            return self.k[layer].index_copy_(2, self.columns, k), self.v[layer].index_copy_(2, self.columns, v)
        first, end = self.now
        self.k[layer][:, :, first:end], self.v[layer][:, :, first:end] = k, v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def recorded(self, step):
        """step(x), which calls the decoder with this cache, as CUDA graphs (Recorded)."""
        self.leave_even(self.used)
        self.whole = True
        self.column.fill_(self.used)
        return Recorded(step, (self.column, self.position))


# ---------------------------------------------------------------------------------------------------------------------
# Steps on a GPU
# ---------------------------------------------------------------------------------------------------------------------
def attend_columns(q, k, v, visible):
    """New tokens q (B, H, T, D) look at all columns of a cache k, v (B, G, U, D), visible (B, 1, T, U) -> (B, H, T, D).
    Heads that share a key become rows of one head, as not every kernel supports groups."""
    group = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (k.shape[1], group)).flatten(2, 3)                    # (B, G, H / G T, D)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible.repeat(1, 1, group, 1))
    return out.unflatten(2, (group, -1)).flatten(1, 2)                          # (B, H, T, D)


def no_planning(device_type):
    """Avoid cuDNN's attention on CUDA: it makes a plan for each new length, which in decoding means for each token."""
    if device_type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Recorded:
    """step(x), recorded as a CUDA graph for each shape of x and then replayed: one launch instead of a thousand. The
    step must keep its position in the tensors of `state`. If recording fails, steps are run as usual."""

    def __init__(self, step, state):
        self.step, self.state, self.graphs = step, state, {}

    def __call__(self, x):
        if x.shape not in self.graphs:
            self.graphs[x.shape] = self.record(x.clone())
        graph, given, out = self.graphs[x.shape]
        if graph is None:
            return self.step(x)
        given.copy_(x)
        graph.replay()
        return out

    def record(self, x):
        """(graph, its input, its output); the graph is None if recording fails. The state is left as it was."""
        before = [part.clone() for part in self.state]
        graph = out = None
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):                # a failed recording leaves its own
                self.step(x)                        # lets libraries allocate memory outside the recording
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = self.step(x)
        except (RuntimeError, AssertionError) as error:         # AssertionError: a torch without CUDA
            graph = None
            print(f"the decoding step cannot be recorded ({first_line(error)}): plain steps", file=sys.stderr)
        for part, value in zip(self.state, before, strict=True):
            part.copy_(value)
        return graph, x, out


# ---------------------------------------------------------------------------------------------------------------------
# Prompts in, tokens out
# ---------------------------------------------------------------------------------------------------------------------
def resume(script, value=None):
    """Send a value to a coroutine -> what it yields next, None at its end."""
    try:
        return script.send(value)
    except StopIteration:
        return None


def guide(given, free, guidance):
    """Classifier-free guidance of the logits of a prompt, away from those without it (or of a negative one)."""
    # s = u + g (c - u)
    return free + guidance * (given - free)


def left_padding(ids, mask):
    """The mask of prompts (B, T), checked: generation continues at the last position, so padding must be in front."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not bool(mask[:, -1].all()):
        raise InputError("prompts for generation must be padded on the left: the last token of every row is continued")
    return mask


def finite(x):
    """Refuse what a model puts out if it is not all numbers: every word drawn from it would be the same, and wrong."""
    if not bool(torch.isfinite(x).all()):
        raise InputError("the model puts out NaN or infinity: try --dtype float32; if that does the same, its weights "
                         "are broken: take an earlier checkpoint, or the original files again")


def sample(logits, temperature, top_k, top_p, generator=None):
    """Draw one id per row of logits (B, V) -> (B,). temperature 0: the largest; top_k 0 and top_p 1: from all."""
    if temperature < 1e-5:                          # to divide by it would give infinity
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probability = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probability.sort(-1, descending=True)
        # Keep the fewest ids whose sum reaches top_p; the likeliest one always stays.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probability = torch.zeros_like(probability).scatter(-1, order, ordered)
    # Of exponential variables with rates p_i, the smallest is number i with probability p_i. torch.multinomial does the
    # same, but waits for the GPU to check its input.
    return (probability / torch.empty_like(probability).exponential_(1.0, generator=generator)).argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, words, or both in turn
# ---------------------------------------------------------------------------------------------------------------------
CLOSING = {"emu3": ("eof", "eoi"), "janus": ("eoi",)}           # what ends a picture, behind its last code or row end
GROWTH = 256                                    # columns that a cache grows by
ASK_EVERY = 4                                   # on a GPU: tokens between checks whether all answers have ended
REPLAYED = ("cuda",)                            # devices on which a step is recorded once, then replayed ...
REPLAY_FROM = 64                                # ... if an answer or a picture may have this many steps


class Decoding:
    """What Emu3 and Janus-Pro generate: a picture from a prompt, an answer in words, or both in turn. Part of
    model.Unified, which has the modules, and says how tokens and pictures enter and leave."""

    @torch.inference_mode()
    def generate_images(self, ids, mask=None, size=None, negative=None, guidance=None, temperature=1.0, top_k=None,
                        generator=None):
        """Draw: prompts ids (B, T) that end with the token before the first code -> codes, as encode_images gives.

        mask (B, T) bool: padding on the left. size (h, w) of the code grid. guidance 1 is without; Emu3 then needs no
        `negative` (1 or B, T') prompt. temperature 0 takes the likeliest code, top_k 0 keeps all.
        """
        h, w = size or self.config.grid
        guidance = self.config.guidance if guidance is None else guidance
        top_k = self.config.top_k if top_k is None else top_k
        mask = left_padding(ids, mask)
        guided = guidance != 1
        rows, mask = self.guided_rows(ids, mask, negative) if guided else (ids, mask)
        self.room(mask, h * (w + 1))
        step = self.steps(mask, h * (w + 1), "gen")
        x = self.embed_text(rows)
        codes = []
        for i in range(h * w):
            logits = self.code_logits(step(x)).float()                          # (rows, K)
            if i in (0, h * w - 1):                 # what is broken once stays so; each look makes a GPU wait
                finite(logits)
            if guided:                              # rows alternate: conditional, unconditional
                logits = guide(logits[0::2], logits[1::2], guidance)            # (B, K)
            code = sample(logits, temperature, top_k, 1.0, generator)           # (B,)
            codes.append(code)
            x = self.embed_code(code.repeat_interleave(2) if guided else code, row_end=(i + 1) % w == 0)
        return self.as_codes(torch.stack(codes, 1).view(-1, h, w))

    @torch.inference_mode()
    def generate_text(self, ids, pixels=None, mask=None, max_new_tokens=512, temperature=0.0, top_p=1.0,
                      generator=None, watch=None):
        """Answer: ids (B, T) as in `logits`, padding on the left -> new ids (B, up to max_new_tokens).

        temperature 0 is greedy. A row ends with EOS, then pad; stops when all rows have ended, or the longest fills the
        context. watch is called with the tokens (B,) of each step, as they come.
        """
        mask = left_padding(ids, mask)
        max_new_tokens = min(max_new_tokens, self.room(mask, 1))
        step = self.steps(mask, max_new_tokens, "und")
        x = self.embed_text(ids, pixels)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        new = []
        ask = ASK_EVERY if ids.device.type in REPLAYED else 1
        while len(new) < max_new_tokens and (len(new) % ask or not done.all()):
            logits = self.lm_head(step(x)).float()                              # (B, V)
            if not new:
                finite(logits)
            token = sample(logits, temperature, 0, top_p, generator)            # (B,)
            token = token.masked_fill(done, self.ids["pad"])
            new.append(token)
            if watch:
                watch(token)
            done |= token == self.ids["eos"]
            x = self.lm.embed_tokens(token[:, None])                            # (B, 1, C)
        if not new:
            return ids[:, :0]
        finite(logits)
        tokens = torch.stack(new, 1)
        going = (tokens == self.ids["eos"]).cumsum(1) == 0                      # (B, T): rows that have not ended
        return tokens[:, :int(going.any(0).sum()) + 1]

    def room(self, mask, least):
        """How many tokens the context has room for behind the longest of prompts with mask (rows, T) bool; refused if
        fewer than `least`."""
        given, most = int(mask.sum(1).max()), self.config.context
        if given + least > most:
            raise InputError(f"{given} tokens and {least} to come, but the model takes {most}: shorten the text, show "
                             "fewer pictures, or begin anew (/new in a conversation)")
        return most - given

    def steps(self, mask, new, task, moving=None):
        """A function of embeddings (rows, T, C), first those of prompts with mask (rows, T) bool, then of `new` tokens,
        or more -> the last hidden state (rows, C), of a fork and task "mixed" of each branch. moving (rows,) bool:
        where it is false when the function is called, a row stands still. After the prompts CUDA replays the function:
        a step is 1,000 small kernels."""
        cache = Cache(self.lm, mask, new)
        used, replayed = 0, None

        def step(x):
            moves = moving if cache.used else None              # a prompt has a mask of its own
            return self.lm(x, cache=cache, moving=moves, task=task)[0][..., -1, :]              # (rows, C)

        def run(x):
            nonlocal used, replayed
            if used + x.shape[1] > cache.mask.shape[1]:         # text and pictures in turn: who knows how many
                cache.grow(used, max(GROWTH, x.shape[1]))
                replayed = None
            if replayed is None and used and new >= REPLAY_FROM and x.device.type in REPLAYED:
                replayed = cache.recorded(step)
            used += x.shape[1]
            with no_planning(x.device.type):
                return (replayed or step)(x)
        return run

    def script(self, parts, size, opening, words, pictures, room, watch):
        """One answer of `generate`, written down as it would be read: yields "word" or "code", which is then drawn from
        the model and sent back, or a token that is forced, or a picture to look at; its parts are added to a list."""
        h, w = size
        emu3 = self.config.kind == "emu3"
        closing = [self.ids[role] for role in CLOSING[self.config.kind]]
        look = 0 if emu3 or self.config.see == "codes" else self.config.picture_tokens + 2
        block = len(opening) + h * (w + emu3) + len(closing) + look             # tokens behind begin-of-image
        while words and room:
            token = yield "word"
            words, room = words - 1, room - 1
            if token == self.ids["eos"] or (token == self.ids["boi"] and not pictures):
                return
            if token != self.ids["boi"]:
                if not parts or not isinstance(parts[-1], list):
                    parts.append([])
                parts[-1].append(token)
                watch(token)
                continue
            if room < block:
                raise InputError(f"a picture of {block} tokens is to be drawn, but the context has room for {room}: "
                                 "shorten the text, show fewer pictures, or begin anew (/new in a conversation)")
            yield from opening
            codes = []
            for i in range(h * w):
                codes.append((yield "code"))
                if emu3 and (i + 1) % w == 0:
                    yield self.ids["eol"]
            yield from closing
            parts.append(self.as_codes(torch.tensor(codes).view(1, h, w))[0])
            watch(parts[-1])
            if look:
                yield parts[-1]
            pictures, room = pictures - 1, room - block

    @torch.inference_mode()
    def generate(self, ids, pixels=None, mask=None, codes=None, drawn=None, opening=(), size=None, guidance=1.0,
                 max_new_tokens=512, max_pictures=4, temperature=0.0, top_p=1.0, code_temperature=1.0, top_k=None,
                 generator=None, watch=None):
        """Go on with conversations in text and pictures, each until EOS or a limit -> for each row its parts in order:
        lists of token ids, and pictures as encode_images gives them, on the CPU.

        ids (B, T), pixels, codes, drawn as in `embed_text`, mask (B, T) bool: padding on the left. opening: tokens
        between begin-of-image and the first code of a picture, size (h, w): its code grid. guidance other than 1: rows
        are in turn a conversation, and the same without its words (Template.conversation), which is no answer of its
        own. temperature and top_p draw the words, code_temperature and top_k the codes; 0 takes the likeliest.
        watch(row, part) is called with each token of text and each picture as they come.

        All rows take a step together, and one that has nothing to do leaves its column empty (Cache), so that each
        gives what it gives alone.
        """
        mask = left_padding(ids, mask)
        guided = 2 if guidance != 1 else 1
        top_k = self.config.top_k if top_k is None else top_k
        size = size or self.config.grid
        new = min(max_new_tokens, self.room(mask, 1))
        rows = len(ids) // guided
        answers = [[] for _ in range(rows)]
        scripts = [self.script(parts, size, opening, max_new_tokens, max_pictures,
                               self.config.context - int(mask[row * guided].sum()),
                               functools.partial(watch, row) if watch else lambda part: None)
                   for row, parts in enumerate(answers)]
        moving = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        step = self.steps(mask, new, "mixed", moving if len(ids) > 1 else None)
        x = self.embed_text(ids, pixels, codes, drawn)                          # (rows, T, C)
        wanted = [resume(script) for script in scripts]                         # what comes next in each row
        last = torch.zeros((), device=ids.device)
        while any(want is not None for want in wanted):
            last = torch.where(moving[:, None], step(x), last)                  # (rows, C); of a fork two of them
            looking = [row for row, want in enumerate(wanted) if isinstance(want, torch.Tensor)]
            if looking:                             # these go first, while others wait
                x = self.look_again([wanted[row] for row in looking]).repeat_interleave(guided, 0)
                moves = torch.tensor([row in looking for row in range(rows)]).repeat_interleave(guided)
                x = x.new_zeros(len(ids), *x.shape[1:]).index_put((moves.nonzero()[:, 0].to(x.device),), x)
                for row in looking:
                    wanted[row] = resume(scripts[row])
            else:
                drawing, writing = last if last.ndim == 3 else (last, last)
                found = self.words_of(writing[::guided], wanted, temperature, top_p, generator)
                found |= self.codes_of(drawing, wanted, guidance, code_temperature, top_k, generator)
                x, moves, wanted = self.next_column(wanted, found, scripts, guided)
            moving.copy_(moves)
        return answers

    def next_column(self, wanted, found, scripts, guided):
        """What each row adds as its next token: embeddings (rows, 1, C), which rows go on (rows,), what comes then."""
        tokens, codes, moves, coming = [], [], [], []
        pad = self.ids["pad"]
        for row, want in enumerate(wanted):
            value = found.get(row, want)            # a word, a code, or a forced token
            coming.append(want if want is None else resume(scripts[row], found.get(row)))
            goes = coming[-1] is not None           # the end itself is not read any more
            code = value if want == "code" else -1
            token = pad if want == "code" or not goes else value
            tokens.append(token)
            codes.append(code)
            moves.append(goes)
            if guided == 2:
                # Without its words: Janus-Pro, which blanks prompts with pads, has pads for them, Emu3 nothing.
                silent = want == "word" and token != self.ids["boi"]
                tokens.append(pad if silent else token)
                codes.append(code)
                moves.append(goes and not (silent and self.config.kind == "emu3"))
        device = self.lm.embed_tokens.weight.device
        tokens, codes = (torch.tensor(x, device=device) for x in (tokens, codes))               # (rows,)
        x = self.lm.embed_tokens(tokens[:, None])                               # (rows, 1, C)
        if any(want == "code" for want in wanted):
            x = torch.where((codes >= 0)[:, None, None], self.embed_code(codes.clamp(min=0), row_end=False), x)
        return x, torch.tensor(moves), coming

    def words_of(self, x, wanted, temperature, top_p, generator):
        """Words of the rows that ask for one, from their hidden states x (B, C): {row: token}."""
        rows = [row for row, want in enumerate(wanted) if want == "word"]
        if not rows:
            return {}
        logits = self.lm_head(x[rows]).float()                                  # (n, V)
        finite(logits)
        return dict(zip(rows, sample(logits, temperature, 0, top_p, generator).tolist(), strict=True))

    def codes_of(self, x, wanted, guidance, temperature, top_k, generator):
        """Picture codes of the rows that ask for one: {row: code}. With guidance, x has two hidden states a row."""
        rows = [row for row, want in enumerate(wanted) if want == "code"]
        if not rows:
            return {}
        x = x.unflatten(0, (len(wanted), -1))[rows]                             # (n, 1 or 2, C)
        logits = self.code_logits(x[:, 0]).float()                              # (n, K)
        if x.shape[1] == 2:
            logits = guide(logits, self.code_logits(x[:, 1]).float(), guidance)
        finite(logits)
        return dict(zip(rows, sample(logits, temperature, top_k, 1.0, generator).tolist(), strict=True))
