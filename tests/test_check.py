"""`python -m nanovlm.data.check`: it finds all that is wrong at once, shows what is trained, and exits as promised."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import draw, llava_set, write

from nanovlm.data.check import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sick(tmp_path):
    """Twelve lines, nine of them wrong in nine different ways."""
    draw(tmp_path, "a.png", "b.png", "c.png", "png.png", "cut.png")
    (tmp_path / "png.png").rename(tmp_path / "png.jpg")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:50])
    (tmp_path / "text.jpg").write_text("no picture")
    question = {"from": "human", "value": "<image>?"}
    rows = [
        {"image": "a.png", "caption": "a hat"},
        {"image": "a.png"},
        {"image": "b.png", "caption": " "},
        {"image": "absent.png", "caption": "a ghost"},
        {"image": "cut.png", "caption": "half a shoe"},
        {"image": "text.jpg", "caption": "a letter"},
        {"image": "png.jpg", "caption": "a shoe"},
        {"image": ["a.png", "b.png"], "conversations": [question, {"from": "gpt", "value": "a hat"}]},
        {"image": "b.png", "conversations": [question, {"from": "gpt", "value": ""}]},
        {"image": "b.png", "conversations": [{"from": "gpt", "value": "hello"}, question]},
        {"image": "b.png", "conversations": [question, {"from": "gpt", "value": "say ### now"}]},
        {"image": "c.png", "caption": "a coat"},
    ]
    write(tmp_path / "captions.jsonl", "\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_all_problems_are_listed_each_with_its_record(sick, capsys):
    assert main([str(sick), "--model", "llava/7b"]) == 1  # its second stage is in format v0
    printed = capsys.readouterr().out
    listed = printed[printed.index("\nproblems: ") :]
    for line, said in {
        2: 'field "caption" is missing', 3: 'field "caption" is empty', 4: "the picture absent.png is missing",
        5: "cut.png: the picture cannot be read", 6: "text.jpg: the picture cannot be read .*no known picture format",
        8: '1 "<image>" marks .* but 2 pictures', 9: "the answer is empty", 10: "starts with the assistant",
        11: "the answer of turn 1 holds '###'",
    }.items():
        assert re.search(f"captions.jsonl line {line}: .*{said}", listed), line
    assert re.search("png.jpg: its name says JPEG, its content is PNG", listed)
    assert "problems: 10\n" in listed and len(listed.strip().splitlines()) == 11


def test_a_long_list_of_problems_is_cut_but_counted(tmp_path, capsys):
    write(tmp_path / "captions.jsonl", '{"image": "a.png"}\n' * 33)
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.count('field "caption" is missing') == 20
    assert "problems: 34\n" in printed and "... and 14 more" in printed  # 33 lines, and that nothing usable is left


def test_a_healthy_set_is_described(tmp_path, capsys):
    draw(tmp_path, *(f"{i}.png" for i in range(12)))
    (tmp_path / "11.png").write_bytes((tmp_path / "10.png").read_bytes())
    rows = [{"image": f"{i}.png", "caption": ["a red hat", "a shoe"][i % 2]} for i in range(12)]
    write(tmp_path / "captions.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for said in (
        "records   12 usable, 0 without a picture", "pictures  12 files, 11 different", "texts     12, 2 different",
        "6 times: 'a red hat'", "classes   2: a red hat, a shoe", "pairs         11 to train on, 1 held out",
        "too few to judge", "problems: none",
    ):
        assert said in printed, said
    words = printed[printed.index("in words") : printed.index("in characters")]
    assert re.search(r"2-3 +12 █+", words)  # both captions have two or three words


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("llava", "<s>USER: <image>\\nwhat is it? ASSISTANT:⟦ a hat</s>⟧USER: and <image>? ASSISTANT:⟦ a shoe</s>⟧"),
        ("llava/7b", "\\n### Assistant:⟦ a hat\\n###⟧ Human: and <image>?\\n### Assistant:⟦ a shoe\\n###⟧"),
        ("llava", "<s>USER: a hat\\nwhat is it? ASSISTANT:⟦ a hat</s>⟧USER: and a hat? ASSISTANT:⟦ a shoe</s>⟧"),
        ("llava", "<s><image>⟦a shoe\\n⟧"),
        ("blip2", "<s>⟦ a shoe\\n⟧"),
    ],
)
def test_the_first_samples_show_what_is_trained(tmp_path, capsys, model, line):
    file = llava_set(tmp_path)
    rows = json.loads(file.read_text())
    write(file, [{**row, "split": "val" if row["id"] == "text" else "train"} for row in rows])
    main([str(file), "--model", model])
    assert line in capsys.readouterr().out


def test_what_is_unusable_exits_with_2_and_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path), "--model", "lava"]) == 2
    assert "There is no recipe 'lava/tiny'; the recipes are" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "the folder holds no pictures with texts" in capsys.readouterr().err


# ---- what a stage cannot read is a problem before it trains

def talk(i, *values, **fields):
    said = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"image": f"{i}.png", "conversations": said} | fields


LONG = " ".join(f"word{n}" for n in range(880))
WRONG = {  # one record among eight, whose stages are to read it, and what is said
    "a long question": (talk(3, f"<image>\n{LONG}", "yes"), "llava", "record 3: cut to 256 tokens, no answer is left"),
    "a picture after long talk": (talk(3, "hi", LONG, "<image>?", "yes"), "llava", "record 3: cutting it to 256 tokens would cut"),
    "a video": ({"video": "a.mp4", "conversations": talk(3, "<video>\nwhat?", "yes")["conversations"]}, "llava",
                'record 3: field "video": videos are not read'),
    "half a character": (talk(3, "<image>?", "a smile \ud83d"), "llava", r"record 3: it holds half of a character ('\ud83d')"),
    "a stop in an answer": (talk(3, "<image>?", "all ### of it"), "llava/7b", "record 3: the answer of turn 1 holds '###'"),
    "an address": (talk(3, "<image>?", "yes", image="https://example.org/a.png"), "llava", "record 3: field \"image\" holds a"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_stage_cannot_read_is_listed(tmp_path, capsys, case):
    row, model, said = WRONG[case]
    draw(tmp_path, *(f"{i}.png" for i in range(8)))
    rows = [talk(i, "<image>\nwhat is it?", f"thing {i}") for i in range(8)]
    file = write(tmp_path / "chat.json", [*rows[:3], row, *rows[4:]])
    assert main([str(file), "--model", model]) == 1
    listed = capsys.readouterr().out.split("\nproblems: ")[1]
    assert listed.startswith("1\n") and said in listed


def test_what_every_stage_can_read_is_no_problem(tmp_path, capsys):
    """Tags and long captions are text; a long caption is cut where it is told."""
    draw(tmp_path, *(f"{i}.png" for i in range(8)))
    captions = [f"thing {i}" for i in range(6)] + ["the tag <image> ends with </s>", LONG]
    write(tmp_path / "captions.jsonl", "\n".join(json.dumps({"image": f"{i}.png", "caption": c}) for i, c in enumerate(captions)))
    for model in ("llava", "blip2", "blip2/tiny-t5", "llava15"):
        assert main([str(tmp_path), "--model", model]) == 0, model
        assert "problems: none" in capsys.readouterr().out


def test_nothing_to_train_on_or_to_judge_by_is_said(tmp_path, capsys):
    draw(tmp_path, *(f"{i}.png" for i in range(8)))
    two = talk(0, "<image><image>\nwhat are they?", "things", image=["0.png", "1.png"])
    rows = [talk(i, "<image>\nwhat is it?", f"thing {i}", split="train") for i in range(2, 8)]
    assert main([str(write(tmp_path / "chat.json", [two | {"split": "val"}, *rows]))]) == 0
    printed = capsys.readouterr().out
    assert "clip      pairs         6 to train on, 0 held out; with none held out it will not be judged" in printed
    assert "tune      conversations 6 to train on, 1 held out\n" in printed
    assert main([str(write(tmp_path / "two.json", [two, two]))]) == 1
    assert "all records share one picture" in capsys.readouterr().out
    other = {**two, "image": ["2.png", "3.png"]}
    assert main([str(write(tmp_path / "twos.json", [two, other]))]) == 1
    assert "twos has nothing to train stage clip on (it reads pairs)" in capsys.readouterr().out


def test_a_console_that_knows_only_ascii(tmp_path):
    draw(tmp_path, "a.png", "b.png", "c.png")
    for name in "abc":
        write(tmp_path / f"{name}.txt", f"熊猫 {name}")
    command = [sys.executable, "-m", "nanovlm.data.check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == ""
    assert "4-7        3 ########" in done.stdout and r"ASSISTANT:[ \u718a\u732b c</s>]" in done.stdout


def test_the_command_itself(sick):
    command = [sys.executable, "-m", "nanovlm.data.check", str(sick)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and "problems: 9" in done.stdout and done.stderr == ""
