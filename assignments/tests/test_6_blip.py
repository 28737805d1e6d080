"""Assignment 6. Oracles: a BERT in numpy under literal masks, who is who by `is`, a ring of Python lists, a loss pair by pair, a written table."""

import copy
import math
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assignments.draw import close
from nanovlm.bert import Bert, BertConfig
from nanovlm.contract import alone
from nanovlm.data.sample import Sample
from nanovlm.errors import UserError
from nanovlm.making import bootstrap as making
from nanovlm.making.bootstrap import Bootstrapped, Text
from nanovlm.momentum import Momentum, MomentumConfig
from nanovlm.papers import blip
from nanovlm.papers.blip import BLIP, BLIPConfig
from nanovlm.recipes.blip import PUBLISHED
from nanovlm.vit import imagenet_vit

V, D, D_V, E, DEC, ENC, CLS = 53, 24, 22, 10, 51, 52, 1
TEXT = BertConfig(V, D, 2, 3, 34, max_positions=23, dropout=0.0, image_width=D_V)
CONFIG = BLIPConfig(imagenet_vit(12, 4, D_V, 1, 2), TEXT, E, DEC, ENC, momentum=MomentumConfig(queue=13, momentum=0.9, ramp=5))


def built(draw, **changes) -> BLIP:
    torch.manual_seed(draw.random.getrandbits(30))
    return draw.bite(BLIP(replace(CONFIG, **changes)), 0.2)


def texts(draw, B: int, T: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """[CLS] and words, padded."""
    real = draw.padding(B, T, side)
    ids = draw.ids(B, T, low=5, high=50)
    for b in range(B):
        ids[b, real[b].tolist().index(True)] = CLS
    return ids.masked_fill(~real, 0), real


# --- 6.1 one transformer in three modes ---

def numbers(part: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in part.named_parameters()}


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x):
    middle = x - x.mean(-1, keepdims=True)
    return middle / np.sqrt((middle ** 2).mean(-1, keepdims=True) + TEXT.eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(w, name, x, context, mask):
    q, k, v = linear(w, f"{name}.query", x), linear(w, f"{name}.key", context), linear(w, f"{name}.value", context)
    d, out = D // TEXT.heads, np.zeros(q.shape)
    for h in range(TEXT.heads):
        part = slice(h * d, (h + 1) * d)
        scores = np.where(mask, q[:, :, part] @ k[:, :, part].transpose(0, 2, 1) / math.sqrt(d), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, part] = weights / weights.sum(-1, keepdims=True) @ v[:, :, part]
    return linear(w, f"{name}.out", out)


def bert_by_hand(bert: Bert, ids: list[list[int]], mask: np.ndarray, image: Tensor | None) -> np.ndarray:
    """ids, mask (B, T, T) of who looks at whom, image tokens (B, N, D_v) → states (B, T, D)."""
    w = numbers(bert)
    x = w["embeddings.words.weight"][np.array(ids)] + w["embeddings.positions.weight"][:len(ids[0])]
    x = norm(w, "norm", x)
    for i in range(TEXT.layers):
        at = f"layers.{i}."
        x = norm(w, f"{at}residual1.norm", x + attend(w, f"{at}attention", x, x, mask))
        if image is not None:
            x = norm(w, f"{at}cross_residual.norm", x + attend(w, f"{at}cross_attention", x, image.double().numpy(), True))
        hidden = linear(w, f"{at}feedforward.up", x)
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = norm(w, f"{at}residual2.norm", x + linear(w, f"{at}feedforward.down", hidden))
    return x


def modes_by_hand(model: BLIP, tokens: Tensor, ids: Tensor, real: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the three modes make of texts that are padded on the right: unit vectors, logits, states."""
    B, T = ids.shape
    both, back = np.zeros((B, T, T), dtype=bool), np.zeros((B, T, T), dtype=bool)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                both[b, i, j] = real[b, j]
                back[b, i, j] = real[b, j] and j <= i
    w, rows = numbers(model), ids.tolist()
    vectors = linear(w, "text_projection", bert_by_hand(model.text_encoder, rows, both, None)[:, 0])
    vectors = vectors / np.sqrt((vectors ** 2).sum(-1, keepdims=True))
    states = bert_by_hand(model.text_encoder, [[ENC, *row[1:]] for row in rows], both, tokens)
    return vectors, linear(w, "match_head", states[:, 0]), bert_by_hand(model.text_decoder, [[DEC, *row[1:]] for row in rows], back, tokens)


def test_6_1_the_three_modes_equal_numpy(draw):
    model = built(draw)
    B, T, N = draw.sizes(3, 3, 8)
    (ids, real), tokens = texts(draw, B, T), draw.randn(B, N, D_V)
    with torch.no_grad():
        got = model.encode_text(ids, real), model.match(tokens, ids, real), model.write(tokens, ids, real)
    for mode, out, want in zip(("encode_text", "match", "write"), got, modes_by_hand(model, tokens, ids, real)):
        want = torch.from_numpy(want).float()
        if mode == "write":  # what padding says nobody reads
            out, want = out[real], want[real]
        try:
            close(out, want)
        except AssertionError as error:
            raise AssertionError(f"{mode}: {error}") from None


@pytest.mark.parametrize("side", ["right", "left"])
def test_6_1_the_first_real_token_is_the_tasks(draw, side):
    ids, real = texts(draw, 5, 7, side)
    kept, task = ids.clone(), draw.random.randint(50, 99)
    got = blip.opened(ids, real, task)
    want = kept.tolist()
    for b, row in enumerate(real.tolist()):
        want[b][row.index(True)] = task
    assert got.tolist() == want
    assert torch.equal(ids, kept), "the ids themselves are changed: ITC reads them"
    assert got.dtype == torch.int64


def test_6_1_ids_are_left_as_they_were(draw):
    model, (ids, real), tokens = built(draw), texts(draw, 3, 5), draw.randn(3, 4, D_V)
    kept = ids.clone()
    model.match(tokens, ids, real), model.write(tokens, ids, real), model.encode_text(ids, real)
    assert torch.equal(ids, kept)


def test_6_1_who_sees_what(draw):
    """Another last word, another picture: which modes notice, and where."""
    model = built(draw)
    ids, real, tokens = draw.ids(2, 6, low=5, high=40), torch.ones(2, 6, dtype=torch.bool), draw.randn(2, 4, D_V)
    later = torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1)
    with torch.no_grad():
        assert (model.encode_text(ids, real) != model.encode_text(later, real)).any(), "the text encoder looks both ways"
        assert (model.match(tokens, ids, real) != model.match(tokens, later, real)).any(), "the image-grounded encoder looks both ways"
        before, after = model.write(tokens, ids, real), model.write(tokens, later, real)
        close(after[:, :-1], before[:, :-1], 1e-6)
        assert (after[:, -1] - before[:, -1]).abs().max() > 1e-3
        assert (model.write(tokens + 1, ids, real) - before).abs().amax(dim=(0, 2)).min() > 1e-4, "every word looks at the picture"
        assert (model.match(tokens + 1, ids, real) - model.match(tokens, ids, real)).abs().max() > 1e-4


def test_6_1_padding_changes_nothing(draw):
    model, (ids, real), tokens = built(draw), texts(draw, 4, 7), draw.randn(4, 3, D_V)
    other = ids.masked_fill(~real, 33)
    with torch.no_grad():
        close(model.encode_text(other, real), model.encode_text(ids, real), 1e-6)
        close(model.match(tokens, other, real), model.match(tokens, ids, real), 1e-6)
        close(model.write(tokens, other, real)[real], model.write(tokens, ids, real)[real], 1e-6)
        ids, real = texts(draw, 4, 7, "left")  # as prompts are
        other = ids.masked_fill(~real, 33)
        close(model.write(tokens, other, real)[real], model.write(tokens, ids, real)[real], 1e-6)


def test_6_1_gradients_reach_the_picture(draw):
    model, (ids, real), tokens = built(draw), texts(draw, 3, 5), draw.randn(3, 4, D_V).requires_grad_()
    for out in (model.match(tokens, ids, real), model.write(tokens, ids, real)):
        (gradient,) = torch.autograd.grad((out * draw.randn(*out.shape)).sum(), [tokens])
        assert (gradient.abs().amax(dim=2) > 0).all(), "an image token without a gradient"


# --- 6.2 shared by reference ---

OF_A_LAYER = {"attention": "self", "residual1": "self", "cross_attention": "cross", "cross_residual": "cross", "feedforward": "ffn", "residual2": "ffn"}
SHARES = {"all": {"self", "cross", "ffn", "words"}, "all but self-attention": {"cross", "ffn", "words"},
          "all but cross-attention": {"self", "ffn", "words"}, "none": set()}


def two(draw) -> tuple[Bert, Bert]:
    return draw.bite(Bert(TEXT)), draw.bite(Bert(TEXT))


def parameters(bert: Bert) -> dict[str, tuple[str, nn.Parameter]]:
    """name → the part it belongs to, and itself."""
    found = {}
    for name, parameter in bert.named_parameters(remove_duplicate=False):
        pieces = name.split(".")
        found[name] = (OF_A_LAYER[pieces[2]] if pieces[0] == "layers" else "words", parameter)
    return found


@pytest.mark.parametrize("how", ["all but self-attention", "all", "all but cross-attention", "none"])
def test_6_2_who_is_who(draw, how):
    encoder, decoder = two(draw)
    first = {"encoder": parameters(encoder), "decoder": parameters(decoder)}
    blip.share(encoder, decoder, how)
    mine, theirs = parameters(encoder), parameters(decoder)
    assert mine.keys() == theirs.keys() == first["encoder"].keys()
    for name, (part, parameter) in mine.items():
        assert parameter is first["encoder"][name][1], f"the encoder's own {name} is another one now"
        if part in SHARES[how]:
            assert theirs[name][1] is parameter, f"{name} is to be shared"
        else:
            assert theirs[name][1] is first["decoder"][name][1], f"the decoder is to keep its own {name}"


def test_6_2_one_module_two_owners(draw):
    """Modules, not only their parameters: what is put into one later stands in both."""
    encoder, decoder = two(draw)
    blip.share(encoder, decoder, "all but self-attention")
    assert encoder.embeddings is decoder.embeddings and encoder.norm is decoder.norm
    for mine, theirs in zip(encoder.layers, decoder.layers):
        assert mine is not theirs and mine.attention is not theirs.attention and mine.residual1 is not theirs.residual1
        for part in ("cross_attention", "cross_residual", "feedforward", "residual2"):
            assert mine.get_submodule(part) is theirs.get_submodule(part), part


def test_6_2_it_stays_so(draw):
    """After a copy, after weights are loaded, after a step of an optimiser."""
    encoder, decoder = two(draw)
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    blip.share(encoder, decoder, "all but self-attention")
    weights = {name: draw.randn(*tensor.shape) for name, tensor in both.state_dict().items()}
    for name in weights:
        if name.startswith("decoder.") and parameters(decoder)[name.removeprefix("decoder.")][0] != "self":
            weights[name] = weights[name.replace("decoder.", "encoder.", 1)]
    both.load_state_dict(weights)
    optimiser = torch.optim.SGD(both.parameters(), 0.1)
    ids = draw.ids(2, 4, high=40)
    for each in (copy.deepcopy(both), both):
        (each["encoder"](ids).sum() + each["decoder"](ids, image_tokens=draw.randn(2, 3, D_V)).square().sum()).backward()
        optimiser.step()
        mine, theirs = parameters(each["encoder"]), parameters(each["decoder"])
        for name, (part, parameter) in mine.items():
            assert (theirs[name][1] is parameter) == (part != "self"), name


def test_6_2_a_shared_part_feels_both_losses(draw):
    encoder, decoder = two(draw)
    blip.share(encoder, decoder, "all but self-attention")
    ids, image = draw.ids(2, 4, high=40), draw.randn(2, 3, D_V)
    weight = encoder.layers[0].feedforward.up.weight
    one = torch.autograd.grad(encoder(ids).square().sum(), weight)[0]
    other = torch.autograd.grad(decoder(ids, image_tokens=image).square().sum(), weight)[0]
    (encoder(ids).square().sum() + decoder(ids, image_tokens=image).square().sum()).backward()
    assert other.abs().max() > 0
    close(decoder.layers[0].feedforward.up.weight.grad, one + other, 1e-3)


@pytest.mark.parametrize(("how", "count"), [("all but self-attention", 252_441_919), ("all", 224_075_071), ("none", 361_333_567)])
def test_6_2_as_many_parameters_as_were_published(draw, how, count):
    """Table 3: 252M, 224M, 361M. Built without memory."""
    with torch.device("meta"):
        model = BLIP(replace(PUBLISHED[0].config, shared=how, momentum=None))
    assert sum(p.numel() for p in model.parameters()) + 1 == count, "and the temperature"


# --- 6.3 a slow copy ---

def followed(draw, m: float = 0.9):
    """Two encoders, what momentum copies of them, and their weights before each step."""
    torch.manual_seed(draw.random.getrandbits(30))
    encoders = {"eyes": nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)), "tongue": nn.Linear(4, 3)}
    momentum = Momentum(MomentumConfig(7, m, 0.4, 3), encoders, 6)
    return encoders, momentum


def stir(draw, encoders):
    with torch.no_grad():
        for encoder in encoders.values():
            for p in encoder.parameters():
                p.copy_(draw.randn(*p.shape))


def weights_of(modules) -> dict[str, np.ndarray]:
    return {f"{name}.{key}": tensor.detach().double().numpy().copy() for name, module in modules.items() for key, tensor in module.state_dict().items()}


def test_6_3_steps_by_hand(draw):
    encoders, momentum = followed(draw)
    want = None
    for step in range(4):
        stir(draw, encoders)
        fast = weights_of(encoders)
        momentum.follow(encoders)
        want = fast if want is None else {name: 0.9 * want[name] + 0.1 * fast[name] for name in fast}
        got = weights_of(momentum.copies)
        assert got.keys() == want.keys()
        for name in want:
            far = abs(got[name] - want[name]).max()
            assert far < 1e-6, f"step {step + 1}, {name}: off by {far:.2g}"
        assert int(momentum.steps) == step + 1
        assert all((abs(now - fast[name]) < 1e-12).all() for name, now in weights_of(encoders).items()), "the encoders themselves have moved"


def test_6_3_a_copy_is_not_the_encoder_itself(draw):
    encoders, momentum = followed(draw)
    stir(draw, encoders)
    momentum.follow(encoders)
    kept = weights_of(momentum.copies)
    stir(draw, encoders)
    assert all((now == kept[name]).all() for name, now in weights_of(momentum.copies).items()), "it moves with the encoder"


def test_6_3_neither_a_gradient_nor_a_parameter(draw):
    encoders, momentum = followed(draw)
    for _ in range(2):
        stir(draw, encoders)
        momentum.follow(encoders)
    assert not list(momentum.parameters())
    assert not any(tensor.requires_grad for tensor in momentum.state_dict().values())
    assert all(p.requires_grad and p.grad is None for encoder in encoders.values() for p in encoder.parameters())


@pytest.mark.parametrize("m", [0.0, 0.995, 1.0])
def test_6_3_how_slow(draw, m):
    encoders, momentum = followed(draw, m)
    stir(draw, encoders)
    momentum.follow(encoders)
    old = weights_of(momentum.copies)
    stir(draw, encoders)
    fast = weights_of(encoders)
    momentum.follow(encoders)
    for name, now in weights_of(momentum.copies).items():
        assert abs(now - (m * old[name] + (1 - m) * fast[name])).max() < 1e-6, f"m = {m}, {name}"


# --- 6.4 a queue that goes round ---

class Ranks:
    """A gather of several ranks: whose rows a tensor is known by its identity."""

    def __init__(self):
        self.everyone = {}

    def add(self, own: Tensor, all_rows: Tensor) -> Tensor:
        self.everyone[id(own)] = all_rows
        return own

    def __call__(self, rows: Tensor) -> Tensor:
        return self.everyone[id(rows)]


def unit(draw, *shape) -> Tensor:
    return F.normalize(draw.randn(*shape), dim=-1)


@pytest.mark.parametrize(("Q", "G"), [(7, 3), (7, 7), (5, 4), (8, 2), (9, 1)])
def test_6_4_a_ring_of_lists(draw, Q, G):
    """Eight steps, of which the batch seldom divides the queue."""
    momentum = Momentum(MomentumConfig(queue=Q), {}, E)
    ring = [(image.tolist(), text.tolist(), -1, -1) for image, text in zip(momentum.images, momentum.texts)]
    at = 0
    for step in range(8):
        ranks, rows = Ranks(), (unit(draw, G, E), unit(draw, G, E), draw.ids(G, low=0, high=99), draw.ids(G, low=0, high=99))
        own = [ranks.add(tensor[:1].clone(), tensor) for tensor in rows]
        momentum.enqueue((own[0], own[1]), (own[2], own[3]), ranks)
        for row in zip(*(tensor.tolist() for tensor in rows)):
            ring[at] = row
            at = at + 1 if at + 1 < Q else 0
        got = [*zip(momentum.images.tolist(), momentum.texts.tolist(), momentum.images_group.tolist(), momentum.texts_group.tolist())]
        for place, (have, want) in enumerate(zip(got, ring)):
            assert list(have) == list(want), f"step {step + 1}, place {place} of {Q}: it holds another key"
        assert int(momentum.place) == at


def test_6_4_the_oldest_go_first(draw):
    """With a queue of seven and batches of three the last seven keys are there, whatever came before."""
    momentum, every = Momentum(MomentumConfig(queue=7), {}, E), []
    for step in range(6):
        keys = unit(draw, 3, E), unit(draw, 3, E)
        groups = torch.arange(3) + 10 * step, torch.arange(3) + 100 * step
        momentum.enqueue(keys, groups, alone)
        every += groups[0].tolist()
    assert Counter(momentum.images_group.tolist()) == Counter(every[-7:])


def test_6_4_it_is_in_every_checkpoint(draw):
    """What is kept goes on where it stood."""
    one, other = (Momentum(MomentumConfig(queue=7), {}, E) for _ in range(2))
    for step in range(3):
        one.enqueue((unit(draw, 3, E), unit(draw, 3, E)), (draw.ids(3), draw.ids(3)), alone)
    assert set(one.state_dict()) == {"images", "texts", "images_group", "texts_group", "place", "steps"}
    other.load_state_dict(one.state_dict())
    keys, groups = (unit(draw, 3, E), unit(draw, 3, E)), (draw.ids(3), draw.ids(3))
    for each in (one, other):
        each.enqueue(keys, groups, alone)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_6_4_it_keeps_numbers_not_graphs(draw):
    momentum = Momentum(MomentumConfig(queue=7), {}, E)
    keys = unit(draw, 3, E).requires_grad_(), unit(draw, 3, E).requires_grad_()
    momentum.enqueue((keys[0] * 2, keys[1] * 2), (draw.ids(3), draw.ids(3)), alone)
    assert not any(tensor.requires_grad for tensor in momentum.state_dict().values())
    close(momentum.images[:3], keys[0].detach() * 2)


def test_6_4_made_where_the_queue_is(draw):
    """What is made without `device` lands on "meta" here, as on a GPU it would on the CPU."""
    momentum = Momentum(MomentumConfig(queue=7), {}, E)
    keys, groups = (unit(draw, 3, E), unit(draw, 3, E)), (draw.ids(3), draw.ids(3))
    for _ in range(3):
        with torch.device("meta"):
            momentum.enqueue(keys, groups, alone)
    assert all(tensor.device.type == "cpu" for tensor in momentum.state_dict().values())
    assert int(momentum.place) == 2 and momentum.images_group[:2].tolist() == groups[0].tolist()[1:]


@pytest.mark.parametrize("queue", [4, 7])
def test_6_4_a_batch_that_has_no_room_is_refused(draw, queue):
    momentum = Momentum(MomentumConfig(queue=queue), {}, E)
    for pairs in (1, queue - 1, queue):
        momentum.need_room(pairs)
    for pairs in (queue + 1, 10 * queue):
        with pytest.raises(UserError):
            momentum.need_room(pairs)


# --- 6.5 soft targets ---

def contrast_by_hand(queries, keys, groups, banks, bank_groups, tau, alpha):
    """Pair by pair, direction by direction. banks: all keys of pictures, all of texts; bank_groups: their numbers."""
    total, logits, B = 0.0, [], len(queries[0])
    for query, slow, bank in ((queries[0], keys[0], banks[1]), (queries[1], keys[1], banks[0])):
        rows = []
        for b in range(B):
            right = [groups[0][b] == bank_groups[0][j] or groups[1][b] == bank_groups[1][j] for j in range(len(bank))]
            scores = [sum(float(x) * float(y) for x, y in zip(query[b], bank[j])) / tau for j in range(len(bank))]
            known = [sum(float(x) * float(y) for x, y in zip(slow[b], bank[j])) / tau for j in range(len(bank))]
            belief = [math.exp(one - max(known)) for one in known]
            log_sum = max(scores) + math.log(sum(math.exp(score - max(scores)) for score in scores))
            for j in range(len(bank)):
                target = alpha * belief[j] / sum(belief) + (1 - alpha) * right[j] / sum(right)
                total -= target * (scores[j] - log_sum) / 2
            rows.append(scores)
        logits.append(torch.tensor(rows))
    return total, logits


def contrasted(draw, steps: int, ramp: int = 4, alpha: float = 0.4, Q: int = 6, ranks: bool = True):
    """A rank with B of G pairs, a queue that holds some equal texts and pictures; what comes out, and what should."""
    torch.manual_seed(draw.random.getrandbits(30))
    B, G = 3, 5 if ranks else 3
    momentum = Momentum(MomentumConfig(Q, 0.9, alpha, ramp), {}, E)
    momentum.images.copy_(unit(draw, Q, E)), momentum.texts.copy_(unit(draw, Q, E))
    momentum.images_group.copy_(torch.tensor([-1, 7, 20, 21, 22, 23])), momentum.texts_group.copy_(torch.tensor([-1, 30, 31, 8, 33, 34]))
    momentum.steps.fill_(steps)
    queries, all_keys = (unit(draw, B, E), unit(draw, B, E)), (unit(draw, G, E), unit(draw, G, E))
    all_groups = torch.tensor([5, 7, 6, 9, 7][:G]), torch.tensor([4, 8, 3, 3, 2][:G])
    first, gather = (1, Ranks()) if ranks else (0, alone)
    keys, groups = ([tensor[first:first + B].clone() for tensor in pair] for pair in (all_keys, all_groups))
    if ranks:
        for own, whole in zip((*keys, *groups), (*all_keys, *all_groups)):
            gather.add(own, whole)
    tau = torch.tensor(0.3)
    banks = [torch.cat([whole, queue]) for whole, queue in zip(all_keys, (momentum.images, momentum.texts))]
    numbers_ = [torch.cat([whole, queue]).tolist() for whole, queue in zip(all_groups, (momentum.images_group, momentum.texts_group))]
    want = contrast_by_hand(queries, keys, [g.tolist() for g in groups], banks, numbers_, 0.3, alpha * min(1.0, steps / max(1, ramp)))
    return momentum, (queries, tuple(keys), tuple(groups), tau, gather), want, G


@pytest.mark.parametrize(("steps", "ramp", "alpha"), [(9, 4, 0.4), (0, 4, 0.4), (1, 4, 0.4), (2, 0, 0.7), (4, 4, 1.0), (1, 1, 0.3)])
def test_6_5_pair_by_pair(draw, steps, ramp, alpha):
    momentum, given, (total, logits), G = contrasted(draw, steps, ramp, alpha)
    (got, count), in_batch = momentum.contrast(*given)
    assert int(count) == 3
    close(got, torch.tensor(total), 1e-4)
    for have, want in zip(in_batch, logits, strict=True):
        close(have, want[:, :G])


def test_6_5_alone(draw):
    momentum, given, (total, logits), G = contrasted(draw, 3, ranks=False)
    (got, _), in_batch = momentum.contrast(*given)
    close(got, torch.tensor(total), 1e-4)
    assert [one.shape for one in in_batch] == [(3, G), (3, G)]


def test_6_5_only_queries_and_temperature_learn(draw):
    momentum, (queries, keys, groups, tau, _), _, _ = contrasted(draw, 9, ranks=False)
    learns = [tensor.requires_grad_() for tensor in (*queries, *keys, tau)]
    (total, _), in_batch = momentum.contrast(queries, keys, groups, tau, alone)
    gradients = torch.autograd.grad(total, learns, allow_unused=True, retain_graph=True)
    for name, gradient, learned in zip(("image", "text", "image key", "text key", "temperature"), gradients, (True, True, False, False, True)):
        felt = gradient is not None and bool(gradient.any())
        if learned:
            assert felt, f"{name}: no gradient"
    # through the targets flows nothing: with the keys held, the gradient of τ is that of the logits alone
    targets = []
    with torch.no_grad():
        for query, slow, bank, other in ((queries[0], keys[0], keys[1], momentum.texts), (queries[1], keys[1], keys[0], momentum.images)):
            right = (groups[0][:, None] == torch.cat([groups[0], momentum.images_group])) | (groups[1][:, None] == torch.cat([groups[1], momentum.texts_group]))
            soft = (slow @ torch.cat([bank, other]).T / 0.3).softmax(1)
            targets.append(0.4 * soft + 0.6 * right / right.sum(1, keepdim=True))
    again = tau.detach().clone().requires_grad_()
    loss = sum(-(target * (query.detach() @ torch.cat([bank, other]).detach().T / again).log_softmax(1)).sum() / 2
               for target, query, bank, other in zip(targets, queries, (keys[1], keys[0]), (momentum.texts, momentum.images)))
    close(gradients[4], torch.autograd.grad(loss, again)[0], 1e-3)


def test_6_5_nothing_of_the_queue_changes(draw):
    momentum, given, _, _ = contrasted(draw, 2)
    kept = {name: tensor.clone() for name, tensor in momentum.state_dict().items()}
    momentum.contrast(*given)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in momentum.state_dict().items())


def test_6_5_a_sure_and_right_model_pays_nothing(draw):
    """Queries equal to their keys and far from all others, at α = 0: the loss is about 0. Equal texts share: ln 2 each."""
    momentum = Momentum(MomentumConfig(4, 0.9, 0.4, 9), {}, 8)
    corners = torch.eye(8)
    momentum.images.copy_(corners[4:]), momentum.texts.copy_(corners[4:])
    own = corners[:3]
    groups = torch.arange(3), torch.tensor([0, 1, 2])
    (total, _), _ = momentum.contrast((own, own), (own, own), groups, torch.tensor(0.01), alone)
    assert total < 1e-4, f"it pays {total:.3g}"
    twice = torch.stack([corners[0], corners[0], corners[2]])
    (total, _), _ = momentum.contrast((twice, twice), (twice, twice), (torch.arange(3), torch.tensor([0, 0, 2])), torch.tensor(0.01), alone)
    close(total, torch.tensor(2 * math.log(2)), 1e-4)


def test_6_5_made_where_the_pairs_are(draw):
    """What is made without `device` lands on "meta" here, as on a GPU it would on the CPU."""
    momentum, given, (total, _), _ = contrasted(draw, 2)
    with torch.device("meta"):
        (got, count), _ = momentum.contrast(*given)
    assert got.device.type == count.device.type == "cpu"
    close(got, torch.tensor(total), 1e-4)


# --- 6.6 CapFilt: the rule, and where each text came from ---

def picture(i: int, said: str, label: str = "") -> Sample:
    return Sample(f"scenes/web pairs/{i}", (f"{i}.jpg",), said, label=label)


BELIEFS = {"a red hat": 0.9, "buy now": 0.2, "a blue": 0.49, "a dog": 0.5, "a cat": 0.51, "": 0.0, "a hat": 1.0}
WEB = [picture(0, "a red hat"), picture(1, "buy now", "vague"), picture(2, "a blue", "cut"), picture(3, "a dog"), picture(4, "a cat", "swapped")]
NEW = {0: "a hat", 1: "a dog", 2: "", 3: "buy now", 4: "a blue"}


def number(sample: Sample) -> int:
    return int(sample.id.rpartition("/")[2])


def judge(samples):
    """By text and picture: whoever mixes them up is found out."""
    for sample in samples:
        assert sample.images == (f"{number(sample)}.jpg",), "a text is judged beside its own picture"
    return [BELIEFS[sample.caption] for sample in samples]


def write(samples):
    return [NEW[number(sample)] for sample in samples]


def rows(chunks) -> list[tuple]:
    return sorted((number(Sample(text.picture)), text.source, text.text, text.belongs, text.noise, text.kept) for chunk in chunks for text in chunk)


def test_6_6_the_verdicts_of_a_written_table(draw):
    got = rows(making.bootstrap(WEB, write, judge))
    assert got == [
        (0, "captioner", "a hat", 1.0, "", True), (0, "web", "a red hat", 0.9, "", True),
        (1, "captioner", "a dog", 0.5, "", True), (1, "web", "buy now", 0.2, "vague", False),
        (2, "web", "a blue", 0.49, "cut", False),
        (3, "captioner", "buy now", 0.2, "", False), (3, "web", "a dog", 0.5, "", True),
        (4, "captioner", "a blue", 0.49, "", False), (4, "web", "a cat", 0.51, "swapped", True)]
    assert making.verdicts([text for chunk in making.bootstrap(WEB, write, judge) for text in chunk]) == {
        "web/right": {"n": 2, "dropped": 0}, "web/vague": {"n": 1, "dropped": 1}, "web/cut": {"n": 1, "dropped": 1},
        "web/swapped": {"n": 1, "dropped": 0}, "captioner": {"n": 4, "dropped": 2}}


def test_6_6_the_filter_alone_the_captioner_alone_neither(draw):
    assert [row[:4] for row in rows(making.bootstrap(WEB, None, judge))] == [(i, "web", s.caption, BELIEFS[s.caption]) for i, s in enumerate(WEB)]
    alone_ = rows(making.bootstrap(WEB, write, None))
    assert len(alone_) == 9 and all(row[3] is None and row[5] for row in alone_), "who is not judged is believed"
    assert [row[1] for row in rows(making.bootstrap(WEB, None, None))] == ["web"] * 5
    assert rows(making.bootstrap([], write, judge)) == []


def test_6_6_the_rule(draw):
    for belief, kept in ((None, True), (0.5, True), (0.4999, False), (1.0, True), (0.0, False)):
        for source in ("web", "captioner"):
            for noise in ("", "swapped"):  # the hidden label plays no part
                assert Text("p", "t", source, belief, noise).kept is kept, f"P(belongs) = {belief}"


def test_6_6_a_chunk_of_pictures_at_a_time(draw):
    many = [picture(i, f"text {i}") for i in range(250)]
    asked = []

    def writes(samples):
        asked.append([number(sample) for sample in samples])
        return [f"new {number(sample)}" if number(sample) % 3 else "" for sample in samples]
    chunks = list(making.bootstrap(many, writes, lambda samples: [len(sample.caption) / 10 for sample in samples]))
    assert asked == [[*range(100)], [*range(100, 200)], [*range(200, 250)]], "the captioner is asked once for each chunk"
    assert [{number(Sample(text.picture)) for text in chunk} for chunk in chunks] == [set(range(100)), set(range(100, 200)), set(range(200, 250))]
    for text in (text for chunk in chunks for text in chunk):
        assert text.text == f"{'text' if text.source == 'web' else 'new'} {number(Sample(text.picture))}" and text.belongs == len(text.text) / 10
    assert next(iter(making.bootstrap(many, writes, None))) and len(asked) == 4, "the second chunk is made when it is asked for"


def test_6_6_all_that_the_web_says(draw):
    several = [replace(picture(7, "one", "cut"), references=("one", "two"))]
    got = rows(making.bootstrap(several, lambda samples: ["new"], None, lambda sample: sample.captions))
    assert [row[:3] for row in got] == [(7, "captioner", "new"), (7, "web", "one"), (7, "web", "two")]
    assert [row[4] for row in got] == ["", "cut", "cut"]


class World:
    def pooled(self, name, index):
        assert type(index) is int, f"a picture's number is an int, not {index!r}"
        return Sample(f"scenes/{name}/{index}", (f"{name} {index}",), "what the web says", label="what the web is")


def test_6_6_what_is_drawn(draw):
    """6,000 draws of three kept texts. More than 5 standard deviations off: once in 1.7 million cells, 3 cells here."""
    texts_ = [Text("scenes/web pairs/12", "a", "web", 0.7, "cut"), Text("scenes/web pairs/12", "b", "captioner", 0.9),
              Text("scenes/web pairs/3", "c", "web", 0.1), Text("scenes/web pairs/140", "d", "captioner", None)]
    made, rng, n = Bootstrapped(World(), "web pairs", texts_), Random(draw.random.getrandbits(30)), 6000
    counts = Counter()
    for _ in range(n):
        sample = made.draw(rng)
        counts[sample.images[0], sample.caption, sample.label] += 1
    assert set(counts) == {("web pairs 12", "a", "cut"), ("web pairs 12", "b", ""), ("web pairs 140", "d", "")}
    for what, count in counts.items():
        assert abs(count - n / 3) <= 5 * math.sqrt(n * 2 / 9), f"{what}: {count / n:.3f}, wanted 0.333"


def test_6_6_verdicts_of_many(draw):
    kinds, sources = ("", "swapped", "vague"), ("web", "captioner")
    texts_ = [Text(f"p/{i}", "t", source := draw.random.choice(sources), draw.random.choice((None, 0.1, 0.5, 0.9)),
                   draw.random.choice(kinds) if source == "web" else "") for i in range(80)]
    got = making.verdicts(texts_)
    for name in ("captioner", "web/right", "web/swapped", "web/vague"):
        those = [t for t in texts_ if (t.source if t.source != "web" else f"web/{t.noise or 'right'}") == name]
        assert got.pop(name) == {"n": len(those), "dropped": sum(t.belongs is not None and t.belongs < 0.5 for t in those)}, name
    assert not got and making.verdicts([]) == {}


# --- 6.7 one step, in its order ---

def pairs(draw, B: int = 4, T: int = 6) -> dict[str, Tensor]:
    ids, real = texts(draw, B, T)
    return {"images": draw.randn(B, 3, 12, 12), "input_ids": ids, "attention_mask": real,
            "text_group": torch.tensor([5, 6, 7, 6][:B]), "image_group": torch.arange(B)}


def state_of(model: BLIP) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unit_of(weights: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
    made = F.linear(states[:, 0], weights[f"{name}.weight"], weights[f"{name}.bias"])
    return made / made.norm(dim=-1, keepdim=True)


class By:
    """A step by hand, on the model's state of before: what the copies become, the keys, the losses, the queue."""

    def __init__(self, model: BLIP, batch: dict[str, Tensor], before: dict[str, Tensor], ranks: int):
        config, B, T = model.config.momentum, *batch["input_ids"].shape
        G = B * ranks
        everyone = torch.cat([torch.arange(B).roll(r) for r in range(ranks)])  # place among all → row of mine
        fast = {n: t for n, t in before.items() if not n.startswith("momentum.")}
        steps, m = int(before["momentum.steps"]), config.momentum
        slow = {n.removeprefix("momentum.copies."): t for n, t in before.items() if n.startswith("momentum.copies.")}
        self.slow = {n: fast[n] if steps == 0 else m * t + (1 - m) * fast[n] for n, t in slow.items()}
        self.steps = steps + 1
        tau = min(0.5, max(0.001, float(before["temperature"])))
        eyes, reads = copy.deepcopy(model.vision), copy.deepcopy(model.text_encoder)
        mask = batch["attention_mask"][:, None, :].expand(B, T, T)
        vectors = []
        for weights in (fast, self.slow):
            eyes.load_state_dict({n.removeprefix("vision."): t for n, t in weights.items() if n.startswith("vision.")})
            reads.load_state_dict({n.removeprefix("text_encoder."): t for n, t in weights.items() if n.startswith("text_encoder.")})
            vectors.append((unit_of(weights, "image_projection", eyes.norm(eyes(batch["images"]))),
                            unit_of(weights, "text_projection", reads(batch["input_ids"], mask))))
        queries, self.keys = vectors
        groups = batch["image_group"], batch["text_group"]
        banks = [torch.cat([own[everyone], before[f"momentum.{name}"]]) for own, name in zip(self.keys, ("images", "texts"))]
        bank_groups = [torch.cat([own[everyone], before[f"momentum.{name}_group"]]).tolist() for own, name in zip(groups, ("images", "texts"))]
        alpha = config.alpha * min(1.0, self.steps / config.ramp)
        self.itc, (i2t, t2i) = contrast_by_hand(queries, self.keys, [g.tolist() for g in groups], banks, bank_groups, tau, alpha)
        self.queue = {name: before[f"momentum.{name}"].clone() for name in ("images", "texts", "images_group", "texts_group")}
        for g in range(G):
            at = (int(before["momentum.place"]) + g) % config.queue
            for name, own in zip(self.queue, (*self.keys, *groups)):
                self.queue[name][at] = own[everyone[g]]
        self.itm, self.sure = 0.0, True
        asked = []
        for b in range(B):
            wrong = [g for g in range(G) if groups[0][everyone[g]] != groups[0][b] and groups[1][everyone[g]] != groups[1][b]]
            picks = []
            for similar in (t2i, i2t):
                best = max(wrong, key=lambda g: float(similar[b, g]))
                others = [float(similar[b, best] - similar[b, g]) for g in wrong if everyone[g] != everyone[best]]
                self.sure &= not others or min(others) > 20  # e⁻²⁰: the draw has no choice
                picks.append(int(everyone[best]))
            asked += [(b, b, 1), (picks[0], b, 0), (b, picks[1], 0)]
        tokens = model.encode_image(batch["images"])
        for i, j, belongs in asked:
            ids = batch["input_ids"][j:j + 1].clone()
            ids[0, 0] = ENC
            logits = model.match_head(model.text_encoder(ids, batch["attention_mask"][j:j + 1, None], tokens[i:i + 1])[:, 0])
            self.itm -= logits.log_softmax(1)[0, belongs].item()


def gathered(ranks: int):
    """The other ranks have my pairs too, each in another order."""
    return lambda rows: torch.cat([rows.roll(r, 0) for r in range(ranks)])


def sure_step(draw, ranks: int):
    """A model and a batch for which both draws of ITM have no choice: τ is at its least."""
    for _ in range(40):
        model, batch = built(draw, momentum=MomentumConfig(13, 0.9, 0.4, 5)), pairs(draw)
        with torch.no_grad():
            model.temperature.fill_(0.0)
            model.momentum.steps.fill_(2)
            model.momentum.images.copy_(unit(draw, 13, E)), model.momentum.texts.copy_(unit(draw, 13, E))
            for tensor in model.momentum.copies.state_dict().values():
                tensor.copy_(tensor + 0.05 * draw.randn(*tensor.shape))
            by = By(model, batch, state_of(model), ranks)
        if by.sure and math.isfinite(by.itc):
            return model, batch, by
    raise RuntimeError("no batch was found whose wrong partners are certain")


@pytest.mark.parametrize("ranks", [1, 2])
def test_6_7_a_step_by_hand(draw, ranks):
    model, batch, by = sure_step(draw, ranks)
    torch.manual_seed(draw.random.getrandbits(30))
    losses = model.compare(model.encode_image(batch["images"]), batch, gathered(ranks))
    assert set(losses) == {"itc", "itm"} and int(losses["itc"][1]) == 4 and int(losses["itm"][1]) == 12
    after = state_of(model)
    for name, want in by.slow.items():
        close(after[f"momentum.copies.{name}"], want)
    assert int(after["momentum.steps"]) == by.steps
    for name, want in by.queue.items():
        close(after[f"momentum.{name}"].float(), want.float())
    assert int(after["momentum.place"]) == 4 * ranks % 13
    close(losses["itc"][0].detach(), torch.tensor(by.itc), max(0.05, 1e-4 * abs(by.itc)))
    close(losses["itm"][0].detach(), torch.tensor(by.itm), 1e-3)


def test_6_7_soft_temperatures_and_the_first_step(draw):
    """At the first step the copies are exact ones; at an ordinary τ the loss of ITC is the one made by hand, to five places."""
    model, batch = built(draw), pairs(draw)
    with torch.no_grad():
        by = By(model, batch, state_of(model), 1)
    got = model.compare(model.encode_image(batch["images"]), batch, alone)
    close(got["itc"][0].detach(), torch.tensor(by.itc), 1e-3)
    after = state_of(model)
    for name, want in by.slow.items():
        close(after[f"momentum.copies.{name}"], want)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
        by = By(model, batch, state_of(model), 1)
    got = model.compare(model.encode_image(batch["images"]), batch, alone)
    close(got["itc"][0].detach(), torch.tensor(by.itc), 1e-3)


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.5), (0.5, 0.5), (0.07, 0.07), (0.0001, 0.001), (-1.0, 0.001)])
def test_6_7_the_temperature_stays_between(draw, before, after):
    model, batch = built(draw), pairs(draw)
    with torch.no_grad():
        model.temperature.fill_(before)
    model.compare(model.encode_image(batch["images"]), batch, alone)
    close(model.temperature.detach(), torch.tensor(after), 1e-6)


def test_6_7_keys_are_unit_vectors_of_the_slow_copies(draw):
    model, batch = built(draw), pairs(draw)
    with torch.no_grad():
        model.momentum.steps.fill_(1)
        before = state_of(model)
        fake = {**before, "momentum.steps": torch.tensor(1)}
        by = By(replace_momentum(model), batch, fake, 1)
    got = model.keys(batch["images"], batch["input_ids"], batch["attention_mask"])
    for have, want in zip(got, by.keys, strict=True):
        close(have, want)
        assert not have.requires_grad
        close(have.norm(dim=-1), torch.ones(4))


def replace_momentum(model: BLIP) -> BLIP:
    """The same with m = 1: a step that leaves the copies where they are."""
    other = copy.deepcopy(model)
    other.config = replace(other.config, momentum=replace(other.config.momentum, momentum=1.0))
    return other


def test_6_7_who_only_wants_to_know_changes_nothing(draw):
    model, batch = built(draw), pairs(draw)
    model.compare(model.encode_image(batch["images"]), batch, alone)
    with torch.no_grad():
        model.temperature.fill_(0.9)
        before = state_of(model)
        losses = model.compare(model.encode_image(batch["images"]), batch, alone)
    assert all(losses[name][0].isfinite() for name in ("itc", "itm"))
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed, f"changed: {changed}"


def test_6_7_gradients_reach_all_that_compares(draw):
    model, batch = built(draw), pairs(draw)
    losses = model.compare(model.encode_image(batch["images"]), batch, alone)
    for name, part in (("itc", ("vision", "text_encoder", "image_projection", "text_projection", "temperature")), ("itm", ("vision", "text_encoder", "match_head"))):
        model.zero_grad()
        losses[name][0].backward(retain_graph=True)
        felt = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert set(part) <= felt, f"{name} reaches {sorted(felt)}"
        assert ("match_head" in felt) == (name == "itm")


def refused(model: BLIP, batch: dict[str, Tensor]) -> None:
    before = state_of(model)
    tokens = model.encode_image(batch["images"])
    with pytest.raises(UserError):
        model.compare(tokens, batch, alone)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed, f"it is refused, but these have changed: {changed}"


def test_6_7_what_cannot_be_learned_from_is_refused_before_anything_has_changed(draw):
    batch = pairs(draw)
    refused(built(draw, momentum=None), batch)
    for change in ({"text_group": torch.full((4,), 3)}, {"text_group": torch.tensor([5, 5, 5, 6]), "image_group": torch.tensor([0, 1, 2, 0])}):
        model = built(draw)
        model.temperature.data.fill_(0.9)
        refused(model, {**batch, **change})
    small = built(draw, momentum=MomentumConfig(3, 0.9, 0.4, 5))
    small.temperature.data.fill_(0.9)
    refused(small, batch)
