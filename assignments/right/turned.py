"""Right solutions under a variant (variants.py): (task, the file's text). The public solution, pasted, must lose there."""

HEAD = "import torch\nfrom torch import Tensor\n"
TURNED = [
    ("1.1", HEAD + '''
def padding(attention_mask):
    return ~attention_mask[:, None, :]

def causal(T, S=None, device=None):
    S = T if S is None else S
    return torch.ones(1, T, S, dtype=torch.bool, device=device).triu(S - T + 1)

def causal_with_padding(attention_mask, T):
    return causal(T, attention_mask.shape[1], attention_mask.device) | padding(attention_mask)
'''),
    ("1.2", HEAD + '''
def positions(attention_mask):
    return attention_mask.cumsum(dim=1)
'''),
    ("1.3", HEAD + '''
def attend_readable(q, k, v, mask, bias, scale, maps=None):
    scores = q @ k * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    if maps is not None:
        maps.append(weights)
    return weights @ v
'''),
    ("1.5", HEAD + '''
def rope_angles(positions, head_dim, base=10000.0, dtype=torch.float32):
    inv = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angle = positions[:, None, :, None] * torch.cat([inv, inv])
    return angle.cos().to(dtype), angle.sin().to(dtype)

def rotate(x, rope):
    cos, sin = rope
    a, b = x[..., 0::2], x[..., 1::2]
    c, s = cos[..., 0::2], sin[..., 0::2]
    return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)
'''),
    ("4.3", '''
from itertools import accumulate
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE

def _encode_pieces(pieces, tokenizer, before=None):
    joined = []
    for piece, trained in pieces:
        if joined and isinstance(piece, str) and isinstance(joined[-1][0], str) and not trained and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + piece, False)
        else:
            joined.append((piece, trained))
    ids, mask = [], []
    for piece, trained in joined:
        new = tokenizer.encode(piece, before=before) if isinstance(piece, str) else [piece]
        ids, mask, before = ids + new, mask + [trained] * len(new), piece
    return ids, mask

def _fitting(ids, image_id, image_tokens, max_length, name):
    ends = list(accumulate(places(ids, image_id, image_tokens)))
    kept = sum(end <= max_length for end in ends)
    if image_id in ids[kept:]:
        raise UserError("an image would be cut")
    return kept

def encode(turns, tokenizer, format, max_length=None, image_tokens=0, name="a conversation", told=()):
    layout = find_format(format)
    ids, trained = _encode_pieces(_pieces(turns, tokenizer, layout, name, told), tokenizer)
    ids, trained = _last_asked(ids, trained, tokenizer, 0 if told else layout.asked)
    labels = [i if t else IGNORE for i, t in zip(ids, trained)]
    if max_length is not None:
        kept = _fitting(ids, tokenizer.image_id, image_tokens, max_length, name)
        ids, labels = ids[:kept], labels[:kept]
    if all(label == IGNORE for label in labels):
        raise UserError("nothing is learned")
    return labels, ids
'''),
    ("5.1", HEAD + '''
def ahead(queries, attention_mask):
    return torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), queries)], dim=1)[:, None]

def bidirectional(queries, attention_mask):
    return ahead(queries, attention_mask)

def multimodal_causal(queries, attention_mask):
    T = attention_mask.shape[1]
    place = torch.arange(T + queries, device=attention_mask.device)
    text = place < T
    allowed = torch.where(text[:, None] & text, place[:, None] >= place, ~text[None, :])
    return allowed & ahead(queries, attention_mask)

def unimodal(queries, attention_mask):
    text = torch.arange(attention_mask.shape[1] + queries, device=attention_mask.device) < attention_mask.shape[1]
    return (text[:, None] == text) & ahead(queries, attention_mask)
'''),
    ("5.3", HEAD + '''
def positives(text_group, image_group, gather):
    return (text_group[:, None] == gather(text_group)) | (image_group[:, None] == gather(image_group))

def similarities(image, text, gather):
    mine, everyones = (rows if rows.ndim == 3 else rows[:, None] for rows in (image, gather(image)))
    return torch.einsum("bqe,ge->gbq", mine, gather(text)).amax(2), torch.einsum("be,gqe->gbq", text, everyones).amax(2)
'''),
    ("5.4", HEAD + '''
@torch.no_grad()
def hard_negatives(similarity, right):
    need_wrong_partners(right)
    return torch.multinomial((-similarity.float()).masked_fill(right, -torch.inf).softmax(dim=1), 1)[:, 0]
'''),
]
