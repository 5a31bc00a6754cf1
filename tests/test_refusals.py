"""What is refused, in three tables: what the command line alone decides, outputs that
must not be written, files that are no model. Always in one line with a remedy, and the
disk stays as it was: contents, modes, times."""
import json
import math
import os
import pickle
import shlex
from dataclasses import asdict

import pytest
import torch

import chunking as ck
import greedy_soup
import lora
import lsmerge
import match
import merge
import train
import vae
import weight_statistics
from conftest import A, B, INDEX, SHARDS, Desk, save, sharded
from test_lora import QA, QB, write_adapter
from test_match import made

COMMANDS = {"lsmerge.py": lsmerge.tour}
for module in (merge, train, lora, match, greedy_soup, weight_statistics):
    COMMANDS[f"{module.__name__}.py"] = module.main
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


# --- Commands -------------------------------------------------------------------------
# command and arguments | exit code | words of the line, with commas between.
# '' is an unset variable of the shell. What lies on the desk: see `place`.
USAGE = """
merge.py a b --lam=2                                     | 2 | --lam, at most 1
merge.py a b --lam=                                      | 2 | --lam
merge.py a b --lam=0.1,0.2                               | 2 | one for each
merge.py a --space=weight                                | 2 | drop --space
merge.py a --roundtrip --samples=3                       | 2 | drop --samples
merge.py a b --lamb=0.9                                  | 2 | --lamb
merge.py a b --vae=                                      | 2 | empty
merge.py a b --select='('                                | 2 | --select
merge.py a b --select='a{99999999999}'                   | 2 | --select
merge.py a b --select='3000 brackets'                    | 2 | --select
merge.py a b --select='[[:alpha:]]'                      | 2 | is no pattern
merge.py a b --operator='one LINE two'                   | 2 | --operator
merge.py a b --operator=soup --lam=0.5                   | 2 | drop --lam
merge.py a b --operator=slerp --align=gaussian           | 2 | drop --align
merge.py a b c --operator=slerp                          | 2 | one SOURCE
merge.py a b --operator=task-arithmetic                  | 2 | needs --base
merge.py a b --operator=task-arithmetic --base=x --lam=10.1 | 2 | -10 to 10
merge.py a b --base=x                                    | 2 | drop --base
merge.py a b --space=weight --residual                   | 2 | drop --residual
merge.py a b --max-nmse=0                                | 2 | --max-nmse
merge.py a b --max-nmse=nan                              | 2 | --max-nmse
merge.py a b --residual --max-nmse=1                     | 2 | drop --max-nmse
merge.py a b --init=random --vae=v                       | 2 | drop --vae
merge.py a b --save-vae=w                                | 2 | drop --save-vae
merge.py a b --dry-run --report=r                        | 2 | drop --report
merge.py a b --align=sinkhorn --epsilon=0                | 2 | --epsilon
merge.py a b --control=zero --align=mean                 | 2 | drop --align
merge.py a b --samples=4097                              | 2 | --samples
merge.py a b --seed=4294967296                           | 2 | --seed
train.py a --ratio 65                                    | 2 | --ratio
train.py a --chunk 0                                     | 2 | --chunk
train.py a --heads 3                                     | 2 | twice --heads
train.py a --width 32 --init pca                         | 2 | at least --chunk
train.py a --blocks -1                                   | 2 | --blocks
train.py a --batch 0                                     | 2 | --batch
train.py a --holdout 1                                   | 2 | --holdout
train.py a --lr inf                                      | 2 | --lr
train.py a --seed -1                                     | 2 | --seed
train.py a --init vae --ratio 2                          | 2 | network
train.py a --init vae --steps1 5                         | 2 | drop --steps1
merge.py '' b                                            | 2 | empty
lora.py merge a b -o new                                 | 2 | 'merge'
lora.py fold a b -o new --rank 1                         | 2 | --rank
lora.py extract a b -o new --rank 0                      | 2 | --rank
match.py a b --force                                     | 2 | drop --force
match.py a b c -o x.safetensors                          | 2 | folder
match.py a m/b n/b -o x                                  | 2 | rename one
greedy_soup.py --eval true a                             | 2 | two or more
greedy_soup.py --eval true a b --lam 0.5                 | 2 | --lam
"""
PATHS = """
merge.py b c.safetensors -o empty/..//c.safetensors --force | 1 | reads or writes
merge.py c.safetensors b -o link.safetensors --force     | 1 | link, reads or writes
merge.py links b -o links --force                        | 1 | links, reads or writes
merge.py a b -o out.bin                                  | 1 | .safetensors
merge.py model b -o model/m.safetensors                  | 1 | lies in
merge.py model b -o new --report model/new.json          | 1 | lies in
merge.py model b -o result --force --report inside/README.md | 1 | reads or writes
merge.py a b --init random --save-vae a --force          | 1 | a, reads or writes
merge.py void void                                       | 1 | nothing would be merged
merge.py a b --select nosuch --space weight              | 1 | nothing would be merged
merge.py model b -o model --force                        | 1 | reads or writes
merge.py a b -o new/                                     | 1 | is a file
merge.py a b -o pipe.safetensors --force                 | 1 | pipe
merge.py model b -o foreign --force                      | 1 | notes.txt, precious
merge.py a b -o o.safetensors                            | 1 | exists, --force
merge.py a b --report old                                | 1 | another --report, --force
merge.py a b --vae none                                  | 1 | none
merge.py a b --source-vae vae                            | 1 | --source-vae
merge.py a org/name                                      | 1 | nothing is downloaded
merge.py a /dev/zero                                     | 1 | regular
merge.py a circle                                        | 1 | circle
merge.py a empty                                         | 1 | no, .safetensors
merge.py tiny huge                                       | 1 | huge, layers.0, 256 times
merge.py a wide --operator slerp                         | 1 | wide, layers.0.mlp.down
merge.py a wide --space weight                           | 1 | [64\\, 96], [96\\, 160]
merge.py a wide --operator task-arithmetic --base a      | 1 | wide, match.py
train.py a -o new --select zebra                         | 1 | --select
train.py a -o a --force                                  | 1 | reads or writes
train.py a -o new --log new                              | 1 | new, reads or writes
train.py a -o new --log alias                            | 1 | alias
train.py a -o new --lr 1e30 --steps1 20                  | 1 | lower --lr
train.py a -o new --init foo                             | 1 | random\\, pca
train.py a -o vaes/vae.safetensors --init vaes --force   | 1 | vaes, reads or writes
lsmerge.py vae                                           | 1 | meets no tensor
lora.py fold a adapter -o a --force                      | 1 | is a file
lora.py fold a adapter -o adapter/adapter_model.safetensors --force | 1 | reads or
lora.py extract b a -o foreign --rank 2 --force          | 1 | notes.txt
match.py c.safetensors b -o c.safetensors                | 1 | reads or writes
match.py a b -o new                                      | 1 | is a file
match.py a b --report b                                  | 1 | reads or writes
greedy_soup.py --eval true a b -o o.safetensors          | 1 | exists
greedy_soup.py --eval /no/such/program a b -o new.safetensors | 1 | /no/such/program
greedy_soup.py --eval true a b wide -o n.safetensors --space weight | 1 | wide
weight_statistics.py flat                                | 1 | no matrix
weight_statistics.py broken                              | 1 | layers.1.mlp.up_proj
"""


@pytest.fixture(scope="module")
def place(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    for name, model in (("a", "a"), ("b", "b"), ("vae", "vae"), ("wide", "big"),
                        ("c.safetensors", "a"), ("o.safetensors", "b")):
        (folder / name).write_bytes(models[model].read_bytes())
    os.utime(folder / "a", (1e9, 1e9))
    save(folder / "broken", A | {UP: torch.full((96, 64), math.nan)})
    save(folder / "flat", {"w": torch.ones(2, 2)})
    save(folder / "void", {"layers.0.w": torch.ones(0, 8)})
    save(folder / "zebra", {"layers.0.zebra.weight": torch.ones(8, 8)})
    save(folder / "tiny", {"layers.0.q_proj.weight": torch.ones(32, 32)})
    save(folder / "huge", {"layers.0.q_proj.weight": torch.ones(1024, 257)})
    sharded(folder / "model", A)
    write_adapter(folder / "adapter")
    for name in ("vaes", "result", "foreign/data", "empty", "links"):
        (folder / name).mkdir(parents=True)
    (folder / "vaes/vae.safetensors").write_bytes(models["vae"].read_bytes())
    (folder / "result/model.safetensors").write_text("of an earlier merge")
    (folder / "foreign/notes.txt").write_text("the user's own")
    (folder / "foreign/data/precious").write_text("the user's own")
    (folder / "old").write_text("old")
    (folder / "old").chmod(0o640)
    os.mkfifo(folder / "pipe.safetensors")
    os.link(folder / "a", folder / "alias")
    for name, target in {"link.safetensors": "c.safetensors", "circle": "circle",
                         "inside": "result", "links/model.safetensors": "../a"}.items():
        os.symlink(target, folder / name)
    return folder


@pytest.mark.parametrize("row", (USAGE.strip() + PATHS.rstrip()).splitlines(),
                         ids=lambda row: " ".join(row.split("|")[0].split()))
def test_commands_that_are_refused(place, capsys, monkeypatch, row):
    monkeypatch.chdir(place)
    line, code, words = row.replace("\\,", "\0").split(" | ")
    line = line.replace("3000 brackets", "(" * 3000 + ")" * 3000)
    line = line.replace("LINE", "\n")
    command, *arguments = shlex.split(line)
    words = [word.strip().replace("\0", ",") for word in words.split(",")]
    Desk(place, capsys).refuse(*arguments, words=words, code=int(code),
                               main=COMMANDS[command])


# --- Files ----------------------------------------------------------------------------
# A maker writes something bad on the desk and returns its path.
KIN = made(3)                   # that match.py can match
STEM = "model.layers.0.self_attn.q_proj"
ODD = "é\u2028\x1b[2J\n"
CONFIG = "adapter_config.json"


def holding(data, file="bad.safetensors"):
    def make(desk):
        (desk / file).parent.mkdir(exist_ok=True)
        (desk / file).write_bytes(data)
        return desk / file.split("/")[0]
    return make


def header(**changes):
    facts = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes
    text = json.dumps({"layers.0.w": facts}).encode()
    return holding(len(text).to_bytes(8, "little") + text + bytes(16))


def index(shard, *names):
    def make(desk):
        changes = dict.fromkeys(names, shard)
        save(desk / "x/s.safetensors", A)
        save(desk / "bad/s.safetensors", A)
        return sharded(desk / "bad", A, changes)
    return make


def changed(tensors, changes):
    """A model with other tensors in it; None: it lacks this one."""
    held = tensors | changes
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def saved(changes, tensors=A):
    return lambda desk: desk.put(changed(tensors, changes), "bad")


def only(name, dtype=torch.float32):
    return saved({name: torch.ones(8, 64, dtype=dtype)}, {})


def spoilt(tensor):
    bad = tensor.clone()
    bad.view(-1)[-1] = math.nan
    return bad


def renamed(old, new):
    return saved({}, {name.replace(old, new): tensor for name, tensor in KIN.items()})


def quantised(dtype, end, *scales):
    """In the place of q_proj.weight stand numbers of this dtype, and their scales."""
    changes = {STEM + ".weight": None, STEM + end: torch.ones(4, 4).to(dtype)}
    for scale in scales:
        changes[STEM + scale] = torch.ones(4)
    return saved(changes)


def configured(file="config.json", **config):
    return lambda desk: desk.model(A, "bad", **{file: json.dumps(config)})


def network(facts, changes={}):
    def make(desk):
        config = vae.VAEConfig(chunk=8, tokens=4, width=16, init="pca")
        tensors, metadata = vae.VAE(config).start(vae.generator_for(0)).to_file({})
        metadata["lsmerge.vae"] = facts
        if isinstance(facts, dict):
            metadata["lsmerge.vae"] = json.dumps(asdict(config) | facts)
        path = desk / "bad.safetensors"
        ck.write_tensors(path, changed(tensors, changes), metadata)
        return path
    return make


def adapter(changes={}, **settings):
    def make(desk):
        path, tensors = write_adapter(desk / "bad", **settings)
        save(path / "adapter_model.safetensors", changed(tensors, changes))
        return path
    return make


F8 = torch.float8_e4m3fn
FP8 = {"quant_method": "fp8"}
K = "model.layers.0.self_attn.k_proj.weight"
V = "model.layers.0.self_attn.v_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NARROW_KEYS = {K: torch.ones(20, 48), V: torch.ones(20, 48)}

# How each kind of file is given to a command; BAD is its path.
LINES = {
    "model": ["merge.py BAD good.safetensors -o new.safetensors",
              "merge.py good.safetensors BAD -o new.safetensors"],
    "source": ["merge.py half.safetensors BAD -o new.safetensors"],
    "VAE": ["merge.py a.safetensors good.safetensors -o new.safetensors --vae BAD"],
    "adapter": ["lora.py fold a.safetensors BAD -o new.safetensors"],
    "expert": ["lora.py extract BAD a.safetensors -o new --rank 2"],
    "pair": ["match.py BAD good.safetensors", "match.py good.safetensors BAD"],
}
BAD = {     # given as: {case: (its maker, words of the line)}
    "model": {
        # What people pass by mistake.
        "a pointer": (holding(b"version https://git-lfs.github.com/spec"), "lfs pull"),
        "pickle": (holding(pickle.dumps({"w": [1.0]})), "pickle"),
        "torch zip": (holding(b"PK\3\4" + bytes(40)), "convert a pickle"),
        "no tensors": (holding(b"\2" + bytes(7) + b"{}"), "nothing would be merged"),
        "offsets that do not fit": (header(data_offsets=[0, 8]), "no safetensors file"),
        "a dtype of 4 bits": (header(dtype="F4", shape=[32]), "layers.0.w", "F4"),
        "only pickles": (holding(b"x", "bad/model.bin"), "pickles must be conv"),
        "a shard alone": (holding(b"x", "bad/" + SHARDS[0]), "index is"),
        "an adapter alone": (adapter(), "adapter", "lora.py fold"),
        "factors of PEFT": (only(QA), "adapter", "lora.py fold"),
        "kohya's": (only("lora_unet_down_blocks_0_to_q.lora_up.weight"), "adapter"),
        "diffusers'": (only("unet.blocks.0.attn.to_q.lora.down.weight"), "adapter"),
        "LoHa": (only("lycoris_layers_0_q_proj.hada_w1_a"), "adapter"),
        "LoKr": (only("layers.0.q_proj.lokr_w1"), "adapter"),
        "beside its factors": (only("layers.0.q_proj.base_layer.weight"), "adapter"),
        # Indexes.
        "a shard is no text": (index(5, UP), INDEX),
        "half a character": (index("\ud800", UP), "missing"),
        "a ghost": (index(SHARDS[0], "ghost.weight"), "'ghost.weight'", SHARDS[0]),
        "a missing shard": (index("missing.safetensors", EMBED), EMBED, "missing.saf"),
        "outside": (index("../x/s.safetensors", *A), INDEX),
        # Numbers.
        "NaN in a norm": (saved({NORM: spoilt(A[NORM])}), NORM, "NaN"),
        "at the end": (saved({UP: spoilt(torch.ones(2 * ck.PIECE + 5, 1))}), UP, "NaN"),
        "float8 NaN": (saved({NORM: spoilt(A[NORM].to(F8))}), NORM, "NaN or Inf"),
        "an odd name": (saved({ODD: spoilt(torch.ones(2))}), "é\\u2"),
        # Quantised: integers or float8 beside their scales.
        "scale_inv": (quantised(F8, ".weight", ".weight_scale_inv"), "quantised"),
        "GPTQ": (quantised(torch.int32, ".qweight", ".qzeros", ".scales"), "quantised"),
        "8 bits": (quantised(torch.int8, ".weight", ".SCB"), "quantised"),
        "mxfp4": (quantised(torch.uint8, "_blocks", "_scales"), "quantised"),
        "quanto": (quantised(torch.int8, ".weight._data", ".weight._scale"), "quant"),
        "whole numbers": (quantised(torch.int8, ".weight"), "quantised"),
        "an expert's": (only("layers.0.experts.3.w1.weight", torch.int8), "quantised"),
        "its configuration": (configured(quantization_config=FP8), "quantised"),
        "of its text": (configured(text={"quantization_config": FP8}), "quantised"),
        "ModelOpt": (configured("hf_quant_config.json", quantization=FP8), "quantised"),
    },
    "source": {
        "too large for it": (saved({NORM: 3e5 * A[NORM]}), NORM, "float16"),
    },
    "VAE": {
        # Refused before anything is built.
        "a tensor is missing": (network({}, {"embed.weight": None}), "embed.weight"),
        "NaN": (network({}, {"embed.weight": math.nan * torch.ones(16, 8)}), "NaN"),
        "no configuration": (network("{}"), "train.py"),
        "a wrong type": (network({"chunk": "8"}), "train.py"),
        "an impossible value": (network({"width": 4}), "width"),
        "a huge network": (network({"width": 4096, "blocks": 100}), "train.py"),
        "a nesting bomb": (network("[" * 100_000), "recursion"),
    },
    "adapter": {
        # Adapters that are more than W + s B A, or less.
        "DoRA": (adapter(use_dora=True), "use_dora"),
        "LoKr": (adapter(peft_type="LOKR"), "LOKR"),
        "PiSSA": (adapter(init_lora_weights="pissa_niter_4"), "pissa"),
        "a wrong rank": (adapter(r=5), "rank 5"),
        "a huge alpha": (adapter(lora_alpha=10 ** 400), "lora_alpha 1000"),
        "a broken pattern": (adapter(alpha_pattern={"(": 4}), "alpha_pattern"),
        "an endless repeat": (adapter(rank_pattern={"(a?){4294967294}": 4}), "ever"),
        "deep brackets": (adapter(rank_pattern={"(" * 3000 + ")" * 3000: 4}), "patt"),
        "flags inside": (adapter(rank_pattern={"(?i)Q_PROJ": 4}), "rank_pattern"),
        "a convolution": (adapter({QA: torch.ones(4, 64, 1, 1)}), "convolution"),
        "one factor": (adapter({QB: None}), "other factor"),
        "a factor with NaN": (adapter({QA: math.nan * torch.ones(4, 64)}), "lora_A"),
        "another shape": (adapter({QA: torch.ones(4, 63)}), "[64, 63]"),
        "no configuration": (holding(b"x", "bad/adapter_model.safetensors"), CONFIG),
    },
    "expert": {
        # Experts of which no adapter can be extracted.
        "the base itself": (saved({}), "no matrix"),
        "only rounding differs": (saved({UP: A[UP] * (1 + 2e-7)}), "rounding"),
        "an expert with NaN": (saved({UP: spoilt(A[UP])}), "NaN"),
    },
    "pair": {
        # Models that match.py cannot match.
        "a narrow embedding": (saved({EMBED: torch.ones(300, 32)}, KIN), EMBED),
        "no embedding": (renamed("embed_tokens", "words"), "no embedding"),
        "NaN in its embedding": (saved({EMBED: spoilt(KIN[EMBED])}, KIN), EMBED),
        "a fused projection": (renamed("q_proj", "qkv_proj"), "attn.qkv"),
        "experts": (renamed("mlp.", "mlp.experts.0."), "0.mlp.experts.0."),
        "shapes that do not fit": (saved({DOWN: torch.ones(48, 39)}, KIN), DOWN),
        "keys that queries cannot share": (saved(NARROW_KEYS, KIN), K),
    },
}
CASES = [(kind, case) for kind in BAD for case in BAD[kind]]


@pytest.mark.parametrize("kind, case", CASES)
def test_files_that_are_refused(desk, monkeypatch, kind, case):
    make, *words = BAD[kind][case]
    monkeypatch.chdir(desk.folder)
    desk.put(A, "a")
    desk.put({name: tensor.half() for name, tensor in A.items()}, "half")
    desk.put({"pair": KIN}.get(kind, B | {ODD: torch.ones(2)}), "good")
    path = make(desk)
    for line in LINES[kind]:
        command, *arguments = line.replace("BAD", path.name).split()
        desk.refuse(*arguments, words=words, main=COMMANDS[command])
