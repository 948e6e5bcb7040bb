"""Claims about generation, token by token: the cache, single steps, pictures, words, and both in turn
(parts/decoding.py)."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from made import NAMES, SMALL, both_models, close, fresh, ids_of, off, padded, small, tiny, words

import data
import model
from parts import decoding
from parts.decoding import Recorded, attend_columns
from parts.pictures import to_picture, to_tensor
from parts.settings import InputError

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
GRID = (2, 3)                                   # sides of the code grid that the drawing tests use


@pytest.fixture(scope="module", params=NAMES)
def m(request, device):
    return tiny(request.param, device, **SMALL).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [(9, 9), (6, 9)], ids=["equal", "padded"])
def test_cached_steps_equal_the_full_pass(m, lengths):
    """Steps of 4, 1, 2 (Emu3's code and row end), 1 and 1 tokens see the same keys at the same positions."""
    ids, mask = padded([words(n) for n in lengths], m)
    x, cache, parts = m.lm.embed_tokens(ids), decoding.Cache(m.lm, mask[:, :4], 5), []
    for n in (4, 1, 2, 1, 1):
        parts.append(m.lm(x[:, cache.used:cache.used + n], cache=cache)[0])
    close(torch.cat(parts, 1)[mask], m.lm(x, mask)[0][mask])


@pytest.mark.parametrize("whole", [False, True], ids=["sliced", "all columns"])
@pytest.mark.parametrize("pads", [2, 0], ids=["padded", "equal"])
def test_a_row_that_stands_still_goes_on_where_it_was(pads, whole):
    """Rows move in turn, one column a step; each gives what it gives alone, whatever the others do meanwhile."""
    m = small("tiny-emu3").eval()
    x, mask = torch.randn(3, 10, m.config.width), torch.ones(3, 4, dtype=torch.bool)
    mask[2, :pads] = False
    moves = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 1]]).bool()
    with torch.no_grad():
        alone = [m.lm(x[b:b + 1, 4 - int(mask[b].sum()):4 + int(moves[b].sum())])[0][0, -int(moves[b].sum()):]
                 for b in range(3)]
        cache, taken, found = decoding.Cache(m.lm, mask, 6), [4] * 3, [[], [], []]
        m.lm(x[:, :4], cache=cache)
        if whole:
            cache.recorded(None)
        for moving in moves.T:
            now = torch.stack([x[b, min(taken[b], 9)] for b in range(3)])[:, None]
            out = m.lm(now, cache=cache, moving=moving)[0]
            for b in range(3):
                if moving[b]:
                    found[b].append(out[b, 0])
                    taken[b] += 1
    for mine, right in zip(found, alone, strict=True):
        torch.testing.assert_close(torch.stack(mine), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True], ids=["sliced", "all columns"])
def test_a_cache_holds_what_autocast_gives_in_its_own_type(whole):
    """Keys in half precision may meet a cache in float32, whose columns are not all new: they are the same there."""
    m = small("tiny-emu3")
    cache = decoding.Cache(m.lm, torch.ones(2, 4, dtype=torch.bool), 2)
    if whole:
        cache.recorded(None)
    k, v = torch.randn(2, 2, 1, 4, m.config.head_dim).bfloat16()
    cache.enter(4)
    keys, values = (x[:, :, :4] for x in cache.add(1, k, v))
    assert torch.equal(keys, k.float()) and torch.equal(values, v.float())


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("new", [1, 2, 3])
def test_new_tokens_see_the_columns_that_they_may(new, groups, device):
    """Each of several by its own row of the mask, also where heads share keys and become rows of one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, tokens, 8, generator=g).to(device)
               for n, tokens in ((4, new), (groups, 9), (groups, 9)))
    visible = torch.rand(2, 1, new, 9, generator=g).to(device) < 0.5
    visible[..., 0] = True
    assert off(attend_columns(q, k, v, visible), model.attend_explicit(q, k, v, visible)[0]) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Steps on a GPU
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny-emu3", "tiny-janus"])
def test_a_step_over_all_columns_draws_and_says_the_same(name, monkeypatch, capsys):
    """What a GPU replays reads the whole cache under a mask; if recording fails, that is told, and steps are plain."""
    m = small(name).eval()
    ids, mask = torch.randint(5, 400, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    ids[:, 0], ids[:, -1] = m.ids["bos"], m.ids["boi"]
    mask[1, :4] = False                             # padding in front of one
    away = torch.randint(5, 400, (1, 9)) if name == "tiny-emu3" else None

    def work():
        g = torch.Generator().manual_seed(0)
        return (m.generate_images(ids, mask, negative=away, guidance=2.0, top_k=0, generator=g),
                m.generate_text(ids, mask=mask, max_new_tokens=20))
    before = work()
    assert not capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: (_ for _ in ()).throw(RuntimeError("no graphs here")))
    monkeypatch.setattr(decoding, "REPLAYED", ("cpu",))
    monkeypatch.setattr(decoding, "REPLAY_FROM", 1)
    monkeypatch.setattr(decoding, "ASK_EVERY", 7)
    after = work()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "cannot be recorded" in capsys.readouterr().err


class Graph:
    """Stands in for a CUDA graph: what runs while it is recorded is the step, and replaying runs it into its output."""

    def replay(self):
        recorded, (given, out) = self.step, self.ends
        out.copy_(recorded(given))


def stand_in(monkeypatch):
    """From now on steps are recorded without a GPU -> the shapes of the steps that are."""
    record, graphs = Recorded.record, []

    def recorded(self, x):
        before = [part.clone() for part in self.state]

        @contextlib.contextmanager
        def recording(graph):                       # on a GPU nothing runs meanwhile: the same columns once more
            for part, value in zip(self.state, before, strict=True):
                part.copy_(value)
            yield
        monkeypatch.setattr(torch.cuda, "graph", recording)
        graph, given, out = record(self, x)
        graph.step, graph.ends = self.step, (given, out)
        graphs.append(tuple(x.shape))
        return graph, given, out
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    for attribute, value in {"Stream": stream, "current_stream": stream, "CUDAGraph": Graph,
                             "stream": lambda aside: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, attribute, value)
    monkeypatch.setattr(Recorded, "record", recorded)
    return graphs


@pytest.mark.parametrize("name", ["tiny-emu3", "tiny-janus"])
def test_a_replayed_step_draws_and_says_the_same(name, monkeypatch, capsys):
    """All of the bookkeeping around a recording, with a stand-in for what only CUDA has: places are put back after the
    run that warms up and the one that is recorded, and each shape of a step has a graph of its own."""
    m = small(name).eval()
    ids = torch.randint(5, 400, (2, 12), generator=torch.Generator().manual_seed(5))
    away = torch.randint(5, 400, (1, 9)) if name == "tiny-emu3" else None

    def work():
        g = torch.Generator().manual_seed(0)
        return (m.generate_images(ids, negative=away, guidance=2.0, top_k=0, generator=g),
                m.generate_text(ids, max_new_tokens=20))
    before, graphs = work(), stand_in(monkeypatch)
    monkeypatch.setattr(decoding, "REPLAYED", ("cpu",))
    monkeypatch.setattr(decoding, "REPLAY_FROM", 1)
    assert all(torch.equal(a, b) for a, b in zip(work(), before, strict=True)) and not capsys.readouterr().err
    steps = [(4, 1, 96), (4, 2, 96)] if name == "tiny-emu3" else [(4, 1, 96)]
    assert sorted(graphs[:len(steps)]) == steps and graphs[len(steps):] == [(2, 1, 96)]


# ---------------------------------------------------------------------------------------------------------------------
# From logits to tokens
# ---------------------------------------------------------------------------------------------------------------------
def test_sampling_keeps_what_it_is_told_to(device):
    """Of probabilities 0.1, 0.5, 0.05, 0.35: temperature 0 takes the second, top-k 2 and top-p 0.6 two of them."""
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35]).log().to(device).expand(4000, -1)

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        drawn = decoding.sample(logits, temperature, top_k, top_p, torch.Generator(device).manual_seed(0))
        return torch.bincount(drawn, minlength=4) / len(drawn)

    two = torch.tensor([0, 0.5, 0, 0.35], device=device) / 0.85
    cold = torch.tensor([0.1, 0.5, 0.05, 0.35], device=device) ** 2
    for got, expected in [(shares(), logits[0].exp()), (shares(top_k=2), two), (shares(top_p=0.6), two),
                          (shares(0.5), cold / cold.sum()), (shares(top_p=0.45), torch.eye(4, device=device)[1]),
                          (shares(0), torch.eye(4, device=device)[1])]:
        assert torch.equal(got > 0, expected > 0)
        torch.testing.assert_close(got, expected, rtol=0, atol=0.03)


def test_codes_are_drawn_as_by_torch_multinomial():
    """The same numbers from the same generator, without its look at the input."""
    logits = torch.randn(60, 50, generator=torch.Generator().manual_seed(1)) * 3
    got = decoding.sample(logits, 0.8, 20, 0.9, torch.Generator().manual_seed(7))
    probability = (logits / 0.8).masked_fill(logits < logits.topk(20).values[:, -1:], -torch.inf).softmax(-1)
    ordered, order = probability.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= 0.9, 0.0)
    probability = torch.zeros_like(probability).scatter(-1, order, ordered)
    assert torch.equal(got, torch.multinomial(probability, 1, generator=torch.Generator().manual_seed(7))[:, 0])


@both_models
def test_a_model_in_half_precision_draws_by_float32_and_codes_pictures_in_it(name, monkeypatch, device):
    """Guidance and chance add no rounding to that of the logits; the picture tokenizer has none: it changes codes."""
    m, met, sample = tiny(name, device), [], decoding.sample
    side, g = m.config.image_size, torch.Generator().manual_seed(0)
    pixels = (torch.rand(16, 3, side, side, generator=g) * 2 - 1).to(device)
    codes = m.encode_images(pixels)
    again = m.decode_images(codes)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(m.encode_images(pixels), codes) and torch.equal(m.decode_images(codes), again)
    for part in {*m.children()} - {m.vq}:
        part.bfloat16()
    monkeypatch.setattr(decoding, "sample", lambda logits, *rest: met.append(logits.dtype) or sample(logits, *rest))
    ids = torch.tensor([[5, 6, 7, 8]], device=device)
    m.generate_images(ids, negative=ids if name == "tiny-emu3" else None, guidance=3.0)
    m.generate_text(ids, max_new_tokens=2)
    assert len(met) > 16 and {*met} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------
def test_greedy_text_equals_full_passes_and_stops_at_eos(m, device):
    """A batch of questions about pictures, padded on the left, against one question at a time without a cache."""
    picture = [m.ids["placeholder"]] * (16 if m.config.kind == "emu3" else 4)
    pixels, expected = torch.randn(2, 3, 16, 16).to(device), []
    rows = [words(3) + picture + words(2), words(6) + picture + words(4)]
    for b, row in enumerate(rows):
        new = []
        for _ in range(8):
            new.append(m.logits(ids_of([row + new], m), pixels[b:b + 1])[0, -1].argmax().item())
        expected.append(new)
    ids, mask = padded(rows, m)
    assert m.generate_text(ids, pixels, mask, max_new_tokens=8).tolist() == expected
    # The same weights with the last token of one answer as EOS: both answers end where it first comes up.
    stopping = tiny(f"tiny-{m.config.kind}", device, **SMALL, ids=m.ids | {"eos": expected[0][2]})
    ends = [new[:new.index(expected[0][2]) + 1] if expected[0][2] in new else new for new in expected]
    assert len(ends[0]) != len(ends[1])
    longest = max(map(len, ends))
    assert stopping.generate_text(ids, pixels, mask, max_new_tokens=8).tolist() == [
        new + [m.ids["pad"]] * (longest - len(new)) for new in ends]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def next_code_logits(m, prompt, codes):
    """Logits (K,) of the code after a prompt and the codes so far, by a pass over the whole sequence."""
    if m.config.kind == "janus":
        drawn = m.gen_aligner(m.gen_embed(ids_of([codes], m).long()))
        x = torch.cat([m.lm.embed_tokens(ids_of([prompt], m)), drawn], 1)
        return m.gen_head(m.lm(x)[0][0, -1])
    tokens = []
    for i, code in enumerate(codes):
        tokens += [m.ids["visual"] + code, m.ids["eol"]][:2 if (i + 1) % GRID[1] == 0 else 1]
    return m.logits(ids_of([prompt + tokens], m))[0, -1, m.ids["visual"]:][:m.config.codebook]


def draw_slowly(m, prompt, guidance, negative):
    """Greedy codes of one prompt. s = u + g (c - u), u from the negative prompt (Emu3) or from pads (Janus-Pro)."""
    free = negative or [prompt[0], *[m.ids["pad"]] * (len(prompt) - 2), prompt[-1]]
    codes = []
    for _ in range(GRID[0] * GRID[1]):
        c, u = next_code_logits(m, prompt, codes), next_code_logits(m, free, codes)
        codes.append((u + guidance * (c - u)).argmax().item())
    return codes


@pytest.mark.parametrize("lengths", [(5, 5), (4, 7)], ids=["equal", "padded"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_drawing_equals_full_passes(m, guidance, lengths):
    """A batch with a cache, guidance and forced row ends draws what each prompt alone draws without them."""
    rows, negative = [words(n) for n in lengths], words(6) if m.config.kind == "emu3" else None
    expected = [draw_slowly(m, row, guidance, negative) for row in rows]
    ids, mask = padded(rows, m)
    negative = negative and ids_of([negative], m)
    for how in ({"temperature": 0}, {"top_k": 1}):                              # of one code to choose from, any draw
        codes = m.generate_images(ids, mask, GRID, negative, guidance, **how)   # takes the likeliest
        assert codes.flatten(1).tolist() == expected
    assert len(set(sum(expected, []))) > 3      # a model that repeats one code would prove little


def test_drawing_takes_guidance_and_top_k_of_the_model(m, monkeypatch):
    """What nobody states is what the preset says: the same logits at each step, of which as many may be drawn."""
    negative = ids_of([words(6)], m) if m.config.kind == "emu3" else None
    ids, seen = ids_of([words(5)], m), []
    monkeypatch.setattr(decoding, "sample", lambda logits, *how: seen.append((logits, how[:3])) or logits.argmax(-1))
    for how in ({}, {"guidance": 1.2, "top_k": 2, "temperature": 1.0}):
        m.generate_images(ids, None, GRID, negative, **how)
    assert {how for _, how in seen} == {(1.0, 2, 1.0)}
    assert torch.equal(*(torch.cat([logits for logits, _ in half]) for half in (seen[:6], seen[6:])))


def test_teacher_forced_logits_are_those_of_each_step(m, device):
    """One pass over prompt and codes gives what drawing them one by one gives; Emu3's row ends are skipped."""
    rows, codes = [words(5), words(5)], torch.randint(m.config.codebook, (2, *GRID))
    got = m.image_logits(ids_of(rows, m), m.as_codes(codes).to(device))
    for row, flat, logits in zip(rows, codes.flatten(1).tolist(), got, strict=True):
        close(logits, torch.stack([next_code_logits(m, row, flat[:i]) for i in range(6)]))


# ---------------------------------------------------------------------------------------------------------------------
# Text and pictures in turn
# ---------------------------------------------------------------------------------------------------------------------
MIXED = {"emu3": ("tiny-mixed", {}), "emu3 fork": ("tiny-mixed-fork", {"fork_layer": 1}),
         "janus": ("tiny-mixed-janus", {}), "janus fork": ("tiny-mixed-janus", {"fork_layer": 1}),
         "codes": ("tiny-mixed-codes", {}), "codes fork": ("tiny-mixed-codes", {"fork_layer": 1})}
each_mixed = pytest.mark.parametrize("how", MIXED)
# Conversations: a picture in the question, none, one drawn before, two shown and one drawn. Pictures are numbered.
TALKS = [[(["make", 0, "red"], None)], [(["draw a cross"], None)],
         [(["draw"], ["here", 0, "it is"]), (["what?"], None)], [([0, "and", 1], ["yes", 2]), (["again"], None)]]


def talker(how, **changes):
    """A model with random weights that opens pictures often; they have 2 x 2 codes."""
    name, fork = MIXED[how]
    m = fresh(name, layers=2, vq_mult=(1, 1, 1, 1), embed_std=0.5, **fork, **changes).requires_grad_(False)
    m.lm_head.weight[m.ids["boi"]] *= 3
    for p in m.lm.gen_layers.parameters() if fork else ():
        p += 0.1 * torch.randn(p.shape)             # at first a branch is a copy of the other
    return m


def template_of(m):
    """The template of a model for texts whose tokens are their bytes."""
    return data.TEMPLATES[m.config.kind](m.config, SimpleNamespace(ids=m.ids, encode=lambda said: list(said.encode())))


def pictures_of(turns, m):
    """Of the pictures of a conversation: codes of all, and for Janus-Pro pixels of those it looks at, codes of those
    that it has drawn."""
    numbers = [[part for said in (asked, answer or []) for part in said if isinstance(part, int)]
               for asked, answer in turns]
    drawn = [part for _, answer in turns for part in answer or [] if isinstance(part, int)]
    n, g, side = len(sum(numbers, [])), torch.Generator().manual_seed(len(turns)), m.config.image_size
    codes, pixels = torch.randint(m.config.codebook, (n, 2, 2), generator=g), torch.rand(n, 3, side, side, generator=g)
    looks = [i for i in range(n) if m.config.see == "both" or i not in drawn]
    return m.as_codes(codes), pixels[looks] * 2 - 1, m.as_codes(codes)[drawn]


def asked_of(m, talks, guidance=1.0):
    """What m.generate takes to go on with conversations; with guidance each is followed by itself without words."""
    rows, marks, fields = [], [], []
    for turns in talks:
        codes, *own = pictures_of(turns, m)
        for dropped in (False, True)[:2 if guidance != 1 else 1]:
            pieces = template_of(m).conversation(turns, codes, (), dropped)
            rows.append([i for ids, _ in pieces for i in ids])
            marks.append([role == data.DRAWN for ids, role in pieces for _ in ids])
            fields.append(own)
    ids, mask = padded(rows, m)
    drawn = torch.tensor([[False] * (ids.shape[1] - len(row)) + row for row in marks])
    given = {"ids": ids, "mask": mask, "guidance": guidance, "size": (2, 2), "opening": template_of(m).opening(2, 2)}
    if m.config.kind == "janus":
        pixels, codes = (torch.cat(parts) for parts in zip(*fields, strict=True))
        given |= {"pixels": pixels if len(pixels) else None, "codes": codes if len(codes) else None, "drawn": drawn}
    return given


GREEDY = {"temperature": 0.0, "code_temperature": 0.0, "max_new_tokens": 16, "max_pictures": 3}


def plain(parts):
    """The parts of an answer with codes as tuples."""
    return [tuple(part.flatten().tolist()) if torch.is_tensor(part) else part for part in parts]


def said_by(m, talks, guidance=1.0, **changes):
    """Answers of m.generate: lists of tokens, and pictures."""
    return [plain(parts) for parts in m.generate(**asked_of(m, talks, guidance), **GREEDY | changes)]


def in_turn(parts):
    """Words and pictures of an answer, one by one."""
    return [one for part in parts for one in (part if isinstance(part, list) else [part])]


def sequence_of(m, turns, dropped=False):
    """A conversation, token by token: ids, and for Janus-Pro ("code", code) and features (C,) of what it sees."""
    codes, pixels, drawn = pictures_of(turns, m)
    pieces = template_of(m).conversation(turns, codes, (), dropped)
    if m.config.kind == "emu3":
        return [i for ids, _ in pieces for i in ids]
    seen = iter(m.see(pixels).flatten(0, 1) if len(pixels) else ())
    codes = iter(drawn.flatten().tolist())
    return [next(seen) if role == data.IMAGE else ("code", next(codes)) if role == data.DRAWN else i
            for ids, role in pieces for i in ids]


def last_state(m, sequence, task):
    """The last hidden state (C,) of a pass over a whole sequence, through the branch of a task."""
    x = [token if torch.is_tensor(token) else m.gen_aligner(m.gen_embed.weight[token[1]]) if isinstance(token, tuple)
         else m.lm.embed_tokens.weight[token] for token in sequence]
    return m.lm(torch.stack(x)[None], task=task)[0][0, -1]


def go_on_slowly(m, turns, guidance, words=16, pictures=3):
    """An answer, likeliest tokens, by a pass over the whole sequence for each of them. Beside the conversation goes
    one without words: s = u + g (c - u)."""
    emu3, ids, parts = m.config.kind == "emu3", m.ids, []
    given, free = sequence_of(m, turns), sequence_of(m, turns, dropped=True)
    for _ in range(words):
        word = int(m.lm_head(last_state(m, given, "und")).argmax())
        if word == ids["eos"] or (word == ids["boi"] and pictures == 0):
            break
        given.append(word)
        if word != ids["boi"]:
            free += [] if emu3 else [ids["pad"]]
            parts += [] if parts and isinstance(parts[-1], list) else [[]]
            parts[-1].append(word)
            continue
        free.append(word)
        opening, codes = list(b"2*2") + [ids["img"]] if emu3 else [], []
        given, free = given + opening, free + opening
        for i in range(4):
            logits = m.code_logits(last_state(m, given, "gen"))
            if guidance != 1:
                away = m.code_logits(last_state(m, free, "gen"))
                logits = away + guidance * (logits - away)
            codes.append(int(logits.argmax()))
            read = [ids["visual"] + codes[-1]] if emu3 else [("code", codes[-1])]
            read += [ids["eol"]] if emu3 and i % 2 else []
            given, free = given + read, free + read
        parts.append(tuple(codes))
        pictures -= 1
        end = [ids["eof"], ids["eoi"]] if emu3 else [ids["eoi"]]
        if not emu3 and m.config.see == "both":
            pixels = m.vq.decode(torch.tensor(codes).view(1, 2, 2))
            pixels = ((pixels + 1) / 2 * 255).clamp(0, 255).floor() / 255 * 2 - 1           # as a file keeps it
            end += [ids["boi"], *m.see(pixels)[0], ids["eoi"]]
        given, free = given + end, free + end
    return parts


@each_mixed
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_text_and_pictures_in_turn_equal_full_passes(how, guidance):
    """Each token by the head of its kind, frames of pictures forced, the second look of Janus-Pro at whole colours, a
    fork's codes from its branch of generation. Guidance leads away from the same conversation without its words: Emu3
    has nothing in their place, Janus-Pro pads."""
    m = talker(how)
    expected = [go_on_slowly(m, turns, guidance) for turns in TALKS]
    assert said_by(m, TALKS, guidance) == expected
    assert {type(part) for parts in expected for part in parts} == {list, tuple}
    assert guidance == 1 or expected != [go_on_slowly(m, turns, 1.0) for turns in TALKS]


@each_mixed
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_row_of_a_batch_goes_on_as_it_would_alone(how, guidance, monkeypatch):
    """One writes while another draws or looks: whoever has nothing to do stands still. The cache grows meanwhile."""
    m = talker(how)
    monkeypatch.setattr(decoding, "GROWTH", 3)
    together = said_by(m, TALKS, guidance)
    assert together == [said_by(m, [turns], guidance)[0] for turns in TALKS]
    kinds = [[isinstance(one, tuple) for one in in_turn(parts)] for parts in together]
    assert len({*map(tuple, kinds)}) > 1


@each_mixed
def test_an_answer_ends_at_eos_or_a_limit(how):
    """Begin-of-image is a word too. The picture that would be one too many ends an answer, and so does any if there
    may be none."""
    m = talker(how)
    whole = [in_turn(parts) for parts in said_by(m, TALKS[:2])]
    for limit in (0, 1, 4):
        assert [in_turn(parts) for parts in said_by(m, TALKS[:2], max_new_tokens=limit)] == [
            row[:limit] for row in whole]
    for limit in (0, 1):
        places = [[i for i, one in enumerate(row) if isinstance(one, tuple)][limit:] for row in whole]
        assert (limit or any(places)) and [in_turn(parts) for parts in said_by(m, TALKS[:2], max_pictures=limit)] == [
            row[:own[0]] if own else row for row, own in zip(whole, places, strict=True)]
    eos = [one for row in whole for one in row if isinstance(one, int)][-1]
    ended = said_by(talker(how, ids=m.ids | {"eos": eos}), TALKS[:2])
    assert [in_turn(parts) for parts in ended] == [row[:row.index(eos)] if eos in row else row for row in whole]


@each_mixed
def test_a_picture_that_does_not_fit_is_refused_before_its_first_code(how, monkeypatch):
    """Its frame and the second look count. One that just fits is drawn, and is the last that the context has room
    for."""
    m, drawn = talker(how), []
    logits = m.code_logits
    monkeypatch.setattr(m, "code_logits", lambda x: drawn.append(len(x)) or logits(x))
    whole, turns = next((in_turn(parts), turns) for parts, turns in zip(said_by(m, TALKS), TALKS, strict=True)
                        if any(isinstance(one, tuple) for one in in_turn(parts)))
    before = [isinstance(one, tuple) for one in whole].index(True)
    block = {"emu3": 4 + 2 * 3 + 2, "janus": 4 + 1 + 1 + 4 + 1, "codes": 4 + 1}[how.split()[0]]
    fits = len(sequence_of(m, turns)) + before + 1 + block
    drawn.clear()
    m.config = replace(m.config, context=fits)
    assert in_turn(said_by(m, [turns])[0]) == whole[:before + 1] and drawn == [1] * 4
    drawn.clear()
    m.config = replace(m.config, context=fits - 1)
    with pytest.raises(InputError, match=f"a picture of {block} tokens is to be drawn, but .* room for {block - 1}:"):
        said_by(m, [turns])
    assert not drawn


@each_mixed
def test_what_comes_is_told_in_order(how):
    """Each word and each finished picture of a row, while other rows go on."""
    m, told = talker(how), []
    answers = said_by(m, TALKS, watch=lambda row, part: told.append((row, *plain([part]))))
    for row, parts in enumerate(answers):
        assert [part for number, part in told if number == row] == in_turn(parts)
    rows = [row for row, _ in told]
    assert rows != sorted(rows)


@each_mixed
def test_an_answer_without_pictures_is_that_of_generate_text(how):
    """Where no picture is opened, both go on the same, up to EOS."""
    m = talker(how)
    m.lm_head.weight[m.ids["boi"]] = 0
    asked = asked_of(m, TALKS[:2])
    given = {"ids": asked["ids"], "mask": asked["mask"], "pixels": asked.get("pixels"), "max_new_tokens": 16}
    m.ids["eos"] = m.generate_text(**given)[0, 5].item()
    expected = [[token for token in row if token not in (m.ids["eos"], m.ids["pad"])]
                for row in m.generate_text(**given).tolist()]
    assert [in_turn(parts) for parts in said_by(m, TALKS[:2])] == expected and len(expected[0]) <= 5 < len(expected[1])


@pytest.mark.parametrize("replayed", [False, True], ids=["all columns", "replayed"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@each_mixed
def test_recorded_steps_go_on_the_same(how, guidance, replayed, monkeypatch):
    """Which rows move is read anew in each of them; a second look, of which all columns come at once, has a recording
    of its own. Where the cache grows, all are recorded anew."""
    m = talker(how)
    before = said_by(m, TALKS, guidance)
    graphs = stand_in(monkeypatch) if replayed else []
    monkeypatch.setattr(decoding, "REPLAYED", ("cpu",))
    monkeypatch.setattr(decoding, "REPLAY_FROM", 1)
    monkeypatch.setattr(decoding, "GROWTH", 9)
    assert said_by(m, TALKS, guidance) == before
    rows = len(TALKS) * (2 if guidance != 1 else 1)
    looks = {(rows, 6, 96)} if how in ("janus", "janus fork") else set()
    assert {*graphs} == ({(rows, 1, 96)} | looks if replayed else set())
    assert not replayed or graphs.count((rows, 1, 96)) > 1


def test_the_second_look_sees_what_a_user_is_shown(monkeypatch):
    """A picture that was drawn is kept in whole colours, and comes back so in the next question."""
    m, met = talker("janus"), []
    see, codes = m.see, torch.randint(64, (3, 4))
    monkeypatch.setattr(m, "see", lambda pixels: met.append(pixels) or see(pixels))
    x, exact = m.look_again([*codes]), m.decode_images(codes)
    (pixels,), colours = met, (exact + 1) / 2 * 255
    assert torch.equal(pixels, torch.stack([to_tensor(to_picture(one)) for one in exact]))
    assert (colours - colours.round()).abs().max() > 0.4
    ends = m.lm.embed_tokens.weight[[m.ids["boi"], m.ids["eoi"]]]
    assert torch.equal(x, torch.stack([torch.cat([ends[:1], one, ends[1:]]) for one in see(pixels)]))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", [1.0, None])
def test_generation_refuses_prompts_padded_on_the_right(m, guidance):
    """It would go on after a pad."""
    ids, mask = padded([words(3), words(5)], m, right=True)
    negative = ids_of([words(4)], m) if m.config.kind == "emu3" else None
    with pytest.raises(InputError, match="padded on the left"):
        m.generate_text(ids, None, mask)
    with pytest.raises(InputError, match="padded on the left"):
        m.generate_images(ids, mask, GRID, negative, guidance)


def test_guidance_needs_the_prompt_of_its_model(m):
    """Emu3 is guided away from a negative prompt, Janus-Pro from its own prompt blanked."""
    negative = ids_of([words(4)], m) if m.config.kind == "janus" else None
    with pytest.raises(InputError, match="negative prompt"):
        m.generate_images(ids_of([words(4)], m), size=GRID, negative=negative)


# ---------------------------------------------------------------------------------------------------------------------
# Parity with transformers: tiny random checkpoints of its Emu3 and Janus
# ---------------------------------------------------------------------------------------------------------------------
def test_janus_drawing_equals_transformers(janus, device):
    """Code embedding, decoder and code head step by step, and greedy codes with guidance 5."""
    (theirs, ours), ids = janus, torch.tensor([[100, 5, 6, 7, 110], [100, 9, 8, 7, 110]], device=device)
    codes = torch.randint(64, (2, 16)).to(device)
    drawn = theirs.prepare_embeddings_for_image_generation(codes[:, :-1])
    x = torch.cat([theirs.get_input_embeddings()(ids), drawn], 1)
    close(ours.image_logits(ids, codes),
          theirs.model.generation_head(theirs.model.language_model(inputs_embeds=x).last_hidden_state[:, 4:]))
    theirs.generation_config.generation_kwargs = {"boi_token_id": 110}
    try:
        expected = theirs.generate(inputs=ids, attention_mask=torch.ones_like(ids), generation_mode="image",
                                   guidance_scale=5, do_sample=False)
    except TypeError as error:
        pytest.skip(f"this version of transformers cannot draw: {error}")
    assert torch.equal(ours.generate_images(ids, guidance=5.0, temperature=0), expected)


def forced(monkeypatch, codes):
    """From now on drawing takes these codes (B, N) and keeps the logits (B, K) that it would have drawn from."""
    seen, steps = [], iter(codes.unbind(1))
    monkeypatch.setattr(decoding, "sample", lambda logits, *_: seen.append(logits) or next(steps))
    return seen


def test_guided_logits_of_janus_equal_transformers_at_each_step(janus, monkeypatch, device):
    """On a given list of codes, so that no step hides behind another; prompts in halves there, in turn here."""
    (theirs, ours), ids = janus, torch.tensor([[100, 5, 6, 7, 110], [100, 9, 8, 7, 110]], device=device)
    codes = torch.randint(64, (2, 16)).to(device)
    seen = forced(monkeypatch, codes)
    ours.generate_images(ids, guidance=5.0)
    blank = torch.where((ids == 100) | (ids == 110), ids, 102)
    drawn = theirs.prepare_embeddings_for_image_generation(codes[:, :-1])
    x = torch.cat([theirs.get_input_embeddings()(torch.cat([ids, blank])), drawn.repeat(2, 1, 1)], 1)
    hidden = theirs.model.language_model(inputs_embeds=x).last_hidden_state[:, 4:]
    given, free = theirs.model.generation_head(hidden).chunk(2)
    close(torch.stack(seen, 1), free + 5 * (given - free))


def emu3_constraint(ids, prompt, h, w):
    """What may come after a prompt of `prompt` tokens: codes, a row end after each row."""
    visual = [*range(ids["visual"], ids["visual"] + 64)]
    return lambda _, row: [ids["eol"]] if (len(row) - prompt + 1) % (w + 1) == 0 else visual


def test_drawing_of_emu3_equals_transformers(emu3, monkeypatch, device):
    """Greedy codes of its generate with guidance, a negative prompt and a prefix constraint; and on a given list of
    codes the guided logits of each step, up to what a softmax does not see."""
    (theirs, ours), (h, w) = emu3, GRID
    prompt, negative = ids_of([words(7), words(7)], ours), ids_of([words(5)], ours)
    expected = theirs.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=h * (w + 1), do_sample=False,
        eos_token_id=None, guidance_scale=3.0, negative_prompt_ids=negative.expand(2, -1),
        negative_prompt_attention_mask=torch.ones_like(negative.expand(2, -1)),
        prefix_allowed_tokens_fn=emu3_constraint(ours.ids, 7, h, w))[:, 7:]
    codes = ours.generate_images(prompt, None, GRID, negative, 3.0, temperature=0)
    assert torch.equal(ours.block(codes).flatten(1), expected)
    codes = torch.randint(64, (2, h, w)).to(device)
    seen = forced(monkeypatch, codes.flatten(1))
    ours.generate_images(prompt, None, GRID, negative, 3.0)
    tokens, got = ours.block(codes).flatten(1), iter(seen)
    for t in range(h * (w + 1)):
        if (t + 1) % (w + 1):
            rows = [torch.cat([start, tokens[:, :t]], 1) for start in (prompt, negative.expand(2, -1))]
            given, free = (theirs(input_ids=row).logits[:, -1].log_softmax(-1) for row in rows)
            close(next(got).log_softmax(-1), (free + 3 * (given - free))[:, 40:104].log_softmax(-1))
