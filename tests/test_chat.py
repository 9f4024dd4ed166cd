"""Chat templates: what models use, what goes wrong, and what a hostile file tries."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from test_tokenizer import byte_level, make

from headrace.chat import CHATML, ChatTemplate
from headrace.errors import TemplateError

HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict] = HI, **extra: object) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **extra)


def test_chatml() -> None:
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_smollm2_template() -> None:
    source = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
        " Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n'"
        " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert render(source).startswith("<|im_start|>system\nYou are a helpful AI")
    assert render(source).endswith("<|im_end|>\n<|im_start|>assistant\n")
    own = [{"role": "system", "content": "Be brief."}, *HI]
    assert render(source, own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>us")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks and lstrip_blocks
        ("{{ {'b': 'é<', 'a': 1} | tojson }}", '{"b": "é<", "a": 1}'),
        ("{{ messages | tojson(indent=1) }}", '[\n {\n  "role": "user",\n  "content": "hi"\n }\n]'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}", "2"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') ~ f(1) }}", "[a][1]"),
        ("{{ messages[-1]['content'].strip().split('h')[-1] | upper }}", "I"),
        (
            "{{ ['a', 'b'] | join(', ') }} {{ messages | map(attribute='role') | list }}",
            "a, b ['user']",
        ),
        ("{{ 'a-b' | replace('-', '+') }} {{ '=' * 3 }} {{ '%s!' % 'x' }}", "a+b === x!"),
        ("{% if tools %}t{% elif enable_thinking is defined %}d{% else %}n{% endif %}", "n"),
        ("{{ nothing }}|{{ none }}|{{ 1.5 }}", "|None|1.5"),
        (
            "{{ 7 // 2 }} {{ 7 / 2 }} {{ 7 - 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ -3 }}",
            "3 3.5 5 3 8 -3",
        ),
        (
            "{{ 'ff' | int(base=16) }} {{ 3.14159 | round(2) }} {{ 1234 | round(-2) }}",
            "255 3.14 1200",
        ),
        ("{{ [1, 2] | sum }} {{ [{'n': 0.5}] | sum(attribute='n', start=1) }}", "3 1.5"),
        (
            "{{ ['a', 'b', 'A'] | unique | join }} {{ dict([('k', 1)], v=2) | tojson }}",
            'ab {"k": 1, "v": 2}',
        ),
        (
            "{{ [1, none] | select('none') | list }} {{ 'upper' is filter }} {{ 3 is in [3] }}",
            "[None] True True",
        ),
        (
            "{{ 1 < 2 < 3 }} {{ [1, 2, 3][1:] }} {{ 'abc'[::-1] }} {{ not (1 == 2) }}",
            "True [2, 3] cba True",
        ),
    ],
)
def test_language(source: str, text: str) -> None:
    assert render(source) == text


def test_extra_variables_and_time() -> None:
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% for x in y %}", "broken at line 2"),
        ("a\n\n{{ 1 / 0 }}", "fails at line 3: division by zero"),
        ("a\n{{ raise_exception('no system role') }}", "fails at line 2: no system role"),
        ("{{ messages[0].name.first }}", "fails at line 1: .* has no attribute 'name'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled"),
        ("x" * ((1 << 17) + 1), "more than 131072"),
        ("{{a}}" * 10_000, "10001 parts and 2 names"),
        ("".join(f"{{% set a{i} = 1 %}}" for i in range(600)), "601 names"),
        ("{% from 'x' import " + ", ".join(f"a{i}" for i in range(600)) + " %}", "601 names"),
    ],
)
def test_errors_name_the_line(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(source)


GROW = "{% set ns = namespace(x='aaaaaaaa', l=[1]) %}{% for i in range(60) %}GROW{% endfor %}"
COLLIDING = f"range(0, 99999 * {2**61 - 1}, {2**61 - 1})"  # of one hash
BIG_NUMBERS = (
    "{% set a = ('f' * 4000000) | int(base=16) %}{% set b = ('f' * 2000000) | int(base=16) %}"
)
LISTS = "{% set a = range(99999) | list %}{% set b = range(99999) | list %}"
HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ messages.append(1) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ range(10**9) }}",
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 10**(10**6) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a' | center(10000000000) }}",
    "{{ 'a'.encode().ljust(10**10) }}",
    "{{ (1).to_bytes(10**10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 10**9) }}",
    "{{ 'a' | indent(10**10) }}",
    "{{ [1] | batch(10**10, 0) | list }}",
    "{{ [1] | slice(10**10) | list }}",
    "{{ 'a' | map('center', 10**10) | list }}",
    "{% filter center(10000000000) %}x{% endfilter %}",
    "{% for i in range(90000) %}" + "x" * 1000 + "{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(90000) %}{{ '" + "x" * 1000 + "' }}{% endfor %}",
    "{{ ([[1]] * 60000) | sum(start=[]) | length }}",
    "{{ ([[1]] * 60000) | sum(none, []) | length }}",
    "{{ [[[1]] * 60000] | map('sum', start=[]) | list | length }}",
    "{{ 5 | round(-10**9) }}",
    f"{{{{ {COLLIDING} | unique | list | length }}}}",
    f"{{{{ {{}}.fromkeys({COLLIDING}) | length }}}}",
    f"{{{{ dict({COLLIDING} | batch(2)) | length }}}}",
    f"{{{{ dict({COLLIDING} | batch(2) | list) | length }}}}",
    BIG_NUMBERS + "{{ a // b }}",
    BIG_NUMBERS + "{{ a is divisibleby(b) }}",
    LISTS + "{{ range(100000, 199999) | select('in', a) | list }}",
    LISTS + "{% if a == b %}{% endif %}" * 3800,
    LISTS + "{% set c = a[1:] %}" * 1600 + "{{ a | first // 0 }}",
    "{{ range(99999) | map('center', 4000) | list | length }}",
    ("{{a" + "+a" * 40 + "}}") * 1500,
    ("{{a" + " or a" * 140 + "}}") * 180,
    "".join(f"{{% set a{i} = 1 %}}" for i in range(1500)) + "{% if a %}{% endif %}" * 4000,
    "".join(f"{{% set a{i} = 1 %}}" for i in range(490))
    + "".join(f"{{% block b{i} scoped %}}{{% endblock %}}" for i in range(2000)),
    GROW.replace("GROW", "{% set ns.x = ns.x ~ ns.x %}"),
    GROW.replace("GROW", "{% set ns.x = ns.x + ns.x %}"),
    GROW.replace("GROW", "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
    GROW.replace("GROW", "{% set ns.x = [ns.x, ns.x] | join %}"),
    GROW.replace("GROW", "{% set ns.x = ns.x | replace('a', 'aaaaaaaa') %}"),
    GROW.replace("GROW", "{% set ns.x = ns.x.replace('a', 'aaaaaaaa') %}"),
    GROW.replace("GROW", "{% set ns.x = ns.x.join(ns.x) %}"),
    GROW.replace("GROW", "{% set ns.l = ns.l + ns.l %}"),
    GROW.replace("GROW", "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
    GROW.replace("GROW", "{% set ns.l = {'a': ns.l, 'b': ns.l} %}") + "{{ ns.l | tojson }}",
    GROW.replace("GROW", "{% set ns.l = namespace(a=ns.l, b=ns.l) %}") + "{{ ns.l }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_stopped(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TemplateError):
        render(source)
    assert time.perf_counter() - start < 4


def test_endless_loop_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace import chat_sandbox

    monkeypatch.setattr(chat_sandbox, "MAX_SECONDS", 0.2)
    loop = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match=r"more than (0\.2 s|1000000 steps)"):
        render(loop)


def test_long_conversations_are_no_attack() -> None:
    long = [{"role": "user", "content": "word " * 1_000_000}] * 2
    assert len(render(CHATML, long)) > 10_000_000


def test_a_bad_template_costs_nothing_until_used() -> None:
    template = ChatTemplate("{% for %}")
    with pytest.raises(TemplateError):
        template.render(HI)
    program = (
        "import sys; from headrace.chat import ChatTemplate; ChatTemplate('{% for %}');"
        " assert 'jinja2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_template_of_a_file() -> None:
    tokenizer = make(byte_level(special=("<s>", "</s>"), bos_token_id=256, eos_token_id=257))
    source = {"tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}"}
    assert ChatTemplate.from_metadata(source, tokenizer).render(HI) == "<s>|</s>"
    with pytest.raises(TemplateError, match="--raw"):
        ChatTemplate.from_metadata({}, tokenizer)
    with pytest.raises(TemplateError, match="is int"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 1}, tokenizer)
    chatml = make(byte_level(special=("<|im_start|>", "<|im_end|>")))
    assert "<|im_start|>user" in ChatTemplate.from_metadata({}, chatml).render(HI)
