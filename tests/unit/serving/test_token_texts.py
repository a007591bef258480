"""Tokens read as what they stand for."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serving.http.ingress import token_texts


def test_tokens_put_together_are_the_text(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    text_of = token_texts(tmp_path)
    assert "".join(text_of(token) for token in made.encode("a red bus").ids) == "a red bus"
    assert [text_of(token) for token in made.encode("é").ids] == ["\ufffd", "\ufffd"]
    assert text_of(10_000) == "token_id:10000"


def test_a_space_before_a_word_stays(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"\u2581red": 0, "\u2581bus": 1, "es": 2}, unk_token="es"))
    made.decoder = decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    assert "".join(token_texts(tmp_path)(token) for token in (0, 1, 2)) == " red buses"


def test_without_a_tokenizer_tokens_are_numbers(tmp_path: Path) -> None:
    assert token_texts(tmp_path)(7) == token_texts(None)(7) == "token_id:7"
