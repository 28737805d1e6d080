"""Other right solutions, which the grader must let pass: (task, what is different, the file's text)."""

HEAD = "import math\nimport torch\nfrom torch import Tensor\nfrom torch.nn import functional as F\n"
RIGHT = [
    ("7.1", "loops", HEAD + '''
def last_image(is_image):
    phi = torch.zeros(is_image.shape, dtype=torch.int64, device=is_image.device)
    count = torch.zeros(len(is_image), dtype=torch.int64, device=is_image.device)
    for t in range(is_image.shape[1]):
        count = count + is_image[:, t]
        phi[:, t] = count
    return phi

def next_image(is_image):
    phi = torch.zeros(is_image.shape, dtype=torch.int64, device=is_image.device)
    count = is_image.sum(dim=1)
    coming = torch.zeros_like(count)
    for t in reversed(range(is_image.shape[1])):
        phi[:, t] = coming
        coming = torch.where(is_image[:, t], count, coming)
        count = count - is_image[:, t].long()
    return phi

def image_causal(phi, there, latents, all_previous=False):
    (B, T), M = phi.shape, there.shape[1]
    mask = torch.zeros(B, T, M, latents, dtype=torch.bool, device=phi.device)
    for m in range(M):
        seen = phi > m if all_previous else phi == m + 1
        mask[:, :, m] = (seen & there[:, m:m + 1])[:, :, None]
    return mask.reshape(B, T, M * latents)
'''),
    ("7.1", "one-hot and a table", HEAD + '''
def last_image(is_image):
    return torch.cumsum(is_image.long(), -1)

def next_image(is_image):
    own = is_image.long()
    left = own.flip(1).cumsum(1).flip(1) - own  # tags behind
    return torch.where(left > 0, own.cumsum(1) + 1, torch.zeros_like(own))

def image_causal(phi, there, latents, all_previous=False):
    B, M = there.shape
    numbers = torch.arange(M, device=phi.device).repeat_interleave(latents) + 1
    real = torch.gather(there, 1, (numbers - 1).expand(B, -1))
    difference = phi.unsqueeze(2) - numbers
    return torch.logical_and(difference >= 0 if all_previous else difference == 0, real.unsqueeze(1))
'''),
    ("7.2", "frame by frame, weights by hand", HEAD + '''
class Layer:
    def forward(self, x, features, maps=None):
        asks = self.norm_latents(x)
        told = self.attention(asks, context=torch.cat((self.norm_features(features), asks), 1), mask=None, maps=maps)
        middle = told + x
        return middle + self.feedforward(self.norm(middle))

class PerceiverResampler:
    def forward(self, features, maps=None):
        n, frames, cells, width = features.shape
        rows = []
        for f in range(frames):
            rows.append(features[:, f] if self.times is None else features[:, f] + stretched(self.times, frames)[f])
        x = torch.stack([self.latents] * n)
        for layer in self.layers:
            x = layer(x, torch.cat(rows, dim=1), maps)
        return self.norm(x)

def stretched(times, frames):
    if frames <= times.shape[0]:
        return times[:frames]
    rows = []
    for f in range(frames):
        place = f * (times.shape[0] - 1) / (frames - 1)
        low = min(int(place), times.shape[0] - 2)
        rows.append((1 - (place - low)) * times[low] + (place - low) * times[low + 1])
    return torch.stack(rows)
'''),
    ("7.2", "a matrix of weights for the times, repeat for expand", HEAD + '''
class Layer:
    def forward(self, x, features, maps=None):
        seen, latents = self.norm_features(features), self.norm_latents(x)
        y = self.attention(latents, torch.cat([seen, latents], dim=-2), maps=maps)
        x = torch.add(x, y)
        return torch.add(x, self.feedforward(self.norm(x)))

class PerceiverResampler:
    def forward(self, features, maps=None):
        n, frames, cells, width = features.shape
        if self.times is not None:
            moments = stretched(self.times, frames).repeat_interleave(cells, dim=0)
            flat = features.reshape(n, frames * cells, width) + moments
        else:
            flat = features.reshape(n, frames * cells, width)
        x = self.latents[None].repeat(n, 1, 1)
        for layer in self.layers:
            x = layer(x, flat, maps)
        return self.norm(x)

def stretched(times, frames):
    learned = len(times)
    if frames < learned:
        return times[torch.arange(frames)]
    if frames == learned:
        return times
    places = torch.linspace(0, learned - 1, frames)
    weights = (1 - (places[:, None] - torch.arange(learned)).abs()).clamp(min=0)
    return weights.to(times) @ times
'''),
    ("7.3", "added in place of a copy, addcmul", HEAD + '''
class GatedCrossAttention:
    def forward(self, y, media, mask, cache=None, maps=None):
        seen = self.attention(self.norm1(y), context=media, mask=mask, cache=cache, maps=maps)
        out = torch.addcmul(y, torch.tanh(self.attention_gate), seen)
        return torch.addcmul(out, torch.tanh(self.dense_gate), self.feedforward(self.norm2(out)))
'''),
    ("7.3", "row by row", HEAD + '''
class GatedCrossAttention:
    def forward(self, y, media, mask, cache=None, maps=None):
        gates = torch.stack([self.attention_gate, self.dense_gate]).tanh()
        told = self.attention(self.norm1(y), media, mask, None, None, cache, maps)
        rows = []
        for b in range(len(y)):
            x = y[b] + told[b] * gates[0]
            rows.append(x + self.feedforward(self.norm2(x)) * gates[1])
        return torch.stack(rows)
'''),
    ("7.4", "a loop over rows for φ, and a class in the place of a closure", HEAD + '''
class Hook:
    def __init__(self, layers, media, mask, maps):
        self.layers, self.media, self.mask, self.maps = layers, media, mask, maps

    def __call__(self, i, y, cache):
        layer = self.layers[str(i)] if str(i) in self.layers else None
        if layer is None:
            return y
        kept = cache["image", i] if cache is not None else None
        return layer(y, self.media, self.mask, cache=kept, maps=self.maps)

class Flamingo:
    def before_block(self, media, there, phi, maps=None):
        mask = masks.image_causal(phi, there, media.shape[2], all_previous=self.config.all_previous)
        return Hook(self.gated_xattn, media.reshape(len(media), -1, media.shape[3]), mask, maps)

    def read(self, batch, cache=None, maps=None, gather=alone):
        ids, real = batch["input_ids"], batch["attention_mask"]
        rows = []
        for b in range(len(ids)):
            tag = ((ids[b] == self.config.image_id) & real[b])[None]
            back = "backwards" in batch and bool(batch["backwards"][b])
            rows.append(masks.next_image(tag)[0] if back else masks.last_image(tag)[0])
        phi = torch.stack(rows)
        media = self.look(batch["images"], batch["frames"], gather)
        there = batch["frames"].bool()
        if cache is not None:
            cache.state["phi"], cache.state["media"], cache.state["there"] = phi[:, -1].clone(), media, there
        return self.language(None, self.embed(ids), real, cache, self.before_block(media, there, phi, maps))

    def step(self, ids, cache):
        at, columns = cache.state["phi"], []
        for t in range(ids.shape[1]):
            at = at + (ids[:, t] == self.config.image_id).long()
            columns.append(at)
        cache.state["phi"] = at
        hook = self.before_block(cache.state["media"], cache.state["there"], torch.stack(columns, dim=1))
        hidden = self.language(inputs_embeds=self.embed(ids), cache=cache, before_block=hook)
        return hidden @ self.head_weight.T, cache
'''),
    ("7.4", "which layers are gated, by arithmetic; caches by name", HEAD + '''
class Flamingo:
    def before_block(self, media, there, phi, maps=None):
        mask = masks.image_causal(phi, there, media.shape[2], self.config.all_previous)
        B, M, Q, width = media.shape
        flat = media.view(B, M * Q, width) if media.is_contiguous() else media.reshape(B, M * Q, width)
        first, every = self.config.first, self.config.every

        def look(i, y, cache):
            if i < first or (i - first) % every:
                return y
            return self.gated_xattn[f"{i}"](y, flat, mask, cache=cache[("image", i)] if cache is not None else None, maps=maps)
        return look

    def read(self, batch, cache=None, maps=None, gather=alone):
        tag = torch.logical_and(batch["input_ids"].eq(self.config.image_id), batch["attention_mask"])
        forwards = masks.last_image(tag)
        phi = torch.where(batch["backwards"].unsqueeze(1), masks.next_image(tag), forwards) if "backwards" in batch else forwards
        there = batch["frames"] != 0
        media = self.look(batch["images"], batch["frames"], gather)
        look = self.before_block(media, there, phi, maps)
        if cache is not None:
            cache.state.update(phi=phi[:, -1], media=media, there=there)
        return self.language(inputs_embeds=self.embed(batch["input_ids"]), attention_mask=batch["attention_mask"], cache=cache, before_block=look)

    def step(self, ids, cache):
        phi = masks.last_image(ids == self.config.image_id) + cache.state["phi"].unsqueeze(1)
        cache.state["phi"] = phi[:, -1]
        y = self.language(inputs_embeds=self.embed(ids), attention_mask=torch.ones_like(ids, dtype=torch.bool), cache=cache,
                          before_block=self.before_block(cache.state["media"], cache.state["there"], phi))
        return F.linear(y, self.head_weight), cache
'''),
    ("7.5", "token by token", HEAD + '''
def window(ids, labels, images, image_id, length, most, rng):
    n = len(ids)
    size = length if 0 < length < n else n
    start = rng.randint(0, n - size) if rng is not None else 0
    row, said, shown = [], [], []
    seen = 0
    for place in range(start + size):
        if ids[place] == image_id:
            seen += 1
        if place < start:
            continue
        if ids[place] == image_id:
            if most and len(shown) == most:
                break
            shown.append(images[seen - 1])
        row.append(ids[place])
        said.append(labels[place] if row[1:] else -100)
    return row, said, shown
'''),
    ("7.5", "slices, then the surplus is cut off", HEAD + '''
def window(ids, labels, images, image_id, length, most, rng):
    start, end = 0, len(ids)
    if length and length < len(ids):
        if rng is not None:
            start = int(rng.random() * (len(ids) - length + 1))
        end = start + length
    before = list(ids[:start]).count(image_id)
    row = list(ids[start:end])
    tags = [i for i, one in enumerate(row) if one == image_id]
    if most and len(tags) > most:
        row, tags = row[:tags[most]], tags[:most]
    said = [IGNORE] + list(labels[start + 1:start + len(row)])
    return row, said, tuple(images[before:before + len(tags)])
'''),
    ("7.6", "loops and lists", HEAD + '''
def with_examples(query, examples):
    images, turns = [], []
    for example in examples:
        images += example.images
        turns.append(worked(example))
    return replace(query, images=(*images, *query.images), turns=tuple(turns) + tuple(query.turns), format="flamingo")

def worked(example):
    last = example.turns[len(example.turns) - 1]
    words = "".join(last.question.split(IMAGE)).strip()
    return replace(last, question="".join(IMAGE for _ in example.images) + words, answer=last.answer.strip())

def zero_shot(query, examples):
    blind = []
    for example in examples[:2]:
        blind.append(replace(example, images=tuple()))
    return with_examples(query, blind)

def prompts(episode, shots, several=1):
    have = len(episode.examples)
    if have < shots:
        raise UserError("there are too few examples")
    if not shots and not episode.among:
        return [zero_shot(episode.query, episode.examples)]
    last = [episode.examples[i] for i in range(have - shots, have)]
    found = []
    for order in orders(last, several):
        found.append(with_examples(episode.query, order))
    return found

def rices(query, features, support, shots):
    if len(support) < shots:
        raise UserError("there are too few examples")
    left, best = list(range(len(support))), []
    for _ in range(shots):
        i = max(left, key=lambda j: float((features[j] * query).sum()))
        left.remove(i)
        best.insert(0, support[i])
    return best
'''),
    ("7.6", "topk, and a sample built anew", HEAD + '''
def with_examples(query, examples):
    told = [Turn(IMAGE * len(e.images) + e.turns[-1].question.replace(IMAGE, "").strip(), e.turns[-1].answer.strip(), e.turns[-1].kind) for e in examples]
    pictures = sum((tuple(e.images) for e in examples), ()) + query.images
    return replace(replace(query, format="flamingo"), images=pictures, turns=(*told, *query.turns))

def worked(example):
    return with_examples(example, [example]).turns[0]

def zero_shot(query, examples):
    return with_examples(query, [replace(one, images=()) for one in list(examples)[:2]])

def prompts(episode, shots, several=1):
    left = len(episode.examples) - shots
    if left < 0:
        raise UserError(f"{shots} shots are more than {len(episode.examples)} examples")
    if shots or episode.among:
        return [with_examples(episode.query, order) for order in orders(episode.examples[left:], several)]
    return [zero_shot(episode.query, episode.examples)]

def rices(query, features, support, shots):
    _enough(support, shots)
    best = torch.topk(features @ query, shots).indices.tolist()
    return [support[i] for i in best[::-1]]
'''),
]
