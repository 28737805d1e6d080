"""Chat: what is said, what is remembered, and every way in which it cannot be said."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from training_fakes import VOCAB, FakeScenes

from nanovlm import chat, evaluate, recipes
from nanovlm.chat import Dialogue, load_run, main
from nanovlm.data.sample import Turn
from nanovlm.errors import UserError
from nanovlm.papers.llava import LLaVA
from nanovlm.runs import checkpoint, folder
from nanovlm.tiling import hd_tiling
from nanovlm.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(FakeScenes().texts(), VOCAB)
RED, BLUE = (Image.new("RGB", (48, 48), colour) for colour in ("red", "blue"))


@pytest.fixture
def run(tmp_path):
    """What train_tiny.py leaves, untrained."""
    torch.manual_seed(0)
    path, recipe = tmp_path / "run", recipes.get("llava/tiny")
    path.mkdir()
    folder.write_json(path / "config.json", {"what": folder.OURS, "recipe": {"name": recipe.name}})
    checkpoint.save(path / "tune.pt", recipe.build("tune").state_dict())
    checkpoint.save(path / "last.pt", {"tokenizer": TOKENIZER.to_dict()})
    return path


@pytest.fixture
def photo(tmp_path):
    RED.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def said(dialogue: Dialogue, question: str) -> str:
    return "".join(dialogue.ask(question))


def test_an_answer_is_what_generate_gives(run):
    """In pieces, and the same with the turn and the picture before."""
    examinee, limit = load_run(run)
    assert limit == recipes.get("llava/tiny").stages[-1].max_length == 256
    dialogue = Dialogue(examinee, [RED], limit, room=12)
    pieces = list(dialogue.ask("what is it?"))
    assert len(pieces) > 1 and "".join(pieces).strip() == dialogue.turns[0].answer
    dialogue.waiting.append(BLUE)
    second = said(dialogue, "and now <image>?")
    assert dialogue.turns[1].question == "<image>\nand now ?", "a mark that a person writes is no picture"
    assert dialogue.images == [RED, BLUE] and dialogue.waiting == []
    sample = evaluate.Sample("x", (RED, BLUE), turns=(*dialogue.turns[:1], Turn("<image>\nand now ?", " ")))
    (images, ids, mask), _ = examinee.inputs([sample])
    with torch.no_grad():
        got = examinee.model.generate(images, ids, mask, 12, [TOKENIZER.eos_id])
    assert examinee.text(got[0].tolist(), [TOKENIZER.eos_id]) == second.strip() != ""
    dialogue.begin()
    assert (dialogue.turns, dialogue.images, dialogue.waiting) == ([], [], [RED])


def test_pieces_end_at_whole_characters(run, monkeypatch):
    """A letter of two bytes may be two tokens: nothing is printed in between."""
    examinee, _ = load_run(run)
    letters = [*TOKENIZER.encode("a"), *TOKENIZER.encode("é"), *TOKENIZER.encode("b")]
    assert len(letters) == 4
    monkeypatch.setattr(chat.generation, "stream", lambda *_, **__: (torch.tensor([letters[:n]]) for n in range(1, 5)))
    assert list(Dialogue(examinee).ask("x")) == ["a", "é", "b", ""]


def test_silence_is_no_turn(run, monkeypatch):
    examinee, _ = load_run(run)
    monkeypatch.setattr(chat.generation, "stream", lambda *_, **__: iter([torch.tensor([[TOKENIZER.eos_id]])]))
    dialogue = Dialogue(examinee, [RED])
    assert said(dialogue, "x") == "" and dialogue.turns == [] and dialogue.waiting == [RED]


def test_a_conversation_that_is_too_long(run):
    examinee, _ = load_run(run)
    with pytest.raises(UserError, match=r"is \d+ tokens long, the model was trained on 20 at most: begin a new one"):
        said(Dialogue(examinee, [RED], limit=20), "word " * 30)


def test_temperature_draws_and_a_seed_repeats(run):
    examinee, _ = load_run(run)
    texts = [said(Dialogue(examinee, [RED], temperature=2.0, seed=seed, room=20), "x") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_one_question_from_the_command_line(run, photo, capsys):
    assert main([str(run), "--image", photo, "--ask", "what is it?", "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() and not err


def test_a_whole_conversation(run, photo, monkeypatch, capsys):
    """A wrong path is said and does not end it; an empty line does."""
    lines = iter(["what is it?", "/image nowhere.png", f"/image {photo}", "and this?", "/new", "again?", "", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main([str(run), "--image", photo, "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 3
    assert err == "nowhere.png: the picture is missing.\n"
    assert next(lines) == "never read"


def test_the_end_of_the_input_is_the_end(run, monkeypatch):
    def ended(prompt):
        raise EOFError
    monkeypatch.setattr("builtins.input", ended)
    assert main([str(run)]) == 0


def test_what_cannot_be_talked_to(run, photo, tmp_path, capsys):
    def complaint(*arguments: str) -> str:
        assert main([*arguments, "--ask", "x"]) == 2
        return capsys.readouterr().err

    assert "is no folder of a run" in complaint(str(tmp_path))
    assert "nowhere.png: the picture is missing" in complaint(str(run), "--image", "nowhere.png")
    (run / "tune.pt").unlink()
    assert f"--recipe llava/tiny --out {run} --resume" in complaint(str(run))
    recipe = recipes.get("clip/tiny")
    (run / "config.json").write_text(json.dumps({"what": folder.OURS, "recipe": {"name": recipe.name}}))
    checkpoint.save(run / "clip.pt", recipe.build("clip").state_dict())
    assert "holds a CLIP, which was never trained to converse" in complaint(str(run))


def test_a_tiled_picture(run):
    """Its size goes along with the views."""
    examinee, _ = load_run(run)
    examinee.model = LLaVA(replace(examinee.model.config, tiling=hd_tiling(48))).eval()
    examinee.transform = replace(examinee.transform, tiling=hd_tiling(48))
    dialogue = Dialogue(examinee, [Image.new("RGB", (100, 60), "red")])
    assert said(dialogue, "x") == dialogue.turns[0].answer != ""
