"""BLIP against transformers, with the same weights: image tokens, captions, cosines, matching."""

import pytest
import torch
from oracles import hf_bert, hf_blip, hf_blip_retrieval, ours
from tools import close, moved_by_breaking, pad_mask, randn, random_ids

from nanovlm.bert import BertConfig
from nanovlm.errors import UserError
from nanovlm.momentum import MomentumConfig
from nanovlm.papers.blip import BLIP, BLIPConfig
from nanovlm.training.weights import load_published
from nanovlm.vit import imagenet_vit

B, T, V = 4, 9, 53
LENGTHS = [9, 5, 2, 7]
CLS, STOP, DEC, ENC = 1, 2, 51, 52


def captions(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """images (B, 3, 20, 20), ids "[CLS] words [SEP]" padded on the right, mask."""
    mask, ids = pad_mask(LENGTHS, "right", T), random_ids(B, T, seed)
    ids[:, 0] = CLS
    ids.scatter_(1, mask.sum(dim=1, keepdim=True) - 1, STOP)
    return randn(B, 3, 20, 20, seed=seed), ids.masked_fill(~mask, 0), mask


def with_first(ids: torch.Tensor, token: int) -> torch.Tensor:
    """transformers takes ids as they are: the task's token must stand there already."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)


# --- the captioner ---

@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_image_tokens_logits_and_loss_of_the_captioner(smoothing):
    hf = hf_blip(1, {"label_smoothing": smoothing})
    model = ours(hf)
    assert type(model) is BLIP and model.config.tasks == ("lm",) and model.config.smoothing == smoothing
    images, ids, mask = captions()
    labels = ids.masked_fill(~mask, -100)
    with torch.no_grad():
        want = hf(images, with_first(ids, DEC), mask.long(), labels)
        close(model.encode_image(images), want.image_embeds)
        logits = model.word_head.logits(model.write(want.image_embeds, ids, mask), model.text_decoder.embeddings.words)
        assert want.logits[mask].std() > 0.1
        close(logits[mask], want.logits[mask])
        losses = model.losses({"images": images, "input_ids": ids, "attention_mask": mask})
        total, count = losses["lm"]
        assert list(losses) == ["lm"] and count == mask[:, 1:].sum(), "[DEC] is given, [SEP] is learned, padding is not"
        close(total / count, want.loss)


def test_labels_say_what_a_captioner_learns():
    """As `Collate.teach` makes them: nothing of the prompt."""
    hf, (images, ids, mask) = hf_blip(2), captions(2)
    labels = ids.masked_fill(~mask | (torch.arange(T) < 3), -100)
    with torch.no_grad():
        want = hf(images, with_first(ids, DEC), mask.long(), labels).loss
        total, count = ours(hf).losses({"images": images, "input_ids": ids, "attention_mask": mask, "labels": labels})["lm"]
    close(total / count, want)
    assert count == (labels[:, 1:] != -100).sum() == 12


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_generated_captions(beams, seed):
    """Behind the prompt "[DEC] w w w". Theirs wants [SEP] behind it, which it drops again."""
    hf, images, words = hf_blip(seed), randn(B, 3, 20, 20, seed=seed), random_ids(1, 3, seed).expand(B, -1)
    prompt = torch.cat([torch.full((B, 1), CLS), words], dim=1)
    asked = torch.cat([prompt, torch.full((B, 1), STOP)], dim=1)
    want = hf.generate(images, asked, torch.ones_like(asked), max_new_tokens=7, do_sample=False, num_beams=beams)
    got = ours(hf).generate({"images": images, "input_ids": prompt, "attention_mask": prompt > 0}, 7, [STOP], beams=beams)
    assert got.tolist() == want[:, 4:].tolist()
    assert len(set(map(tuple, got.tolist()))) > 1, "the pictures are seen"


def test_a_caption_without_a_prompt():
    hf, images = hf_blip(3), randn(B, 3, 20, 20, seed=3)
    want = hf.generate(images, max_new_tokens=7, do_sample=False)
    start = torch.full((B, 1), CLS)
    got = ours(hf).generate({"images": images, "input_ids": start, "attention_mask": start > 0}, 7, [STOP])
    assert got.tolist() == want[:, 1:].tolist()


def test_the_weights_of_the_captioners_test_bite():
    images, ids, mask = captions()

    def output(model):
        return model.word_head.logits(model.write(model.encode_image(images), ids, mask), model.text_decoder.embeddings.words)[mask]

    moved = moved_by_breaking(ours(hf_blip(1)), output)
    assert min(moved.values()) > 1e-3, moved


# --- the retrieval class ---

def test_cosines_and_matching_of_the_retrieval_class():
    hf = hf_blip_retrieval(1)
    model = ours(hf)
    assert type(model) is BLIP and model.config.tasks == ("itc", "itm") and model.text_decoder is None
    images, ids, mask = captions()
    with torch.no_grad():
        cosines = hf(ids, images, use_itm_head=False, attention_mask=mask.long()).itm_score
        close(model.score(images, ids, mask), cosines)
        pair = hf(with_first(ids, ENC), images, use_itm_head=True, attention_mask=mask.long()).itm_score
        close(model.match(model.encode_image(images), ids, mask), pair)
        assert pair.std() > 0.1 and cosines.std() > 0.1
        assert (hf(ids, images, attention_mask=mask.long()).itm_score - pair).abs().max() > 1e-3, "[ENC] matters"


def test_the_weights_of_the_retrieval_test_bite():
    images, ids, mask = captions()

    def output(m):
        return torch.cat([m.score(images, ids, mask).flatten(), m.match(m.encode_image(images), ids, mask).flatten()])

    moved = moved_by_breaking(ours(hf_blip_retrieval(1)), output)
    assert min(moved.values()) > 1e-3, moved


def test_published_parts_fill_a_fresh_model(tmp_path, monkeypatch):
    """A BERT with two words fewer, into encoder, decoder and word head; the two keep what they had, and so does the cross-attention."""
    bert = hf_bert(1)
    bert.save_pretrained(tmp_path / "org/bert")
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(tmp_path))
    text = BertConfig(V + 2, 30, 3, 5, 44, max_positions=23, image_width=26)
    model = BLIP(BLIPConfig(imagenet_vit(12, 4, 26, 2, 2), text, 11, V, V + 1, momentum=MomentumConfig(13)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    filled = {name for part in ("text_encoder", "text_decoder", "word_head") for name in load_published(model, part, "published-bert", "org/bert")}
    assert {name for name in before if name.startswith(("text_", "word_head")) and not name.startswith("text_projection")} == filled
    theirs, layer = bert.bert.encoder.layer[1], model.text_decoder.layers[1]
    for side in (model.text_encoder, model.text_decoder):
        assert torch.equal(side.embeddings.words.weight[:V], bert.bert.embeddings.word_embeddings.weight)
        assert torch.equal(side.layers[1].attention.key.weight, theirs.attention.self.key.weight)
        assert side.layers[1].attention.key.weight is not (model.text_encoder if side is model.text_decoder else model.text_decoder).layers[1].attention.key.weight
    assert torch.equal(model.word_head.transform.weight, bert.cls.predictions.transform.dense.weight)
    assert torch.equal(model.word_head.bias[:V], bert.cls.predictions.bias) and not model.word_head.bias[V:].any()
    assert torch.equal(model.text_encoder.embeddings.words.weight[V:], before["text_encoder.embeddings.words.weight"][V:])
    assert torch.equal(layer.cross_attention.key.weight, before["text_decoder.layers.1.cross_attention.key.weight"])


def test_a_published_retrieval_model_cannot_be_trained():
    model, (images, ids, mask) = ours(hf_blip_retrieval(1)), captions()
    assert model.temperature is None and model.momentum is None and model.unheard == ()
    batch = {"images": images, "input_ids": ids, "attention_mask": mask, "text_group": torch.arange(B), "image_group": torch.arange(B)}
    with pytest.raises(UserError, match="no slow copies, no queue and no temperature.*it scores and matches, but to be trained"):
        model.losses(batch)
