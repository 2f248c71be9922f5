"""TRL's side of benchmarks/trl_comparison.py: run by the Python of TRL's own environment, prints one line of JSON.

Its argument is a JSON object, the `Setting` of that file. Times are taken at the end of every update; evaluation is
left out of them.
"""

import json
import re
import sys
import time

STARTED = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback  # noqa: E402
from trl import DistillationConfig, DistillationTrainer  # noqa: E402


class Clock(TrainerCallback):
    """Wall and processor seconds of each update, and the accuracy after some of them."""

    def __init__(self, setting: dict, tokenizer):
        self.setting, self.tokenizer = setting, tokenizer
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.accuracy: dict[int, float] = {}
        self.start_seconds = 0.0
        self.last = 0.0, 0.0

    def on_train_begin(self, *_arguments, **_keywords):
        """Called by the trainer."""
        self.start_seconds = time.perf_counter() - STARTED
        self.last = time.perf_counter(), time.process_time()

    def on_step_end(self, _arguments, state, _control, model=None, **_keywords):
        """Called by the trainer after every update."""
        self.wall.append(time.perf_counter() - self.last[0])
        self.cpu.append(time.process_time() - self.last[1])
        every = self.setting["evaluate_every"]
        if every and state.global_step % every == 0:
            self.accuracy[state.global_step] = self.evaluate(model)
        self.last = time.perf_counter(), time.process_time()

    @torch.no_grad()
    def evaluate(self, model) -> float:
        """Share of the held-out prompts that are answered rightly, greedily."""
        with open(self.setting["held_out"], encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
            )
            for row in rows
        ]
        asked = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        training = model.training
        model.eval()
        written = model.generate(
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            max_new_tokens=self.setting["max_response_tokens"],
            do_sample=False,
        )
        model.train(training)
        answers = self.tokenizer.batch_decode(written[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        found = [re.search(r";(\d+)$", answer) for answer in answers]
        return sum(f is not None and f[1] == r["answer"] for f, r in zip(found, rows, strict=True)) / len(rows)


def given_trajectories(file: str, count: int):
    """Prompts and responses of one update after the other, as `_generate` of the trainer returns them."""
    stored = np.load(file)
    prompts = np.split(stored["prompt_tokens"], stored["prompt_offsets"][1:-1])
    responses = np.split(stored["response_tokens"], stored["response_offsets"][1:-1])
    for start in range(0, len(prompts), count):
        rows = slice(start, start + count)
        yield [p.tolist() for p in prompts[rows]], [r.tolist() for r in responses[rows]], None, None, None


def main() -> None:
    """Trains, and prints seconds of every update and of the start, losses, and accuracies by update."""
    setting = json.loads(sys.argv[1])
    torch.set_num_threads(setting["threads"])
    with open(setting["prompts"], encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    if setting["chat"]:
        prompts = [p if isinstance(p, list) else [{"role": "user", "content": p}] for p in prompts]
    tokenizer = AutoTokenizer.from_pretrained(setting["student"], padding_side="left")
    clock = Clock(setting, tokenizer)
    trainer = DistillationTrainer(
        model=setting["student"],
        teacher_model=setting["teacher"],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[clock],
        args=DistillationConfig(
            output_dir=setting["output"],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            beta=1.0,
            temperature=1.0,
            max_completion_length=setting["max_response_tokens"],
            per_device_train_batch_size=setting["trl_microbatch"],
            gradient_accumulation_steps=setting["trajectories"] // setting["trl_microbatch"],
            max_steps=setting["updates"],
            learning_rate=setting["learning_rate"],
            lr_scheduler_type="constant" if setting["given"] else "linear",
            warmup_steps=0 if setting["given"] else 5,
            weight_decay=0.0,
            adam_beta2=0.99,
            max_grad_norm=1.0,
            logging_steps=1 if setting["given"] else setting["updates"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    if setting["given"]:
        batches = given_trajectories(setting["given"], setting["trajectories"])
        trainer._generate = lambda _prompts: next(batches)
    trainer.train()
    found = {
        "start": clock.start_seconds,
        "wall": clock.wall,
        "cpu": clock.cpu,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "accuracy": clock.accuracy,
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
