"""Held-out pictures and texts that are to find each other: i2t_r1, i2t_r10, t2i_r1, t2i_r10, and the same /itc before re-ranking.

    n pictures × G texts ─► cosine ─► the RERANK best of each row ─► match(picture, text) + cosine ─► recall at 1 and 10

BLIP-2 §4.4: the best by contrast are judged again, by matching plus contrast (as the released code adds them). A model that
does not match, such as CLIP, is judged by contrast alone, under the plain names.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

from nanovlm import metrics
from nanovlm.data.source import Source
from nanovlm.errors import UserError
from nanovlm.evaluate.pupil import BATCH, Pupil
from nanovlm.training.loop import to_device

RERANK = 16  # candidates judged again; BLIP-2 has 128, for galleries of 1,000 to 5,000


def measure(pupil: Pupil, source: Source) -> dict[str, dict[str, float]]:
    """Each gallery's pictures against its own texts, both ways; the mean over the galleries. `shuffled`: other pictures' truths."""
    if pupil.model.reads.kind != "pairs":
        raise UserError("This model cannot be judged by retrieval: it does not compare pictures with texts. "
                        "Of BLIP-2 only stage 1 does, for example trained_model('blip2/tiny', 'stage1').")
    marks = defaultdict(list)  # figure → value, chance, shuffled of each gallery
    galleries = source.galleries()
    for samples in galleries:
        texts = list(dict.fromkeys(s.caption for s in samples))
        right = torch.tensor([[text in s.captions for text in texts] for s in samples])  # (n, G)
        batch = to_device(pupil.collate.images(samples) | pupil.collate.texts(texts), pupil.device)
        found = retrieve(pupil.model, batch["images"], batch["input_ids"], batch["attention_mask"], pupil.model.reads.matches)
        for name, similarity in found.items():
            way, rows, relevant = name[:3], similarity, right
            if way == "t2i":
                rows, relevant = similarity.T, right.T
            moved = relevant[torch.randperm(len(relevant), generator=torch.Generator().manual_seed(0))]
            for k in (1, 10):
                value, shuffled = (metrics.recall_at_k(rows.cpu(), truth, k) for truth in (relevant, moved))
                marks[f"{way}_r{k}{name[3:]}"].append((value, min(1.0, k / rows.shape[1]), shuffled))
    n = sum(map(len, galleries))
    return {name: {key: sum(column) / len(column) for key, column in zip(("value", "chance", "shuffled"), zip(*values))} | {"n": n}
            for name, values in marks.items()}


@torch.no_grad()
def retrieve(model: nn.Module, images: Tensor, ids: Tensor, mask: Tensor, matches: bool = True) -> dict[str, Tensor]:
    """Scores (images, texts) under four names: "i2t/itc" and "t2i/itc", and re-ranked "i2t" and "t2i"."""
    cosine = model.score(images, ids, mask)  # (n, G)
    if not matches:
        return {"i2t": cosine, "t2i": cosine}
    found = {"i2t/itc": cosine, "t2i/itc": cosine}
    tokens = model.encode_image(images)
    for way in ("i2t", "t2i"):
        best = (cosine if way == "i2t" else cosine.T).topk(min(RERANK, len(ids), len(images)), dim=1).indices
        first = torch.arange(len(best), device=best.device)[:, None].expand_as(best)
        i, j = (first, best) if way == "i2t" else (best, first)
        i, j = i.flatten(), j.flatten()
        belongs = torch.cat([model.match(tokens[a], ids[b], mask[b])[:, 1]
                             for a, b in zip(i.split(10 * BATCH), j.split(10 * BATCH))])
        # a candidate stands before everything that was not one
        scores = cosine - 1000
        scores[i, j] = cosine[i, j] + belongs
        found[way] = scores
    return found
