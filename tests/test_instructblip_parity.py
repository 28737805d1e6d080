"""InstructBLIP against transformers: on a LLaMA and on a T5, pictures and clips; logits, losses, what is said, what is ranked first.

Instructions of several lengths, padded on either side in either reader's words.
"""

import pytest
import torch
import transformers
from oracles import QUERIES, for_clips, hf_instructblip, hf_instructblip_t5, ours, scores, without_key_bias
from test_blip2 import LENGTHS, SIDES, B, T, prompts
from tools import bite, close, moved_by_breaking, pad_mask, randn, random_ids
from torch.nn import functional as F

from nanovlm import masks
from nanovlm.papers.instructblip import FRAMES, InstructBLIP
from nanovlm.t5 import T5

T_Q = 6
ANSWERS = random_ids(B, 5, 7).masked_fill(~pad_mask([5, 2, 4, 1], "right", 5), -100)
CANDIDATES = ([7], [8, 9, 10], [7, 31])
BUILDERS = {"llama": hf_instructblip, "t5": hf_instructblip_t5}
EACH = pytest.mark.parametrize("kind", BUILDERS)


def asked(side: str, seed: int = 1, queries: int = QUERIES, frames: int = 0) -> tuple[dict, dict]:
    """A batch of instructions about pictures, or clips of so many frames: as our forward takes it, and as theirs does."""
    images, ids, mask, theirs = prompts(side, seed, queries * max(1, frames))
    question = {"qformer_input_ids": random_ids(B, T_Q, seed + 5), "qformer_attention_mask": pad_mask([6, 3, 1, 4], side, T_Q)}
    if frames:
        images = theirs["pixel_values"] = randn(B, frames, 3, 20, 20, seed=seed)
    theirs |= {"qformer_input_ids": question["qformer_input_ids"], "qformer_attention_mask": question["qformer_attention_mask"].long()}
    return {"images": images, "input_ids": ids, "attention_mask": mask, **question}, theirs


def row(theirs: dict, b: int) -> dict:
    """One row alone, without its padding: a LLaMA counts places of padding in `forward`, and does not in `generate`."""
    one = {name: tensor[b:b + 1] for name, tensor in theirs.items()}
    real = one["attention_mask"][0].bool()
    return one | {name: one[name][:, real] for name in ("input_ids", "attention_mask")}


def their_logits(hf: torch.nn.Module, theirs: dict, **more) -> torch.Tensor:
    with torch.no_grad():
        return hf(**theirs, **more).logits


# --- logits and losses ---

@SIDES
@pytest.mark.parametrize("queries", [QUERIES, 5])
@pytest.mark.parametrize("frames", [0, FRAMES])
def test_logits_and_loss_on_a_llama(side, queries, frames):
    hf = hf_instructblip(1, queries)
    model, theirs_model, P = ours(hf), for_clips(hf) if frames else hf, queries * max(1, frames)
    assert type(model) is InstructBLIP and model.config.asks and model.config.qformer.queries == queries
    batch, theirs = asked(side, 1, queries, frames)
    labels = batch["input_ids"].masked_fill(~batch["attention_mask"], -100)
    if side == "left":  # there the first token would be predicted from padding
        labels = labels.masked_fill(~F.pad(batch["attention_mask"], (1, 0))[:, :-1], -100)
    with torch.no_grad():
        got = model(**batch, labels=labels)
        total, count = model.losses(batch | {"labels": labels})["lm"]
    close(total / count, got.loss)
    assert got.logits.shape == (B, P + T, 53) and count == (labels != -100).sum()
    real, surprise = masks.with_queries(P, batch["attention_mask"]), []
    for b in range(B):
        want = their_logits(theirs_model, row(theirs, b))[0]
        assert want.std() > 0.1
        print(f"{side}, {queries} queries, {frames} frames, row {b}: {(got.logits[b][real[b]] - want).abs().max():.1e}")
        close(got.logits[b][real[b]], want)
        said = F.pad(labels, (P, 0), value=-100)[b][real[b]]
        surprise.append(F.cross_entropy(want[:-1], said[1:], reduction="sum"))
    close(got.loss, sum(surprise) / count)
    if side == "right":
        with torch.no_grad():
            want = theirs_model(**theirs, labels=F.pad(labels, (P, 0), value=-100))
        close(got.logits[real], want.logits[real])
        close(got.loss, want.loss)


@SIDES
@pytest.mark.parametrize("queries", [QUERIES, 5])
@pytest.mark.parametrize("frames", [0, FRAMES])
def test_logits_and_loss_on_a_t5(side, queries, frames):
    hf = hf_instructblip_t5(1, queries)
    model, batch_theirs = ours(hf), asked(side, 1, queries, frames)
    assert type(model) is InstructBLIP and type(model.language) is T5 and model.config.language.activation == "geglu"
    batch, theirs = batch_theirs
    with torch.no_grad():
        want = (for_clips(hf) if frames else hf)(**theirs, labels=ANSWERS)
        got = model(**batch, labels=ANSWERS)
        total, count = model.losses(batch | {"labels": ANSWERS})["lm"]
    assert want.logits[ANSWERS != -100].std() > 0.1
    print(f"{side}, {queries} queries, {frames} frames: {(got.logits[:, :-1] - want.logits)[ANSWERS != -100].abs().max():.1e}")
    close(got.logits[:, :-1][ANSWERS != -100], want.logits[ANSWERS != -100])
    close(got.loss, want.loss)
    close(total / count, want.loss)
    assert count == (ANSWERS != -100).sum()


@EACH
def test_the_weights_bite(kind):
    """All but the parts that reach nothing: what the last layer makes of the instruction."""
    batch, _ = asked("right")
    model = ours(BUILDERS[kind](1))
    moved = moved_by_breaking(model, lambda m: m(**batch, labels=ANSWERS if kind == "t5" else None).logits)
    idle = {name for name in moved if name.startswith(model.unheard)}
    assert len(idle) == 6 and not any(moved[name] for name in idle)
    assert min(moved[name] for name in moved.keys() - idle) > 1e-3, moved


def test_every_size_of_the_config_is_read():
    """Another eps of the vision tower changes its norm behind, too; another number of layers between two looks at the picture."""
    config = hf_instructblip(1).config.to_dict()
    config["vision_config"]["layer_norm_eps"], config["qformer_config"]["cross_attention_frequency"] = 0.3, 3
    hf = bite(transformers.InstructBlipForConditionalGeneration(transformers.InstructBlipConfig(**config)), 4)
    images, (batch, _) = randn(B, 3, 20, 20, seed=4), asked("right", 4)
    question = {name: batch[name] for name in ("qformer_input_ids", "qformer_attention_mask")}
    with torch.no_grad():
        want = without_key_bias(hf).get_image_features(images, *question.values(), return_dict=True)
        close(ours(hf).encode_image(images), want.last_hidden_state)
        close(ours(hf).image_prefix(images, **question), want.pooler_output)


# --- what is said ---

@EACH
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("frames", [0, FRAMES])
def test_generated_tokens(kind, beams, frames):
    hf = BUILDERS[kind](6)
    batch, theirs = asked("left", 6, frames=frames)
    want = (for_clips(hf) if frames else hf).generate(**theirs, max_new_tokens=7, do_sample=False, num_beams=beams, eos_token_id=2, pad_token_id=0)
    got = ours(hf).generate(batch, 7, [2], beams=beams)
    want = want[:, 1:] if kind == "t5" else want  # theirs begins with <start>, or with the prompt
    assert got.tolist() == want[:, want.shape[1] - got.shape[1]:].tolist()
    assert len(set(map(tuple, got.tolist()))) > 1


@pytest.mark.parametrize("frames", [0, FRAMES])
def test_candidates_are_ranked_by_the_log_probability_of_their_tokens(frames):
    """By hand from the oracle's logits of prompt and candidate together, row by row."""
    hf = hf_instructblip(3)
    batch, theirs = asked("left", 3, frames=frames)
    got = scores(ours(hf), batch, CANDIDATES)
    hf = for_clips(hf) if frames else hf
    for b, length in enumerate(LENGTHS):
        for c, candidate in enumerate(CANDIDATES):
            one = row(theirs, b)
            one["input_ids"] = torch.cat([one["input_ids"], torch.tensor([candidate])], dim=1)
            one["attention_mask"] = F.pad(one["attention_mask"], (0, len(candidate)), value=1)
            log_p = their_logits(hf, one)[0].log_softmax(dim=-1)
            before = QUERIES * max(1, frames) + length
            close(got[b, c], sum(log_p[before - 1 + i, token] for i, token in enumerate(candidate)))


def test_candidates_are_ranked_on_a_t5():
    hf = hf_instructblip_t5(3)
    batch, theirs = asked("right", 3)
    got = scores(ours(hf), batch, CANDIDATES)
    for c, candidate in enumerate(CANDIDATES):
        log_p = their_logits(hf, theirs, labels=torch.tensor([candidate] * B)).log_softmax(dim=-1)
        close(got[:, c], sum(log_p[:, i, token] for i, token in enumerate(candidate)))
