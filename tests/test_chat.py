"""Chat: what is said, what is remembered, and every way in which it cannot be said."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image
from training_fakes import VOCAB, FakeScenes

from nanovlm import chat, recipes
from nanovlm.chat import Dialogue, load_run, main
from nanovlm.data.sample import Sample, Turn
from nanovlm.errors import UserError
from nanovlm.evaluate.pupil import Pupil
from nanovlm.papers.llava import LLaVA
from nanovlm.runs import checkpoint, folder, shipped
from nanovlm.tiling import hd_tiling
from nanovlm.tokenizer import Tokenizer
from nanovlm.world.datasets import Scenes

TOKENIZER = Tokenizer.train(FakeScenes().texts(), VOCAB)
RED, BLUE = (Image.new("RGB", (48, 48), colour) for colour in ("red", "blue"))


@pytest.fixture
def run(tmp_path):
    """What train_tiny.py leaves, untrained."""
    torch.manual_seed(3)
    path, recipe = tmp_path / "run", recipes.get("llava/tiny")
    path.mkdir()
    folder.write_json(path / "config.json", {"what": folder.OURS, "recipe": {"name": recipe.name}, "data": "scenes", "steps": None})
    checkpoint.save(path / "tune.pt", recipe.build(recipe.stages[-1]).state_dict())
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
    pupil = load_run(run)
    assert pupil.stage.max_length == 256
    dialogue = Dialogue(pupil, [RED], 256, room=12)
    pieces = list(dialogue.ask("what is it?"))
    assert len(pieces) > 1 and "".join(pieces).strip() == dialogue.turns[0].answer
    dialogue.waiting.append(BLUE)
    second = said(dialogue, "and now <image>?")
    assert dialogue.turns[1].question == "<image>\nand now ?", "a mark that a person writes is no picture"
    assert dialogue.images == [RED, BLUE] and dialogue.waiting == []
    sample = Sample("x", (RED, BLUE), turns=(*dialogue.turns[:1], Turn("<image>\nand now ?", " ")))
    got = pupil.model.generate(pupil.read([sample]), 12, [TOKENIZER.eos_id])
    assert pupil.text(got[0].tolist(), [TOKENIZER.eos_id]) == second.strip() != ""
    dialogue.begin()
    assert (dialogue.turns, dialogue.images, dialogue.waiting) == ([], [], [RED])


def test_pieces_end_at_whole_characters(run, monkeypatch):
    """A letter of two bytes may be two tokens: nothing is printed in between."""
    pupil = load_run(run)
    letters = [*TOKENIZER.encode("a"), *TOKENIZER.encode("é"), *TOKENIZER.encode("b")]
    assert len(letters) == 4
    monkeypatch.setattr(chat.generation, "stream", lambda *_, **__: (torch.tensor([letters[:n]]) for n in range(1, 5)))
    assert list(Dialogue(pupil).ask("x")) == ["a", "é", "b", ""]


def test_silence_is_no_turn(run, monkeypatch):
    pupil = load_run(run)
    monkeypatch.setattr(chat.generation, "stream", lambda *_, **__: iter([torch.tensor([[TOKENIZER.eos_id]])]))
    dialogue = Dialogue(pupil, [RED])
    assert said(dialogue, "x") == "" and dialogue.turns == [] and dialogue.waiting == [RED]


def test_a_conversation_that_is_too_long(run):
    pupil = load_run(run)
    with pytest.raises(UserError, match=r"is \d+ tokens long, the model was trained on 20 at most: begin a new one"):
        said(Dialogue(pupil, [RED], limit=20), "word " * 30)


def test_temperature_draws_and_a_seed_repeats(run):
    pupil = load_run(run)
    texts = [said(Dialogue(pupil, [RED], temperature=2.0, seed=seed, room=20), "x") for seed in (1, 1, 2)]
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


def test_a_shipped_model_is_opened_by_its_name_and_shown_a_scene(run, tmp_path, monkeypatch, capsys):
    """Its paper's, or a recipe's in full. What the scene holds is told when the model has had its say."""
    monkeypatch.setenv("NANOVLM_SHIPPED", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    folder.write_json(run / "config.json", {"recipe": {"name": "llava/tiny"}, "data": "scenes", "steps": None, "seed": 0,
                                            "from_scratch": False, "machine": {"processes": 1}, "what": folder.OURS})
    folder.write_json(run / "summary.json", {"stages": [{"name": "tune", "seconds": 1.0}], "eval": {}, "versions": {}})
    monkeypatch.setattr(shipped, "answers", lambda *model: [])
    shipped.export(run, ["tune"])
    asked, scene = [], Scenes(0, 48).held_out("captions", 3)
    read = Pupil.read
    monkeypatch.setattr(Pupil, "read", lambda self, samples: asked.extend(samples[0].images) or read(self, samples))
    for name in ("llava", "llava/tiny"):
        assert main([name, "--scene", "3", "--ask", "what is it?", "--max-new-tokens", "3"]) == 0
        out, err = capsys.readouterr()
        assert out and err == f"truth: {scene.caption}\n" and asked.pop().tobytes() == scene.images[0].tobytes()
    assert main(["lava", "--ask", "x"]) == 2
    assert "lava is no folder of a run" in (err := capsys.readouterr().err) and "a shipped model (llava/tiny)" in err
    assert main([str(run), "--ask", "x", "--max-new-tokens", "1"]) == 0, "a folder comes before a name"
    state, about = shipped.load(tmp_path / "weights/llava-tiny@tune.npz")
    shipped.write({"projector.weight": torch.zeros(2, 2)}, about, tmp_path / "weights/llava-tiny@tune.npz")
    assert main(["llava", "--ask", "x"]) == 2
    assert "--recipe llava/tiny" in capsys.readouterr().err


def test_a_shortened_run_says_so_when_it_is_opened(run, capsys):
    folder.write_json(run / "config.json", {"what": folder.OURS, "recipe": {"name": "llava/tiny"}, "data": "scenes", "steps": 0.05})
    assert main([str(run), "--ask", "x", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err.startswith("This is a shortened run (--steps 0.05)")


@pytest.mark.parametrize(("arguments", "words"), [
    (("--max-new-tokens", "0"), "--max-new-tokens 0"), (("--temperature", "nan"), "--temperature nan"),
    (("--temperature", "-1"), "--temperature -1.0"), (("--temperature", "inf"), "--temperature inf")])
def test_options_that_make_no_answer(run, capsys, arguments, words):
    assert main([str(run), "--ask", "x", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_commands(run, monkeypatch, capsys):
    lines = iter(["/help", "/picture a.png", "/image", "/new", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main([str(run)]) == 0
    out, err = capsys.readouterr()
    assert all(command in out for command in ("/image", "/new", "/help", "Ctrl-C"))
    assert [line.split(" is no command")[0] for line in err.splitlines()] == ["/picture", "/image"]


def test_an_answer_has_no_more_room_than_the_model_was_trained_on(run, monkeypatch):
    """Up to the last place; where none is left it is said, and nothing is asked of the model."""
    pupil, rooms = load_run(run), []
    monkeypatch.setattr(chat.generation, "stream", lambda prefill, step, room, *_, **__: rooms.append(room) or iter(()))
    length = pupil.model.prefill(pupil.read([Sample("x", (RED,), turns=(Turn("<image>\nx", " "),))]))[1].mask.shape[1]
    for limit, room in ((100, 5), (40, 50), (length + 1, 50), (0, 50)):
        said(Dialogue(pupil, [RED], limit, room), "x")
    assert rooms == [5, 40 - length, 1, 50]
    with pytest.raises(UserError, match=f"is {length} tokens long, the model was trained on {length} at most"):
        said(Dialogue(pupil, [RED], length), "x")


def test_a_conversation_fills_the_context_and_begins_anew(run, monkeypatch, capsys):
    """What is too much is said and not remembered; /new makes room, and the first picture is there again."""
    lines = iter(["one", "two " * 120, "/new", "three", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main([str(run), "--max-new-tokens", "100"]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "tokens long, the model was trained on 256 at most: begin a new one with /new" in err
    first, third = out.splitlines()
    assert first and third


def test_ctrl_c_ends_an_answer_and_then_the_conversation(run, monkeypatch, capsys):
    """By a real signal in the midst of an answer: it is no turn, and the next question is asked as if it had not been."""
    lines, asked = iter(["what?", "again?", KeyboardInterrupt]), []

    def typed(prompt):
        line = next(lines)
        return line if isinstance(line, str) else (_ for _ in ()).throw(line)

    def stream(*_, **__):
        yield torch.tensor([TOKENIZER.encode("a")])
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        yield torch.tensor([TOKENIZER.encode("ab")])

    read = Pupil.read
    monkeypatch.setattr(Pupil, "read", lambda self, samples: asked.append(samples[0].turns) or read(self, samples))
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(chat.generation, "stream", stream)
    assert main([str(run)]) == 0
    out, err = capsys.readouterr()
    assert out == "a …\nab\n" and not err
    assert [[turn.question for turn in turns] for turns in asked] == [["what?"], ["again?"]]
    asked.clear()
    assert main([str(run), "--ask", "what?"]) == 130
    out, err = capsys.readouterr()
    assert out == "a\n" and not err


@pytest.fixture
def untrained(tmp_path):
    """What a run of any recipe leaves, untrained."""
    def make(name: str) -> str:
        recipe, path = recipes.get(name), tmp_path / "other"
        path.mkdir()
        folder.write_json(path / "config.json", {"what": folder.OURS, "recipe": {"name": recipe.name}, "data": "scenes", "steps": None})
        checkpoint.save(path / f"{recipe.stages[-1].name}.pt", recipe.build(recipe.stages[-1]).state_dict())
        checkpoint.save(path / "last.pt", {"tokenizer": TOKENIZER.to_dict()})
        return str(path)
    return make


@pytest.mark.parametrize("name", ["blip2/tiny", "blip2/tiny-t5", "blip2/tiny-vqa", "instructblip/tiny"])
def test_blip2_talks_about_one_picture(untrained, photo, monkeypatch, capsys, name):
    """For several turns; a second picture is refused in one sentence, until all is forgotten."""
    lines = iter(["what is it?", "and what colour?", f"/image {photo}", "and this?", "/new", "what is it?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    path = untrained(name)
    assert main([path, "--image", photo, "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 3 and err.count("\n") == 1 and "one image stands before everything" in err
    assert main([path, "--image", photo, "--image", photo, "--ask", "what?"]) == 2
    assert "one image stands before everything" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["blip2/tiny", "instructblip/tiny"])
def test_a_question_without_a_picture_is_refused(untrained, capsys, name):
    """In a sentence, also where the question reaches the picture's queries before the language model."""
    assert main([untrained(name), "--ask", "what is it?"]) == 2
    assert "One picture stands before each" in capsys.readouterr().err


def test_a_language_model_talks_without_pictures(untrained, photo, capsys):
    path = untrained("lm/tiny")
    assert main([path, "--ask", "what is it?", "--max-new-tokens", "3"]) == 0
    assert main([path, "--image", photo, "--ask", "what is it?"]) == 2
    assert "reads no pictures" in capsys.readouterr().err


def test_flamingo_learns_from_the_conversation(untrained, photo, monkeypatch, capsys):
    """What a person says of a picture is an example; the prompt is the paper's, and goes on with the model's own answer."""
    lines, asked, read = iter([f"/image {photo}", "/output dax", f"/image {photo}", "/output", "sure?", ""]), [], Pupil.read

    def seen(self: Pupil, samples: list[Sample]) -> dict:
        batch = read(self, samples)
        names = dict(enumerate(Tokenizer.SPECIALS))
        asked.append("".join(names[i] if i in names else self.tokenizer.decode([i]) for i in batch["input_ids"][0].tolist()))
        assert (batch["frames"] == 1).all() and batch["frames"].shape == (1, 2)
        return batch

    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(Pupil, "read", seen)
    monkeypatch.setattr(chat.generation, "stream", lambda *_, **__: iter([torch.tensor([TOKENIZER.encode(" wug")])]))
    assert main([untrained("flamingo/tiny")]) == 0
    assert capsys.readouterr().out == "wug\nwug\n"
    shots = "<s><image>Output: dax<EOC><image>Output:"
    assert asked == [shots, f"{shots} wug<EOC>Question: sure? Answer:"]


@pytest.mark.parametrize("name", ["clip/tiny", "blip2/tiny-retrieval"])
def test_whoever_only_compares_is_refused(untrained, capsys, name):
    assert main([untrained(name), "--ask", "x"]) == 2
    assert "compares pictures with texts and was never trained to converse" in capsys.readouterr().err


def test_whoever_only_fills_gaps_is_refused(untrained, capsys):
    assert main([untrained("bert/tiny"), "--ask", "x"]) == 2
    assert "fills gaps in texts and was never trained to converse" in capsys.readouterr().err


def test_a_tiled_picture(run):
    """Its size goes along with the views."""
    pupil = load_run(run)
    tiled = LLaVA(replace(pupil.model.config, tiling=hd_tiling(48)))
    pupil = Pupil(tiled, recipes.get("llava/tiny"), pupil.stage, TOKENIZER, "cpu")
    dialogue = Dialogue(pupil, [Image.new("RGB", (100, 60), "red")])
    assert said(dialogue, "x") == dialogue.turns[0].answer != ""
