"""LLaVA against LlavaForConditionalGeneration, the splice against a loop and against index arithmetic.

Several images, none, tiles; padding on either side, and in the middle.
"""

from dataclasses import replace

import pytest
import torch
from oracles import IMAGE_ID, hf_llava, ours, scores
from tools import bite, close, moved_by_breaking, randn, random_ids

from nanovlm.papers.llava import LLaVA, LLaVAConfig, put_in
from nanovlm.tiling import hd_tiling

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


def batch_of(images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"images": images, "input_ids": ids, "attention_mask": mask}


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
    got = ours(hf).generate(batch_of(images, *padded(rows, side)), 9, [stop], beams=beams)
    assert got.tolist() == want.masked_fill(after_stop, 0).tolist()
    assert after_stop.any()


def test_scores_are_the_forwards_log_probabilities():
    model = ours(hf_llava(4))
    images, rows = conversations(4)
    candidates = [[5], [7, 8, 9]]
    got = scores(model, batch_of(images, *padded(rows, "right")), candidates)
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


def by_loop(model: LLaVA, batch: dict, labels: torch.Tensor, pad: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `splice` gives, token by token: pictures in their order through the batch, nothing learned of them."""
    pictures, table = iter(model.image_prefix(batch["images"], batch.get("image_sizes"))), model.language.embedding.weight
    rows = []
    for ids, real, learns in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), labels.tolist(), strict=True):
        row = []
        for token, seen, label in zip(ids, real, learns, strict=True):
            if seen and token == IMAGE_ID:
                row += [(vector, -100) for vector in next(pictures)]
            elif seen:
                row.append((table[token], label))
        rows.append(row)
    longest = max(map(len, rows))
    nothing = [(torch.zeros(table.shape[1]), -100)]
    fill = [nothing * (longest - len(row)) for row in rows]
    full = [row + f if pad == "right" else f + row for row, f in zip(rows, fill, strict=True)]
    real = [[True] * len(row) + [False] * len(f) for row, f in zip(rows, fill, strict=True)]
    return (torch.stack([torch.stack([vector for vector, _ in row]) for row in full]),
            torch.tensor([row if pad == "right" else row[::-1] for row in real]),
            torch.tensor([[label for _, label in row] for row in full]))


def by_arithmetic(model: LLaVA, batch: dict, labels: torch.Tensor, pad: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same without a loop: a token's first place is the sum of what those before it take; then all is put there."""
    ids, real = batch["input_ids"], batch["attention_mask"]
    prefix = model.image_prefix(batch["images"], batch.get("image_sizes"))
    counts = torch.tensor([len(tokens) for tokens in prefix if len(tokens)], dtype=torch.int64)
    visual = torch.cat(list(prefix)) if len(prefix) else torch.zeros(0, model.language.embedding.weight.shape[1])  # (K, D)
    is_image = (ids == IMAGE_ID) & real
    takes = real.long().masked_scatter(is_image, counts)  # (B, T)
    lengths = takes.sum(dim=1)
    L = int(lengths.max())
    first = (L - lengths if pad == "left" else torch.zeros_like(lengths))[:, None]
    start = takes.cumsum(dim=1) - takes + first
    row = torch.arange(len(ids))[:, None].expand_as(start)
    word = real & ~is_image
    within = torch.arange(len(visual)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = row[is_image].repeat_interleave(counts), start[is_image].repeat_interleave(counts) + within
    embeddings = torch.zeros(len(ids), L, visual.shape[1])
    embeddings = embeddings.index_put((row[word], start[word]), model.language.embedding(ids[word]))
    spliced = torch.full((len(ids), L), -100).index_put((row[word], start[word]), labels[word])
    column = torch.arange(L)
    return embeddings.index_put(places, visual.float()), (column >= first) & (column < first + lengths[:, None]), spliced


def spliceable(model: LLaVA, kind: str, padding: str) -> tuple[LLaVA, dict, torch.Tensor]:
    """(model, batch, labels): four conversations and a row of padding alone; even an <image> id has a label."""
    images, rows = conversations(5)
    batch = {"images": images}
    if kind == "no image":
        rows, batch = [row[row != IMAGE_ID] for row in rows], {"images": images[:0]}
    if kind == "tiles":
        sizes = torch.tensor([(20, 20), (13, 41), (50, 22), (31, 37), (20, 59), (44, 9)])
        model = bite(LLaVA(replace(model.config, tiling=hd_tiling(20))), 5)
        batch = {"images": randn(sum(model.tiles.tiling.views(tuple(size)) for size in sizes.tolist()), 3, 20, 20, seed=5),
                 "image_sizes": sizes}
    rows.insert(2, torch.zeros(0, dtype=torch.int64))
    ids, mask = padded(rows, "left" if padding == "left" else "right")
    if padding == "holes":
        mask &= (ids == IMAGE_ID) | (torch.arange(ids.shape[1]) % 3 != 1)
    return model, {**batch, "input_ids": ids, "attention_mask": mask}, ids.clone()


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("kind", ["several images", "no image", "tiles"])
@pytest.mark.parametrize("oracle", [by_loop, by_arithmetic])
def test_splice_is_a_loop(model, oracle, kind, padding, pad):
    """Images are consumed in order through the batch, raster order inside each; values, mask, labels and every gradient."""
    model, batch, labels = spliceable(model, kind, padding)
    words = batch["attention_mask"] & (batch["input_ids"] != IMAGE_ID)
    want, want_mask, want_labels = oracle(model, batch, labels, pad)
    cotangent = randn(*want.shape, seed=6)
    gradients = []
    for made in (model.splice(**batch, labels=labels, pad=pad), (want, want_mask, want_labels)):
        model.zero_grad()
        (made[0] * cotangent).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    got, mask, spliced = model.splice(**batch, labels=labels, pad=pad)
    close(got, want, 0)
    assert torch.equal(mask, want_mask)
    assert torch.equal(spliced, want_labels)
    assert not mask[2].any() and mask[[0, 1, 3, 4], 0 if pad == "right" else -1].all()
    assert not got[~mask].any() and (spliced[~mask] == -100).all()
    assert (spliced != -100).sum() == words.sum()
    assert gradients[0].keys() == gradients[1].keys()
    assert ("projector.first.weight" in gradients[0]) == (kind != "no image")
    for name, gradient in gradients[1].items():
        close(gradients[0][name], gradient, 1e-5 * max(1.0, gradient.abs().max().item()))


def test_what_is_put_in_stands_where_its_entry_stood():
    row, pieces = torch.arange(10, 15), [torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([4])]
    assert put_in(row, [0, 2, 4], pieces).tolist() == [1, 2, 3, 11, 13, 4]
    assert put_in(row, [1, 2], pieces[::2]).tolist() == [10, 1, 2, 3, 4, 13, 14]
    assert put_in(row, [], []).tolist() == row.tolist()
    with pytest.raises(ValueError, match="zip"):
        put_in(row, [1], pieces)


def test_marks_and_images_must_agree(model):
    images, rows = conversations(5)
    ids, mask = padded(rows, "right")
    for count in (5, 7, 0):
        with pytest.raises(ValueError, match=f"6 <image> marks but {count} images"):
            model(torch.cat([images, images])[:count], ids, mask)


@pytest.mark.parametrize("kind", ["several images", "no image", "tiles"])
def test_in_half_precision_pictures_come_as_exact_as_words(model, kind):
    """Under autocast the projector gives bfloat16, the embedding fp32."""
    model, batch, labels = spliceable(model, kind, "right")
    with torch.autocast("cpu", torch.bfloat16):
        got, mask, _ = model.splice(**batch, labels=labels)
        want = by_arithmetic(model, batch, labels, "right")[0]
    assert got.dtype == torch.float32
    close(got, want, 0)


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
