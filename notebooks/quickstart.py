# %% [markdown]
# # dpo_jax: quick start
#
# From nothing to an aligned policy without a download of models or data: a 2M-parameter Llama is made from scratch, gets a
# light SFT phase on synthetic dialogues, then DPO. Two CPU cores take about two minutes. On Colab, choose *Runtime → Change
# runtime type → TPU* first.

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
from pathlib import Path

import matplotlib.pyplot as plt

import dpo_jax

SMALL = bool(os.environ.get("DPO_JAX_SMALL"))  # a short run, for tests

# %% [markdown]
# ## Train
# A config is a flat table of keys; docs/configuration.md says what each means. `run` checks it, prepares the data, trains and
# writes everything into one directory. Calling it again with the same arguments continues where it stopped.

# %%
config = dpo_jax.get_config("configs/hhh.py:tiny")
config.log_every = 2
if SMALL:
    config.update(batch_size=8, sft_steps=20, num_steps=8, eval_every=4, eval_pairs=64)
    config.update(sample_prompts=2, sample_tokens=16, win_rate_prompts=4, kl_prompts=0)
    config.attention = "dense"  # what is quickest to compile
workdir = Path("runs/quickstart")
final = dpo_jax.run(config, workdir)
final

# %% [markdown]
# ## Curves
# `metrics.jsonl` has one record a line: `split` is `sft`, `train` or `eval`. DPO starts at a loss of ln 2 = 0.693, because
# policy and reference are still the same model; then the margin between the two completions' rewards grows. (More about how
# to read them: docs/metrics.md.)

# %%
records = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
train = [r for r in records if r["split"] == "train"]
held_out = [r for r in records if r["split"] == "eval"]
figure, axes = plt.subplots(1, 3, figsize=(13, 3.2))
for axis, name, guide in zip(axes, ("dpo_loss", "accuracy", "margin"), (0.693, 0.5, 0.0), strict=True):
    axis.plot([r["step"] for r in train], [r[name] for r in train], label="training batch")
    axis.plot([r["step"] for r in held_out], [r[name] for r in held_out], "o-", label="held-out pairs")
    axis.axhline(guide, color="gray", lw=0.8, ls="--")
    axis.set(title=name, xlabel="update")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Answers before and after
# Greedy answers to held-out prompts: after SFT alone, and after DPO on top of it.

# %%
samples = [json.loads(line) for line in (workdir / "samples.jsonl").open()]
for after in [s for s in samples if s["when"] == "after" and s["mode"] == "greedy"]:
    before = next(
        s for s in samples if s["when"] == "before" and s["mode"] == "greedy" and s["prompt"] == after["prompt"]
    )
    print(after["prompt"], "\n  before:", before["answer"], "\n  after: ", after["answer"], "\n")

# %% [markdown]
# The same with more around it is in `report.html`; the policy itself is `export/`, a directory in Hugging Face's layout that
# transformers and vLLM load.

# %%
sorted(p.name for p in (workdir / "export").iterdir())

# %% [markdown]
# Next: `dpo_tutorial.ipynb` (what is computed and how to read it), `your_data.ipynb` (your own pairs). For a real model take
# another preset, such as `dpo_jax.get_config("configs/hhh.py:smollm2-135m")`.
