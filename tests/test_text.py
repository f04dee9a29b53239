"""Text from elsewhere: what is shown of it can neither act on a terminal nor give a secret away."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse.text import one_line, printable, shown, without_secrets

TOKEN = "hf_" + "aB3" * 12
ANY_TEXT = st.text(st.characters(categories=None))  # lone surrogates as well


def acts(text: str) -> list[str]:
    """The characters that do something else than be shown."""
    return [letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")]


@pytest.mark.parametrize(
    ("given", "line", "lines"),
    [
        ("plain words", "plain words", "plain words"),
        ("  two\n\n lines\t", "two lines", "  two\n\n lines\t"),
        ("a\x1b[31mb", "a\ufffd[31mb", "a\ufffd[31mb"),
        ("\x9b2J", "\ufffd2J", "\ufffd2J"),  # the same in one letter
        ("\x1b]52;c;aGk=\x07", "\ufffd]52;c;aGk=\ufffd", "\ufffd]52;c;aGk=\ufffd"),
        ("over\rwritten", "over written", "over\ufffdwritten"),
        ("\u202egpj.exe", "\ufffdgpj.exe", "\ufffdgpj.exe"),
        ("a\u2028b\u2029c\x85d", "a b c d", "a\ufffdb\ufffdc\ufffdd"),
        ("\ud800", "\ufffd", "\ufffd"),
        ("a\0b\x7f", "a\ufffdb\ufffd", "a\ufffdb\ufffd"),
        ("zero\u200bwidth\ufeff", "zero\ufffdwidth\ufffd", "zero\ufffdwidth\ufffd"),
        ("größe 大きさ \u00a0😀", "größe 大きさ 😀", "größe 大きさ \u00a0😀"),
        ("", "", ""),
    ],
    ids=ascii,
)
def test_what_acts_is_replaced(given: str, line: str, lines: str) -> None:
    assert one_line(given) == line
    assert printable(given) == lines


@given(text=ANY_TEXT)
def test_nothing_that_acts_is_left(text: str) -> None:
    assert acts(one_line(text)) == []
    assert len(one_line(text, 20)) <= 20
    assert one_line(one_line(text)) == one_line(text)
    assert set(acts(printable(text))) <= {"\n", "\t"}
    assert len(printable(text)) == len(text)
    assert printable(text).encode().decode() == printable(text)


def test_a_line_is_cut_where_it_grows_too_long() -> None:
    assert one_line("x" * 400) == "x" * 400
    assert one_line("x" * 401) == "x" * 399 + "…"
    assert one_line("x" * 9, longest=4) == "xxx…"
    assert one_line(5) == "5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"token {TOKEN}.", "token ***."),
        (f"{{'token': '{TOKEN}'}}", "{'token': '***'}"),
        (f"https://user:{TOKEN}@huggingface.co/a", "https://***@huggingface.co/a"),
        ("https://user:p:a@ss@host/a@b", "https://***@host/a@b"),
        ("git clone https://me@host", "git clone https://***@host"),
        ("http://host/f?token=abc&x=1", "http://host/f?token=***&x=1"),
        ("http://host/f?x=1&X-Amz-Signature=00ff&X-Amz-Credential=AK%2F1#a", "http://host/f?x=1&X-Amz-Signature=***&X-Amz-Credential=***#a"),
        ('{"url": "http://host?api_key=abc"}', '{"url": "http://host?api_key=***"}'),
        ("Illegal header value b'Bearer abcdefghijklmnop\\n'", "Illegal header value b'Bearer ***\\n'"),
        ("authorization: Basic dXNlcjpwYXNzd29yZA==", "authorization: Basic ***"),
    ],
)  # fmt: skip
def test_secrets_are_taken_out(text: str, expected: str) -> None:
    assert without_secrets(text) == expected
    assert one_line(text) == expected


@pytest.mark.parametrize(
    "text",
    ["hf_sparse_report.json", "user/model@main", "https://huggingface.co/user/model?revision=main", '["http://a", "b@c"]', "a ? token=1 : 2",
     "me@example.org", "model.layers.0.self_attn.key_proj", "basic understanding of models", "tokens=5&x", "hf_" + "a" * 10],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("part", ["://", "://a@", "?", "?token", "&a=", "hf_", "Bearer ", "%aa", "@", "?key=1"])
def test_long_text_is_no_trap(part: str) -> None:
    assert without_secrets(part * 100_000)


@pytest.mark.parametrize(
    "value", [10**5000, [10**5000], "x" * 1000, [[[[[[[[[]]]]]]]]], {"a": {}}, None, "\x1b"], ids=type
)
def test_a_refused_value_is_shown_shortly(value: object) -> None:
    assert 0 < len(shown(value)) <= 80
    assert acts(shown(value)) == []
