from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn

from core.errors import BaseModelError
from serving.engines import tokens
from serving.engines.tokens import CLEAN, BoundedTokenizer, make_tokenizer, merge, pad_rows, vocabulary

CONTEXT = 24
REFERENCE = SimpleTokenizer(context_length=CONTEXT)
OURS = BoundedTokenizer(vocabulary(), CONTEXT)
ORDINARY = [
    "", "!", "a photo of a cat", "A small HOUSE beside the lake, at night.", "it's 12:30; they're 1,000 &amp; more",
    "Ein Fußgänger überquert die Straße", "日本語のテキスト", "поезд на мосту", "👩‍👩‍👧‍👦 family 🎉🎉", "a\tb\n\nc   d",
    "<start_of_text> inside <end_of_text> of a text", "antidisestablishmentarianism pneumonoultramicroscopic",
    "aaaaaaaaaaaaaaaaaaaa", "abababababababab!!!!....????", "word " * 60, "ﬁnally ½ ² cafe\u0301 \u200b zero",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_have_the_ids_of_open_clip(text: str) -> None:
    assert OURS([text]).tolist() == REFERENCE([text]).tolist()


@pytest.mark.parametrize("name", sorted(CLEAN))
@pytest.mark.parametrize("text", [*ORDINARY, "Under_score, &amp;amp; \x1c ends.\u2028"])
def test_texts_are_cleaned_as_open_clip_cleans_them(name: str, text: str) -> None:
    assert CLEAN[name](text) == get_clean_fn(name)(text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_the_ids_of_open_clip(text: str) -> None:
    assert OURS([text, "x"]).tolist() == REFERENCE([text, "x"]).tolist()


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="ainterghosl", min_size=65, max_size=200))
def test_long_words_are_merged_as_open_clip_merges_them(word: str) -> None:
    assert OURS.bpe(word) == REFERENCE.bpe(word)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abc", min_size=1, max_size=20), st.permutations(["ab", "aa", "bc", "abc", "ca", "aab", "cab"]))
def test_merges_follow_the_rounds_of_the_reference_whatever_the_order_of_ranks(word: str, order: list[str]) -> None:
    pairs = [(one[:cut], one[cut:]) for one in order for cut in range(1, len(one))]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    reference = SimpleTokenizer.__new__(SimpleTokenizer)
    reference.cache, reference.bpe_ranks = {}, ranks
    expected = reference.bpe(word).split(" ")
    assert merge((*word[:-1], word[-1] + "</w>"), ranks) == expected


def test_it_knows_which_texts_it_cut_and_does_not_encode_what_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "a cat", "word " * (CONTEXT - 2), "word " * (CONTEXT - 1), "word " * 60, "x" * 5000]
    cut = [OURS.cuts(text, row) for text, row in zip(texts, OURS.rows(texts), strict=True)]
    assert cut == [False, False, False, True, True, True]
    words: list[str] = []
    tokenizer = BoundedTokenizer(vocabulary(), 8)
    monkeypatch.setattr(tokenizer, "bpe", lambda word: words.append(word) or f"{word}</w>")
    assert [len(row) for row in tokenizer.rows(["cat " * 500])] == [8]
    assert len(words) == 6


def test_options_that_are_not_served_are_named() -> None:
    with pytest.raises(BaseModelError, match="reduction_mask"):
        make_tokenizer({"kind": "simple", "kwargs": {"reduction_mask": "simple"}}, Path(), CONTEXT)


class CountingRanks(dict[tuple[str, str], int]):
    """Ranks that count their look-ups."""

    asked = 0

    def get(self, *pair: Any) -> Any:
        self.asked += 1
        return super().get(*pair)


@pytest.mark.parametrize("alphabet", ["a", "abcdefghijklmnopqrstuvwxyz"])
def test_the_work_for_a_word_grows_with_its_length_and_not_with_its_square(alphabet: str) -> None:
    word = "".join(random.Random(0).choices(alphabet, k=20_000))
    ranks = CountingRanks(REFERENCE.bpe_ranks)
    assert "".join(merge(word, ranks)) == word
    assert ranks.asked < 6 * len(word)


def test_the_cache_is_bounded_in_words_and_in_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CACHED_WORDS", 10)
    tokenizer = BoundedTokenizer(vocabulary(), CONTEXT)
    tokenizer([f"word{chr(97 + i)}{chr(97 + j)}" for i in range(10) for j in range(10)])
    tokenizer(["x" * 1000])
    assert tokenizer._cached.cache_info().currsize == 10


@pytest.mark.parametrize("mode", [None, "slow"])
def test_a_pad_token_that_texts_have_too_is_counted_where_a_text_has_it(tmp_path: Path, mode: str | None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "cat": 2, "?": 3}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    saved = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
    saved.save_pretrained(tmp_path / "text")
    kwargs = {"strip_sep_token": False} if mode else {}
    config = {"kind": "hf", "directory": "text", "trim": False, "mode": None, "kwargs": kwargs}
    tokenizer = make_tokenizer(config, tmp_path, 6)
    assert tokenizer(["a cat", "a"]).tolist() == [[1, 2, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert tokenizer.rows(["a cat", "a", "a cat " * 9]) == [[1, 2, 0], [1, 0], [1, 2, 1, 2, 1, 0]]
    assert pad_rows(tokenizer.rows(["a cat", "a"]), 6, tokenizer.pad_id).tolist() == tokenizer(["a cat", "a"]).tolist()
