"""Wrong solutions that people really write: (task, what is wrong, old text, new text). `old` must stand once in the task's file."""

ATTEND = "        x = x + self.attention(self.norm1(x), maps=maps)  # Eq. 2\n"
FEED = "        return x + self.feedforward(self.norm2(x))  # Eq. 3\n"
FLAT = "        tokens = patches.flatten(2).transpose(1, 2)  # (B, N, D), row-major\n"
CLASS = "        tokens = torch.cat([self.class_token.expand(B, 1, D), tokens], dim=1)  # (B, 1 + N, D)\n"
PLACES = "        x = tokens + interpolate_positions(self.positions, rows, columns, self.config.align_corners)\n"
BLOCKS = "        for block in self.blocks[:depth]:\n"
GRID = "    grid = positions[1:].T.reshape(1, -1, side, side)  # (1, D, n, n)\n"
RESIZE = "    grid = F.interpolate(grid.float(), size=(rows, columns), mode=\"bicubic\", align_corners=align_corners)\n"
BACK = "    return torch.cat([positions[:1], grid.flatten(2)[0].T.to(positions.dtype)])"
TARGETS = "    targets = right.float() / right.sum(dim=1, keepdim=True)  # (B, G)\n"
TOTAL = ("    total = (F.cross_entropy(image_to_text, wider, reduction=\"sum\", label_smoothing=smoothing)\n"
         "             + F.cross_entropy(text_to_image, targets, reduction=\"sum\", label_smoothing=smoothing)) / 2\n")
PICTURE = "            picture = self.vision.norm(tokens[:, 0])\n"
LAST = "            last = attention_mask.sum(dim=1) - 1  # (B,), the last real token has read the whole sentence\n"
OF_LAST = "            sentence = hidden[torch.arange(len(hidden), device=hidden.device), last]\n"
LOSS = ("        loss = contrastive_loss(image_to_text / temperature, text_to_image / temperature, right, negatives,\n"
        "                                self.config.smoothing)\n")
WRONG_TEXTS = "            flat = self.encode_text(batch[\"negative_ids\"].view(B * K, T), batch[\"negative_mask\"].view(B * K, T))\n"
COSINES = "            negatives = torch.einsum(\"be,bke->bk\", image, flat.view(B, K, -1)) / temperature  # (B, K)\n"
ALIKE = "        image_to_text, text_to_image = similarities(image, text, gather)  # (B, G)\n"
RIGHT = "        right = positives(batch[\"text_group\"], batch[\"image_group\"], gather)  # (B, G)\n"

WRONG = [
    # 2.1
    ("2.1", "patches are read column by column", FLAT, "        tokens = patches.transpose(2, 3).flatten(2).transpose(1, 2)\n"),
    ("2.1", "channels and patches are exchanged by reshape: each token is a mixture of all patches", FLAT,
     "        tokens = patches.reshape(B, rows * columns, D)\n"),
    ("2.1", "rows of patches are read from the bottom", FLAT, "        tokens = patches.flip(2).flatten(2).transpose(1, 2)\n"),
    ("2.1", "the class token stands last", CLASS, "        tokens = torch.cat([tokens, self.class_token.expand(B, 1, D)], dim=1)\n"),
    ("2.1", "the class token is made of zeros, not learned", CLASS,
     CLASS.replace("self.class_token.expand(B, 1, D)", "torch.zeros_like(tokens[:, :1])")),
    ("2.1", "positions are forgotten: a picture is a bag of patches", PLACES, "        x = tokens\n"),
    ("2.1", "positions are added before the class token, which gets none", CLASS + PLACES,
     "        tokens = tokens + interpolate_positions(self.positions, rows, columns, self.config.align_corners)[1:]\n"
     "        x = torch.cat([self.class_token.expand(B, 1, D), tokens], dim=1)\n"),
    ("2.1", "positions are multiplied, not added", PLACES, PLACES.replace("tokens + ", "tokens * ")),
    ("2.1", "positions of another resolution are cut, not stretched", PLACES,
     "        x = tokens + (self.positions.repeat(3, 1)[:tokens.shape[1]])\n"),
    ("2.1", "rows and columns are exchanged for the positions", PLACES, PLACES.replace("rows, columns", "columns, rows")),
    ("2.1", "align_corners is not handed on", PLACES, PLACES.replace(", self.config.align_corners", "")),
    ("2.1", "CLIP's norm before the first block is forgotten", "        if self.pre_norm is not None:\n            x = self.pre_norm(x)\n", ""),
    ("2.1", "CLIP's first norm stands before the positions", PLACES + "        if self.pre_norm is not None:\n            x = self.pre_norm(x)\n",
     "        x = tokens if self.pre_norm is None else self.pre_norm(tokens)\n"
     "        x = x + interpolate_positions(self.positions, rows, columns, self.config.align_corners)\n"),
    ("2.1", "the final norm is applied here already: CLIP then norms the class token twice", "            x = block(x, maps)\n        return x\n",
     "            x = block(x, maps)\n        return x if self.norm is None else self.norm(x)\n"),
    ("2.1", "all blocks, whatever depth is asked for", BLOCKS, "        for block in self.blocks:\n"),
    ("2.1", "depth 0 is taken for 'not told'", BLOCKS, "        for block in self.blocks[:depth or None]:\n"),
    ("2.1", "one block more than asked for", BLOCKS, "        for block in self.blocks[:None if depth is None else depth + 1]:\n"),
    ("2.1", "the last blocks are taken, not the first", BLOCKS,
     "        for block in self.blocks[0 if depth is None else len(self.blocks) - depth:]:\n"),
    ("2.1", "the blocks' weights are not noted down", "            x = block(x, maps)\n", "            x = block(x)\n"),
    ("2.1", "the class token's row is thrown away", "            x = block(x, maps)\n        return x\n",
     "            x = block(x, maps)\n        return x[:, 1:]\n"),
    ("2.1", "pictures are not brought into the weights' precision", "images.to(self.patch_embedding.weight.dtype)", "images"),
    ("2.1", "post-norm, as in BERT", ATTEND, "        x = self.norm1(x + self.attention(x, maps=maps))\n"),
    ("2.1", "the residual is normed too: what stood there before is lost", ATTEND,
     "        x = self.norm1(x)\n        x = x + self.attention(x, maps=maps)\n"),
    ("2.1", "attention without its residual", ATTEND, "        x = self.attention(self.norm1(x), maps=maps)\n"),
    ("2.1", "feed-forward without its residual", FEED, "        return self.feedforward(self.norm2(x))\n"),
    ("2.1", "feed-forward beside attention, not behind it", ATTEND + FEED,
     "        return x + self.attention(self.norm1(x), maps=maps) + self.feedforward(self.norm2(x))\n"),
    ("2.1", "feed-forward before attention", ATTEND + FEED,
     "        x = x + self.feedforward(self.norm2(x))\n        return x + self.attention(self.norm1(x), maps=maps)\n"),
    ("2.1", "one norm for both parts", FEED, FEED.replace("norm2", "norm1")),
    ("2.1", "no norm before the feed-forward", FEED, FEED.replace("self.norm2(x)", "x")),
    # 2.2
    ("2.2", "rows and columns exchanged", RESIZE, RESIZE.replace("(rows, columns)", "(columns, rows)")),
    ("2.2", "the class token's position is resized with the others", "    if (rows, columns) == (side, side):\n        return positions\n" + GRID,
     "    if (rows, columns) == (side, side):\n        return positions\n"
     "    grid = (positions[1:] + positions[:1] / len(positions)).T.reshape(1, -1, side, side)\n"),
    ("2.2", "the class token is taken for the last position", GRID, GRID.replace("positions[1:]", "positions[:-1]")),
    ("2.2", "the class token's position comes out last", BACK, "    return torch.cat([grid.flatten(2)[0].T.to(positions.dtype), positions[:1]])"),
    ("2.2", "the class token's position is lost", BACK, "    return grid.flatten(2)[0].T.to(positions.dtype)"),
    ("2.2", "the table is reshaped without turning: channels and places are mixed", GRID, "    grid = positions[1:].reshape(1, -1, side, side)\n"),
    ("2.2", "read back column by column", BACK, BACK.replace("grid.flatten(2)", "grid.transpose(2, 3).flatten(2)")),
    ("2.2", "bilinear", RESIZE, RESIZE.replace("bicubic", "bilinear")),
    ("2.2", "nearest neighbour", RESIZE, RESIZE.replace(", mode=\"bicubic\", align_corners=align_corners", "")),
    ("2.2", "corners are always aligned", RESIZE, RESIZE.replace("=align_corners)", "=True)")),
    ("2.2", "corners are never aligned", RESIZE, RESIZE.replace("=align_corners)", "=False)")),
    ("2.2", "aligned and not aligned exchanged", RESIZE, RESIZE.replace("=align_corners)", "=not align_corners)")),
    ("2.2", "smoothed first, as pictures are when they shrink", RESIZE,
     RESIZE.replace("align_corners=align_corners)", "align_corners=align_corners, antialias=True)")),
    ("2.2", "left alone if the number of patches is the same: 2 × 8 for 4 × 4", "    if (rows, columns) == (side, side):",
     "    if rows * columns == side * side or rows == side:"),
    ("2.2", "only the number of rows counts", RESIZE, RESIZE.replace("(rows, columns)", "(rows, rows)")),
    ("2.2", "resized in half precision", RESIZE, RESIZE.replace("grid.float()", "grid")),
    ("2.2", "comes out in fp32, whatever the model is", BACK, BACK.replace(".to(positions.dtype)", "")),
    ("2.2", "positions are cut from the graph", GRID, GRID.replace("positions[1:]", "positions[1:].detach()")),
    # 2.3
    ("2.3", "only the diagonal is right: a caption that stands twice is a negative", TARGETS,
     "    targets = torch.eye(*right.shape)[:, torch.arange(right.shape[1])]\n"),
    ("2.3", "only the first right one counts", TARGETS, "    targets = F.one_hot(right.int().argmax(dim=1), right.shape[1]).float()\n"),
    ("2.3", "the target of several right ones is not divided: it sums to more than 1", TARGETS, "    targets = right.float()\n"),
    ("2.3", "divided by the number of candidates, not of right ones", TARGETS, TARGETS.replace("right.sum(dim=1, keepdim=True)", "right.shape[1]")),
    ("2.3", "divided down the columns", TARGETS, TARGETS.replace("right.sum(dim=1, keepdim=True)", "right.sum(dim=0, keepdim=True).clamp(min=1)")),
    ("2.3", "a softmax of the right ones is the target: the wrong ones get some too", TARGETS, "    targets = right.float().softmax(dim=1)\n"),
    ("2.3", "a mean over the pairs in the place of their sum", TOTAL, TOTAL.replace("\"sum\"", "\"mean\"")),
    ("2.3", "both directions are added up, not averaged", TOTAL, TOTAL.replace(") / 2\n", ")\n")),
    ("2.3", "from picture to text only", TOTAL, "    total = F.cross_entropy(image_to_text, wider, reduction=\"sum\", label_smoothing=smoothing)\n"),
    ("2.3", "from text to picture only", TOTAL,
     "    total = F.cross_entropy(text_to_image, targets, reduction=\"sum\", label_smoothing=smoothing)\n"),
    ("2.3", "the second direction is the first one again", TOTAL,
     TOTAL.replace("F.cross_entropy(text_to_image,", "F.cross_entropy(image_to_text[:, :right.shape[1]],")),
    ("2.3", "wrong captions are forgotten", "    if negatives is not None:\n", "    if False:\n"),
    ("2.3", "wrong captions are right ones", "        wider = F.pad(targets, (0, negatives.shape[1]))\n",
     "        wider = F.pad(targets, (0, negatives.shape[1]), value=1.0)\n"),
    ("2.3", "wrong captions stand in front and the targets do not move", "torch.cat([image_to_text, negatives], dim=1)",
     "torch.cat([negatives, image_to_text], dim=1)"),
    ("2.3", "each picture meets all wrong captions of the batch",
     "        image_to_text = torch.cat([image_to_text, negatives], dim=1)  # (B, G + K)\n"
     "        wider = F.pad(targets, (0, negatives.shape[1]))\n",
     "        every = negatives.flatten().expand(len(right), -1)\n        image_to_text = torch.cat([image_to_text, every], dim=1)\n"
     "        wider = F.pad(targets, (0, every.shape[1]))\n"),
    ("2.3", "texts meet the wrong captions too", TOTAL,
     TOTAL.replace("F.cross_entropy(text_to_image, targets,", "F.cross_entropy(text_to_image if negatives is None else torch.cat([text_to_image, negatives], dim=1), wider,")),
    ("2.3", "not smoothed", TOTAL, TOTAL.replace(", label_smoothing=smoothing", "")),
    ("2.3", "one direction is smoothed", TOTAL, TOTAL.replace("wider, reduction=\"sum\", label_smoothing=smoothing", "wider, reduction=\"sum\"")),
    ("2.3", "the number of candidates for the number of pairs", "torch.tensor(len(right), device=right.device)",
     "torch.tensor(right.shape[1], device=right.device)"),
    ("2.3", "softmax down the columns", TOTAL, TOTAL.replace("F.cross_entropy(image_to_text, wider", "F.cross_entropy(image_to_text.T, wider.T")),
    ("2.3", "sigmoid of each pair by itself (SigLIP)", TOTAL,
     "    total = F.binary_cross_entropy_with_logits(image_to_text, wider, reduction=\"sum\")\n"),
    # 2.4
    ("2.4", "the mean of all patches speaks for the picture", PICTURE, PICTURE.replace("tokens[:, 0]", "tokens[:, 1:].mean(dim=1)")),
    ("2.4", "the first patch speaks for the picture: the class token is thought to be gone", PICTURE,
     PICTURE.replace("tokens[:, 0]", "tokens[:, 1]")),
    ("2.4", "the last token speaks for the picture", PICTURE, PICTURE.replace("tokens[:, 0]", "tokens[:, -1]")),
    ("2.4", "the final norm is forgotten", PICTURE, "            picture = tokens[:, 0]\n"),
    ("2.4", "the final norm is applied twice", PICTURE, "            picture = self.vision.norm(self.vision.norm(tokens[:, 0]))\n"),
    ("2.4", "pictures are not of unit length", "return F.normalize(self.image_projection(picture), dim=-1)", "return self.image_projection(picture)"),
    ("2.4", "unit length before the projection", "return F.normalize(self.image_projection(picture), dim=-1)",
     "return self.image_projection(F.normalize(picture, dim=-1))"),
    ("2.4", "unit length along the batch", "return F.normalize(self.image_projection(picture), dim=-1)",
     "return F.normalize(self.image_projection(picture), dim=0)"),
    ("2.4", "the last place speaks for the sentence, padding or not", OF_LAST, "            sentence = hidden[:, -1]\n"),
    ("2.4", "the first token speaks, as in BERT: it has read nothing but itself", OF_LAST, "            sentence = hidden[:, 0]\n"),
    ("2.4", "the place behind the last real token", LAST, "            last = attention_mask.sum(dim=1).clamp(max=input_ids.shape[1] - 1)\n"),
    ("2.4", "the largest id marks the end: wrong where a text was cut", LAST, "            last = input_ids.argmax(dim=1)\n"),
    ("2.4", "padding is recognised by its id", LAST, "            last = (input_ids != 0).sum(dim=1) - 1\n"),
    ("2.4", "all texts are as long as the first one", LAST, "            last = (attention_mask.sum(dim=1) - 1)[:1].expand(len(input_ids))\n"),
    ("2.4", "the mean of a causal decoder's tokens", OF_LAST, "            sentence = masked_mean(hidden, attention_mask)\n"),
    ("2.4", "padding is averaged too", "            sentence = masked_mean(hidden, attention_mask)\n", "            sentence = hidden.mean(dim=1)\n"),
    ("2.4", "real words look at padding", "            hidden = self.text(input_ids, masks.padding(attention_mask))  # (B, T, D)\n",
     "            hidden = self.text(input_ids, masks.padding(attention_mask | True))\n"),
    ("2.4", "texts are not of unit length", "return F.normalize(self.text_projection(sentence), dim=-1)", "return self.text_projection(sentence)"),
    ("2.4", "the picture's projection serves for texts too", "return F.normalize(self.text_projection(sentence), dim=-1)",
     "return F.normalize(F.linear(sentence, self.image_projection.weight[:, :sentence.shape[1]]), dim=-1)"),
    # 2.5
    ("2.5", "multiplied by the temperature", LOSS,
     LOSS.replace("image_to_text / temperature, text_to_image / temperature", "image_to_text * temperature, text_to_image * temperature")),
    ("2.5", "not divided by the temperature", LOSS, LOSS.replace(" / temperature", "")),
    ("2.5", "one direction is divided by the temperature", LOSS, LOSS.replace("text_to_image / temperature", "text_to_image")),
    ("2.5", "the temperature is not held above 0.01", "self.temperature.clamp(min=0.01)", "self.temperature"),
    ("2.5", "the temperature is held below 0.01", "self.temperature.clamp(min=0.01)", "self.temperature.clamp(max=0.01)"),
    ("2.5", "the temperature is taken as exp(t), as CLIP has it", "self.temperature.clamp(min=0.01)", "1 / self.temperature.exp()"),
    ("2.5", "the temperature does not learn", "self.temperature.clamp(min=0.01)", "self.temperature.detach().clamp(min=0.01)"),
    ("2.5", "the cosine of wrong captions is not divided by the temperature", COSINES, COSINES.replace(" / temperature", "")),
    ("2.5", "wrong captions without gradient", COSINES, COSINES.replace("flat.view", "flat.detach().view")),
    ("2.5", "wrong captions are compared with the caption, not with the picture", COSINES, COSINES.replace("image, flat", "text, flat")),
    ("2.5", "wrong captions of other pictures: B and K exchanged", COSINES,
     COSINES.replace("flat.view(B, K, -1)", "flat.view(K, B, -1).transpose(0, 1)")),
    ("2.5", "wrong captions are read with the right captions' mask", WRONG_TEXTS,
     "            mask = F.pad(batch[\"attention_mask\"], (0, T - batch[\"attention_mask\"].shape[1])).repeat_interleave(K, dim=0)\n"
     "            flat = self.encode_text(batch[\"negative_ids\"].view(B * K, T), mask)\n"),
    ("2.5", "one wrong caption of each picture counts", COSINES,
     COSINES.replace("/ temperature  # (B, K)\n", "/ temperature\n            negatives = negatives[:, :1]\n")),
    ("2.5", "wrong captions are read and not used", LOSS, LOSS.replace("right, negatives,", "right, None,")),
    ("2.5", "only this rank's texts are compared", ALIKE + RIGHT,
     "        image_to_text, text_to_image = similarities(image, text, alone)\n"
     "        right = positives(batch[\"text_group\"], batch[\"image_group\"], alone)\n"),
    ("2.5", "the other direction is the transpose: wrong once there are several ranks", ALIKE,
     ALIKE + "        if image_to_text.shape[0] == image_to_text.shape[1]:\n            text_to_image = image_to_text.T\n        else:\n            text_to_image = image_to_text\n"),
    ("2.5", "both directions exchanged", LOSS,
     LOSS.replace("image_to_text / temperature, text_to_image / temperature", "text_to_image / temperature, image_to_text / temperature")),
    ("2.5", "equal pictures are negatives of each other", RIGHT, RIGHT.replace("batch[\"image_group\"]", "torch.arange(len(image))")),
    ("2.5", "equal texts are negatives of each other", RIGHT, RIGHT.replace("batch[\"text_group\"]", "torch.arange(100, 100 + len(image))")),
    ("2.5", "not smoothed", LOSS, LOSS.replace("self.config.smoothing", "0.0")),
    ("2.5", "under another name", "        return {\"itc\": loss}\n", "        return {\"clip\": loss}\n"),
    ("2.5", "the mean in the place of sum and number", "        return {\"itc\": loss}\n",
     "        return {\"itc\": (loss[0] / loss[1], loss[1])}\n"),
    ("2.5", "pictures cut from the graph", "        image = self.encode_image(batch[\"images\"])\n",
     "        image = self.encode_image(batch[\"images\"]).detach()\n"),
]
