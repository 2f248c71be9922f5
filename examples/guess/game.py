"""An environment: a number from 0 to 9 is to be guessed, and each wrong guess is answered with `higher` or `lower`."""


class Guess:
    """One game: the record's `answer` is the number, and the student writes one guess a turn."""

    def __init__(self, turns: int = 4):
        self.left = turns

    async def reset(self, record, episode):
        """Begins a game."""
        self.number = int(record["answer"])
        return [{"role": "user", "content": record["prompt"]}]

    async def step(self, message):
        """Answers a guess: messages, whether the game is over, and the reward."""
        self.left -= 1
        guess = message["content"].strip()
        if guess == str(self.number):
            return [], True, 1.0
        if not guess.isdigit() or not self.left:
            return [], True, 0.0
        hint = "higher" if int(guess) < self.number else "lower"
        return [{"role": "user", "content": hint}], False, None
