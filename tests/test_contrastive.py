"""The contrastive loss against a slow loop, and the whole CLIP against transformers' CLIPModel."""

import math

import pytest
import torch
from oracles import hf_clip, ours
from tools import close, moved_by_breaking, randn, random_ids
from torch.nn import functional as F

from nanovlm.contract import alone
from nanovlm.contrastive import contrastive_loss, positives, similarities

B, E, K, G = 4, 6, 3, 7  # pairs on this rank, width, hard negatives, pairs on all ranks


def slow(image, text, all_image, all_text, right, temperature, negatives=None):
    """Sum over pairs of the mean of both directions; a target is shared evenly between all that are right."""
    total = 0.0
    for b in range(len(image)):
        good = [g for g in range(len(all_text)) if right(b, g)]
        for query, answers, extra in ((image[b], all_text, negatives), (text[b], all_image, None)):
            scores = [query @ a / temperature for a in answers]
            scores += [query @ n / temperature for n in extra[b]] if extra is not None else []
            log_total = torch.stack(scores).logsumexp(0)
            total = total - sum(scores[g] - log_total for g in good) / len(good) / 2
    return total


def loss(image, text, temperature, groups, gather=alone, negatives=None, smoothing=0.0):
    """As CLIP and BLIP-2 put it together."""
    i2t, t2i = similarities(image, text, gather)
    wrong = None if negatives is None else torch.einsum("be,bke->bk", image, negatives) / temperature
    return contrastive_loss(i2t / temperature, t2i / temperature, positives(*groups, gather), wrong, smoothing)


def unit(*shape: int, seed: int):
    return F.normalize(randn(*shape, seed=seed), dim=-1).requires_grad_()


@pytest.mark.parametrize("with_negatives", [False, True])
@pytest.mark.parametrize(("texts", "images"), [
    ([0, 1, 2, 3], [0, 1, 2, 3]),  # all different
    ([0, 1, 1, 3], [0, 1, 2, 3]),  # a caption twice
    ([0, 1, 2, 3], [5, 1, 2, 5]),  # a picture twice
    ([0, 1, 1, 0], [5, 5, 6, 7]),  # both: what is right for one need not be for its neighbour's
])
def test_against_a_loop(texts, images, with_negatives):
    image, text, negatives = unit(B, E, seed=1), unit(B, E, seed=2), unit(B, K, E, seed=3) if with_negatives else None
    temperature = torch.tensor(0.3, requires_grad=True)
    groups = torch.tensor(texts), torch.tensor(images)
    total, count = loss(image, text, temperature, groups, negatives=negatives)

    def right(b, g):
        return texts[b] == texts[g] or images[b] == images[g]

    want = slow(image, text, image, text, right, temperature, negatives)
    assert count.item() == B
    close(total, want)
    inputs = [image, text, temperature] + ([negatives] if with_negatives else [])
    for got, wanted in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(want, inputs), strict=True):
        close(got, wanted)


def test_gathered_pairs_are_candidates_too():
    """This rank's 4 pairs stand at places 2 to 5 of 7; the sums over ranks are the sum over the whole batch."""
    image, text = unit(G, E, seed=4), unit(G, E, seed=5)
    texts, images = torch.tensor([0, 1, 2, 2, 4, 0, 6]), torch.tensor([0, 1, 2, 3, 1, 5, 6])
    whole = {id(x): x for x in (image, text, texts, images)}

    def ranks(part):
        mine = {part_id: x[part] for part_id, x in whole.items()}
        back = {id(x): whole[part_id] for part_id, x in mine.items()}
        return loss(mine[id(image)], mine[id(text)], 0.5, (mine[id(texts)], mine[id(images)]),
                    lambda rows: back[id(rows)])[0]

    want = slow(image, text, image, text, lambda b, g: texts[b] == texts[g] or images[b] == images[g], 0.5)
    close(sum(ranks(part) for part in (slice(0, 2), slice(2, 6), slice(6, 7))), want)


def test_a_blind_guess_costs_the_logarithm():
    same = F.normalize(torch.ones(B, E), dim=-1)
    ids = torch.arange(B)
    negatives = same[:, None].expand(B, K, E)
    total, count = loss(same, same, torch.tensor(0.07), (ids, ids), negatives=negatives)
    assert (total / count).item() == pytest.approx((math.log(B) + math.log(B + K)) / 2)


@pytest.mark.parametrize("way", [0, 1])
def test_the_best_of_several_vectors_counts(way):
    """BLIP-2: an image is Q vectors; a text is as close as the closest of them, in both directions."""
    image, text = unit(B, 3, E, seed=6), unit(5, E, seed=7)
    got = similarities(image, text[:B], alone)[way]
    for i in range(B):
        for j in range(B):
            a, b = (i, j) if way == 0 else (j, i)
            close(got[i, j], torch.stack([image[a, q] @ text[b] for q in range(3)]).max())
    assert (got - torch.einsum("bqe,ge->bg", image, text[:B]) / 3).abs().max() > 0.1, "the mean is something else"


def test_smoothing_spreads_a_part_of_the_target():
    image, text, groups = unit(B, E, seed=8), unit(B, E, seed=9), (torch.arange(B), torch.arange(B))
    got, _ = loss(image, text, 0.4, groups, smoothing=0.1)
    scores = image @ text.T / 0.4
    want = 0.0
    for rows in (scores, scores.T):
        log_p = rows.log_softmax(dim=1)
        want = want - sum(0.9 * log_p[b, b] + 0.1 * log_p[b].mean() for b in range(B)) / 2
    close(got, want)


# --- CLIP as a whole ---

def clip_batch(seed: int = 0):
    """Four captions of different lengths, each ending in CLIP's </s> (52), padded on the right."""
    lengths = torch.tensor([11, 4, 8, 2])
    columns = torch.arange(11)
    ids = random_ids(4, 11, seed).masked_fill(columns == lengths[:, None] - 1, 52)
    mask = columns < lengths[:, None]
    return randn(4, 3, 20, 20, seed=seed), ids.masked_fill(~mask, 0), mask


def test_clip_embeddings_and_loss():
    hf = hf_clip(1)
    model = ours(hf)
    images, ids, mask = clip_batch()
    with torch.no_grad():
        want = hf(input_ids=ids, pixel_values=images, attention_mask=mask.long(), return_loss=True)
        close(model.encode_image(images), want.image_embeds)
        close(model.encode_text(ids, mask), want.text_embeds)
        close(model.score(images, ids, mask) / model.temperature, want.logits_per_image)
        groups = torch.arange(4)
        total, count = model.losses({"images": images, "input_ids": ids, "attention_mask": mask, "text_group": groups,
                                     "image_group": groups})["itc"]
        close(total / count, want.loss)


def test_the_weights_of_the_parity_test_bite():
    images, ids, mask = clip_batch()
    groups = torch.arange(4)
    batch = {"images": images, "input_ids": ids, "attention_mask": mask, "text_group": groups, "image_group": groups}
    moved = moved_by_breaking(ours(hf_clip(1)), lambda m: m.losses(batch)["itc"][0])
    assert min(moved.values()) > 1e-3, moved


def test_what_follows_the_last_token_does_not_count():
    model = ours(hf_clip(2))
    _, ids, mask = clip_batch()
    other = ids.masked_fill(~mask, 33)
    assert torch.equal(model.encode_text(other, mask), model.encode_text(ids, mask))


def test_hard_negatives_are_only_for_their_own_image():
    """Against the loop, in which an image meets its own ones alone; also after image 2 got others."""
    model = ours(hf_clip(3))
    images, ids, mask = clip_batch()
    groups = torch.arange(4)
    batch = {"images": images, "input_ids": ids, "attention_mask": mask, "text_group": groups, "image_group": groups,
             "negative_ids": random_ids(8, 11, 9).view(4, 2, 11), "negative_mask": torch.ones(4, 2, 11).bool()}
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(ids, mask)
        wrong = [model.encode_text(batch["negative_ids"][:, k], batch["negative_mask"][:, k]) for k in (0, 1)]
        negatives = torch.stack(wrong, dim=1)

        def want():
            return slow(image, text, image, text, lambda b, g: b == g, model.temperature, negatives)

        before = model.losses(batch)["itc"][0]
        close(before, want())
        batch["negative_ids"][2], batch["negative_mask"][2] = ids[2], mask[2]
        negatives[2] = text[2]
        after = model.losses(batch)["itc"][0]
        close(after, want())
    assert (after - before).abs() > 0.01


def test_temperature_is_clamped():
    model = ours(hf_clip(4))
    images, ids, mask = clip_batch()
    groups = torch.arange(4)
    batch = {"images": images, "input_ids": ids, "attention_mask": mask, "text_group": groups, "image_group": groups}
    with torch.no_grad():
        losses = []
        for value in (0.01, 0.0001, -1.0, 0.02):
            model.temperature.fill_(value)
            losses.append(model.losses(batch)["itc"][0].item())
    assert losses[0] == losses[1] == losses[2] != losses[3]
