"""Which prompts are passed over, by hand; and that a campaign of many epochs always goes on."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config import TrainingPromptsConfig
from actors.errors import UserError
from actors.prompts.order import PromptOrder
from cluster.loop.prompt_choice import AGAIN_EPOCHS, FIRST_SHARE, NEWEST, choice_of, passed_over
from cluster.prompt_validation import refuse_sources
from cluster.state.campaign_state import CampaignState
from tests.small_config import config as make_config


def chosen(**settings: Any) -> Any:
    """(the choice, what it knows)"""
    known: dict[int, tuple[float, int]] = {}
    return choice_of(TrainingPromptsConfig(path="p", **settings), 100, known), known


def test_no_choice_where_every_prompt_is_asked() -> None:
    assert choice_of(TrainingPromptsConfig(path="p"), 100, {}) is None


def test_a_running_estimate_is_of_finite_values_and_of_the_whole_group() -> None:
    choice, known = chosen(keep="margin", margin=0.1)
    choice.learn(np.array([(0, 5, 0), (0, 5, 1), (0, 6, 0), (0, 6, 1)]), [0.25, 0.75, math.nan, 1.0])
    assert known == {5: (0.5, 0), 6: (1.0, 0)}
    choice.learn(np.array([(1, 5, 0), (1, 6, 0)]), [0.0, math.nan])
    assert known == {5: (0.5 + NEWEST * (0.0 - 0.5), 1), 6: (1.0, 0)}


def test_those_on_which_both_agree_are_passed_over_until_they_are_due_again_and_no_unseen_one_is() -> None:
    choice, _ = chosen(keep="margin", margin=0.1)
    assert choice.passes(0, 1, 0) is None
    choice.learn(np.array([(0, 1, 0), (0, 2, 0), (0, 3, 0)]), [0.0999, 0.1, -0.2])
    assert [choice.passes(epoch, 1, 9) for epoch in range(1, 6)] == ["agreed"] * (AGAIN_EPOCHS - 1) + [None, None]
    assert [choice.passes(1, prompt, 9) for prompt in (1, 2, 3, 4)] == ["agreed", None, "agreed", None]


@pytest.mark.parametrize("order", ["easy_first", "hard_first"])
def test_a_curriculum_begins_at_one_end_and_has_all_at_half_of_the_campaign(order: str) -> None:
    choice, _ = chosen(curriculum=order)
    choice.learn(np.array([(0, prompt, 0) for prompt in range(101)]), np.linspace(0, 1, 101))
    asked = [[p for p in range(101) if choice.passes(1, p, step) is None] for step in (0, 10, 49, 50, 99)]
    quarter = list(range(26)) if order == "easy_first" else list(range(75, 101))
    assert asked[0] == quarter and FIRST_SHARE == 0.25
    share = math.sqrt(0.2 * (1 - 1 / 16) + 1 / 16)
    assert len(asked[1]) == math.floor(share * 100) + 1 and set(asked[0]) < set(asked[1]) < set(asked[2])
    assert asked[3] == asked[4] == list(range(101))
    assert choice.passes(1, 0, 0) == ("later" if order == "hard_first" else None)
    choice.learn(np.array([(1, p, 0) for p in range(101)]), np.linspace(100, 101, 101))
    # The bound follows what is known, also within an update.
    assert [p for p in range(101) if choice.passes(2, p, 0) is None] == quarter
    choice.learn(np.array([(1, 0, 0)]), [1000.0])
    assert (choice.passes(2, 0, 0) is None) == (order == "hard_first")


def test_where_all_agree_each_is_asked_once_in_four_epochs() -> None:
    choice, _ = chosen(keep="margin", margin=math.inf)
    order, asked, cursor = PromptOrder(3, {"": 7}), [], 0
    for _ in range(28):
        while choice.passes(*order.id_at(cursor), 0) is not None:
            cursor += 1
        epoch, prompt = order.id_at(cursor)
        choice.learn(np.array([(epoch, prompt, 0)]), [0.0])
        asked.append((epoch, prompt))
        cursor += 1
    assert asked == [order.id_at(cursor) for cursor in range(112) if cursor // 7 % 4 == 0]


def test_what_is_known_outlasts_a_checkpoint_and_what_is_passed_over_is_counted() -> None:
    state = CampaignState(prompts={3: (0.1, 2), 70: (1 / 3, 0)})
    assert CampaignState.from_json(state.to_json()).prompts == state.prompts
    old = state.to_json()
    del old["prompts"]  # of an earlier release
    assert CampaignState.from_json(old).prompts == {}
    assert passed_over({"agreed": 4, "stale": 2}) == {"passed_over_agreed": 4, "passed_over_later": 0}


def test_a_choice_by_the_teachers_text_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.prompts.keep = "margin"
    refuse_sources(config)
    config.learner.objective.estimator = "sft"
    with pytest.raises(UserError, match=r"prompts.keep: found margin, expected all with the estimator sft"):
        refuse_sources(config)
