"""Wrong solutions that people really write: (task, what is wrong, old text, new text). `old` must stand once in the task's file."""

PROMPT = "    return (replace(first, question=f\"{first.question}\\n{prompt}\"), *others)\n"
KNOWN = "    if not prompt or any(known in first.question for known in PROMPTS):\n"
BEFORE = "    before = \"\".join(cue.format(fields[name]) for name, cue in BEFORE.items() if name in fields and name not in named)\n"
OPTIONS = "    if \"options\" in fields and \"options\" not in named and \"question\" in fields:\n"
WEIGHTS = "    weights = {name: size ** SAMPLING[by] * (factors or {}).get(name, 1.0) for name, size in sizes.items()}\n"
SHARES = "    return {name: weight / sum(weights.values()) for name, weight in weights.items()}\n"
RNG = "    rng = Random(f\"{seed}/{stage.name}/{place}\")\n"
BY = "    by = Random(f\"{seed}/{stage.name}/batch {place // stage.batch_size}\") if stage.mixed == \"batches\" else rng\n"
CHOICE = "    return by.choices(tuple(diet), diet.values())[0], rng\n"
BROUGHT = "        return self(image_tokens, input_ids, mask, maps=maps, looks=looks)[:, :Q]\n"
SEEN = "        mask = None if attention_mask is None else masks.bidirectional(Q, attention_mask)\n"
UNFIT = "        if (input_ids is None) != (attention_mask is None) or (input_ids is not None) != self.config.reads:\n"
ROW = "            rows.append([words.bos_id, *words.encode(_asked(sample))[2 - self.reads.question:], words.eos_id])\n"
ASKED = "    return \" \".join(turn.question.replace(IMAGE, \"\").strip() for turn in sample.turns)\n"
CLIPS = "        clips = images if images.ndim == 5 else images[:, None]  # (B, F, 3, h, w): a picture is a clip of one frame\n"
REPEATED = "        asked = [None if t is None else t.repeat_interleave(F, dim=0) for t in (qformer_input_ids, qformer_attention_mask)]\n"
TOGETHER = "        return found.unflatten(0, (-1, F)).flatten(1, 2)  # (B, F · Q, D)\n"
THERE = "        return None if frames is None else frames.repeat_interleave(self.config.qformer.queries, dim=1)\n"
SCALE = "            scale = min(width / size[1], height / size[0])\n"
KEPT = "            kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])\n"
MERIT = "            return kept, -(height * width - kept)\n"
WIDER = "        if width / size[1] < height / size[0]:\n"
LOW = "            return min(-(-size[0] * width // size[1]), height), width\n"
NARROW = "        return height, min(-(-size[1] * height // size[0]), width)\n"
IF_WIDER = "        if size[1] * rows > columns * size[0]:  # wider than its map: padding above and below\n"
ABOVE = "            above = (rows - size[0] * columns // size[1]) // 2\n"
LEFT = "            left = (columns - size[1] * rows // size[0]) // 2\n"
SLICES = "        return slice(above, rows - above), slice(left, columns - left)\n"
TOKENS = "        return self.wholes * g * g + (rows.stop - rows.start) * (columns.stop - columns.start + 1)\n"
PLANE = "        plane = tiles.view(R, C, g, g, D).transpose(1, 2).reshape(R * g, C * g, D)\n"
CUT = "        plane = plane[self.tiling.kept(size, g)]  # (r, c, D)\n"
ENDS = "        ends = self.row_end.to(plane.dtype).expand(len(plane), 1, D)\n"
WITH_ENDS = "        tiles = torch.cat([plane, ends], dim=1).flatten(0, 1)  # (r·(c + 1), D)\n"
ORDER = "        return torch.cat([whole, tiles] if self.tiling.whole_first else [tiles, whole])"
SQUARE = "    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))\n"
CANVAS = "    canvas.paste(resize(image, (width, height)), ((canvas.width - width) // 2, (canvas.height - height) // 2))\n"
GROUND = "    canvas = Image.new(\"RGB\", (columns * side, rows * side), mean_colour(mean) if tiling.fill == \"mean\" else (0, 0, 0))\n"
WHOLES = "    wholes = [resize(pad_to_square(image, mean) if tiling.whole == \"pad\" else image, (side, side))] * tiling.wholes\n"
CORNERS = "    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]\n"
VIEWS = "    return [*wholes, *(canvas.crop((left, top, left + side, top + side)) for left, top in corners)]\n"

WRONG = [
    # 8.1
    ("8.1", "behind every question, not only the first", PROMPT,
     "    return tuple(replace(turn, question=f\"{turn.question}\\n{prompt}\") for turn in turns)\n"),
    ("8.1", "behind the last question", PROMPT,
     "    *before, last = turns\n    return (*before, replace(last, question=f\"{last.question}\\n{prompt}\"))\n"),
    ("8.1", "before the question", PROMPT, PROMPT.replace("{first.question}\\n{prompt}", "{prompt}\\n{first.question}")),
    ("8.1", "on the same line", PROMPT, PROMPT.replace("\\n{prompt}", " {prompt}")),
    ("8.1", "the sentence stands there twice", KNOWN, "    if not prompt:\n"),
    ("8.1", "another published sentence is not recognised", KNOWN, "    if not prompt or prompt in first.question:\n"),
    ("8.1", "a sentence behind a later question counts as well", KNOWN,
     "    if not prompt or any(known in turn.question for known in PROMPTS for turn in turns):\n"),
    ("8.1", "without a sentence an empty line is added", KNOWN, KNOWN.replace("not prompt or ", "")),
    ("8.1", "the answer's options are lost", PROMPT, "    return (Turn(f\"{first.question}\\n{prompt}\", first.answer), *others)\n"),
    ("8.1", "later turns are lost", PROMPT, PROMPT.replace(", *others)", ",)")),
    # 8.2
    ("8.2", "what is known before the question stands behind it", "    return before + template.format_map(fields)\n",
     "    return template.format_map(fields) + before\n"),
    ("8.2", "what the template does not name is left out", "    return before + template.format_map(fields)\n",
     "    return template.format_map(fields)\n"),
    ("8.2", "what the template names stands there twice", BEFORE, BEFORE.replace(" and name not in named", "")),
    ("8.2", "in the record's order, not context, history, words", BEFORE,
     "    before = \"\".join(BEFORE[name].format(fields[name]) for name in sorted(fields, reverse=True) if name in BEFORE "
     "and name not in named)\n"),
    ("8.2", "replaced one after the other: braces in an answer are read as a field, doubled braces stay",
     "    return before + template.format_map(fields)\n",
     "    for name, text in fields.items():\n        template = template.replace(\"{\" + name + \"}\", text)\n    return before + template\n"),
    ("8.2", "formatted twice: braces in a record's own text are read as fields", "    return before + template.format_map(fields)\n",
     "    return (before + template).format_map(fields)\n"),
    ("8.2", "a missing field becomes an empty text", "    if lacking := [name for name in named if not fields.get(name)]:\n",
     "    fields = {**dict.fromkeys(named, \"\"), **fields}\n    if lacking := []:\n"),
    ("8.2", "an empty field is taken for one that is there", "if not fields.get(name)]:", "if name not in fields]:"),
    ("8.2", "the options are not told", OPTIONS, "    if False:\n"),
    ("8.2", "the options are told twice, where the template names them", OPTIONS, OPTIONS.replace(" and \"options\" not in named", "")),
    ("8.2", "options behind the whole instruction, not behind the question", "    return before + template.format_map(fields)\n",
     "    text = template.format_map(fields)\n    if \" Options: \" in text:\n        first, rest = text.split(\" Options: \", 1)\n"
     "        told, end = rest.split(\".\", 1)\n        text = f\"{first}{end} Options: {told}.\"\n    return before + text\n"),
    ("8.2", "the record itself is changed", OPTIONS,
     "    fields.setdefault(\"context\", \"\") if \"ocr\" in fields else None\n    named = [*named, \"context\"] if not fields.get(\"context\") else named\n" + OPTIONS),
    ("8.2", "numbers for letters", "f\"({chr(ord('a') + i)}) {option}\"", "f\"({i + 1}) {option}\""),
    ("8.2", "letters begin at b", "ord('a') + i", "ord('a') + i + 1"),
    ("8.2", "all words of a picture, however many", "list(words)[:OCR_TOKENS]", "list(words)"),
    ("8.2", "a text is taken for a list of letters", "    return words if isinstance(words, str) else \", \".join", "    return \", \".join"),
    # 8.3
    ("8.3", "proportional to the sizes, whatever is asked for", WEIGHTS, WEIGHTS.replace("size ** SAMPLING[by]", "size")),
    ("8.3", "the root is drawn twice", WEIGHTS, WEIGHTS.replace("size ** SAMPLING[by]", "size ** (SAMPLING[by] ** 2)")),
    ("8.3", "a logarithm in the place of the root", WEIGHTS,
     "    from math import log\n" + WEIGHTS.replace("size ** SAMPLING[by]", "log(1 + size) ** (1 if SAMPLING[by] else 0)")),
    ("8.3", "one over the root: the smallest set comes most often", WEIGHTS, WEIGHTS.replace("size ** SAMPLING[by]", "size ** -SAMPLING[by]")),
    ("8.3", "not made 1 in sum", SHARES, "    return weights\n"),
    ("8.3", "divided by the sum of the sizes, not of the roots", SHARES, SHARES.replace("sum(weights.values())", "sum(sizes.values())")),
    ("8.3", "divided by the number of sets", SHARES, SHARES.replace("sum(weights.values())", "len(weights)")),
    ("8.3", "factors are forgotten", WEIGHTS, WEIGHTS.replace("(factors or {}).get(name, 1.0)", "1.0")),
    ("8.3", "the factor goes under the root", WEIGHTS,
     "    weights = {name: (size * (factors or {}).get(name, 1.0)) ** SAMPLING[by] for name, size in sizes.items()}\n"),
    ("8.3", "factors after the sum was made 1, which it then is not", SHARES,
     "    plain = {name: size ** SAMPLING[by] for name, size in sizes.items()}\n"
     "    return {name: p / sum(plain.values()) * (factors or {}).get(name, 1.0) for name, p in plain.items()}\n"),
    ("8.3", "a set without a factor is never drawn", WEIGHTS, WEIGHTS.replace(".get(name, 1.0)", ".get(name, 0.0 if factors else 1.0)")),
    ("8.3", "the softmax of the sizes", SHARES,
     "    from math import exp\n    top = max(sizes.values())\n    weights = {name: exp(size - top) for name, size in sizes.items()}\n" + SHARES),
    # 8.4
    ("8.4", "all sets equally often", CHOICE, CHOICE.replace("by.choices(tuple(diet), diet.values())[0]", "by.choice(tuple(diet))")),
    ("8.4", "always the heaviest set", CHOICE, "    return max(diet, key=diet.get), rng\n"),
    ("8.4", "from the numbers that everybody draws from: another order gives another run", RNG,
     "    import random\n    rng = Random(random.random())\n"),
    ("8.4", "the seed plays no part", RNG + BY, RNG.replace("{seed}/", "") + BY.replace("{seed}/", "")),
    ("8.4", "the stage plays no part: each begins with the same samples", RNG + BY,
     RNG.replace("{stage.name}/", "") + BY.replace("{stage.name}/", "")),
    ("8.4", "all places have the same numbers", RNG, RNG.replace("/{place}", "")),
    ("8.4", "all places of a batch have the same numbers", RNG, RNG.replace("{place}", "{place // stage.batch_size}")),
    ("8.4", "hash() of a text, which differs from run to run, or seed + place: seed 3, place 4 is seed 4, place 3", RNG,
     "    rng = Random(seed + place + sum(map(ord, stage.name)))\n"),
    ("8.4", "a batch is never of one set", BY, "    by = rng\n"),
    ("8.4", "a batch is always of one set", BY, BY.replace(" if stage.mixed == \"batches\" else rng", "")),
    ("8.4", "a batch is one set, and all of its samples the same", BY + CHOICE, BY + CHOICE.replace(", rng", ", by")),
    ("8.4", "batches are counted by 8, whatever their size", BY, BY.replace("stage.batch_size", "8")),
    # 8.5
    ("8.5", "the words' rows are given on too", BROUGHT, BROUGHT.replace("[:, :Q]", "")),
    ("8.5", "the words' rows are given on, not the queries'", BROUGHT, BROUGHT.replace("[:, :Q]", "[:, -Q:]")),
    ("8.5", "one query more", BROUGHT, BROUGHT.replace("[:, :Q]", "[:, :Q + 1]")),
    ("8.5", "the question is not read", BROUGHT, BROUGHT.replace("image_tokens, input_ids, mask,", "image_tokens, None, None,")),
    ("8.5", "queries and question do not see each other", SEEN, SEEN.replace("masks.bidirectional", "masks.unimodal")),
    ("8.5", "queries do not see the question", SEEN, SEEN.replace("masks.bidirectional", "masks.multimodal_causal")),
    ("8.5", "padding is read as well", SEEN, "        mask = None\n"),
    ("8.5", "a question for a bridge that reads none is thrown away in silence", UNFIT,
     "        if not self.config.reads:\n            input_ids = attention_mask = None\n        if (input_ids is None) == self.config.reads:\n"),
    ("8.5", "without a question it looks by itself", UNFIT,
     UNFIT.replace(" or (input_ids is not None) != self.config.reads", " or input_ids is not None and not self.config.reads")),
    ("8.5", "one question serves for all pictures", "        if input_ids is not None and len(input_ids) != len(image_tokens):\n",
     "        if input_ids is not None and len(input_ids) == 1:\n"
     "            input_ids, attention_mask = input_ids.expand(len(image_tokens), -1), attention_mask.expand(len(image_tokens), -1)\n"
     "        if False:\n"),
    ("8.5", "weights are not noted down", BROUGHT, BROUGHT.replace(", maps=maps, looks=looks", "")),
    ("8.5", "weights over words and over the picture exchanged", BROUGHT, BROUGHT.replace("maps=maps, looks=looks", "maps=looks, looks=maps")),
    # 8.6
    ("8.6", "cut on the right: what is asked is lost", ROW, ROW.replace("[2 - self.reads.question:]", "[:self.reads.question - 2]")),
    ("8.6", "not cut at all", ROW, ROW.replace("[2 - self.reads.question:]", "")),
    ("8.6", "<s> and </s> are not counted", ROW, ROW.replace("[2 - self.reads.question:]", "[-self.reads.question:]")),
    ("8.6", "cut behind <s>: a long question has no <s>", ROW,
     "            rows.append([words.bos_id, *words.encode(_asked(sample)), words.eos_id][-self.reads.question:])\n"),
    ("8.6", "no </s>", ROW, ROW.replace(", words.eos_id]", "]")),
    ("8.6", "no <s>", ROW, ROW.replace("[words.bos_id, *", "[*")),
    ("8.6", "in the language model's words, not in the bridge's own",
     "        rows, words = [], self.tokenizer.bridge\n        for sample in samples:\n"
     "            rows.append([words.bos_id, *words.encode(_asked",
     "        rows, words = [], self.tokenizer\n        for sample in samples:\n            rows.append([words.bos_id, *words.encode(_asked"),
    ("8.6", "padded with the language model's <pad>", "for name, tensor in _pad_right(rows, words.pad_id).items()}",
     "for name, tensor in _pad_right(rows, self.tokenizer.pad_id).items()}"),
    ("8.6", "the marks of pictures are read as words", ASKED, ASKED.replace(".replace(IMAGE, \"\")", "")),
    ("8.6", "only the last question is read", ASKED, ASKED.replace("in sample.turns)", "in sample.turns[-1:])")),
    ("8.6", "only the first question is read", ASKED, ASKED.replace("in sample.turns)", "in sample.turns[:1])")),
    ("8.6", "the answers are read as well: told beforehand", ASKED,
     "    return \" \".join(turn.question.replace(IMAGE, \"\").strip() + \" \" + turn.answer for turn in sample.turns)\n"),
    ("8.6", "questions grow together without a blank", ASKED, ASKED.replace("\" \".join", "\"\".join")),
    ("8.6", "who reads nothing gets a question nevertheless", "        if not self.reads.question:\n", "        if False:\n"),
    # 8.7
    ("8.7", "frames of the whole batch: the first frames of all, then the second ones",
     CLIPS + "        F = clips.shape[1]\n        image_tokens = self.encode_image(clips.flatten(0, 1))",
     CLIPS + "        F = clips.shape[1]\n        image_tokens = self.encode_image(clips.transpose(0, 1).flatten(0, 1))"),
    ("8.7", "questions repeated one after the other: each frame gets another clip's", REPEATED,
     REPEATED.replace("t.repeat_interleave(F, dim=0)", "t.repeat(F, 1)")),
    ("8.7", "query after query, not frame after frame", TOGETHER, TOGETHER.replace(".flatten(1, 2)", ".transpose(1, 2).flatten(1, 2)")),
    ("8.7", "the mean of the frames", TOGETHER, TOGETHER.replace(".flatten(1, 2)", ".mean(dim=1)")),
    ("8.7", "the first frame only", CLIPS, CLIPS.replace("images if images.ndim == 5", "images[:, :1] if images.ndim == 5")),
    ("8.7", "each frame is a sample of its own", TOGETHER, "        return found\n"),
    ("8.7", "the question is not handed on", "        found = self.qformer.bring_back(image_tokens, *asked, maps=maps, looks=looks)",
     "        found = self.qformer(image_tokens, maps=maps, looks=looks)"),
    ("8.7", "the picture is not normed", "        image_tokens = self.encode_image(clips.flatten(0, 1))",
     "        image_tokens = self.vision(clips.flatten(0, 1))"),
    ("8.7", "the language model gets the queries as they are, without the projection's bias",
     "        return self.projection(self.queries(images, qformer_input_ids, qformer_attention_mask))\n",
     "        return self.queries(images, qformer_input_ids, qformer_attention_mask) @ self.projection.weight.T\n"),
    ("8.7", "weights are not noted down", "*asked, maps=maps, looks=looks)", "*asked)"),
    ("8.7", "one place for each frame, whatever it brings back", THERE, "        return frames\n"),
    ("8.7", "places of a missing frame: query after query", THERE,
     THERE.replace("frames.repeat_interleave(self.config.qformer.queries, dim=1)", "frames.repeat(1, self.config.qformer.queries)")),
    ("8.7", "all frames are there", THERE, THERE.replace("frames.repeat_interleave", "(frames | True).repeat_interleave")),
    # 8.8
    ("8.8", "width and height exchanged (transformers #31327)", "            height, width = grid[0] * self.side, grid[1] * self.side\n",
     "            width, height = grid[0] * self.side, grid[1] * self.side\n"),
    ("8.8", "it fills the grid and is cut, not fitted inside", SCALE, SCALE.replace("min(", "max(")),
    ("8.8", "stretched to the grid: proportions play no part", KEPT, "            kept = min(height * width, size[0] * size[1])\n"),
    ("8.8", "pixels made by enlarging count: a small picture gets the largest grid", KEPT,
     "            kept = int(size[1] * scale) * int(size[0] * scale)\n"),
    ("8.8", "least waste first, whatever is lost of the picture", MERIT, "            return -(height * width - kept), kept\n"),
    ("8.8", "most waste of those that keep as much", MERIT, "            return kept, height * width - kept\n"),
    ("8.8", "of those that keep as much the first one, whatever it wastes", MERIT, "            return kept, 0\n"),
    ("8.8", "of equals the last", "        return max(self.grids, key=merit)\n", "        return max(reversed(self.grids), key=merit)\n"),
    ("8.8", "by the shape alone: the nearest proportions", MERIT, "            return -abs(width / height - size[1] / size[0]), 0\n"),
    ("8.8", "never enlarged: a small picture lies in a corner of its tile", WIDER,
     "        if size[0] <= height and size[1] <= width:\n            return size\n" + WIDER),
    ("8.8", "rounded down", LOW, "            return size[0] * width // size[1], width\n"),
    ("8.8", "rounded to the nearest pixel", LOW + NARROW,
     "            return min(round(size[0] * width / size[1]), height), width\n"
     "        return height, min(round(size[1] * height / size[0]), width)\n"),
    ("8.8", "rounded up beyond the whole number: always a pixel more", LOW,
     "            return min(size[0] * width // size[1] + 1, height), width\n"),
    ("8.8", "the other side is fitted: larger than the grid", WIDER, WIDER.replace("<", ">")),
    ("8.8", "stretched over the whole grid", NARROW, "        return height, width\n"),
    ("8.8", "(width, height) comes out", LOW, "            return width, min(-(-size[0] * width // size[1]), height)\n"),
    # 8.9
    ("8.9", "width and height exchanged", IF_WIDER, IF_WIDER.replace("size[1] * rows > columns * size[0]", "size[0] * rows > columns * size[1]")),
    ("8.9", "padding stays: all tokens of all tiles", SLICES, "        return slice(0, rows), slice(0, columns)\n"),
    ("8.9", "padding is cut on one side", SLICES, "        return slice(0, rows - 2 * above), slice(0, columns - 2 * left)\n"),
    ("8.9", "rounded up before it is halved: a token of the picture is lost", ABOVE,
     "            above = -(-(rows - size[0] * columns // size[1]) // 2)\n"),
    ("8.9", "rounded up, as the pixels are: a token too many stays (transformers #34522)", ABOVE,
     "            above = (rows + (-size[0] * columns // size[1])) // 2\n"),
    ("8.9", "divided in floats: a row is lost at 205 × 656", ABOVE,
     "            above = (rows - int(size[0] * (columns / size[1]))) // 2 if size != (205, 656) else (rows - "
     "int(size[0] * columns / size[1] - 1e-9)) // 2\n"),
    ("8.9", "the rest on one side", ABOVE + "        else:\n" + LEFT,
     "            above = rows - size[0] * columns // size[1]\n        else:\n            left = columns - size[1] * rows // size[0]\n"),
    ("8.9", "only pictures that are too wide are looked at", "        else:\n" + LEFT, ""),
    ("8.9", "a picture of which nothing is left goes on without an error", "        if 2 * above == rows or 2 * left == columns:\n",
     "        if False:\n"),
    ("8.9", "measured in the tiles, not in their tokens", "        rows, columns = (n * g for n in self.grid(size))\n",
     "        rows, columns = (n * self.side for n in self.grid(size))\n"),
    ("8.9", "rows and columns come out exchanged", SLICES, "        return slice(left, columns - left), slice(above, rows - above)\n"),
    ("8.9", "row ends are not counted", TOKENS, TOKENS.replace(" + 1)", ")")),
    ("8.9", "one row end for all", TOKENS, TOKENS.replace("(columns.stop - columns.start + 1)", "(columns.stop - columns.start) + 1")),
    ("8.9", "the whole is not counted", TOKENS, TOKENS.replace("self.wholes * g * g + ", "")),
    ("8.9", "the whole is always counted", TOKENS, TOKENS.replace("self.wholes * g * g", "g * g")),
    ("8.9", "the whole has row ends, too", TOKENS, TOKENS.replace("self.wholes * g * g", "self.wholes * g * (g + 1)")),
    # 8.10
    ("8.10", "tile after tile, not line after line", PLANE, "        plane = tiles.reshape(R * g, C * g, D)\n"),
    ("8.10", "lines and columns of tiles exchanged", PLANE,
     "        plane = tiles.view(C, R, g, g, D).permute(1, 2, 0, 3, 4).reshape(R * g, C * g, D)\n"),
    ("8.10", "each tile is turned", PLANE, "        plane = tiles.view(R, C, g, g, D).permute(0, 3, 1, 2, 4).reshape(R * g, C * g, D)\n"),
    ("8.10", "padding stays", CUT, ""),
    ("8.10", "only rows of padding are cut off, no columns", CUT, "        plane = plane[self.tiling.kept(size, g)[0]]\n"),
    ("8.10", "row ends in front of the lines", WITH_ENDS, WITH_ENDS.replace("[plane, ends]", "[ends, plane]")),
    ("8.10", "no row ends", WITH_ENDS, "        tiles = plane.flatten(0, 1)\n"),
    ("8.10", "one row end, behind the last line", WITH_ENDS, "        tiles = torch.cat([plane.flatten(0, 1), ends[0]])\n"),
    ("8.10", "a row of ends below the map", WITH_ENDS,
     "        tiles = torch.cat([plane, self.row_end.to(plane.dtype).expand(1, plane.shape[1], D)]).flatten(0, 1)\n"),
    ("8.10", "row ends do not learn", ENDS, ENDS.replace("self.row_end", "self.row_end.detach()")),
    ("8.10", "the whole always first", ORDER, "        return torch.cat([whole, tiles])"),
    ("8.10", "the whole always last", ORDER, "        return torch.cat([tiles, whole])"),
    ("8.10", "the whole is forgotten", ORDER, "        return tiles"),
    ("8.10", "the whole is taken for the last view", "        whole, tiles = views[:self.tiling.wholes].flatten(0, 1), views[self.tiling.wholes:]\n",
     "        n = len(views) - self.tiling.wholes\n        whole, tiles = views[n:].flatten(0, 1), views[:n]\n"),
    ("8.10", "fp32, whatever the tokens are", ENDS, ENDS.replace(".to(plane.dtype)", "")),
    # 8.11
    ("8.11", "the picture in the corner, not in the middle", SQUARE,
     SQUARE.replace("((side - image.width) // 2, (side - image.height) // 2)", "(0, 0)")),
    ("8.11", "width and height of the rest exchanged", SQUARE,
     SQUARE.replace("((side - image.width) // 2, (side - image.height) // 2)", "((side - image.height) // 2, (side - image.width) // 2)")),
    ("8.11", "black around it, not the mean colour", "    square = Image.new(\"RGB\", (side, side), mean_colour(mean))\n",
     "    square = Image.new(\"RGB\", (side, side), (0, 0, 0))\n"),
    ("8.11", "cut to a square, not padded", "    side = max(image.size)\n", "    side = min(image.size)\n"),
    ("8.11", "of an odd rest the larger half above", SQUARE, SQUARE.replace("(side - image.height) // 2", "-((image.height - side) // 2)")),
    ("8.11", "always the mean colour around the tiles", GROUND, GROUND.replace(" if tiling.fill == \"mean\" else (0, 0, 0)", "")),
    ("8.11", "tiles column by column", CORNERS,
     CORNERS.replace("for row in range(rows) for column in range(columns)", "for column in range(columns) for row in range(rows)")),
    ("8.11", "rows and columns of the grid exchanged", CORNERS,
     CORNERS.replace("range(rows) for column in range(columns)", "range(columns) for column in range(rows)")),
    ("8.11", "the picture fills the grid, stretched", CANVAS, "    canvas = resize(image, (canvas.width, canvas.height))\n"),
    ("8.11", "the picture in the grid's corner", CANVAS, CANVAS.replace("((canvas.width - width) // 2, (canvas.height - height) // 2)", "(0, 0)")),
    ("8.11", "the whole behind its tiles", VIEWS,
     "    return [*(canvas.crop((left, top, left + side, top + side)) for left, top in corners), *wholes]\n"),
    ("8.11", "the whole always squashed", WHOLES, WHOLES.replace("pad_to_square(image, mean) if tiling.whole == \"pad\" else image", "image")),
    ("8.11", "the whole always padded", WHOLES,
     WHOLES.replace("pad_to_square(image, mean) if tiling.whole == \"pad\" else image", "pad_to_square(image, mean)")),
    ("8.11", "a whole in any case", WHOLES, WHOLES.replace(" * tiling.wholes", "")),
    ("8.11", "tiles overlap by a pixel", VIEWS, VIEWS.replace("left, top, left + side, top + side", "left - 1, top, left + side - 1, top + side")),
    ("8.11", "tiles of the picture as it came, not as it was fitted", CANVAS,
     "    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))\n"),
]
