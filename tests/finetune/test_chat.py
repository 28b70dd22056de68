"""Chat templates write what transformers writes, and are ended when they take memory or time without end."""

import multiprocessing
import sys

import pytest

from meft_bench.finetune.chat import Renderer, TemplateFault, read_template

TALK = [{"role": "user", "content": "what boat ?"}]
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a process as Linux has them")


def test_texts_are_transformers_own(tokenizer):
    calls = [{"conversation": TALK * n, "add_generation_prompt": True} for n in (1, 2, 3)]
    with Renderer(tokenizer, PLAIN) as renderer:
        assert renderer.write(calls) == [
            tokenizer.apply_chat_template(**call, chat_template=PLAIN, tokenize=False) for call in calls
        ]
        assert renderer.prompts([TALK]) == ["<s>user : what boat ? "]
        assert renderer.write([]) == []
    assert not multiprocessing.active_children()


ENDLESS = {
    "a loop without a word": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop of words": "{% for i in range(99999) %}{% for j in range(99999) %}boat{% endfor %}{% endfor %}",
}
LARGE = {
    "one expression": "{{ 'a' * 10000000000 }}",
    "a filter": "{{ 'a' | center(10000000000) }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a format": "{{ '%2000000000d' % 1 }}",
}


@linux
@pytest.mark.parametrize(
    ("template", "why"),
    [
        *(pytest.param(text, "does not end within|more than 256 MB", id=name) for name, text in ENDLESS.items()),
        *(pytest.param(text, "it needs more than 256 MB", id=name) for name, text in LARGE.items()),
        pytest.param("{% for i in range(17) %}{{ 'a' * 1000000 }}{% endfor %}", "more than 16,777,216 ch", id="long"),
        pytest.param("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it is nested too deeply", id="recursion"),
        pytest.param(
            "{{ ().__class__.__mro__ }}", "SecurityError: access to attribute '__class__'", id="Python's insides"
        ),
        pytest.param("{{ messages[0].a.b }}", "UndefinedError: 'dict object' has no attribute 'a'", id="no such key"),
    ],
)
def test_templates_beyond_bounds_are_ended(tokenizer, template, why):
    with Renderer(tokenizer, template) as renderer:
        with pytest.raises(TemplateFault, match=f"the chat template fails: .*({why})") as fault:
            renderer.write([{"conversation": TALK}])
        assert fault.value.number == 0 and "\n" not in str(fault.value)
        assert renderer.attempt([{"conversation": TALK}]) == [None], "a child that was ended is begun anew"
    assert not multiprocessing.active_children()


def test_the_conversation_that_fails_is_named_and_the_others_are_not_lost(tokenizer):
    template = "{% if messages[0].content == 'x' %}{{ raise_exception('no x') }}{% endif %}{{ messages[0].content }}"
    calls = [{"conversation": [{"role": "user", "content": content}]} for content in ("a", "x", "b")]
    with Renderer(tokenizer, template) as renderer:
        assert renderer.attempt(calls) == ["a", None, "b"]
        with pytest.raises(TemplateFault, match="no x") as fault:
            renderer.write(calls)
    assert fault.value.number == 1


def test_a_tokenizer_without_a_template_says_what_to_give(tokenizer):
    with pytest.raises(ValueError, match="give a Jinja file with --chat-template"):
        Renderer(tokenizer)


def test_template_files(tmp_path):
    assert read_template(None) is None
    (tmp_path / "t.jinja").write_bytes("é".encode())
    assert read_template(str(tmp_path / "t.jinja")) == "é"
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    (tmp_path / "large.jinja").write_bytes(b" " * (2**20 + 1))
    for name, message in (
        ("gone.jinja", "no chat template "),
        ("", "is a folder: chat template must be a file"),
        ("latin.jinja", "is not UTF-8 text"),
        ("large.jinja", "has 1,048,577 bytes: chat template may have 1,048,576"),
    ):
        with pytest.raises(ValueError, match=message):
            read_template(str(tmp_path / name))
