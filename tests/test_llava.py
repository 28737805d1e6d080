"""LLaVA against LlavaForConditionalGeneration, the splice against a loop: several images, none, padding either side."""

from dataclasses import replace

import pytest
import torch
from oracles import IMAGE_ID, hf_llava, ours
from tools import bite, close, moved_by_breaking, randn, random_ids

from nanovlm.papers.llava import LLaVA, LLaVAConfig

N = 16  # image tokens: a grid of 4 × 4
# Four conversations; "i" is an image, a letter a word
SHAPES = ["wwiwwwiww", "wwwww", "iw", "wwwiiwwwwiw"]
IMAGES = sum(shape.count("i") for shape in SHAPES)
SIDES = pytest.mark.parametrize("side", ["left", "right"])


def conversations(seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(images, a list of id rows with one <image> id per image)."""
    words = random_ids(4, 11, seed)
    rows = [torch.tensor([IMAGE_ID if kind == "i" else int(word) for kind, word in zip(shape, row, strict=False)])
            for shape, row in zip(SHAPES, words, strict=True)]
    return randn(IMAGES, 3, 20, 20, seed=seed), rows


def padded(rows: list[torch.Tensor], side: str, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows × longest, bool mask)."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place], mask[i, place] = row, True
    return ids, mask


def expanded(row: torch.Tensor, fill: int = IMAGE_ID) -> torch.Tensor:
    """Hugging Face wants an id for each image token; `fill` stands there."""
    return torch.cat([torch.full((N,), fill) if token == IMAGE_ID else token[None] for token in row])


def learned(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Labels: every word from the third on, and not the images."""
    return [row.masked_fill((row == IMAGE_ID) | (torch.arange(len(row)) < 2), -100) for row in rows]


@SIDES
@pytest.mark.parametrize("layer", [-2, -1, 3, 1])
def test_logits_and_loss(side, layer):
    """One row has two images, one none, one starts with an image, one has two side by side."""
    hf = hf_llava(1, vision_feature_layer=layer)
    model = ours(hf)
    images, rows = conversations(1)
    ids, mask = padded(rows, side)
    labels, _ = padded(learned(rows), side, -100)
    hf_ids, hf_mask = padded([expanded(row) for row in rows], side)
    label_rows = [torch.cat([torch.full((N,), -100) if token == IMAGE_ID else label[None]
                             for token, label in zip(row, learned([row])[0], strict=True)]) for row in rows]
    hf_labels, _ = padded(label_rows, side, -100)
    with torch.no_grad():
        want = hf(input_ids=hf_ids, pixel_values=images, attention_mask=hf_mask.long(), labels=hf_labels)
        got = model(images, ids, mask, labels, pad=side)
    assert want.logits[hf_mask].std() > 0.1
    close(got.logits[hf_mask], want.logits[hf_mask])
    close(got.loss, want.loss)
    total, count = model.losses({"images": images, "input_ids": ids, "attention_mask": mask, "labels": labels})["lm"]
    close(total / count, want.loss)
    assert count == (hf_labels[:, 1:] != -100).sum()


def test_the_weights_of_the_parity_test_bite():
    """Idle are only the vision tower's last block and final norm, which layer −2 does not read."""
    model = ours(hf_llava(1))
    images, rows = conversations(1)
    ids, mask = padded(rows, "right")
    moved = moved_by_breaking(model, lambda m: m(images, ids, mask).logits)
    idle = {name for name, far in moved.items() if far == 0}
    assert idle == {name for name in moved if name.startswith(("vision.blocks.3.", "vision.norm."))}
    assert min(far for name, far in moved.items() if name not in idle) > 1e-3, moved


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", [2, 3])
@SIDES
def test_generated_tokens(seed, beams, side):
    """Whichever side our ids are padded on; theirs are padded on the left."""
    hf = hf_llava(seed)
    images, rows = conversations(seed)
    hf_ids, hf_mask = padded([expanded(row) for row in rows], "left")
    shared = {"input_ids": hf_ids, "attention_mask": hf_mask.long(), "pixel_values": images, "do_sample": False,
              "num_beams": beams, "max_new_tokens": 9, "pad_token_id": 0}
    T = hf_ids.shape[1]
    for said in hf.generate(**shared, eos_token_id=None)[:, T + 3]:  # a stop that makes some row end early
        stop = int(said)
        want = hf.generate(**shared, eos_token_id=stop)[:, T:]
        after_stop = (want == stop).cumsum(dim=1) - (want == stop).long() > 0
        if after_stop.any():
            break
    got = ours(hf).generate(images, *padded(rows, side), max_new_tokens=9, stop=[stop], beams=beams)
    assert got.tolist() == want.masked_fill(after_stop, 0).tolist()
    assert after_stop.any()


def test_scores_are_the_forwards_log_probabilities():
    model = ours(hf_llava(4))
    images, rows = conversations(4)
    candidates = [[5], [7, 8, 9]]
    got = model.score(images, *padded(rows, "right"), candidates)
    with torch.no_grad():
        for c, candidate in enumerate(candidates):
            longer = [torch.cat([row, torch.tensor(candidate)]) for row in rows]
            log_p = model(images, *padded(longer, "left"), pad="left").logits.log_softmax(-1)
            want = sum(log_p[:, i - len(candidate) - 1, token] for i, token in enumerate(candidate))
            close(got[:, c], want)


# --- the splice by itself ---

@pytest.fixture
def model() -> LLaVA:
    return ours(hf_llava(5))


@SIDES
@pytest.mark.parametrize("pad", ["left", "right"])
def test_splice_is_a_loop(model, side, pad):
    """Images are consumed in order through the batch, raster order inside each; no label on an image token."""
    images, rows = conversations(5)
    labels, _ = padded(rows, side, -100)  # even where a label stands on an <image> id, it is not learned
    with torch.no_grad():
        got, mask, spliced = model.splice(*padded(rows, side), images, labels, pad)
        visual = iter(model.image_prefix(images))
        lengths = [len(expanded(row)) for row in rows]
        assert (mask.shape, mask.sum(dim=1).tolist()) == ((4, max(lengths)), lengths)
        for i, row in enumerate(rows):
            want = torch.cat([next(visual) if token == IMAGE_ID else model.language.embedding.weight[token][None]
                              for token in row])
            close(got[i][mask[i]], want, 0)
            assert spliced[i][mask[i]].tolist() == expanded(row, -100).tolist()
    first = mask[:, 0] if pad == "right" else mask[:, -1]
    assert first.all()
    assert not got[~mask].any()
    assert (spliced[~mask] == -100).all()


def test_marks_and_images_must_agree(model):
    images, rows = conversations(5)
    ids, mask = padded(rows, "right")
    with pytest.raises(ValueError, match="6 <image> marks but 5 images"):
        model(images[:5], ids, mask)


def test_an_image_id_under_padding_is_padding(model):
    images, rows = conversations(5)
    ids, mask = padded(rows, "right")
    with torch.no_grad():
        want = model(images, ids, mask).logits
        got = model(images, ids.masked_fill(~mask, IMAGE_ID), mask).logits
    assert torch.equal(got, want)


def test_without_images_the_projector_still_has_a_gradient(model):
    """A rank whose batch is text only must take part in the reduction of every gradient."""
    _, rows = conversations(5)
    ids, mask = padded([rows[1], rows[1][:3]], "right")
    total, count = model.losses({"images": torch.zeros(0, 3, 20, 20), "input_ids": ids, "attention_mask": mask,
                                 "labels": ids.masked_fill(~mask, -100)})["lm"]
    total.backward()
    assert count == 4 + 2
    for p in model.projector.parameters():
        assert p.grad is not None
        assert not p.grad.any()
    assert model.language.embedding.weight.grad.any()


def test_the_gradient_reaches_what_carries_the_image(model):
    images, rows = conversations(5)
    ids, mask = padded(rows, "right")
    labels, _ = padded(learned(rows), "right", -100)
    total, _ = model.losses({"images": images, "input_ids": ids, "attention_mask": mask, "labels": labels})["lm"]
    total.backward()
    for name, p in model.named_parameters():
        unused = name.startswith(("vision.blocks.3.", "vision.norm."))  # feature layer −2
        if not name.endswith("key.bias"):  # which softmax cannot see
            assert (p.grad is not None and p.grad.abs().max().item() > 0) != unused, name


def test_maps_show_the_spliced_sequence(model):
    images, rows = conversations(5)
    maps = []
    model(images, *padded(rows, "right"), maps=maps)
    L = max(len(expanded(row)) for row in rows)
    assert [m.shape for m in maps] == [(4, 6, L, L)] * 2
    assert not maps[0].triu(1).any()


def test_features_are_patches_of_the_layer_asked_for():
    """hidden_states[-2] without the class token; the last block's weights do not matter."""
    hf = hf_llava(6)
    model = ours(hf)
    images, _ = conversations(6)
    with torch.no_grad():
        states = hf.model.vision_tower(images, output_hidden_states=True).hidden_states
        close(model.encode_image(images), states[-2][:, 1:])
        last = LLaVA(replace(model.config, feature_layer=-1))
        last.load_state_dict(model.state_dict())
        close(last.encode_image(images), states[-1][:, 1:])


@pytest.mark.parametrize("layers", [1, 2])
def test_projector_is_its_equation(layers):
    config = LLaVAConfig(ours(hf_llava(7)).config.vision, ours(hf_llava(7)).config.language, IMAGE_ID, layers)
    model = bite(LLaVA(config), 7)
    images, _ = conversations(7)
    tokens, w = model.encode_image(images), dict(model.projector.named_parameters())
    want = tokens @ w["first.weight"].T + w["first.bias"]
    if layers == 2:
        want = torch.nn.functional.gelu(want) @ w["second.weight"].T + w["second.bias"]
    close(model.image_prefix(images), want)
    assert ("second.weight" in w) == (layers == 2)
