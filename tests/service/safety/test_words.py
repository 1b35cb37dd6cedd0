"""The word list, and how checkers are found."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.safety import MAX_LIST_BYTES, WordList, check_prompt, image_checker_of, word_list_of
from flashbulb_service.settings import Settings

WORDS = WordList(["Bomb", "red  flag", "naïve", "C++"])


@pytest.mark.parametrize(
    "prompt",
    [
        "a bomb",
        "BOMB!",
        "a red\nflag",
        "ｂｏｍｂ",
        "bo\u200bmb",
        "bómb",
        "NAIVE art",
        "(c++)",
        "bomb, red apple",
        "𝐁𝐎𝐌𝐁",  # letters in another type have no lower case of their own
        "𝕭𝖔𝖒𝖇",
        "ℬomb",
        "🄱omb",
        "_bomb_",  # an underscore is a letter to a regular expression
        "red_flag",
    ],
)
def test_a_blocked_word_is_found_in_its_disguises(prompt: str) -> None:
    assert not WORDS.allows(prompt)


def test_an_underscore_of_an_entry_is_a_blank_too() -> None:
    words = WordList(["red_flag", "_"])
    assert not words.allows("a red flag") and not words.allows("red_flag")
    assert words.allows("a flag_")


@pytest.mark.parametrize("prompt", ["", "bombastic", "a red apple, a flag", "c", "beau", "rebomb"])
def test_other_words_are_allowed(prompt: str) -> None:
    assert WORDS.allows(prompt)


@given(st.text(max_size=200))
def test_an_empty_list_allows_everything(prompt: str) -> None:
    assert WordList([]).allows(prompt)


@given(st.text(alphabet="abß éİ.*", min_size=1, max_size=20).filter(str.strip))
def test_an_entry_always_blocks_itself(entry: str) -> None:
    assert not WordList([entry]).allows(f"x {entry} y")


def test_the_refusal_tells_neither_the_word_nor_the_prompt() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_prompt(WORDS, "a bomb")
    assert (caught.value.detail_code, caught.value.param) == ("content_policy_violation", "prompt")
    assert "bomb" not in caught.value.message


def test_a_list_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# not these\n\nbomb\n  red flag  \n", encoding="utf-8")
    words = word_list_of(Settings(blocked_words=file))
    assert not words.allows("a red flag") and words.allows("not these")
    assert word_list_of(Settings()).allows("bomb")


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"a" * (MAX_LIST_BYTES + 1)])
def test_a_list_that_cannot_be_read_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"blocked words .*words\.txt"):
        word_list_of(Settings(blocked_words=file))


@pytest.mark.parametrize(
    "name", ["nowhere:Checker", "flashbulb_service.safety:Nothing", "flashbulb_service", ":"]
)
def test_a_checker_that_does_not_exist_stops_the_start(name: str) -> None:
    with pytest.raises(InvalidRequest, match="module:factory"):
        image_checker_of(Settings(image_checker=name))
    assert image_checker_of(Settings()) is None
