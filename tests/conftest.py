"""What is slow to make and needed by several test files."""

import pytest

from nanovlm import recipes
from nanovlm.runs.setting import make_tokenizer
from nanovlm.tokenizer import Tokenizer
from nanovlm.world.datasets import Scenes


@pytest.fixture(scope="session")
def world_tokenizer() -> Tokenizer:
    """The one that all tiny recipes share."""
    return make_tokenizer(recipes.get("lm/tiny"), Scenes(0), 0)


@pytest.fixture(autouse=True)
def nothing_is_shipped(monkeypatch, tmp_path_factory):
    """Tests make what they need: only test_shipped.py looks at weights/."""
    monkeypatch.setenv("NANOVLM_SHIPPED", str(tmp_path_factory.getbasetemp() / "nothing shipped"))
