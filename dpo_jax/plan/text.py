"""An estimate as text."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.parallel.tpu import GIB


def _head(r: Mapping[str, Any]) -> str:
    """Where it runs."""
    mesh = " x ".join(f"{name} {size}" for name, size in r["mesh"].items())
    return f"{r['topology']} ({r['accelerator_type']}, {r['chips']} chips, {mesh})"


def _received(r: Mapping[str, Any]) -> str:
    """What a device receives over the interconnect, and over the network between slices if there is one."""
    moved, sent = (
        ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in sorted(r[by].items()))
        for by in ("interconnect_bytes", "network_bytes")
    )
    return f"{moved or 'none'} MB" + (f"; over the network between slices {sent} MB" if sent else "")


def report_lines(r: Mapping[str, Any]) -> list[str]:
    """An estimate as text. Memory and bytes are those of one JAX device, the rest of the whole topology."""
    rows = "; ".join(
        f"{s['rows']} x [{'|'.join(map(str, s['widths']))}] ({s['share']:.0%} of steps)" for s in r["rows"]
    )
    memory = {name: size / GIB for name, size in r["memory"].items()}
    available = r["hbm_available"] / GIB
    held = ", ".join(f"{name} {memory[name]:.2f}" for name in ("parameters", "optimizer", "reference"))
    one = "chip" if r["devices_per_chip"] == 1 else f"device, {r['devices_per_chip']} a chip"
    lines = [
        f"{_head(r)}: {'fits' if r['fits'] else 'DOES NOT FIT'}",
        f"  rows          {rows}; {r['batch_size']} {r['unit']}, {r['useful_token_fraction']:.1%} of tokens real",
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
        f"  at the bound  {r['pairs_per_second']:.1f} {r['unit']}/s ({r['pairs_per_second_per_chip']:.2f} a chip), "
        f"{share['at_the_bound']:.0%} of peak at {r['needed_per_parameter_and_token']}N a real token "
        f"({share['if_compute_bound']:.0%} if compute bound it)",
        f"  run           {r['epochs']:g} epochs in {r['hours']:.2f} h at the bound"
        + (" of updates" if r["unit"] == "prompts" else f"; evaluation {r['evaluation_pairs_per_second']:.0f} pairs/s"),
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


def sampling_lines(r: Mapping[str, Any]) -> list[str]:
    """An estimate of sampling as text. Memory and bytes are those of one JAX device, the rest of the whole topology."""
    memory, available = {name: size / GIB for name, size in r["memory"].items()}, r["hbm_available"] / GIB
    one = "chip" if r["devices_per_chip"] == 1 else f"device, {r['devices_per_chip']} a chip"
    held = (
        f"weights {memory['weights']:.2f} ({r['parameters']}, {r['param_dtype']}), prompts {memory['prompts']:.2f}, "
        f"pages {memory['pages']:.2f} ({r['cache_dtype']})"
    )
    lines = [
        f"{_head(r)}: {'fits' if r['fits'] else 'DOES NOT FIT'}",
        f"  rows          {r['rows']} answers at once ({r['rows_per_device']} a device), {r['n']} to a prompt; prompts "
        f"of {r['prompt']}, answers of {r['tokens']} tokens in pages of {r['page']}, counted when all pages are full",
    ]
    if not r["fits"]:
        return [
            *lines,
            f"  too large     {r['why']}",
            f"  held          {held} GiB of {available:.2f} (a {one})",
            "  to mend       more chips, fewer sample_rows, cache_dtype=int8",
        ]
    step, prefill, compiled = r["step"], r["prefill"], r["compile_seconds"]
    clocks = lambda seconds: ", ".join(f"{name} {1e3 * time:.2f} ms" for name, time in seconds.items() if time)
    lines += [
        f"  HBM           {held}, temporaries {memory['temporaries']:.2f}, total {memory['total']:.2f} (prompts' "
        f"program {prefill['total'] / GIB:.2f}, while the cache grows {memory['moving']:.2f}) of {available:.2f} GiB "
        f"(a {one})" + ("" if r["sampler_lets"] else "; the sampler keeps a fifth free, and would give up answers"),
        f"  a step        HBM {step['hbm_bytes'] / 1e9:.3f} GB, {step['ratio']:.3f}x of weights and cache "
        f"({step['needed_bytes'] / 1e9:.3f}); a chunk's end {step['chunk_hbm_bytes'] / r['page'] / 1e9:.3f} GB more "
        f"({step['chunk_hbm_bytes'] / 1e9:.2f} once in {r['page']} steps)",
        f"  collectives   {step['collectives']:.0f} a step; a {one} receives {_received(step)}",
        f"  time bounds   {clocks(r['seconds'])}; {r['binds']} binds",
        f"  at the bound  {r['tokens_per_second']:,.0f} tokens/s ({r['tokens_per_second_per_chip']:,.0f} a chip), "
        f"{r['tokens_per_second_in_sequence']:,.0f} if collectives hide behind nothing; with prompts "
        f"{r['tokens_per_second_with_prefill']:,.0f}",
        f"  prompts       {prefill['rows']} rows of {prefill['width']}: {prefill['tokens_per_second']:,.0f} tokens/s "
        f"at the bound; {clocks(prefill['bounds'])}; {prefill['binds']} binds",
    ]
    if other := r.get("other_mesh"):
        mesh = " x ".join(f"{name} {size}" for name, size in other["mesh"].items())
        lines.append(
            f"  other mesh    {mesh}: {clocks(other['seconds'])}; {other['tokens_per_second']:,.0f} tokens/s, "
            f"{other['tokens_per_second_in_sequence']:,.0f} if collectives hide behind nothing"
        )
    lines.append(f"  compiled in   {compiled['decode']:.0f} s (decoding), {compiled['prefill']:.0f} s (prompts)")
    if missing := [*r["not_counted"], *prefill["not_counted"]]:
        lines.append(f"  not counted   {', '.join(missing)}: FLOPs and times above are too low")
    return lines


def iteration_lines(r: Mapping[str, Any]) -> list[str]:
    """An iteration of RL or a round as text: answers are drawn and scored, and updates are made."""
    memory, available = {name: size / GIB for name, size in r["memory"].items()}, r["hbm_available"] / GIB
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in r["seconds"].items())
    held = ", ".join(f"{name} {size:.2f}" for name, size in memory.items() if name != "total")
    return [
        f"  {r['name']:<13} {r['prompts']:,} prompts x {r['n']} answers of {r['answer']:.0f} tokens, "
        f"{r['updates']:,} update{'s' if r['updates'] > 1 else ''}: {parts} at the bounds; "
        f"{r['answers_per_second']:.1f} answers/s",
        f"  while drawing {held}, total {memory['total']:.2f} of {available:.2f} GiB"
        + ("" if r["fits"] else ": DOES NOT FIT; fewer prompts, more chips, optimizer_offload, reference_offload"),
        "  resharding    the parameters draw as they are trained; a device receives "
        f"{_received(r['sampling']['step'])} a token's step",
    ]


def rows_line(r: Mapping[str, Any]) -> str:
    """The result of the search for the most rows."""
    return f"  largest rows  {r['largest_rows']} answers at once fit, of the sizes that the sampler takes"
