"""Other right solutions, which the grader must let pass: (task, what is different, the file's text)."""

HEAD = "import math\nimport torch\nfrom torch import Tensor\nfrom torch.nn import functional as F\n"
RIGHT = [
    ("6.1", "row by row", HEAD + '''
def opened(input_ids, attention_mask, task):
    rows = []
    for row, real in zip(input_ids, attention_mask):
        row = row.clone()
        row[real.tolist().index(True)] = task
        rows.append(row)
    return torch.stack(rows)

class BLIP:
    def encode_text(self, input_ids, attention_mask):
        states = self.text_encoder(input_ids, attention_mask[:, None, :])
        vectors = self.text_projection(states)[:, 0]
        return vectors / vectors.norm(dim=-1, keepdim=True)

    def match(self, image_tokens, input_ids, attention_mask):
        logits = []
        for p in range(len(input_ids)):
            ids = opened(input_ids[p:p + 1], attention_mask[p:p + 1], self.config.encode_id)
            states = self.text_encoder(ids, attention_mask[p:p + 1, None], image_tokens[p:p + 1])
            logits.append(self.match_head(states[0, 0]))
        return torch.stack(logits)

    def write(self, image_tokens, input_ids, attention_mask):
        T = input_ids.shape[1]
        back = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()
        return self.text_decoder(opened(input_ids, attention_mask, self.config.decode_id), back & attention_mask[:, None, :], image_tokens)
'''),
    ("6.1", "a where on the first real place, expanded masks", HEAD + '''
def opened(input_ids, attention_mask, task):
    first = attention_mask & (attention_mask.cumsum(dim=1) == 1)
    return torch.where(first, torch.full_like(input_ids, task), input_ids)

class BLIP:
    def encode_text(self, input_ids, attention_mask):
        T = input_ids.shape[1]
        hidden = self.text_encoder(input_ids=input_ids, mask=attention_mask[:, None].expand(-1, T, -1), image_tokens=None)
        return F.normalize(self.text_projection(hidden[:, 0, :]), p=2, dim=1)

    def match(self, image_tokens, input_ids, attention_mask):
        ids = opened(input_ids, attention_mask, task=self.config.encode_id)
        return self.match_head(self.text_encoder(ids, masks.padding(attention_mask), image_tokens=image_tokens).select(1, 0))

    def write(self, image_tokens, input_ids, attention_mask):
        mask = masks.causal(input_ids.shape[1], device=input_ids.device) & masks.padding(attention_mask)
        return self.text_decoder(input_ids=opened(input_ids, attention_mask, self.config.decode_id), mask=mask, image_tokens=image_tokens)
'''),
    ("6.2", "part by part, with ifs", HEAD + '''
def share(encoder, decoder, how):
    if how == "none":
        return
    decoder.embeddings = encoder.embeddings
    decoder.norm = encoder.norm
    for i in range(len(decoder.layers)):
        mine, theirs = encoder.layers[i], decoder.layers[i]
        if how in ("all", "all but cross-attention"):
            theirs.attention, theirs.residual1 = mine.attention, mine.residual1
        if how in ("all", "all but self-attention"):
            theirs.cross_attention, theirs.cross_residual = mine.cross_attention, mine.cross_residual
        theirs.feedforward, theirs.residual2 = mine.feedforward, mine.residual2
'''),
    ("6.2", "by the table, with add_module", HEAD + '''
def share(encoder, decoder, how):
    parts = SHARED[how]
    for theirs, mine in zip(decoder.layers, encoder.layers):
        for part in parts:
            for name in (part, FRAMES[part]):
                theirs.add_module(name, mine.get_submodule(name))
    if parts:
        for name in ("embeddings", "norm"):
            decoder.add_module(name, encoder.get_submodule(name))
'''),
    ("6.3", "tensor by tensor", HEAD + '''
class Momentum:
    @torch.no_grad()
    def follow(self, encoders):
        m = self.config.momentum if int(self.steps) > 0 else 0.0
        for name in encoders:
            fast = encoders[name].state_dict()
            for key, slow in self.copies[name].state_dict().items():
                slow.mul_(m).add_(fast[key], alpha=1 - m)
        self.steps.add_(1)
'''),
    ("6.3", "parameters beside buffers, load_state_dict at the first step", HEAD + '''
class Momentum:
    def follow(self, encoders):
        with torch.no_grad():
            if int(self.steps) == 0:
                for name, encoder in encoders.items():
                    self.copies[name].load_state_dict({key: tensor.clone() for key, tensor in encoder.state_dict().items()})
            else:
                for name, encoder in encoders.items():
                    for slow, fast in zip(self.copies[name].buffers(), encoder.parameters()):
                        slow.copy_(self.config.momentum * slow + (1 - self.config.momentum) * fast.detach())
            self.steps = self.steps + 1
'''),
    ("6.4", "key by key", HEAD + '''
class Momentum:
    def need_room(self, pairs):
        if pairs <= self.config.queue:
            return
        raise UserError("the batch is larger than the queue")

    @torch.no_grad()
    def enqueue(self, keys, groups, gather):
        images, texts = gather(keys[0]), gather(keys[1])
        image_numbers, text_numbers = gather(groups[0]), gather(groups[1])
        place = int(self.place)
        for g in range(len(images)):
            self.images[place], self.texts[place] = images[g], texts[g]
            self.images_group[place], self.texts_group[place] = image_numbers[g], text_numbers[g]
            place = 0 if place == len(self.images) - 1 else place + 1
        self.place.fill_(place)
'''),
    ("6.4", "in two pieces, before the end and from the beginning", HEAD + '''
class Momentum:
    def need_room(self, pairs):
        if pairs > len(self.images):
            raise UserError(f"{pairs} pairs do not fit into {len(self.images)}")

    def enqueue(self, keys, groups, gather):
        new = {"images": keys[0], "texts": keys[1], "images_group": groups[0], "texts_group": groups[1]}
        start, Q = self.place.item(), self.config.queue
        with torch.no_grad():
            for name, queue in (("images", self.images), ("texts", self.texts), ("images_group", self.images_group), ("texts_group", self.texts_group)):
                rows = gather(new[name]).detach()
                G, fits = len(rows), min(len(rows), Q - start)
                queue[start:start + fits] = rows[:fits]
                queue[:G - fits] = rows[fits:]
            self.place = torch.tensor((start + G) % Q, device=self.place.device)
'''),
    ("6.5", "pair by pair", HEAD + '''
class Momentum:
    def contrast(self, queries, keys, groups, temperature, gather):
        images = torch.cat([gather(keys[0]), self.images])
        texts = torch.cat([gather(keys[1]), self.texts])
        image_numbers = torch.cat([gather(groups[0]), self.images_group])
        text_numbers = torch.cat([gather(groups[1]), self.texts_group])
        G = len(images) - self.config.queue
        steps = int(self.steps)
        share = 1.0 if steps >= self.config.ramp else steps / self.config.ramp
        alpha = share * self.config.alpha
        losses, logits = [], ([], [])
        for b in range(len(queries[0])):
            right = ((image_numbers == groups[0][b]) | (text_numbers == groups[1][b])).to(queries[0].dtype)
            for way, bank in enumerate((texts, images)):
                scores = (bank * queries[way][b]).sum(dim=1) / temperature
                with torch.no_grad():
                    belief = F.softmax((bank * keys[way][b]).sum(dim=1) / temperature, dim=0)
                    target = belief * alpha + right / right.sum() * (1 - alpha)
                losses.append(-(target * F.log_softmax(scores, dim=0)).sum() / 2)
                logits[way].append(scores[:G])
        return (torch.stack(losses).sum(), torch.tensor(len(queries[0]), device=queries[0].device)), (torch.stack(logits[0]), torch.stack(logits[1]))
'''),
    ("6.5", "two directions written out, two cross-entropies", HEAD + '''
def soft_entropy(logits, target):
    return (torch.logsumexp(logits, dim=1) * target.sum(dim=1) - (logits * target).sum(dim=1)).sum()

class Momentum:
    def contrast(self, queries, keys, groups, temperature, gather):
        own_images, own_texts = gather(keys[0]).detach(), gather(keys[1]).detach()
        same_image = torch.eq(groups[0].unsqueeze(1), torch.cat((gather(groups[0]), self.images_group)).unsqueeze(0))
        same_text = torch.eq(groups[1].unsqueeze(1), torch.cat((gather(groups[1]), self.texts_group)).unsqueeze(0))
        hard = torch.logical_or(same_image, same_text).to(torch.float32)
        hard = F.normalize(hard, p=1, dim=1)
        alpha = self.config.alpha * min(self.steps.item(), self.config.ramp) / self.config.ramp if self.config.ramp else self.config.alpha * (self.steps.item() > 0)
        tau = temperature.detach()
        i2t = torch.cat((queries[0] @ own_texts.T, queries[0] @ self.texts.T), dim=1) / temperature
        t2i = torch.cat((queries[1] @ own_images.T, queries[1] @ self.images.T), dim=1) / temperature
        with torch.no_grad():
            soft_t = torch.softmax(torch.cat((keys[0] @ own_texts.T, keys[0] @ self.texts.T), dim=1) / tau, dim=1)
            soft_i = torch.softmax(torch.cat((keys[1] @ own_images.T, keys[1] @ self.images.T), dim=1) / tau, dim=1)
        total = 0.5 * (soft_entropy(i2t, torch.lerp(hard, soft_t, alpha)) + soft_entropy(t2i, torch.lerp(hard, soft_i, alpha)))
        count = torch.ones(len(queries[0]), device=queries[0].device).sum().long()
        return (total, count), (i2t[:, :len(own_texts)], t2i[:, :len(own_images)])
'''),
    ("6.6", "loops", HEAD + '''
class Text:
    @property
    def kept(self):
        if self.belongs is None:
            return True
        return not self.belongs < 0.5

def bootstrap(samples, write, judge, said=own_caption):
    start = 0
    while start < len(samples):
        chunk, found = samples[start:start + CHUNK], []
        new = write(chunk) if write is not None else [""] * len(chunk)
        for sample, made in zip(chunk, new):
            for text in said(sample):
                found.append((replace(sample, caption=text), Text(sample.id, text, "web", None, sample.label)))
            if made:
                found.append((replace(sample, caption=made), Text(sample.id, made, "captioner")))
        texts = [text for _, text in found]
        if judge is not None:
            texts = [replace(text, belongs=belief) for text, belief in zip(texts, judge([shown for shown, _ in found]))]
        yield texts
        start += CHUNK

class Bootstrapped:
    def draw(self, rng):
        text = self.kept[rng.randrange(len(self.kept))]
        sample = self.world.pooled(self.web, int(text.picture.split("/")[-1]))
        return replace(sample, caption=text.text, label=text.noise)

def verdicts(texts):
    found = {}
    for text in texts:
        name = "captioner" if text.source == "captioner" else "web/" + (text.noise if text.noise else "right")
        row = found.setdefault(name, {"n": 0, "dropped": 0})
        row["n"] += 1
        row["dropped"] += 0 if text.kept else 1
    return found
'''),
    ("6.6", "the captioner's and the web's texts judged one after the other; counters", HEAD + '''
from collections import Counter

class Text:
    @property
    def kept(self):
        return (1.0 if self.belongs is None else self.belongs) >= 0.5

def chunk_of(chunk, write, judge, said):
    texts = []
    for source, label in (("web", True), ("captioner", False)):
        if source == "captioner" and not write:
            continue
        lists = [said(sample) for sample in chunk] if label else [[text] if text else [] for text in write(chunk)]
        shown = [replace(sample, caption=text) for sample, own in zip(chunk, lists) for text in own]
        beliefs = judge(shown) if judge else len(shown) * [None]
        texts += [Text(one.id, one.caption, source, belief, one.label if label else "") for one, belief in zip(shown, beliefs)]
    return texts

def bootstrap(samples, write, judge, said=own_caption):
    for number in range((len(samples) + CHUNK - 1) // CHUNK):
        yield chunk_of(samples[number * CHUNK:(number + 1) * CHUNK], write, judge, said)

class Bootstrapped:
    def draw(self, rng):
        text = rng.choice(self.kept)
        place = int(text.picture[text.picture.rindex("/") + 1:])
        return replace(self.world.pooled(self.web, place), label=text.noise, caption=text.text)

def verdicts(texts):
    names = [{"web": f"web/{text.noise}" if text.noise else "web/right"}.get(text.source, text.source) for text in texts]
    all_, dropped = Counter(names), Counter(name for name, text in zip(names, texts) if not text.kept)
    return {name: dict(n=n, dropped=dropped[name]) for name, n in all_.items()}
'''),
    ("6.7", "step by step", HEAD + '''
class BLIP:
    def keys(self, images, ids, mask):
        with torch.no_grad():
            eyes, reader = self.momentum.copies["vision"], self.momentum.copies["text_encoder"]
            image = self.momentum.copies["image_projection"](eyes.norm(eyes(images))[:, 0])
            text = self.momentum.copies["text_projection"](reader(ids, mask[:, None, :])[:, 0])
        return F.normalize(image, dim=1), F.normalize(text, dim=1)

    def compare(self, image_tokens, batch, gather):
        if self.momentum is None:
            raise UserError("there are no slow copies")
        right = positives(batch["text_group"], batch["image_group"], gather)
        need_wrong_partners(right)
        if torch.is_grad_enabled():
            self.momentum.need_room(right.shape[1])
            with torch.no_grad():
                self.temperature.clamp_(min=0.001, max=0.5)
            self.momentum.follow(self.copied())
        ids, mask = pad_to_longest(batch["input_ids"], batch["attention_mask"], gather)
        keys = self.keys(batch["images"], ids, mask)
        groups = (batch["image_group"], batch["text_group"])
        text = self.encode_text(ids, mask)
        image = F.normalize(self.image_projection(image_tokens[:, 0]), dim=-1)
        itc, (i2t, t2i) = self.momentum.contrast((image, text), keys, groups, self.temperature, gather)
        wrong_text = hard_negatives(i2t, right)
        wrong_image = hard_negatives(t2i, right)
        if torch.is_grad_enabled():
            self.momentum.enqueue(keys, groups, gather)
        everyones = gather(image_tokens), gather(ids), gather(mask)
        logits = torch.cat([self.match(image_tokens, ids, mask), self.match(everyones[0][wrong_image], ids, mask),
                            self.match(image_tokens, everyones[1][wrong_text], everyones[2][wrong_text])])
        belongs = torch.cat([torch.ones(len(ids), dtype=torch.int64), torch.zeros(2 * len(ids), dtype=torch.int64)]).to(ids.device)
        return {"itc": itc, "itm": matching_loss(logits, belongs)}
'''),
    ("6.7", "the keys by the copies' own words, all the rest in helpers", HEAD + '''
class BLIP:
    @torch.no_grad()
    def keys(self, images, ids, mask):
        made = []
        for way, given in (("image", (images,)), ("text", (ids, masks.padding(mask)))):
            part = self.momentum.copies["vision" if way == "image" else "text_encoder"]
            states = part(*given)
            made.append(unit(self.momentum.copies[f"{way}_projection"], part.norm(states) if way == "image" else states))
        return tuple(made)

    def begin(self, pairs):
        self.momentum.need_room(pairs)
        self.temperature.data = self.temperature.data.clamp(0.001, 0.5)
        self.momentum.follow(self.copied())

    def compare(self, image_tokens, batch, gather):
        if not self.config.momentum:
            raise UserError("no momentum")
        ids, mask = pad_to_longest(batch["input_ids"], batch["attention_mask"], gather)
        groups = batch["image_group"], batch["text_group"]
        right = positives(groups[1], groups[0], gather)
        need_wrong_partners(right)
        training = torch.is_grad_enabled()
        if training:
            self.begin(right.shape[1])
        keys = self.keys(batch["images"], ids, mask)
        queries = unit(self.image_projection, image_tokens), self.encode_text(ids, mask)
        itc, (i2t, t2i) = self.momentum.contrast(queries, keys, groups, self.temperature, gather)
        pairs, belongs = three_pairs(image_tokens, ids, mask, hard_negatives(t2i, right), hard_negatives(i2t, right), gather)
        itm = matching_loss(self.match(*pairs), belongs)
        if training:
            self.momentum.enqueue(keys, groups, gather)
        return dict(itc=itc, itm=itm)
'''),
]
