"""An estimate as text."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.parallel.tpu import GIB


def report_lines(r: Mapping[str, Any]) -> list[str]:
    """An estimate as text. Memory and bytes are those of one JAX device, the rest of the whole topology."""
    mesh = " x ".join(f"{name} {size}" for name, size in r["mesh"].items())
    rows = "; ".join(
        f"{s['rows']} x [{'|'.join(map(str, s['widths']))}] ({s['share']:.0%} of steps)" for s in r["rows"]
    )
    memory = {name: size / GIB for name, size in r["memory"].items()}
    available = r["hbm_available"] / GIB
    held = ", ".join(f"{name} {memory[name]:.2f}" for name in ("parameters", "optimizer", "reference"))
    one = "chip" if r["devices_per_chip"] == 1 else f"device, {r['devices_per_chip']} a chip"
    head = f"{r['topology']} ({r['accelerator_type']}, {r['chips']} chips, {mesh})"
    lines = [
        f"{head}: {'fits' if r['fits'] else 'DOES NOT FIT'}",
        f"  rows          {rows}; {r['batch_size']} pairs, {r['useful_token_fraction']:.1%} of tokens real",
    ]
    if not r["fits"]:
        largest = max(("parameters", "optimizer", "reference"), key=lambda name: memory[name])
        alone = "more than there is before any activation" if sum(memory.values()) > available else "with activations"
        return [
            *lines,
            f"  too large     {r['why']} ({alone})",
            f"  held          {held} GiB of {available:.2f} (a {one}); {largest} most",
            "  to mend       more chips, remat=full, microbatches, optimizer_offload, reference_offload, lora_rank",
        ]
    share, compiled, headroom = r["share_of_peak"], r["compile_seconds"], r["headroom"] / GIB
    moved, sent = (
        ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in sorted(r[by].items()))
        for by in ("interconnect_bytes", "network_bytes")
    )
    clocks = ", ".join(f"{name} {time:.3f} s" for name, time in r["seconds"].items() if time)
    attention = ", ".join(dict.fromkeys(row["attention"] for row in r["rows"]))
    lines += [
        f"  HBM           {held}, activations {memory['activations']:.2f}, total {memory['total']:.2f} (widest rows "
        f"{memory['largest_shape_total']:.2f}) of {available:.2f} GiB (a {one}), "
        + (f"headroom {headroom:.2f}" if headroom >= 0 else "which the compiler accepts: not all are alive together")
        + (f"; host {memory['host']:.2f}" if memory["host"] else ""),
        f"  FLOPs a step  {r['flops']:.3e}, {r['flops_per_8N']:.2f}x of 8N a real token; remat {r['remat']}, "
        f"attention {attention}",
        f"  bytes         a {one}: HBM {r['hbm_bytes'] / 1e9:.1f} GB; interconnect, received: {moved or 'none'} GB"
        + (f"; network between slices: {sent} GB" if sent else ""),
        f"  time bounds   {clocks}; {r['binds']} binds",
        f"  at the bound  {r['pairs_per_second']:.1f} pairs/s ({r['pairs_per_second_per_chip']:.2f} a chip), "
        f"{share['at_the_bound']:.0%} of peak at {r['needed_per_parameter_and_token']}N a real token "
        f"({share['if_compute_bound']:.0%} if compute bound it)",
        f"  run           {r['epochs']:g} epochs in {r['hours']:.2f} h at the bound; evaluation "
        f"{r['evaluation_pairs_per_second']:.0f} pairs/s",
        f"  compiled in   {compiled['train']:.0f} s (step), {compiled['evaluation']:.0f} s (evaluation)",
    ]
    if r["not_counted"]:
        lines.append(f"  not counted   {', '.join(r['not_counted'])}: FLOPs and times above are too low")
    return lines


def tried_line(batch: int, need: float | None) -> str:
    """What a batch that the search tries needs, in bytes; None: it does not fit."""
    return f"  tried         {batch} pairs: " + ("do not fit" if need is None else f"{need / GIB:.2f} GiB")


def search_line(r: Mapping[str, Any], pairs: int) -> str:
    """The result of the search for the largest batch, among the `pairs` of an epoch."""
    largest, unit = r["largest_batch"], r["mesh"]["data"] * r["mesh"]["fsdp"] * r["microbatches"]
    all_of_them = f"; an epoch has no more ({pairs:,})" if largest + unit > pairs else ""
    return f"  largest batch {largest} pairs fit{all_of_them}"
