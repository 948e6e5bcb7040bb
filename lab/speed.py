"""Speed and memory, against what people would otherwise run: rivals do the same work in turn, in one run.

    python -m lab.speed generate              # answers and drawings, against transformers
    python -m lab.speed train                 # training steps, against no AIA, the released recipe, transformers
    python -m lab.speed processes             # two processes against one, and waiting for data
    python -m lab.speed data                  # a million records
"""

import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import aia
import data
import formats.weights
import model
import train
from formats.datasets import FileSource, shuffled
from lab.dry_run import made_batch
from parts.loss import next_token_loss
from parts.settings import machine, opt, parse, run_command, tell, write_json
from parts.text import special_ids, token_ids
from parts.world import Thing, World, draw_scenes

# B samples, H heads, T tokens, V vocabulary. GB are 1e9 bytes.
PROMPT = 12                                         # tokens of each prompt
WIDE = {"layers": 6, "width": 512, "ffn": 1376, "heads": 8, "kv_heads": 8, "head_dim": 64}


def interleaved(works, repeats):
    """{name: function}, run in turn -> {name: median seconds}."""
    seconds = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def fresh(script, threads):
    """The numbers that a script prints last in a new Python process, which has imported torch and lab.speed."""
    root = str(Path(__file__).parent.parent)
    setup = f"import sys; sys.path.insert(0, {root!r}); import torch, lab.speed; torch.set_num_threads({threads}); "
    # Blocks of a megabyte go back to the system when freed; otherwise holes in the heap add 5 % by chance.
    done = subprocess.run([sys.executable, "-c", setup + script], capture_output=True, text=True,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})
    if done.returncode:
        raise RuntimeError(f"a measurement failed: {done.stderr.strip().splitlines()[-1]}")
    return [float(word) for word in done.stdout.splitlines()[-1].split()]            # libraries may print before


def resident(field):
    """VmRSS (now) or VmHWM (peak so far) of this process, in 1e9 bytes. (Not getrusage: its peak of a new process is at
    least that of the process that started it.)"""
    return next(int(line.split()[1]) * 1024 / 1e9 for line in open("/proc/self/status") if line.startswith(field))


# ---------------------------------------------------------------------------------------------------------------------
# Answers and drawings
# ---------------------------------------------------------------------------------------------------------------------
class Rivals:
    """The same greedy work with the weights of a folder, by our model and by transformers': {"text", "image"},
    functions of a batch size that return new ids."""

    def __init__(self, folder, tokens):
        self.folder, self.tokens = folder, tokens
        values = formats.weights.read_config(Path(folder), {})[1]
        file = Path(folder) / "tokenizer.json"
        self.emu3 = values["kind"] == "emu3"
        self.codebook = values["codebook"]
        self.side = values["image_size"] // 2 ** (len(values["vq_mult"]) - 1)
        self.codes = self.side ** 2
        self.ids = special_ids(token_ids(file), values["kind"], file)

    def prompts(self, batch, seed):
        """Random words (batch, PROMPT)."""
        return torch.randint(5, 400, (batch, PROMPT), generator=torch.Generator().manual_seed(seed))

    def drawing_prompts(self, batch):
        """Random words with what both sides expect around a prompt of Janus-Pro: BOS first, begin-of-image last."""
        rows = self.prompts(batch, 1)
        rows[:, 0], rows[:, -1] = self.ids["bos"], self.ids["boi"]
        return rows

    def ours(self):
        m = formats.weights.load(self.folder)
        m.ids["eos"] = -1                            # never drawn: both sides write all tokens they are asked for

        def text(batch):
            return m.generate_text(self.prompts(batch, 0), max_new_tokens=self.tokens)

        def image(batch):
            codes = m.generate_images(self.drawing_prompts(batch), negative=self.prompts(1, 2) if self.emu3 else None,
                                      guidance=5.0, temperature=0)
            return m.block(codes).flatten(1) if self.emu3 else codes
        return {"text": text, "image": image}

    def theirs(self):
        import transformers
        transformers.utils.logging.disable_progress_bar()
        m = transformers.AutoModelForImageTextToText.from_pretrained(self.folder).eval()
        m.generation_config.max_length = None
        common = {"do_sample": False, "eos_token_id": None, "pad_token_id": self.ids["pad"]}
        first = self.ids.get("visual", 0)
        visual = list(range(first, first + self.codebook))
        row = self.side + 1                          # codes and the end of a row
        if not self.emu3:
            m.model.vision_model.config.num_image_tokens = self.codes           # how many codes it draws

        def text(batch):
            rows = self.prompts(batch, 0)
            mode = {} if self.emu3 else {"generation_mode": "text"}
            return m.generate(input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=self.tokens,
                              **common, **mode)[:, PROMPT:]

        def image(batch):
            rows = self.drawing_prompts(batch)
            if not self.emu3:
                return m.generate(inputs=rows, attention_mask=torch.ones_like(rows), generation_mode="image",
                                  guidance_scale=5, **common)
            away = self.prompts(1, 2).expand(batch, -1)

            def allowed(_, seen):
                return visual if (len(seen) - PROMPT + 1) % row else [self.ids["eol"]]
            return m.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=self.side * row,
                guidance_scale=5.0, negative_prompt_ids=away, negative_prompt_attention_mask=torch.ones_like(away),
                prefix_allowed_tokens_fn=allowed, **common)[:, PROMPT:]
        return {"text": text, "image": image}


def bench_generate(settings):
    """Speed and memory of both sides, for text and guided pictures -> worst ratios of the tiny presets, all rows."""
    models = {name: model.PRESETS[name] for name in ("tiny-emu3", "tiny-janus")}
    models |= {f"{name} 6 x 512": replace(config, **WIDE, init_std=0.02) for name, config in models.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in models.items():
            torch.manual_seed(0)
            m = model.from_config(config)
            m.tokenizer_file = data.train_tokenizer(Path(folder) / "tokenizer.json", config).file
            formats.weights.save(m, Path(folder) / name)
            common = {"model": name, "bar": name in model.PRESETS}
            rows += [common | row for row in compared(Rivals(Path(folder) / name, settings.tokens), settings)]
    for row in rows:
        unit = "GB" if row["what"] == "memory" else "tokens/s"
        note = "" if row.get("same_tokens", True) else "   (other tokens)"
        print(f"{row['model']:18s} {row['what']:6s} batch {row['batch']}   ours {row['ours']:8.5g}   transformers "
              f"{row['theirs']:8.5g} {unit:8s}   ratio {row['ratio']:.2f}{note}")

    def worst(what, choose, batch):
        return choose(row["ratio"] for row in rows if (row["what"], row["batch"], row["bar"]) == (what, batch, True))
    result = {"text_speed": [worst("text", min, 1), worst("text", min, 8)],
              "image_speed": [worst("image", min, 1), worst("image", min, 8)], "memory": worst("memory", max, 8)}
    return result, rows


def compared(rivals, settings):
    """Rows of one model: tokens per second for batch 1 and 8, then peak memory in GB of a fresh process."""
    ours, theirs = rivals.ours(), rivals.theirs()
    for what in ("text", "image"):
        for batch in (1, 8):
            works = {"ours": functools.partial(ours[what], batch), "theirs": functools.partial(theirs[what], batch)}
            same = torch.equal(works["ours"](), works["theirs"]())
            seconds = interleaved(works, settings.repeats)
            n = batch * (settings.tokens if what == "text" else rivals.codes)
            yield {"what": what, "batch": batch, "ours": n / seconds["ours"], "theirs": n / seconds["theirs"],
                   "ratio": seconds["theirs"] / seconds["ours"], "same_tokens": same}
    memory = {}
    for side in ("ours", "theirs"):
        script = f"work = lab.speed.Rivals({str(rivals.folder)!r}, {rivals.tokens}).{side}(); "
        memory[side], = fresh(f"{script}work['text'](8); work['image'](8); print(lab.speed.resident('VmHWM'))",
                              settings.threads)
    yield {"what": "memory", "batch": 8, **memory, "ratio": memory["ours"] / memory["theirs"]}


# ---------------------------------------------------------------------------------------------------------------------
# Training steps
# ---------------------------------------------------------------------------------------------------------------------
# Six layers of width 512, one sample, all tokens labelled; a third of it is the prompt, the rest the picture.
TRAINED = {**WIDE, "vocab": 8000, "init_std": 0.02, "embed_std": 0.02, "context": 10_000}
STEP_VARIANTS = {"plain": "next-token prediction", "aia": "NTP + AIA, fused",
                 "checkpointed": "NTP + AIA, recomputing layers", "explicit": "NTP + AIA, explicit attention",
                 "released": "the released recipe", "mixed": "next-token prediction, text and picture in turn",
                 "mixed-aia": "NTP + AIA of both tasks"}
# {tokens: variants that are timed several times, in turn}. One step in a fresh process gives the memory of every
# variant, and the time of the others. At 8,192 tokens the two with maps do not fit: they are extrapolated.
INTERLEAVED = {512: ("plain", "aia", "explicit", "released"),
               1576: ("plain", "aia", "mixed", "mixed-aia", "explicit", "released"),
               3000: ("plain", "aia", "released"), 8192: ()}
WITH_MAPS = ("explicit", "released")
COSTS = ("seconds", "peak_gb", "above_weights_gb")


class Step:
    """One training step of train.py on one sample of `length` tokens, in one of STEP_VARIANTS."""

    def __init__(self, variant, length, config=None):
        torch.manual_seed(0)
        attention = "explicit" if variant == "explicit" else "fused"
        config = replace(config or replace(model.TINY_EMU3, **TRAINED), attention=attention,
                         checkpoint_activations=variant == "checkpointed")
        self.variant = variant
        self.m = model.from_config(config).train()
        self.optimizer = train.make_optimizer(self.m, train.LARGE[0])
        self.targets = {task: aia.targets(config.layers, task) for task in aia.TASKS}
        task = "mixed" if variant.startswith("mixed") else "gen"
        self.batch = made_batch(config, task, 1, length, length // 3)
        self(made_batch(config, task, 1, 16, 5))     # makes the moments, warms up

    def __call__(self, batch=None):
        batch = batch or self.batch
        if self.variant == "released":
            released_loss(self.m, batch, *self.targets["gen"], weight=5.0).backward()
        else:
            lambdas = None if self.variant in ("plain", "mixed") else {"gen": 5.0, "und": 5.0}
            train.accumulate(self.m, [batch], self.targets, lambdas)
        with train.updating(self.m, self.optimizer, 1.0):
            pass

    def measure(self):
        """COSTS of one step: seconds, GB at the peak, and how much of that is above weights and moments."""
        before = resident("VmRSS")
        start = time.perf_counter()
        self()
        return time.perf_counter() - start, resident("VmHWM"), resident("VmHWM") - before


def released_loss(m, batch, target, delta, weight):
    """The authors' recipe, written anew: eager attention that returns the map of every layer, a loop over layers and
    samples that cuts out queries and keys, a Huber loss for each, and logits of all tokens."""
    maps = []

    def keep_map(q, k, v, visible, condition, rectangle):
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~causal, -torch.inf)
        maps.append(scores.softmax(-1))                                         # (B, H, T, T)
        return maps[-1] @ v, None
    for layer in m.lm.layers:
        layer.self_attn.attend = keep_map
    logits = m.lm_head(m.lm(m.embed(batch))[0])                                 # (B, T, V)
    ntp = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    total = 0.0
    for layer, attention in enumerate(maps):
        for b in range(len(batch.tokens)):
            rows, keys = batch.queries[b].nonzero()[:, 0], batch.condition[b].nonzero()[:, 0]
            share = attention[b][:, rows][:, :, keys].float().sum(-1).mean()
            total = total + torch.nn.functional.huber_loss(share, target[layer], delta=delta[layer].item())
    return ntp + weight * total / (len(maps) * len(batch.tokens))


def bench_train(settings):
    """Training steps in STEP_VARIANTS, against transformers and matrix products; the loss head; padding."""
    rows = step_costs(settings)
    cost = {(row["variant"], row["tokens"]): row for row in rows}
    exponent = {name: memory_exponent(rows, name) for name in STEP_VARIANTS}
    print("memory above weights grows with tokens to the power of "
          + ", ".join(f"{power:.2f} ({STEP_VARIANTS[name]})" for name, power in exponent.items()))
    rival = against_transformers(settings)
    head = bench_head(settings)
    padding = padding_shares()
    plain, tuned, released = (cost[name, 3000] for name in ("plain", "aia", "released"))
    result = {"aia_time_1576": cost["aia", 1576]["seconds"] / cost["plain", 1576]["seconds"],
              "mixed_aia_time_1576": cost["mixed-aia", 1576]["seconds"] / cost["mixed", 1576]["seconds"],
              "aia_time_3000": tuned["seconds"] / plain["seconds"],
              "aia_memory_3000": tuned["peak_gb"] / plain["peak_gb"],
              "released_time_3000": released["seconds"] / tuned["seconds"],
              "released_memory_3000": released["above_weights_gb"] / tuned["above_weights_gb"],
              "memory_exponent": exponent["aia"], "transformers_train": rival["ours"] / rival["transformers"],
              "matmul_share": rival["step_flops"] / rival["matmul_flops"],
              "head_gib": head["chunked"]["gb"] * 1e9 / 2**30}
    return result, [*rows, {"exponent": exponent}, rival, head, padding]


def step_costs(settings):
    """A row for each variant and length: COSTS, and how they were found."""
    rows = []
    for length, names in INTERLEAVED.items():
        seconds = interleaved({name: Step(name, length) for name in names}, settings.repeats)
        for name in STEP_VARIANTS:
            if not names and name in WITH_MAPS:
                how = "extrapolated"
                cost = extrapolated([row for row in rows if row["variant"] == name], length)
            else:
                how = "median" if name in seconds else "once"
                once = fresh(f"print(*lab.speed.Step({name!r}, {length}).measure())", settings.threads)
                cost = dict(zip(COSTS, once, strict=True))
                cost["seconds"] = seconds.get(name, cost["seconds"])
            rows.append({"variant": name, "tokens": length, **cost, "how": how})
            print(f"{length:5d} tokens   {STEP_VARIANTS[name]:32s} {cost['seconds']:7.2f} s   peak "
                  f"{cost['peak_gb']:6.2f} GB   above weights {cost['above_weights_gb']:6.2f} GB   ({how})", flush=True)
    return rows


def extrapolated(rows, length):
    """COSTS at a length, from a quadratic in tokens through three shorter ones."""
    tokens = [row["tokens"] for row in rows]
    return {key: float(np.polyval(np.polyfit(tokens, [row[key] for row in rows], 2), length)) for key in COSTS}


def memory_exponent(rows, name):
    """Growth of memory: slope of log bytes over log tokens, by least squares over what was measured."""
    points = [(row["tokens"], row["above_weights_gb"]) for row in rows
              if row["variant"] == name and row["how"] != "extrapolated"]
    return float(np.polyfit(*np.log(points).T, 1)[0])


def against_transformers(settings):
    """Tokens/s of our plain step and of transformers' on 1,576 tokens, and FLOP/s of ours and of matrix products."""
    import transformers
    ours = Step("plain", 1576)
    config = ours.m.config
    theirs = llama_step(transformers, config, ours.batch.tokens)
    theirs()
    a, b = torch.randn(2, 1024, 1024)
    works = {"ours": ours, "theirs": theirs, "product": lambda: [a @ b for _ in range(40)]}
    seconds = interleaved(works, 2 * settings.repeats - 1)                      # more repeats: the two are close
    found = {"ours": 1576 / seconds["ours"], "transformers": 1576 / seconds["theirs"],
             "matmul_flops": 40 * 2 * 1024**3 / seconds["product"],
             "step_flops": step_flops(config, 1576) / seconds["ours"]}
    print(f"1576 tokens   ours {found['ours']:.0f} tokens/s, transformers {found['transformers']:.0f}; matrix products "
          f"{found['matmul_flops'] / 1e9:.0f} GFLOP/s, the step {found['step_flops'] / 1e9:.0f}")
    return found


def llama_step(transformers, c, tokens):
    """The same step of a LlamaForCausalLM of the same sizes, as people would write it."""
    config = transformers.LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, tie_word_embeddings=False,
        attn_implementation="sdpa", max_position_embeddings=c.context, use_cache=False)
    m = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(m.parameters(), lr=2e-5, fused=True)          # as transformers' Trainer sets it

    def step():
        m(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def step_flops(c, length):
    """Model FLOPs of a training step on one sample: per token 6 for each weight of a matrix (2 forward, 4 backward),
    and 12 for each attended pair and channel, half of which causal attention skips."""
    inner, shared = c.heads * c.head_dim, c.kv_heads * c.head_dim
    weights = c.layers * (2 * c.width * inner + 2 * c.width * shared + 3 * c.width * c.ffn) + c.width * c.vocab
    return 6 * weights * length + 12 * c.layers * inner * length**2 / 2


def bench_head(settings):
    """GB and seconds of the next-token loss, forward and backward, at Emu3's vocabulary: with all logits for 2,048
    tokens, and ours for 8,192."""
    head = {}
    for name, tokens in (("plain", 2048), ("chunked", 8192)):
        gb, seconds = fresh(f"print(*lab.speed.head_cost({tokens}, {name == 'chunked'}))", settings.threads)
        head[name] = {"tokens": tokens, "gb": gb, "seconds": seconds}
        times = 8192 // tokens
        scaled = f"   (scaled to 8192: {gb * times:.1f} GB, {seconds * times:.1f} s)" if times > 1 else ""
        print(f"loss head, 184,622 words, width 256, {name:7s} {tokens} tokens: {gb:.2f} GB, {seconds:.1f} s{scaled}")
    return head


def head_cost(tokens, chunked):
    """Peak GB of the next-token loss at Emu3's vocabulary, above its inputs and their gradients, and its seconds."""
    head = torch.nn.Linear(256, model.EMU3_8B.vocab, bias=False)
    x = torch.randn(tokens, 256, requires_grad=True)
    target = torch.randint(model.EMU3_8B.vocab, (tokens,))
    before = resident("VmRSS") + (head.weight.nbytes + x.nbytes) / 1e9          # room for the gradients
    start = time.perf_counter()
    if chunked:
        next_token_loss(x, head, target).backward()
    else:
        torch.nn.functional.cross_entropy(head(x), target, reduction="sum").backward()
    return resident("VmHWM") - before, time.perf_counter() - start


def padding_shares(micro_batch=8, samples=64):
    """Share of padding in conversations of the world, in order of arrival and as train.py sorts them in a step."""
    with tempfile.TemporaryDirectory() as folder:
        text = data.train_tokenizer(Path(folder) / "tokenizer.json", model.TINY_EMU3)
        preparer = data.Preparer(model.build("tiny-emu3"), text)
    plan = data.Schedule(data.WorldSource(World(0), 1000, 0), preparer, 0, samples, (0, 1), micro_batch)
    used = {"arrival": 0, "by length": 0}
    room = dict(used)
    for step in range(10):
        first = range(step * samples, (step + 1) * samples, micro_batch)
        for name, groups in (("arrival", [range(i, i + micro_batch) for i in first]),
                             ("by length", [positions for _, positions in plan.groups(step)])):
            for positions in groups:
                lengths = preparer.batch([plan.record("und", position)[0] for position in positions]).lengths
                used[name] += sum(lengths)
                room[name] += len(lengths) * max(lengths)
    padding = {name: 1 - used[name] / room[name] for name in used}
    print(f"padding in micro-batches of {micro_batch} conversations of the world: {padding['arrival']:.3f} in order of "
          f"arrival, {padding['by length']:.3f} by length within steps of {samples}")
    return {"padding": padding}


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, waiting for data, large data sets
# ---------------------------------------------------------------------------------------------------------------------
def bench_processes(settings):
    """Tokens per second of one process and of two, communication as a share of a step, and waiting for data."""
    rows = []
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for world, parallel in ((1, "one"), (2, "ddp"), (2, "fsdp")):
            torch.multiprocessing.spawn(timed_process, (world, parallel, settings.repeats, folder), nprocs=world)
            row = json.loads((Path(folder) / f"{parallel}-{world}.json").read_text())
            rows.append({"processes": world, "parallel": parallel, **row})
            result[parallel] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
            print(f"processes: {world}, {parallel:5s} {row['tokens_per_second']:6.0f} tokens/s, "
                  f"{result[parallel]:.2f} of one; {row['communication']:.2f} of a step is communication")
        for what, share in waiting(Path(folder)).items():
            rows.append({"data": what, "waiting": share})
            result[f"waiting_{what}"] = share
            print(f"waiting for data, {what}: {share:.4f} of a step (median of 100)")
    return result, rows


def timed_process(rank, world, parallel, repeats, folder):
    """One of `world` processes with a thread each: seconds of steps on 4 x 512 tokens, together as --parallel divides
    them, and apart with a model of its own, where only two sums of a few numbers are sent."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet-{parallel}", rank=rank, world_size=world)
    works = {"together": step_of_process(world, parallel), "apart": step_of_process(world, "")}
    seconds = interleaved(works, repeats)
    if rank == 0:
        write_json({"tokens_per_second": 4 * 512 / seconds["together"],
                    "communication": 1 - seconds["apart"] / seconds["together"]}, f"{folder}/{parallel}-{world}.json")


def step_of_process(world, parallel):
    """A function that takes this process's part of a step on 4 x 512 tokens."""
    step = Step("aia", 512)
    net = step.m
    if parallel == "ddp":
        net = train.replicated(step.m)
    elif parallel == "fsdp":
        train.freeze(step.m, train.LARGE[0])
        train.shard_model(step.m, train.TrainConfig(parallel="fsdp"), ("vq",), "cpu")
    optimizer = train.make_optimizer(step.m, train.LARGE[0])

    def work():
        train.accumulate(net, [step.batch] * (4 // world), step.targets, {"gen": 5.0})
        with train.updating(step.m, optimizer, 1.0):
            pass
    work()                                          # warms up
    return work


def waiting(folder):
    """Share of a step of tiny-emu3 in which it waits for its batches: from the world, and the same world in shards."""
    data.export(data.Export(str(folder / "world"), 400))
    with tarfile.open(folder / "world.tar", "w") as tar:
        for line in (folder / "world/train.jsonl").read_text().splitlines():
            record = json.loads(line)
            (folder / "record").write_text(line)
            tar.add(folder / "world" / record["image"], f"{record['id']}.png")
            tar.add(folder / "record", f"{record['id']}.json")
    m = model.build("tiny-emu3").train()
    text = data.train_tokenizer(folder / "tokenizer.json", m.config)
    sources = {"world": data.WorldSource(World(0), 8000, 0), "shards": FileSource(folder / "world.tar", "emu3")}
    targets = {task: aia.targets(m.config.layers, task) for task in aia.TASKS}
    shares = {}
    for name, source in sources.items():
        optimizer = train.make_optimizer(m, train.JOINT)
        steps = data.Schedule(source, data.Preparer(m, text), 0, 32, (1, 1), 64).steps(0, 101)
        found = []
        for _ in range(101):
            start = time.perf_counter()
            batches = next(steps)
            waited = time.perf_counter() - start
            train.accumulate(m, batches, targets, {"gen": 5.0, "und": 5.0})
            with train.updating(m, optimizer, 1.0):
                pass
            found.append(waited / (time.perf_counter() - start))
        shares[name] = float(np.median(found[1:]))   # nothing was prepared before the first
    return shares


def made_up_records(folder, lines, samples):
    """Write JSON lines over 100 small pictures, and shards of 1,000 samples with a caption each."""
    for i, picture in enumerate(draw_scenes([(Thing("circle", "red", 0),)] * 100)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    with open(folder / "lines.jsonl", "w") as out:
        for i in range(lines):
            asked, answered = f"picture {i}", "<image>" if i % 2 else str(i)
            said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
            out.write(json.dumps({"image": f"{i % 100}.png", "conversations": said}) + "\n")
    (folder / "shards").mkdir()
    for shard in range(samples // 1000):
        with tarfile.open(folder / f"shards/{shard:05d}.tar", "w") as tar:
            for i in range(1000):
                for ending, content in (("png", (folder / f"{i % 100}.png").read_bytes()), ("txt", b"a red circle")):
                    member = tarfile.TarInfo(f"{i:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def reading_cost(path, n=20_000):
    """Seconds to open an indexed data set, records/s in random order, and GB of memory before and after."""
    before = resident("VmRSS")
    start = time.perf_counter()
    source = FileSource(path, "janus")
    opened = time.perf_counter()
    count = source.count("gen")
    for i in range(n):
        source.record("gen", shuffled(i % count, count, (0, 0)))
    return opened - start, n / (time.perf_counter() - opened), before, resident("VmRSS")


def bench_data(settings):
    """Indexing and random reading of a million JSON lines, and of 20,000 samples in tar shards."""
    rows = []
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        made_up_records(Path(folder), 1_000_000, 20_000)
        for name, records in (("lines.jsonl", 1_000_000), ("shards", 20_000)):
            path = f"{folder}/{name}"
            start = time.perf_counter()
            data.index(data.Index((path,)))
            row = {"data": name, "records": records, "index_seconds": time.perf_counter() - start}
            opened, rate, before, after = fresh(f"print(*lab.speed.reading_cost({path!r}))", 1)
            rows.append(row | {"open_seconds": opened, "records_per_second": rate, "gb_before": before,
                               "gb_after": after})
            result |= {f"{name}_index_seconds": row["index_seconds"], f"{name}_records_per_second": rate}
            print(f"{name}: {records} records indexed in {row['index_seconds']:.0f} s, opened in {opened:.3f} s, "
                  f"{rate:.0f} records/s in random order, memory {before:.2f} -> {after:.2f} GB")
    return result, rows


BENCHES = {"generate": bench_generate, "train": bench_train, "processes": bench_processes, "data": bench_data}


@dataclass(frozen=True)
class Speed:
    """Measure speed and memory; rivals in one run, in turn."""

    POSITIONAL = ("table",)
    table: str = opt("generate", "generate: answers and drawings; train: steps and memory of training; processes: two "
                     "processes against one, and waiting for data; data: a million records", tuple(BENCHES))
    repeats: int = opt(5, "interleaved measurements of each side; the median counts")
    tokens: int = opt(64, "tokens of each answer (generate)")
    threads: int = opt(2, "threads of PyTorch")
    out: str = opt("", "JSON file to write; empty: assets/bench-TABLE.json")


def speed(settings):
    """Measure one table and write it -> its result."""
    import transformers
    torch.set_num_threads(settings.threads)
    transformers.utils.logging.set_verbosity_error()
    result, rows = BENCHES[settings.table](settings)
    write_json({"result": result, "rows": rows, "settings": vars(settings),
                "machine": machine() | {"transformers": transformers.__version__}},
               settings.out or f"assets/bench-{settings.table}.json")
    return result


def main(argv=None):
    tell(speed(parse(Speed, argv, "python -m lab.speed")))


if __name__ == "__main__":
    run_command(main)
