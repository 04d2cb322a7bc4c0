# %% [markdown]
# # RLHF, stage by stage
#
# SFT, a reward model, and RL against it; one reward worked by hand; what happens when the reward model is trusted too long; and
# DPO, online DPO and RL from the same start. Everything runs on a small model from scratch, without a download. The [DPO
# tutorial](dpo_tutorial.ipynb) has what comes before: preference pairs, log-probabilities, the loss.

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
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import dpo_jax
from dpo_jax import rlhf
from dpo_jax.config.stages import read_stages
from dpo_jax.preference.load import load_preference_model
from dpo_jax.preference.models import Answered
from dpo_jax.rl.estimators import ADVANTAGES

SMALL = bool(os.environ.get("DPO_JAX_SMALL"))  # short runs, for tests

# %% [markdown]
# ## 1. Three stages
# The dialogues' own rule made the pairs: it knows which answer is better. The **reward model** sees the pairs alone and must guess
# the rule. **RL** then asks the reward model. Only the win rate is judged by the rule itself, so that nobody grades what was
# learned from him.

# %%
config = dpo_jax.get_config("configs/rlhf.py:tiny")
config.log_every = 1
if SMALL:
    config.update(batch_size=8, sft_steps=40, eval_pairs=32, sample_prompts=1, sample_tokens=24, win_rate_prompts=16)
    config.update(reward_steps=12, num_steps=4, rl_n=4, eval_every=2, kl_prompts=8, max_completion_length=32)
    config.attention = "dense"  # what is quickest to compile
result = rlhf.run(config, "runs/rlhf")
result


# %%
def records(workdir, split):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["split"] == split]


def curve(axis, rows, name, label, style="-"):
    points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
    axis.plot(*zip(*points, strict=True), style, label=label)


figure, axes = plt.subplots(1, 4, figsize=(16, 3.2))
curve(axes[0], records("runs/rlhf/sft", "train"), "loss", "train")
curve(axes[0], records("runs/rlhf/sft", "eval"), "loss", "held-out", "o-")
curve(axes[1], records("runs/rlhf/reward", "train"), "accuracy", "train")
curve(axes[1], records("runs/rlhf/reward", "eval"), "accuracy", "held-out", "o-")
curve(axes[2], records("runs/rlhf/rl", "train"), "reward", "drawn answers")
curve(axes[2], records("runs/rlhf/rl", "eval"), "reward", "held-out prompts", "o-")
curve(axes[3], records("runs/rlhf/rl", "eval"), "win_rate", "over SFT", "o-")
for axis, title in zip(axes, ("SFT: loss", "reward model: accuracy", "RL: reward", "RL: win rate"), strict=True):
    axis.set(title=title, xlabel="update")
    axis.legend()
plt.show()

# %% [markdown]
# ## 2. One reward by hand
# The SFT policy answers one prompt several times, and the reward model scores the answers. What an answer teaches is how much
# better it is than the others to the same prompt: its **advantage**, in units of their standard deviation.
#
# $$A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + \epsilon}$$

# %%
N = 4
prompt = json.loads((Path("runs/rlhf/rl/samples.jsonl")).read_text().splitlines()[0])["prompt"]
(answers,) = dpo_jax.sample("runs/rlhf/sft/export", [prompt], n=N, max_tokens=24, seed=2)
judge = load_preference_model("runs/rlhf/reward")
question = [{"role": "user", "content": prompt.rpartition("Human:")[2].partition("\n\nAssistant:")[0].strip()}]
said = [[{"role": "assistant", "content": answer.text.strip()}] for answer in answers]
rewards = judge.scores([Answered(question, one) for one in said])
by_hand = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
of_library = np.asarray(ADVANTAGES["group"](rewards[None].astype(np.float32), np.ones((1, N), bool)))[0]
for answer, reward, advantage in zip(answers, rewards, by_hand, strict=True):
    print(f"reward {reward:7.3f}  advantage {advantage:6.3f}  {answer.text.strip()!r:.70}")
difference = float(np.abs(by_hand - of_library).max())
print(f"largest difference from the library {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# The update raises the probability of every token of an answer in proportion to its advantage. With the policy that drew it, the
# ratio $\rho = \pi/\pi_{old}$ is 1 and the loss is $-\frac1n\sum_i A_i = 0$: its **gradient** is not,
# $-\frac1n\sum_i A_i \nabla \log\pi(y_i|x)$ per token. A loss of RL near 0 says nothing; the reward does.
#
# Left alone, the policy would go wherever the reward model points. The KL penalty takes a price for each nat from the
# reference: $r - \beta(\log\pi - \log\pi_{ref})$.

# %% [markdown]
# ## 3. Proxy and gold
# The reward model (**proxy**) is right about answers like those it has seen. RL moves the policy to answers that it has not
# seen, and chooses among them those that it rates too high. Gao et al. (arXiv 2210.10760) plot both against $\sqrt{KL}$: the proxy goes on rising,
# the true (**gold**) reward turns. Beside the run above, one without the KL penalty
# and at a higher rate:

# %%
*_, rl_stage = read_stages(config, Path("runs/rlhf").absolute())
pushed = {**rl_stage.config, "rl_kl_coef": 0.0, "learning_rate": 1e-3, "num_steps": 48, "eval_every": 8}
compared = {"runs/rlhf/rl": "with the KL penalty", "runs/rlhf-pushed": "without it, at a higher rate"}
if SMALL:
    compared.popitem()
else:
    dpo_jax.run(pushed, "runs/rlhf-pushed")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
for workdir, label in compared.items():
    rows = sorted(records(workdir, "eval"), key=lambda r: r["kl"])
    x = [math.sqrt(max(r["kl"], 0)) for r in rows]
    left.errorbar(x, [r["reward"] for r in rows], [r["reward_error"] for r in rows], fmt="o-", label=label)
    right.errorbar(x, [r["win_rate"] for r in rows], [r["win_rate_error"] for r in rows], fmt="o-", label=label)
left.set(xlabel="√KL from the SFT policy", ylabel="proxy: reward model")
right.set(xlabel="√KL from the SFT policy", ylabel="gold: win rate under the rule")
left.legend()
plt.show()

# %% [markdown]
# Which checkpoint to keep is the gold judge's word, not the proxy's: `export/` is the policy of the evaluation with the highest
# win rate.

# %% [markdown]
# ## 4. DPO, online DPO and RL from one policy
# The same SFT policy, the same number of updates. DPO learns from the data's pairs; online DPO from pairs of its own answers that
# the reward model has judged; RL from all of its answers and their rewards.

# %%
updates = config.num_steps
names = ("batch_size", "eval_pairs", "win_rate_prompts", "kl_prompts", "sample_tokens", "sample_prompts", "attention")
same = {name: config[name] for name in (*names, "max_completion_length", "log_every")}
same |= {"model": "runs/rlhf/sft/export", "sft_steps": 0, "num_steps": updates, "eval_every": updates // 2}
dpo = dpo_jax.get_config("configs/hhh.py:tiny")
dpo.update(same)
online = dpo_jax.get_config("configs/online.py:tiny")
online.update(same)
online.update(collect_judge="runs/rlhf/reward/export", same_judge=False, rounds=2, eval_every=0)
online.update(round_prompts=updates // 2 * config.batch_size)
methods = {"DPO": "runs/rlhf-dpo", "online DPO": "runs/rlhf-online", "RL": "runs/rlhf/rl"}
dpo_jax.run(dpo, methods["DPO"])
if SMALL:
    del methods["online DPO"]
else:
    dpo_jax.run(online, methods["online DPO"])

# %%
print("method       updates  win rate        KL")
for name, workdir in methods.items():
    rows = [r for r in records(workdir, "eval") if r["step"]]
    best = max(rows, key=lambda r: r["win_rate"])
    print(f"{name:12} {best['step']:7}  {best['win_rate']:.3f} ± {best['win_rate_error']:.3f}  {best['kl']:6.2f}")

# %% [markdown]
# Compare at equal KL, not at equal updates, and within the errors. On real data the order depends on the reward model: where it
# is poor, DPO on human pairs is hard to beat; where answers can be checked (mathematics, code), a verifier
# `module:function(prompt, answer, row)` in place of the reward model is the case for RL. [docs/rlhf.md](../docs/rlhf.md) has the
# recipe and what goes wrong.
