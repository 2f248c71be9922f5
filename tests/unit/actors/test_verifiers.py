import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import VerifierConfig
from actors.data.verifiers import last_number, make_verifier, trial
from actors.errors import UserError
from tests.documented import python_examples


def try_verifier(config, reference, key):
    return trial(config, key)(reference, reference)


def verify(name, response, reference, pattern=None):
    return make_verifier(VerifierConfig(name=name, pattern=pattern), "evaluation.verifier")(response, reference)


@pytest.mark.parametrize(
    ("response", "reference", "reward"),
    [("15", "15", 1.0), (" 15\n", "15", 1.0), ("15", "15 ", 1.0), ("15.", "15", 0.0), ("", "15", 0.0), ("A", "a", 0.0)],
)
def test_exact_compares_all_but_the_white_space_at_the_ends(response, reference, reward):
    assert verify("exact", response, reference) == reward


@pytest.mark.parametrize(
    ("pattern", "response", "reference", "reward"),
    [
        (r";(\d+)", "7+8=15;15", "15", 1.0),
        (r";(\d+)", "7+8=15;16", "15", 0.0),
        (r"\d+", "a 15 b", "15", 1.0),
        (r"answer: (\w+)", "answer: no. Wait, answer: yes", "yes", 1.0),
        (r"answer: (\w+)", "I do not know", "yes", 0.0),
        (r"(yes)|no", "no", "no", 0.0),
        (r"<a>(.*)</a>", "<a> 15 </a>", "15", 1.0),
    ],
)
def test_regex_compares_what_its_last_match_captures(pattern, response, reference, reward):
    assert verify("regex", response, reference, pattern) == reward


def test_a_pattern_may_come_before_any_comparison():
    assert verify("numeric", "The answer is 1,000. That took 3 steps", "1000", r"answer is (\S+)") == 1.0
    assert verify("exact", "x=3;", "3", r"x=(\d)") == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("15", 15),
        ("first 3, then 15.", 15),
        ("a total of $1,250.50.", Fraction(2501, 2)),
        ("12,345,678", 12345678),
        ("1,2,3", 3),
        ("1,2345", 2345),
        ("1.2.3", 3),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"so $-\dfrac{3}{4}$", Fraction(-3, 4)),
        ("x = -5", -5),
        ("\N{MINUS SIGN}5", -5),
        ("10-5", 5),
        ("(10)-5", 5),
        (".5", Fraction(1, 2)),
        ("1.5e3", 1500),
        ("2e-2", Fraction(1, 50)),
        ("7+8+0=15,7+1;85", 85),
        ("none", None),
        ("", None),
        ("3/0", None),
        ("1e999999999", None),
        ("1/1e999999999", None),
    ],
)
def test_the_last_number_of_a_text_is_read_exactly(text, number):
    assert last_number(text) == number


@given(st.fractions(max_denominator=10**6))
def test_any_fraction_is_read_back(number):
    assert last_number(f"it is {number}") == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_thousands_separators_do_not_change_a_number(number):
    assert last_number(f"{number:,}") == last_number(f"{number}") == Fraction(number)


@given(st.text(st.characters(codec="ascii"), max_size=200))
def test_any_text_has_a_last_number_or_none(text):
    assert isinstance(last_number(text), Fraction | None)


@pytest.mark.parametrize(
    ("piece", "times"),
    [("1", 50_000), ("1,", 50_000), ("1/", 50_000), ("-", 50_000), (r"\frac{", 10_000), ("1 ", 50_000)],
)
def test_a_degenerate_response_is_judged_in_time(piece, times):
    start = time.process_time()
    assert verify("numeric", piece * times, "7") == 0.0
    assert time.process_time() - start < 2


@pytest.mark.parametrize(("response", "reward"), [("0.50", 1.0), ("1/2", 1.0), ("so 2", 0.0), ("half", 0.0)])
def test_numeric_compares_the_last_number(response, reward):
    assert verify("numeric", response, "1/2") == reward


def test_numeric_refuses_a_reference_without_a_number():
    with pytest.raises(UserError, match=r"^evaluation\.verifier: found numeric, and the reference 'half'"):
        verify("numeric", "1/2", "half")


@pytest.mark.parametrize("name", ["exact", "numeric", "math", "regex"])
def test_a_missing_reference_is_an_error_and_not_a_wrong_answer(name):
    if name == "math":
        pytest.importorskip("math_verify")
    with pytest.raises(UserError, match=r"^evaluation\.verifier: found a prompt without a reference"):
        verify(name, "15", None, r"\d+" if name == "regex" else None)


@pytest.mark.parametrize(
    ("response", "reference", "reward"),
    [
        (r"so \boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"The answer is $\frac{1}{2}$", "1/2", 1.0),
        (r"$x^2 + 2x + 1$", "$(x+1)^2$", 1.0),
        ("(1,2)", "(1,2)", 1.0),
        (r"$x^2 + 2x + 1$", "(x+1)^2", 1.0),
        ("$2$", r"\frac{1}{2}", 0.0),
        (r"\boxed{3}", r"\boxed{4}", 0.0),
        ("I do not know", "4", 0.0),
    ],
)
def test_math_compares_expressions(response, reference, reward):
    pytest.importorskip("math_verify")
    assert verify("math", response, reference) == reward


def test_math_outside_the_main_thread_is_an_error_since_it_could_not_be_bounded():
    pytest.importorskip("math_verify")
    raised = []

    def run():
        try:
            verify("math", r"\boxed{3}", "4")
        except ValueError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised and "thread" in raised[0]


def test_math_without_math_verify_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError, match=r"^evaluation\.verifier\.name: found math, .*pip install understudy\[math\]"):
        verify("math", "1", "1")


def test_an_unknown_verifier_names_the_nearest():
    with pytest.raises(UserError, match=r"found numerc, expected .* \(did you mean 'numeric'\?\)"):
        verify("numerc", "1", "1")


def test_regex_needs_a_pattern_that_compiles():
    with pytest.raises(UserError, match=r"^evaluation\.verifier\.pattern: found null"):
        verify("regex", "1", "1")
    with pytest.raises(UserError, match=r"^evaluation\.verifier\.pattern: found \(1 \(missing \)"):
        verify("regex", "1", "1", "(1")


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    source = """
NUMBER = 3
def half(response, reference): return 0.5 if response.isdigit() else False
def broken(response, reference): raise KeyError("left")
def infinite(response, reference): return float("nan")
def textual(response, reference): return "good"
def nothing(response, reference): pass
def numeral(response, reference): return "1"
def alone(response): return 1.0
def demanding(response, reference, scale): return 1.0
def relaxed(response, reference, scale=2.0): return scale
"""
    (tmp_path / "my_rewards.py").write_text(source)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_of_the_users_own_is_called_with_response_and_reference(user_module):
    assert verify("my_rewards:half", "1", "one") == 0.5
    assert verify("my_rewards:half", "one", None) == 0.0
    assert verify("my_rewards:relaxed", "one", None) == 2.0


def test_a_verifier_is_tried_with_a_reference_whether_or_not_the_pattern_matches_it(user_module):
    try_verifier(VerifierConfig("my_rewards:half", pattern="never"), "1", "evaluation.verifier")
    try_verifier(VerifierConfig("numeric", pattern="= (.*)"), "1", "evaluation.verifier")
    with pytest.raises(UserError, match="which returned None"):
        try_verifier(VerifierConfig("my_rewards:nothing", pattern="never"), "1", "evaluation.verifier")
    with pytest.raises(UserError, match=r"^evaluation\.verifier: found numeric, and the reference 'half'"):
        try_verifier(VerifierConfig("numeric"), "half", "evaluation.verifier")
    with pytest.raises(UserError, match=r"^evaluation\.verifier\.pattern: found \(1"):
        try_verifier(VerifierConfig("exact", pattern="(1"), "1", "evaluation.verifier")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewarts:half", r"found my_rewarts:half \(ModuleNotFoundError: No module named 'my_rewarts'\)"),
        ("my_broken:half", r"found my_broken:half \(ZeroDivisionError"),
        (":half", r"found ':half', expected the import path of a function"),
        (
            "my_rewards:hal",
            r"my_rewards:hal, expected a function in .*my_rewards\.py \(did you mean 'my_rewards:half'\?\)",
        ),
        ("my_rewards:NUMBER", r"my_rewards:NUMBER, which is of type int, expected a function"),
        ("my_rewards:halt", r"my_rewards:halt, expected .*mean 'my_rewards:half'"),
        ("my_rewards:broken", r"my_rewards:broken, which failed \(KeyError: 'left'\)"),
        ("my_rewards:textual", "my_rewards:textual, which returned 'good', expected a finite reward"),
        ("my_rewards:nothing", "my_rewards:nothing, which returned None, expected a finite reward"),
        ("my_rewards:numeral", "my_rewards:numeral, which returned '1', expected a finite reward"),
        (
            "my_rewards:alone",
            r"my_rewards:alone\(response\), expected a function of two strings, \(response, reference\)",
        ),
        ("my_rewards:demanding", r"my_rewards:demanding\(response, reference, scale\), expected a function of two"),
        ("my_rewards:infinite", "my_rewards:infinite, which returned nan, expected a finite reward"),
    ],
)
def test_a_fault_of_the_users_own_function_is_named(user_module, name, message):
    with pytest.raises(UserError, match=rf"^evaluation\.verifier\.name: .*{message}"):
        verify(name, "1", "1")


def test_the_documented_verifier_judges_as_it_says(tmp_path, monkeypatch):
    [example] = python_examples("docs/extending.md", "A verifier")
    (tmp_path / "tolerance.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    name = "tolerance:within_one_percent"
    try_verifier(VerifierConfig(name), "200", "evaluation.verifier")
    found = [verify(name, *pair) for pair in (("so 199", "200"), ("2 or 197.5", "200"), ("none", "200"), ("-1", None))]
    assert found == [1.0, 0.0, 0.0, 0.0]
