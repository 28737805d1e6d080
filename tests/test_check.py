"""`python -m nanovlm.data.check`: it finds all that is wrong at once, shows what is trained, and exits as promised."""

import json
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
    assert main([str(sick), "--format", "v0"]) == 1
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
        "6 times: 'a red hat'", "classes   2: a red hat, a shoe", "pairs     11 to train on, 1 held out",
        "too few to judge", "problems: none",
    ):
        assert said in printed, said
    words = printed[printed.index("in words") : printed.index("in characters")]
    assert re.search(r"2-3 +12 █+", words)  # both captions have two or three words


@pytest.mark.parametrize(
    ("format", "line"),
    [
        ("tiny", "<s>USER: <image>\\nwhat is it? ASSISTANT:⟦ a hat</s>⟧USER: and <image>? ASSISTANT:⟦ a shoe</s>⟧"),
        ("v0", "\\n### Assistant:⟦ a hat\\n###⟧ Human: and <image>?\\n### Assistant:⟦ a shoe\\n###⟧"),
        ("llama_2", "<image>\\nwhat is it? [/INST]⟦ a hat </s>⟧<s>[INST] and <image>? [/INST]⟦ a shoe </s>⟧"),
        ("plain", "<s><image>⟦a beautiful painting of chernobyl by nekro.\\n⟧"),
    ],
)
def test_the_first_samples_show_what_is_trained(tmp_path, capsys, format, line):
    assert main([str(llava_set(tmp_path)), "--format", format]) == 0
    assert line in capsys.readouterr().out


def test_what_is_unusable_exits_with_2_and_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path), "--format", "v9"])
    assert left.value.code == 2 and "invalid choice: 'v9'" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "the folder holds no pictures with texts" in capsys.readouterr().err


def test_the_command_itself(sick):
    command = [sys.executable, "-m", "nanovlm.data.check", str(sick)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and "problems: 9" in done.stdout and done.stderr == ""
