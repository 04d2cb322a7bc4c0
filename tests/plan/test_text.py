"""What is printed of an estimate."""

from dpo_jax.parallel.tpu import GIB
from dpo_jax.plan.text import report_lines, rows_line, sampling_lines, search_line, tried_line

HEAD = {
    "topology": "v6e:2x4", "accelerator_type": "v6e-8", "chips": 8, "devices_per_chip": 1,
    "mesh": {"data": 1, "fsdp": 8, "tensor": 1}, "batch_size": 64, "unit": "pairs", "microbatches": 2,
    "rows": [
        {"rows": 8, "widths": (512, 128, 128), "share": 0.75, "attention": "splash"},
        {"rows": 8, "widths": (1024, 256, 256), "share": 0.25, "attention": "splash"},
    ],
    "useful_token_fraction": 0.934, "compute_dtype": "bfloat16", "remat": "dots", "hbm_available": 31.25 * GIB,
}  # fmt: skip
HELD = {"parameters": 4 * GIB, "optimizer": 8 * GIB, "reference": 2 * GIB}
FITS = HEAD | {
    "fits": True, "headroom": 3.25 * GIB,
    "memory": HELD | {"activations": 10 * GIB, "total": 24 * GIB, "host": 0.0, "largest_shape_total": 28 * GIB},
    "flops": 1.5e15, "flops_per_8N": 1.01, "needed_per_parameter_and_token": 8, "hbm_bytes": 250e9,
    "interconnect_bytes": {"reduce-scatter": 15e9, "all-gather": 36e9}, "network_bytes": {}, "not_counted": [],
    "seconds": {"compute": 0.14, "hbm": 0.16, "interconnect": 0.26, "network": 0.0, "host": 0.0},
    "binds": "interconnect", "pairs_per_second": 250.0, "pairs_per_second_per_chip": 31.25,
    "share_of_peak": {"at_the_bound": 0.53, "if_compute_bound": 0.99}, "evaluation_pairs_per_second": 900.0,
    "epochs": 1, "hours": 0.18, "compile_seconds": {"train": 60.0, "evaluation": 20.0},
}  # fmt: skip


def test_what_fits():
    lines = report_lines(FITS)
    assert lines == [
        "v6e:2x4 (v6e-8, 8 chips, data 1 x fsdp 8 x tensor 1): fits",
        "  rows          8 x [512|128|128] (75% of steps); 8 x [1024|256|256] (25% of steps); 64 pairs, 93.4% of "
        "tokens real",
        "  HBM           parameters 4.00, optimizer 8.00, reference 2.00, activations 10.00, total 24.00 (widest rows "
        "28.00) of 31.25 GiB (a chip), headroom 3.25",
        "  FLOPs a step  1.500e+15, 1.01x of 8N a real token; remat dots, attention splash",
        "  bytes         a chip: HBM 250.0 GB; interconnect, received: all-gather 36.0, reduce-scatter 15.0 GB",
        "  time bounds   compute 0.140 s, hbm 0.160 s, interconnect 0.260 s; interconnect binds",
        "  at the bound  250.0 pairs/s (31.25 a chip), 53% of peak at 8N a real token (99% if compute bound it)",
        "  run           1 epochs in 0.18 h at the bound; evaluation 900 pairs/s",
        "  compiled in   60 s (step), 20 s (evaluation)",
    ]


def test_what_is_said_only_where_it_matters():
    changed = {"headroom": -1.0, "network_bytes": {"all-reduce": 2e9}, "not_counted": ["my_kernel"]}
    text = "\n".join(report_lines(FITS | changed | {"memory": FITS["memory"] | {"host": GIB}, "devices_per_chip": 2}))
    assert "of 31.25 GiB (a device, 2 a chip), which the compiler accepts" in text
    assert "host 1.00" in text
    assert "network between slices: all-reduce 2.0 GB" in text
    assert "not counted   my_kernel: FLOPs and times above are too low" in text


def test_what_does_not_fit():
    for held, alone in ((HELD, "with activations"), (HELD | {"optimizer": 30 * GIB}, "before any activation")):
        head, _, why, parts, mend = report_lines(HEAD | {"fits": False, "why": "needs 40G of 31.25G", "memory": held})
        assert head.endswith("DOES NOT FIT")
        assert "needs 40G of 31.25G" in why
        assert alone in why
        assert parts.endswith("GiB of 31.25 (a chip); optimizer most")
        assert "more chips, remat=full" in mend


def test_the_search():
    assert tried_line(128, None) == "  tried         128 pairs: do not fit"
    assert tried_line(128, 2.5 * GIB) == "  tried         128 pairs: 2.50 GiB"
    assert search_line(FITS | {"largest_batch": 96}, 10_000) == "  largest batch 96 pairs fit"
    assert search_line(FITS | {"largest_batch": 9_984}, 9_999).endswith("fit; an epoch has no more (9,999)")


CLOCKS = {"compute": 0.0005, "hbm": 0.002, "interconnect": 0.005, "network": 0.0, "host": 0.0}
SPEEDS = {
    "seconds": CLOCKS, "binds": "interconnect", "tokens_per_second": 51_200.0, "tokens_per_second_per_chip": 6_400.0,
    "tokens_per_second_in_sequence": 36_571.4, "tokens_per_second_with_prefill": 50_000.0,
}  # fmt: skip
SAMPLING = {
    "topology": "v6e:2x4", "accelerator_type": "v6e-8", "chips": 8, "devices_per_chip": 1, "fits": True,
    "mesh": {"data": 1, "fsdp": 8, "tensor": 1}, "rows": 256, "rows_per_device": 32, "n": 8, "prompt": 256,
    "tokens": 128, "page": 32, "cache_dtype": "bfloat16", "parameters": "export", "param_dtype": "bfloat16",
    "sampler_lets": True, "hbm_available": 31.25 * GIB, "not_counted": [],
    "compile_seconds": {"decode": 30, "prefill": 60},
    "memory": {"weights": 2 * GIB, "prompts": GIB, "pages": GIB, "temporaries": GIB, "total": 5 * GIB,
               "moving": 6 * GIB},
    "step": {
        "hbm_bytes": 3.3e9, "needed_bytes": 3e9, "ratio": 1.1, "chunk_hbm_bytes": 3.2e9, "collectives": 184.0,
        "interconnect_bytes": {"all-reduce": 999e6, "all-gather": 60e6}, "network_bytes": {},
    },
    "prefill": {
        "rows": 8, "width": 2048, "total": 4 * GIB, "tokens_per_second": 200_000.0, "binds": "interconnect",
        "bounds": CLOCKS, "not_counted": [],
    },
    **SPEEDS,
}  # fmt: skip


def test_sampling():
    other = SPEEDS | {"mesh": {"data": 1, "fsdp": 1, "tensor": 8}}
    assert sampling_lines(SAMPLING | {"other_mesh": other}) == [
        "v6e:2x4 (v6e-8, 8 chips, data 1 x fsdp 8 x tensor 1): fits",
        "  rows          256 answers at once (32 a device), 8 to a prompt; prompts of 256, answers of 128 tokens in "
        "pages of 32, counted when all pages are full",
        "  HBM           weights 2.00 (export, bfloat16), prompts 1.00, pages 1.00 (bfloat16), temporaries 1.00, total "
        "5.00 (prompts' program 4.00, while the cache grows 6.00) of 31.25 GiB (a chip)",
        "  a step        HBM 3.300 GB, 1.100x of weights and cache (3.000); a chunk's end 0.100 GB more (3.20 once in "
        "32 steps)",
        "  collectives   184 a step; a chip receives all-gather 60.0, all-reduce 999.0 MB",
        "  time bounds   compute 0.50 ms, hbm 2.00 ms, interconnect 5.00 ms; interconnect binds",
        "  at the bound  51,200 tokens/s (6,400 a chip), 36,571 if collectives hide behind nothing; with prompts "
        "50,000",
        "  prompts       8 rows of 2048: 200,000 tokens/s at the bound; compute 0.50 ms, hbm 2.00 ms, interconnect "
        "5.00 ms; interconnect binds",
        "  other mesh    data 1 x fsdp 1 x tensor 8: compute 0.50 ms, hbm 2.00 ms, interconnect 5.00 ms; 51,200 "
        "tokens/s, 36,571 if collectives hide behind nothing",
        "  compiled in   30 s (decoding), 60 s (prompts)",
    ]
    lines = sampling_lines(SAMPLING | {"sampler_lets": False, "not_counted": ["my_kernel"]})
    assert lines[2].endswith("(a chip); the sampler keeps a fifth free, and would give up answers")
    assert lines[-1] == "  not counted   my_kernel: FLOPs and times above are too low"
    head, _, why, *_ = sampling_lines(SAMPLING | {"fits": False, "why": "needs 40G of 31.25G"})
    assert head.endswith("DOES NOT FIT")
    assert why == "  too large     needs 40G of 31.25G"
    assert rows_line({"largest_rows": 512}).startswith("  largest rows  512 answers at once fit")
