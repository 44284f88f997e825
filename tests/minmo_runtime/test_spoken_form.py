"""Written text becomes what is said; a stream of it never changes a word that it has handed out."""

from __future__ import annotations

import random

import pytest

from minmo_runtime.public_tokenizers import sentencepiece_tokenizer
from minmo_runtime.spoken_form import SpokenStream, language_of, spoken_form
from minmo_runtime.text import TextStream, TextTokenizer, parse_tool_line
from tests.minmo_runtime.public_files import byte_tokenizer, sentencepiece_model


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("**Total:** $12.50 on 3 March 2026.",
         "Total: twelve dollars and fifty cents on the third of March, twenty twenty six."),
        ("Order 45612 ships 2026-03-03 at 9:05 am",
         "Order four five six one two ships the third of March, twenty twenty six at nine oh five a m"),
        ("1,234 items, -5.5 degrees, 50% off",
         "one thousand two hundred and thirty four items, minus five point five degrees, fifty percent off"),
        ("# Steps\n- first\n- `second` [here](https://x.y/z)", "Steps, first, second here"),
        ("Call 0800 123456, the 1st.", "Call zero eight zero zero, one two three four five six, the first."),
        ("£1.01 at 17:30, 3:00", "one pound and one penny at seventeen thirty, three o'clock"),
        ("Call +1 (212) 555-0100 or 1-800-555-0199.",
         "Call plus one, two one two, five five five, zero one zero zero or one, eight zero zero, five five five, "
         "zero one nine nine."),
        ("May 2026, the 5 Mar: you may 2 times", "May twenty twenty six, the fifth of March: you may two times"),
        ("by 12/25/2026, in 1999, 1999-2005, the 1990s",
         "by the twenty fifth of December, twenty twenty six, in nineteen ninety nine, "
         "nineteen ninety nine to two thousand and five, the nineteen nineties"),
        ("$0.99, $1.5M, US$3.50/month", "ninety nine cents, one point five million dollars, "
         "three dollars and fifty cents per month"),
        ("3/4 of 5kg at 25°C, 24/7, pages 10-15", "three quarters of five kilograms at twenty five degrees Celsius, "
         "twenty four seven, pages ten to fifteen"),
        ("Order A-1234-B of #12345, v 2.5.1", "Order A one two three four B of number one two three four five, "
         "v two point five point one"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "a, b, one, two"),
        ("5 * 3 = 15, at 5pm", "five times three equals fifteen, at five p m"),
        ("Nothing to say otherwise.", "Nothing to say otherwise."),
    ],
)  # fmt: skip
def test_english_is_said_as_people_say_it(written: str, said: str) -> None:
    assert spoken_form(written) == said


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("总共￥12.50，3个", "总共十二点五元，三个"),
        ("2026年3月5日，订单45612", "二零二六年三月五日，订单四五六一二"),
        ("共1,234元，10000元，￥5.00", "共一千二百三十四元，一万元，五元"),
        ("下午2:05，2天，2月，10-15个，3/4", "下午两点零五分，两天，二月，十到十五个，四分之三"),
        ("拨打400-800-1234，气温-5度", "拨打四零零，八零零，一二三四，气温负五度"),
        ("15个，110个，1002个，50%", "十五个，一百一十个，一千零二个，百分之五十"),
    ],
)
def test_chinese_numbers_are_read_in_chinese(written: str, said: str) -> None:
    assert spoken_form(written, "zh") == said


@pytest.mark.parametrize(
    ("language", "written", "said"),
    [
        ("de", "Das kostet 12,50 € für 1.200 Stück, 50 %.",
         "Das kostet zwölf Euro und fünfzig Cent für eintausendzweihundert Stück, fünfzig Prozent."),
        ("fr", "12,50 €, 1 200 pages", "douze euros et cinquante centimes, mille deux cents pages"),
        ("es", "3,5% de 21", "tres punto cinco por ciento de veintiuno"),
        ("it", "€ 12", "dodici euro"),
        ("ja", "3月5日に1,200円、10%", "三月五日に千二百円、十パーセント"),
        ("ko", "3월 5일 1200원", "삼월 오일 천이백원"),
    ],
)  # fmt: skip
def test_other_languages_read_their_own_commas(language: str, written: str, said: str) -> None:
    assert spoken_form(written, language) == said


def test_the_language_follows_the_letters() -> None:
    assert [language_of(text, "en") for text in ("hello", "你好", "こんにちは", "안녕", "42")] == [
        "en", "zh", "ja", "ko", "en",
    ]  # fmt: skip
    assert language_of("hello there", "zh") == "en" and language_of("42", "zh") == "zh"


TEXTS = (
    "Sure, I can help. Your total is $12.50 and it ships on March 3, 2026. Anything else I can do for you today?",
    "Three steps:\n\n1. Pay $3.50/month\n2. Call 1-800-555-0199 in 2026 - or not\n- `stop` **now**\n"
    "That is all I know about it, have a nice day!",
    "您好，一共￥12.50，共1,234元。\n- 第一 10000元\n- 第二，2天",
    "Please call 0800 123456, or come at 9:30 am on the 3rd of May with your code 45612. Thank you!",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(5))
def test_a_stream_says_what_the_whole_text_says_however_it_arrives(text: str, seed: int) -> None:
    dice, stream, out, position = random.Random(seed), SpokenStream(), [], 0
    while position < len(text):
        size = dice.randint(1, 6)
        out.append(stream.push(text[position : position + size]))
        position += size
    out.append(stream.finish())
    assert "".join(out) == spoken_form(text, language_of(text, "en"))
    assert sum(bool(piece) for piece in out) > 3  # and not all at once at the end


def test_a_lexicon_says_names_as_they_are_said() -> None:
    stream = SpokenStream(lexicon={"Acme": "ack me"})
    assert stream.push("This is Acme speaking. ") + stream.finish() == "This is ack me speaking."


# ---------------------------------------------------- tokenizers of the parents


def test_sentencepiece_pieces_keep_their_ids_and_tags_are_not_text(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "x.model"
    path.write_bytes(sentencepiece_model())
    tokenizer = sentencepiece_tokenizer(path)
    ids = tokenizer.encode("tea", add_special_tokens=False).ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["▁", "t", "e", "a"]
    assert tokenizer.token_to_id("<|en|>") == 4
    assert tokenizer.decode([4, *ids]).strip() == "tea"
    assert tokenizer.encode("  tea   tea ").ids == tokenizer.encode("tea tea").ids == [*ids, *ids]
    assert "unk" not in tokenizer.decode(tokenizer.encode("tea Ж").ids)


def test_a_character_of_several_byte_pieces_is_held_back_until_it_is_whole() -> None:
    tokenizer = TextTokenizer(byte_tokenizer())
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode("a你b")]
    assert pieces == ["a", "", "", "你", "b"]


def test_qwens_own_tool_form_is_understood() -> None:
    line = '{"name": "look_up_order", "arguments": {"order_number": 45612}}'
    assert parse_tool_line(line) == ("look_up_order", {"order_number": "45612"})
    with pytest.raises(ValueError, match="expected an object with name and arguments"):
        parse_tool_line('{"arguments": {}}')
