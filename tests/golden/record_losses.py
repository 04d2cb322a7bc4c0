"""Record losses and gradients of TRL's own trainers on chosen log-probabilities: tests/golden/trl/losses.npz.

From the repository's root, in an environment of its own:

    pip install torch==2.13.0 trl==1.16.0
    python -m tests.golden.record_losses

`DPOTrainer._compute_loss` and the `get_batch_loss_metrics` of `CPOTrainer` and `ORPOTrainer` run as they are, on a
model that says given per-token log-probabilities, which are leaves: the gradient is taken back to every one of them. In
float64, so that what a comparison shows is our rounding (`alpha` in float32: TRL's own clamp knows no other).

`tests/objective/test_losses.py` compares with the file, and with `record` itself where TRL is installed.
"""

import collections
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

OUT = Path(__file__).parent / "trl" / "losses.npz"
PAIRS, LONGEST = 64, 12
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
F_DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}


def _cases() -> list[dict[str, Any]]:
    """dpo_jax's keys; `data` is which log-probabilities. Both betas and both data for every loss."""
    losses: list[dict[str, Any]] = [
        {"loss": name}
        for name in (
            "sigmoid hinge ipo nca_pair bco_pair sppo_hard apo_zero apo_down discopop sft sigmoid_norm orpo".split()
        )
    ]
    losses += [{"loss": name, "label_smoothing": e} for name in ("robust", "aot", "aot_unpaired") for e in (0.0, 0.1)]
    losses += [{"loss": "exo_pair", "label_smoothing": e} for e in (1e-3, 0.1)]
    losses += [{"loss": "simpo", "simpo_gamma": g, "label_smoothing": e} for g, e in ((0.5, 0.0), (1.5, 0.1))]
    losses += [{"loss": "cpo", "cpo_alpha": a, "label_smoothing": e} for a, e in ((1.0, 0.0), (0.3, 0.1))]
    losses += [{"loss": "discopop", "discopop_tau": 0.2}]
    losses += [{"loss": f"{name}:1.0,sft:0.2"} for name in ("sigmoid", "simpo")]
    losses += [{"loss": "sigmoid:0.8,bco_pair:0.2,sft:1.0"}]
    for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "discopop"):
        losses += [{"loss": name, "f_divergence": f} for f in ("forward_kl", "js", "alpha")]
    losses += [{"loss": "exo_pair", "label_smoothing": 1e-3, "f_divergence": "js"}]
    losses += [{"loss": "sigmoid", "f_divergence": "alpha", "f_alpha": a} for a in (0.0, 1.0, 1.5)]
    # Not hinge: TRL multiplies by the weight in place, which ReLU's gradient does not survive.
    losses += [{"loss": name, "wpo": True} for name in ("sigmoid", "ipo", "sppo_hard", "sigmoid:1.0,bco_pair:0.5")]
    losses += [
        {"loss": name, "ld_alpha": a} for name in ("sigmoid", "ipo", "aot", "sigmoid:1.0,sft:0.2") for a in (0.0, 0.4)
    ]
    losses += [{"loss": "sigmoid", "ld_alpha": 0.4, "wpo": True}]
    cases = [c | {"dpo_beta": beta, "data": data} for c in losses for beta in (0.1, 0.5) for data in ("near", "far")]
    # Here TRL's discopop is inf·0.
    lost = lambda c: (c["loss"], c["data"]) == ("discopop", "far") and c.get("f_divergence") in ("forward_kl", "alpha")
    return [c for c in cases if not lost(c)]


CASES = _cases()


def inputs() -> dict[str, np.ndarray]:
    """Lengths `[P, 2]` and, by kind of data, float32 token values `[P, 2, N]`, 0 beyond a completion's end."""
    rng = np.random.default_rng(0)
    shape = (PAIRS, 2, LONGEST)
    lengths = rng.integers(1, LONGEST + 1, shape[:2])
    real = np.arange(LONGEST) < lengths[..., None]
    policy = {"near": -np.exp(rng.normal(size=shape)), "far": -rng.uniform(0.01, 12, shape)}
    reference = {"near": policy["near"] * rng.uniform(0.8, 1.25, shape), "far": -rng.uniform(0.01, 12, shape)}
    out = {"lengths": lengths}
    for data in policy:
        values = {"policy": policy[data], "reference": reference[data], "log_sum_sq": -rng.uniform(0, 4, shape)}
        out |= {f"{data}/{name}": np.where(real, x, 0).astype(np.float32) for name, x in values.items()}
    return out


class _Says(torch.nn.Module):
    """A model whose output is given."""

    is_gradient_checkpointing = False

    def __init__(self, **output: Any) -> None:
        super().__init__()
        self.output = types.SimpleNamespace(**output)
        self.eval()

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _trainer(kind: type, **attributes: Any) -> Any:
    """A trainer without its `__init__`: only what its loss reads."""
    trainer = object.__new__(kind)
    same = lambda x: x
    accelerator = types.SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    common = {"accelerator": accelerator, "aux_loss_enabled": False, "is_encoder_decoder": False}
    for name, value in (common | attributes).items():
        object.__setattr__(trainer, name, value)
    return trainer


def _parts(case: dict[str, Any]) -> dict[str, float]:
    named = (part.partition(":") for part in case["loss"].split(","))
    return {name: float(weight or 1) for name, _, weight in named}


def _dpo(case: dict[str, Any], tokens: dict[str, torch.Tensor], real: torch.Tensor) -> tuple[torch.Tensor, dict]:
    policy = tokens["policy"]
    zeros = torch.zeros_like(policy)
    model = _Says(
        log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros > 1, log_sum_sq_probs=tokens["log_sum_sq"]
    )
    f_divergence = case.get("f_divergence", "reverse_kl")
    args = types.SimpleNamespace(
        gradient_checkpointing_kwargs=None, discopop_tau=case.get("discopop_tau", 0.05), max_length=None
    )
    parts = _parts(case)
    trainer = _trainer(
        DPOTrainer,
        model=model,
        ref_model=_Says(log_probs=tokens["reference"]),
        args=args,
        beta=case["dpo_beta"],
        loss_types=list(parts),
        loss_weights=list(parts.values()),
        label_smoothing=case.get("label_smoothing", 0.0),
        f_divergence_type=F_DIVERGENCES.get(f_divergence, f_divergence),
        f_alpha_divergence_coef=case.get("f_alpha", 0.5),
        use_weighting=case.get("wpo", False),
        ld_alpha=case.get("ld_alpha"),
        precompute_ref_logps=False,
        _metrics={"eval": collections.defaultdict(list)},
        _total_train_tokens=0,
    )
    # One token of prompt, which no position predicts.
    mask = torch.nn.functional.pad(real, (1, 0)).long()
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
    loss = trainer._compute_loss(model, batch, return_outputs=False)
    return loss, {name: trainer._metrics["eval"][name][0] for name in METRICS}


def _reference_free(
    case: dict[str, Any], tokens: dict[str, torch.Tensor], real: torch.Tensor
) -> tuple[torch.Tensor, dict]:
    # Two words: the first has the given log-probability, the second has the rest. Padding is never scored.
    logp = torch.where(real, tokens["policy"], -1.0)
    logits = torch.stack([logp, torch.log(-torch.expm1(logp))], -1)
    model = _Says(logits=torch.nn.functional.pad(logits, (0, 0, 0, 1)))
    mask = torch.nn.functional.pad(real, (1, 0), value=True).long()
    labels = torch.nn.functional.pad(torch.where(real, 0, -100), (1, 0), value=-100)
    batch = {}
    for side, part in (("chosen", slice(None, PAIRS)), ("rejected", slice(PAIRS, None))):
        columns = {"input_ids": torch.zeros_like(labels), "attention_mask": mask, "labels": labels}
        batch |= {f"{side}_{name}": x[part] for name, x in columns.items()}
    parts = _parts(case)
    common = {"beta": case["dpo_beta"], "label_smoothing": case.get("label_smoothing", 0.0), "pad_token_id": 1}
    if "orpo" in parts:
        trainer = _trainer(ORPOTrainer, padding_value=1, **common)
    else:
        simpo = "simpo" in parts
        trainer = _trainer(
            CPOTrainer,
            loss_type="simpo" if simpo else "sigmoid",
            simpo_gamma=case.get("simpo_gamma", 0.5),
            cpo_alpha=parts.get("sft", 0.0) if simpo else case["cpo_alpha"],
            alpha=0.0,
            **common,
        )
    loss, metrics = trainer.get_batch_loss_metrics(model, batch, "train")
    return loss, {name: metrics[name] for name in METRICS}


def record(case: dict[str, Any], data: dict[str, np.ndarray]) -> tuple[float, np.ndarray, list[float]]:
    """TRL's loss, its gradient to every policy token `[P, 2, N]`, and `METRICS`."""
    dtype = torch.float32 if case.get("f_divergence") == "alpha" else torch.float64
    # TRL's batches hold the chosen completions, then the rejected ones.
    flat = lambda x: torch.tensor(x.swapaxes(0, 1).reshape(2 * PAIRS, LONGEST))
    real = flat(np.arange(LONGEST) < data["lengths"][..., None])
    tokens = {name: flat(data[f"{case['data']}/{name}"]).to(dtype) for name in ("policy", "reference", "log_sum_sq")}
    leaf = tokens["policy"].requires_grad_()
    free = {"simpo", "cpo", "orpo"} & set(_parts(case))
    loss, metrics = (_reference_free if free else _dpo)(case, tokens, real)
    loss.backward()
    grad = torch.where(real, leaf.grad, 0.0).numpy().reshape(2, PAIRS, LONGEST).swapaxes(0, 1)
    return float(loss), grad.astype(np.float32), [float(metrics[name]) for name in METRICS]


def moved_reference(reference: np.ndarray, params: np.ndarray, alpha: float) -> np.ndarray:
    """What `SyncRefModelCallback` makes of one weight of a reference."""
    models = []
    for weight in (params, reference):
        models.append(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        models[-1].weight.data = torch.tensor(weight)
    SyncRefModelCallback._sync_target_model(*models, alpha)
    return models[1].weight.detach().numpy()


def main() -> None:
    data = inputs()
    results = [record(case, data) for case in CASES]
    loss, grad, metrics = (np.array(x) for x in zip(*results, strict=True))
    real = np.arange(LONGEST) < data["lengths"][..., None]
    tokens = {name: x[real] if name != "lengths" else x.astype(np.int8) for name, x in data.items()}
    cases = np.array([json.dumps(case) for case in CASES])
    np.savez_compressed(OUT, cases=cases, loss=loss, grad=grad[:, real], metrics=metrics, **tokens)
    print(f"{len(CASES)} cases, {OUT.stat().st_size:,} bytes; not finite: {(~np.isfinite(loss)).sum()}")


if __name__ == "__main__":
    main()
