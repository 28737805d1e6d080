"""Other right solutions, which the grader must let pass: (task, what is different, the file's text)."""

HEAD = "import torch\nfrom torch import Tensor\nfrom torch.nn import functional as F\nimport math\n"
RIGHT = [
    ("2.1", "patches by unfold and a matrix product, a loop over depth", HEAD + '''
class Block:
    def forward(self, x, maps=None):
        y = self.attention(self.norm1(x), maps=maps)
        x = torch.add(x, y)
        y = self.feedforward(self.norm2(x))
        return torch.add(x, y)

class ViT:
    def forward(self, images, depth=None, maps=None):
        p, conv = self.config.patch, self.patch_embedding
        rows, columns = images.shape[2] // p, images.shape[3] // p
        images = images[:, :, :rows * p, :columns * p].to(conv.weight.dtype)
        patches = F.unfold(images, p, stride=p).transpose(1, 2)
        tokens = F.linear(patches, conv.weight.flatten(1), conv.bias)
        first = self.class_token.repeat(len(tokens), 1).unsqueeze(1)
        x = torch.cat((first, tokens), 1) + interpolate_positions(self.positions, rows, columns, self.config.align_corners)[None]
        if self.config.pre_norm:
            x = self.pre_norm(x)
        number = len(self.blocks) if depth is None else depth
        for i in range(number):
            x = self.blocks[i](x, maps=maps)
        return x
'''),
    ("2.1", "patch by patch, into zeros; the norms written into the sum", HEAD + '''
class Block:
    def forward(self, x, maps=None):
        seen = x + self.attention(self.norm1(x), None, maps=maps)
        return self.feedforward(self.norm2(seen)) + seen

class ViT:
    def forward(self, images, depth=None, maps=None):
        conv, p = self.patch_embedding, self.config.patch
        B, _, h, w = images.shape
        rows, columns = h // p, w // p
        places = interpolate_positions(self.positions, rows, columns, self.config.align_corners)
        parts = [(self.class_token + places[0]).expand(B, -1)]
        for row in range(rows):
            for column in range(columns):
                patch = images[:, :, row * p:(row + 1) * p, column * p:(column + 1) * p].to(conv.weight.dtype)
                parts.append(conv(patch)[:, :, 0, 0] + places[1 + row * columns + column])
        x = torch.stack(parts, dim=1)
        x = self.pre_norm(x) if self.pre_norm is not None else x
        done = 0
        for block in self.blocks:
            if depth is not None and done >= depth:
                break
            x, done = block(x, maps), done + 1
        return x
'''),
    ("2.2", "two matrices of weights, one for each direction", HEAD + '''
def weights(n, m, align):
    a, out = -0.75, torch.zeros(m, n)
    for new in range(m):
        old = (new * (n - 1) / (m - 1) if m > 1 else 0.0) if align else (new + 0.5) * n / m - 0.5
        base = math.floor(old)
        for k in range(base - 1, base + 3):
            d = abs(old - k)
            w = (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1 if d < 1 else a * (d ** 3 - 5 * d ** 2 + 8 * d - 4) if d < 2 else 0.0
            out[new, min(max(k, 0), n - 1)] += w
    return out

def interpolate_positions(positions, rows, columns, align_corners=False):
    side = math.isqrt(len(positions) - 1)
    if rows == side and columns == side:
        return positions
    grid = positions[1:].float().view(side, side, -1)
    grid = torch.einsum("ri,cj,ijd->rcd", weights(side, rows, align_corners), weights(side, columns, align_corners), grid)
    return torch.cat([positions[:1], grid.reshape(rows * columns, -1).to(positions.dtype)])
'''),
    ("2.2", "always interpolated, in the other order of axes", HEAD + '''
def interpolate_positions(positions, rows, columns, align_corners=False):
    side = int(math.sqrt(positions.shape[0] - 1) + 0.5)
    first, others = positions[0], positions[1:]
    channels = others.float().unflatten(0, (side, side)).permute(2, 0, 1).unsqueeze(0)
    channels = torch.nn.functional.interpolate(channels, (rows, columns), mode="bicubic", align_corners=align_corners)
    others = channels.squeeze(0).permute(1, 2, 0).reshape(rows * columns, -1)
    return torch.vstack([first[None], others.to(positions.dtype)])
'''),
    ("2.3", "log_softmax and a product", HEAD + '''
def contrastive_loss(image_to_text, text_to_image, right, negatives=None, smoothing=0.0):
    share = right.to(image_to_text.dtype)
    share = share / share.sum(1, keepdim=True)
    B, G = right.shape

    def direction(scores):
        n = scores.shape[1]
        target = torch.cat([share, share.new_zeros(B, n - G)], dim=1) * (1 - smoothing) + smoothing / n
        return -(target * scores.log_softmax(dim=1)).sum()

    seen = image_to_text if negatives is None else torch.hstack([image_to_text, negatives])
    return (direction(seen) + direction(text_to_image)) * 0.5, torch.tensor(B, device=right.device)
'''),
    ("2.3", "row by row", HEAD + '''
def contrastive_loss(image_to_text, text_to_image, right, negatives=None, smoothing=0.0):
    total = image_to_text.sum() * 0
    for b in range(len(right)):
        good = right[b].nonzero()[:, 0]
        first = image_to_text[b]
        if negatives is not None:
            first = torch.cat([first, negatives[b]])
        for scores in (first, text_to_image[b]):
            log_p = scores - torch.logsumexp(scores, dim=0)
            total = total - ((1 - smoothing) * log_p[good].mean() + smoothing * log_p.mean()) / 2
    return total, right.any(dim=1).sum()
'''),
    ("2.4", "the length by the last True; unit length by hand", HEAD + '''
class CLIP:
    def unit(self, x):
        return x / x.norm(dim=-1, keepdim=True)

    def encode_image(self, images):
        if self.config.pool == "mean":
            return self.unit(self.image_projection(self.vision.pooled(images)))
        return self.unit(self.image_projection(self.vision.norm(self.vision(images))[:, 0]))

    def encode_text(self, input_ids, attention_mask):
        if self.config.pool == "token":
            states = self.text(input_ids, attention_mask=attention_mask)
            rows = [row[real.nonzero()[-1, 0]] for row, real in zip(states, attention_mask)]
        else:
            states = self.text(input_ids, attention_mask[:, None])
            rows = [row[real].mean(dim=0) for row, real in zip(states, attention_mask)]
        return self.unit(self.text_projection(torch.stack(rows)))
'''),
    ("2.4", "everything projected, then one row gathered", HEAD + '''
class CLIP:
    def encode_image(self, images):
        if self.config.pool == "mean":
            picture = self.image_projection(self.vision.pooled(images))
        else:
            picture = self.image_projection(self.vision.norm(self.vision(images)))[:, 0]
        return F.normalize(picture, dim=1)

    def encode_text(self, input_ids, attention_mask):
        lengths = attention_mask.sum(dim=1, keepdim=True)
        if self.config.pool == "mean":
            states = self.text_projection(self.text(input_ids, masks.padding(attention_mask)))
            sentence = torch.einsum("bte,bt->be", states, attention_mask.to(states.dtype)) / lengths
        else:
            states = self.text_projection(self.text(input_ids, attention_mask=attention_mask))
            sentence = states.gather(1, (lengths - 1)[:, :, None].expand(-1, -1, states.shape[2])).squeeze(1)
        return F.normalize(sentence, dim=-1)
'''),
    ("2.5", "wrong captions picture by picture; pictures divided by the temperature", HEAD + '''
class CLIP:
    def losses(self, batch, gather=alone):
        t = self.temperature.clamp(min=0.01)
        image, text = self.encode_image(batch["images"]), self.encode_text(batch["input_ids"], batch["attention_mask"])
        right = positives(batch["text_group"], batch["image_group"], gather)
        negatives = None
        if "negative_ids" in batch:
            rows = []
            for b, (ids, mask) in enumerate(zip(batch["negative_ids"], batch["negative_mask"])):
                rows.append(self.encode_text(ids, mask) @ image[b] / t)
            negatives = torch.stack(rows)
        i2t, t2i = similarities(image, text, gather)
        return {"itc": contrastive_loss(i2t / t, t2i / t, right, negatives, self.config.smoothing)}
'''),
    ("2.5", "the similarities by matrix product", HEAD + '''
class CLIP:
    def losses(self, batch, gather=alone):
        scale = 1 / torch.clamp(self.temperature, min=0.01)
        text = self.encode_text(batch["input_ids"], batch["attention_mask"])
        image = self.encode_image(batch["images"])
        everyones_text, everyones_image = gather(text), gather(image)
        same = batch["text_group"][:, None] == gather(batch["text_group"])[None]
        same = same | (batch["image_group"][:, None] == gather(batch["image_group"])[None])
        wrong = None
        if "negative_ids" in batch:
            B, K = batch["negative_ids"].shape[:2]
            vectors = self.encode_text(batch["negative_ids"].flatten(0, 1), batch["negative_mask"].flatten(0, 1)).unflatten(0, (B, K))
            wrong = (vectors * image[:, None]).sum(-1) * scale
        total, count = contrastive_loss(image @ everyones_text.T * scale, text @ everyones_image.T * scale, same, wrong, self.config.smoothing)
        return dict(itc=(total, count))
'''),
]
