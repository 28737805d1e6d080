"""Other right solutions, which the grader must let pass: (task, what is different, the file's text)."""

HEAD = "import torch\nfrom torch import Tensor\nfrom torch.nn import functional as F\nimport math\n"
RIGHT = [
    ("8.1", "a list that is changed at its first place", '''
def prompted(turns, prompt):
    out = list(turns)
    asked = out[0].question
    for sentence in PROMPTS:
        if sentence in asked:
            return tuple(out)
    if prompt:
        out[0] = Turn(asked + "\\n" + prompt, out[0].answer, out[0].kind, out[0].options)
    return tuple(out)
'''),
    ("8.1", "turn by turn", '''
def prompted(turns, prompt):
    told = [sentence for sentence in PROMPTS if turns[0].question.find(sentence) >= 0]
    add = "\\n" + prompt if prompt and not told else ""
    return tuple(replace(turn, question=turn.question + (add if n == 0 else "")) for n, turn in enumerate(turns))
'''),
    ("8.2", "piece by piece, as Formatter reads the template", '''
def filled(template, fields):
    named = names(template)
    for name in named:
        if name not in fields or not fields[name]:
            raise UserError(f"no {name}")
    values = dict(fields)
    if "question" in values and "options" in values and "options" not in named:
        values["question"] = values["question"] + " Options: " + values["options"] + "."
    out = []
    for name, cue in (("context", "Context: "), ("history", "Dialogue so far: "), ("ocr", "OCR tokens: ")):
        if name in values and name not in named:
            out.append(cue + values[name] + (". " if name == "ocr" else " "))
    for text, name, _, _ in Formatter().parse(template):
        out.append(text)
        if name is not None:
            out.append(values[name])
    return "".join(out)

def lettered(options):
    out = []
    for letter, option in zip("abcdefghijklmnopqrstuvwxyz", options):
        out.append("(" + letter + ") " + option)
    return " ".join(out)

def listed(words):
    if type(words) is str:
        return words
    return ", ".join([str(word) for word in words][:30])
'''),
    ("8.2", "str.format, and a walrus", '''
def filled(template, fields):
    wanted = set(names(template))
    if not all(map(fields.get, wanted)):
        raise UserError("the record lacks " + ", ".join(sorted(wanted - set(filter(fields.get, fields)))))
    given = fields.copy()
    if {"question", "options"} <= given.keys() and "options" not in wanted:
        given["question"] += f" Options: {given['options']}."
    text = template.format(**given)
    for name in ("ocr", "history", "context"):
        if name in given and name not in wanted:
            text = BEFORE[name].replace("{}", "%s") % given[name] + text
    return text

def lettered(options):
    return " ".join(f"({chr(97 + i)}) {option}" for i, option in enumerate(options))

def listed(words):
    if isinstance(words, str):
        return words
    text, n = "", 0
    for word in words:
        if n == OCR_TOKENS:
            break
        text, n = text + ", " * (n > 0) + str(word), n + 1
    return text
'''),
    ("8.3", "a loop, and the root by math", '''
from math import sqrt

def balanced(sizes, by="sqrt", factors=None):
    found, whole = {}, 0.0
    for name in sizes:
        weight = float(sizes[name]) if by == "proportional" else sqrt(sizes[name]) if by == "sqrt" else 1.0
        if factors and name in factors:
            weight = weight * factors[name]
        found[name] = weight
        whole = whole + weight
    for name in found:
        found[name] /= whole
    return found
'''),
    ("8.3", "logarithms, with numpy", '''
import numpy as np

def balanced(sizes, by="sqrt", factors=None):
    power = SAMPLING[by]
    logs = power * np.log(np.array(list(sizes.values()), dtype=np.float64))
    logs = logs + np.log([(factors or {}).get(name, 1.0) for name in sizes])
    p = np.exp(logs - logs.max())
    return dict(zip(sizes, (p / p.sum()).tolist()))
'''),
    ("8.4", "the cumulated weights by hand", '''
def pick(diet, number):
    whole, reached = sum(diet.values()), 0.0
    for name, weight in diet.items():
        reached += weight / whole
        if number < reached:
            return name
    return name

def drawn(stage, seed, place, diet):
    rng = Random(repr(("sample", seed, stage.name, place)))
    if stage.mixed != "batches":
        return pick(diet, rng.random()), rng
    step = place // stage.batch_size
    return pick(diet, Random(repr(("batch", seed, stage.name, step))).random()), rng

'''),
    ("8.4", "two generators, of which one is for the set", '''
def drawn(stage, seed, place, diet):
    which = f"step {place // stage.batch_size}" if stage.mixed == "batches" else f"place {place}"
    first = Random(f"{which} of {stage.name} under {seed}")
    names, weights = zip(*diet.items())
    name, = first.choices(names, weights)
    return name, Random(f"what to draw at {place} in {stage.name} under {seed}")

'''),
    ("8.5", "the mask by hand, checks one by one", HEAD + '''
class QFormer:
    def bring_back(self, image_tokens, input_ids=None, attention_mask=None, maps=None, looks=None):
        Q = self.config.queries
        if self.config.reads:
            if input_ids is None or attention_mask is None:
                raise UserError("a question is needed")
            if input_ids.shape[0] != image_tokens.shape[0]:
                raise UserError("one picture for each question")
            seen = torch.cat([attention_mask.new_ones(len(attention_mask), Q), attention_mask], dim=1)
            seen = seen[:, None].expand(-1, seen.shape[1], -1)
            rows = self.forward(image_tokens, input_ids, seen, maps=maps, looks=looks)
            return rows.narrow(1, 0, Q)
        if input_ids is not None or attention_mask is not None:
            raise UserError("no question is read")
        return self.forward(image_tokens, maps=maps, looks=looks)
'''),
    ("8.5", "a split of the rows", HEAD + '''
class QFormer:
    def bring_back(self, image_tokens, input_ids=None, attention_mask=None, maps=None, looks=None):
        asked = [x is not None for x in (input_ids, attention_mask)]
        if asked != [self.config.reads] * 2:
            raise UserError("the question does not fit this Q-Former")
        mask = masks.bidirectional(self.config.queries, attention_mask) if self.config.reads else None
        if self.config.reads and len(image_tokens) - len(input_ids):
            raise UserError("pictures and questions of different number")
        out = self(image_tokens, input_ids, mask, None, 0, maps, looks)
        queries, words = out.split([self.config.queries, out.shape[1] - self.config.queries], dim=1)
        return queries
'''),
    ("8.6", "rows padded by hand", HEAD + '''
class Collate:
    def questions(self, samples):
        room = self.reads.question
        if room == 0:
            return {}
        words = self.tokenizer.bridge
        rows = []
        for sample in samples:
            ids = words.encode(_asked(sample))
            while len(ids) > room - 2:
                ids = ids[1:]
            rows.append([words.bos_id] + ids + [words.eos_id])
        T = max(len(row) for row in rows)
        ids, mask = torch.full((len(rows), T), words.pad_id), torch.zeros(len(rows), T, dtype=torch.bool)
        for b, row in enumerate(rows):
            ids[b, :len(row)] = torch.tensor(row)
            mask[b, :len(row)] = True
        return {"qformer_input_ids": ids, "qformer_attention_mask": mask}

def _asked(sample):
    text = ""
    for turn in sample.turns:
        text = (text + " " if text else "") + turn.question.replace("<image>", "").strip()
    return text
'''),
    ("8.6", "the marks split out; cut from behind", HEAD + '''
class Collate:
    def questions(self, samples):
        batch = {}
        if self.reads.question:
            words, rows = self.tokenizer.bridge, []
            for sample in samples:
                back = words.encode(_asked(sample))[::-1][:self.reads.question - 2]
                rows.append([words.bos_id, *reversed(back), words.eos_id])
            padded = _pad_right(rows, words.pad_id)
            batch = dict(qformer_input_ids=padded["input_ids"], qformer_attention_mask=padded["attention_mask"])
        return batch

def _asked(sample):
    return " ".join(["".join(turn.question.split(IMAGE)).strip() for turn in sample.turns])
'''),
    ("8.7", "a loop over frames", HEAD + '''
class InstructBLIP:
    def queries(self, images, qformer_input_ids=None, qformer_attention_mask=None, maps=None, looks=None):
        if images.dim() == 4:
            images = images.unsqueeze(1)
        B, n = images.shape[:2]
        every = images.reshape(B * n, *images.shape[2:])
        rows = torch.arange(B).repeat_interleave(n)
        ids = qformer_input_ids[rows] if qformer_input_ids is not None else None
        mask = qformer_attention_mask[rows] if qformer_attention_mask is not None else None
        found = self.qformer.bring_back(self.encode_image(every), ids, mask, maps, looks)
        return torch.stack([torch.cat([found[b * n + f] for f in range(n)]) for b in range(B)])

    def image_prefix(self, images, qformer_input_ids=None, qformer_attention_mask=None):
        brought = self.queries(images, qformer_input_ids, qformer_attention_mask)
        return F.linear(brought, self.projection.weight, self.projection.bias)

    def there(self, frames):
        if frames is None:
            return None
        Q = self.config.qformer.queries
        return torch.stack([torch.stack([frame for frame in row for _ in range(Q)]) for row in frames])
'''),
    ("8.7", "views and an expanded question", HEAD + '''
class InstructBLIP:
    def queries(self, images, qformer_input_ids=None, qformer_attention_mask=None, maps=None, looks=None):
        one = images.ndim == 4
        B, n = len(images), 1 if one else images.shape[1]
        tokens = self.encode_image(images if one else images.flatten(0, 1))
        if qformer_input_ids is not None:
            qformer_input_ids = qformer_input_ids[:, None].expand(-1, n, -1).flatten(0, 1)
            qformer_attention_mask = qformer_attention_mask[:, None].expand(-1, n, -1).flatten(0, 1)
        brought = self.qformer.bring_back(tokens, qformer_input_ids, qformer_attention_mask, maps=maps, looks=looks)
        return brought.reshape(B, n * brought.shape[1], brought.shape[2])

    def image_prefix(self, *given):
        return self.projection(self.queries(*given))

    def there(self, frames):
        if frames is not None:
            frames = frames[:, :, None].expand(-1, -1, self.config.qformer.queries).flatten(1)
        return frames
'''),
    ("8.8", "loops, in fractions", '''
from math import ceil, floor
from itertools import count
from collections import namedtuple

def fit(side, grid, size):
    height, width = grid[0] * side, grid[1] * side
    if width * size[0] < height * size[1]:
        return width, size[1]
    return height, size[0]

class Tiling:
    def grid(self, size):
        best = None
        for grid in self.grids:
            top, bottom = fit(self.side, grid, size)
            kept = min((size[1] * top // bottom) * (size[0] * top // bottom), size[0] * size[1])
            waste = grid[0] * grid[1] * self.side ** 2 - kept
            if best is None or (kept, -waste) > best[:2]:
                best = (kept, -waste, grid)
        return best[2]

    def fitted(self, size):
        height, width = (n * self.side for n in self.grid(size))
        top, bottom = fit(self.side, self.grid(size), size)
        return min(height, (size[0] * top + bottom - 1) // bottom), min(width, (size[1] * top + bottom - 1) // bottom)
'''),
    ("8.8", "sorted, as the released code scales", '''
from math import ceil

class Tiling:
    def grid(self, size):
        h, w = size

        def rank(pair):
            number, (rows, columns) = pair
            H, W = rows * self.side, columns * self.side
            scale = min(W / w, H / h)
            effective = min(int(w * scale) * int(h * scale), w * h)
            return -effective, H * W - effective, number

        return sorted(enumerate(self.grids), key=rank)[0][1]

    def fitted(self, size):
        h, w = size
        rows, columns = self.grid(size)
        H, W = rows * self.side, columns * self.side
        fills_width = W * h < H * w
        if fills_width:
            return min(H, h * W // w + (h * W % w > 0)), W
        return H, min(W, w * H // h + (w * H % h > 0))
'''),
    ("8.9", "a loop that strips padding", '''
def strip(n, picture):
    cut = 0
    while n - 2 * (cut + 1) >= picture:
        cut += 1
    return cut

class Tiling:
    def kept(self, size, g):
        h, w = size
        rows, columns = self.grid(size)
        rows, columns = rows * g, columns * g
        above, left = 0, 0
        if w * rows > h * columns:
            above = strip(rows, h * columns // w)
        else:
            left = strip(columns, w * rows // h)
        if above * 2 >= rows or left * 2 >= columns:
            raise UserError("too thin")
        return slice(above, rows - above), slice(left, columns - left)

    def tokens(self, size, g):
        rows, columns = self.kept(size, g)
        r, c = rows.stop - rows.start, columns.stop - columns.start
        return (g ** 2 if self.whole != "none" else 0) + r * c + r
'''),
    ("8.9", "in fractions, counted by ranges", '''
class Tiling:
    def kept(self, size, g):
        grid, bounds = self.grid(size), []
        for axis in (0, 1):
            n, across = grid[axis] * g, grid[1 - axis] * g
            shown = size[axis] * across // size[1 - axis]
            cut = max(0, (n - shown) // 2)
            if cut + cut == n:
                raise UserError("nothing of it is left")
            bounds.append(slice(cut, n - cut))
        return tuple(bounds)

    def tokens(self, size, g):
        rows, columns = self.grid(size)
        down, across = self.kept(size, g)
        n = len(range(rows * g)[down]) * (1 + len(range(columns * g)[across]))
        return n + self.wholes * g * g
'''),
    ("8.10", "token by token", HEAD + '''
class Tiles:
    def join(self, views, size):
        g = math.isqrt(views.shape[1])
        R, C = self.tiling.grid(size)
        rows, columns = self.tiling.kept(size, g)
        n = self.tiling.wholes
        out = []
        for r in range(rows.start, rows.stop):
            for c in range(columns.start, columns.stop):
                out.append(views[n + r // g * C + c // g, r % g * g + c % g])
            out.append(self.row_end.to(views.dtype))
        whole = list(views[0]) if n else []
        return torch.stack(whole + out if self.tiling.whole_first else out + whole)
'''),
    ("8.10", "tiles put side by side", HEAD + '''
class Tiles:
    def join(self, views, size):
        g = int(views.shape[1] ** 0.5 + 0.5)
        R, C = self.tiling.grid(size)
        parts = list(views.unflatten(1, (g, g)))
        whole = [parts.pop(0).reshape(g * g, -1)] if self.tiling.whole != "none" else []
        lines = [torch.cat(parts[r * C:(r + 1) * C], dim=1) for r in range(R)]
        down, across = self.tiling.kept(size, g)
        plane = torch.cat(lines, dim=0)[down][:, across]
        end = self.row_end.type_as(plane)[None]
        joined = torch.cat([torch.cat([line, end]) for line in plane])
        order = [*whole, joined] if self.tiling.whole_first else [joined, *whole]
        return torch.cat(order, dim=0)
'''),
    ("8.11", "pixels in numpy", '''
def on_ground(inner, height, width, colour):
    ground = np.zeros((height, width, 3), dtype=np.uint8)
    ground[:, :] = colour
    top, left = (height - inner.shape[0]) // 2, (width - inner.shape[1]) // 2
    ground[top:top + inner.shape[0], left:left + inner.shape[1]] = inner
    return ground

def pad_to_square(image, mean):
    side = max(image.width, image.height)
    return Image.fromarray(on_ground(np.asarray(image), side, side, [int(255 * m) for m in mean]))

def cut(image, tiling, mean):
    rows, columns = tiling.grid((image.height, image.width))
    high, wide = tiling.fitted((image.height, image.width))
    S = tiling.side
    colour = [int(255 * m) for m in mean] if tiling.fill == "mean" else [0, 0, 0]
    canvas = on_ground(np.asarray(resize(image, (wide, high))), rows * S, columns * S, colour)
    views = []
    if tiling.whole == "pad":
        views.append(resize(pad_to_square(image, mean), (S, S)))
    elif tiling.whole == "stretch":
        views.append(resize(image, (S, S)))
    for r in range(rows):
        for c in range(columns):
            views.append(Image.fromarray(canvas[r * S:(r + 1) * S, c * S:(c + 1) * S].copy()))
    return views
'''),
    ("8.11", "crops that reach beyond the picture, by Pillow", '''
def pad_to_square(image, mean):
    long = max(image.size)
    left, top = (long - image.width) // 2, (long - image.height) // 2
    out = Image.new("RGB", (long, long), tuple(int(m * 255) for m in mean))
    out.paste(image, box=(left, top, left + image.width, top + image.height))
    return out

def cut(image, tiling, mean):
    size = image.height, image.width
    R, C = tiling.grid(size)
    high, wide = tiling.fitted(size)
    side, fitted = tiling.side, resize(image, (wide, high))
    left, top = (C * side - wide) // 2, (R * side - high) // 2
    tiles = []
    for number in range(R * C):
        r, c = divmod(number, C)
        tile = Image.new("RGB", (side, side), mean_colour(mean) if tiling.fill == "mean" else (0, 0, 0))
        tile.paste(fitted, (left - c * side, top - r * side))
        tiles.append(tile)
    if tiling.whole == "none":
        return tiles
    square = pad_to_square(image, mean) if tiling.whole == "pad" else image
    return [resize(square, (side, side))] + tiles
'''),
]
