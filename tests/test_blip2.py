"""BLIP-2 against transformers (captions, answers, retrieval), and stage 1's losses against slow loops and one pass."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from oracles import IMAGE_ID, QUERIES, hf_bert, hf_blip2, hf_blip2_retrieval, hf_blip2_t5, hf_clip_vision, ours, scores
from tools import bite, close, moved_by_breaking, pad_mask, randn, random_ids
from torch.nn import functional as F

from nanovlm import masks
from nanovlm.bert import BertConfig
from nanovlm.contrastive import positives
from nanovlm.errors import UserError
from nanovlm.matching import hard_negatives, matching_loss
from nanovlm.papers import blip2
from nanovlm.papers.blip2 import BLIP2, BLIP2Config, BLIP2Stage1
from nanovlm.qformer import QFormerConfig
from nanovlm.runs import watch
from nanovlm.runs.run import Options, run
from nanovlm.t5 import T5
from nanovlm.training.weights import load_published
from nanovlm.vit import ViTConfig, clip_vit
from nanovlm.world.datasets import Scenes

B, T, V = 4, 9, 53
LENGTHS = [9, 5, 1, 7]
SIDES = pytest.mark.parametrize("side", ["left", "right"])


# --- the generation class: ids with QUERIES placeholders in front are theirs, ids alone are ours ---

def prompts(side: str, seed: int = 1, places: int = QUERIES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """images, ids, mask; and the same as transformers takes it. Padding may stand between the image and the text."""
    images, ids, mask = randn(B, 3, 20, 20, seed=seed), random_ids(B, T, seed), pad_mask(LENGTHS, side, T)
    theirs = {"pixel_values": images, "input_ids": torch.cat([torch.full((B, places), IMAGE_ID), ids], dim=1),
              "attention_mask": masks.with_queries(places, mask).long()}
    return images, ids, mask, theirs


@SIDES
def test_logits_and_loss(side):
    hf = hf_blip2(1)
    model = ours(hf)
    assert type(model) is BLIP2
    images, ids, mask, theirs = prompts(side)
    # on the left the first token would be predicted from padding, which each code fills in its own way
    learned = mask if side == "right" else mask & F.pad(mask, (1, 0))[:, :-1]
    labels = torch.where(learned, ids, -100)
    with torch.no_grad():
        want = hf(**theirs, labels=F.pad(labels, (QUERIES, 0), value=-100))
        got = model(images, ids, mask, labels)
        real = masks.with_queries(QUERIES, mask)
        assert want.logits[real].std() > 0.1
        close(got.logits[real], want.logits[real])
        close(got.loss, want.loss)
        total, count = model.losses({"images": images, "input_ids": ids, "attention_mask": mask, "labels": labels})["lm"]
        close(total / count, want.loss)
        assert count == learned.sum(), "on the right, the first token is predicted from the last query"


def test_image_prefix_and_tokens():
    hf = hf_blip2(2)
    model, images = ours(hf), randn(B, 3, 20, 20, seed=2)
    with torch.no_grad():
        want = hf.get_image_features(images, return_dict=True)
        close(model.encode_image(images), want.last_hidden_state)
        close(model.image_prefix(images), want.pooler_output)
        assert model.image_prefix(images).shape == (B, QUERIES, 36)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_generated_tokens(beams, seed):
    hf = hf_blip2(seed)
    images, ids, mask, theirs = prompts("left", seed)
    want = hf.generate(**theirs, max_new_tokens=7, do_sample=False, num_beams=beams, eos_token_id=2, pad_token_id=0)
    want = want[:, -7:] if want.shape[1] > 7 else want
    got = ours(hf).generate({"images": images, "input_ids": ids, "attention_mask": mask}, 7, [2], beams=beams)
    assert got.tolist() == want[:, -got.shape[1]:].tolist()


# --- on an encoder-decoder: the prompt is encoded with the picture, the answer stands in the labels ---

@SIDES
def test_t5_logits_and_loss(side):
    hf = hf_blip2_t5(1)
    model = ours(hf)
    assert type(model) is BLIP2 and type(model.language) is T5 and model.config.language.activation == "geglu"
    images, ids, mask, theirs = prompts(side)
    labels = random_ids(B, 6, 5).masked_fill(~pad_mask([6, 2, 5, 1], "right", 6), -100)
    with torch.no_grad():
        want = hf(**theirs, labels=labels)
        got = model(images, ids, mask, labels)
        assert want.logits[labels != -100].std() > 0.1
        close(got.logits[:, :-1][labels != -100], want.logits[labels != -100])
        close(got.loss, want.loss)
        batch = {"images": images, "input_ids": ids, "attention_mask": mask, "labels": labels}
        total, count = model.losses(batch)["lm"]
        close(total / count, want.loss)
        assert count == (labels != -100).sum()


@pytest.mark.parametrize("beams", [1, 3])
def test_t5_generated_tokens(beams):
    hf = hf_blip2_t5(2)
    images, ids, mask, theirs = prompts("left", 2)
    want = hf.generate(**theirs, max_new_tokens=7, do_sample=False, num_beams=beams, eos_token_id=2, pad_token_id=0)
    got = ours(hf).generate({"images": images, "input_ids": ids, "attention_mask": mask}, 7, [2], beams=beams)
    assert got.tolist() == want[:, 1:].tolist()  # theirs begins with <start>
    assert len(set(map(tuple, got.tolist()))) > 1


def test_the_weights_of_the_t5_test_bite():
    images, ids, mask, _ = prompts("right")
    labels = random_ids(B, 6, 5)
    moved = moved_by_breaking(ours(hf_blip2_t5(1)), lambda m: m(images, ids, mask, labels).logits)
    assert min(moved.values()) > 1e-3, moved


def test_scores_are_those_of_the_whole_text():
    model = ours(hf_blip2(3))
    images, ids, mask, _ = prompts("left", 3)
    got = scores(model, {"images": images, "input_ids": ids, "attention_mask": mask}, [[7], [8, 9, 10]])
    for column, candidate in enumerate(([7], [8, 9, 10])):
        longer = torch.cat([ids, torch.tensor(candidate).expand(B, -1)], dim=1)
        with torch.no_grad():
            log_p = model(images, longer, F.pad(mask, (0, len(candidate)), value=True)).logits.log_softmax(dim=-1)
        want = sum(log_p[:, QUERIES + T - 1 + i, token] for i, token in enumerate(candidate))
        close(got[:, column], want)


def test_the_weights_of_the_generation_test_bite():
    images, ids, mask, _ = prompts("right")
    moved = moved_by_breaking(ours(hf_blip2(1)), lambda m: m(images, ids, mask).logits)
    assert min(moved.values()) > 1e-3, moved


def test_a_text_without_a_picture_is_refused():
    model = ours(hf_blip2(1))
    images, ids, mask, _ = prompts("right")
    with pytest.raises(UserError, match="3 pictures for 4 texts"):
        model.losses({"images": images[:3], "input_ids": ids, "attention_mask": mask, "labels": ids})


# --- the retrieval class ---

def test_contrast_and_matching_of_the_published_class():
    hf = hf_blip2_retrieval(1)
    model = ours(hf)
    assert type(model) is BLIP2Stage1
    images, ids, mask = randn(B, 3, 20, 20, seed=1), random_ids(B, T, 1), pad_mask(LENGTHS, "right", T)
    with torch.no_grad():
        want = hf(images, ids, mask.long())
        close(model.score(images, ids, mask), want.logits_per_image)
        close(model.encode_text(ids, mask), want.text_embeds)
        pair = hf(images, ids, mask.long(), use_image_text_matching_head=True).logits_per_image
        close(model.match(model.encode_image(images), ids, mask), pair)
        assert pair.std() > 0.1


def test_the_weights_of_the_retrieval_test_bite():
    images, ids, mask = randn(B, 3, 20, 20, seed=1), random_ids(B, T, 1), pad_mask(LENGTHS, "right", T)

    def output(m):
        return torch.cat([m.score(images, ids, mask).flatten(), m.match(m.encode_image(images), ids, mask).flatten()])

    moved = moved_by_breaking(ours(hf_blip2_retrieval(1)), output)
    assert min(moved.values()) > 1e-3, moved


def test_published_parts_fill_a_fresh_model(tmp_path, monkeypatch):
    """CLIP without its last block, and BERT with one word more and its feed-forwards twice."""
    clip, bert = hf_clip_vision(1), hf_bert(1)
    clip.save_pretrained(tmp_path / "org/clip")
    bert.save_pretrained(tmp_path / "org/bert")
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(tmp_path))
    text = BertConfig(V + 1, 30, 3, 5, 44, max_positions=23)
    vision = replace(clip_vit(20, 5, 24, 3, 3), ffn=40, final_norm=False)
    model = BLIP2Stage1(replace(STAGE1, vision=vision, qformer=QFormerConfig(text, QUERIES, 24)))
    load_published(model, "vision", "published", "org/clip")
    load_published(model, "qformer", "published-bert", "org/bert")
    tower, words = ours(clip), bert.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.vision.blocks[2].norm1.weight, tower.blocks[2].norm1.weight) and len(tower.blocks) == 4
    assert torch.equal(model.qformer.embeddings.words.weight[:V], words)
    assert torch.equal(model.qformer.layers[1].query_feedforward.up.weight, bert.bert.encoder.layer[1].intermediate.dense.weight)


# --- stage 1's losses (transformers has none) ---

DEC = 52
STAGE1 = BLIP2Config(ViTConfig(12, 4, 22, 2, 2, 26, final_norm=False),
                     QFormerConfig(BertConfig(V, 24, 3, 3, 34, max_positions=23, dropout=0.0), QUERIES, 22), None,
                     embedding=11, decode_id=DEC)


def stage1_batch(seed: int = 0) -> dict:
    ids, mask = random_ids(B, T, seed), pad_mask(LENGTHS, "right", T)
    return {"images": randn(B, 3, 12, 12, seed=seed), "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask,
            "text_group": torch.tensor([0, 1, 2, 1]), "image_group": torch.arange(B)}


def test_itc_is_a_loop():
    """max over queries, both ways, smoothed; equal texts share the target."""
    model, batch = bite(BLIP2Stage1(STAGE1), 1), stage1_batch()
    total, count = model.losses(batch)["itc"]
    queries = F.normalize(model.image_projection(model.qformer(model.encode_image(batch["images"]))), dim=-1)
    want = 0.0
    texts = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        states = model.qformer(input_ids=ids[mask][None])  # alone, without padding
        texts.append(F.normalize(model.text_projection(states[0, 0]), dim=-1))
    scores = torch.stack([torch.stack([(q @ t).max() for t in texts]) for q in queries]) / model.temperature
    for rows in (scores, scores.T):
        for b in range(B):
            good = [g for g in range(B) if batch["text_group"][b] == batch["text_group"][g]]
            log_p = rows[b].log_softmax(dim=0)
            want = want - (0.9 * sum(log_p[g] for g in good) / len(good) + 0.1 * log_p.mean()) / 2
    close(total, want)
    assert count == B


def test_itg_equals_one_pass_under_the_block_mask():
    model, batch = bite(BLIP2Stage1(STAGE1), 2), stage1_batch(1)
    total, count = model.losses(batch)["itg"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    read = ids.clone()
    read[:, 0] = DEC
    states = model.qformer(model.encode_image(batch["images"]), read, masks.multimodal_causal(QUERIES, mask))
    logits = model.word_head.logits(states[:, QUERIES:], model.qformer.embeddings.words)
    targets = ids.masked_fill(~mask, -100)[:, 1:]
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=0.1)
    close(total, want, tolerance=1e-4)
    assert count == mask[:, 1:].sum()


def test_itm_pairs(monkeypatch):
    """3 B pairs in a known order: mine, wrong pictures, wrong texts; only mine belong."""
    model, batch = bite(BLIP2Stage1(STAGE1), 3), stage1_batch(2)
    seen, drawn_by = {}, []
    inner = model.match

    def match(images, ids, mask):
        seen.update(images=images, ids=ids, mask=mask)
        return inner(images, ids, mask)

    monkeypatch.setattr(model, "match", match)
    monkeypatch.setattr(blip2, "hard_negatives", lambda *table: drawn_by.append(table[0]) or hard_negatives(*table))
    tokens = model.encode_image(batch["images"])
    torch.manual_seed(0)
    total, count = model.losses(batch)["itm"]
    belongs = torch.tensor([1] * B + [0] * 2 * B)
    logits = inner(seen["images"], seen["ids"], seen["mask"])
    close(total, F.cross_entropy(logits, belongs, reduction="sum"))
    assert count == 3 * B

    def which(rows, all_rows):
        return [next(i for i in range(B) if torch.equal(row, all_rows[i])) for row in rows]

    images, texts = which(seen["images"], tokens), which(seen["ids"], batch["input_ids"])
    own = list(range(B))
    assert images[:B] == texts[:B] == texts[B:2 * B] == images[2 * B:] == own
    assert torch.equal(seen["mask"], batch["attention_mask"][texts])
    cosine = model.score(batch["images"], batch["input_ids"], batch["attention_mask"]) / model.temperature
    close(drawn_by[0], cosine.T, 1e-4)  # a wrong image for each text
    close(drawn_by[1], cosine, 1e-4)  # a wrong text for each image
    groups = batch["text_group"].tolist()
    for other in (images[B:2 * B], texts[2 * B:]):
        assert all(groups[i] != groups[j] for i, j in enumerate(other)), "an equal text is no negative"


def test_hard_negatives_are_drawn_by_similarity_and_never_right():
    """60,000 draws a row; a frequency further off than 5 standard deviations comes once in a million."""
    similarity = torch.tensor([[9.0, 1.0, 0.0, -1.0], [2.0, 50.0, 2.0, 1.0]])
    right = torch.tensor([[True, False, False, False], [False, True, False, True]])
    torch.manual_seed(1)
    n = 60_000
    drawn = hard_negatives(similarity.repeat_interleave(n, 0), right.repeat_interleave(n, 0)).view(2, n)
    want = [[0, *torch.tensor([1.0, 0.0, -1.0]).softmax(0).tolist()], [0.5, 0, 0.5, 0]]
    for row, p in zip(drawn, want):
        counts = Counter(row.tolist())
        for column in range(4):
            assert abs(counts[column] - n * p[column]) <= 5 * math.sqrt(n * p[column] * (1 - p[column]))


def test_half_precision_and_huge_similarities_draw_too():
    similarity = torch.tensor([[1000.0, -1000.0, 900.0]], dtype=torch.bfloat16)
    assert hard_negatives(similarity, torch.tensor([[True, False, False]])).item() == 2


@pytest.mark.parametrize("texts", [[0], [5, 5, 5]])
def test_a_batch_without_a_wrong_partner_is_refused(texts):
    """A batch of one, or of identical captions."""
    groups = torch.tensor(texts)
    right = positives(groups, torch.arange(len(texts)), lambda rows: rows)
    with pytest.raises(UserError, match="no wrong partner"):
        hard_negatives(torch.zeros(right.shape), right)


def test_a_blind_guess_costs_the_prior():
    total, count = matching_loss(torch.tensor([[math.log(2.0), 0.0]]).expand(9, 2), (torch.arange(9) < 3).long())
    assert (total / count).item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert round((total / count).item(), 4) == 0.6365


def test_frozen_is_the_encoder_only():
    """Each loss reaches what it should; the queries learn from all three."""
    model = bite(BLIP2Stage1(STAGE1), 4).train()
    model.vision.requires_grad_(False)
    reached = {}
    for name in ("itc", "itm", "itg"):
        model.zero_grad()
        torch.manual_seed(0)
        model.losses(stage1_batch(3))[name][0].backward()
        reached[name] = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    both = {"qformer", "vision_norm"}
    assert reached == {"itc": both | {"image_projection", "text_projection", "temperature"},
                       "itm": both | {"match_head"}, "itg": both | {"word_head"}}


@pytest.mark.parametrize("beams", [1, 3])
def test_the_qformer_alone_describes(beams):
    """Word by word with the cache = the whole text anew under the block mask."""
    model, images = bite(BLIP2Stage1(STAGE1), 5, std=0.3), randn(B, 3, 12, 12, seed=5)
    got = model.generate({"images": images}, 6, [], beams=beams)
    if beams > 1:
        assert got.shape == (B, 6)
        return
    read = torch.full((B, 1), DEC)
    with torch.no_grad():
        for _ in range(6):
            allowed = masks.multimodal_causal(QUERIES, torch.ones_like(read, dtype=torch.bool))
            states = model.qformer(model.encode_image(images), read, allowed)
            logits = model.word_head.logits(states[:, -1], model.qformer.embeddings.words)
            read = torch.cat([read, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert got.tolist() == read[:, 1:].tolist()


# --- the tiny recipe on an encoder-decoder ---

def test_a_short_run_on_t5(tmp_path, monkeypatch):
    """Two steps of each of its four stages, then its whole exam: captions and answers are asked for in its format."""
    exam, exams, galleries = Scenes.exam, Scenes.exams, Scenes.galleries
    monkeypatch.setattr(Scenes, "exam", lambda world, n=2, *what, **how: exam(world, 2, *what, **how))
    monkeypatch.setattr(Scenes, "exams", lambda *asked: [replace(each, room=5) for each in exams(*asked)])
    monkeypatch.setattr(Scenes, "galleries", lambda world: galleries(world, 17))
    monkeypatch.setattr(watch, "save_curves", lambda *paths: None)
    summary = run("blip2/tiny-t5", Options(out=str(tmp_path / "run"), cache=False, steps=2))
    assert [stage["name"] for stage in summary["stages"]] == ["clip", "stage1", "lm-t5", "stage2"]
    assert [sorted(stage["frozen"]) for stage in summary["stages"][1::2]] == [["vision"], ["language", "vision"]]
    assert all(before == after for stage in summary["stages"] for before, after in stage["frozen"].values())
    assert {"i2t_r1", "caption_exact", "vqa_accuracy", "vqa_accuracy/follow_up"} <= set(summary["eval"])
    before, after = (torch.load(tmp_path / f"run/{name}.pt", weights_only=True) for name in ("lm-t5", "stage2"))
    language = [name for name in after if name.startswith("language.")]
    assert any("decoder" in name for name in language)
    assert all(torch.equal(before[name], after[name]) for name in language), "the bridge learns for a frozen T5"
