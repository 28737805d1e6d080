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
