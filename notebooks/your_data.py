# %% [markdown]
# # Your own preferences
#
# From a JSONL file of pairs to an exported model.

# %% tags=["colab", "skip-in-tests"]
# Colab only: its TPU runtime comes with an older jax than dpo_jax needs. The kernel restarts once after the upgrade;
# then run the cells from the top again.
import importlib.util
import os
import subprocess
import sys

SOURCE = ".."  # a checkout, or an uploaded zip's path, or an address such as "git+https://HOST/OWNER/dpo_jax"
if "COLAB_RELEASE_TAG" in os.environ and importlib.util.find_spec("dpo_jax") is None:
    wanted = f"dpo_jax[tpu] @ {SOURCE}" if "://" in SOURCE else f"{SOURCE}[tpu]"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", wanted], check=True)
    get_ipython().kernel.do_shutdown(restart=True)  # noqa: F821 (IPython's)

# %%
import json
import os
import random
from pathlib import Path

import dpo_jax
from dpo_jax.inspection import command as data_command

SMALL = bool(os.environ.get("DPO_JAX_SMALL"))  # a short run, for tests

# %% [markdown]
# ## The file
# One JSON object a line. The simplest form has three texts, `prompt`, `chosen` and `rejected`; docs/data.md lists all that
# are accepted (conversations as messages, scores, votes). Here the file is made up: short questions, with polite and with
# rude answers. To use yours, skip this cell and set `pairs`.

# %%
pairs = Path("pairs.jsonl")
rng = random.Random(0)
things = ["bread", "rice", "soup", "tea", "salad", "pasta", "cake", "stew", "jam", "curry", "pie", "toast"]
verbs = ["make", "store", "serve", "warm up", "cut", "season", "share", "carry", "freeze", "decorate"]
polite = ["Of course, I am happy to help you with the {}.", "Gladly! Take your time with the {}."]
rude = ["Leave me alone with your {}.", "What a stupid thing to ask about {}."]
with pairs.open("w") as file:
    for i in range(600):
        thing, verb = rng.choice(things), rng.choice(verbs)
        row = {
            "prompt": f"How do I {verb} {thing} for {i + 2} people?",
            "chosen": rng.choice(polite).format(thing),
            "rejected": rng.choice(rude).format(thing),
        }
        file.write(json.dumps(row) + "\n")
    file.write('{"prompt": "A row without answers"}\n')  # rows that cannot be used are counted, not fatal
print(pairs.open().readline())

# %% [markdown]
# ## Look before you train
# `python -m dpo_jax.data inspect` reads and tokenises as training would and shows the rows that were kept and dropped and why,
# the lengths, and pairs as the model gets them. It needs the tokenizer, but no weights.
#
# `model = "tiny"` is a model from scratch that needs no download, so it first learns to answer at all (`sft_steps`). For
# anything real name a model that can already talk, such as `HuggingFaceTB/SmolLM2-135M-Instruct`, with `sft_steps = 0` and
# `learning_rate = 1e-5`.

# %%
options = ["--config.dataset=pairs.jsonl", "--config.eval_pairs=64"]
data_command.main(["data", "inspect", "--config=configs/hhh.py:tiny", *options])

# %% [markdown]
# ## Train
# No evaluation file was given (`eval_path`), so 64 pairs are held out, none of whose prompts is trained on.

# %%
config = dpo_jax.get_config("configs/hhh.py:tiny")
config.update(dataset=str(pairs), eval_pairs=64, sft_steps=100, num_steps=40, batch_size=32)
if SMALL:
    config.update(sft_steps=30, num_steps=12, batch_size=8, sample_prompts=0, kl_prompts=0, judge="")
    config.attention = "dense"  # what is quickest to compile
workdir = Path("runs/your_data")
final = dpo_jax.run(config, workdir)

# %% [markdown]
# What became of the rows: `data.json` has the counts by reason, `quarantine.jsonl` the malformed rows themselves.

# %%
print((workdir / "data.json").read_text())
print((workdir / "quarantine.jsonl").read_text())

# %%
evals = [r for r in map(json.loads, (workdir / "metrics.jsonl").open()) if r["split"] == "eval"]
for name in ("dpo_loss", "accuracy", "margin"):
    print(f"{name:10} {evals[0][name]:.3f} before, {evals[-1][name]:.3f} after, on {evals[-1]['pairs']} held-out pairs")

# %% [markdown]
# ## The model
# `export/` is a Hugging Face directory: `transformers.AutoModelForCausalLM.from_pretrained("runs/your_data/export")`, or
# `vllm serve runs/your_data/export`. It can be the `model` of the next run too.

# %%
export = workdir / "export"
print(*sorted(f"{p.name}: {p.stat().st_size:,} bytes" for p in export.iterdir()), sep="\n")
