"""Every example and recipe is a configuration that `check` accepts, and what makes the examples still runs."""

import asyncio
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.config import PromptsConfig, VerifierConfig
from actors.data.models import load_model
from actors.data.tokenizer import load_tokenizer
from actors.data.verifiers import make_verifier
from actors.errors import UserError
from actors.prompts.prompt_set import load_prompts
from cluster.config_file import load_config
from cluster.preflight import checks
from examples.calculator.calculator import Calculator
from examples.calculator.make_models import OPENING, call, lesson, slipped, spoiled
from examples.calculator.make_models import make_tokenizer as make_calculator_tokenizer
from examples.carries.make_prompts import LEAST, carries
from examples.ciphers.ciphers import CIPHERS, LENGTH, right, written
from examples.ciphers.make_models import lesson as cipher_lesson
from examples.heal.damage import damage
from examples.heal.perplexity import compare, interval, measured, passages
from examples.heal.trim import trim
from examples.tools.shop import EXAMPLES, PRICES, Shop
from examples.two_domains.make_models import running
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizers import CORPUS, byte_level

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "examples" / "addition" / "student"
HEAL = ROOT / "examples" / "heal"
CONFIGS = sorted([*ROOT.glob("examples/*/*.yaml"), *ROOT.glob("configs/*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_check_accepts_it(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))  # whose models and runs are of no consequence
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for _, check in checks(load_config(path), offline=True):
        if check is not None:
            check()


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("privileged.make_models", ["--steps", "1"]), ("two_domains.make_models", ["--steps", "0.001"]),
     ("guess.make_models", ["--steps", "0.001"]), ("calculator.make_models", ["--steps", "0.001"])],
)  # fmt: skip
def test_what_makes_the_models_runs(module: str, arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"examples.{module}", *arguments, "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    assert list(tmp_path.glob("*/model.safetensors"))


def test_the_committed_prompts_are_those_that_the_scripts_make(tmp_path: Path) -> None:
    made = ("two_domains", "calculator", "ciphers")
    makers = (
        ("carries.make_prompts", []),
        ("tools.make_prompts", []),
        *((f"{name}.make_models", ["--steps", "0.001"]) for name in made),
    )
    for module, extra in makers:
        out = tmp_path / module
        command = [sys.executable, "-m", f"examples.{module}", *extra, "--output", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
        for name in ("train.jsonl", "heldout.jsonl"):
            assert (out / name).read_bytes() == (ROOT / "examples" / module.partition(".")[0] / name).read_bytes()


def test_the_answers_are_right() -> None:
    for path in set(ROOT.glob("examples/*/*.jsonl")) - set(HEAL.glob("*")):
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            if path.parent.name == "ciphers":
                assert row["answer"] == row["prompt"] and all(
                    right(written(row["prompt"], name), row["answer"]) for name in CIPHERS
                )
            elif path.parent.name == "guess":
                first, last = map(int, row["prompt"].split("-"))
                assert first <= int(row["answer"]) <= last
            elif path.parent.name == "arena":
                assert row["prompt"] == f"game {row['seed']}"
            elif path.parent.name == "tools":
                named = [str(price) for item, price in PRICES.items() if item in row["prompt"]]
                a, sign, b = re.findall(r"\d+|plus|times|[+*]", row["prompt"]) or (0, "", 0)
                found = int(a) * int(b) if sign in ("*", "times") else int(a) + int(b)
                assert [row["answer"]] == (named or [str(found)])
            elif row.get("domain") == "running":
                totals = [sum(map(int, row["prompt"][1 : i + 2])) % 10 for i in range(len(row["prompt"]) - 1)]
                assert row["answer"] == "".join(map(str, totals))
            else:
                a, b = map(int, row["prompt"].split("+"))
                assert int(row["answer"]) == a + b
                assert path.parent.name != "carries" or carries(a, b) >= LEAST


def told(environment: Any, record: dict[str, str], *turns: dict[str, Any]) -> list[Any]:
    """What an environment answers to these turns."""

    async def play() -> list[Any]:
        await environment.reset(record, None)
        return [await environment.step({"role": "assistant", "content": "", **turn}) for turn in turns]

    return asyncio.run(play())


def calls(name: str, **arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def answered(*results: str) -> tuple[list[dict[str, str]], bool, None]:
    return [{"role": "tool", "content": result} for result in results], False, None


def test_the_calculator_adds_says_where_a_call_is_wrong_and_judges_the_answer() -> None:
    record = {"prompt": "12+30", "answer": "42"}
    unread = {"content": '<tool_call>{"name": "add"</tool_call>'}
    turns = (calls("add", a=12, b=30), calls("add", a=1, x=2), calls("ad", a=1, b=2), calls("add", a="1", b=2), unread)
    assert told(Calculator(), record, *turns) == [answered(one) for one in ("42", *["error"] * 4)]
    two = {"tool_calls": [*calls("add", a=1, b=2)["tool_calls"], *calls("add", a=True, b=2)["tool_calls"]]}
    assert told(Calculator(), record, two) == [answered("3", "error")]
    assert told(Calculator(), record, {"content": " 42\n"}) == [([], True, 1.0)]
    assert told(Calculator(), record, {"content": "41"}) == [([], True, 0.0)]


def test_the_calculators_lessons_are_texts_of_its_chat_template_and_calls_that_the_parser_reads() -> None:
    from actors.environment.vllm_tool_parser import tool_parser

    tokenizer = make_calculator_tokenizer()
    parse = tool_parser("hermes", tokenizer)
    read = parse(call(12, 30), list(Calculator.tools), 0)
    assert read["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 12, "b": 30}}
    messages = [{"role": "user", "content": "12+30"}, read, {"role": "tool", "content": "42"}]
    text = tokenizer.apply_chat_template(messages, tools=Calculator.tools, tokenize=False, add_generation_prompt=True)
    assert text == f"{OPENING}12+30<assistant>{call(12, 30)}<eos><tool>42<assistant>"
    draw = random.Random(0)
    wrong = {spoiled(call(12, 30), draw) for _ in range(50)}
    assert len(wrong) == 5 and tokenizer.unk_token_id not in tokenizer(" ".join([text, *wrong]))["input_ids"]
    for spoilt in wrong:
        [(messages, done, _)] = told(
            Calculator(), {"prompt": "12+30", "answer": "42"}, parse(spoilt, list(Calculator.tools), 0)
        )
        assert messages == [{"role": "tool", "content": "error"}] and not done


def test_a_slip_changes_one_digit_that_is_not_the_first() -> None:
    draw, places = random.Random(0), set()
    for _ in range(500):
        found = str(slipped(4821, draw))
        wrong = [place for place in range(4) if found[place] != "4821"[place]]
        assert len(wrong) <= 1
        places.update(wrong)
    assert places == {1, 2, 3} and 40 <= slipped(47, draw) < 50


@pytest.mark.parametrize("habits", [0.0, 1.0])
def test_a_lesson_is_an_episode_up_to_a_result_and_what_the_model_says_next(habits: float) -> None:
    draw, right, others, pairs = random.Random(0), {"call": 0, "answer": 0}, {"call": 0, "answer": 0}, set()
    for _ in range(1000):
        text, said = lesson(draw, habits, ())
        asked, *turns = text.split("<assistant>")
        a, b = map(int, asked.split("+"))
        pairs.add((a, b))
        assert min(a, b) >= 10 and max(a, b) < 1000
        results = [turn.split("<eos><tool>") for turn in turns]
        for place, (turn, result) in enumerate(results):
            read = re.fullmatch(re.escape(call(1, 2)).replace("1", r"(\d+)").replace("2", r"(\d+)"), turn)
            assert result == (str(sum(map(int, read.groups()))) if read else "error")
            assert (result == "error") or place == len(results) - 1, "a result is followed by the answer"
        ended = bool(results) and results[-1][1] != "error"
        kind, expected = ("answer", results[-1][1]) if ended else ("call", call(a, b))
        (right if said == expected else others)[kind] += 1
    assert min(right.values()) > 150
    assert others == {"call": 0, "answer": 0} if not habits else min(others.values()) > 30
    held_out = set(list(pairs)[:500])
    draw = random.Random(0)
    for _ in range(500):
        a, b = map(int, lesson(draw, habits, held_out)[0].partition("<")[0].split("+"))
        assert (a, b) not in held_out


def test_a_lesson_of_the_ciphers_is_in_any_of_them() -> None:
    draw, names = random.Random(0), set()
    for _ in range(100):
        word, answer = cipher_lesson(draw)
        assert len(word) == LENGTH and right(answer, word) == 1
        names.add(answer[0])
    assert names == set(CIPHERS)


def test_the_shop_answers_calls_and_wants_a_tool_to_be_used() -> None:
    record = {"prompt": "What does a lamp cost?", "answer": "24"}
    turns = (calls("price", item="lamp"), calls("multiply", a=3, b=4), calls("prices"), calls("price", item="cat"),
             {"content": "<tool_call>{"}, {"content": "It costs $24."})  # fmt: skip
    *given, judged = told(Shop(), record, *turns)
    assert given[:2] == [answered("24"), answered("12")] and judged == ([], True, 1.0)
    assert all(messages[0]["content"].startswith("error: ") for messages, _, _ in given[2:])
    assert told(Shop(), record, {"content": "24"}) == [([], True, 0.0)], "a guess"
    assert told(Shop(), record, turns[0], {"content": "124"})[-1] == ([], True, 0.0)


def test_no_question_of_the_shop_is_asked_twice_or_shown_as_an_example() -> None:
    files = [(ROOT / "examples" / "tools" / f"{name}.jsonl").read_text("utf-8") for name in ("train", "heldout")]
    asked = [json.loads(line)["prompt"] for text in files for line in text.splitlines()]
    shown = [message["content"] for message in EXAMPLES if message["role"] == "user"]
    assert len({*asked, *shown}) == len(asked) + len(shown) == 225


def test_carries_by_hand() -> None:
    assert [carries(a, b) for a, b in ((1, 2), (5, 5), (99, 1), (45, 55), (90, 9))] == [0, 1, 2, 2, 0]


def test_a_running_sum_by_hand() -> None:
    class Draw:
        digits = iter([4, 8, 2, 1, 7])

        def randrange(self, _: int) -> int:
            return next(self.digits)

        def random(self) -> float:
            return 0.5

    assert running(Draw()) == ("-48217", "4+0=4,8+4=2,2+2=4,1+4=5,7+5=2;42452")  # type: ignore[arg-type]


def prompts_of_heal() -> dict[str, list[dict[str, Any]]]:
    """The records of each file."""
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in HEAL.glob("*.jsonl")
    }


def test_sizes_of_the_sets_of_heal_and_no_prompt_twice() -> None:
    sets = prompts_of_heal()
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 420, "heldout": 80, "questions": 60}
    kinds = {name: {row["kind"] for row in rows} for name, rows in sets.items()}
    assert kinds["train"] == kinds["heldout"] and len(kinds["train"]) == 8
    assert all(("answer" in row) == (name == "questions") for name, rows in sets.items() for row in rows)
    asked = [last_words(row["prompt"]) for rows in sets.values() for row in rows]
    assert {text for text in asked if asked.count(text) > 1} == set()
    assert 2_900 < len((HEAL / "text.txt").read_text("utf-8").split()) < 3_100
    assert len(passages(HEAL / "text.txt")) == 26


def last_words(prompt: Any) -> str:
    """What a prompt asks, without case, punctuation and white space."""
    text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    return re.sub(r"[^a-z0-9+*/=-]", "", text.lower())


def test_every_prompt_of_heal_is_read_and_every_answer_can_be_judged() -> None:
    tokenizer = load_tokenizer(str(TINY), False, "student.model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    verify = make_verifier(VerifierConfig("numeric"))
    for name, rows in prompts_of_heal().items():
        config = PromptsConfig(str(HEAL / f"{name}.jsonl"), reference_field="answer" if name == "questions" else None)
        read = load_prompts(config, tokenizer, 10_000, "prompts")
        assert len(read) == len(rows)
        assert name != "questions" or all(verify(f"It is {answer}.", answer) == 1 for answer in read.references)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_damaged_model_is_the_source_without_these_layers(architecture: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "damaged"
    make_tiny_model(source, hidden=32, layers=7, context=64, architecture=architecture)
    assert damage(str(source), output, "1,4") == [1, 4]
    before, after = (load_model(str(path), None, "cpu", False, "student.model") for path in (source, output))
    assert after.config.num_hidden_layers == 5 and after.dtype == before.dtype
    kinds = getattr(after.config, "layer_types", None)
    assert kinds is None or len(kinds) == 5
    expected = {name.replace(".layers.6.", ".layers.4."): value for name, value in before.state_dict().items()}
    for old, new in ((2, 1), (3, 2), (5, 3)):
        expected |= {
            name.replace(f".layers.{old}.", f".layers.{new}."): value
            for name, value in before.state_dict().items()
            if f".layers.{old}." in name
        }
    found = after.state_dict()
    assert all(value.equal(expected[name]) for name, value in found.items())
    assert sum(".layers." in name for name in found) * 7 == sum(".layers." in name for name in before.state_dict()) * 5
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (
        load_tokenizer(str(output), False, "a").chat_template == load_tokenizer(str(source), False, "a").chat_template
    )
    with pytest.raises(UserError, match="a directory that does not exist yet"):
        damage(str(source), output, "1")


def test_which_layers_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tiny_model(source, hidden=32, layers=7, context=64)
    for wrong in ("7", "1,1", "a", "", "0,1,2,3,4,5,6", "-1"):
        with pytest.raises(UserError, match=r"^--drop"):
            damage(str(source), tmp_path / "other", wrong)
    with pytest.raises(UserError, match=r"^--count: found 4, expected 1 to 3"):
        damage(str(source), tmp_path / "other", None, count=4)
    drawn = [damage(str(source), tmp_path / str(seed), None, count=2, seed=seed) for seed in range(6)]
    assert len({tuple(layers) for layers in drawn}) > 1
    assert {layer for layers in drawn for layer in layers} <= {2, 3, 4}
    assert damage(str(source), tmp_path / "again", None, count=2, seed=3) == drawn[3]


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_trimmed_model_is_the_source_with_fewer_tokens(tie: bool, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "trimmed"
    own = byte_level()
    own.add_special_tokens({"additional_special_tokens": ["<|late|>"]})  # as in Qwen: the highest id of all
    own.eos_token = "<|late|>"
    make_tiny_model(source, hidden=32, layers=1, architecture="llama", tokenizer=own, vocab_extra=9, tie=tie)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [len(own) - 1, 1], "pad_token_id": 0}))
    kept, rows = trim(str(source), output, 330)
    assert len(kept) == 330 and kept == sorted(set(kept)) and rows == len(own) + 9

    old, new = (load_tokenizer(str(path), False, "a") for path in (source, output))
    assert len(new) == 330 and old.convert_ids_to_tokens(kept) == new.convert_ids_to_tokens(range(330))
    before, after = (json.loads((path / "tokenizer.json").read_text())["model"]["merges"] for path in (source, output))
    assert after == before[: len(after)] and 0 < len(after) < len(before)
    for text in (*CORPUS, "\x00\x7f é 日 🙂 <|user|> <think> unseen"):
        ours, theirs = (one(text, add_special_tokens=False)["input_ids"] for one in (new, old))
        assert new.decode(ours) == text == old.decode(theirs) and len(ours) >= len(theirs)
    assert any(len(new.tokenize(text)) > len(old.tokenize(text)) for text in CORPUS)
    talk = [{"role": "user", "content": "12"}, {"role": "assistant", "content": "The answer"}]
    assert new.apply_chat_template(talk, tokenize=False) == old.apply_chat_template(talk, tokenize=False)
    names = ("eos_token", "pad_token")
    assert [getattr(new, name) for name in names] == [getattr(old, name) for name in names] == ["<|late|>", "<|pad|>"]

    source_model, model = (load_model(str(path), "float32", "cpu", False, "a") for path in (source, output))
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert getattr(model, part)().weight.equal(getattr(source_model, part)().weight[kept])
    others = [name for name in model.state_dict() if "embed_tokens" not in name and "lm_head" not in name]
    assert all(model.state_dict()[name].equal(source_model.state_dict()[name]) for name in others)
    end = new.convert_tokens_to_ids("<|late|>")
    assert kept[end] == len(own) - 1 and end == 329
    assert (model.config.vocab_size, model.config.eos_token_id, model.config.pad_token_id) == (330, end, 0)
    assert json.loads((output / "generation_config.json").read_text()) == {"eos_token_id": [end, 1], "pad_token_id": 0}
    known = new("12 = 7", return_tensors="pt")["input_ids"]
    assert torch.allclose(
        model(known).logits, source_model(torch.tensor(kept)[known]).logits[..., kept], atol=1e-5, rtol=0
    )


def test_what_cannot_be_trimmed_is_told(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tiny_model(source, hidden=32, layers=1, tokenizer=byte_level())
    tokens = len(byte_level())
    for wrong in (0, 263, tokens):
        with pytest.raises(UserError, match=f"^--tokens: found {wrong}, expected 264 to {tokens - 1}: "):
            trim(str(source), tmp_path / "other", wrong)
    with pytest.raises(UserError, match="a directory that does not exist yet"):
        trim(str(source), source, 300)
    with pytest.raises(UserError, match=r"^SOURCE: found a tokenizer WordLevel"):
        trim(str(TINY), tmp_path / "other", 50)
    (source / "generation_config.json").write_text('{"eos_token_id": 99999}')
    with pytest.raises(UserError, match=r"eos_token_id 99999, expected the id of a token"):
        trim(str(source), tmp_path / "other", 300)
    assert not (tmp_path / "other").exists()


def test_perplexity_is_that_of_the_models_own_loss_and_a_model_does_not_differ_from_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["12+34=46", "5+5=10;7", "1+1"]
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(texts))
    assert passages(file) == texts
    model, tokenizer = load_model(str(TINY), "float32", "cpu", False, "a"), load_tokenizer(str(TINY), False, "a")
    nats, counts = measured(model, tokenizer, texts)
    for text, total, count in zip(texts, nats, counts, strict=True):
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        assert count == tokens.shape[1] - 1
        assert total / count == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-5)
    compare([str(TINY), str(TINY)], file, 0)
    first, second = capsys.readouterr().out.splitlines()
    assert f"{nats.sum() / counts.sum():.4f} nats a token" in first
    assert f"{nats.sum() / np.log(2) / sum(map(len, texts)):.4f} [" in first
    assert second.endswith("; +0.0000 [+0.0000, +0.0000] bits a byte to the first")


def test_perplexity_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    texts = {"two.txt": "12+34=46\n\n5+5=10", "one.txt": "12+34=46", "words.txt": "12\n\nüber 12",
             "long.txt": "1+1=2\n\n" + 99 * "12+34=46;", "none.txt": None, "folder": None, "bytes.txt": None}  # fmt: skip
    for name, text in texts.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\n\n\xfe")
    wrong = {"one.txt": "at least two passages", "words.txt": "no token for 1 pieces of the text", "long.txt": "context",
             "none.txt": "No such file", "folder": "a directory", "bytes.txt": "a text in UTF-8"}  # fmt: skip
    for name, told in wrong.items():
        with pytest.raises(UserError, match=told):
            compare([str(TINY)], tmp_path / name, 0)
    for model in ("none", "folder", "two.txt"):
        with pytest.raises(UserError, match="MODEL"):
            compare([str(tmp_path / model)], tmp_path / "two.txt", 0)


def test_the_first_word_of_a_passage_is_context_for_every_tokenizer(tmp_path: Path) -> None:
    text = "Lehrerinnen größer, 12 for\nüber"
    counted = {}
    for vocabulary in (300, 500):
        tokenizer = byte_level(vocabulary)
        path = make_tiny_model(tmp_path / str(vocabulary), hidden=32, layers=1, tokenizer=tokenizer)
        model = load_model(str(path), "float32", "cpu", False, "a")
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        start = next(place for place in range(tokens.shape[1]) if tokenizer.decode(tokens[0, :place]) == "Lehrerinnen")
        labels = tokens.clone()
        labels[0, :start] = -100
        nats, count = measured(model, tokenizer, [text])
        assert count[0] == tokens.shape[1] - start < tokens.shape[1] - 1
        assert nats[0] / count[0] == pytest.approx(model(tokens, labels=labels).loss.item(), rel=1e-5)
        counted[vocabulary] = count[0]
    assert counted[300] > counted[500]


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    draw, inside = np.random.default_rng(1), 0
    for _ in range(200):
        counts = draw.integers(50, 150, 30)
        low, high = interval(counts * draw.normal(3.0, 0.5, 30), counts, 0)
        inside += low < 3.0 < high
    assert 0.88 < inside / 200 < 0.99


def test_models_under_the_home_directory_are_checked_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "student").symlink_to(TINY)
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["student.model=~/student"])
    found = dict(checks(config, offline=True))
    assert all(found[name] is not None for name in ("student", "teacher default", "memory of learner", "prompts"))
    assert found["student"]() == "74 tokens, prompts of at most 48"  # type: ignore[misc]
