"""Speed and memory, against what people would otherwise run.

    python -m lab.speed generate              # or train, processes, data
"""

import functools
import io
import json
import os
import subprocess
import sys
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
from formats.datasets import FileSource
from formats.weights import read_config
from parts.settings import machine, opt, parse, run_command, tell, write_json
from parts.text import special_ids, token_ids
from parts.world import Thing, World, draw_scenes


@dataclass(frozen=True)
class Speed:
    """Measure speed and memory; rivals in one run, in turn."""

    POSITIONAL = ("table",)
    table: str = opt("generate", "generate: answers and drawings; train: steps and memory of training; processes: one "
                     "and two of them, and waiting for data; data: a million records",
                     ("generate", "train", "processes", "data"))
    repeats: int = opt(5, "interleaved measurements of each side; the median counts")
    tokens: int = opt(64, "of each answer (generate)")
    threads: int = opt(2, "of PyTorch")
    out: str = opt("", "JSON file to write; empty: assets/bench-TABLE.json")


PROMPT = 12                                         # tokens of each prompt
WIDE = {"layers": 6, "width": 512, "ffn": 1376, "heads": 8, "kv_heads": 8, "head_dim": 64}


class Rivals:
    """The same greedy work done by our model of a folder and by transformers': functions of a batch size that return
    new ids, {"text", "image"}."""

    def __init__(self, folder, tokens):
        self.folder, self.tokens = folder, tokens
        values = read_config(Path(folder), {})[1]
        self.emu3, self.codebook = values["kind"] == "emu3", values["codebook"]
        self.side = values["image_size"] // 2 ** (len(values["vq_mult"]) - 1)
        file = Path(folder) / "tokenizer.json"
        self.codes, self.ids = self.side ** 2, special_ids(token_ids(file), values["kind"], file)

    def prompts(self, batch, seed):
        """Random words (batch, PROMPT)."""
        return torch.randint(5, 400, (batch, PROMPT), generator=torch.Generator().manual_seed(seed))

    def drawing_prompts(self, batch):
        """The same between what both sides expect around a prompt of Janus-Pro: BOS first, begin-of-image last."""
        rows = self.prompts(batch, 1)
        rows[:, 0], rows[:, -1] = self.ids["bos"], self.ids["boi"]
        return rows

    def ours(self):
        m = formats.weights.load(self.folder)
        m.ids["eos"] = -1                            # both sides write all tokens that are asked for

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
        row, first = self.side + 1, self.ids.get("visual", 0)
        visual = list(range(first, first + self.codebook))
        if not self.emu3:
            m.model.vision_model.config.num_image_tokens = self.codes           # how many codes it draws

        def text(batch):
            rows, kind = self.prompts(batch, 0), {} if self.emu3 else {"generation_mode": "text"}
            return m.generate(input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=self.tokens,
                              **common, **kind)[:, PROMPT:]

        def image(batch):
            rows, away = self.drawing_prompts(batch), self.prompts(1, 2).expand(batch, -1)
            if not self.emu3:
                return m.generate(inputs=rows, attention_mask=torch.ones_like(rows), generation_mode="image",
                                  guidance_scale=5, **common)

            def allowed(_, seen):
                return visual if (len(seen) - PROMPT + 1) % row else [self.ids["eol"]]
            return m.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=self.side * row,
                guidance_scale=5.0, negative_prompt_ids=away, negative_prompt_attention_mask=torch.ones_like(away),
                prefix_allowed_tokens_fn=allowed, **common)[:, PROMPT:]
        return {"text": text, "image": image}


def speed(settings):
    """Measure one table."""
    import transformers
    torch.set_num_threads(settings.threads)
    transformers.utils.logging.set_verbosity_error()
    tables = {"generate": bench_generate, "train": bench_train, "processes": bench_processes, "data": bench_data}
    result, rows = tables[settings.table](settings)
    write_json({"result": result, "rows": rows, "settings": vars(settings),
                "machine": machine() | {"transformers": transformers.__version__}},
               settings.out or f"assets/bench-{settings.table}.json")
    return result


def bench_generate(settings):
    """Tokens per second of both sides, for text and guided pictures, batch 1 and 8, and peak memory of fresh
    processes -> the worst ratios of the tiny presets, and all rows."""
    rows, models = [], {name: model.PRESETS[name] for name in ("tiny-emu3", "tiny-janus")}
    models |= {f"{name} 6 x 512": replace(config, **WIDE, init_std=0.02) for name, config in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in models.items():
            torch.manual_seed(0)
            m = model.from_config(config)
            m.tokenizer_file = data.train_tokenizer(Path(folder) / "tokenizer.json", config).file
            formats.weights.save(m, Path(folder) / name)
            rivals, row = Rivals(Path(folder) / name, settings.tokens), {"model": name, "bar": name in model.PRESETS}
            ours, theirs = rivals.ours(), rivals.theirs()
            for what, batch in [(what, batch) for what in ("text", "image") for batch in (1, 8)]:
                n = batch * (settings.tokens if what == "text" else rivals.codes)
                works = {"ours": functools.partial(ours[what], batch), "theirs": functools.partial(theirs[what], batch)}
                same = torch.equal(works["ours"](), works["theirs"]())
                seconds = interleaved(works, settings.repeats)
                rows.append(row | {"what": what, "batch": batch, "ours": n / seconds["ours"],
                                   "theirs": n / seconds["theirs"], "ratio": seconds["theirs"] / seconds["ours"],
                                   "same_tokens": same})
            memory = {side: fresh_memory(rivals, side, settings.threads) for side in ("ours", "theirs")}
            rows.append(row | {"what": "memory", "batch": 8, **memory, "ratio": memory["ours"] / memory["theirs"]})
    for row in rows:
        unit = "GB" if row["what"] == "memory" else "tokens/s"
        print(f"{row['model']:18s} {row['what']:6s} batch {row['batch']}   ours {row['ours']:8.5g}   transformers "
              f"{row['theirs']:8.5g} {unit:8s}   ratio {row['ratio']:.2f}"
              + ("" if row.get("same_tokens", True) else "   (other tokens)"))

    def worst(what, choose, batch):
        return choose(row["ratio"] for row in rows if (row["what"], row["batch"], row["bar"]) == (what, batch, True))
    result = {"text_speed": [worst("text", min, 1), worst("text", min, 8)],
              "image_speed": [worst("image", min, 1), worst("image", min, 8)], "memory": worst("memory", max, 8)}
    return result, rows


def interleaved(works, repeats):
    """{name: function}, run in turn -> {name: median seconds}."""
    seconds = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def fresh_memory(rivals, side, threads):
    """Largest resident memory in 1e9 bytes of a new process that loads the folder, answers and draws, batch 8."""
    return fresh(f"work = lab.speed.Rivals({str(rivals.folder)!r}, {rivals.tokens}).{side}(); work['text'](8); "
                 "work['image'](8); print(lab.speed.resident('VmHWM'))", threads)[0]


def fresh(script, threads):
    """Numbers that a script prints in a new Python process, where it finds `eval`."""
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); import torch, lab.speed; " \
        f"torch.set_num_threads({threads}); "
    # Blocks of a megabyte go back to the system when they are freed; else the heap's holes add 5 % by chance.
    done = subprocess.run([sys.executable, "-c", setup + script], capture_output=True, text=True,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})
    if done.returncode:
        raise RuntimeError(f"a measurement failed: {done.stderr.strip().splitlines()[-1]}")
    return [float(word) for word in done.stdout.splitlines()[-1].split()]            # libraries may print before


def resident(field):
    """VmRSS (now) or VmHWM (largest so far) of this process, in 1e9 bytes. (The peak that getrusage tells of a new
    process is at least that of the process which started it.)"""
    return next(int(line.split()[1]) * 1024 / 1e9 for line in open("/proc/self/status") if line.startswith(field))


# Training: six layers of width 512, one sample, all tokens labelled; a third of it is the prompt, the rest the picture.
TRAINED = {**WIDE, "vocab": 8000, "init_std": 0.02, "embed_std": 0.02, "context": 10_000}
STEP_VARIANTS = {"plain": "next-token prediction", "aia": "NTP + AIA, fused",
                 "checkpointed": "NTP + AIA, recomputing layers", "explicit": "NTP + AIA, explicit attention",
                 "released": "the released recipe"}
# Who is measured several times, in turn. One step in a fresh process gives everybody's memory, and the time of the
# others. At 8,192 tokens the two with maps are extrapolated: those do not fit.
INTERLEAVED = {512: ("plain", "aia", "explicit", "released"), 1576: ("plain", "aia", "explicit", "released"),
               3000: ("plain", "aia", "released"), 8192: ()}
WITH_MAPS = ("explicit", "released")


class Step:
    """One training step of train.py on one sample of `length` tokens, in one of five manners."""

    def __init__(self, variant, length, config=None):
        torch.manual_seed(0)
        attention = "explicit" if variant == "explicit" else "fused"
        config = replace(config or replace(model.TINY_EMU3, **TRAINED), attention=attention,
                         checkpoint_activations=variant == "checkpointed")
        self.variant, self.m = variant, model.from_config(config).train()
        self.optimizer = train.make_optimizer(self.m, train.LARGE[0])
        self.targets = {task: aia.targets(config.layers, task) for task in aia.TASKS}
        self.batch = self.sample(length)
        self(self.sample(16))                        # makes the moments, warms up

    def sample(self, length):
        tokens = torch.randint(self.m.config.vocab, (1, length), generator=torch.Generator().manual_seed(1))
        position = torch.arange(length)[None]
        return data.Batch("gen", tokens, tokens, position < length // 3, position >= length // 3, torch.ones(1).bool())

    def __call__(self, batch=None):
        batch = batch or self.batch
        if self.variant == "released":
            released_loss(self.m, batch, *self.targets["gen"], weight=5.0).backward()
        else:
            lambdas = None if self.variant == "plain" else {"gen": 5.0}
            train.accumulate(self.m, [batch], self.targets, lambdas)
        with train.updating(self.m, self.optimizer, 1.0):
            pass

    def measure(self):
        """Seconds of one step, GB at its peak, and above weights and moments, which a short step has made."""
        before, start = resident("VmRSS"), time.perf_counter()
        self()
        return time.perf_counter() - start, resident("VmHWM"), resident("VmHWM") - before


def released_loss(m, batch, target, delta, weight):
    """The authors' manner, written anew: eager attention that returns the map of every layer, a loop over layers and
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
    """Seconds and memory of the real training step against plain next-token prediction, against explicit attention and
    against the released recipe; against transformers; against the peak of matrix products; the loss head; padding."""
    rows = []
    for length, names in INTERLEAVED.items():
        seconds = interleaved({name: Step(name, length) for name in names}, settings.repeats)
        for name in STEP_VARIANTS:
            if names or name not in WITH_MAPS:
                once, peak, above = fresh(f"print(*lab.speed.Step({name!r}, {length}).measure())", settings.threads)
                values, how = (seconds.get(name, once), peak, above), "median" if name in seconds else "once"
            else:               # a quadratic in tokens through the three shorter lengths
                points = [[row[key] for row in rows if row["variant"] == name]
                          for key in ("tokens", "seconds", "peak_gb", "above_weights_gb")]
                values = [float(np.polyval(np.polyfit(points[0], y, 2), length)) for y in points[1:]]
                how = "extrapolated"
            row = dict(zip(("seconds", "peak_gb", "above_weights_gb"), values, strict=True))
            rows.append({"variant": name, "tokens": length, **row, "how": how})
            print(f"{length:5d} tokens   {STEP_VARIANTS[name]:32s} {values[0]:7.2f} s   peak {values[1]:6.2f} GB   "
                  f"above weights {values[2]:6.2f} GB" + f"   ({how})" * (how != "median"), flush=True)

    def get(variant, length, key):
        return next(row[key] for row in rows if (row["variant"], row["tokens"]) == (variant, length))
    # Growth of memory: slope of log bytes over log tokens, by least squares over what was measured.
    exponent = {name: float(np.polyfit(*np.log([(row["tokens"], row["above_weights_gb"]) for row in rows if
                                                row["variant"] == name and row["how"] != "extrapolated"]).T, 1)[0])
                for name in STEP_VARIANTS}
    print("memory above weights grows with tokens to the power of "
          + ", ".join(f"{power:.2f} ({STEP_VARIANTS[name]})" for name, power in exponent.items()))
    speed, head, padding = against_transformers(settings), bench_head(settings), padding_shares()
    rows += [{"exponent": exponent}, speed, head, padding]
    return {"aia_time_1576": get("aia", 1576, "seconds") / get("plain", 1576, "seconds"),
            "aia_time_3000": get("aia", 3000, "seconds") / get("plain", 3000, "seconds"),
            "aia_memory_3000": get("aia", 3000, "peak_gb") / get("plain", 3000, "peak_gb"),
            "released_time_3000": get("released", 3000, "seconds") / get("aia", 3000, "seconds"),
            "released_memory_3000": get("released", 3000, "above_weights_gb") / get("aia", 3000, "above_weights_gb"),
            "memory_exponent": exponent["aia"], "transformers_train": speed["ours"] / speed["transformers"],
            "matmul_share": speed["step_flops"] / speed["matmul_flops"],
            "head_gib": head["chunked"]["gb"] * 1e9 / 2**30}, rows


def against_transformers(settings):
    """Tokens/s of our plain step and of transformers' on 1,576 tokens, and FLOP/s of ours and of matrix products."""
    import transformers
    ours = Step("plain", 1576)
    config, theirs = ours.m.config, llama_step(transformers, ours.m.config, ours.batch.tokens)
    a, b = torch.randn(2, 1024, 1024)
    theirs()
    # The two are close: more repeats than elsewhere.
    seconds = interleaved({"ours": ours, "theirs": theirs, "product": lambda: [a @ b for _ in range(40)]},
                          2 * settings.repeats - 1)
    speed = {"ours": 1576 / seconds["ours"], "transformers": 1576 / seconds["theirs"],
             "matmul_flops": 40 * 2 * 1024**3 / seconds["product"],
             "step_flops": step_flops(config, 1576) / seconds["ours"]}
    print(f"1576 tokens   ours {speed['ours']:.0f} tokens/s, transformers {speed['transformers']:.0f}; matrix products "
          f"{speed['matmul_flops'] / 1e9:.0f} GFLOP/s, the step {speed['step_flops'] / 1e9:.0f}")
    return speed


def bench_head(settings):
    """GB and seconds of the next-token loss, forward and backward, at Emu3's vocabulary: with all logits for 2,048
    tokens, and ours for 8,192."""
    head = {}
    for name, tokens in (("plain", 2048), ("chunked", 8192)):
        gb, seconds = fresh(f"print(*eval.head_cost({tokens}, {name == 'chunked'}))", settings.threads)
        head[name] = {"tokens": tokens, "gb": gb, "seconds": seconds}
        times = 8192 // tokens
        scaled = f"   (scaled to 8192: {gb * times:.1f} GB, {seconds * times:.1f} s)" * (times > 1)
        print(f"loss head, 184,622 words of width 256, {name:7s} {tokens} tokens: {gb:.2f} GB above inputs and "
              f"gradients, {seconds:.1f} s{scaled}")
    return head


def padding_shares(micro_batch=8, samples=64):
    """Share of padding in conversations of the world, in order of arrival and as train.py sorts them in a step."""
    with tempfile.TemporaryDirectory() as folder:
        preparer = data.Preparer(model.build("tiny-emu3"), data.train_tokenizer(Path(folder) / "tokenizer.json",
                                                                                model.TINY_EMU3))
    plan = data.Schedule(data.WorldSource(World(0), 1000, 0), preparer, 0, samples, (0, 1), micro_batch)
    shares = {"arrival": [], "by length": []}
    for step in range(10):
        first = range(step * samples, (step + 1) * samples, micro_batch)
        for name, groups in (("arrival", [range(i, i + micro_batch) for i in first]),
                             ("by length", [positions for _, positions in plan.groups(step)])):
            for positions in groups:
                lengths = preparer.batch([plan.record("und", position)[0] for position in positions]).lengths
                shares[name].append((sum(lengths), len(lengths) * max(lengths)))
    padding = {name: 1 - sum(used for used, _ in pairs) / sum(room for _, room in pairs)
               for name, pairs in shares.items()}
    print(f"padding in micro-batches of {micro_batch} conversations of the world: {padding['arrival']:.3f} in order of "
          f"arrival, {padding['by length']:.3f} by length within steps of {samples}")
    return {"padding": padding}


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
    """Model FLOPs of a training step on one sample: for each token 6 for each weight of a matrix (2 forward, 4
    backward), and 12 for each attended pair and channel, of which causal attention has half."""
    inner, shared = c.heads * c.head_dim, c.kv_heads * c.head_dim
    weights = c.layers * (2 * c.width * inner + 2 * c.width * shared + 3 * c.width * c.ffn) + c.width * c.vocab
    return 6 * weights * length + 12 * c.layers * inner * length**2 / 2


def head_cost(tokens, chunked):
    """Peak GB of the next-token loss at Emu3's vocabulary, above its inputs and their gradients, and its seconds."""
    head = torch.nn.Linear(256, model.EMU3_8B.vocab, bias=False)
    x, target = torch.randn(tokens, 256, requires_grad=True), torch.randint(model.EMU3_8B.vocab, (tokens,))
    before = resident("VmRSS") + (head.weight.nbytes + x.nbytes) / 1e9          # the latter for the gradients
    start = time.perf_counter()
    if chunked:
        model.next_token_loss(x, head, target).backward()
    else:
        torch.nn.functional.cross_entropy(head(x), target, reduction="sum").backward()
    return resident("VmHWM") - before, time.perf_counter() - start


def timed_process(rank, world, parallel, repeats, folder):
    """One of `world` processes with a thread each: seconds of steps on 4 x 512 tokens, as --parallel takes them, and
    with a model of its own, so that nothing but two sums of a few numbers is sent."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet-{parallel}", rank=rank, world_size=world)

    def worker(parallel):
        step = Step("aia", 512)
        net, batches = step.m, [step.batch] * (4 // world)
        if parallel == "ddp":
            net = train.DistributedDataParallel(step.m, broadcast_buffers=False)
        elif parallel == "fsdp":
            train.freeze(step.m, train.LARGE[0])
            train.shard_model(step.m, train.TrainConfig(parallel="fsdp"), ("vq",), "cpu")
        optimizer = train.make_optimizer(step.m, train.LARGE[0])

        def work():
            train.accumulate(net, batches, step.targets, {"gen": 5.0})
            with train.updating(step.m, optimizer, 1.0):
                pass
        return work
    works = {"together": worker(parallel), "apart": worker("")}
    for work in works.values():
        work()
    seconds = interleaved(works, repeats)
    if rank == 0:
        write_json({"tokens_per_second": 4 * 512 / seconds["together"],
                    "communication": 1 - seconds["apart"] / seconds["together"]}, f"{folder}/{parallel}-{world}.json")


def bench_processes(settings):
    """Tokens per second of one process and of two, the share of a step that goes into working together, and that in
    which the loop waits for its data."""
    rows, result = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for world, parallel in ((1, "one"), (2, "ddp"), (2, "fsdp")):
            torch.multiprocessing.spawn(timed_process, (world, parallel, settings.repeats, folder), nprocs=world)
            row = json.loads((Path(folder) / f"{parallel}-{world}.json").read_text())
            rows.append({"processes": world, "parallel": parallel, **row})
            result[parallel] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
            print(f"{world} process{'es' * (world > 1):2s} {parallel:5s} {row['tokens_per_second']:6.0f} tokens/s, "
                  f"{result[parallel]:.2f} of one; {row['communication']:.2f} of a step is communication")
        for what, share in waiting(Path(folder)).items():
            rows.append({"data": what, "waiting": share})
            result[f"waiting_{what}"] = share
            print(f"waiting for data, {what}: {share:.4f} of a step (median of 100)")
    return result, rows


def waiting(folder):
    """Share of a step of tiny-emu3 in which it waits for its batches: from the world, and the same world in shards."""
    import tarfile

    data.export(data.Export(str(folder / "world"), 400))
    with tarfile.open(folder / "world.tar", "w") as tar:
        for line in (folder / "world/train.jsonl").read_text().splitlines():
            record = json.loads(line)
            (folder / "record").write_text(line)
            tar.add(folder / "world" / record["image"], f"{record['id']}.png")
            tar.add(folder / "record", f"{record['id']}.json")
    m, shares = model.build("tiny-emu3").train(), {}
    text = data.train_tokenizer(folder / "tokenizer.json", m.config)
    sources = {"world": data.WorldSource(World(0), 8000, 0),
               "shards": FileSource(folder / "world.tar", "emu3")}
    targets = {task: aia.targets(m.config.layers, task) for task in aia.TASKS}
    for name, source in sources.items():
        optimizer, found = train.make_optimizer(m, train.JOINT), []
        steps = data.Schedule(source, data.Preparer(m, text), 0, 32, (1, 1), 64).steps(0, 101)
        for _ in range(101):
            start = time.perf_counter()
            batches = next(steps)
            waited = time.perf_counter() - start
            train.accumulate(m, batches, targets, {"gen": 5.0, "und": 5.0})
            with train.updating(m, optimizer, 1.0):
                pass
            found.append(waited / (time.perf_counter() - start))
        shares[name] = float(np.median(found[1:]))          # nothing was prepared before the first
    return shares


def made_up_records(folder, lines, samples):
    """JSON lines over 100 small pictures, and shards of 1,000 samples with a caption each."""
    import tarfile
    pictures = draw_scenes([(Thing("circle", "red", 0),)] * 100)
    for i, picture in enumerate(pictures):
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
    """Seconds to open an indexed data set, records/s at random places, and GB of memory before and after."""
    start, before = time.perf_counter(), resident("VmRSS")
    source = FileSource(path, "janus")
    opened = time.perf_counter()
    count = source.count("gen")
    for i in range(n):
        source.record("gen", data.shuffled(i % count, count, (0, 0)))
    return opened - start, n / (time.perf_counter() - opened), before, resident("VmRSS")


def bench_data(settings):
    """Indexing and random reading of a million JSON lines, and of 20,000 samples in tar shards."""
    rows, result = [], {}
    with tempfile.TemporaryDirectory() as folder:
        made_up_records(Path(folder), 1_000_000, 20_000)
        for name, records in (("lines.jsonl", 1_000_000), ("shards", 20_000)):
            path, start = f"{folder}/{name}", time.perf_counter()
            data.index(data.Index((path,)))
            row = {"data": name, "records": records, "index_seconds": time.perf_counter() - start}
            opened, rate, before, after = fresh(f"print(*eval.reading_cost({path!r}))", 1)
            rows.append(row | {"open_seconds": opened, "records_per_second": rate, "gb_before": before,
                               "gb_after": after})
            result |= {f"{name}_index_seconds": row["index_seconds"], f"{name}_records_per_second": rate}
            print(f"{name}: {records} records indexed in {row['index_seconds']:.0f} s, opened in {opened:.3f} s, "
                  f"{rate:.0f} records/s at random, memory {before:.2f} -> {after:.2f} GB")
    return result, rows


def main(argv=None):
    tell(speed(parse(Speed, argv, "python -m lab.speed")))


if __name__ == "__main__":
    run_command(main)
