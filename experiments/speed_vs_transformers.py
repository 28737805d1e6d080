"""How fast is the readable code? The tiny LLaVA against transformers' LlavaForConditionalGeneration.

    python -m experiments.speed_vs_transformers                              about a minute on two cores
    python -m experiments.speed_vs_transformers --device cuda --dtype bf16

Compared: the same architecture (sizes of llava/tiny, projector of two layers), the same weights (through
`nanovlm.hub.from_hf`), the same batch, the same optimiser, in one process, each from pixels and ids to the result:
features of the frozen encoder are computed anew each time. Before anything is timed the two must agree in logits, in
the losses of three training steps and in every generated token (fp32; bf16 rounds differently and is not compared).
    training     stage 2: forward, backward and AdamW step of projector and LM, vision encoder frozen
    generation   greedy, with key-value caches, a fixed number of new tokens, prompts of different lengths
Rounds alternate ours and theirs, so that a busy machine slows both; the ratio theirs/ours is taken within each round.

Not compared: data loading, tokenising, sampling, full-size models (their kernels are the same, and the overhead that
decides here vanishes there). Nothing is compiled, on either side. What the classes do differently is part of the
result: transformers computes the vision encoder's last block, which LLaVA throws away, and logits at every position for
the loss; ours stops before that block and sends only trained positions through the head. Theirs takes N ids for an
image's N tokens, ours one; both sequences have the same length inside.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from nanovlm.hub import from_hf
from nanovlm.lm_loss import mean_loss
from nanovlm.papers.llava import LLaVA
from nanovlm.recipes.backbones import TINY_LANGUAGE, TINY_VISION

IMAGE_ID = 3
RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_theirs() -> nn.Module:
    """LlavaForConditionalGeneration with the sizes of llava/tiny; weights large enough to have clear favourites."""
    vision = transformers.CLIPVisionConfig(
        image_size=TINY_VISION.image_size, patch_size=TINY_VISION.patch, hidden_size=TINY_VISION.width,
        num_hidden_layers=TINY_VISION.layers, num_attention_heads=TINY_VISION.heads,
        intermediate_size=TINY_VISION.ffn)
    text = transformers.LlamaConfig(
        vocab_size=TINY_LANGUAGE.vocab, hidden_size=TINY_LANGUAGE.width, num_hidden_layers=TINY_LANGUAGE.layers,
        num_attention_heads=TINY_LANGUAGE.heads, intermediate_size=TINY_LANGUAGE.ffn,
        max_position_embeddings=TINY_LANGUAGE.max_positions, rms_norm_eps=TINY_LANGUAGE.eps)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=TINY_VISION.grid ** 2))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_ours(theirs: nn.Module) -> LLaVA:
    return from_hf(theirs.config.to_dict(), copy.deepcopy(theirs.state_dict())).eval()


def padded(rows: list[list[int]], value: int, side: str, device: str) -> Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, fill)], device=device)


def conversations(rows: int, longest: int, marks: int, side: str, device: str) -> dict[str, Tensor]:
    """Random ids, half to all of `longest`, with `marks` ids for the image in front; the last third is learned."""
    generator = torch.Generator().manual_seed(rows)
    ids = []
    for length in torch.linspace(longest // 2, longest, rows).long().tolist():
        text = torch.randint(4, TINY_LANGUAGE.vocab, (length,), generator=generator).tolist()
        ids.append(text[:5] + [IMAGE_ID] * marks + text[5:])
    labels = [[-100] * (len(row) - longest // 3) + row[-(longest // 3):] for row in ids]
    return {"input_ids": padded(ids, 0, side, device), "labels": padded(labels, -100, side, device),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, side, device).bool()}


def make_batch(rows: int, longest: int, side: str, device: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """The same conversations for ours, one id for an image, and for theirs, an id for each of its N tokens."""
    size = TINY_VISION.image_size
    images = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ours = conversations(rows, longest, 1, side, device)
    theirs = conversations(rows, longest, TINY_VISION.grid ** 2, side, device)
    return ours | {"images": images}, theirs | {"pixel_values": images}


def training_step(model: nn.Module, trained: list[nn.Module], loss: Callable[[], Tensor]) -> Callable[[], float]:
    """A function that does one optimiser step and returns its loss."""
    model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        return value.item()
    return step


def training_pair(rows: int, longest: int, device: str, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """One training step of ours and of theirs, which have been found to do the same."""
    torch.manual_seed(0)
    theirs = make_theirs().to(device, dtype)
    ours = make_ours(theirs)
    our_batch, their_batch = make_batch(rows, longest, "right", device, dtype)
    pair = (training_step(ours, [ours.projector, ours.language], lambda: mean_loss(ours.losses(our_batch))),
            training_step(theirs, [theirs.model.multi_modal_projector, theirs.model.language_model, theirs.lm_head],
                          lambda: theirs(**their_batch).loss))
    for number in range(3):
        a, b = pair[0](), pair[1]()
        if dtype == torch.float32 and abs(a - b) > 1e-3:
            raise SystemExit(f"training step {number}: our loss is {a:.6f}, theirs {b:.6f}; nothing was timed")
    return pair


def generation_pair(rows: int, longest: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Greedy generation of ours and of theirs, which have been found to say the same."""
    torch.manual_seed(0)
    theirs = make_theirs().to(device, dtype)
    ours = make_ours(theirs)
    our_batch, their_batch = make_batch(rows, longest, "left", device, dtype)
    del our_batch["labels"], their_batch["labels"]
    theirs.generation_config.eos_token_id = None  # with random weights a row would end by chance, and stop early
    settings = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0)
    prompt = their_batch["input_ids"].shape[1]
    pair = (lambda: ours.generate(our_batch, tokens, stop=()),
            lambda: theirs.generate(**their_batch, generation_config=settings)[:, prompt:])
    with torch.no_grad():
        logits = ours(**our_batch, pad="left").logits - theirs(**their_batch).logits
    off = logits[their_batch["attention_mask"]].abs().max().item()
    same = torch.equal(pair[0](), pair[1]())
    if dtype == torch.float32 and (off > 1e-3 or not same):
        raise SystemExit(f"generation of {rows}: logits differ by {off:.1e}, tokens equal: {same}; nothing was timed")
    return pair


def seconds(run: Callable, repeats: int, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def measure(name: str, pair: tuple[Callable, Callable], rounds: int, repeats: int, device: str) -> dict:
    """Rounds of ours and theirs, each first in every other one."""
    times = []
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        taken = {which: seconds(pair[which], repeats, device) for which in order}
        times.append((taken[0], taken[1]))
    ratios = [theirs / ours for ours, theirs in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ours, theirs = (1000 * statistics.median(column) for column in zip(*times))
    print(f"{name:<40}{ours:>10.1f}{theirs:>14.1f}{middle:>12.2f}   {low:.2f} to {high:.2f}", flush=True)
    return {"name": name, "ours_ms": round(ours, 2), "theirs_ms": round(theirs, 2), "rounds": rounds,
            "ratio": {"median": round(middle, 3), "lower_quartile": round(low, 3), "upper_quartile": round(high, 3),
                      "lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each answer")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device, dtype = args.device, DTYPES[args.dtype]
    processor = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} {platform.machine()} cores"
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, {args.dtype}\n")
    print(f"{'milliseconds (medians)':<40}{'ours':>10}{'transformers':>14}{'ratio':>12}   quartiles")
    cases = [measure("training step, 32 conversations", training_pair(32, 70, device, dtype), args.rounds, 3, device)]
    for rows in (1, 32):
        pair = generation_pair(rows, 40, args.tokens, device, dtype)
        cases.append(measure(f"{args.tokens} new tokens, batch of {rows}", pair, args.rounds, 2, device))
    RESULTS.mkdir(exist_ok=True)
    kind = "" if (device, args.dtype) == ("cpu", "fp32") else f"_{device}_{args.dtype}"
    machine = {"processor": processor, "threads": torch.get_num_threads(), "python": platform.python_version(),
               "torch": torch.__version__, "transformers": transformers.__version__, "dtype": args.dtype}
    text = json.dumps({"ratio": "transformers / ours: above 1 ours is faster", "machine": machine, "cases": cases},
                      indent=2)
    (RESULTS / f"speed_vs_transformers{kind}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
