"""Plays one guessing game against an OpenAI-compatible server. It knows nothing of training, but for where the reward goes."""

import json
import os
from pathlib import Path

from openai import OpenAI

client, record = OpenAI(), json.loads(os.environ["UNDERSTUDY_RECORD"])
messages, reward = [{"role": "user", "content": record["prompt"]}], 0.0
for _ in range(4):
    answer = client.chat.completions.create(model="student", messages=messages).choices[0].message
    guess = (answer.content or "").strip()
    if guess == record["answer"]:
        reward = 1.0
    if guess == record["answer"] or not guess.isdigit():
        break
    hint = "higher" if int(guess) < int(record["answer"]) else "lower"
    messages += [answer.model_dump(), {"role": "user", "content": hint}]
Path(os.environ["UNDERSTUDY_REWARD"]).write_text(str(reward))
