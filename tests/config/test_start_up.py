"""What is refused, and what only helps, is there at once: no JAX is imported for it.

Times are those that the process itself computed, so that a busy machine does not matter.
"""

import json
import os
import subprocess
import sys

import pytest

# Runs a module as `python -m` would, then tells the seconds it computed and which slow packages it imported.
DRIVER = """
import atexit, json, resource, runpy, sys
def tell():
    used = resource.getrusage(resource.RUSAGE_SELF)
    slow = [name for name in ("jax", "transformers", "grain", "orbax", "torch") if name in sys.modules]
    print(json.dumps([used.ru_utime + used.ru_stime, slow]), file=sys.stderr)
atexit.register(tell)
"""
RUN = DRIVER + "module, *sys.argv[1:] = sys.argv[1:]\nrunpy.run_module(module, run_name='__main__', alter_sys=True)\n"
# The same for a command after another, each in a fork of one process that has imported what refusals need. A line on
# standard input is [arguments, directory, file for both outputs]; a line on standard output is the exit code.
FORKS = """
import importlib, json, os, sys
doors, *light = sys.argv[1].split(), *sys.argv[2:]
for name in light:
    importlib.import_module(name)
assert not {"jax", "transformers", "grain", "orbax", "torch"} & set(sys.modules), sys.modules.keys()
assert not {f"dpo_jax.{door}" for door in doors} & set(sys.modules)
for line in sys.stdin:
    (module, *arguments), directory, out = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(directory)
        file = os.open(out, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv[1:] = [module, *arguments]
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
"""
LIGHT = (
    "config.command_line config.check config.opened data.prepare records.trackers answering.output plan.request".split()
)
# Of every command what it refuses last, and so with the most imported: in a process of its own, as a user starts it.
FROM_NOTHING = [
    "--config.reference=/nowhere", "--config.trackio_project=x", "--shards=0", "--config.model=/nowhere", "/nowhere",
    "--prompts=twice.jsonl", "--model=begun", "--config.batch_size=0",
]  # fmt: skip
SECONDS = 2.0

TRAIN, TINY, DIRECTORY = "dpo_jax.train", "--config=configs/hhh.py:tiny", "--workdir=run"
SAMPLE, MODEL = "dpo_jax.sample", f"--model={os.getcwd()}/tests/golden/trl/tiny"
PROMPTS = "--prompts=prompts.jsonl"
COLLECT = "dpo_jax.collect"
PLAN, TOPOLOGY = "dpo_jax.plan", "--topology=v6e:2x4"


@pytest.fixture(scope="module")
def forks():
    """A function: the arguments of a command and a directory → (exit code, what it said, seconds, slow imports)."""
    program = [sys.executable, "-c", FORKS + RUN, "train sample", *(f"dpo_jax.{x}" for x in LIGHT)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, env=environment, **pipes) as server:  # which ends with its standard input

        def run(args, directory):
            said = directory / "said.txt"
            print(json.dumps([args, str(directory), str(said)]), file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            *lines, told = said.read_text().splitlines()
            return code, lines, *json.loads(told)

        yield run


def _python(program, *args, cwd=None):
    """(exit code, standard output, what is on standard error, seconds, slow imports) of a Python program."""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", program, *args], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    *lines, told = done.stderr.splitlines()
    return done.returncode, done.stdout, lines, *json.loads(told)


@pytest.mark.parametrize(
    ("module", "limit"),
    [
        ("dpo_jax", 0.3),
        ("dpo_jax.config.command_line", 1.0),
        ("dpo_jax.config.settings", 1.0),
        ("dpo_jax.objective.table", 0.3),
        ("dpo_jax.train", 1.0),
        ("dpo_jax.sample", 1.0),
        ("dpo_jax.collect", 1.0),
    ],
)
def test_modules_are_imported_at_once_and_without_jax(module, limit):
    _, _, _, seconds, slow = _python(f"{DRIVER}\nimport {module}")
    assert slow == []
    assert seconds < limit


def test_public_names_without_arrays_need_no_jax():
    names = "Comparison, LabeledComparison, Skip, UserError, get_config, run, sample"
    _, _, _, seconds, slow = _python(f"{DRIVER}\nfrom dpo_jax import {names}\nget_config('configs/hhh.py:tiny')")
    assert slow == []
    assert seconds < SECONDS


@pytest.mark.parametrize(
    "command",
    [
        [TRAIN],
        ["dpo_jax.data"],
        ["dpo_jax.data", "inspect"],
        ["dpo_jax.data", "prepare"],
        ["dpo_jax.report"],
        [PLAN],
        [SAMPLE],
        [COLLECT],
    ],
    ids=" ".join,
)
def test_help_is_there_at_once(command):
    code, out, errors, seconds, slow = _python(RUN, *command, "--help")
    assert code == 0, errors
    assert f"python -m {command[0]}" in out
    assert slow == []
    assert seconds < SECONDS


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([TRAIN], "--config is missing"),
        ([TRAIN, TINY], "--workdir is missing"),
        ([TRAIN, TINY, "--workdir=s3://bucket/run"], "addresses of this kind are not supported"),
        ([TRAIN, TINY, "--workdir=file/run"], "cannot be written"),
        ([TRAIN, TINY, "--workdir=other"], "holds a run of another config (seed: 3 there, 0 asked)"),
        ([TRAIN, TINY, DIRECTORY, "--wrokdir=x"], "Unknown command line flag 'wrokdir'"),
        ([TRAIN, TINY, DIRECTORY, "extra"], "unexpected argument 'extra'"),
        ([TRAIN, TINY, DIRECTORY, "--config.batchsize=3"], "did you mean batch_size"),
        ([TRAIN, TINY, DIRECTORY, "--config.batch_size=many"], "--config.batch_size=many"),
        ([TRAIN, TINY, DIRECTORY, "--config.loss=dpo"], "'dpo' does not exist"),
        ([TRAIN, TINY, DIRECTORY, "--config.lora_rank=8", "--config.lora_targets=x"], "'x' is no projection"),
        ([TRAIN, TINY, DIRECTORY, "--config.dataset=hhhh"], "dataset=hhhh is unknown"),
        ([TRAIN, TINY, DIRECTORY, "--config.dataset=/nowhere/pairs.jsonl"], "/nowhere/pairs.jsonl: no such file"),
        ([TRAIN, TINY, DIRECTORY, "--config.model=/nowhere/model"], "model='/nowhere/model': no such directory"),
        ([TRAIN, TINY, DIRECTORY, "--config.reference=/nowhere"], "reference='/nowhere': no such directory"),
        ([TRAIN, TINY, DIRECTORY, "--config.trackio_project=x"], "needs the package trackio"),
        ([TRAIN, "--config=configs/hhh.py:huge", DIRECTORY], "preset 'huge' does not exist; there are configs/hhh.py"),
        ([TRAIN, "--config=configs/none.py", DIRECTORY], "no such file; there are configs/helpsteer3.py"),
        ([TRAIN, "--config=broken.py", DIRECTORY], "SyntaxError"),
        (["dpo_jax.data"], "a command is missing; use inspect or prepare"),
        (["dpo_jax.data", "look"], "unknown command 'look'"),
        (["dpo_jax.data", "inspect", "--config=configs/hhh.py:huge"], "preset 'huge' does not exist"),
        (["dpo_jax.data", "inspect", TINY, "--shards=0"], "--shards=0"),
        (["dpo_jax.data", "prepare", TINY, "--config.dataset=/nowhere"], "/nowhere: no such file or directory"),
        (["dpo_jax.data", "prepare", TINY, "--config.model=/nowhere"], "model='/nowhere': no such directory"),
        (["dpo_jax.report", "/nowhere"], "/nowhere is not a directory"),
        (["dpo_jax.report", "--nothing"], "usage: python -m dpo_jax.report"),
        ([COLLECT], "--policy is missing"),
        ([COLLECT, "--policy=/nowhere", PROMPTS, "--judge=gold", "--out=a.jsonl"], "/nowhere': no such directory"),
        ([COLLECT, "--policy=x", PROMPTS, "--judge=gold", "--out=a.jsonl", "--n=1"], "a pair needs two answers"),
        ([COLLECT, "--policy=x", PROMPTS, "--judge=gold", "--out=a.jsonl", "--mode=x"], "choose from best_worst"),
        ([SAMPLE], "--model is missing"),
        ([SAMPLE, MODEL, PROMPTS, "--n=0"], "n=0; needs at least 1 answer"),
        ([SAMPLE, MODEL, PROMPTS, "--n=two"], "--n=two"),
        ([SAMPLE, MODEL, PROMPTS, "--top_p=0"], "top_p=0.0; needs more than 0"),
        ([SAMPLE, MODEL, PROMPTS, "--temperature=nan"], "temperature=nan; needs a finite number"),
        ([SAMPLE, MODEL, PROMPTS, "--stop="], "needs texts of at least one character"),
        ([SAMPLE, MODEL, PROMPTS, "--stop_token_ids=2,x"], "stop_token_ids='2,x'"),
        ([SAMPLE, MODEL, PROMPTS, "--min_tokens=200"], "min_tokens=200; needs 0 to max_tokens=128"),
        ([SAMPLE, MODEL, PROMPTS, "--seed=-1"], "seed=-1; needs 0 to"),
        ([SAMPLE, MODEL, PROMPTS, "--dtype=half"], "--dtype=half does not exist; choose from auto, bfloat16, float32"),
        ([SAMPLE, MODEL, PROMPTS, "--cache_dtype=int4"], "--cache_dtype=int4 does not exist"),
        ([SAMPLE, MODEL, PROMPTS, "--prompt_format=x"], "--prompt_format=x does not exist"),
        ([SAMPLE, MODEL, PROMPTS, "--rows=-1"], "--rows=-1; needs 0 or more"),
        ([SAMPLE, MODEL, PROMPTS, "--temprature=1"], "Unknown command line flag 'temprature'"),
        ([SAMPLE, MODEL, PROMPTS, "extra"], "unexpected argument 'extra'"),
        ([SAMPLE, MODEL, PROMPTS, "--dataset=hhh"], "are both prompts; give one of them"),
        ([SAMPLE, MODEL, PROMPTS, "--split=test"], "--split=test has no meaning without --dataset"),
        ([SAMPLE, MODEL, PROMPTS, "--overwrite"], "--overwrite has no meaning without --out"),
        ([SAMPLE, MODEL, PROMPTS, "--out=missing/a.jsonl"], "--out=missing/a.jsonl cannot be written"),
        ([SAMPLE, MODEL, PROMPTS, "--out=prompts.jsonl"], "is the file of the prompts"),
        ([SAMPLE, MODEL, PROMPTS, "--out=file"], "no file.about.json says what it is of"),
        ([SAMPLE, MODEL, PROMPTS, "--config=other"], "--config=other: no run's directory"),
        ([SAMPLE, MODEL, PROMPTS, "--config=configs/hhh.py:huge"], "preset 'huge' does not exist"),
        ([SAMPLE, MODEL, PROMPTS, "--revision=main"], "is a local directory, which has none"),
        ([SAMPLE, MODEL, "--prompts=none.jsonl"], "none.jsonl: no such file or directory"),
        ([SAMPLE, MODEL, "--prompts=file"], "the file is empty"),
        ([SAMPLE, MODEL, "--prompts=bad.jsonl"], "bad.jsonl:2: the prompt is empty or blank"),
        ([SAMPLE, MODEL, "--prompts=twice.jsonl"], "twice.jsonl:2: the id 'a' is that of twice.jsonl:1 too"),
        ([SAMPLE, MODEL, "--dataset=hhhh"], "dataset=hhhh is unknown"),
        ([SAMPLE, "--model=tiny", PROMPTS], "model 'tiny' has no weights before it is trained"),
        ([SAMPLE, "--model=/nowhere", PROMPTS], "model='/nowhere': no such directory"),
        ([SAMPLE, "--model=begun", PROMPTS], "the run has no export/ and no checkpoint yet"),
        ([PLAN, "--config=configs/hhh.py"], "--topology is missing"),
        ([PLAN, "--config=configs/hhh.py", "--topology=v7:2x2"], "topology 'v7:2x2' does not exist"),
        ([PLAN, "--config=configs/hhh.py:huge", TOPOLOGY], "preset 'huge' does not exist"),
        ([PLAN, "--config=configs/hhh.py", TOPOLOGY, "--config.batch_size=0"], "batch_size=0: must be at least 1"),
        ([PLAN, "--config=configs/hhh.py", TOPOLOGY, "--json=missing/a.json"], "--json=missing/a.json cannot"),
    ],
    ids=lambda x: " ".join(x)[8:60] if isinstance(x, list) else "",
)
def test_a_refusal_is_one_line_at_once(args, words, tmp_path, forks):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": " "}\n')
    (tmp_path / "twice.jsonl").write_text('{"prompt": "Hi", "id": "a"}\n' * 2)
    if "--out=file" in args:
        (tmp_path / "file").write_text("{}\n")
    program = f"{DRIVER}import dpo_jax; print(json.dumps(dpo_jax.get_config('configs/hhh.py:tiny').to_dict()))"
    if "--workdir=other" in args:
        saved = json.loads(_python(program, cwd=tmp_path)[1])
        (tmp_path / "other/config.json").write_text(json.dumps(saved | {"seed": 3}))
    if "--model=begun" in args:
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun/config.json").write_text(_python(program, cwd=tmp_path)[1])
    if args[-1] in FROM_NOTHING:
        code, _, errors, seconds, slow = _python(RUN, *args, cwd=tmp_path)
    else:
        code, errors, seconds, slow = forks(args, tmp_path)
    assert code == 2
    assert words in "\n".join(errors)
    assert "Traceback" not in "\n".join(errors)
    assert len(errors) == 1 or args[-1] == "--nothing"  # argparse's own
    assert slow == []
    assert seconds < SECONDS
