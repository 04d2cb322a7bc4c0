# %% [markdown]
# # DPO, step by step
#
# What a preference pair is, the loss worked by hand, what beta does, and how to read a run. Everything runs on a small
# model from scratch, without a download: a few minutes on two CPU cores.

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
import gzip
import json
import math
import os
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import dpo_jax
from dpo_jax import Comparison, LabeledComparison
from dpo_jax.data.render import make_renderer, render_batch
from dpo_jax.model.options import LayoutOptions
from dpo_jax.objective.losses import Scored, sigmoid
from dpo_jax.objective.policy_logps import logps_fn
from dpo_jax.rows.build import build_rows
from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.engine import Sampler
from dpo_jax.sampling.params import SamplingParams

SMALL = bool(os.environ.get("DPO_JAX_SMALL"))  # short runs, for tests

# %% [markdown]
# ## 1. A preference pair
# A **comparison** is one conversation and two completions of it, A and B, in no particular order. A **label** says which is
# better: `"A"`, `"B"` or `"Tie"`. Only the label makes one completion *chosen* and the other *rejected*.

# %%
comparison = Comparison(
    prompt_conversation=[{"role": "user", "content": "How do I keep bread fresh until tomorrow?"}],
    completion_a=[{"role": "assistant", "content": "Who cares about your bread."}],
    completion_b=[{"role": "assistant", "content": "Wrap the bread in a clean towel."}],
)
pair = LabeledComparison(comparison, label="B")
print("chosen:  ", pair.chosen[0]["content"])
print("rejected:", pair.rejected[0]["content"])

# %% [markdown]
# Exchanging A and B together with the label changes nothing. A tie has no chosen side, so it teaches DPO nothing and is
# dropped by default.

# %%
assert pair.swap().label == "A"
assert pair.swap().chosen == pair.chosen
try:
    LabeledComparison(comparison, label="Tie").chosen
except ValueError as error:
    print("Tie:", error)

# %% [markdown]
# ## 2. A model to start from
# DPO changes a model that can already answer. Ours cannot, so it gets a light SFT phase, on both completions of every pair: the
# reference is then what could have said either, as DPO's derivation supposes. One DPO update with a learning rate of zero
# follows, which changes nothing: `export/` is the SFT model, start and reference of all below.

# %%
base = dpo_jax.get_config("configs/hhh.py:tiny")
base.log_every = 1
if SMALL:
    base.update(batch_size=4, eval_pairs=32, sft_steps=60, sample_prompts=0, kl_prompts=0)
    base.judge = ""
    base.attention = "dense"  # what is quickest to compile
sft = base.copy_and_resolve_references()
sft.update(num_steps=1, learning_rate=0.0, warmup_steps=0.0)
dpo_jax.run(sft, "runs/tutorial-sft")
START = Path("runs/tutorial-sft/export")

# %% [markdown]
# Loading a model: its files, how it is sharded over the devices (here: all of them along one axis), its parameters.


# %%
def load(directory):
    return dpo_jax.load_policy(directory, LayoutOptions(compute_dtype="float32"))


model, layout, reference = load(START)
mesh = layout.mesh
logps_of = jax.jit(logps_fn(layout, remat="none"), static_argnums=2)


def completion_logps(params, triples):
    """Summed log-probabilities of both completions of (prompt, completion, completion), in tokens: [pairs, 2]."""
    widths = [-(-max(len(parts[i]) for parts in triples) // 16) * 16 for i in range(3)]
    rows = -(-len(triples) // mesh.size) * mesh.size  # a pair a row; rows divide over the devices
    placed = np.full((rows, 1), -1)
    placed[: len(triples), 0] = np.arange(len(triples))
    shape = RowShape(widths[0], tuple(widths[1:]), rows)
    batch = build_rows(triples, placed, shape)
    with jax.set_mesh(mesh):
        return np.asarray(logps_of(params, batch, shape).logps, np.float64)[: len(triples), 0]


# %% [markdown]
# The pair in tokens. Only the completions' tokens are scored; the prompt is what they are conditioned on.

# %%
renderer = make_renderer(
    model.tokenizer, prompt_format="auto", max_prompt_length=128, max_completion_length=64, overlong="truncate"
)
(rendered,) = render_batch(renderer, [pair])
triple = tuple(np.asarray(ids, np.int32) for ids in (rendered.prompt, rendered.chosen, rendered.rejected))
for name, ids in zip(("prompt", "chosen", "rejected"), triple, strict=True):
    print(f"{name:9}{len(ids):3} tokens {model.tokenizer.decode(ids)!r}")

# %% [markdown]
# ## 3. The loss by hand
# Write $r(y) = \log\pi(y|x) - \log\pi_{ref}(y|x)$ for how much more likely the policy makes a completion than the reference
# does. DPO wants the chosen one to gain more than the rejected one:
#
# $$h = r(y_w) - r(y_l), \qquad L = -\log\sigma(\beta h)$$
#
# Its gradient is $-\beta\,\sigma(-\beta h)\,\nabla h$: large while the pair is on the wrong side, nearly zero when it is won
# clearly. $\beta r$ is the **reward**, $\beta h$ the **margin**. At the start policy = reference, so $h = 0$ and
# $L = \ln 2 = 0.693$, whatever the model and the data.
#
# For a policy that differs, move the reference's parameters a little.

# %%
noise = jax.random.key(0)
moved = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(noise, p.shape, p.dtype), reference)
policy_logps, reference_logps = completion_logps(moved, [triple])[0], completion_logps(reference, [triple])[0]
beta = 0.1
r_chosen, r_rejected = policy_logps - reference_logps
h = r_chosen - r_rejected
loss_by_hand = math.log1p(math.exp(-beta * h))  # = -log sigmoid(beta h)
print(f"log pi      chosen {policy_logps[0]:8.3f}   rejected {policy_logps[1]:8.3f}")
print(f"log pi_ref  chosen {reference_logps[0]:8.3f}   rejected {reference_logps[1]:8.3f}")
print(f"rewards     chosen {beta * r_chosen:8.3f}   rejected {beta * r_rejected:8.3f}   margin {beta * h:.3f}")
print(f"loss        {loss_by_hand:.6f}")

# %% [markdown]
# The library's loss of the same numbers:

# %%
scores = np.float32([[r_chosen, r_rejected]])
scored = Scored(
    policy=np.float32([policy_logps]),
    reference=np.float32([reference_logps]),
    scores=scores,
    tokens=np.float32([[len(triple[1]), len(triple[2])]]),
    chosen_logp=np.float32([policy_logps[0]]),
    chosen_tokens=np.float32(len(triple[1])),
    is_pair=np.array([True]),
)
loss_of_library = float(sigmoid(scored, beta=beta)[0])
print(f"by hand {loss_by_hand:.6f}, library {loss_of_library:.6f}")
assert abs(loss_by_hand - loss_of_library) < 1e-5

# %% [markdown]
# ## 4. What beta does
# DPO solves "as much reward as possible, but stay near the reference", and beta is the price of a step away from it: with a
# large beta a small change of the log-ratios already makes a large margin, the sigmoid is flat, and the policy stops moving. With
# a small beta it must go far for the same loss.
#
# Three runs that differ in beta alone, far apart so that short runs show it:

# %%
BETAS = (0.03, 0.3, 3.0)
runs = {}
for beta in BETAS:
    config = base.copy_and_resolve_references()
    config.update(model=str(START), dataset="synthetic", sft_steps=0, dpo_beta=beta, export=True, num_steps=40)
    if SMALL:
        config.update(num_steps=24, eval_every=24, learning_rate=4e-4)
    workdir = Path(f"runs/tutorial-beta-{beta}")
    dpo_jax.run(config, workdir)
    runs[beta] = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]

# %% [markdown]
# How far each policy went is its KL divergence from the reference, $E_{y\sim\pi}[\log\pi(y|x) - \log\pi_{ref}(y|x)]$: **sample**
# answers from the policy (temperature 1, nothing cut off) and average the log-ratio over them. (The rewards in the metrics are
# log-ratios too, but on the data set's completions, which the policy need not say: they estimate no KL.)

# %%
PROMPTS = 32 if SMALL else 64
LONGEST = 48  # tokens of an answer; a longer one is compared up to there
with (Path("runs/tutorial-sft/synthetic-0/synthetic/test.jsonl.gz")).open("rb") as file:
    lines = gzip.decompress(file.read()).decode().splitlines()[:PROMPTS]
prompts = [json.loads(line)["chosen"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:" for line in lines]
prompt_ids = [np.asarray(model.tokenizer(text)["input_ids"], np.int32) for text in prompts]
sampler = Sampler(layout, model.tokenizer, model.stop_tokens())


def kl_from_reference(params):
    """Mean and standard error, in nats an answer, of the log-ratio over two sampled answers to every prompt."""
    drawn = sampler.answers(params, prompt_ids, SamplingParams(n=2, max_tokens=LONGEST, seed=1))
    triples = [
        (ids, *(np.asarray(answer.token_ids, np.int32) for answer in answers))
        for ids, answers in zip(prompt_ids, drawn, strict=True)
    ]
    ratios = completion_logps(params, triples) - completion_logps(reference, triples)
    by_prompt = ratios.mean(axis=1)
    return by_prompt.mean(), by_prompt.std(ddof=1) / math.sqrt(len(by_prompt))


results = {}
for beta in BETAS:
    last = [r for r in runs[beta] if r["split"] == "eval"][-1]
    kl, error = kl_from_reference(load(f"runs/tutorial-beta-{beta}/export")[2])
    results[beta] = {"kl": float(kl), "error": float(error), "margin": last["margin"], "accuracy": last["accuracy"]}
    print(f"beta {beta:<5} KL {kl:6.2f} ± {error:.2f}  margin {last['margin']:.3f}  accuracy {last['accuracy']:.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
for beta in BETAS:
    r = results[beta]
    left.errorbar(r["kl"], r["margin"], xerr=r["error"], fmt="o", label=f"beta {beta}")
    evals = [x for x in runs[beta] if x["split"] == "eval"]
    right.plot([x["step"] for x in evals], [x["margin"] / beta for x in evals], "o-", label=f"beta {beta}")
left.set(xlabel="KL from the reference, nats an answer", ylabel="held-out margin (beta h)", yscale="log")
right.set(xlabel="update", ylabel="held-out log-ratio difference h")
left.legend()
plt.show()

# %% [markdown]
# Margins of different betas are in different units: compare $h$ = margin / beta (right), accuracy, or answers, never the margins or
# the losses themselves.

# %% [markdown]
# ## 5. Reading the metrics
# The run with the middle beta. Healthy: the loss falls from 0.693, accuracy rises from 0 (all pairs tie at the start, and a tie
# counts as lost) well above 0.5, the chosen reward stays above the rejected one.

# %%
train = [r for r in runs[BETAS[1]] if r["split"] == "train"]
steps = [r["step"] for r in train]
figure, axes = plt.subplots(1, 4, figsize=(15, 3))
for axis, names in zip(
    axes,
    (["dpo_loss"], ["accuracy"], ["chosen_reward", "rejected_reward"], ["chosen_logp", "rejected_logp"]),
    strict=True,
):
    for name in names:
        axis.plot(steps, [r[name] for r in train], label=name)
    axis.legend()
    axis.set(xlabel="update")
plt.show()

# %% [markdown]
# ## 6. Common failures and how they look
# | what you see | what it means | what to do |
# |---|---|---|
# | the first loss is not 0.693 | the reference is not the model that is trained (or `loss` is not plain `sigmoid`) | leave `reference` empty |
# | loss stays at 0.69, accuracy near 0.5 | learning rate too low, or labels that say nothing | raise it up to 1e-5; look at pairs with `inspect` |
# | training accuracy near 1, held-out falls back to 0.5 | the pairs are learned by heart | fewer epochs, larger beta |
# | chosen *and* rejected log-probability fall fast, margin grows | probability goes to answers in neither column | larger beta, lower rate, SFT on chosen answers first, `loss=sigmoid:1.0,sft:0.2` |
# | answers become long or repeat themselves | length tells chosen from rejected | look at `inspect`'s lengths; `ld_alpha` below 1 |
# | loss jumps, large `grad_norm`, then `not finite` | learning rate too high | a lower one, in a new workdir |
#
# After an overshoot h can be far below 0, where the loss is a straight line of slope beta. Here a rate of 0.05, five
# thousand times a sensible one for a pre-trained model:

# %%
wild = base.copy_and_resolve_references()
wild.update(
    model=str(START), dataset="synthetic", sft_steps=0, num_steps=8, learning_rate=0.05, export=False, eval_every=0
)
dpo_jax.run(wild, "runs/tutorial-wild")
wild_losses = [
    r["dpo_loss"]
    for r in map(json.loads, Path("runs/tutorial-wild/metrics.jsonl").read_text().splitlines())
    if r["split"] == "train"
]
print("loss by update:", [round(x, 2) for x in wild_losses])

# %% [markdown]
# Next: [RLHF, stage by stage](rlhf_tutorial.ipynb): a reward model, RL against it, and the three methods side by side.
