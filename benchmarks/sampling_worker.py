"""One engine that answers prompts when it is told to: a process of `sampling.py`, in the engine's own environment.

Peers need nothing of dpo_jax. Every engine draws from the whole vocabulary, in float32, and gives token ids: those up
to the one that stops an answer are counted, with that one.

    python -m benchmarks.sampling_worker --gate IN,OUT --engine NAME --model DIR --prompts FILE --threads 2
        --max-tokens 128 --at-once 64
"""

import argparse
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gate import Gate

Ids = list[int]


class Case(argparse.Namespace):
    """What to answer: `prompts` (positions in the file), `n`, `max_tokens`, `temperature` (0 or 1), `seed`."""


# All n answers to every prompt.
Engine = Callable[[list[Ids], Case], list[list[Ids]]]


def parts(prompts: list[Ids], most: int) -> Iterator[list[int]]:
    """Positions of prompts, in parts of at most `most` of about one length, the longest first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), most):
        yield order[start : start + most]


def counted(ids: Sequence[int], stops: Sequence[int]) -> Ids:
    """Up to the first of `stops`, with it."""
    ends = [i for i, token in enumerate(ids) if token in stops]
    return list(ids[: ends[0] + 1] if ends else ids)


def dpo_jax(a: argparse.Namespace, file: dict[str, Any]) -> Engine:
    """dpo_jax's `Sampler`, as it comes; the rows that it decodes at once are its own choice."""
    from dpo_jax import load_policy
    from dpo_jax.sampling.engine import Capacity, Sampler
    from dpo_jax.sampling.params import SamplingParams

    policy, layout, params = load_policy(a.model)
    sampler = Sampler(layout, policy.tokenizer, file["stops"], Capacity(rows=a.at_once))

    def answer(prompts: list[Ids], case: Case) -> list[list[Ids]]:
        asked = SamplingParams(
            n=case.n, max_tokens=case.max_tokens, temperature=float(case.temperature), seed=case.seed
        )
        return [[x.token_ids for x in answers] for answers in sampler.answers(params, prompts, asked)]

    return answer


def torch_model(a: argparse.Namespace) -> Any:
    import torch
    import transformers

    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def torch_asked(file: dict[str, Any], case: Case) -> Any:
    """A generation config; top_k would be 50 if it was not said."""
    import transformers

    drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if case.temperature else {}
    return transformers.GenerationConfig(
        do_sample=bool(case.temperature),
        max_new_tokens=case.max_tokens,
        num_return_sequences=case.n,
        eos_token_id=file["stops"],
        pad_token_id=file["stops"][0],
        **drawn,
    )


def generate(a: argparse.Namespace, file: dict[str, Any]) -> Engine:
    """transformers' `generate`: prompts of about one length padded on the left, with SDPA and its growing cache."""
    import torch

    model = torch_model(a)

    def answer(prompts: list[Ids], case: Case) -> list[list[Ids]]:
        torch.manual_seed(case.seed)
        config = torch_asked(file, case)
        found: list[list[Ids]] = [[] for _ in prompts]
        for part in parts(prompts, max(1, a.at_once // case.n)):
            width = max(len(prompts[i]) for i in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(part):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            with torch.inference_mode():
                drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for row, out in enumerate(drawn[:, width:].tolist()):
                found[part[row // case.n]].append(out)
        return found

    return answer


def continuous(a: argparse.Namespace, file: dict[str, Any]) -> Engine:
    """transformers' continuous batching: pages, rows that leave and enter, prompts prefilled once for all answers."""
    import torch
    import transformers

    model = torch_model(a)
    page = 32
    longest = max(map(len, file["prompts"])) + a.max_tokens

    def answer(prompts: list[Ids], case: Case) -> list[list[Ids]]:
        torch.manual_seed(case.seed)
        config = transformers.ContinuousBatchingConfig(
            page_size=page,
            num_blocks=a.at_once * -(-longest // page),
            max_batch_tokens=max(512, longest),
            max_requests_per_batch=a.at_once,
            seed=case.seed,
        )
        with torch.inference_mode():
            done = model.generate_batch(
                prompts, generation_config=torch_asked(file, case), continuous_batching_config=config, warmup=False
            )
        found = [result.generated_tokens for result in done.values()]
        if len(found) != len(prompts) * case.n or not all(found):
            raise RuntimeError(f"{len(prompts) * case.n} answers were asked for, {sum(map(bool, found))} came")
        return [found[i : i + case.n] for i in range(0, len(found), case.n)]

    return answer


def tunix(a: argparse.Namespace, file: dict[str, Any]) -> Engine:
    """google-tunix's `Sampler`: it computes a prompt as often as there are answers, which nothing in it shares."""
    import jax
    from tunix.generate import sampler
    from tunix.models.llama3 import model as llama

    from benchmarks.tunix_worker import load

    # The model of 0.1.7 does not hand the config's rope_theta on, so its default would be used for every model.
    theta = json.loads((Path(a.model) / "config.json").read_text())["rope_theta"]
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    model = load(a.model)
    used = {token for prompt in file["prompts"] for token in prompt} | set(file["stops"])

    class Tokenizer:
        """Token ids as they are. It takes a padding token for padding wherever it stands: one that no prompt has."""

        encode = staticmethod(lambda ids: list(ids))
        decode = staticmethod(lambda ids: "")
        bos_id = staticmethod(lambda: 0)  # puts none in front
        eos_id = staticmethod(lambda: file["stops"][0])
        pad_id = staticmethod(lambda: max(set(range(model.config.vocab_size)) - used))

    @functools.cache
    def sampler_of(width: int) -> Any:
        c = model.config
        cache = sampler.CacheConfig(width + a.max_tokens, c.num_layers, c.num_kv_heads, c.head_dim)
        return sampler.Sampler(model, Tokenizer(), cache)

    def answer(prompts: list[Ids], case: Case) -> list[list[Ids]]:
        rows = [prompt for prompt in prompts for _ in range(case.n)]
        found: list[Ids] = [[] for _ in rows]
        for number, part in enumerate(parts(rows, a.at_once)):
            width = max(64, 1 << (max(len(rows[i]) for i in part) - 1).bit_length())
            some = [rows[i] for i in part]
            some += some[:1] * (min(a.at_once, len(rows)) - len(part))  # so that the last part compiles nothing
            out = sampler_of(width)(
                some,
                max_generation_steps=case.max_tokens,
                max_prompt_length=width,
                eos_tokens=file["stops"],
                temperature=float(case.temperature),
                top_p=1.0 if case.temperature else None,
                seed=jax.random.fold_in(jax.random.key(case.seed), number),
            )
            for i, tokens in zip(part, out.tokens, strict=False):
                # The stop token was drawn and is left out.
                found[i] = [*tokens.tolist(), *file["stops"][: len(tokens) < case.max_tokens]]
        return [found[i : i + case.n] for i in range(0, len(found), case.n)]

    return answer


def llama(a: argparse.Namespace, file: dict[str, Any]) -> Engine:
    """llama-cpp-python's `Llama`: one answer at a time; those after a prompt's first find its keys and values there."""
    import llama_cpp

    longest = max(map(len, file["prompts"])) + a.max_tokens
    model = llama_cpp.Llama(
        a.gguf,
        n_ctx=longest + 1,
        n_batch=512,
        n_threads=a.threads,
        n_threads_batch=a.threads,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )

    def one(prompt: Ids, case: Case, number: int) -> Ids:
        model.set_seed(case.seed * 1_000_003 + number)  # every answer would begin with the same one
        drawn: Ids = []
        chosen = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0}
        for token in model.generate(prompt, temp=float(case.temperature), **chosen):
            drawn.append(token)
            if token in file["stops"] or len(drawn) == case.max_tokens:
                break
        return drawn

    def answer(prompts: list[Ids], case: Case) -> list[list[Ids]]:
        return [[one(prompt, case, i * case.n + k) for k in range(case.n)] for i, prompt in enumerate(prompts)]

    return answer


ENGINES = {
    "dpo_jax": dpo_jax,
    "transformers": generate,
    "continuous": continuous,
    "tunix": tunix,
    "llama": llama,
}


def count_compiled(counts: list[float]) -> None:
    """Put the seconds of every program that JAX compiles into `counts`."""
    import jax

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gate", required=True)
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, type=Path)
    parser.add_argument("--threads", required=True, type=int)
    parser.add_argument("--max-tokens", required=True, type=int, help="the most tokens of any answer")
    parser.add_argument("--at-once", required=True, type=int, help="the most answers that are decoded at once")
    parser.add_argument("--gguf", default="", help="the model's file for llama.cpp")
    a = parser.parse_args()
    gate = Gate(a.gate)
    if hasattr(os, "sched_setaffinity"):  # the same cores for all; XLA makes as many threads as there are
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    # OpenMP's threads (torch, llama.cpp) spin while they wait: on cores that others use, too, a tenth of the speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    file = json.loads(a.prompts.read_text())
    engine = ENGINES[a.engine](a, file)
    compiled: list[float] = []
    if a.engine in ("dpo_jax", "tunix"):
        count_compiled(compiled)
    facts: dict[str, Any] = {}
    while told := gate.turn(**facts):
        case = Case(**json.loads(told))
        compiled.clear()
        drawn = engine([file["prompts"][i] for i in case.prompts], case)
        answers = [counted(ids, file["stops"]) for answers in drawn for ids in answers]
        facts = {
            "answers": len(answers),
            "tokens": sum(map(len, answers)),
            "stopped": sum(ids[-1] in file["stops"] for ids in answers),
            "compile_s": sum(compiled),
            "first": answers[0],
        }


if __name__ == "__main__":
    main()
